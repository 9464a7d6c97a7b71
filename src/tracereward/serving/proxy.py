"""Best-of-N in front of an OpenAI-compatible server: ask for N samples, choose by reward, answer with the best.

The upstream is fixed when the server starts; nothing in a request is ever opened as an address.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from tracereward.rerank import Candidate, choose
from tracereward.serving.middleware import error
from tracereward.serving.schemas import JsonObject, Message, Selection
from tracereward.serving.service import ERRORS, Refused, Service, unless_gone
from tracereward.tasks import get_task

T = TypeVar("T", bound=BaseModel)
DROPPED = ("n", "stream", "stream_options", "best_of", "tracereward")
"""Fields of a request that are the proxy's business, not the upstream's."""
REFUSED = {"tools": "tool calls", "functions": "function calls", "echo": "an echo of the prompt"}


class UpstreamFailed(Exception):
    """The upstream did not answer as it should: what the client is told."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(body)
        self.status, self.body, self.headers = status, body, headers


class Proxy:
    """The endpoints ``/v1/chat/completions`` and ``/v1/completions``."""

    def __init__(self, service: Service):
        self.service = service
        settings = service.settings
        headers = {} if settings.upstream_key is None else {"authorization": f"Bearer {settings.upstream_key}"}
        self.client = httpx.AsyncClient(
            base_url=str(settings.upstream).rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(settings.upstream_seconds, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,
            trust_env=False,
        )
        self.task = get_task(service.model.settings.task)

    async def close(self) -> None:
        """Close the connections to the upstream."""
        await self.client.aclose()

    def add_routes(self, app: FastAPI) -> None:
        """Add the two endpoints."""

        @app.post("/v1/chat/completions", responses=ERRORS)
        async def chat(body: JsonObject, request: Request) -> Response:
            """OpenAI's chat completion, the best of N samples; the field ``tracereward`` says how it was chosen."""
            return await unless_gone(request, self.answer("chat/completions", body))

        @app.post("/v1/completions", responses=ERRORS)
        async def completions(body: JsonObject, request: Request) -> Response:
            """OpenAI's completion, the best of N samples."""
            return await unless_gone(request, self.answer("completions", body))

    async def answer(self, path: str, body: JsonObject) -> Response:
        """Sample, score, choose, and answer in the upstream's shape."""
        wanted, selection, prompt = self._read(path, body)
        samples = selection.n or max(self.service.settings.samples, wanted)
        if samples < wanted:
            raise Refused(422, f"tracereward.n is {samples}, fewer than the n = {wanted} answers", "invalid_value")
        self.service.check(None, samples)
        request = {name: value for name, value in body.items() if name not in DROPPED}
        if selection.temperature is not None:
            request["temperature"] = selection.temperature
        whole, choices = await self._sample(path, request, samples)
        texts = [_text(choice) for choice in choices]
        ended = [choice.get("finish_reason") != "length" for choice in choices]
        kept = [index for index, text in enumerate(texts) if text]
        if not kept:
            raise UpstreamFailed(502, error("the upstream's samples are all empty", "upstream_error", "bad_upstream"))
        rewards = await self._rewards(prompt, [texts[i] for i in kept], [ended[i] for i in kept])
        candidates = [
            Candidate(texts[i], self.task.extract(texts[i]), reward, length=len(texts[i]))
            for i, reward in zip(kept, rewards, strict=True)
        ]
        answered = any(candidate.answer is not None for candidate in candidates)
        method = selection.method or ("vote" if answered else "reward")
        first = choose(candidates, method, self.task.equal)
        order = sorted(range(len(candidates)), key=lambda place: (place != first, -candidates[place].reward))
        best = order[:wanted]
        told = {
            "method": method,
            "samples": len(choices),
            "scores": [{"reward": candidates[p].reward, "answer": candidates[p].answer} for p in order],
        }
        picked = [{**choices[kept[place]], "index": index} for index, place in enumerate(best)]
        result = {**whole, "choices": picked, "tracereward": told}
        if body.get("stream"):
            options = body.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            events = _events(result, path.startswith("chat"), with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(result)

    def _read(self, path: str, body: JsonObject) -> tuple[int, Selection, str]:
        """How many answers are wanted, how to choose them, and the reward model's prompt."""
        if not _can_be_sent(body):
            raise Refused(422, "the request has a number or a character that JSON cannot hold", "invalid_value")
        for name, what in REFUSED.items():
            if body.get(name):
                raise Refused(422, f"{name}: {what} cannot be reranked", "unsupported", name)
        wanted = body.get("n")
        wanted = 1 if wanted is None else wanted
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise Refused(422, f"n must be a whole number of at least 1, not {wanted!r}", "invalid_value", "n")
        selection = _parsed(Selection, body.get("tracereward") or {}, "tracereward")
        if path == "completions":
            prompt = body.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise Refused(422, "prompt must be one text", "invalid_value", "prompt")
            return wanted, selection, self.service.render(prompt)
        given = body.get("messages")
        if not isinstance(given, list) or not given:
            raise Refused(422, "messages must be a list of at least one", "invalid_value", "messages")
        return wanted, selection, self.service.render([_message(one, index) for index, one in enumerate(given)])

    async def _rewards(self, prompt: str, texts: list[str], ended: list[bool]) -> list[float]:
        service = self.service
        scores, read, written = await service.engine.score([prompt] * len(texts), texts, ended)
        service.count(len(texts), read, written)
        return [service.reward(one) for one in scores]

    async def _sample(self, path: str, request: JsonObject, samples: int) -> tuple[JsonObject, list[JsonObject]]:
        """The first answer of the upstream with usage summed, and `samples` choices of all.

        A server that does not know ``n`` gives one choice; it is then asked for the others, one by one and all at once,
        each with a seed of its own where the request has one.
        """
        whole = await self._post(path, {**request, "n": samples})
        answers = [whole]
        missing = samples - len(whole["choices"])
        if missing > 0:
            seed = request.get("seed")
            seeds = [{} if seed is None else {"seed": seed + 1 + index} for index in range(missing)]
            answers += await asyncio.gather(*(self._post(path, {**request, "n": 1, **one}) for one in seeds))
        choices = [choice for answer in answers for choice in answer["choices"]][:samples]
        usage: dict[str, int] = {}
        for answer in answers:
            for name, value in (answer.get("usage") or {}).items():
                if isinstance(value, int):
                    usage[name] = usage.get(name, 0) + value
        return {**whole, "usage": usage}, choices

    async def _post(self, path: str, request: JsonObject) -> JsonObject:
        try:
            response = await self.client.post(path, json=request)
        except httpx.TimeoutException as e:
            seconds = self.service.settings.upstream_seconds
            text = f"the upstream did not answer within {seconds:g} s (--upstream-seconds)"
            raise UpstreamFailed(504, error(text, "upstream_error", "upstream_timeout")) from e
        except httpx.HTTPError as e:
            text = f"the upstream cannot be reached ({type(e).__name__})"
            raise UpstreamFailed(502, error(text, "upstream_error", "upstream_unreachable")) from e
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.status_code != 200:
            passed = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
            if not (isinstance(body, dict) and isinstance(body.get("error"), dict)):
                body = error(f"the upstream answered {response.status_code}", "upstream_error", "bad_upstream")
            raise UpstreamFailed(response.status_code if response.status_code >= 400 else 502, body, passed)
        choices = body.get("choices") if isinstance(body, dict) and _can_be_sent(body) else None
        if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
            assert isinstance(body, dict)
            return body
        text = "the upstream's answer has no choices"
        raise UpstreamFailed(502, error(text, "upstream_error", "bad_upstream"))


def _can_be_sent(body: JsonObject) -> bool:
    """Python's parser lets NaN, half a surrogate pair and deep nesting pass, which no answer or request can have."""
    try:
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(kind: type[T], given: Any, where: str) -> T:
    """A part of a request; `Refused` names the field."""
    try:
        return kind.model_validate(given)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, (where, *first["loc"])))
        raise Refused(422, f"{field}: {first['msg']}", "invalid_value", field) from e


