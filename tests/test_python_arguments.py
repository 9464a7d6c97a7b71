"""Arguments of the exported names: what the command line refuses is refused in Python, with the argument's name."""

import math

import pytest

import tracereward
from helpers.command_line import bench  # noqa: F401
from tracereward import (
    AdversarialTrainer,
    RewardSettings,
    TokenRewardModel,
    as_reward_func,
    fit,
    get_task,
    load_demonstrations,
)
from tracereward.errors import InputError
from tracereward.selection import choose

Q, T = "3 + 4 = ?\n", "3 + 4 = 7\n#### 7"
NONE = {"args": None, "task": None, "processing_class": None}
MESSAGES = [{"role": "user", "content": Q}]


@pytest.fixture(scope="module")
def model(bench):
    return TokenRewardModel.from_pretrained(bench.reward_model)  # a Path


WRONG = {
    "score: text": (lambda m: m.score(Q, T), "prompts must be a list, not a text: put it into a list"),
    "score: completion": (lambda m: m.score([Q], T), "completions must be a list, not a text"),
    "score: None": (lambda m: m.score(None, [T]), "prompts must be a list, not None"),
    "score: number": (lambda m: m.score([Q], [7]), r"completions\[0\] must be a text, not int"),
    "score: null": (lambda m: m.score([Q, Q], [T, None]), r"completions\[1\] must be a text, not None"),
    "score: messages": (lambda m: m.score([MESSAGES], [T]), r"prompts\[0\] must be a text.*chat template"),
    "score: empty": (lambda m: m.score([], []), "prompts is empty"),
    "score: lengths": (lambda m: m.score([Q, Q], [T]), "completions has 1 entries and needs 2"),
    "score: one flag": (lambda m: m.score([Q], [T], finished=True), "finished must be a list, not bool"),
    "score: flags": (lambda m: m.score([Q], [T], finished=["no"]), "finished must hold true or false"),
    "score: more flags": (lambda m: m.score([Q], [T], finished=[True] * 2), "finished has 2 entries and needs 1"),
    "score: set": (lambda m: m.score({Q}, [T]), "prompts must be a list, not set"),
    "reward function: null": (
        lambda m: as_reward_func(m)(prompts=[Q], completions=[None]),
        r"completions\[0\] must be",
    ),
    "reward function: lengths": (
        lambda m: as_reward_func(m)(prompts=[Q, Q], completions=[T]),
        "completions has 1 entries and needs 2",
    ),
    "score: dict": (lambda m: m.score({Q: T}, [T]), "prompts must be a list, not dict"),
    "score: surrogate": (lambda m: m.score([Q], ["7 \ud83d"]), r"completions\[0\] has half of a surrogate pair"),
    "score: no tokens": (lambda m: m.score([""], [T]), "row 0"),
    "ids: texts": (lambda m: m.score_ids([Q], [T]), r"prompts\[0\] must be a list of token ids from 0"),
    "ids: range": (lambda m: m.score_ids([[1]], [[10**6]]), r"completions\[0\] must be a list of token ids"),
    "ids: flat": (lambda m: m.score_ids([1, 2], [3, 4]), r"prompts\[0\] must be a list of token ids"),
    "ids: empty": (lambda m: m.score_ids([[1]], [[]]), "completion is empty"),
    "ids: lengths": (lambda m: m.score_ids([[1]], [[1], [2]]), "completions has 2 entries and needs 1"),
    "rerank: text": (lambda m: m.rerank(Q, T), "candidates must be a list, not a text"),
    "rerank: empty": (lambda m: m.rerank(Q, []), "candidates is empty"),
    "rerank: prompts": (lambda m: m.rerank([Q], [T]), "prompt must be a text, not list"),
    "rerank: method": (lambda m: m.rerank(Q, [T], "vot"), "did you mean 'vote'"),
    "rerank: oracle": (lambda m: m.rerank(Q, [T], "oracle"), "unknown method"),
    "rerank: no log-probs": (lambda m: m.rerank(Q, [T], "logprob"), "needs log_probs"),
    "rerank: log-probs": (lambda m: m.rerank(Q, [T], "logprob", [1.0, 2.0]), "log_probs has 2 entries and needs 1"),
    "rerank: nan": (lambda m: m.rerank(Q, [T], "logprob", [math.nan]), r"log_probs\[0\] must be a finite number"),
    "first_error: text": (lambda m: m.first_error(Q, T), "steps must be a list, not a text"),
    "first_error: empty": (lambda m: m.first_error(Q, []), "steps is empty"),
    "first_error: blank": (lambda m: m.first_error(Q, ["7", " "], 0.0), "has an empty step"),
    "first_error: threshold": (lambda m: m.first_error(Q, ["7"], "0"), "threshold must be a finite number"),
    "score_steps: flat": (lambda m: m.score_steps([Q], ["7"]), r"traces\[0\] must be a list, not a text"),
    "score_steps: lengths": (lambda m: m.score_steps([Q], [["7"], ["8"]]), "traces has 2 entries and needs 1"),
    "aggregate": (lambda m: m.score([Q], [T])[0].aggregate("sum"), "unknown aggregate 'sum'"),
    "aggregate: None": (lambda m: m.score([Q], [T])[0].aggregate(None), "aggregate must be a name, not None"),
    "from_pretrained": (lambda _: TokenRewardModel.from_pretrained(None), "a model must be a folder or a Hub id"),
    "from_pretrained: empty": (lambda _: TokenRewardModel.from_pretrained(""), "a model must be a folder or a Hub id"),
    "as_reward_func": (lambda _: as_reward_func("folder"), "must be a TokenRewardModel"),
    "get_task": (lambda _: get_task(None), "task must be a name, not None"),
    "verify": (lambda _: get_task("generic").verify(None, "7"), "completion must be a text, not None"),
    "verify: gold": (lambda _: get_task("generic").verify("#### 7", 7), "answer must be a text, not int"),
    "load: source": (lambda _: load_demonstrations(["a"], get_task("generic")), r"demonstrations\[0\] must be"),
    "load: rows": (lambda _: load_demonstrations(3, get_task("generic")), "demonstrations must be a file"),
    "load: task": (lambda _: load_demonstrations("a.jsonl", "generic"), "task must be a Task"),
    "load: limit": (lambda _: load_demonstrations("a.jsonl", get_task("generic"), limit="5"), "limit is '5'"),
    "settings: head": (lambda _: RewardSettings(head=None), "head must be a name"),
    "settings: interval": (lambda _: RewardSettings(interval="3"), "interval must be at least 1, not '3'"),
    "settings: clip": (lambda _: RewardSettings(beta_clip="5"), "beta_clip must be positive, not '5'"),
    "settings: delimiter": (lambda _: RewardSettings(step_delimiter=None), "step_delimiter must be a text"),
    "trainer: text": (lambda m: AdversarialTrainer(None, m, Q, **NONE), "demonstrations must be a list"),
    "trainer: empty": (lambda m: AdversarialTrainer(None, m, [], **NONE), "demonstrations is empty"),
    "trainer: rows": (
        lambda m: AdversarialTrainer(None, m, [{"prompt": Q}], **NONE),
        r"demonstrations\[0\] must be a row with the fields prompt and completion",
    ),
    "trainer: messages": (
        lambda m: AdversarialTrainer(None, m, [{"prompt": MESSAGES, "completion": T}], **NONE),
        r"demonstrations\[0\]: prompt must be a text.*chat template",
    ),
    "model: settings": (lambda m: TokenRewardModel(m.backbone, m.tokenizer, {"head": "token"}), "RewardSettings"),
    "fit: demonstrations": (lambda _: fit(None, [], model="m"), "demonstrations"),
    "fit: rows": (lambda _: fit([7], [7], model="m"), r"demonstrations\[0\] must be"),
    "fit: options": (lambda _: fit([], [], model="m", negative="all"), "did you mean 'negatives'"),
    "fit: value": (lambda _: fit([], [], model="m", negatives="most"), "negatives"),
    "choose": (lambda _: choose([], "vote", str.__eq__), "no candidates"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(model, name):
    call, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        call(model)


def test_sequences_of_other_types_are_read(model):
    """Tuples, and numpy's arrays of texts and flags, have the rewards of lists."""
    import numpy as np

    (expected,) = model.score([Q], [T], [False])
    assert model.score((Q,), np.array([T]), np.array([False]))[0].rewards == expected.rewards
    assert [index for index, _ in model.rerank(Q, (T, "3 + 4 = 8\n#### 8"))] in ([0, 1], [1, 0])


def test_every_exported_name_is_covered():
    """A new export gets cases here."""
    covered = {"AdversarialTrainer", "RewardModel", "RewardSettings", "TokenRewardModel", "TokenScores"}
    covered |= {"as_reward_func", "fit", "get_task", "load_demonstrations"}
    options = {"AdversarialConfig"}  # its values are checked as options of the command line
    results = {"Fitted"}  # made by `fit`
    assert {*tracereward.__all__} - {"__version__"} == covered | options | results
