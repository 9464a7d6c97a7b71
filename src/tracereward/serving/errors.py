"""Exception handlers that return errors in OpenAI's format."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tracereward.errors import InputError, TooLong
from tracereward.serving.encoding import TooManyTokens
from tracereward.serving.engine import Busy, ScoringFailed
from tracereward.serving.middleware import error
from tracereward.serving.service import Refused, log
from tracereward.serving.upstream import UpstreamFailed


def add_errors(app: FastAPI) -> None:
    """Add the exception handlers."""

    def answer(status: int, message: str, kind: str, code: str | None = None, **more: Any) -> JSONResponse:
        return JSONResponse(error(message, kind, code, more.get("param")), status, more.get("headers"))

    @app.exception_handler(Refused)
    async def refused(_: Request, e: Refused) -> JSONResponse:
        return answer(e.status_code, e.message, "invalid_request_error", e.code, param=e.param)

    @app.exception_handler(InputError)
    async def unusable(_: Request, e: InputError) -> JSONResponse:
        return answer(400, str(e), "invalid_request_error", "invalid_input")

    @app.exception_handler(TooLong)
    async def too_long(_: Request, e: TooLong) -> JSONResponse:
        return answer(422, str(e), "invalid_request_error", "context_length_exceeded")

    @app.exception_handler(TooManyTokens)
    async def too_many(_: Request, e: TooManyTokens) -> JSONResponse:
        return answer(413, str(e), "invalid_request_error", "too_many_tokens", param=e.field)

    @app.exception_handler(Busy)
    async def busy(_: Request, e: Busy) -> JSONResponse:
        return answer(429, str(e), "rate_limit_error", "busy", headers={"retry-after": str(e.retry_after)})

    @app.exception_handler(ScoringFailed)
    async def failed(_: Request, e: ScoringFailed) -> JSONResponse:
        log.error("a trace could not be scored: %s", e)
        return answer(500, f"a trace could not be scored: {e}", "server_error", "scoring_failed")

    @app.exception_handler(UpstreamFailed)
    async def upstream(_: Request, e: UpstreamFailed) -> JSONResponse:
        return JSONResponse(e.body, e.status, e.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, e: RequestValidationError) -> JSONResponse:
        message, field = _described(e)
        return answer(422, message, "invalid_request_error", param=field)

    @app.exception_handler(HTTPException)
    async def other(_: Request, e: HTTPException) -> JSONResponse:
        return answer(e.status_code, str(e.detail), "invalid_request_error", headers=e.headers)


def _described(e: RequestValidationError) -> tuple[str, str | None]:
    """Error message for an invalid body, and the path of the invalid field."""
    faults = e.errors()
    first = faults[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}, at character {first['loc'][1]}", None
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return "the body is empty: send a JSON object", None
    if isinstance(e.body, bytes):
        return "the body was not parsed as JSON: send the header Content-Type: application/json", None
    # Each member of a union reports its own errors; the deepest error that is not a type mismatch fits the input best.
    fault = max(faults, key=lambda fault: (len(_path(fault, e.body)), not fault["type"].endswith("_type")))
    field = ".".join(_path(fault, e.body))
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "not supported here, and not ignored either: remove it"
    return (f"{field}: {message}", field) if field else (message, None)


def _path(fault: dict[str, Any], body: Any) -> list[str]:
    """Path of an error in the body, without the names that pydantic adds for members of a union."""
    path = []
    for depth, part in enumerate(fault["loc"][1:], 2):  # the first is "body"
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            body = body[part]
        if inside or (fault["type"] == "missing" and depth == len(fault["loc"])):
            path.append(str(part).encode(errors="backslashreplace").decode())
    return path
