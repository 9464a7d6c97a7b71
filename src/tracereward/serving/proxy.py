"""Best-of-N proxy for an OpenAI-compatible server: request N samples, select by reward, return the best."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tracereward.selection import Candidate, choose
from tracereward.serving.middleware import error
from tracereward.serving.schemas import ChatRequest, CompletionRequest, ErrorResponse, JsonObject, Selection
from tracereward.serving.service import ERRORS, Refused, Service, unless_gone
from tracereward.serving.upstream import Upstream, UpstreamFailed, can_be_sent
from tracereward.tasks.recipes import get_task

DROPPED = ("n", "stream", "stream_options", "best_of", "tracereward")
"""Fields that the proxy handles itself and does not forward."""
REFUSED = {"tools": "tool calls", "functions": "function calls", "echo": "an echo of the prompt"}
VOTE_SECONDS = 5.0
"""Time limit for comparing the answers of one request, including the wait for the voting thread."""
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "In the upstream's format.", "content": {"text/event-stream": {}}},
    **ERRORS,
    502: {"model": ErrorResponse, "description": "The upstream is unreachable or its response is invalid."},
    504: {"model": ErrorResponse, "description": "The upstream timed out."},
}


class Proxy:
    """The endpoints ``/v1/chat/completions`` and ``/v1/completions``."""

    def __init__(self, service: Service):
        self.service = service
        settings = service.settings
        self.upstream = Upstream(str(settings.upstream), settings.upstream_key, settings.upstream_seconds)
        self.places = asyncio.Semaphore(settings.max_upstream)
        self.task = get_task(service.model.settings.task)
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
        prompt = await self._check(body, sent, samples)
        request = {name: value for name, value in sent.items() if name not in DROPPED}
        if selection.temperature is not None:
            request["temperature"] = selection.temperature
        answer, choices = await self.upstream.sample(path, request, samples)
        texts = [_text(choice) for choice in choices]
        ended = [choice.get("finish_reason") != "length" for choice in choices]
        kept = [index for index, text in enumerate(texts) if text]
        if not kept:
            raise UpstreamFailed(502, error("all samples of the upstream are empty", "upstream_error", "bad_upstream"))
        texts = [texts[i] for i in kept]
        rewards = await self._rewards(prompt, texts, [ended[i] for i in kept])
        deadline = time.monotonic() + VOTE_SECONDS
        loop = asyncio.get_running_loop()
        candidates, method, first = await loop.run_in_executor(
            self.voting, lambda: self._choose(texts, rewards, selection.method, deadline)
        )
        order = sorted(range(len(candidates)), key=lambda place: (place != first, -rewards[place]))
        details = {
            "method": method,
            "samples": len(choices),
            "scores": [{"reward": rewards[place], "answer": candidates[place].answer} for place in order],
        }
        picked = [{**choices[kept[place]], "index": index} for index, place in enumerate(order[:wanted])]
        return {**answer, "choices": picked, "tracereward": details}

    async def _check(self, body: ChatRequest | CompletionRequest, sent: JsonObject, samples: int) -> str:
        """Render the reward model's prompt; reject requests that would fail before the upstream is called."""
        for name, value in sent.items():
            if not can_be_sent({name: value}):
                text = f"{name}: contains a number, a character or a nesting depth that JSON cannot represent"
                raise Refused(422, text, "invalid_value", name)
        for name, what in REFUSED.items():
            if sent.get(name):
                raise Refused(422, f"{name}: {what} cannot be reranked", "unsupported", name)
        field = "tracereward.n" if body.tracereward and body.tracereward.n else "n" if body.n else None
        self.service.check(None, samples, field)
        prompt = self.service.render(body.prompt if isinstance(body, CompletionRequest) else list(body.messages))
        self.service.log_prompt(prompt)
        limit = self.service.settings.max_tokens
        tokens = await self.service.engine.prompt_tokens(prompt, limit)
        if samples * (tokens + 1) > limit:
            text = f"{samples} samples of a prompt of {tokens} tokens exceed the limit of {limit} tokens (--max-tokens)"
            raise Refused(413, text, "too_many_tokens", field)
        return prompt

    async def _rewards(self, prompt: str, texts: list[str], ended: list[bool]) -> list[float]:
        service, prompts = self.service, [prompt] * len(texts)
        limit = service.settings.max_tokens
        scores, read, written = await service.engine.score(prompts, texts, ended, max_tokens=limit, field="sample")
        service.count(len(texts), read, written)
        return [service.reward(one) for one in scores]

    def _choose(
        self, texts: list[str], rewards: list[float], method: str | None, deadline: float
    ) -> tuple[list[Candidate], str, int]:
        """The candidates, the method and the index of the best; runs in a thread because math-verify can be slow."""

        @cache
        def equal(answer: str, other: str) -> bool:
            return answer == other or (time.monotonic() < deadline and self.task.equal(answer, other))

        candidates = [
            Candidate(text, self.task.extract(text), reward, length=len(text))
            for text, reward in zip(texts, rewards, strict=True)
        ]
        answered = any(candidate.answer is not None for candidate in candidates)
        method = method or ("vote" if answered else "reward")
        return candidates, method, choose(candidates, method, equal)


def _text(choice: JsonObject) -> str:
    """The text of a choice of either endpoint."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _events(result: JsonObject, chat: bool, with_usage: bool) -> Iterator[str]:
    """The selected choices as a stream. It starts after the selection, so each text is sent in one chunk."""
    head = {name: result[name] for name in ("id", "created", "model", "system_fingerprint") if name in result}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"

    def event(**content: Any) -> str:
        return f"data: {json.dumps({**head, **content})}\n\n"

    for choice in result["choices"]:
        message = choice.get("message")
        said = {"role": "assistant", "content": _text(choice), **(message if isinstance(message, dict) else {})}
        others = {name: value for name, value in choice.items() if name != "message"}
        piece = {"delta": said} if chat else {"text": _text(choice)}
        yield event(choices=[{**others, **piece, "finish_reason": None}])
        end = {"delta": {}} if chat else {"text": ""}
        yield event(choices=[{"index": choice["index"], **end, "finish_reason": choice.get("finish_reason")}])
    if with_usage:
        yield event(choices=[], usage=result["usage"])
    yield event(choices=[], tracereward=result["tracereward"])
    yield "data: [DONE]\n\n"
