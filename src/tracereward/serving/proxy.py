"""Best-of-N proxy for an OpenAI-compatible server: request N samples, select by reward, return the best."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tracereward.messages import read_choice
from tracereward.modeling.rendering import Rendering, render_prompt
from tracereward.selection import Candidate, choose
from tracereward.serving.middleware import error
from tracereward.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    ErrorResponse,
    JsonObject,
    Selection,
    matters,
)
from tracereward.serving.service import ERRORS, Refused, Service, unless_gone
from tracereward.serving.upstream import Upstream, UpstreamFailed, bad_upstream

DROPPED = ("n", "stream", "stream_options", "best_of", "tracereward")
"""Fields that the proxy handles itself and does not forward."""
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "tools": (None, "tool calls cannot be judged"),
    "tool_choice": ("none", "tool calls cannot be judged"),
    "functions": (None, "tool calls cannot be judged"),
    "function_call": ("none", "tool calls cannot be judged"),
    "modalities": (["text"], "only text can be judged"),
    "audio": (None, "only text can be judged"),
    "best_of": (1, "use tracereward.n for the number of samples"),
    "echo": (False, "the prompt would be judged as a part of each sample"),
    "suffix": (None, "the reward model does not read it"),
    "prompt_embeds": (None, "the reward model cannot read them"),
    "documents": (None, "the reward model does not read them"),
    "chat_template": (None, "the reward model renders messages with its own template"),
    "truncate_prompt_tokens": (None, "the reward model reads the full prompt"),
    "include_reasoning": (True, "the reasoning is a part of the trace that is judged"),
    "skip_special_tokens": (True, "special tokens would be judged as text"),
}
"""Fields with which the upstream would read, write or return something else than the reward model judges: the value
that changes nothing, and the reason. All other fields set how the upstream samples."""
VOTE_SECONDS = 5.0
"""Time limit for comparing the answers of one request, including the wait for the voting thread."""
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "In the upstream's format.", "content": {"text/event-stream": {}}},
    **ERRORS,
    502: {"model": ErrorResponse, "description": "The upstream is unreachable or its response is invalid."},
    504: {"model": ErrorResponse, "description": "The upstream timed out."},
}


@dataclass(frozen=True)
class _Sample:
    """One sample of the upstream.

    Attributes:
        trace: the text that is judged: the reasoning, if the upstream returns it in a field of its own, then the
            content.
        content: the text without the reasoning.
        finished: whether it ended by itself, not at a length limit or a stop string.
    """

    trace: str
    content: str
    finished: bool


class Proxy:
    """The endpoints ``/v1/chat/completions`` and ``/v1/completions``."""

    def __init__(self, service: Service):
        self.service = service
        settings = service.settings
        self.upstream = Upstream(str(settings.upstream), settings.upstream_key, settings.upstream_seconds)
        self.places = asyncio.Semaphore(settings.max_upstream)
        self.task = service.task
        self.voting = ThreadPoolExecutor(1, "voting")  # math-verify compares one pair at a time

    async def close(self) -> None:
        """Close the connections to the upstream."""
        self.voting.shutdown(wait=False)
        await self.upstream.close()

    def add_routes(self, app: FastAPI) -> None:
        """Add the two endpoints."""

        @app.post("/v1/chat/completions", responses=RESPONSES)
        async def chat(body: ChatRequest, request: Request) -> Response:
            """OpenAI's chat completion: the best of N samples. The field ``tracereward`` has the method and scores."""
            return await unless_gone(request, self.answer("chat/completions", body, await request.json()))

        @app.post("/v1/completions", responses=RESPONSES)
        async def completions(body: CompletionRequest, request: Request) -> Response:
            """OpenAI's completion: the best of N samples."""
            return await unless_gone(request, self.answer("completions", body, await request.json()))

    async def answer(self, path: str, body: ChatRequest | CompletionRequest, sent: JsonObject) -> Response:
        """Sample, score, select, and respond in the upstream's format; `sent` is the raw request."""
        if self.places.locked():
            wait = self.service.engine.retry_after
            text = f"{self.service.settings.max_upstream} requests are in flight to the upstream (--max-upstream): "
            full = error(f"{text}try again in {wait} s", "rate_limit_error", "busy")
            raise UpstreamFailed(429, full, {"retry-after": str(wait)})
        async with self.places:
            result = await self._best(path, body, sent)
        if not body.stream:
            return JSONResponse(result)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = "".join(_events(result, path.startswith("chat"), with_usage))
        return Response(events, media_type="text/event-stream")

    async def _best(self, path: str, body: ChatRequest | CompletionRequest, sent: JsonObject) -> JsonObject:
        selection = body.tracereward or Selection(n=None, temperature=None)
        wanted = body.n or 1
        temperature = body.temperature if selection.temperature is None else selection.temperature
        samples = selection.n or max(self.service.settings.samples, wanted)
        if samples < wanted:
            text = f"tracereward.n is {samples}, fewer than n = {wanted}; use tracereward.n >= n"
            raise Refused(422, text, "invalid_value", "tracereward.n")
        if temperature == 0:  # greedy samples are identical, and vLLM rejects n > 1
            samples = wanted
        self._check_method(selection.method)
        prompt = await self._check(body, sent, samples)
        request = {name: value for name, value in sent.items() if name not in DROPPED}
        if selection.temperature is not None:
            request["temperature"] = selection.temperature
        answer, choices = await self.upstream.sample(path, request, samples)
        kept = [(choice, sample) for choice in choices if (sample := _sample(choice, self.service.think)).trace.strip()]
        if not kept:
            raise bad_upstream("all samples of the upstream are empty: none has text or reasoning")
        samples_kept = [sample for _, sample in kept]
        rewards = await self._rewards(prompt, samples_kept)
        deadline = time.monotonic() + VOTE_SECONDS
        loop = asyncio.get_running_loop()
        candidates, method, first = await loop.run_in_executor(
            self.voting, lambda: self._choose(samples_kept, rewards, selection.method, deadline)
        )
        order = sorted(range(len(candidates)), key=lambda place: (place != first, -rewards[place]))
        details = {
            "method": method,
            "samples": len(choices),
            "scores": [{"reward": rewards[place], "answer": candidates[place].answer} for place in order],
        }
        picked = [{**kept[place][0], "index": index} for index, place in enumerate(order[:wanted])]
        why = self.service.model.settings.why_not(method, rewards[first], self.service.settings.abstain)
        if self.service.settings.abstain is not None:
            details |= {"abstained": why is not None, "reason": why}
        if why is not None:
            picked = [_refused(choice, why, path.startswith("chat")) for choice in picked]
        return {**answer, "choices": picked, "tracereward": details}

    def _check_method(self, method: str | None) -> None:
        """Reject a method for which the server cannot abstain."""
        known = [record.method for record in self.service.model.settings.abstention]
        if self.service.settings.abstain is not None and method not in (None, *known):
            text = f"this server abstains (--abstain), which it can with the methods {' and '.join(known)}"
            raise Refused(422, text, "unsupported", "tracereward.method")

    async def _check(self, body: ChatRequest | CompletionRequest, sent: JsonObject, samples: int) -> str:
        """Render the reward model's prompt; reject requests that would fail before the upstream is called."""
        for name, (neutral, reason) in UNSUPPORTED.items():
            if matters(sent.get(name), neutral):
                raise Refused(422, f"{name}: {reason}", "unsupported", name)
        if matters(sent.get("stream_options")) and not body.stream:
            raise Refused(422, "stream_options: only with stream", "invalid_value", "stream_options")
        field = "tracereward.n" if body.tracereward and body.tracereward.n else "n" if body.n else None
        self.service.check(None, samples, field)
        prompt = self._prompt(body)
        self.service.log_prompt(prompt)
        limit = self.service.settings.max_tokens
        tokens = await self.service.engine.prompt_tokens(prompt, limit)
        if samples * (tokens + 1) > limit:
            text = f"{samples} samples of a prompt of {tokens} tokens exceed the limit of {limit} tokens (--max-tokens)"
            raise Refused(413, text, "too_many_tokens", field)
        return prompt

    def _prompt(self, body: ChatRequest | CompletionRequest) -> str:
        """The prompt as the reward model reads it: the text or the conversation that the upstream continues."""
        if isinstance(body, CompletionRequest):
            return render_prompt(self.service.model.tokenizer, body.prompt, Rendering(), "prompt")
        continued, opened = body.continue_final_message or False, body.add_generation_prompt is not False
        if body.messages[-1].role == "assistant":
            if not continued or opened:
                text = "messages: the last one is the assistant's: to have it continued, set continue_final_message to "
                raise Refused(422, f"{text}true and add_generation_prompt to false", "invalid_value", "messages")
        elif continued:
            text = "continue_final_message: the last message is not the assistant's"
            raise Refused(422, text, "invalid_value", "continue_final_message")
        elif not opened:
            text = "add_generation_prompt: without it the samples would not be the assistant's"
            raise Refused(422, text, "invalid_value", "add_generation_prompt")
        return self.service.render(body.messages, body.chat_template_kwargs)

    async def _rewards(self, prompt: str, samples: list[_Sample]) -> list[float]:
        service = self.service
        scores, read, written = await service.engine.score(
            [prompt] * len(samples),
            [sample.trace for sample in samples],
            [sample.finished for sample in samples],
            max_tokens=service.settings.max_tokens,
            field="sample",
        )
        await service.watch([sample.trace for sample in samples], scores)
        service.count(len(samples), read, written)
        return [service.reward(one) for one in scores]

    def _choose(
        self, samples: list[_Sample], rewards: list[float], method: str | None, deadline: float
    ) -> tuple[list[Candidate], str, int]:
        """The candidates, the method and the index of the best; runs in a thread because math-verify can be slow."""

        @cache
        def equal(answer: str, other: str) -> bool:
            return answer == other or (time.monotonic() < deadline and self.task.equal(answer, other))

        candidates = [
            Candidate(one.trace, self._answer(one), reward, length=len(one.trace))
            for one, reward in zip(samples, rewards, strict=True)
        ]
        answered = any(candidate.answer is not None for candidate in candidates)
        method = method or ("vote" if answered else "reward")
        return candidates, method, choose(candidates, method, equal)

    def _answer(self, sample: _Sample) -> str | None:
        """The answer that the sample states in its content; what it says while it thinks does not count."""
        return self.task.extract(sample.content)


