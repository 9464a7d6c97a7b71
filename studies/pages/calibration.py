"""Sections and figure of the study of calibration, from its cells' JSON."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain, groupby, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from studies.pages.markdown import cell, signed, table
from tracereward.metrics import mean_interval

Result = dict[str, Any]
FIRST = "as trained"
MEASURES: dict[str, tuple[str, int]] = {
    "auroc": ("AUROC", 3),
    "auroc_within_prompt": ("within-prompt AUROC", 3),
    "ece": ("ECE", 3),
    "ece_platt": ("ECE, Platt", 3),
    "brier": ("Brier", 3),
    "brier_platt": ("Brier, Platt", 3),
    "mean_probability": ("mean probability", 3),
    "separation": ("separation", 2),
    "effective_rank": ("effective rank", 1),
    "probe_accuracy": ("probe: accuracy", 3),
    "probe_auroc": ("probe: AUROC", 3),
    "probe_auroc_within_prompt": ("probe: within-prompt AUROC", 3),
}
"""What `calibration.judge` gives, as columns, and decimals."""
TARGETS = ("ece", "ece_platt", "auroc", "auroc_within_prompt")
PREDICTORS: dict[str, Callable[[Result, str], float]] = {
    "share of right samples": lambda result, _: result["calibration"]["accuracy"],
    "mean probability minus share of right samples": lambda result, state: (
        of(result, state)["mean_probability"] - result["calibration"]["accuracy"]
    ),
    "separation": lambda result, state: of(result, state)["separation"],
    "effective rank": lambda result, state: of(result, state)["effective_rank"],
    "probe: AUROC": lambda result, state: of(result, state)["probe_auroc"],
    "probe: within-prompt AUROC": lambda result, state: of(result, state)["probe_auroc_within_prompt"],
    "digits per token": lambda result, _: result["calibration"]["digits_per_token"],
}
ORDERS = 10_000
_LEGEND = (
    "ECE: expected calibration error over ten bins. Separation: mean reward of right traces minus that of wrong ones, "
    "in pooled standard deviations. Effective rank: exp of the entropy of the normalised singular values of the "
    "reward model's last hidden states at supervised tokens. Probe: logistic regression on a trace's mean last "
    "hidden state. Between backbones: their share of the sum of squares over all cells, and p of the F test, in which "
    "cells of one seed count as independent."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME-reliability.png`` beside `path`."""
    figure = path.with_name(f"{path.stem}-reliability.png")
    reliability_figure(figure, results)
    return [
        f"![Reliability, and calibration against accuracy and effective rank]({figure.name})",
        "### As trained",
        _LEGEND,
        _backbones(results),
        _levels(results),
        "### After tuning on labelled traces",
        _tuned_words(results),
        _tuned(results),
        "### What goes with calibration and ranking",
        _correlation_words(results),
        *(part for state in states_of(results) for part in _correlations(results, state)),
    ]


def of(result: Result, state: str) -> dict[str, Any]:
    """What was measured of one state of the reward model; nan for what is undefined."""
    return dict.fromkeys(MEASURES, math.nan) | result["calibration"]["states"][state]


def states_of(results: Sequence[Result]) -> list[str]:
    """Names of the states."""
    return list(results[0]["calibration"]["states"])


def _by_backbone(results: Sequence[Result]) -> dict[str, list[Result]]:
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result["arm"], []).append(result)
    return rows


def _mean(values: Sequence[float], digits: int) -> str:
    return cell(mean_interval(values), digits)


