"""ASGI middleware: API key, body size and timeout checks before parsing, security headers, and request metrics."""

import asyncio
import hmac
import json
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DOCS = "/docs"
DOCS_FILES = f"{DOCS}/files"
PAGE = {"/", "/page/page.js", "/page/page.css"}
OPEN = {"/health", "/ready", "/metrics", "/openapi.json", DOCS, *PAGE}
"""Paths that need no key, with those below `DOCS_FILES`: they expose no prompts, and browsers, health checks and
Prometheus send no key."""
LOOPBACK = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:\d*)?", re.IGNORECASE)
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
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'"
)
"""For the page of the API's description, whose HTML has a script of its own."""


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error body in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Refused(Exception):
    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(body["error"]["message"])
        self.status, self.body, self.headers = status, body, headers or {}


class Guard:
    """ASGI middleware: constant-time key check, limits on body size and body time, and security headers.

    Args:
        app: the wrapped application.
        api_key: None disables the check.
        local_only: accept only loopback names as Host. Otherwise a site whose own name resolves to the loopback
            address could make its visitors' browsers read responses (DNS rebinding).
        max_bytes: limit of a body, also if it is chunked.
        body_seconds: timeout for receiving the full body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, local_only: bool, max_bytes: int, *, body_seconds: float):
        self.app = app
        self.api_key = api_key
        self.local_only = local_only
        self.max_bytes = max_bytes
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = read = False
        body = b""

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                extra = dict(HEADERS)
                extra["content-security-policy"] = DOCS_POLICY if scope["path"] == DOCS else STRICT
                present = {name for name, _ in message["headers"]}
                fresh = [(n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in present]
                message = {**message, "headers": [*message["headers"], *fresh]}
            await send(message)

        async def replay() -> Message:
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()  # after the body, only the disconnect message remains

        try:
            self._check(scope)
            body = await self._body(receive)
            await self.app(scope, replay, answer)
        except _Refused as refused:
            await _respond(answer, refused)
        except asyncio.CancelledError:  # uvicorn cancels requests in flight when the drain time is over
            if not begun:
                text = error("the server is shutting down: try again", "server_error", "shutting_down")
                await _respond(answer, _Refused(503, text, {"retry-after": "1"}))
        except Exception:
            if not begun:
                await _respond(answer, _Refused(500, error("internal error; see the server's log", "server_error")))
            raise  # so that it is logged

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.local_only and not LOOPBACK.fullmatch(headers.get(b"host", b"")):
            text = "Host not allowed: without a key the server accepts localhost and 127.0.0.1 only; use --api-key-file"
            raise _Refused(421, error(text, "invalid_request_error", "wrong_host"))
        is_open = scope["path"] in OPEN or scope["path"].startswith(f"{DOCS_FILES}/")
        if self.api_key is not None and not is_open:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode()):
                text = error("the API key is missing or wrong", "authentication_error", "invalid_api_key")
                raise _Refused(401, text, {"www-authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes:
        """Read the full body. It is bounded by `max_bytes`, so buffering it is safe."""
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
                    if not message.get("more_body", False):  # also true of the disconnect message
                        return b"".join(parts)
        except TimeoutError:
            text = f"the body was not received within {self.body_seconds:g} s"
            raise _Refused(408, error(text, "invalid_request_error", "timeout")) from None

    def _too_large(self) -> _Refused:
        text = f"the body is larger than {self.max_bytes} bytes (--max-bytes)"
        return _Refused(413, error(text, "invalid_request_error", "body_too_large"))


class Counted:
    """ASGI middleware that calls `seen` with the route, status and seconds of each response.

    Uses the route's path, not the request's, so that a scan of the server does not create a metric for each path.
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
    headers.append((b"connection", b"close"))  # the rest of a rejected body is not read
    headers += [(name.encode(), value.encode()) for name, value in refused.headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