def _message(given: Any, index: int) -> Message:
    """A message whose content is text, or OpenAI's list of text parts."""
    if isinstance(given, dict) and isinstance(given.get("content"), list):
        parts = [part.get("text") for part in given["content"] if isinstance(part, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        given = {**given, "content": "".join(texts) if len(texts) == len(given["content"]) else None}
    return _parsed(Message, given, f"messages.{index}")


def _text(choice: JsonObject) -> str:
    """What a choice of either endpoint says."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


async def _events(result: JsonObject, chat: bool, with_usage: bool) -> AsyncIterator[str]:
    """The chosen answers as a stream: it can only start after the choice, so each comes in one piece."""
    head = {name: result[name] for name in ("id", "created", "model", "system_fingerprint") if name in result}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"

    def event(**content: Any) -> str:
        return f"data: {json.dumps({**head, **content})}\n\n"

    for choice in result["choices"]:
        index, text = choice["index"], _text(choice)
        piece = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
        yield event(choices=[{"index": index, **piece, "finish_reason": None}])
        end = {"delta": {}} if chat else {"text": ""}
        yield event(choices=[{"index": index, **end, "finish_reason": choice.get("finish_reason")}])
    if with_usage:
        yield event(choices=[], usage=result["usage"])
    yield event(choices=[], tracereward=result["tracereward"])
    yield "data: [DONE]\n\n"
