"""Page sections and figure of the calibration study, from its results."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from studies.pages.markdown import difference, mean, table
from studies.results_file import Result

FIRST = "as trained"
FIXED: dict[str, tuple[str, int]] = {
    "parameters": ("parameters", 0),
    "digits_per_token": ("digits per token", 2),
    "accuracy": ("right samples, %", 1),
}
"""Columns that tuning does not change: heading and decimals."""
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
"""Measurements of `measures.calibration.judge`: heading and decimals."""
TARGETS = ("ece", "ece_platt", "auroc", "auroc_within_prompt")
PREDICTORS = {
    "share of right samples": "accuracy",
    "mean probability minus share of right samples": "over",
    "separation": "separation",
    "effective rank": "effective_rank",
    "probe: AUROC": "probe_auroc",
    "probe: within-prompt AUROC": "probe_auroc_within_prompt",
    "digits per token": "digits_per_token",
}
ORDERS = 10_000
_LEGEND = (
    "ECE: expected calibration error over ten bins. Separation: mean reward of right traces minus that of wrong ones, "
    "in pooled standard deviations. Effective rank: exp of the entropy of the normalised singular values of the "
    "reward model's last hidden states at supervised tokens. Probe: logistic regression on a trace's mean last "
    "hidden state. Between backbones: share of the sum of squares over all cells, and p of the F test, which treats "
    "cells of one seed as independent."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME-reliability.png`` next to `path`."""
    judged = frame_of(results)
    trained = judged[judged["state"] == FIRST]
    figure = path.with_name(f"{path.stem}-reliability.png")
    reliability_figure(figure, trained)
    correlations = [_correlations(own, state) for state, own in judged.groupby("state", sort=False)]
    return [
        f"![Reliability, and calibration against accuracy and effective rank]({figure.name})",
        "### As trained",
        _LEGEND,
        _backbones(trained),
        _levels(trained),
        "### After tuning on labelled traces",
        _tuned_words(trained),
        _tuned(judged),
        "### What correlates with calibration and ranking",
        _correlation_words(trained),
        *chain(*correlations),
    ]


def frame_of(results: Sequence[Result]) -> pd.DataFrame:
    """One row per cell and state of its reward model: `FIXED`, `MEASURES` (nan where undefined) and bins."""
    rows = [
        {"arm": result["arm"], "cell": cell, "state": state, **result["calibration"], **measured}
        for cell, result in enumerate(results)
        for state, measured in result["calibration"]["states"].items()
    ]
    columns = ["arm", "cell", "state", *FIXED, "labelled", "labelled_right", *MEASURES, "bins"]
    frame = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(MEASURES, float))
    return frame.assign(over=frame["mean_probability"] - frame["accuracy"])


