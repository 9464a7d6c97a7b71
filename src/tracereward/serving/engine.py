"""Dynamic batching of concurrent scoring requests: a bounded queue and one forward pass at a time."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores
from tracereward.serving.encoding import CHARACTERS, Pair, encode_inputs, encode_traces

BATCHES = 4  # forward passes per turn of the worker: sorting by length pays off only over several passes


class Busy(Exception):
    """The queue is full.

    Attributes:
        retry_after: estimated seconds until the queue is processed.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the server is busy: try again in {retry_after} s")
        self.retry_after = retry_after


class ScoringFailed(Exception):
    """A trace that could not be scored even in a batch of its own."""


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

    Traces that arrive during a turn of the worker wait for the next one; with `max_wait`, traces also wait for others
    while the model is idle. A turn takes the oldest queued traces, up to a few token budgets;
    `TokenRewardModel.token_rewards` sorts them by length and reads a shared prompt once. If a turn fails (out of memory
    or any other error), it is split in half recursively until the failing trace is isolated, so that the other traces
    get their rewards.

    Args:
        model: the reward model, on its device.
        max_wait: seconds.
        max_queue: tokens that may be queued, including the estimate for text not tokenised yet; above it, `Busy`.
        token_budget: padded tokens of one forward pass; the default for the model's device if None.
        on_batch: called with the number of traces of each turn.
    """

    def __init__(
        self,
        model: Scorer,
        *,
        max_wait: float = 0.0,
        max_queue: int = 1_000_000,
        token_budget: int | None = None,
        on_batch: Callable[[int], object] = lambda traces: None,
    ):
        self.model = model
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.on_batch = on_batch
        self.budget = token_budget or model.token_budget
        self.waiting: deque[_Job] = deque()
        self.queued_tokens = 0
        self.queued_text = 0  # estimated tokens of text not tokenised yet
        self._arrived = asyncio.Event()
        self._forward = ThreadPoolExecutor(1, "forward")
        self._texts = ThreadPoolExecutor(1, "texts")  # tokenises during the forward pass
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._rate = 0.0  # tokens per second, a moving average over turns

    async def start(self) -> None:
        """Start the worker."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Score the remaining queue, then stop the worker."""
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
        *,
        max_tokens: float = math.inf,
        field: str = "completion",
    ) -> tuple[list[TokenScores], int, int]:
        """Score completions given as text.

        If the caller is cancelled, its traces are removed from the queue.

        Args:
            prompts: rendered prompts.
            completions: one for each prompt.
            finished: whether each completion ends with the end of sequence, not at a length limit.
            max_tokens: limit for all traces together.
            field: name of the completions in error messages.

        Returns:
            The scores, the number of prompt tokens and the number of completion tokens.

        Raises:
            InputError: a trace is empty, or (`TooLong`) longer than the model's positions.
            TooManyTokens: the traces have more than `max_tokens`.
            Busy: the queue is full.
            ScoringFailed: a trace could not be scored.
        """
        text = sum(map(len, {*prompts})) + sum(map(len, completions))
        work = partial(
            encode_traces, self.model, prompts, completions, finished=finished, max_tokens=max_tokens, field=field
        )
        return await self._scored(await self._tokenised(text, work))

    async def score_inputs(
        self, inputs: Sequence[str | list[int]], max_tokens: float = math.inf
    ) -> tuple[list[TokenScores], int, int]:
        """Score texts or token ids without a prompt: the first token serves as the prompt. Returns as `score`."""
        work = partial(encode_inputs, self.model, inputs, max_tokens)
        return await self._scored(await self._tokenised(sum(map(len, inputs)), work))

    async def prompt_tokens(self, prompt: str, max_tokens: float = math.inf) -> int:
        """Number of tokens of a rendered prompt; `InputError` if it is empty or leaves no room for a completion."""
        work = partial(
            encode_traces, self.model, [prompt], [""], finished=[True], max_tokens=max_tokens, field="prompt"
        )
        [(ids, _)] = await self._tokenised(len(prompt), work)
        return len(ids)

    async def _tokenised(self, characters: int, work: Callable[[], list[Pair]]) -> list[Pair]:
        """Run `work` in the tokenizing thread. Its text counts towards the queue; an empty queue accepts any text."""
        tokens = characters // CHARACTERS
        if self._closing or (self.queued and self.queued + tokens > self.max_queue):
            raise Busy(self.retry_after)
        self.queued_text += tokens
        try:
            return await asyncio.get_running_loop().run_in_executor(self._texts, work)
        finally:
            self.queued_text -= tokens

    async def _scored(self, ids: list[Pair]) -> tuple[list[TokenScores], int, int]:
        read, written = (sum(len(pair[side]) for pair in ids) for side in (0, 1))
        rewards = await self.score_ids(ids)
        pairs = [(completion, values) for (_, completion), values in zip(ids, rewards, strict=True)]
        loop = asyncio.get_running_loop()
        scores = await loop.run_in_executor(self._texts, lambda: [self.model.to_scores(*pair) for pair in pairs])
        return scores, read, written

    async def score_ids(self, ids: Sequence[Pair]) -> list[Tensor]:
        """Token rewards of (prompt ids, completion ids) pairs; see `score`."""
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
        except BaseException:  # one trace failed or the caller was cancelled: the other traces are not needed
            for job in jobs:
                job.future.cancel()
            self.waiting = deque(job for job in self.waiting if not job.future.done())
            self.queued_tokens = sum(job.tokens for job in self.waiting)
            raise

    @property
    def queued(self) -> int:
        """Queued tokens, including the estimate for text not tokenised yet."""
        return self.queued_tokens + self.queued_text

    @property
    def retry_after(self) -> int:
        """Estimated seconds until the queue is processed, at the speed of the last turns."""
        return max(1, math.ceil(self.queued / self._rate)) if self._rate else 1

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
        """Dequeue the oldest jobs that are not cancelled, up to `BATCHES` token budgets, at least one."""
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
        """Rewards or the error of each job; runs in the worker's thread."""
        prompts, completions = [job.prompt for job in jobs], [job.completion for job in jobs]
        try:
            rewards = self.model.token_rewards(prompts, completions, token_budget=self.budget)
        except Exception as error:  # any error is caused by one trace or by the size of the batch
            reason = f"{type(error).__name__}: {error}"
        else:
            return [
                values if bool(torch.isfinite(values).all()) else ScoringFailed("the rewards are not finite")
                for values in rewards
            ]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(jobs) == 1:
            return [ScoringFailed(reason)]
        half = len(jobs) // 2
        return [*self._score(jobs[:half]), *self._score(jobs[half:])]