def between(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Share of the sum of squares that lies between groups, and p of the one-way F test; nan where all are alike."""
    everything = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    total = ((everything - everything.mean()) ** 2).sum()
    inside = sum(((np.asarray(group) - np.mean(group)) ** 2).sum() for group in groups)
    if total == 0 or np.isnan(total) or len(everything) == len(groups):
        return float("nan"), float("nan")
    return float(1 - inside / total), float(stats.f_oneway(*groups).pvalue) if inside else 0.0


def _backbones(results: Sequence[Result]) -> str:
    """One row a backbone, and what lies between them."""
    fixed: dict[str, tuple[Callable[[Result], float], int]] = {
        "parameters": (lambda result: result["calibration"]["parameters"], 0),
        "digits per token": (lambda result: result["calibration"]["digits_per_token"], 2),
        "right samples, %": (lambda result: 100 * result["calibration"]["accuracy"], 1),
    }
    columns = fixed | {
        head: (lambda result, name=name: of(result, FIRST)[name], digits) for name, (head, digits) in MEASURES.items()
    }
    backbones = _by_backbone(results)
    rows = [
        [
            arm,
            *(
                f"{value(own[0]):.0f}" if head == "parameters" else _mean([value(result) for result in own], digits)
                for head, (value, digits) in columns.items()
            ),
        ]
        for arm, own in backbones.items()
    ]
    last = ["between backbones"]
    for head, (value, _) in columns.items():
        share, p = between([[value(result) for result in own] for own in backbones.values()])
        last.append("" if head in ("parameters", "digits per token") or np.isnan(share) else f"{share:.0%} (p {p:.2g})")
    return table(["backbone", *columns], [*rows, last])


def _levels(results: Sequence[Result]) -> str:
    """How far probabilities follow the policies' accuracy."""
    said = [of(result, FIRST)["mean_probability"] for result in results]
    right = [result["calibration"]["accuracy"] for result in results]
    under = sum(p < share for p, share in zip(said, right, strict=True))
    return (
        f"Over the {len(results)} cells the mean probability is {min(said):.2f} to {max(said):.2f}, the share of right "
        f"samples {min(right):.2f} to {max(right):.2f}; in {under} cells it is above the mean probability."
    )


def _tuned_words(results: Sequence[Result]) -> str:
    right = [result["calibration"]["labelled_right"] for result in results]
    labelled = results[0]["calibration"]["labelled"]
    return (
        f"On {labelled} labelled traces, {min(right)} to {max(right)} of them right. The last rows: differences to the "
        f"same cell as trained, over all {len(results)} cells. Tuning the head alone leaves the hidden states as they "
        "were."
    )


def _tuned(results: Sequence[Result]) -> str:
    """Every backbone and state, and paired differences over all cells."""
    states = states_of(results)
    rows = []
    for arm, own in _by_backbone(results).items():
        for state in states:
            values = (_mean([of(r, state)[name] for r in own], digits) for name, (_, digits) in MEASURES.items())
            rows.append([f"{arm}: {state}", *values])
    for state in states[1:]:
        changes = [
            signed(mean_interval([of(r, state)[name] - of(r, FIRST)[name] for r in results]), digits)
            for name, (_, digits) in MEASURES.items()
        ]
        rows.append([f"{state} minus {FIRST}", *changes])
    return table(["reward model", *(head for head, _ in MEASURES.values())], rows)


def spearman(x: Sequence[float], y: Sequence[float], groups: Sequence[int] = ()) -> tuple[float, float]:
    """Spearman's rho and its two-sided p by permutations; nan if either is constant or has an undefined value.

    Args:
        x: n values.
        y: n values.
        groups: sizes of groups of neighbours that values stay within when they are permuted; one of all by default.
    """
    if any(np.ptp(values) == 0 or np.isnan(values).any() for values in (x, y)):
        return float("nan"), float("nan")
    a, b = (_standard_ranks(values) for values in (x, y))
    shuffled = a[orders(tuple(groups) or (len(a),))] @ b / len(a)
    rho = float(a @ b / len(a))
    return rho, float(np.mean(np.abs(shuffled) >= abs(rho) - 1e-9))


def _standard_ranks(values: Sequence[float]) -> np.ndarray:
    ranks = np.asarray(stats.rankdata(values))
    return (ranks - ranks.mean()) / ranks.std()


@lru_cache
def orders(sizes: tuple[int, ...]) -> np.ndarray:
    """All orders of groups of neighbours, each within itself, or 10,000 with the first in its place, (k, n)."""
    starts = np.cumsum([0, *sizes[:-1]])
    if math.prod(map(math.factorial, sizes)) <= ORDERS:
        parts = (permutations(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))
        return np.array([list(chain(*order)) for order in product(*parts)])
    rng = np.random.default_rng(0)
    drawn = [
        start + rng.permuted(np.tile(np.arange(size), (ORDERS - 1, 1)), axis=1)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return np.concatenate([np.arange(sum(sizes))[None], np.concatenate(drawn, axis=1)])


def centred(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Values minus the mean of their group."""
    means = {group: np.mean([v for v, g in zip(values, groups, strict=True) if g == group]) for group in set(groups)}
    # Rounded, so that what is constant within groups is exactly 0 and has no ranks.
    return [round(float(v - means[g]), 12) for v, g in zip(values, groups, strict=True)]


def holm(ps: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which p-values survive Holm's correction for their number; nan never does."""
    order = sorted((p, index) for index, p in enumerate(ps) if not np.isnan(p))
    kept = [False] * len(ps)
    for rank, (p, index) in enumerate(order):
        if p > level / (len(order) - rank):
            break
        kept[index] = True
    return kept


def _correlation_words(results: Sequence[Result]) -> str:
    """How to read the tables."""
    backbones = _by_backbone(results)
    return (
        f"n = {len(results)} cells, of {len(backbones)} backbones with {len(results) // len(backbones)} seeds each. p "
        "by permutation; cells of one backbone are not independent, so p over all cells is too small. Within "
        "backbones: each backbone's mean is taken off first, and values are permuted among its seeds. Mean probability "
        "and separation are computed from the same rewards as what they are compared with: they say how, not why. "
        "Digits per token differ between two tokenizers alone."
    )


def _correlations(results: Sequence[Result], state: str) -> list[str]:
    """A table of rho, with all cells and within backbones, and what it says."""
    groups = [result["arm"] for result in results]
    sizes = [len(list(neighbours)) for _, neighbours in groupby(groups)]
    names: list[tuple[str, str]] = []
    whole: list[tuple[float, float]] = []
    inside: list[tuple[float, float]] = []
    for predictor, value in PREDICTORS.items():
        x = [value(result, state) for result in results]
        for target in TARGETS:
            y = [of(result, state)[target] for result in results]
            names.append((predictor, target))
            whole.append(spearman(x, y))
            inside.append(spearman(centred(x, groups), centred(y, groups), sizes))
    kept = holm([p for _, p in whole])
    cells = {name: _rho(one, bold) for name, one, bold in zip(names, whole, kept, strict=True)}
    within = {name: _rho(one, False) for name, one in zip(names, inside, strict=True)}
    heads = [f"Spearman's rho (p), {state}", *(MEASURES[target][0] for target in TARGETS)]
    heads += [f"{MEASURES[target][0]}, within backbones" for target in TARGETS]
    rows = [
        [predictor, *(found[predictor, target] for found in (cells, within) for target in TARGETS)]
        for predictor in PREDICTORS
    ]
    tested = [p for _, p in whole if not np.isnan(p)]
    low = sum(p < 0.05 for p in tested)
    survivors = [
        f"{predictor} with {MEASURES[target][0]}" for (predictor, target), one in zip(names, kept, strict=True) if one
    ]
    words = (
        f"{state.capitalize()}: of {len(tested)} pairs {low} have p under .05, where chance alone gives "
        f"{0.05 * len(tested):.1f}. Holm's correction leaves (bold): {'; '.join(survivors) or 'none'}."
    )
    return [words, table(heads, rows)]


def _rho(found: tuple[float, float], bold: bool) -> str:
    rho, p = found
    if np.isnan(rho):
        return ""
    text = f"{rho:+.2f} ({p:.2g})"
    return f"**{text}**" if bold else text


def reliability_figure(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG: accuracy against probability of each backbone as trained, its seeds pooled; ECE of each cell against
    the share of right samples and against the effective rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    looks = zip(("#0b6e4f", "#c0571d", "#3b5b92", "#7a7a7a", "#8a5a9e"), "os^Dv", strict=True)
    for (arm, own), (colour, marker) in zip(_by_backbone(results).items(), looks, strict=False):
        look = {"color": colour, "marker": marker, "markersize": 5, "label": arm}
        left.plot(*pooled(of(result, FIRST)["bins"] for result in own), linewidth=1.2, **look)
        ece = [of(result, FIRST)["ece"] for result in own]
        middle.plot([100 * result["calibration"]["accuracy"] for result in own], ece, linestyle="", **look)
        right.plot([of(result, FIRST)["effective_rank"] for result in own], ece, linestyle="", **look)
    left.set(xlabel="sigmoid of the reward", ylabel="share of right traces", xlim=(0, 1), ylim=(0, 1))
    middle.set(xlabel="right samples of the policy, %", ylabel="ECE")
    right.set(xlabel="effective rank of hidden states", ylabel="ECE")
    left.legend(fontsize=7, frameon=False)
    for axis in (left, middle, right):
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def pooled(bins: Any) -> tuple[list[float], list[float]]:
    """Mean probability and accuracy of each bin of width 0.1, the traces of several cells taken together."""
    sums: dict[int, np.ndarray] = {}
    for probability, accuracy, count in (row for rows in bins for row in rows):
        place = min(int(probability * 10), 9)
        sums[place] = sums.get(place, np.zeros(3)) + np.array([probability * count, accuracy * count, count])
    points = [(float(p / n), float(a / n)) for _, (p, a, n) in sorted(sums.items())]
    return [p for p, _ in points], [a for _, a in points]
