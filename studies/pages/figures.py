"""Figures: accuracies of arms (one panel per world, one dot per seed, a bar at the mean), and curves over depth or
share of demonstrations."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from tracereward.metrics import mean_interval

COLOURS = ("#0b6e4f", "#e07b39", "#3b6fb6", "#8e4a9e", "#b5322e")
"""Colours of learned rewards."""
GREY = "#7a7a7a"


def accuracy_dots(path: Path, cells: pd.DataFrame) -> None:
    """Write a PNG of greedy accuracies; arms with a learned reward are green.

    Args:
        path: output file.
        cells: world, arm, kind and accuracy, grouped by world.
    """
    from matplotlib.figure import Figure

    worlds = cells.groupby("world", sort=False)
    heights = worlds["arm"].nunique().tolist()
    figure = Figure(figsize=(7.0, 0.9 * len(heights) + 0.24 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (world, of_world) in zip(axes, worlds, strict=True):
        arms = of_world.groupby("arm", sort=False)
        for place, (_, arm) in enumerate(arms):
            values = 100 * arm["accuracy"]
            colour = COLOURS[0] if (arm["kind"] == "irl").any() else GREY
            axis.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.45)
            axis.plot([values.mean()], [place], "|", color=colour, markersize=11, markeredgewidth=2)
        axis.set_yticks(range(len(arms)), list(arms.groups), fontsize=8)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set_xlim(-2, 102)
        axis.set_title(world, loc="left", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("held-out greedy accuracy, %: seeds and their mean", fontsize=8)
    figure.savefig(path, dpi=110)


def depth_lines(path: Path, gains: pd.DataFrame, found: pd.DataFrame) -> None:
    """Write a PNG of two panels against the number of hops.

    Args:
        path: output file.
        gains: line, x and value of each seed: gain of selecting by reward + log-prob over the better baseline
            without a reward, in points.
        found: line, x and value of each seed: how often a score's lowest line is the first wrong one, in %. Lines
            whose name begins with "reward" are coloured, the others grey.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, gains, set(gains["line"]), "hops")
    left.axhline(0, color="black", linewidth=0.6)
    left.set_ylabel("points", fontsize=8)
    left.set_title("best-of by reward + log-prob, minus the better of\nmajority and log-prob", loc="left", fontsize=9)
    _draw(right, found, {line for line in found["line"] if line.startswith("reward")}, "hops")
    right.set_ylim(0, 102)
    right.set_ylabel("% of wrong samples", fontsize=8)
    right.set_title("the lowest line is the first wrong one", loc="left", fontsize=9)
    figure.savefig(path, dpi=110)


def curve_lines(path: Path, label: str, accuracies: pd.DataFrame, aurocs: pd.DataFrame) -> None:
    """Write a PNG of two panels against a share of demonstrations.

    Args:
        path: output file.
        label: label of the x axes.
        accuracies: line, x and value of each seed: accuracy of each arm's policy, in %.
        aurocs: line, x and value of each seed: within-prompt AUROC of each arm's reward + log-prob and of log-prob,
            in %.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, accuracies, {line for line in accuracies["line"] if line.startswith("IRL")}, label)
    left.set_title("held-out greedy accuracy, %", loc="left", fontsize=9)
    _draw(right, aurocs, set(aurocs["line"]) - {"log-prob"}, label)
    right.set_ylim(max(0, right.get_ylim()[0]), 100)  # an interval may exceed the range of an AUROC
    right.set_title("within-prompt AUROC of reward + log-prob, %", loc="left", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw(axis: Any, lines: pd.DataFrame, learned: Collection[str], label: str) -> None:
    """Draw lines with 95 % bars, slightly offset to avoid overlap; lines not in `learned` are grey."""
    colours, strokes = iter(COLOURS), iter(("-", "--", ":", "-."))
    ticks = sorted(lines["x"].unique())
    apart = 0.012 * (ticks[-1] - ticks[0])
    named = lines.groupby("line", sort=False)
    for index, (name, line) in enumerate(named):
        of_x = {x: mean_interval(values) for x, values in line.groupby("x")["value"]}
        is_learned = name in learned
        axis.errorbar(
            [x + apart * (index - (len(named) - 1) / 2) for x in of_x],
            [middle for middle, _, _ in of_x.values()],
            [0.0 if math.isnan(high) else (high - low) / 2 for _, low, high in of_x.values()],
            color=next(colours, GREY) if is_learned else GREY,
            linestyle="-" if is_learned else next(strokes, "-"),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.4,
            label=name,
        )
    axis.set_xlabel(label, fontsize=8)
    axis.set_xticks(ticks)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(named) > 4:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axis.legend(fontsize=7, frameon=False)
