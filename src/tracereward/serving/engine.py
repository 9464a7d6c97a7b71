"""Scoring for many requests at once: batches made of what waits, one forward pass at a time, a bounded queue."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from tracereward.errors import InputError
from tracereward.scorer import Scorer
from tracereward.scores import TokenScores

BATCHES = 4  # passes in one turn of the worker: sorting by length needs some traces to sort


class Busy(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which what waits now should be done.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the server is busy: try again in {retry_after} s")
        self.retry_after = retry_after


class ScoringFailed(Exception):
    """A trace that could not be scored, alone in a batch."""


@dataclass
class _Job:
    prompt: list[int]
    completion: list[int]
    future: asyncio.Future[Tensor]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


class Engine:
    """Batches the traces of concurrent requests by token budget and scores them in one thread.

    While one turn is in the model, what arrives waits for the next; `max_wait` lets a trace wait for others also where
    the model is idle. A turn takes what waits, oldest first, up to a few token budgets;
    `TokenRewardModel.token_rewards` sorts it by length and reads a shared prompt once. If a turn fails (out of memory,
    or anything else), it is halved until the trace that fails is alone: its mates get their rewards.

    Args:
        model: the reward model, on its device.
        max_wait: seconds.
        max_queue: tokens that may wait; more is `Busy`.
        on_batch: told how many traces each turn had.
    """

    def __init__(
        self,
        model: Scorer,
        max_wait: float = 0.0,
        max_queue: int = 1_000_000,
        on_batch: Callable[[int], object] = lambda traces: None,
    ):
        self.model = model
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.on_batch = on_batch
        self.budget = model.token_budget
        self.waiting: deque[_Job] = deque()
        self.queued_tokens = 0
        self._arrived = asyncio.Event()
        self._forward = ThreadPoolExecutor(1, "forward")
        self._texts = ThreadPoolExecutor(1, "texts")  # tokenising beside the forward pass
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._rate = 0.0  # tokens a second, of the last turns

    async def start(self) -> None:
        """Start the worker."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Score what still waits, then end the worker."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._forward.shutdown()  # not _texts: callers whose traces were just scored still need it

    async def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool],
        max_tokens: int | None = None,
    ) -> tuple[list[TokenScores], int, int]:
        """Scores of completions given as text, with the tokens of all prompts and of all completions.

        When the caller is cancelled, its traces leave the queue.

        Args:
            prompts: rendered.
            completions: as many.
            finished: whether each ended by itself.
            max_tokens: of all traces together.

        Raises:
            InputError: a trace is empty or longer than the model's positions.
            TooManyTokens: more than `max_tokens`.
            Busy: the queue is full.
            ScoringFailed: a trace could not be scored.
        """
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._texts, self._encode, prompts, completions, finished)
        return await self._scored(ids, max_tokens)

    async def score_texts(
        self, texts: Sequence[str], max_tokens: int | None = None
    ) -> tuple[list[TokenScores], int, int]:
        """The same of texts without a prompt: of each token from the second, with the first as the prompt."""
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._texts, self._cut, texts)
        return await self._scored(ids, max_tokens)

    async def prompt_tokens(self, prompt: str) -> int:
        """Tokens of a rendered prompt; `InputError` where it has none, or leaves no room for a trace."""
        loop = asyncio.get_running_loop()
        [(ids, _)] = await loop.run_in_executor(self._texts, self._encode, [prompt], [""], [True])
        return len(ids)

    async def _scored(
        self, ids: list[tuple[list[int], list[int]]], max_tokens: int | None
    ) -> tuple[list[TokenScores], int, int]:
        loop = asyncio.get_running_loop()
        read, written = (sum(len(pair[side]) for pair in ids) for side in (0, 1))
        if max_tokens is not None and read + written > max_tokens:
            raise TooManyTokens(read + written, max_tokens)
        rewards = await self.score_ids(ids)
        pairs = [(completion, values) for (_, completion), values in zip(ids, rewards, strict=True)]
        scores = await loop.run_in_executor(self._texts, lambda: [self.model.to_scores(*pair) for pair in pairs])
        return scores, read, written

    async def score_ids(self, ids: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Token rewards of pairs of prompt and completion ids; see `score`."""
        tokens = sum(len(prompt) + len(completion) for prompt, completion in ids)
        if self._closing or self.queued_tokens + tokens > self.max_queue:
            raise Busy(self.retry_after)
        loop = asyncio.get_running_loop()
        jobs = [_Job(prompt, completion, loop.create_future()) for prompt, completion in ids]
        self.waiting.extend(jobs)
        self.queued_tokens += tokens
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        except BaseException:  # an error of one trace, or a caller who left: nobody waits for the others
            for job in jobs:
                job.future.cancel()
            self.waiting = deque(job for job in self.waiting if not job.future.done())
            self.queued_tokens = sum(job.tokens for job in self.waiting)
            raise

    @property
    def retry_after(self) -> int:
        """Seconds in which what waits should be done, at the speed of the last turns."""
        return max(1, math.ceil(self.queued_tokens / self._rate)) if self._rate else 1

    def _encode(
        self, prompts: Sequence[str], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[tuple[list[int], list[int]]]:
        ids = []
        for index, texts in enumerate(zip(prompts, completions, finished, strict=True)):
            ids.append(self.model.check_length(f"completion {index}", *texts))
            if not ids[-1][0]:
                raise InputError(f"prompt {index}: it has no token")
        return ids

    def _cut(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        ids = []
        for index, text in enumerate(texts):
            _, tokens = self.model.check_length(f"input {index}", "", text, False)
            if len(tokens) < 2:
                raise InputError(f"input {index}: one token alone has no reward; give two or more")
            ids.append((tokens[:1], tokens[1:]))
        return ids

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self.waiting:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._wait_for_more(loop.time() + self.max_wait)
            jobs = self._take()
            if not jobs:
                continue
            start = time.perf_counter()
            results = await loop.run_in_executor(self._forward, self._score, jobs)
            speed = sum(job.tokens for job in jobs) / max(1e-9, time.perf_counter() - start)
            self._rate = 0.7 * self._rate + 0.3 * speed if self._rate else speed
            self.on_batch(len(jobs))
            for job, result in zip(jobs, results, strict=True):
                if job.future.done():
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result)

    async def _wait_for_more(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while self.queued_tokens < self.budget and not self._closing and (left := deadline - loop.time()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Job]:
        """The oldest jobs whose callers still wait, up to `BATCHES` token budgets, at least one."""
        jobs: list[_Job] = []
        tokens = 0
        while self.waiting and (not jobs or tokens + self.waiting[0].tokens <= BATCHES * self.budget):
            job = self.waiting.popleft()
            self.queued_tokens -= job.tokens
            if not job.future.done():
                jobs.append(job)
                tokens += job.tokens
        return jobs

    def _score(self, jobs: list[_Job]) -> list[Tensor | Exception]:
        """Rewards of each job, or why it has none; runs in the worker's thread."""
        try:
            rewards = self.model.token_rewards([job.prompt for job in jobs], [job.completion for job in jobs])
        except Exception as error:  # whatever it is, it belongs to one trace, or to too many at once
            reason = f"{type(error).__name__}: {error}"
        else:
            return [
                values if bool(torch.isfinite(values).all()) else ScoringFailed("its rewards are not finite")
                for values in rewards
            ]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(jobs) == 1:
            return [ScoringFailed(reason)]
        half = len(jobs) // 2
        return [*self._score(jobs[:half]), *self._score(jobs[half:])]


class TooManyTokens(Exception):
    """A request with more tokens than one may have."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(f"the request has {tokens} tokens; the limit is {limit} (--max-tokens)")
