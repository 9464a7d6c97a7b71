"""What `fit` learns from and measures, of hand-made questions: left-out and unjudged candidates have no part."""

from types import SimpleNamespace

import pytest

from tracereward.data.candidates import CandidateRow
from tracereward.runs.fit_report import measure
from tracereward.tasks.recipes import get_task
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.fit_data import FitCandidate, FitData, FitQuestion
from tracereward.training.label_rules import LabelRule

TASK = get_task("gsm8k")


def candidate(number: int, label: bool | None, correct: bool | None = True) -> FitCandidate:
    row = CandidateRow(
        where=f"c{number}", question="q", prompt="p", completion=f"#### {number}", answer=str(number), correct=correct,
        labelled=True, model="m", logprob=-0.1, finished=True,
    )  # fmt: skip
    return FitCandidate(row=row, ids=[number], label=label, correct=correct)


def question(first: int, *candidates: FitCandidate, experts: int = 1) -> FitQuestion:
    found = [Expert([first], [first + n], "trace") for n in range(experts)]
    return FitQuestion(where="q", text="p", prompt=[first], experts=found, candidates=list(candidates))


def test_left_out_candidates_are_in_no_loss():
    data = FitData(
        train=[
            question(10, candidate(1, True), candidate(2, False), candidate(3, None), experts=2),
            question(20, candidate(4, True), candidate(5, None)),  # no negative
        ],
        held_out=[question(30, candidate(6, False), candidate(7, None))],
        rule=LabelRule("agreeing", "disagreeing"),
        said="",
    )
    learned = [(trace.question, trace.completion, trace.label) for trace in data.traces]
    experts = [(0, [10], True), (0, [11], True), (1, [20], True)]
    assert sorted(learned) == sorted([*experts, (0, [1], True), (0, [2], False), (1, [4], True)])
    both = [Rollout(index, [number], label) for index in (0, 1) for number, label in ((1, True), (2, False))]
    assert data.rollouts(perturbed=False) == [*both, Rollout(3, [6], False)]
    assert data.rollouts(perturbed=True) == [*both, Rollout(2, [4], True), Rollout(3, [6], False)]
    assert data.held_out_experts == [3]


class Scores(SimpleNamespace):
    """Token rewards whose aggregate is their only value."""

    def aggregate(self, how: str = "mean") -> float:
        return self.value


def test_questions_that_are_not_judged_in_full_have_no_part_in_the_verdict():
    """With the unjudged candidate, the reward would choose wrong in the second question."""
    model = SimpleNamespace(
        settings=SimpleNamespace(aggregate="mean"),
        score_ids=lambda prompts, completions: [Scores(value=float(ids[0])) for ids in completions],
    )
    judged = question(10, candidate(2, True, True), candidate(1, False, False))
    partly = question(20, candidate(3, True, True), candidate(4, None, None))
    found = measure(model, [judged, partly], [[-0.1, -0.2], [-0.3, -0.4]], TASK)
    assert found.verdict is not None
    assert found.verdict.questions == 1
    assert found.verdict.aurocs["reward"]["within_prompt"] == pytest.approx(1)
    assert any("1 of 2 held-out questions are not judged" in one for one in found.missing)
    assert [trace.correct for trace in found.traces] == [True, False, True, None]
