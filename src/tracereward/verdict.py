"""The verdict: whether a reward chooses better than the baselines that cost nothing, in one line."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from scipy import stats

from tracereward.metrics import auroc, length_matched_auroc, within_prompt_auroc
from tracereward.selection import METHODS, Candidate, methods_for, outcomes

if TYPE_CHECKING:
    from pandas import DataFrame

BASELINES = ("majority", "logprob", "logprob_vote", "shortest", "model")
"""Methods of `selection.METHODS` that need no reward model."""
RELEVANT = 0.03
"""Difference of accuracies. A reward is no better if a gain of this size is excluded; an interval that neither
excludes it nor 0 does not decide."""
OUTCOMES = ("better", "worse", "no better", "unclear")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method's accuracy minus a baseline's on the same questions, with its 95 % interval."""

    baseline: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A method against all baselines.

    Attributes:
        method: name in `selection.METHODS`.
        questions: number of questions.
        outcome: ``better`` than every baseline, ``worse`` than one, ``no better`` than one (a gain of `RELEVANT` over
            it is excluded), or ``unclear``.
        comparisons: one for each baseline whose inputs are present.
        aurocs: of the reward, and of the log-prob if it is known: within the prompt, within prompt and model, and among
            traces of similar length; nan if undefined.
        about: which questions and candidates it is on, as a phrase; empty if that is clear from where it is shown.
    """

    method: str
    questions: int
    outcome: str
    comparisons: tuple[Comparison, ...]
    aurocs: dict[str, dict[str, float]]
    about: str = ""

    @property
    def decisive(self) -> Comparison:
        """The comparison that the outcome rests on: the one with the lowest lower bound."""
        return min(self.comparisons, key=lambda one: one.low)

    @property
    def line(self) -> str:
        """The verdict in one line."""
        one = self.decisive
        name = method_name(one.baseline)
        points = f"{_points(one.difference)} points, {_points(one.low)} to {_points(one.high)}"
        asked = f"{self.questions} question{'s' * (self.questions != 1)}"
        if self.outcome == "better":
            return f"worth using for reranking: better than {name} ({points}; {asked})"
        if self.outcome == "unclear":
            needed = questions_needed(one, self.questions)
            return f"cannot say: {asked}; about {needed} would do ({points} against {name})"
        return f"{self.outcome} than {name} ({points}; {asked})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers may be nan."""
        return {"line": self.line, **asdict(self), "needed": questions_needed(self.decisive, self.questions)}

    def to_pandas(self) -> "DataFrame":
        """A row for each baseline: baseline, difference (of accuracies), low, high."""
        from pandas import DataFrame

        rows = [(method_name(one.baseline), one.difference, one.low, one.high) for one in self.comparisons]
        return DataFrame(rows, columns=["baseline", "difference", "low", "high"])

    def _repr_html_(self) -> str:
        """The line, and a table of the comparisons in points, for notebooks."""
        row = Markup("<tr><td>{}</td><td>{}</td><td>{} to {}</td></tr>")
        rows = Markup("").join(
            row.format(method_name(one.baseline), *map(_points, (one.difference, one.low, one.high)))
            for one in self.comparisons
        )
        head = Markup("<tr><th>{} minus</th><th>points</th><th>95 % interval</th></tr>").format(
            method_name(self.method)
        )
        table = Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(head, rows)
        return str(Markup("<p><strong>{}</strong></p>{}").format(self.line, table))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Verdict":
        """The verdict of a `to_dict` in which nan may be None.

        Raises:
            ValueError: a field is missing, or is not what `to_dict` gives.
        """
        try:
            found = cls(
                method=str(stored["method"]),
                questions=int(stored["questions"]),
                outcome=str(stored["outcome"]),
                comparisons=tuple(Comparison(**one) for one in stored["comparisons"]),
                aurocs={
                    str(name): {str(kind): math.nan if value is None else float(value) for kind, value in kinds.items()}
                    for name, kinds in stored["aurocs"].items()
                },
                about=str(stored.get("about", "")),
            )
            numbers = [value for one in found.comparisons for value in (one.difference, one.low, one.high)]
            known = {found.method, *(one.baseline for one in found.comparisons)} <= METHODS.keys()
            if not (known and numbers and found.outcome in OUTCOMES and all(map(math.isfinite, numbers))):
                raise ValueError("its values are not those of a verdict")
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return found


