"""What happens to a request before anything parses it: its key, its size, its time; and headers of every answer."""

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = {"/", "/health", "/ready"}
"""Paths that need no key: the page has nothing in it, and a health check has no key to give."""
DOCS = {"/docs", "/docs/oauth2-redirect", "/redoc"}
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)

DOCS_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' "
    "https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'"
)
"""FastAPI's documentation page loads its scripts from elsewhere."""


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Refused(Exception):
    def __init__(self, status: int, body: dict[str, Any]):
        super().__init__(body["error"]["message"])
        self.status, self.body = status, body


class Guard:
    """ASGI middleware: checks the key in constant time, limits the body's bytes and the time it takes, adds headers.

    Args:
        app: what comes next.
        api_key: None lets everyone in.
        max_bytes: of a body, also of one that is sent in chunks.
        body_seconds: in which the whole body must have come.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_bytes: int, body_seconds: float):
        self.app = app
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                extra = dict(HEADERS)
                extra["content-security-policy"] = DOCS_POLICY if scope["path"] in DOCS else STRICT
                present = {name for name, _ in message["headers"]}
                fresh = [(n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in present]
                message = {**message, "headers": [*message["headers"], *fresh]}
            await send(message)

        try:
            self._check(scope)
            body = await self._body(receive)
        except _Refused as refused:
            await _respond(answer, refused)
            return
        first = True

        async def replay() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()  # what comes now is that the client has left

        try:
            await self.app(scope, replay, answer)
        except Exception:
            if not begun:
                await _respond(answer, _Refused(500, error("the server failed; its log says why", "server_error")))
            raise  # to be logged

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.api_key is not None and scope["path"] not in OPEN and not scope["path"].startswith("/page/"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                raise _Refused(401, error("the API key is missing or wrong", "authentication_error", "invalid_api_key"))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes:
        """The whole body: it is limited, so that it may be held before the application sees it."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):  # nor when the client has left
                        return b"".join(parts)
        except TimeoutError:
            text = f"the body did not come within {self.body_seconds:g} s"
            raise _Refused(408, error(text, "invalid_request_error", "timeout")) from None

    def _too_large(self) -> _Refused:
        text = f"the body is larger than {self.max_bytes} bytes (--max-bytes)"
        return _Refused(413, error(text, "invalid_request_error", "body_too_large"))


class Counted:
    """ASGI middleware: tells `seen` the route, the status and the seconds of each answer.

    The route's path, not the request's: a scan of a server must not make a metric of each path that it tries.
    """

    def __init__(self, app: ASGIApp, seen: Callable[[str, int, float], None]):
        self.app = app
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.seen(path, status, time.perf_counter() - start)


async def _respond(send: Send, refused: _Refused) -> None:
    body = json.dumps(refused.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # what is left of a refused body is not read
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
