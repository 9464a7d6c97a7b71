"""Client for the OpenAI-compatible server behind the proxy: samples, models, and translation of its errors.

The URL is fixed when the server starts; no URL in a request is ever opened, and redirects are not followed.
"""

import asyncio
import json
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from tracereward.serving.json_body import is_json
from tracereward.serving.middleware import error
from tracereward.serving.schemas import JsonObject

MODELS_SECONDS = 2.0
"""Timeout for listing the upstream's models."""


class UpstreamFailed(Exception):
    """The upstream failed: the response to send to the client."""

    def __init__(self, status: int, body: JsonObject, headers: dict[str, str] | None = None):
        super().__init__(body)
        self.status, self.body, self.headers = status, body, headers


class Upstream:
    """HTTP client of the upstream.

    Args:
        url: base URL, e.g. ``http://127.0.0.1:8000/v1``.
        key: API key, None for no key.
        seconds: timeout for all samples of one request together.
    """

    def __init__(self, url: str, key: str | None, seconds: float):
        self.seconds = seconds
        self.client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            # Accept no cookies: a cookie set for one client must not be sent with another client's request.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx.Timeout(None, connect=10.0),  # httpx's read timeout limits one read, not the full response
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def models(self) -> list[JsonObject]:
        """The upstream's list of models; empty if it fails or takes longer than `MODELS_SECONDS`."""
        try:
            async with asyncio.timeout(MODELS_SECONDS):
                response = await self.client.get("models")
            body = _read(response)
        except (TimeoutError, httpx.HTTPError, UpstreamFailed):
            return []
        models = body.get("data") if isinstance(body, dict) and response.status_code == 200 else None
        return [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []

    async def sample(self, path: str, request: JsonObject, samples: int) -> tuple[JsonObject, list[JsonObject]]:
        """Request `samples` choices from the upstream.

        If the server ignores ``n`` and returns fewer choices, the missing ones are requested concurrently, one each,
        with distinct seeds if the request has a seed. The first failure cancels the others.

        Returns:
            The first response with the usage summed over all, and the choices.

        Raises:
            UpstreamFailed: the upstream rejects the request, times out, is unreachable or responds with invalid data.
        """
        try:
            async with asyncio.timeout(self.seconds):
                answers = await self._answers(path, request, samples)
        except TimeoutError as e:
            text = f"the upstream did not respond within {self.seconds:g} s (--upstream-seconds)"
            raise UpstreamFailed(504, error(text, "upstream_error", "upstream_timeout")) from e
        choices = [choice for answer in answers for choice in answer["choices"]][:samples]
        return {**answers[0], "usage": _summed([answer.get("usage") for answer in answers])}, choices

    async def _answers(self, path: str, request: JsonObject, samples: int) -> list[JsonObject]:
        first = await self._post(path, {**request, "n": samples})
        missing = samples - len(first["choices"])
        seed = request.get("seed")
        seeds = [{} if seed is None else {"seed": seed + 1 + index} for index in range(missing)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._post(path, {**request, "n": 1, **one})) for one in seeds]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [first, *(task.result() for task in tasks)]

    async def _post(self, path: str, request: JsonObject) -> JsonObject:
        try:
            response = await self.client.post(path, json=request)
        except httpx.HTTPError as e:
            text = f"the upstream is unreachable ({type(e).__name__})"
            raise UpstreamFailed(502, error(text, "upstream_error", "upstream_unreachable")) from e
        body = _read(response)
        if response.status_code != 200:
            raise _refusal(response, body)
        choices = body.get("choices") if isinstance(body, dict) else None
        if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
            return body
        raise bad_upstream("the upstream's response has no choices")


def bad_upstream(text: str) -> UpstreamFailed:
    """The error for a response of the upstream that cannot be used."""
    return UpstreamFailed(502, error(text, "upstream_error", "bad_upstream"))


def _read(response: httpx.Response) -> Any:
    """The parsed JSON of a response; None if it is not JSON, e.g. a gateway's error page."""
    unusable = bad_upstream(f"the upstream responded {response.status_code} with JSON that cannot be forwarded")
    try:
        body = response.json()
    except ValueError:
        return None
    except RecursionError as e:
        raise unusable from e
    if not is_json(body):
        raise unusable
    return body


def _refusal(response: httpx.Response, body: Any) -> UpstreamFailed:
    """The upstream's status and error message, from whichever field has it, in OpenAI's format."""
    said = (body.get("error") or body) if isinstance(body, dict) else {}
    said = said if isinstance(said, dict) else {"message": said}
    text = said.get("message") or said.get("detail")
    if text:
        kind, param, code = (str(said[key]) if said.get(key) else None for key in ("type", "param", "code"))
        own = error(text if isinstance(text, str) else json.dumps(text), kind or "upstream_error", code, param)
    else:
        own = error(f"the upstream responded {response.status_code}", "upstream_error", "bad_upstream")
    wait = response.headers.get("retry-after", "")
    headers = {"retry-after": wait} if wait and wait.isascii() else None
    return UpstreamFailed(response.status_code if 400 <= response.status_code <= 599 else 502, own, headers)


def _summed(usages: list[Any], details: bool = True) -> JsonObject:
    """Sum counts by name, including details one level down; values that are not counts are dropped."""
    given = [usage for usage in usages if isinstance(usage, dict)]
    total: JsonObject = {}
    for name in dict.fromkeys(name for usage in given for name in usage):
        values = [usage[name] for usage in given if name in usage]
        # Larger integers are dropped: Python cannot serialise an integer with too many digits.
        counts = [value for value in values if type(value) is int and abs(value) < 2**53]
        if counts:
            total[name] = sum(counts)
        elif details and (below := _summed(values, details=False)):
            total[name] = below
    return total
