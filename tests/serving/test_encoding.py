"""Tokenization of requests: each prompt once, never past the limits, and with a bounded queue."""

import asyncio
import threading

import pytest

from helpers.any_text import any_text  # noqa: F401
from helpers.engine import TRACES, assert_same, offline, running, score, until
from helpers.served import save_reward_model
from tracereward.errors import InputError, TooLong
from tracereward.rewards.model import TokenRewardModel
from tracereward.serving.encoding import TooManyTokens
from tracereward.serving.engine import Busy


class Tokenizer:
    """Wraps the model's tokenizer: records its inputs and can be blocked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen, self.open = tokenizer, [], threading.Event()
        self.open.set()

    def __call__(self, text, **options):
        if text != "a":  # the probe for the tokens that a tokenizer adds
            self.seen.append(text)
        assert self.open.wait(20)
        return self.tokenizer(text, **options)

    def __len__(self):
        return len(self.tokenizer)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.fixture
def model(tmp_path, tokenizer):
    model = TokenRewardModel.from_pretrained(str(save_reward_model(tmp_path / "rm", tokenizer)))
    model.tokenizer = Tokenizer(model.tokenizer)
    return model


def test_shared_prompt_is_tokenised_once_and_tokenising_stops_at_the_limit(model):
    """A prompt of 101 tokens: 64 candidates of 2 tokens fit into 6592, and the fifth exceeds 500."""
    prompt = "1" + " + 1" * 50
    many = [f"{index % 10}" for index in range(64)]
    running(model, lambda engine: score(engine, [(prompt, text) for text in many], max_tokens=64 * 103))
    assert model.tokenizer.seen.count(prompt) == 1
    assert len(model.tokenizer.seen) == 65
    model.tokenizer.seen.clear()
    with pytest.raises(TooManyTokens, match="more than 500 tokens"):
        running(model, lambda engine: score(engine, [(prompt, text) for text in many], max_tokens=500))
    assert model.tokenizer.seen == [prompt, *many[:5]]


def test_text_far_over_the_limit_is_not_fully_tokenised(model):
    """Limit 100, text of 200,001 tokens: one piece of 400 characters (200 tokens) suffices to reject it. A text one
    token over the limit is counted exactly."""
    text = "1" + " + 1" * 100_000
    for call in (
        lambda engine: score(engine, [(text, "2")], max_tokens=100),
        lambda engine: score(engine, [("1", text)], max_tokens=100),
        lambda engine: engine.score_inputs([text], max_tokens=100),
    ):
        model.tokenizer.seen.clear()
        with pytest.raises(TooManyTokens):
            running(model, call)
        assert sum(map(len, model.tokenizer.seen)) <= 401
    near = "x" * 500 + " + 1" * 50  # 101 tokens: this tokenizer encodes the long word as one token
    assert len(running(model, lambda engine: engine.score_inputs([near], max_tokens=101))[0][0].rewards) == 100
    with pytest.raises(TooManyTokens):
        running(model, lambda engine: engine.score_inputs([near], max_tokens=100))


def test_untokenised_text_counts_towards_the_queue(model):
    """A text of 75 estimated tokens (four characters each) fills a queue of 100: the next one is rejected until it is
    tokenised."""
    expected = offline(model, TRACES[:1])

    async def work(engine):
        model.tokenizer.open.clear()
        long = asyncio.create_task(score(engine, [("1" * 200, "2" * 100)]))
        await until(lambda: engine.queued)
        assert engine.queued == 75
        with pytest.raises(Busy):
            await score(engine, [("1" * 80, "2" * 24)])
        small = asyncio.create_task(score(engine, TRACES[:1]))
        gone = asyncio.create_task(score(engine, TRACES[1:2]))
        await until(lambda: engine.queued > 85)
        gone.cancel()
        model.tokenizer.open.set()
        await long
        answer = await small
        assert engine.queued == 0
        assert TRACES[1][1] not in model.tokenizer.seen
        return answer

    assert_same(running(model, work, max_queue=100), expected)


def test_single_request_is_always_tokenised(model):
    """Character counts are estimates, so a single request is tokenised anyway. The long word here is one token."""

    async def work(engine):
        return await score(engine, [("1 + 1 = ?\n", "x" * 1000)])

    assert len(running(model, work, max_queue=20)[0].tokens) == 2


def test_inputs_are_scored_from_their_second_token(model):
    """The first token serves as the prompt, for a text and for its ids."""
    text = TRACES[0][0] + TRACES[0][1]
    ids = model.tokenizer(text)["input_ids"]
    expected = model.token_rewards([ids[:1]], [ids[1:]])[0].tolist()
    scores, read, written = running(model, lambda engine: engine.score_inputs([text, ids]))
    for one in scores:
        assert one.rewards == pytest.approx(expected, abs=1e-4)
    assert (read, written) == (2, 2 * (len(ids) - 1))


def test_invalid_inputs_are_rejected(model):
    vocabulary = len(model.tokenizer)
    cases = [
        (["1 + 1", "7"], InputError, "input 1: .*single token"),
        ([[3, 4], []], InputError, "input 1: .*single token"),
        ([[3, 4], [3, vocabulary]], InputError, f"input 1: .* 0 to {vocabulary - 1}"),
        ([[3, -1]], InputError, "input 0: .*token ids"),
        ([[3] * 129], TooLong, "input 0: .*reads 128"),
        ([[3] * 50] * 3, TooManyTokens, "more than 149 tokens"),
    ]

    async def work(engine):
        for inputs, kind, text in cases:
            with pytest.raises(kind, match=text):
                await engine.score_inputs(inputs, 149)
        return await engine.score_inputs([[3, vocabulary - 1]])

    assert len(running(model, work)[0][0].rewards) == 1
