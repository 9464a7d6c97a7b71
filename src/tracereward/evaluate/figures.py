"""Figures of an evaluation, as inline SVG for light and dark pages (see `reports.plots`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tracereward.reports.plots import STAND_INS, histogram, new_figure, to_svg
from tracereward.selection import METHODS

COLOURS = {"reward": "positive", "log-prob": "curve"}
"""Colours of lines by the start of their label; other lines have the colour of the text."""
SHOWN = ("mean", "majority", "shortest", "logprob", "reward", "vote", "reward_logprob", "oracle")
"""Methods shown in the figure of accuracy over N; all of them would overlap."""


def curve_figure(lines: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Accuracy over N on a logarithmic axis, with a label at the end of each line.

    Args:
        lines: points (N, accuracy, low, high) by label, as fractions.
    """
    figure, axes = new_figure(6.4, 3.6)
    sizes = sorted({int(point[0]) for points in lines.values() for point in points})
    ends = sorted((points[-1][1], label) for label, points in lines.items())
    places: dict[str, float] = {}
    low, high = min(p[1] for ps in lines.values() for p in ps), max(p[1] for ps in lines.values() for p in ps)
    span = max(high - low, 0.05)  # if all values are equal, the axis still needs an extent
    gap = 0.062 * span
    for value, label in ends:  # overlapping labels move up
        places[label] = max([value, *(place + gap for place in places.values())])
    for label, points in lines.items():
        name = next((colour for start, colour in COLOURS.items() if label.startswith(start)), "ink")
        colour = STAND_INS[name]
        x, y = [point[0] for point in points], [100 * point[1] for point in points]
        axes.plot(x, y, color=colour, linewidth=1.6 if name != "ink" else 1.0, alpha=1.0 if name != "ink" else 0.6)
        axes.annotate(
            label,
            (x[-1], 100 * places[label]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=STAND_INS["ink"],
            annotation_clip=False,
        )
    bottom = 100 * (low - 0.05 * span)
    axes.set_ylim(bottom, 100 * (max(high, *places.values()) + 0.05 * span))
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100])  # labels may be above 100 %
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("candidates N")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return to_svg(figure, "Accuracy of each method over the number of candidates")


def reliability_figure(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Reliability diagram: accuracy over predicted probability; a dot's area is its bin's share of traces.

    Args:
        bins: rows with probability, accuracy and count, by calibration.
    """
    figure, axes = new_figure(4.3, 3.6)
    axes.plot([0, 1], [0, 1], color=STAND_INS["ink"], alpha=0.55, linewidth=0.8, dashes=(3, 3))
    for (label, rows), name in zip(bins.items(), ("negative", "positive", "curve", "ink"), strict=False):
        total = sum(row["count"] for row in rows)
        x, y = [row["probability"] for row in rows], [row["accuracy"] for row in rows]
        axes.plot(x, y, color=STAND_INS[name], linewidth=1.4)
        axes.scatter(x, y, [8 + 120 * row["count"] / total for row in rows], color=STAND_INS[name])
        axes.annotate(
            "uncalibrated" if label == "none" else label,
            (x[-1], y[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=STAND_INS["ink"],
        )
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.08)
    axes.set_xlabel("predicted probability that the trace is correct")
    return to_svg(figure, "Accuracy over the predicted probability")


def risk_figure(curves: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Share of wrong answers over the share of questions that are answered, the most trusted first.

    Args:
        curves: of `evaluate_selective`, by method.
    """
    figure, axes = new_figure(6.4, 3.6)
    colours = {"reward": "positive", "logprob": "curve", "majority": "negative"}
    places: list[float] = []
    lowest, highest = 0.0, max(risk for row in curves.values() for _, risk in row["points"])
    gap = 0.065 * max(highest - lowest, 0.05)
    for method, row in sorted(curves.items(), key=lambda one: one[1]["points"][-1][1]):
        colour = STAND_INS[colours.get(method, "ink")]
        x, y = [100 * point[0] for point in row["points"]], [100 * point[1] for point in row["points"]]
        axes.plot(x, y, color=colour, linewidth=1.5)
        places.append(max([y[-1], *(place + 100 * gap for place in places)]))
        axes.annotate(
            row["label"],
            (x[-1], places[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )
    axes.set_ylim(0, 1.05 * max(100 * highest, *places, 1.0))
    axes.set_xlim(0, 100)
    axes.set_xlabel("questions answered, the most trusted first")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return to_svg(figure, "Share of wrong answers over the share of questions that are answered")


def pool_figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of `evaluate_pool`'s result: accuracy over N, risk over coverage, rewards by correctness, reliability."""
    lines = {METHODS[m].format(n="N"): points for m, points in result["curves"].items() if m in SHOWN}
    bins = {method: values["bins"] for method, values in result["calibration"].items() if method in ("none", "platt")}
    separation = histogram(result["rewards"]["correct"], result["rewards"]["wrong"])
    assert separation is not None  # there are candidates
    return [
        {"title": "Accuracy over the number of candidates", "svg": curve_figure(lines)},
        {"title": "Wrong answers among the most trusted", "svg": risk_figure(result["selective"]["curves"])},
        {"title": "Rewards of correct and wrong traces", "svg": separation["svg"]},
        {"title": "Reliability", "svg": reliability_figure(bins)},
    ]
