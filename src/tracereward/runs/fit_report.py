"""What `tracereward fit` measures on the held-out questions: the verdict, the calibration and the report's traces."""

from collections.abc import Sequence
from dataclasses import dataclass

from tracereward.errors import InputError
from tracereward.reports.report import ScoredTrace
from tracereward.rewards.abstention import Abstention, fit_abstention
from tracereward.rewards.calibration import Calibration, fit_calibration
from tracereward.rewards.model import TokenRewardModel
from tracereward.tasks.recipes import Task
from tracereward.training.fit_data import FitQuestion
from tracereward.verdict import Verdict, verdict


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on the held-out questions.

    Attributes:
        verdict: None if it cannot be given.
        calibration: None if it cannot be fitted.
        abstention: for abstaining; empty if no question is judged.
        missing: why there is no verdict or no calibration.
        traces: all candidates with their token rewards.
    """

    verdict: Verdict | None
    calibration: Calibration | None
    abstention: tuple[Abstention, ...]
    missing: list[str]
    traces: list[ScoredTrace]

    def rewards(self, correct: bool) -> list[float]:
        """Trace rewards of the right or of the wrong candidates, for the histogram."""
        return [trace.scores.aggregate() for trace in self.traces if trace.correct is correct]


def measure(
    model: TokenRewardModel,
    questions: Sequence[FitQuestion],
    log_probs: Sequence[Sequence[float | None]],
    task: Task,
) -> Measured:
    """Score the candidates of held-out questions.

    Args:
        model: the reward model.
        questions: held out.
        log_probs: mean log-prob of each candidate by question.
        task: compares answers.

    Raises:
        RunFailed: a reward is not finite.
    """
    pairs = [(question, candidate) for question in questions for candidate in question.candidates]
    scores = model.score_ids([q.prompt for q, _ in pairs], [c.ids for _, c in pairs]) if pairs else []
    traces = [
        ScoredTrace(
            question.text,
            candidate.row.completion,
            found,
            correct=candidate.correct,
            answer=candidate.row.answer,
        )
        for (question, candidate), found in zip(pairs, scores, strict=True)
    ]
    how, at, judged = model.settings.aggregate, 0, []
    for question, own in zip(questions, log_probs, strict=True):
        rewards = [trace.scores.aggregate(how) for trace in traces[at : at + len(own)]]
        at += len(own)
        judged.append(
            [
                candidate.candidate(reward, value)
                for candidate, reward, value in zip(question.candidates, rewards, own, strict=True)
            ]
        )
    known = [candidates for candidates in judged if all(c.correct is not None for c in candidates)]
    missing = []
    unknown = len(judged) - len(known)
    if unknown:
        missing.append(
            f"{unknown} of {len(judged)} held-out questions are not judged: neither correct nor a gold answer is "
            "given, and no demonstration of them states an answer that can be read."
        )
    about = f"held-out questions; candidates are right or wrong {_judged(questions)}"
    found = verdict(known, task.equal, about=about) if known else None
    if found is None and not unknown:
        why = "no held-out question has two candidates" if questions else "no question was held out"
        missing.append(f"none: {why}.")
    flat = [c for candidates in known for c in candidates]
    calibration = None
    try:
        calibration = fit_calibration([c.reward for c in flat], [bool(c.correct) for c in flat])
    except InputError as error:
        missing += [f"No calibration: {error}."] if flat else []
    return Measured(
        verdict=found,
        calibration=calibration,
        abstention=fit_abstention(known, task.equal) if known else (),
        missing=missing,
        traces=traces,
    )


def _judged(questions: Sequence[FitQuestion]) -> str:
    """How it is known which candidates are right, as a phrase."""
    candidates = [candidate for question in questions for candidate in question.candidates]
    known = [candidate for candidate in candidates if candidate.correct is not None]
    if not known:
        return ""
    labelled = sum(candidate.row.labelled for candidate in known)
    agreeing = sum(candidate.row.correct is None for candidate in known)
    counts = {
        "by the rows' own label": labelled,
        "by the gold answer": len(known) - labelled - agreeing,
        "by agreement with the answer that the demonstration states": agreeing,
    }
    return ", ".join(f"{how} ({n})" for how, n in counts.items() if n)
