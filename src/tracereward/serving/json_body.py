"""Parsing of request bodies: Python's parser drops repeated names and accepts what cannot be written as JSON again."""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tracereward.serving.service import Refused

DEPTH = 100  # nesting levels reserved for stack frames and for the fields around a value that is serialised later


class JsonRoute(APIRoute):
    """A route whose bodies are parsed by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, which gets a `_JsonRequest`."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        """The body, parsed once."""
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


def parse(body: bytes) -> Any:
    """Parse a request's body.

    Raises:
        json.JSONDecodeError: it is not JSON.
        Refused: it repeats a name, of which only one value would count, or has what cannot be written as JSON again:
            NaN, infinity, half of a surrogate pair, deep nesting. Names the field.
    """
    try:
        value = json.loads(body, object_pairs_hook=_object)
    except (json.JSONDecodeError, Refused):
        raise
    except RecursionError:
        raise _refused("the body is nested too deeply") from None
    except ValueError as error:  # not UTF-8, or an integer with thousands of digits
        raise _refused(f"the body is not JSON: {error}") from error
    if not is_json(value):
        raise _refused(*_fault(value))
    return value


def is_json(value: Any) -> bool:
    """Whether a parsed value can be written as JSON: no NaN, no half of a surrogate pair, no deep nesting."""
    for _ in range(DEPTH):
        value = [value]
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise _refused("given more than once", [twice])
    return found


def _fault(value: Any) -> tuple[str, list[str]]:
    """What cannot be written in a value, and the path of its field."""
    path: list[str] = []
    top = ""  # first name of the deepest path
    deepest = 0
    levels = [iter([("", value)])]
    while levels:
        for name, one in levels[-1]:
            path[len(levels) - 1 :] = [str(name)]
            if isinstance(one, float) and not math.isfinite(one):
                return "not a finite number", path[1:]
            if any(isinstance(text, str) and not is_json(text) for text in (name, one)):
                return "half of a surrogate pair, which no text can have", path[1:]
            if len(path) > deepest:
                deepest, top = len(path), path[1] if len(path) > 1 else ""
            if isinstance(one, dict | list):
                levels.append(iter(one.items() if isinstance(one, dict) else enumerate(one)))
                break
        else:
            levels.pop()
    return "nested too deeply", [top] if top else []


def _refused(what: str, path: list[str] | None = None) -> Refused:
    field = ".".join(path or []).encode(errors="backslashreplace").decode()
    return Refused(400, f"{field}: {what}" if field else what, "invalid_json", field or None)
