"""The page of the study of planted errors, Markdown, from its results alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from studies.pages.markdown import mean, points, table

Row = Mapping[str, Any]
DATA = {
    "gsm8k": "GSM8K, training questions with their own solutions; a step is a line",
    "mmlu_pro": "MMLU-Pro, test questions with right traces of a language model; a step is a sentence",
    "medmcqa": "MedMCQA, development questions with explanations of 30 words or more; a step is a sentence",
}
KINDS = {"operator": "operator", "number": "number", "swap_steps": "swapped steps", "answer": "wrong option"}
BASELINES = ("logprob", "lowest_logprob")
INTRO = """\
Does `tracereward audit` find wrong demonstrations? In real traces, 5 or 10 % of the demonstrations are replaced by
copies with one error: an operator, a number, two steps that change places, or, where there are options, another one as
the answer (each kind with equal chance, if it applies). Nothing says which. The audit learns from the demonstrations
alone, wrong ones included: it makes wrong copies of each, reads both with the frozen model, and fits a linear head on
the states of the experts' steps and of the changed ones, cross-fitted by question. Gold answers are removed.

*Precision* is the share of planted errors among the demonstrations that come first, as many as are planted: what an
expert finds who looks at that many. *Lift* is precision over chance, the planted share. *Checks first*: what the checks
of the text find comes first (equations that do not hold, answers that cannot be read), then the order. The baseline is
the frozen model's log-prob, of the trace or of its lowest step. Mean over seeds with 95 % t intervals; the difference
is paired, to the better of the two baselines in each draw, and bold where its interval excludes 0.

The planted errors are of kinds that the audit's own wrong copies have too, so that these figures are an upper limit for
errors of other kinds."""


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write `path`.

    Args:
        path: ``audit.md``.
        rows: of `studies.audit`.
    """
    parts = ["# Planted errors in real demonstrations", INTRO]
    for key in dict.fromkeys((row["data"], row["model"]) for row in rows):
        parts += _section([row for row in rows if (row["data"], row["model"]) == key])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _section(rows: Sequence[Row]) -> list[str]:
    """One data set and model."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    parts = [
        f"## {first['data']}",
        f"{DATA.get(first['data'], first['data'])}; {first['demonstrations']} demonstrations, {seeds} seeds, "
        f"{first['model']}.",
    ]
    for rate in sorted({row["rate"] for row in rows}):
        here = [row for row in rows if row["rate"] == rate]
        parts += [_orders(here, rate), _checks(here)]
    return [*parts, _kinds([row for row in rows if row["rate"] == max(r["rate"] for r in rows)])]


def _orders(rows: Sequence[Row], rate: float) -> str:
    lines = {}
    for order in rows[0]["orders"]:
        precision = pd.Series([row["orders"][order]["precision"] for row in rows])
        best = pd.Series([max(row["orders"][name]["precision"] for name in BASELINES) for row in rows])
        lines[_label(order)] = {
            "precision %": mean(100 * precision),
            "lift": f"{(precision / pd.Series([row['planted'] / row['demonstrations'] for row in rows])).mean():.1f}",
            "minus log-prob's": "" if order in BASELINES else points(precision - best),
            "AUROC": mean(100 * pd.Series([row["orders"][order]["auroc"] for row in rows])),
        }
    return table(f"{100 * rate:g} % planted ({rows[0]['planted']})", pd.DataFrame(lines).T)


def _checks(rows: Sequence[Row]) -> str:
    flagged, right = sum(row["flagged"] for row in rows), sum(row["flagged_planted"] for row in rows)
    planted = sum(row["planted"] for row in rows)
    return (
        f"The checks of the text flag {flagged} demonstrations in {len(rows)} draws, {right} of them planted (of "
        f"{planted}). Cross-validated AUROC of experts' steps against changed ones: "
        f"{mean(100 * pd.Series([row['cross_validated_auroc'] for row in rows]))} %."
    )


def _kinds(rows: Sequence[Row]) -> str:
    """Shares of each kind of error that are among the first, over the seeds."""
    lines = {}
    for order in rows[0]["orders"]:
        found: dict[str, str] = {}
        for kind, name in KINDS.items():
            counts = [row["orders"][order]["kinds"].get(kind, [0, 0]) for row in rows]
            total = sum(count for _, count in counts)
            if total:
                found[name] = f"{sum(hits for hits, _ in counts)}/{total}"
        lines[_label(order)] = found
    return table("found, by kind of error", pd.DataFrame(lines).T)


def _label(order: str) -> str:
    """The name of an order as code, with what is added to it."""
    name, comma, rest = order.partition(",")
    return f"`{name}`{comma}{rest}"