def between(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Between-group share of the sum of squares, and p of the one-way F test; nan if all values are equal."""
    everything = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    total = ((everything - everything.mean()) ** 2).sum()
    inside = sum(((np.asarray(group) - np.mean(group)) ** 2).sum() for group in groups)
    if total == 0 or np.isnan(total) or len(everything) == len(groups):
        return float("nan"), float("nan")
    return float(1 - inside / total), float(stats.f_oneway(*groups).pvalue) if inside else 0.0


def _backbones(trained: pd.DataFrame) -> str:
    """One row per backbone, and the variation between them."""
    cells = trained.assign(accuracy=100 * trained["accuracy"]).groupby("arm", sort=False)
    shown = pd.DataFrame(
        {head: cells[name].agg(mean, digits=digits) for name, (head, digits) in {**FIXED, **MEASURES}.items()}
    )
    shown["parameters"] = cells["parameters"].first().map("{:.0f}".format)
    last = {}
    for name in ("accuracy", *MEASURES):
        share, p = between([own.tolist() for _, own in cells[name]])
        last[{**FIXED, **MEASURES}[name][0]] = None if math.isnan(share) else f"{share:.0%} (p {p:.2g})"
    return table("backbone", pd.concat([shown, pd.DataFrame(last, index=["between backbones"])]))


def _levels(trained: pd.DataFrame) -> str:
    """Predicted probabilities against the policies' accuracy."""
    said, right = trained["mean_probability"], trained["accuracy"]
    return (
        f"Over the {len(trained)} cells the mean probability is {said.min():.2f} to {said.max():.2f}, the share of "
        f"right samples {right.min():.2f} to {right.max():.2f}; in {(said < right).sum()} cells the share exceeds the "
        "mean probability."
    )


def _tuned_words(trained: pd.DataFrame) -> str:
    right = trained["labelled_right"]
    return (
        f"Tuned on {trained['labelled'].iloc[0]} labelled traces, {right.min()} to {right.max()} of them right. The "
        f"last rows are paired differences to the same cell as trained, over all {len(trained)} cells. Tuning the head "
        "alone does not change hidden states."
    )


def _tuned(judged: pd.DataFrame) -> str:
    """One row per backbone and state, and paired differences over all cells."""
    states = judged.groupby("state", sort=False)
    first = states.get_group(FIRST).set_index("cell")
    changes = {
        f"{state} minus {FIRST}": own.set_index("cell")[list(MEASURES)] - first[list(MEASURES)]
        for state, own in states
        if state != FIRST
    }
    labelled = judged.assign(row=judged["arm"] + ": " + judged["state"]).groupby("row", sort=False)
    shown = pd.DataFrame({head: labelled[name].agg(mean, digits=digits) for name, (head, digits) in MEASURES.items()})
    for row, change in changes.items():
        shown.loc[row] = [difference(change[name], digits) for name, (_, digits) in MEASURES.items()]
    return table("reward model", shown)


def spearman(x: Sequence[float], y: Sequence[float], groups: Sequence[int] = ()) -> tuple[float, float]:
    """Spearman's rho and its two-sided permutation p; nan if `x` or `y` is constant or has an undefined value.

    Args:
        x: n values.
        y: n values.
        groups: sizes of consecutive groups to permute within; by default one group.
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
    """All permutations within consecutive groups, or the identity and 9,999 random ones, (k, n)."""
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


def centred(values: pd.Series, groups: pd.Series) -> pd.Series:
    """Values minus the mean of their group."""
    # Rounded, so that values that are constant within groups are exactly 0 and tied.
    return (values - values.groupby(groups).transform("mean")).round(12)


def holm(ps: Sequence[float], level: float = 0.05) -> list[bool]:
    """Whether each p-value is significant after Holm's correction; nan never is."""
    order = sorted((p, index) for index, p in enumerate(ps) if not np.isnan(p))
    kept = [False] * len(ps)
    for rank, (p, index) in enumerate(order):
        if p > level / (len(order) - rank):
            break
        kept[index] = True
    return kept


def _correlation_words(trained: pd.DataFrame) -> str:
    """Legend of the correlation tables."""
    backbones = trained["arm"].nunique()
    return (
        f"n = {len(trained)} cells: {backbones} backbones with {len(trained) // backbones} seeds each. p by "
        "permutation; cells of one backbone are not independent, so p over all cells is too small. Within backbones: "
        "each backbone's mean is subtracted, and values are permuted among its seeds. Mean probability and separation "
        "are computed from the same rewards as the targets, so they describe but do not explain. Digits per token take "
        "only two values, one per tokenizer."
    )


def _correlations(judged: pd.DataFrame, state: str) -> list[str]:
    """A summary sentence and the table of rho over all cells and within backbones."""
    arms = judged["arm"]
    sizes = judged.groupby("arm", sort=False).size().tolist()
    rows = []
    for predictor, name in PREDICTORS.items():
        for target in TARGETS:
            x, y = judged[name], judged[target]
            rho, p = spearman(x.tolist(), y.tolist())
            within = spearman(centred(x, arms).tolist(), centred(y, arms).tolist(), sizes)
            rows.append((predictor, MEASURES[target][0], rho, p, _rho(*within)))
    pairs = pd.DataFrame(rows, columns=["predictor", "target", "rho", "p", "within"])
    pairs["kept"] = holm(pairs["p"].tolist())
    pairs["all"] = [f"**{_rho(row.rho, row.p)}**" if row.kept else _rho(row.rho, row.p) for row in pairs.itertuples()]
    wide = pairs.pivot(index="predictor", columns="target", values=["all", "within"]).loc[list(PREDICTORS)]
    heads = [MEASURES[target][0] for target in TARGETS]
    shown = pd.concat([wide["all"][heads], wide["within"][heads].add_suffix(", within backbones")], axis=1)
    survivors = pairs.loc[pairs["kept"], "predictor"] + " with " + pairs.loc[pairs["kept"], "target"]
    tested = pairs["p"].dropna()
    words = (
        f"{state.capitalize()}: of {len(tested)} pairs {(tested < 0.05).sum()} have p under .05, where "
        f"{0.05 * len(tested):.1f} are expected by chance. Significant after Holm's correction (bold): "
        f"{'; '.join(survivors) or 'none'}."
    )
    return [words, table(f"Spearman's rho (p), {state}", shown)]


def _rho(rho: float, p: float) -> str:
    return "" if math.isnan(rho) else f"{rho:+.2f} ({p:.2g})"


def reliability_figure(path: Path, trained: pd.DataFrame) -> None:
    """Write a PNG of reward models as trained: reliability of each backbone, seeds pooled; ECE of each cell against
    the share of right samples and against the effective rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    looks = zip(("#0b6e4f", "#c0571d", "#3b5b92", "#7a7a7a", "#8a5a9e"), "os^Dv", strict=True)
    for (arm, own), (colour, marker) in zip(trained.groupby("arm", sort=False), looks, strict=False):
        look = {"color": colour, "marker": marker, "markersize": 5, "label": arm}
        left.plot(*pooled(own["bins"]), linewidth=1.2, **look)
        middle.plot(100 * own["accuracy"], own["ece"], linestyle="", **look)
        right.plot(own["effective_rank"], own["ece"], linestyle="", **look)
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


def pooled(bins: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Mean probability and accuracy of each bin of width 0.1, with the traces of several cells pooled."""
    rows = pd.DataFrame(chain(*bins), columns=["probability", "accuracy", "traces"])
    rows["bin"] = (rows["probability"] * 10).astype(int).clip(upper=9)
    sums = rows[["probability", "accuracy"]].mul(rows["traces"], axis=0).groupby(rows["bin"]).sum()
    traces = rows.groupby("bin")["traces"].sum()
    return sums["probability"] / traces, sums["accuracy"] / traces
