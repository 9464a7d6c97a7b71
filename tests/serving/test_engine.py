"""The engine returns offline scores to concurrent callers, isolates failures, and bounds its queue."""

import asyncio
import threading
from itertools import pairwise

import pytest
import torch

from helpers.engine import TRACES, assert_same, expected, loaded, model, offline, running, score, until  # noqa: F401
from tracereward.errors import InputError, TooLong
from tracereward.modeling.tokenization import encode_completion
from tracereward.rewards.records import Trace
from tracereward.serving.encoding import TooManyTokens
from tracereward.serving.engine import Busy, Engine, ScoringFailed


class Gate:
    """Blocks the model's forward pass until `open` is set; `begun` is set when it is called."""

    def __init__(self, model, monkeypatch):
        self.begun, self.open = threading.Event(), threading.Event()
        self.seen = []  # the completions of each call
        forward = model.token_rewards

        def token_rewards(prompts, completions, token_budget):
            self.seen.append([list(ids) for ids in completions])
            self.begun.set()
            assert self.open.wait(20)
            return forward(prompts, completions, token_budget)

        monkeypatch.setattr(model, "token_rewards", token_rewards)

    async def wait(self):
        assert await asyncio.to_thread(self.begun.wait, 20)


@pytest.fixture
def gate(model, monkeypatch):
    gate = Gate(model, monkeypatch)
    yield gate
    gate.open.set()


def tokens_of(model, trace) -> int:
    prompt, completion = trace
    return model.encode(Trace(where="", prompt=prompt, completion=completion)).length


def fails_on(model, monkeypatch, completion, error):
    """Make batches with `completion` raise `error`; returns a list that records the batch sizes."""
    bad = encode_completion(model.tokenizer, completion)
    forward, sizes = model.token_rewards, []

    def token_rewards(prompts, completions, token_budget):
        sizes.append(len(completions))
        if bad in [list(ids) for ids in completions]:
            raise error
        return forward(prompts, completions, token_budget)

    monkeypatch.setattr(model, "token_rewards", token_rewards)
    return sizes


def test_trace_rewards_differ(expected):
    """Precondition of the tests below: scores identify their trace."""
    rewards = sorted(scores.aggregate() for scores in expected)
    assert min(b - a for a, b in pairwise(rewards)) > 1e-4
    assert len({len(completion) for _, completion in TRACES}) > 5


