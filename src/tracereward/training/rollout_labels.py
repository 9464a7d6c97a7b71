"""Labels of a policy's rollouts by a label rule, see `label_rules`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tracereward.data.candidates import prompt_key
from tracereward.errors import InputError
from tracereward.tasks.recipes import Task
from tracereward.training.label_rules import LabelRule, agreement, stated_answers

MANY_AGREE = 0.5
"""Share of agreeing traces from which ``expert/all`` labels more than half of the negatives wrongly, if agreeing means
right."""
ENOUGH_COMPARED = 20  # the standard error of such a share is then at most 0.11
MOST_COMPARED = 500  # with a rule that needs no answers: comparing, of mathematics above all, takes time


class RolloutLabels:
    """Labels of a policy's rollouts, by the answers that the demonstrations of their prompt state.

    Args:
        demonstrations: rows with ``prompt``, ``completion`` and ``answer``; rollouts refer to them by index.
        task: extracts and compares answers.
        positives: ``expert``, ``agreeing`` or ``mixed``: rollouts with the gold answer are positives, and `negatives`
            decides on the others.
        negatives: ``all`` or ``disagreeing``.

    Raises:
        InputError: the rule compares answers, and no demonstration states one.
    """

    def __init__(self, demonstrations: Sequence[Mapping[str, Any]], task: Task, positives: str, negatives: str):
        self.task: Task = task
        self.mixed: bool = positives == "mixed"
        self.rule: LabelRule = LabelRule("expert" if self.mixed else positives, negatives)  # type: ignore[arg-type]
        stated: dict[str, list[str]] = {}
        own = [stated_answers([row], task) for row in demonstrations]
        for row, answers in zip(demonstrations, own, strict=True):
            stated.setdefault(prompt_key(row["prompt"]), []).extend(answers)
        self.experts: list[list[str]] = [stated[prompt_key(row["prompt"])] for row in demonstrations]
        self.readable: int = sum(map(bool, own))
        self.agreed: int = 0
        self.compared: int = 0
        self.remarked: bool = False
        if self.rule.reads_answers and not self.readable:
            raise InputError(
                f"label rule {self.name} compares answers, but none of {len(own)} demonstrations states one that task "
                f"{task.name!r} reads: choose the task that does, or --positives expert --negatives all"
            )

    @property
    def name(self) -> str:
        """Such as ``agreeing/disagreeing``."""
        return f"mixed/{self.rule.negatives}" if self.mixed else self.rule.name

    def said(self) -> str:
        """The rule and how many demonstrations it can be applied to, as a sentence."""
        text = f"label rule {self.name}"
        if not self.rule.reads_answers:
            return text
        return f"{text}: answers can be read in {self.readable} of {len(self.experts)} demonstrations"

    def label(self, demonstration: int, answer: str | None, *, finished: bool, right: bool = False) -> bool | None:
        """The label of a rollout: True for a positive, False for a negative, None if it is left out.

        Args:
            demonstration: index of the demonstration whose prompt it answers.
            answer: the one it states, None if none can be read.
            finished: whether it ended by itself.
            right: whether it has the gold answer; only ``mixed`` uses it.
        """
        if not self.rule.reads_answers and self.compared >= MOST_COMPARED:
            return self.mixed and right
        agrees = agreement(answer, self.experts[demonstration], self.task, finished=finished)
        self.compared += agrees is not None
        self.agreed += agrees is True
        return True if self.mixed and right else self.rule.label(agrees)

    def remark(self) -> str | None:
        """A warning, once, if under ``expert/all`` many negatives have the experts' answer; else None."""
        many = self.compared >= ENOUGH_COMPARED and self.agreed >= MANY_AGREE * self.compared
        if self.remarked or self.name != "expert/all" or not many:
            return None
        self.remarked = True
        return (
            f"{self.agreed} of {self.compared} rollouts have the answer of their prompt's demonstration and are "
            "negatives all the same (label rule expert/all): the discriminator may learn style alone. "
            "--negatives disagreeing leaves them out, --positives agreeing adds them to the experts"
        )
