"""Sampling from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`, or a hosted API.

The `openai` client repeats requests that end with 408, 409, 429, 5xx, a time-out or a broken connection, with back-off
or after as long as the server says. The first question is asked alone: what the server refuses of a request is found
there, and is left out of all requests if the completions can do without.
"""

import asyncio
import importlib.util
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tracereward.console import note
from tracereward.errors import InputError, first_line, nearest
from tracereward.generation.engine import EngineOptions, Prompt, Unanswered
from tracereward.generation.params import SamplingParams
from tracereward.generation.settings import OTHER, STANDARD, server_settings
from tracereward.messages import read_choice

KEY = "OPENAI_API_KEY"
RETRIES = 6
"""Repetitions of a request: half a minute of back-off, unless the server says how long to wait."""
SECONDS = 600.0
"""Time limit of a request."""
CHECK_SECONDS = 10.0
"""Time limit of the list of models."""
REFUSED = 3
"""Questions that are asked one by one until one is answered; after as many nothing more is asked."""
LOST = 8
"""Failures in a row, at least, after which nothing more is asked."""
OPTIONAL: dict[str, tuple[tuple[str, ...], str]] = {
    "other": (tuple(OTHER), f"without {', '.join(OTHER)}, for which its own values apply"),
    "logprobs": (("logprobs", "top_logprobs"), "without log-probs"),
    "seed": (("seed",), "without a seed"),
    "n": (("n",), "one completion a request"),
    "standard": (tuple(STANDARD), f"without {', '.join(STANDARD)}, for which its own values apply"),
}
"""Parts of a request that can be left out, in the order in which that is tried: the names of their fields, and how the
server is asked then."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A completion that a server returned.

    Attributes:
        prompt: index of its prompt.
        text: with its reasoning, if the server returns it separately.
        finished: whether it ended by itself, not at the length limit.
        length: number of its tokens; None if the server does not tell.
        logprob: mean log-prob of its tokens as the server computes it; None if the server does not tell.
    """

    prompt: int
    text: str
    finished: bool
    length: int | None = None
    logprob: float | None = None


