"""Page sections and figure of the transfer study, from its results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from studies.pages.markdown import difference, mean, percent, points, table
from studies.results_file import Result
from studies.setup.backbones import LABELS, OWN_TOKENIZER

RESTORED = 0.9
"""Share of the own reward's gain that counts as restored."""
MEASURES = ("auroc", "auroc_logprob", "majority", "logprob", "shortest", "oracle", "gain", "unknown")
"""Measurements of `measures.transfer.run` that the page shows."""
_LEGEND = (
    "Rows: backbone of the reward model. Columns: backbone of the SFT policy that wrote the samples. Gain: choosing "
    "one of 8 samples by reward + log-prob, minus the better of majority vote and log-prob, in points. The log-prob is "
    "that of the policy."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME-matrix.png`` next to `path`."""
    figure = path.with_name(f"{path.stem}-matrix.png")
    rows = frame_of(results)
    as_is = rows[rows["demonstrations"] == 0]
    # Rewards on other backbones' policies, joined with AUROC and gain of the policy's own reward.
    own = as_is[as_is["reward"] == as_is["policy"]].set_index(["policy", "seed"])[["auroc", "gain"]].add_suffix("_own")
    others = rows[rows["reward"] != rows["policy"]].join(own, on=["policy", "seed"], how="inner")
    heat_maps(figure, as_is)
    return [
        "### Every reward on every policy",
        f"![Within-prompt AUROC and gain of each reward on each policy]({figure.name})",
        _LEGEND,
        _matrix(as_is, "within-prompt AUROC of the reward of", "auroc", lambda values: mean(values, 3)),
        _matrix(as_is, "gain by the reward of", "gain", points),
        _policies(as_is),
        _words(as_is),
        _degradation(others[others["demonstrations"] == 0]),
        "### Adapted with few demonstrations",
        f"Gain by number of demonstrations. Restored: the smallest number whose mean gain is at least {RESTORED:.0%} "
        "of that of the policy's own reward, which was trained on all demonstrations. With three seeds the intervals "
        "are wide: a mean above that line is weak evidence.",
        _adaptation(others),
    ]


def frame_of(results: Sequence[Result]) -> pd.DataFrame:
    """One row per reward, policy, number of demonstrations and seed; nan where undefined."""
    rows = [
        {
            "reward": result.get("backbone") or result["options"]["policies"][0],
            "policy": policy,
            "demonstrations": int(count),
            "seed": result["seed"],
            **{name: measured[name] for name in MEASURES if name in measured},
        }
        for result in results
        for policy, counts in result["transfer"].items()
        for count, measured in counts.items()
    ]
    frame = pd.DataFrame(rows, columns=["reward", "policy", "demonstrations", "seed", *MEASURES])
    frame = frame.astype(dict.fromkeys(("reward", "policy"), pd.CategoricalDtype(list(LABELS))))
    return frame.sort_values(["reward", "policy", "demonstrations", "seed"])


def _matrix(as_is: pd.DataFrame, what: str, name: str, text: Callable[[pd.Series], str]) -> str:
    """One measurement of each reward on each policy."""
    shown = as_is.groupby(["reward", "policy"], observed=True)[name].agg(text).unstack()
    return table("on samples of", shown.rename(index=lambda reward: f"{what} {LABELS[reward]}", columns=LABELS))


def _policies(as_is: pd.DataFrame) -> str:
    """Baselines of each policy, which do not depend on the reward."""
    cells = as_is[as_is["reward"] == as_is["reward"].iloc[0]].groupby("policy", observed=True)
    shown = {"within-prompt AUROC of log-prob": cells["auroc_logprob"].agg(mean, digits=3)}
    heads = {"majority": "majority", "logprob": "log-prob best-of", "shortest": "shortest", "oracle": "oracle"}
    shown |= {f"{head}, %": cells[name].agg(percent) for name, head in heads.items()}
    return table("the policy alone", pd.DataFrame(shown).rename(index=LABELS).T)


def _pair(others: pd.DataFrame) -> pd.Series:
    return "reward of " + others["reward"].map(LABELS).astype(str) + " on " + others["policy"].map(LABELS).astype(str)


def _degradation(others: pd.DataFrame) -> str:
    """Differences to the policy's own reward, paired by seed."""
    gaps = others.assign(
        pair=_pair(others),
        auroc=others["auroc"] - others["auroc_own"],
        gain=100 * (others["gain"] - others["gain_own"]),
    )
    apart = others["reward"].isin(OWN_TOKENIZER) | others["policy"].isin(OWN_TOKENIZER)
    means = {
        "mean over all pairs": gaps,
        "mean over pairs with one tokenizer": gaps[~apart],
        "mean over pairs with two tokenizers": gaps[apart],
    }
    means = [own.groupby("seed", as_index=False)[["auroc", "gain"]].mean().assign(pair=of) for of, own in means.items()]
    cells = pd.concat([gaps, *means]).groupby("pair", sort=False)
    shown = {
        "within-prompt AUROC": cells["auroc"].agg(difference, digits=3),
        "gain": cells["gain"].agg(difference),
    }
    return table("minus the policy's own reward, paired by seed", pd.DataFrame(shown))


def _words(as_is: pd.DataFrame) -> str:
    """How often a policy's own reward is the best, and the largest share of samples with unknown tokens."""
    means = as_is.groupby(["reward", "policy"], observed=True)[["auroc", "gain"]].mean().unstack()
    rewards = as_is["reward"].unique()
    own = [policy for policy in as_is["policy"].unique() if policy in rewards]
    best = {name: sum(means[name, policy].idxmax() == policy for policy in own) for name in ("auroc", "gain")}
    return (
        f"By the means, a policy's own reward is the best of {len(rewards)} for {best['auroc']} of {len(own)} policies "
        f"in AUROC and for {best['gain']} in gain. At most {as_is['unknown'].max():.1%} of a policy's samples have a "
        "number that a reward's tokenizer cannot encode."
    )


def restored(gains: Mapping[int, float], own: float) -> str:
    """The smallest number of demonstrations whose gain is at least `RESTORED` of `own`, as text."""
    if own <= 0:
        return "nothing to restore"
    return str(min((count for count, gain in gains.items() if gain >= RESTORED * own), default="none of these"))


def _adaptation(others: pd.DataFrame) -> str:
    """Gain of each reward by number of demonstrations, and the number that restores the own reward's gain."""
    wide = others.assign(pair=_pair(others)).pivot(
        index=["pair", "seed"], columns="demonstrations", values=["gain", "gain_own"]
    )
    gains = wide["gain"].assign(own=wide["gain_own"][0]).loc[_pair(others).unique()]
    pairs = gains.groupby("pair", sort=False)
    everywhere = gains.groupby("seed").mean().agg([points]).set_axis(["mean over all pairs"])
    shown = pd.concat([pairs.agg(points), everywhere])
    numbers = [restored(100 * row.drop("own"), 100 * row["own"]) for _, row in pairs.mean().iterrows()]
    shown["restored"] = [*numbers, f"{sum(map(str.isdigit, numbers))} of {len(numbers)} pairs"]
    return table("gain with demonstrations", shown.rename(columns={"own": "the policy's own reward"}))


def heat_maps(path: Path, as_is: pd.DataFrame) -> None:
    """Write a PNG of two reward-by-policy matrices: within-prompt AUROC and gain in points, means over seeds."""
    from matplotlib.figure import Figure

    means = as_is.groupby(["reward", "policy"], observed=True)[["auroc", "gain"]].mean().unstack()
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axis, (name, unit, form, title) in zip(
        figure.subplots(1, 2),
        (("auroc", 1, ".3f", "within-prompt AUROC of the reward"), ("gain", 100, "+.1f", "gain in reranking, points")),
        strict=True,
    ):
        grid = unit * means[name]
        image = axis.imshow(grid, cmap="YlGn", aspect="auto")
        middle = (np.min(grid) + np.max(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            colour = "white" if value > middle else "black"
            axis.text(column, row, format(value, form), ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(grid.columns)), [LABELS[of].replace(", ", ",\n") for of in grid.columns], fontsize=8)
        axis.set_yticks(range(len(grid.index)), [LABELS[of].replace(", ", ",\n") for of in grid.index], fontsize=8)
        axis.set_xlabel("policy", fontsize=8)
        axis.set_ylabel("reward", fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)
