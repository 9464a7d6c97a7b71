"""Thinking and answer of a completion: where they are cut, whose answer counts, and what each weighs."""

import numpy as np
import pytest
import torch

from tracereward.errors import InputError
from tracereward.rewards.parts import token_shares
from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.supervision import part_weights
from tracereward.rewards.token_scores import TokenScores
from tracereward.tasks.recipes import get_task
from tracereward.thinking import ANY, Thinking

HARMONY = "<|channel|>analysis<|message|>1 + 2 is \\boxed{4}?<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("thinking", "completion", "answer"),
    [
        (ANY, "\\boxed{3}", "3"),
        (ANY, "<think>\\boxed{4}</think>\n\\boxed{3}", "3"),
        (ANY, "<think>\\boxed{4}</think>\nSo be it.", None),  # the box of the thinking does not count
        (ANY, "<think>\\boxed{4}", None),  # not closed
        (ANY, "I wonder. \\boxed{4}</think>\\boxed{3}", "3"),  # opened in the prompt
        (ANY, "[THINK]\\boxed{4}[/THINK]\\boxed{3}", "3"),
        (ANY, f"{HARMONY}\\boxed{{3}}", "3"),
        (ANY, HARMONY.partition("<|end|>")[0], None),
        (ANY, "<think>a</think><think>\\boxed{4}", None),
        (Thinking(opened=True), "\\boxed{4}", None),
        (Thinking(opened=True), "x</think>\\boxed{3}", "3"),
        (Thinking(marks=(("<a>", "</a>"),)), "<a>\\boxed{4}</a>\\boxed{3}", "3"),
        (Thinking(marks=(("<a>", "</a>"),)), "<think>\\boxed{4}", "4"),  # ordinary text
    ],
)
def test_only_the_answer_states_one(thinking, completion, answer):
    task = get_task("math").behind(thinking)
    assert task.extract(completion) == answer
    assert task.verify(completion, "3") is (answer == "3")
    assert task.verify(completion, "4") is (answer == "4")


@pytest.mark.parametrize(
    ("prompt", "completion", "asked", "message"),
    [
        ("q", "<think>a", "q", "row 3: completion: the thinking is not closed: write </think> before the answer"),
        ("q<think>\n", "a", "q", "row 3: completion: the thinking is not closed"),
        ("q", "<think>a</think>b<think>c</think>d", "q", "row 3: completion: 2 times thinking"),
        ("q", "a</think>b", "q", "row 3: completion: </think> closes thinking that <think> does not open"),
        ("<think>a</think> q", "b", "<think>a</think> q", "row 3: prompt: it has thinking"),
        ("q", "<think>a</think>b", "q", None),
        ("q<think>\n", "a</think>b", "q", None),
        ("q<think>\n\n</think>\n\n", "b", "q", None),
    ],
)
def test_thinking_of_demonstrations_is_checked(prompt, completion, asked, message):
    if message is None:
        ANY.check("row 3", prompt, completion, asked)
        return
    with pytest.raises(InputError, match=message):
        ANY.check("row 3", prompt, completion, asked)


def test_weights_and_shares_by_hand():
    """Five tokens, two of them thinking, and padding; step ends at 1 and 3."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    thinking = torch.tensor([[True, True, False, False, False, False]])
    ends = torch.tensor([[False, True, False, True, False, False]])
    for granularity, supervised in (("dense", [0, 1, 2, 3, 4]), ("step", [1, 3, 4]), ("sparse", [1, 4])):
        settings = RewardSettings(granularity=granularity, thinking_weight=0.25, head="token")
        shares = token_shares(settings, mask, ends, thinking)[0].numpy()
        before, tokens = -1, np.zeros(6)
        for place in supervised:  # tokens whose backfilled reward is that of `place`
            tokens[place], before = place - before, place
        expected = np.concatenate([0.25 * tokens[:2] / 2, 0.75 * tokens[2:] / 3])
        np.testing.assert_allclose(shares, expected, rtol=1e-6)
    flags = torch.zeros(1, 6, dtype=torch.bool)
    flags[0, [1, 3, 4]] = True
    assert part_weights(flags, thinking, 0.25)[0].tolist() == [0, 0.25, 0, 0.375, 0.375, 0]
    assert part_weights(flags, thinking, 0.0)[0].tolist() == [0, 0, 0, 0.5, 0.5, 0]
    assert part_weights(flags, thinking & False, 1.0)[0].tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3, 0])


def test_trace_reward_is_the_weighted_mean_of_the_parts():
    def scores(thinking: int, weight: float | None) -> TokenScores:
        return TokenScores(list("abcd"), [], [1.0, 3.0, -1.0, -3.0], [True] * 4, [False] * 4, thinking, weight)

    assert scores(2, None).aggregate() == 0.0
    assert scores(3, None).parts() == {"thinking": 1.0, "answer": -3.0}
    assert scores(0, 0.5).parts() == {}
    assert scores(3, 0.25).aggregate() == 0.25 * 1.0 + 0.75 * -3.0
    assert scores(3, 0.25).aggregate("min") == 0.25 * -1.0 + 0.75 * -3.0
    assert scores(3, 0.0).aggregate() == -3.0
    assert scores(4, 0.0).aggregate() == 0.0  # the only part that it has