class ServerEngine:
    """See `engine.Engine`. Texts go to ``/completions``, messages to ``/chat/completions``.

    Args:
        options: the server.
        model: name of the model there.
        kwargs: variables of the server's chat template.

    Raises:
        InputError: the client is not installed, no server answers, or it refuses the key.
    """

    def __init__(self, options: EngineOptions, model: str, kwargs: Mapping[str, Any] | None = None):
        if importlib.util.find_spec("openai") is None:
            raise InputError("--engine URL needs the openai package: pip install 'tracereward[engines]'")
        from anyio.from_thread import start_blocking_portal

        if not re.fullmatch("[!-~]*", os.environ.get(KEY, "").strip()):  # or an error would print it
            raise InputError(f"${KEY}: a key goes into an HTTP header: ASCII letters, digits and signs without spaces")
        self.url, self.model, self.concurrency = options.name.rstrip("/"), model, options.concurrency
        self.template = {"chat_template_kwargs": dict(kwargs)} if kwargs else {}
        self.left_out: set[str] = set()
        self.limit_field = "max_tokens"
        self.counts: dict[str, int] = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        with start_blocking_portal() as portal:
            self.listed = portal.call(self._models)
        if self.listed and model not in self.listed:
            note(f"warning: {self.url} lists {_some(self.listed)}, not {model}: it may answer with another model")

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int = 1,
        done: Collection[int] = (),
        before: int | None = None,
    ) -> Iterator[list[Answered]]:
        """See `Engine`; yields the completions of one prompt as soon as it has all.

        Raises:
            InputError: the server does not have the model or the endpoint, or refuses the key.
            Unanswered: after all others.
        """
        from anyio.from_thread import start_blocking_portal
        from openai import OpenAIError

        client, limit = self._client(RETRIES, SECONDS), asyncio.Semaphore(self.concurrency)
        first = before or 0
        todo = (index for index in range(first, first + len(prompts)) if index not in done)
        failed: dict[int, str] = {}
        pending: dict[Future[list[Answered]], int] = {}
        with start_blocking_portal() as portal:

            def ask(index: int) -> Future[list[Answered]]:
                async def post(request: int, count: int) -> list[Answered]:
                    body = self._request(prompts[index - first], params, seed=params.seed_of(index, request), n=count)
                    async with limit:
                        path = "/completions" if "prompt" in body else "/chat/completions"
                        return self._read(await client.post(path, body=body, cast_to=object), index)

                return portal.start_task_soon(self._completions, post, n)

            try:
                for index in islice(todo, REFUSED):
                    try:
                        answers = self._negotiated(ask, index)
                    except (OpenAIError, ValueError) as error:
                        self._check(error)
                        failed[index] = _reason(error)
                    else:
                        yield answers
                        break
                else:  # none was answered, or there are no more
                    if failed:
                        raise Unanswered(failed, given_up=True)
                pending = {ask(index): index for index in islice(todo, self.concurrency)}
                lost = 0
                while pending:
                    for future in sorted(wait(pending, return_when=FIRST_COMPLETED).done, key=pending.__getitem__):
                        index = pending.pop(future)
                        if (following := next(todo, None)) is not None:
                            pending[ask(following)] = following
                        try:
                            answers = future.result()
                        except (OpenAIError, ValueError) as error:
                            failed[index], lost = _reason(error), lost + 1
                            if lost >= max(LOST, self.concurrency):
                                raise Unanswered(failed, given_up=True) from error
                        else:
                            lost = 0
                            yield answers
            finally:
                for future in pending:
                    future.cancel()
                portal.call(client.close)
        if failed:
            raise Unanswered(failed)

    def cost(self) -> str:
        """See `Engine`: requests that were answered, and the tokens that the server counts."""
        requests, read, written = self.counts.values()
        self.counts = dict.fromkeys(self.counts, 0)
        if not requests:
            return ""
        tokens = f"{read} prompt tokens, {written} completion tokens" if read or written else "it counts no tokens"
        return f"{self.url}: {requests} requests, {tokens}"

    def _client(self, retries: int, seconds: float) -> Any:
        from openai import AsyncOpenAI

        key = os.environ.get(KEY, "").strip() or "none"  # the client needs one, a server of one's own does not
        return AsyncOpenAI(base_url=self.url, api_key=key, max_retries=retries, timeout=seconds)

    async def _models(self) -> list[str]:
        """Names of the server's models; empty if it does not list them."""
        from openai import APIConnectionError, OpenAIError

        async with self._client(0, CHECK_SECONDS) as client:
            try:
                found = await client.get("/models", cast_to=object)
            except APIConnectionError as error:
                raise InputError(
                    f"--engine {self.url}: {_reason(error)}: is it the address, with /v1, and does the server run?"
                ) from error
            except (OpenAIError, ValueError) as error:
                self._check_key(error)
                return []
        models = found.get("data") if isinstance(found, dict) else None
        models = models if isinstance(models, list) else []
        return [str(one["id"]) for one in models if isinstance(one, dict) and "id" in one]

    async def _completions(self, post: Any, n: int) -> list[Answered]:
        """`n` completions of a question: in one request, or as many more as a server that gives fewer needs."""
        found = [] if "n" in self.left_out else await post(0, n)
        missing, asked = n - len(found), "n" not in self.left_out
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(post(asked + k, 1)) for k in range(missing)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [*found, *(answer for task in tasks for answer in task.result()[:1])][:n]

    def _request(self, prompt: Prompt, params: SamplingParams, *, seed: int, n: int) -> dict[str, Any]:
        """The body of a request."""
        required = {"model": self.model, **self.template, **server_settings(params)}
        required[self.limit_field] = required.pop("max_tokens")
        chat = not isinstance(prompt, str)
        required |= {"messages": list(prompt)} if chat else {"prompt": prompt}
        parts: dict[str, dict[str, Any]] = {
            "other": OTHER,
            "logprobs": {"logprobs": True} if chat else {"logprobs": 1},
            "n": {"n": n} if n > 1 else {},
            "seed": {"seed": seed} if params.temperature else {},
            "standard": STANDARD,
        }
        given = {
            name: value for part, fields in parts.items() if part not in self.left_out for name, value in fields.items()
        }
        return {**given, **required}

    def _read(self, body: Any, index: int) -> list[Answered]:
        """The completions in a response.

        Raises:
            ValueError: it has none, or something else than text.
        """
        body = json.loads(body) if isinstance(body, str) else body  # of a server that names no content type
        body = body if isinstance(body, dict) else {}
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise ValueError("the response has no choices")
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        numbers: dict[str, int] = {name: usage[name] for name in self.counts if type(usage.get(name)) is int}
        for name, value in (numbers | {"requests": 1}).items():
            self.counts[name] += value
        answers = []
        for choice in choices:
            text, _, finished = read_choice(choice)
            log_probs = log_probs_of(choice)
            length = len(log_probs) or (numbers.get("completion_tokens") if len(choices) == 1 else None)
            mean = sum(log_probs) / len(log_probs) if log_probs else None
            answers.append(Answered(prompt=index, text=text, finished=finished, length=length, logprob=mean))
        return answers

    def _negotiated(self, ask: Any, index: int) -> list[Answered]:
        """Ask a question with as much of a request as the server takes, and remember that.

        Raises:
            openai.OpenAIError: leaving parts out does not help; nothing is left out then.
        """
        from openai import APIStatusError

        before, first = (set(self.left_out), self.limit_field), None
        while True:
            try:
                answers = ask(index).result()
            except APIStatusError as error:
                first = first or error
                if error.status_code not in (400, 422) or not self._leave_out(_reason(error)):
                    self.left_out, self.limit_field = before
                    raise
            else:
                if new := [how for part, (_, how) in OPTIONAL.items() if part in self.left_out - before[0]]:
                    note(f"{self.url} is asked {'; '.join(new)}: it refused ({_reason(first)})")  # pyright: ignore[reportArgumentType]
                return answers

    def _leave_out(self, said: str) -> bool:
        """Leave out the part of requests that a refusal names, else the next; whether there is one."""
        if self.limit_field == "max_tokens" and "max_completion_tokens" in said:
            self.limit_field = "max_completion_tokens"
            return True
        left = [part for part in OPTIONAL if part not in self.left_out]
        named = [part for part in left if any(re.search(rf"\b{name}\b", said) for name in OPTIONAL[part][0])]
        self.left_out |= {*(named or left)[:1]}
        return bool(left)

    def _check(self, error: Exception) -> None:
        """Raise an InputError if the first question's failure would be every other's."""
        self._check_key(error)
        unknown = self.listed and self.model not in self.listed
        if getattr(error, "status_code", None) == 404 or (unknown and getattr(error, "status_code", None) == 400):
            if unknown:
                near = nearest(self.model, self.listed)
                fix = f"did you mean {near}? " if near else ""
                raise InputError(
                    f"{self.url} has no model {self.model}: {fix}It lists {_some(self.listed)} ({_reason(error)})"
                ) from error
            raise InputError(
                f"{self.url}: {_reason(error)}: is it the address, with /v1, and the name of a model there? --api says "
                "whether texts (completions) or messages (chat) are sent; many servers have one of the two"
            ) from error

    def _check_key(self, error: Exception) -> None:
        if getattr(error, "status_code", None) in (401, 403):
            fix = "refuses the key in" if os.environ.get(KEY) else "asks for a key: set"
            raise InputError(f"{self.url} {fix} ${KEY} ({_reason(error)})") from error


def log_probs_of(choice: Mapping[str, Any]) -> list[float]:
    """The log-probs of a choice's tokens; empty if it has none, or not of all tokens."""
    given = choice.get("logprobs")
    if not isinstance(given, dict):
        return []
    values = given.get("token_logprobs")  # of completions; chat, and llama.cpp in both, has objects
    if values is None and isinstance(given.get("content"), list):
        values = [one.get("logprob") if isinstance(one, dict) else None for one in given["content"]]
    values = values if isinstance(values, list) else []
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return numbers if len(numbers) == len(values) else []


def _some(names: Sequence[str], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _reason(error: Exception) -> str:
    """What a failed request says."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, APITimeoutError):
        return "no answer in time"
    if isinstance(error, APIConnectionError):
        return f"the connection failed ({first_line(error.__cause__ or error)})"
    if isinstance(error, APIStatusError):
        body = error.body
        said = (body.get("message") or body.get("detail") or body.get("error")) if isinstance(body, dict) else body
        return f"status {error.status_code}: {' '.join(str(said or error.message).split())[:300]}"
    return first_line(error)
