"""A study's figure: one panel a world, one dot an arm, with its interval over seeds."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

Interval = tuple[float, float, float]


def accuracy_dots(
    path: Path, panels: Mapping[str, Mapping[str, Interval]], learned: Collection[str], label: str
) -> None:
    """Write a PNG.

    Args:
        path: of the picture.
        panels: for each world, each arm's mean and the ends of its interval (nan for one seed).
        learned: arms with a learned reward, which are green.
        label: of the horizontal axis.
    """
    from matplotlib.figure import Figure

    heights = [len(arms) for arms in panels.values()]
    figure = Figure(figsize=(7.0, 0.9 * len(panels) + 0.26 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (world, arms) in zip(axes, panels.items(), strict=True):
        for place, (arm, (mean, low, high)) in enumerate(arms.items()):
            colour = "#0b6e4f" if arm in learned else "#8a8a8a"
            if not math.isnan(low):
                axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
            axis.plot([mean], [place], "o", color=colour, markersize=5)
        axis.set_yticks(range(len(arms)), list(arms), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(world, loc="left", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel(label, fontsize=8)
    figure.savefig(path, dpi=110)


CONTROL_ARMS = (
    "base",
    "SFT",
    "SFT continued",
    "GRPO on log-prob",
    "GRPO on log p_SFT - log p_base",
    "GRPO with verifier",
)
"""Arms without a learned reward."""
