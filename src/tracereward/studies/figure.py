"""A study's figure: one panel a world, one row an arm, a dot for each seed and a bar at their mean."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path


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
            colour = "#0b6e4f" if arm in learned else "#7a7a7a"
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