def verdict(
    questions: Sequence[Sequence[Candidate]],
    equal: Callable[[str, str], bool],
    method: str = "vote",
    *,
    about: str = "",
) -> Verdict | None:
    """Compare a method that uses the reward with the baselines, question by question.

    Args:
        questions: the candidates of held-out questions; their correctness is known.
        equal: whether two answers are the same.
        method: name in `selection.METHODS`.
        about: see `Verdict`.

    Returns:
        None if no question has two candidates: then there is nothing to choose.
    """
    if all(len(candidates) < 2 for candidates in questions):
        return None
    mine = outcomes(questions, method, equal)
    present = methods_for(questions)
    comparisons = tuple(compared(name, mine, outcomes(questions, name, equal)) for name in BASELINES if name in present)
    lowest = min(comparisons, key=lambda one: one.low)
    if lowest.low > 0:
        outcome = "better"
    elif any(one.high < 0 for one in comparisons):
        outcome = "worse"
    else:
        outcome = "no better" if lowest.high < RELEVANT else "unclear"
    return Verdict(
        method=method,
        questions=len(questions),
        outcome=outcome,
        comparisons=comparisons,
        aurocs=_aurocs(questions),
        about=about,
    )


def method_name(method: str) -> str:
    """The name of a method in `selection.METHODS` without the number of candidates."""
    return METHODS[method].replace("@{n}", "").replace(" best-of-{n}", "")


def compared(baseline: str, mine: Sequence[float], other: Sequence[float]) -> Comparison:
    """The difference of two accuracies on the same n questions, with Agresti and Min's (2005) Wald+2 interval.

    With b questions that only the first gets right and c that only the second gets right, the interval is
    (b - c) / (n + 2) +- z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2). Unlike a bootstrap it is not empty where
    the two agree on every one of a few questions.

    Args:
        baseline: name of the second.
        mine: 1 or 0 for each question.
        other: likewise.
    """
    gaps = np.asarray(mine) - np.asarray(other)
    n = len(gaps)
    gain, changed = float(gaps.sum()), float(np.abs(gaps).sum())
    half = float(stats.norm.ppf(0.975)) * math.sqrt(changed + 1 - gain**2 / (n + 2)) / (n + 2)
    centre = gain / (n + 2)
    return Comparison(baseline=baseline, difference=gain / n, low=centre - half, high=centre + half)


def questions_needed(one: Comparison, questions: int) -> int:
    """About how many questions decide: those at which the interval is as narrow as the difference, or `RELEVANT`.

    Its half-width shrinks with the square root of their number.
    """
    half = (one.high - one.low) / 2
    wanted = questions * (half / max(one.difference, RELEVANT)) ** 2
    digits = 10 ** max(0, math.floor(math.log10(wanted)) - 1) if wanted >= 1 else 1  # two digits: it is an estimate
    return max(questions, math.ceil(wanted / digits) * digits)


def _aurocs(questions: Sequence[Sequence[Candidate]]) -> dict[str, dict[str, float]]:
    flat = [(index, c) for index, candidates in enumerate(questions) for c in candidates]
    correct = [bool(c.correct) for _, c in flat]
    scores = {"reward": [c.reward for _, c in flat]}
    log_probs = [c.logprob for _, c in flat if c.logprob is not None]
    if len(log_probs) == len(flat):
        scores["logprob"] = log_probs
    return {
        name: {
            "pooled": auroc(values, correct),
            "within_prompt": within_prompt_auroc(values, correct, [index for index, _ in flat]),
            "within_prompt_and_model": within_prompt_auroc(values, correct, [(index, c.model) for index, c in flat]),
            "length_matched": length_matched_auroc(values, correct, [c.length for _, c in flat]),
        }
        for name, values in scores.items()
    }


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
