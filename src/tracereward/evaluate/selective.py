"""Answering only where a score is high: risk over coverage, and abstaining at a guaranteed risk."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracereward.errors import InputError
from tracereward.metrics import risk_coverage, risk_coverage_area
from tracereward.reports.tables import Table
from tracereward.rewards.abstention import fit_abstention
from tracereward.selection import METHODS, Candidate, choose

RISKS = (0.05, 0.1, 0.2)
"""At which abstaining is tried."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Coverages in the table."""
_POINTS = 200  # of a curve, at most
_RESAMPLES = 500

Questions = Sequence[Sequence[Candidate]]
Equal = Callable[[str, str], bool]


def confidences(questions: Questions, equal: Equal) -> dict[str, tuple[list[float], list[bool]]]:
    """By method of choosing: the confidence in the chosen candidate of each question, and whether it is right.

    That of ``reward`` and ``vote`` is the chosen candidate's reward, of ``logprob`` its log-prob, and of ``majority``
    the share of the question's candidates that state its answer.
    """
    flat = [c for candidates in questions for c in candidates]
    methods = ["reward", "vote", "majority", *([] if any(c.logprob is None for c in flat) else ["logprob"])]
    found = {}
    for method in methods:
        scores, correct = [], []
        for candidates in questions:
            best = candidates[choose(candidates, method, equal)]
            if method == "majority":
                same = [c for c in candidates if c.answer is not None and best.answer is not None]
                scores.append(sum(equal(str(c.answer), str(best.answer)) for c in same) / len(candidates))
            else:
                scores.append(float(best.logprob or 0.0) if method == "logprob" else best.reward)
            correct.append(bool(best.correct))
        found[method] = scores, correct
    return found


def evaluate_selective(questions: Questions, fit_questions: Questions, equal: Equal, seed: int = 0) -> dict[str, Any]:
    """Risk over coverage of each method, and what abstaining does at each of `RISKS`; ready for JSON.

    Args:
        questions: to evaluate.
        fit_questions: others, which the thresholds for abstaining are from.
        equal: whether two answers are the same.
        seed: of the bootstrap.
    """
    n = max(map(len, questions))
    curves, known = {}, confidences(questions, equal)
    for method, (scores, correct) in known.items():
        points = risk_coverage(scores, correct)
        kept = sorted({round(place) for place in np.linspace(0, len(points) - 1, min(_POINTS, len(points)))})
        low, high = _area_interval(scores, correct, seed)
        curves[method] = {
            "label": METHODS[method].format(n=n),
            "area": risk_coverage_area(scores, correct),
            "low": low,
            "high": high,
            "risks": [points[max(0, round(share * len(points)) - 1)][1] for share in SHARES],
            "points": [points[place] for place in kept],
        }
    return {"curves": curves, "abstaining": _abstaining(known, fit_questions, equal)}


def _area_interval(scores: Sequence[float], correct: Sequence[bool], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the area, over questions."""
    rng, values, labels = np.random.default_rng(seed), np.asarray(scores), np.asarray(correct)
    areas = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(len(values), size=len(values))
        areas.append(risk_coverage_area(values[chosen].tolist(), labels[chosen].tolist()))
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)


def _abstaining(
    known: dict[str, tuple[list[float], list[bool]]], fit_questions: Questions, equal: Equal
) -> list[dict[str, Any]]:
    """For each method with a record and each risk that its questions allow: shares of the evaluated questions."""
    rows = []
    for record in fit_abstention(fit_questions, equal):
        scores, correct = (np.asarray(values) for values in known[record.method])
        for risk in RISKS:
            try:
                threshold = record.threshold(risk)
            except InputError:
                continue
            answered = scores > threshold
            rows.append(
                {
                    "method": record.method,
                    "risk": risk,
                    "answered": float(answered.mean()),
                    "answered_wrongly": float((answered & ~correct).mean()),
                    "right_if_answered": float(correct[answered].mean()) if answered.any() else None,
                }
            )
    return rows


def selective_tables(result: dict[str, Any]) -> list[Table]:
    """The result as tables."""
    curves = [
        [row["label"], *(100 * row[name] for name in ("area", "low", "high")), *(100 * risk for risk in row["risks"])]
        for row in result["curves"].values()
    ]
    columns = ["method", "area %", "95 % low", "95 % high", *(f"wrong % of {100 * share:g} %" for share in SHARES)]
    about = (
        "Area under risk over coverage: the mean share of wrong answers among the k most trusted, over all k; lower is "
        "better. Trusted by the chosen trace's reward or log-prob, or by the share of votes."
    )
    tables = [Table("Answering only the most trusted questions", columns, curves, about)]
    if result["abstaining"]:
        names = ("risk", "answered", "answered_wrongly", "right_if_answered")
        rows = [
            [row["method"], *(None if row[name] is None else 100 * row[name] for name in names)]
            for row in result["abstaining"]
        ]
        tables.append(
            Table(
                "Abstaining, with thresholds from other questions",
                ["method", "risk %", "answered %", "answered wrongly %", "right % of answered"],
                rows,
                "Over many draws of calibration questions the share answered wrongly is at most the risk on average.",
            )
        )
    return tables
