"""What `fit` learns from and measures, of hand-made questions: left-out and unjudged candidates have no part."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tracereward.data.candidates import CandidateRow
from tracereward.data.matching import Question
from tracereward.runs.fit_report import measure
from tracereward.tasks.recipes import get_task
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.fit_data import FitCandidate, FitData, FitQuestion
from tracereward.training.fit_options import FitOptions
from tracereward.training.fit_preparation import unpaired_questions
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


def test_questions_without_a_demonstration_give_negatives_alone():
    data = FitData(
        train=[question(10, candidate(1, False))],
        unpaired=[question(20, candidate(2, False), candidate(3, False), experts=0)],
        held_out=[question(30, candidate(4, False))],
        rule=LabelRule(),
        said="",
    )
    learned = [(trace.question, trace.completion, trace.label) for trace in data.traces]
    assert learned == [(0, [10], True), (0, [1], False), (1, [2], False), (1, [3], False)]
    assert data.demonstrations == 2
    assert data.experts == [Expert([10], [10], "trace"), Expert([20], []), Expert([30], [30], "trace")]
    assert data.rollouts(perturbed=False) == [Rollout(index, [n]) for index, n in ((0, 1), (1, 2), (1, 3), (2, 4))]
    assert data.held_out_experts == [2]


def asked(prompt: str, *names: str, demonstrations: int = 0) -> Question:
    rows = [replace(candidate(1, False).row, question=name) for name in names]
    return Question(where=prompt, prompt=prompt, demonstrations=[{}] * demonstrations, candidates=rows)


def test_which_questions_without_a_demonstration_are_used():
    """Never one that may be a held-out question in other words."""
    known = asked("What is 1 + 1?", "q1", demonstrations=1)
    other, same_words, same_id = (
        asked("What is 2 + 2?", "q2"),
        asked("what is  1 + 1?\n", "q3"),
        asked("Add.", "q4", "q1"),
    )
    questions = [known, other, same_words, same_id, asked("No candidate")]

    def used(rule="expert/all", **options):
        return unpaired_questions(questions, FitOptions(**options), LabelRule(*rule.split("/")))

    found, said = used(objective="bce")
    assert found == [other]
    assert said.startswith("1 of 4 candidates")
    assert "2 of these questions are left out" in said
    assert used(objective="nnpu", readout=False)[0] == [other]
    for options, why in (
        ({"rule": "agreeing/all", "objective": "bce"}, "label rule agreeing/all"),
        ({}, "--objective pairwise"),
        ({"objective": "bce", "balance": "question"}, "--balance question"),
    ):
        found, said = used(**options)
        assert found == []
        assert "4 candidates" in said
        assert why in said
    assert unpaired_questions([known], FitOptions(), LabelRule()) == ([], "")


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
