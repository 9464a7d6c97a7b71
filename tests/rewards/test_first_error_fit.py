"""The rule fitted on right traces and their perturbed copies, up to the marks of scored rows."""

import dataclasses
import json
import re

import pytest
import torch

from tracereward.commands.score import score_rows
from tracereward.errors import InputError
from tracereward.rewards.first_error_fit import JudgedTrace, fit_first_error, step_of
from tracereward.rewards.first_error_rules import FirstErrorRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, read_settings, write_fitted
from tracereward.rewards.token_scores import TokenScores
from tracereward.synthetic.arithmetic import generate


class Checks(TokenRewardModel):
    """Reward -3 for the tokens of a line that is no true equation or does not go on from the line before, else 1."""

    def compute_rewards(self, prompts, completions, options):
        found = []
        for ids in completions:
            lines, rewards, last = self.tokenizer.decode(ids, skip_special_tokens=True).split("\n"), [], None
            for line in lines:
                match = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line)
                fits = line.startswith("####") or (
                    match is not None
                    and eval(f"{match[1]}{match[2]}{match[3]}") == int(match[4])
                    and last in (None, match[1])
                )
                last = None if match is None else match[4]
                rewards.append(1.0 if fits else -3.0)
            line, values = 0, torch.zeros(len(ids))
            for place, token in enumerate(ids):
                values[place] = rewards[line]
                line += token == self.tokenizer.get_vocab()["\n"]
            found.append(values)
        return found


@pytest.fixture
def model(tiny_model_folder, tokenizer):
    made = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(head="token"), tokenizer)
    return Checks(made.backbone, tokenizer, made.settings)


def test_rule_is_fitted_stored_and_marks_wrong_lines(model, tiny_model_folder, tokenizer, tmp_path):
    """Changed results, operands and operators are lines that this reward rejects, and most dropped or swapped ones."""
    experts = generate("exposure", 90, seed=1)
    traces = [JudgedTrace(prompt=row["prompt"], completion=row["completion"], right=True) for row in experts]
    rule = fit_first_error(model, [*traces, *traces])
    assert rule.traces == 90, "one for each question"
    assert rule.hit_rate > 0.8
    with pytest.raises(InputError, match="59 right traces, one for each question, and 60 are needed"):
        fit_first_error(model, [*traces[:59], *traces[:59]])

    TokenRewardModel.from_backbone(str(tiny_model_folder), model.settings, tokenizer).save_pretrained(tmp_path / "rm")
    assert read_settings(tmp_path / "rm").first_error is None
    write_fitted(tmp_path / "rm", first_error=rule)
    stored = read_settings(tmp_path / "rm")
    assert stored.first_error == rule
    path = tmp_path / "rm" / "tracereward.json"
    old = json.loads(path.read_text())
    for damaged, message in (
        ({"threshold": 0, "rate": 1}, "damaged"),
        ({"threshold": "low"}, "threshold of the first error must be a number, not 'low'"),
        (5, "damaged"),
        ({}, "damaged"),
    ):
        path.write_text(json.dumps({**old, "first_error": damaged}))
        with pytest.raises(InputError, match=message):
            read_settings(tmp_path / "rm")
    for earlier in ({}, {"first_error": {"signal": "end_low", "threshold": -1.0, "traces": 300}}):
        path.write_text(json.dumps({name: value for name, value in old.items() if name != "first_error"} | earlier))
        assert read_settings(tmp_path / "rm").first_error is None, "a file of an earlier version"

    prompt = "9 + 4 - 3 = ?\n"
    texts = ["9 + 4 = 13\n13 - 3 = 10\n#### 10", "9 + 4 = 13\n13 - 3 = 11\n#### 11", "9 + 4 = 14\n14 - 3 = 11\n#### 11"]
    row = {"prompt": prompt, "candidates": texts}
    marked = Checks(model.backbone, tokenizer, stored)
    [scored] = score_rows(marked, [("a row", row)])
    assert [found["suspected_error"] for found in scored["scores"]] == [None, 1, 0]
    steps = ["9 + 4 = 13", "13 - 3 = 11", "#### 11"]
    assert marked.first_error(prompt, steps) == 1
    [scored] = score_rows(marked, [("a row", {"prompt": prompt, "steps": steps})])
    assert scored["suspected_error"] == 1
    [scored] = score_rows(model, [("a row", row)])
    assert all("suspected_error" not in found for found in scored["scores"]), "no rule, no mark"


def test_step_of_a_character():
    offsets = [(0, 2), (2, 3), (3, 5), (5, 6), (6, 6)]
    scores = TokenScores(
        ["ab", "\n", "cd", "e", "</s>"], offsets, [0.0] * 5, [True] * 5, [False, True, False, False, True]
    )
    assert [step_of(scores, character) for character in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_rule_in_a_sentence():
    rule = FirstErrorRule(threshold=-2.346, traces=80, hit_rate=0.625)
    text = (
        "Suspected first error: in traces with 8 tokens in a row whose mean reward is below -2.35, the step whose last "
        "token's reward falls furthest below those of the steps before"
    )
    assert rule.line == f"{text}; it finds 62 % of inserted errors."
    assert dataclasses.replace(rule, marked_wrong=0.5).line == f"{text}; it marks 50 % of wrong traces."
    assert dataclasses.replace(rule, hit_rate=None).line == f"{text}."


def test_steps_given_as_spans_are_those_of_the_lines():
    """A step's tokens go up to the next step: the line's end is the last token of each, the end of sequence too."""
    offsets = [(0, 2), (2, 3), (3, 5), (5, 6), (6, 6)]
    ends = [False, True, False, False, True]
    scores = TokenScores(["ab", "\n", "cd", "e", "</s>"], offsets, [1.0, 2.0, 4.0, 8.0, 16.0], [True] * 5, ends)
    assert scores.by_step() == scores.by_step([(0, 2), (3, 6)]) == [[1.0, 2.0], [4.0, 8.0, 16.0]]
    assert scores.ends_of() == scores.ends_of([(0, 2), (3, 6)]) == ends
    assert scores.ends_of([(0, 6)]) == [False, False, False, False, True], "one step of two lines"
    assert scores.ends_of([(0, 2), (3, 4), (4, 6)]) == ends, "a token of two steps"
    assert scores.ends_of([(0, 3), (3, 5), (5, 6)]) == [False, True, True, False, True]
    assert scores.by_step([(0, 6)]) == [[1.0, 2.0, 4.0, 8.0, 16.0]]
    assert scores.by_step([(0, 2), (3, 4), (4, 6)]) == [[1.0, 2.0], [4.0], [4.0, 8.0, 16.0]], "a token of two steps"
    assert scores.step_rewards([(0, 2), (3, 6)]) == [1.0, 6.0], "means without what lies between steps"