def _sample(choice: JsonObject, think: tuple[str, str]) -> _Sample:
    """Read a choice of either endpoint.

    Args:
        choice: as the upstream returns it.
        think: the text before and after the reasoning.

    Raises:
        UpstreamFailed: it has tool calls, or something else than text.
    """
    try:
        trace, content, finished = read_choice(choice, think)
    except ValueError as e:
        raise bad_upstream(f"a sample of the upstream cannot be judged: {e}") from e
    return _Sample(trace, content, finished)


def _refused(choice: JsonObject, why: str, chat: bool) -> JsonObject:
    """A choice without its text: a message with OpenAI's field ``refusal``, or an empty completion."""
    empty = {"message": {"role": "assistant", "content": None, "refusal": why}} if chat else {"text": ""}
    return {"index": choice["index"], **empty, "logprobs": None, "finish_reason": "stop"}


def _events(result: JsonObject, chat: bool, with_usage: bool) -> Iterator[str]:
    """The selected choices as a stream. It starts after the selection, so each text is sent in one chunk."""
    head = {name: result[name] for name in ("id", "created", "model", "system_fingerprint") if name in result}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"

    def event(**content: Any) -> str:
        return f"data: {json.dumps({**head, **content})}\n\n"

    for choice in result["choices"]:
        message = choice.get("message")
        said = {"role": "assistant", **(message if isinstance(message, dict) else {})}
        others = {name: value for name, value in choice.items() if name != "message"}
        piece = {"delta": said} if chat else {"text": choice.get("text")}
        yield event(choices=[{**others, **piece, "finish_reason": None}])
        end = {"delta": {}} if chat else {"text": ""}
        yield event(choices=[{"index": choice["index"], **end, "finish_reason": choice.get("finish_reason")}])
    if with_usage:
        yield event(choices=[], usage=result["usage"])
    yield event(choices=[], tracereward=result["tracereward"])
    yield "data: [DONE]\n\n"
