"""Label rules: which candidates join the experts, which are negatives, and which are left out.

The only answer that is used is the one that a demonstration states itself, never a gold answer. A candidate *agrees* if
its stated answer equals that of a demonstration of its question, by the task's comparison, and *differs* if it equals
none, or if it states none because it was cut off. Otherwise this is unknown: it ended without an answer that can be
read, or no demonstration of its question states one.

| rule                 | agrees   | differs  | unknown  |
|----------------------|----------|----------|----------|
| expert/all           | negative | negative | negative |
| expert/disagreeing   | left out | negative | left out |
| agreeing/disagreeing | positive | negative | left out |
| agreeing/all         | positive | negative | negative |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tracereward.data.matching import Question, trace_text
from tracereward.errors import InputError, check_choice
from tracereward.rewards.choices import NEGATIVES, POSITIVES
from tracereward.tasks.recipes import Task

READABLE = 0.8
"""Share of demonstrations and of candidates whose answer must be readable for rules on answers to be the default.
Below, the left-out traces would be many, and of a kind: long ones, or those of one model."""


@dataclass(frozen=True)
class LabelRule:
    """Which candidates are positives and which are negatives, see the module's table.

    Attributes:
        positives: ``expert`` or ``agreeing``.
        negatives: ``all`` or ``disagreeing``.

    Raises:
        InputError: another value.
    """

    positives: Literal["expert", "agreeing"] = "expert"
    negatives: Literal["all", "disagreeing"] = "all"

    def __post_init__(self) -> None:
        check_choice("positives", self.positives, POSITIVES)
        check_choice("negatives", self.negatives, NEGATIVES)

    @property
    def name(self) -> str:
        """Such as ``agreeing/disagreeing``."""
        return f"{self.positives}/{self.negatives}"

    @property
    def reads_answers(self) -> bool:
        """Whether it compares answers."""
        return self.name != "expert/all"

    def label(self, agrees: bool | None) -> bool | None:
        """True for a positive, False for a negative, None for a trace that is left out.

        Args:
            agrees: whether the trace agrees with a demonstration; None if unknown.
        """
        if agrees:
            return True if self.positives == "agreeing" else False if self.negatives == "all" else None
        return False if self.negatives == "all" or agrees is False else None


@dataclass(frozen=True)
class Readable:
    """How many demonstrations and candidates state an answer that can be read, and how many there are."""

    demonstrations: int
    of_demonstrations: int
    candidates: int
    of_candidates: int

    @property
    def enough(self) -> bool:
        """Whether both shares are at least `READABLE`."""
        return (
            self.demonstrations >= READABLE * self.of_demonstrations
            and self.candidates >= READABLE * self.of_candidates
        )

    def __str__(self) -> str:
        return (
            f"answers can be read in {self.demonstrations} of {self.of_demonstrations} demonstrations and in "
            f"{self.candidates} of {self.of_candidates} candidates"
        )


def expert_answers(question: Question, task: Task) -> list[str]:
    """The answers that the demonstrations of a question state, see `stated_answers`."""
    return stated_answers(question.demonstrations, task)


def stated_answers(demonstrations: Sequence[Mapping[str, Any]], task: Task) -> list[str]:
    """The answers that demonstrations state; a row's ``answer`` where its completion states none that can be read."""
    stated = [task.extract(trace_text(row["completion"])) or row.get("answer") for row in demonstrations]
    return list(dict.fromkeys(str(answer) for answer in stated if answer is not None))


def agreement(answer: str | None, experts: Sequence[str], task: Task, *, finished: bool = True) -> bool | None:
    """Whether a trace agrees with the experts; None if unknown.

    Args:
        answer: the one it states, None if none can be read.
        experts: the answers that the demonstrations of its question state.
        task: compares them.
        finished: whether it ended by itself.
    """
    if not experts or (answer is None and finished):
        return None
    return answer is not None and any(task.equal(answer, expert) for expert in experts)


def labels_of(question: Question, rule: LabelRule, task: Task) -> list[bool | None]:
    """The label of each candidate of a question: True joins the experts, False is a negative, None is left out."""
    experts = expert_answers(question, task) if rule.reads_answers else []
    return [rule.label(agreement(row.answer, experts, task, finished=row.finished)) for row in question.candidates]


def readable(questions: Sequence[Question], task: Task) -> Readable:
    """Count the demonstrations and the candidates whose answer can be read."""
    demonstrations = [len(stated_answers([row], task)) for question in questions for row in question.demonstrations]
    candidates = [row.answer is not None for question in questions for row in question.candidates]
    return Readable(sum(demonstrations), len(demonstrations), sum(candidates), len(candidates))


def choose_rule(
    questions: Sequence[Question],
    task: Task,
    positives: str | None = None,
    negatives: str | None = None,
) -> tuple[LabelRule, str]:
    """The label rule, and a sentence that says which and why.

    A part that is not given is ``agreeing`` or ``disagreeing`` where answers can be read (`READABLE`), else ``expert``
    or ``all``.

    Args:
        questions: of `match`.
        task: extracts and compares answers.
        positives: ``expert``, ``agreeing`` or None.
        negatives: ``all``, ``disagreeing`` or None.

    Raises:
        InputError: another value, or a rule on answers where none can be read.
    """
    found = readable(questions, task)
    rule = LabelRule(
        positives or ("agreeing" if found.enough else "expert"),  # type: ignore[arg-type]
        negatives or ("disagreeing" if found.enough else "all"),  # type: ignore[arg-type]
    )
    if rule.reads_answers and not (found.demonstrations and found.candidates):
        raise InputError(
            f"label rule {rule.name} compares answers, but {found} (task {task.name!r}): choose the --task that reads "
            "them, or --positives expert --negatives all"
        )
    said = f"label rule {rule.name}: {found}"
    if rule.reads_answers and (at_odds := [one.where for one in questions if _at_odds(one, task)]):
        said += (
            f"; the demonstrations of {len(at_odds)} questions state different answers, the first at {at_odds[0]}: "
            "a candidate agrees if it has any of them"
        )
    if not rule.reads_answers:
        said += ", and every candidate counts as wrong"
    return rule, said


def _at_odds(question: Question, task: Task) -> bool:
    """Whether a question's demonstrations state answers that differ."""
    first, *others = expert_answers(question, task) or [""]
    return not all(task.equal(first, other) for other in others)


def remarks_on_labels(questions: Sequence[Question], labels: Sequence[Sequence[bool | None]], rule: str) -> list[str]:
    """How many candidates of which label, as sentences.

    Args:
        questions: of `match`.
        labels: `labels_of` each.
        rule: name of the one that gave them.

    Raises:
        InputError: no candidate is a negative, so that only one class is left.
    """
    flat = [label for found in labels for label in found]
    joined, negatives = flat.count(True), flat.count(False)
    out = len(flat) - joined - negatives
    counts = (
        f"label rule {rule}: of {len(flat)} candidates {joined} join the experts, {negatives} are negatives and "
        f"{out} are left out"
    )
    if not negatives:
        fix = "give candidates of which some disagree with the experts"
        raise InputError(f"{counts}: without negatives there is one class only; {fix}, or use --negatives all")
    remarks = [counts]
    same = [
        question.where
        for question, found in zip(questions, labels, strict=True)
        if question.candidates and False not in found
    ]
    if same:
        remarks.append(
            f"{len(same)} of {len(questions)} questions have candidates but no negative, the first at {same[0]}"
        )
    return remarks
