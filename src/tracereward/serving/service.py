"""State shared by the endpoints: settings, the engine, prompt rendering, limits and metrics."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from scipy.special import expit

from tracereward.errors import InputError
from tracereward.messages import message_text
from tracereward.modeling.rendering import render_prompt, think_marks
from tracereward.rewards.parts import task_of
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores
from tracereward.serving.engine import Engine
from tracereward.serving.schemas import ErrorResponse, Message, Usage
from tracereward.verdict import Verdict

T = TypeVar("T")
REWARDS = (-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8)
"""Bounds of the histogram of trace rewards, in log-odds."""
LENGTHS = tuple(2**power for power in range(4, 17))
"""Bounds of the histogram of lengths, in tokens: 16 to 65,536."""
log = logging.getLogger("tracereward.serve")


@dataclass(frozen=True)
class Settings:
    """Server settings.

    Attributes:
        name: the model's name in responses.
        api_key: required by every endpoint except those of `middleware.OPEN`; None for no key.
        local_only: accept only requests whose Host is a loopback name, see `Guard`.
        upstream: base URL of an OpenAI-compatible server, e.g. ``http://127.0.0.1:8000/v1``; None for no proxy.
        upstream_key: API key for the upstream.
        upstream_seconds: timeout for all samples of a request.
        max_upstream: concurrent requests to the upstream.
        abstain: bound on the probability of an answer of the proxy that is wrong, see `rewards.abstention`; None
            answers every request.
        samples: default number of samples per proxied request.
        max_bytes: limit of a request's body.
        body_seconds: timeout for receiving the body.
        max_candidates: limit of traces per request, and of samples per proxied request.
        max_tokens: limit of tokens per request, over all traces and prompts.
        max_queue: limit of queued tokens.
        token_budget: padded tokens of one forward pass; None for the device's default.
        max_wait: seconds that a trace may wait to be batched with others.
        log_prompts: log prompts, and texts without a prompt.
        verdict: of the reward model, shown on the page; None if it has none.
    """

    name: str
    api_key: str | None = None
    local_only: bool = False
    upstream: str | None = None
    upstream_key: str | None = None
    upstream_seconds: float = 300.0
    max_upstream: int = 64
    abstain: float | None = None
    samples: int = 8
    max_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    max_candidates: int = 64
    max_tokens: int = 65_536
    max_queue: int = 1_000_000
    token_budget: int | None = None
    max_wait: float = 0.0
    log_prompts: bool = False
    verdict: Verdict | None = None


class Refused(HTTPException):  # FastAPI passes only these on while it reads a body
    """A request that the server rejects, with OpenAI's error code and the name of the field."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(status, message)
        self.message, self.code, self.param = message, code, param


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request cannot be scored.",
        401: "The API key is missing or wrong.",
        404: "Unknown model, or no upstream.",
        408: "The body was not received in time.",
        413: "More bytes, candidates or tokens than the limits.",
        421: "Host is not a loopback name, on a server without an API key.",
        422: "A field is missing or has the wrong type, or a trace is longer than the model's positions.",
        429: "The queue is full; see Retry-After.",
        500: "A trace could not be scored.",
        503: "The server is shutting down; see Retry-After.",
    }.items()
}


