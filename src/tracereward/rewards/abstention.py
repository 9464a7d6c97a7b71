"""Abstention: a question is not answered if the chosen candidate's reward is too low, at a level with a guarantee.

Split conformal prediction (Vovk et al. 2005) on n calibration questions: the score of question i is the reward of its
chosen candidate where that is wrong, and minus infinity where it is right. The threshold at risk a is the k-th smallest
score, k = ceil((n + 1) (1 - a)), and a question is answered if the reward is above it. If the calibration questions and
a new one are exchangeable, the probability over all of them that the new one is answered *and* wrong is at most a:

    P(answered and wrong) <= a.

Equivalently, with probability 1 - a or more it is answered rightly or not at all. The guarantee is marginal: it holds
for the same reward model, candidates per question, sampler and method of choosing, on average over calibration sets;
not for each question, nor among the answered ones only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracereward.errors import InputError
from tracereward.selection import Candidate, choose

METHODS = ("vote", "reward")
"""Methods of choosing that have a record."""


@dataclass(frozen=True)
class Abstention:
    """What `threshold` needs of the calibration questions, for one method of choosing; stored in ``tracereward.json``.

    Attributes:
        method: that chose the candidates, such as ``vote``.
        questions: n, the number of calibration questions.
        wrong: rewards of the chosen candidates that are wrong, in increasing order.
    """

    method: str
    questions: int
    wrong: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "wrong", tuple(sorted(map(float, self.wrong))))  # JSON has lists
        if not 0 <= len(self.wrong) <= self.questions:
            raise InputError(f"{len(self.wrong)} wrong answers to {self.questions} questions")

    @property
    def lowest_risk(self) -> float:
        """The lowest risk at which anything is answered: 1 / (n + 1)."""
        return 1 / (self.questions + 1)

    def threshold(self, risk: float) -> float:
        """The reward above which a question is answered; minus infinity if all are.

        Args:
            risk: bound on the probability of an answer that is wrong, between 0 and 1.

        Raises:
            InputError: the risk is out of bounds, or too low for so few questions.
        """
        if not 0 < risk < 1:
            raise InputError(f"the risk must be above 0 and below 1, not {risk}")
        place = math.ceil((self.questions + 1) * (1 - risk) - 1e-9)  # rounding must not make it one higher
        if place > self.questions:
            raise InputError(
                f"a risk of {risk:g} needs {math.ceil(1 / risk - 1e-9) - 1} calibration questions or more, and there "
                f"are {self.questions}: the lowest is {self.lowest_risk:.3g}"
            )
        right = self.questions - len(self.wrong)
        return -math.inf if place <= right else self.wrong[place - right - 1]


def fit_abstention(
    questions: Sequence[Sequence[Candidate]], equal: Callable[[str, str], bool]
) -> tuple[Abstention, ...]:
    """The record of each of `METHODS` on calibration questions.

    Args:
        questions: with candidates that are known to be right or wrong.
        equal: whether two answers are the same.
    """
    found = []
    for method in METHODS:
        chosen = [candidates[choose(candidates, method, equal)] for candidates in questions]
        wrong = tuple(candidate.reward for candidate in chosen if not candidate.correct)
        found.append(Abstention(method=method, questions=len(chosen), wrong=wrong))
    return tuple(found)


def threshold_of(records: Sequence[Abstention], method: str, risk: float) -> float:
    """The `Abstention.threshold` of the record of a method.

    Raises:
        InputError: there is none, or the risk is too low for it.
    """
    record = next((one for one in records if one.method == method), None)
    if record is None:
        known = ", ".join(one.method for one in records)
        why = f"it has records of {known}: choose one of them" if known else "it has none: run `tracereward calibrate`"
        raise InputError(f"abstaining with method {method} needs its record in the reward model: {why}")
    return record.threshold(risk)


def why_abstained(probability: float | None, reward: float, threshold: float, least: float | None) -> str:
    """The sentence on a question that is not answered.

    Args:
        probability: calibrated, that the chosen candidate is right; None without a calibration.
        reward: of the chosen candidate.
        threshold: that it does not exceed.
        least: the probability at the threshold.
    """
    if probability is None or least is None:
        return f"no candidate is trusted: reward {reward:.3f} is not above {threshold:.3f}"
    return f"no candidate is trusted: p = {probability:.3f} is not above {least:.3f}"
