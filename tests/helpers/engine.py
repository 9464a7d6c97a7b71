"""Test helpers for the scoring engine."""

import asyncio

import pytest

from helpers.served import save_reward_model, traces
from tracereward.rewards.model import TokenRewardModel
from tracereward.serving.engine import Engine

TRACES = traces(24)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tokenizer):
    return TokenRewardModel.from_pretrained(str(save_reward_model(tmp_path_factory.mktemp("m") / "rm", tokenizer)))


@pytest.fixture(scope="module")
def expected(loaded):
    """Offline scores of `TRACES`."""
    return offline(loaded, TRACES)


@pytest.fixture
def model(loaded, monkeypatch):
    """The model; `token_rewards` is restored after the test."""
    monkeypatch.setattr(loaded, "token_rewards", loaded.token_rewards)
    return loaded


def running(model, work, **options):
    """Run `work(engine)` with a started engine, and stop the engine afterwards."""

    async def run():
        engine = Engine(model, **options)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


def offline(model, pairs):
    prompts, completions = zip(*pairs)
    return model.score(prompts, completions)


def assert_same(given, expected):
    assert len(given) == len(expected)
    for a, b in zip(given, expected):
        assert (a.tokens, a.offsets, a.step_ends) == (b.tokens, b.offsets, b.step_ends)
        assert a.rewards == pytest.approx(b.rewards, abs=1e-4)


async def score(engine, pairs, **options):
    prompts, completions = zip(*pairs)
    return (await engine.score(prompts, completions, [True] * len(pairs), **options))[0]


async def until(condition):
    """Run the event loop until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)