class Service:
    """A reward model with its engine and metrics."""

    def __init__(self, model: Scorer, settings: Settings):
        self.model = model
        self.settings = settings
        self.task = task_of(model.settings)
        self.think: tuple[str, str] = think_marks(model.tokenizer, model.settings.rendering)
        self.ready = False
        self.registry = CollectorRegistry()
        named = {"namespace": "tracereward", "registry": self.registry}
        self.requests = Counter("requests", "Responses, by path and status.", ["path", "status"], **named)
        self.seconds = Histogram("request_seconds", "Time to the response.", ["path"], **named)
        self.traces = Counter("traces", "Traces scored.", **named)
        self.tokens = Counter("tokens", "Tokens read, prompts included.", **named)
        self.rewards = Histogram("trace_reward", "Reward of a trace, in log-odds.", buckets=REWARDS, **named)
        self.lengths = Histogram(
            "trace_tokens", "Tokens of a trace, its prompt not included.", buckets=LENGTHS, **named
        )
        self.unanswered = Counter("unanswered_traces", "Traces whose answer cannot be read.", **named)
        self.batches = Histogram("batch_traces", "Traces per batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **named)
        self.engine = Engine(
            model,
            max_wait=settings.max_wait,
            max_queue=settings.max_queue,
            token_budget=settings.token_budget,
            on_batch=self.batches.observe,
        )
        queued = Gauge("queued_tokens", "Tokens in the queue.", **named)
        queued.set_function(lambda: self.engine.queued)

    def seen(self, path: str, status: int, seconds: float) -> None:
        """Record a response in the metrics."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    async def start(self) -> None:
        """Start the engine and score one trace, so that a model that cannot score does not become ready."""
        await self.engine.start()
        end: Any = [self.model.tokenizer.eos_token_id]  # which every tokenizer has
        await self.engine.score_ids([(end, end)])
        self.ready = True

    def render(self, prompt: str | list[Message], chat_template_kwargs: dict[str, Any] | None = None) -> str:
        """Render a prompt for the reward model; `InputError` if its template cannot.

        Args:
            prompt: a text or messages.
            chat_template_kwargs: variables of the chat template, over those that the reward model stores.
        """
        rendering = self.model.settings.rendering
        given: Any = prompt if isinstance(prompt, str) else [message.fields() for message in prompt]
        if rendering.template == "chat":
            kwargs = {**rendering.chat_template_kwargs, **(chat_template_kwargs or {})}
            rendering = replace(rendering, chat_template_kwargs=kwargs)
        elif not isinstance(prompt, str):
            if [message.role for message in prompt] != ["user"]:
                raise InputError("the reward model was trained on plain prompts: send a text or one user message")
            given = prompt[0].content
        return render_prompt(self.model.tokenizer, given, rendering, "prompt")

    def trace(self, message: dict[str, Any]) -> str:
        """The trace in an assistant message, its reasoning between the marks of the reward model's chat template."""
        return message_text(message, self.think)

    def check(self, model: str | None, candidates: int, field: str | None = None) -> None:
        """Reject an unknown model name, and more candidates (in `field`) than the limit."""
        if model not in (None, self.settings.name):
            text = f"unknown model {model!r}; this server has {self.settings.name!r}"
            raise Refused(404, text, "model_not_found", "model")
        if candidates > self.settings.max_candidates:
            limit = f"{candidates} candidates; the limit is {self.settings.max_candidates} (--max-candidates)"
            raise Refused(413, limit, "too_many_candidates", field)

    def log_prompt(self, prompt: object) -> None:
        """Log a prompt, or a text without a prompt, if `log_prompts` is set."""
        if self.settings.log_prompts:
            log.info("prompt %r", prompt)

    async def score(
        self, prompt: str, texts: list[str], field: str, finished: bool = True
    ) -> tuple[list[TokenScores], Usage]:
        """Score traces of one rendered prompt; `field` is the request's field with the traces."""
        self.log_prompt(prompt)
        prompts, ended = [prompt] * len(texts), [finished] * len(texts)
        scores, read, written = await self.engine.score(
            prompts, texts, ended, max_tokens=self.settings.max_tokens, field=field
        )
        await self.watch(texts, scores)
        return scores, self.count(len(texts), read, written)

    async def watch(self, texts: list[str], scores: list[TokenScores]) -> None:
        """Record rewards, lengths and missing answers of traces, as `tracereward watch` compares them."""
        for one in scores:
            self.rewards.observe(self.reward(one))
            self.lengths.observe(len(one.tokens))
        # In a thread: a long text takes milliseconds.
        self.unanswered.inc(await asyncio.to_thread(lambda: sum(self.task.extract(text) is None for text in texts)))

    async def score_inputs(self, inputs: list[str] | list[list[int]]) -> tuple[list[TokenScores], Usage]:
        """Score texts or token ids without a prompt."""
        for one in inputs:
            self.log_prompt(one)
        scores, read, written = await self.engine.score_inputs(inputs, self.settings.max_tokens)
        return scores, self.count(len(inputs), read, written)

    def count(self, traces: int, read: int, written: int) -> Usage:
        """Record scored traces in the metrics and return their usage."""
        self.traces.inc(traces)
        self.tokens.inc(read + written)
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def reward(self, scores: TokenScores) -> float:
        """The trace reward."""
        return scores.aggregate(self.model.settings.aggregate)

    def probability(self, reward: float) -> float | None:
        """Probability that the trace is correct; None if the model is not calibrated."""
        calibration = self.model.settings.calibration
        return None if calibration is None else calibration.probability(reward)

    def relevance(self, reward: float) -> float:
        """Relevance in [0, 1]: the calibrated probability, else the sigmoid of the reward."""
        probability = self.probability(reward)
        return float(expit(reward)) if probability is None else probability


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it if the client disconnects first, so that no unneeded trace is scored."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client disconnected", "client_closed_request")
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
