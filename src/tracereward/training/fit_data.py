"""The data of `tracereward fit`: questions with expert traces and labelled candidates, as token ids."""

from dataclasses import dataclass, field
from typing import Any

from tracereward.data.candidates import CandidateRow
from tracereward.selection import Candidate
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.label_rules import LabelRule
from tracereward.training.readout_training import LabelledTrace


@dataclass(frozen=True, kw_only=True)
class FitCandidate:
    """A candidate in the reward model's token ids.

    Attributes:
        row: as read.
        ids: token ids.
        label: True joins the experts, False is a negative, None is left out.
        correct: whether it is right, see `FitQuestion`; None if unknown.
        weight: in its class.
    """

    row: CandidateRow
    ids: list[int]
    label: bool | None
    correct: bool | None
    weight: float = 1.0

    def candidate(self, reward: float, log_prob: float | None) -> Candidate:
        """The candidate with its reward and log-prob, for choosing one of a question."""
        row = self.row
        return Candidate(
            text=row.completion,
            answer=row.answer,
            reward=reward,
            logprob=log_prob,
            length=len(row.completion),
            correct=self.correct,
            model=row.model,
            labelled=row.labelled,
        )


@dataclass(frozen=True, kw_only=True)
class FitQuestion:
    """A question with its traces.

    Attributes:
        where: location of its first row.
        text: the rendered prompt.
        prompt: its token ids.
        experts: its demonstrations; none for a question whose candidates are negatives alone.
        candidates: its other traces. One is correct by its own label or gold answer, else if it states the answer that
            a demonstration states.
    """

    where: str
    text: str
    prompt: list[int]
    experts: list[Expert] = field(default_factory=list)
    candidates: list[FitCandidate] = field(default_factory=list)

    @property
    def negatives(self) -> int:
        """Number of negatives."""
        return sum(candidate.label is False for candidate in self.candidates)


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What a run learns from and is measured on.

    Attributes:
        train: questions with a demonstration and a candidate.
        unpaired: questions to train on without a demonstration, whose candidates are negatives.
        held_out: questions as in `train`, which nothing is learned from or selected by.
        rule: that gave the labels.
        said: the sentence on the rule.
        leaks: figures of the probe for surface leaks, on the questions to train on.
    """

    train: list[FitQuestion]
    unpaired: list[FitQuestion] = field(default_factory=list)
    held_out: list[FitQuestion]
    rule: LabelRule
    said: str
    leaks: dict[str, Any] = field(default_factory=dict)

    @property
    def questions(self) -> list[FitQuestion]:
        """All of them."""
        return [*self.train, *self.unpaired, *self.held_out]

    @property
    def demonstrations(self) -> int:
        """Number of demonstrations."""
        return sum(len(question.experts) for question in self.questions)

    @property
    def experts(self) -> list[Expert]:
        """The demonstrations of all questions; one without a completion for a question that has none."""
        return [expert for question in self.questions for expert in _asked(question)]

    @property
    def held_out_experts(self) -> list[int]:
        """Indices of the demonstrations of held-out questions."""
        total = len(self.experts)
        return list(range(total - sum(len(question.experts) for question in self.held_out), total))

    @property
    def traces(self) -> list[LabelledTrace]:
        """The demonstrations and the labelled candidates of the questions to train on."""
        found = []
        for number, question in enumerate([*self.train, *self.unpaired]):
            labelled = [(expert.completion, True, expert.weight) for expert in question.experts]
            labelled += [(c.ids, c.label, c.weight) for c in question.candidates if c.label is not None]
            found += [
                LabelledTrace(prompt=question.prompt, completion=ids, label=label, question=number, weight=weight)
                for ids, label, weight in labelled
            ]
        return found

    def rollouts(self, perturbed: bool) -> list[Rollout]:
        """The labelled candidates, each for every demonstration of its question.

        Args:
            perturbed: whether perturbed experts are negatives too, so that a question needs no other.
        """
        found, first = [], 0
        for question in self.questions:
            places = range(first, first + len(_asked(question)))
            first = places.stop
            if question.negatives or perturbed:
                found += [
                    Rollout(index, candidate.ids, candidate.label, candidate.weight)
                    for index in places
                    for candidate in question.candidates
                    if candidate.label is not None
                ]
        return found


def _asked(question: FitQuestion) -> list[Expert]:
    """The demonstrations of a question, or its prompt alone."""
    return question.experts or [Expert(question.prompt, [])]
