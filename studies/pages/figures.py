"""A study's figures: accuracies, one panel a world, one row an arm, a dot for each seed and a bar at their mean; and
lines against depth."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0b6e4f", "#e07b39", "#3b6fb6", "#8e4a9e", "#b5322e")
"""Of learned rewards."""
GREY = "#7a7a7a"


def accuracy_dots(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], learned: Collection[str], label: str
) -> None:
    """Write a PNG.

    Args:
        path: of the picture.
        panels: for each world, each arm's accuracies in %, one for each seed.
        learned: arms with a learned reward, which are green.
        label: of the horizontal axis.
    """
    from matplotlib.figure import Figure

    heights = [len(arms) for arms in panels.values()]
    figure = Figure(figsize=(7.0, 0.9 * len(panels) + 0.24 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (world, arms) in zip(axes, panels.items(), strict=True):
        for place, (arm, values) in enumerate(arms.items()):
            colour = COLOURS[0] if arm in learned else GREY
            axis.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.45)
            axis.plot([sum(values) / len(values)], [place], "|", color=colour, markersize=11, markeredgewidth=2)
        axis.set_yticks(range(len(arms)), list(arms), fontsize=8)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set_xlim(-2, 102)
        axis.set_title(world, loc="left", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel(label, fontsize=8)
    figure.savefig(path, dpi=110)


Line = Mapping[int, tuple[float, float, float]]
"""Mean, low and high at each depth, in %; the interval is nan with one seed."""


def depth_lines(path: Path, gains: Mapping[str, Line], found: Mapping[str, Line]) -> None:
    """Write a PNG of two panels against the number of hops.

    Args:
        path: of the picture.
        gains: for each arm what choosing by reward and log-prob reaches above what needs no reward, in points.
        found: for each score how often its lowest line is the first wrong one; names that begin with "reward" are
            coloured, the others grey.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, gains, learned=gains.keys())
    left.axhline(0, color="black", linewidth=0.6)
    left.set_ylabel("points", fontsize=8)
    left.set_title("best-of by reward + log-prob, minus the better of\nmajority and log-prob", loc="left", fontsize=9)
    _draw(right, found, learned=[name for name in found if name.startswith("reward")])
    right.set_ylim(0, 102)
    right.set_ylabel("% of wrong samples", fontsize=8)
    right.set_title("the lowest line is the first wrong one", loc="left", fontsize=9)
    figure.savefig(path, dpi=110)


def curve_lines(path: Path, label: str, accuracies: Mapping[str, Line], aurocs: Mapping[str, Line]) -> None:
    """Write a PNG of two panels against a share of demonstrations.

    Args:
        path: of the picture.
        label: of the horizontal axes.
        accuracies: of each arm's policy, in %.
        aurocs: within-prompt, of each arm's reward + log-prob and of log-prob, in %.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, accuracies, learned=[name for name in accuracies if name.startswith("IRL")], label=label)
    left.set_title("held-out greedy accuracy, %", loc="left", fontsize=9)
    _draw(right, aurocs, learned=[name for name in aurocs if name != "log-prob"], label=label)
    right.set_ylim(max(0, right.get_ylim()[0]), 100)  # an interval may reach beyond what an AUROC can be
    right.set_title("within-prompt AUROC of reward + log-prob, %", loc="left", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw(axis: Any, lines: Mapping[str, Line], learned: Collection[str], label: str = "hops") -> None:
    """Lines with 95 % bars, side by side where they would cover each other; what is not learned is grey."""
    colours = iter(COLOURS)
    strokes = iter(("-", "--", ":", "-."))
    depths = sorted({depth for line in lines.values() for depth in line})
    apart = 0.012 * (depths[-1] - depths[0])
    for index, (name, line) in enumerate(lines.items()):
        is_learned = name in learned
        means = [mean for mean, _, _ in line.values()]
        halves = [0.0 if math.isnan(high) else (high - low) / 2 for _, low, high in line.values()]
        axis.errorbar(
            [depth + apart * (index - (len(lines) - 1) / 2) for depth in line],
            means,
            halves,
            color=next(colours, GREY) if is_learned else GREY,
            linestyle="-" if is_learned else next(strokes, "-"),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.4,
            label=name,
        )
    axis.set_xlabel(label, fontsize=8)
    axis.set_xticks(depths)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 4:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axis.legend(fontsize=7, frameon=False)