def test_concurrent_requests_get_their_own_scores_in_order(model):
    """Concurrent requests of one to six traces, a third of them truncated, take fewer turns than requests."""
    requests = [TRACES[start : start + 1 + start % 6] for start in range(18)]
    ended = [index % 3 != 0 for index in range(18)]
    sizes = []

    async def work(engine):
        calls = [engine.score(*zip(*pairs), [end] * len(pairs)) for pairs, end in zip(requests, ended)]
        return await asyncio.gather(*calls)

    answers = running(model, work, max_wait=0.2, on_batch=sizes.append)
    for (scores, read, written), pairs, end in zip(answers, requests, ended):
        prompts, completions = zip(*pairs)
        assert_same(scores, model.score(prompts, completions, [end] * len(pairs)))
        assert written == sum(len(one.tokens) for one in scores)
        assert read == sum(len(model.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert sum(sizes) == sum(map(len, requests))
    assert len(sizes) < len(requests) / 2


def test_failed_trace_does_not_fail_others_in_its_batch(model, expected, monkeypatch):
    sizes = fails_on(model, monkeypatch, TRACES[5][1], ZeroDivisionError("this trace"))

    async def work(engine):
        return await asyncio.gather(*(score(engine, [pair]) for pair in TRACES), return_exceptions=True)

    answers = running(model, work, max_wait=0.2)
    assert sizes[0] > 1
    for index, answer in enumerate(answers):
        if index == 5:
            assert isinstance(answer, ScoringFailed)
            assert str(answer) == "ZeroDivisionError: this trace"
        else:
            assert_same(answer, [expected[index]])


def test_out_of_memory_batches_are_halved_until_they_fit(model, expected, monkeypatch):
    forward, sizes = model.token_rewards, []

    def token_rewards(prompts, completions, token_budget):
        sizes.append(len(completions))
        if len(completions) > 3:
            raise RuntimeError("out of memory")
        return forward(prompts, completions, token_budget)

    monkeypatch.setattr(model, "token_rewards", token_rewards)
    assert_same(running(model, lambda engine: score(engine, TRACES)), expected)
    assert sizes[:4] == [24, 12, 6, 3]


def test_non_finite_rewards_fail_only_their_trace(model, expected, monkeypatch):
    forward = model.token_rewards

    def token_rewards(prompts, completions, token_budget):
        rewards = forward(prompts, completions, token_budget)
        bad = encode_completion(model.tokenizer, TRACES[2][1])
        return [values * torch.nan if list(ids) == bad else values for ids, values in zip(completions, rewards)]

    monkeypatch.setattr(model, "token_rewards", token_rewards)

    async def work(engine):
        return await asyncio.gather(*(score(engine, [pair]) for pair in TRACES[:4]), return_exceptions=True)

    answers = running(model, work, max_wait=0.2)
    assert isinstance(answers[2], ScoringFailed)
    assert "finite" in str(answers[2])
    for index in (0, 1, 3):
        assert_same(answers[index], [expected[index]])


def test_full_queue_raises_busy_then_accepts_again(model, expected, gate):
    """One request is being scored, the second fills the queue, the third is rejected."""
    tokens = tokens_of(model, TRACES[1])

    async def work(engine):
        first = asyncio.create_task(score(engine, TRACES[:1]))
        await gate.wait()
        second = asyncio.create_task(score(engine, TRACES[1:2]))
        await until(lambda: engine.queued_tokens == tokens)
        with pytest.raises(Busy) as busy:
            await score(engine, TRACES[2:3])
        gate.open.set()
        answers = [*(await first), *(await second)]
        return busy.value.retry_after, [*answers, *(await score(engine, TRACES[2:3]))]

    retry_after, answers = running(model, work, max_queue=tokens)
    assert isinstance(retry_after, int)
    assert retry_after >= 1
    assert_same(answers, expected[:3])


def test_retry_after_is_queue_divided_by_speed(model):
    engine = Engine(model)
    engine.queued_tokens = 1001
    assert engine.retry_after == 1  # no speed measured yet
    engine._rate = 100.0
    assert engine.retry_after == 11


def test_cancelled_traces_are_removed_from_the_queue(model, gate):
    unwanted = [encode_completion(model.tokenizer, completion) for _, completion in TRACES[4:8]]

    async def work(engine):
        first = asyncio.create_task(score(engine, TRACES[:1]))
        await gate.wait()
        gone = asyncio.create_task(score(engine, TRACES[4:8]))
        stays = asyncio.create_task(score(engine, TRACES[1:2]))
        await until(lambda: len(engine.waiting) == 5)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert len(engine.waiting) == 1
        assert engine.queued_tokens == engine.waiting[0].tokens
        gate.open.set()
        await asyncio.gather(first, stays)
        return engine.queued_tokens

    assert running(model, work) == 0
    given = [ids for completions in gate.seen for ids in completions]
    assert len(given) == 2
    assert not [ids for ids in given if ids in unwanted]


def test_stop_drains_the_queue_and_rejects_new_requests(model, expected, gate):
    async def run():
        engine = Engine(model)
        await engine.start()
        calls = [asyncio.create_task(score(engine, [pair])) for pair in TRACES[:1]]
        await gate.wait()
        calls += [asyncio.create_task(score(engine, [pair])) for pair in TRACES[1:8]]
        await until(lambda: len(engine.waiting) == 7)
        stopping = asyncio.create_task(engine.stop())
        await until(lambda: engine._closing)
        with pytest.raises(Busy):
            await score(engine, TRACES[8:9])
        gate.open.set()
        await stopping
        return [one for call in calls for one in await call]

    assert_same(asyncio.run(run()), expected[:8])


def test_invalid_requests_are_rejected(model, expected):
    tokens = tokens_of(model, TRACES[0])
    cases = [
        (lambda e: score(e, TRACES[:1], max_tokens=tokens - 1), TooManyTokens, f"more than {tokens - 1} tokens"),
        (lambda e: score(e, [TRACES[0], ("1 + 1 = ?\n", "1 + 1 = 2\n" * 40)]), TooLong, "completion 1.*reads 128"),
        (lambda e: e.score(["1 + 1 = ?\n"], [""], [False]), InputError, "completion 0: the completion is empty"),
        (lambda e: e.score([""], ["2"], [True]), InputError, "prompt 0"),
    ]

    async def work(engine):
        for call, kind, text in cases:
            with pytest.raises(kind, match=text):
                await call(engine)
        assert engine.queued_tokens == 0
        return await score(engine, TRACES[:1], max_tokens=tokens)

    assert_same(running(model, work), expected[:1])


def test_token_budget_is_passed_to_the_model(model, monkeypatch):
    seen = []
    forward = model.token_rewards

    def token_rewards(prompts, completions, token_budget):
        seen.append((len(prompts), token_budget))
        return forward(prompts, completions, token_budget)

    monkeypatch.setattr(model, "token_rewards", token_rewards)
    running(model, lambda engine: score(engine, TRACES[:8]), token_budget=40)
    assert {budget for _, budget in seen} == {40}
    assert max(traces for traces, _ in seen) < 8  # a turn is four budgets
    running(model, lambda engine: score(engine, TRACES[:8]))
    assert seen[-1] == (8, model.token_budget)
