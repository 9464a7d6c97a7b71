"""Curves and histograms of the report, as inline SVG.

matplotlib draws with placeholder colours that are replaced by CSS variables, so that one SVG fits light and dark pages.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from tracereward.errors import InputError
from tracereward.files import read_jsonl
from tracereward.reports.tables import Table
from tracereward.rewards.heatmap import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400  # per curve; longer runs are plotted as means of consecutive blocks


@dataclass(frozen=True)
class Series:
    """One curve: the key in `metrics.jsonl`, its name in a panel with several curves, and its colour (CSS variable)."""

    key: str
    name: str = ""
    colour: str = "curve"


@dataclass(frozen=True)
class Panel:
    """One small chart; `reference` is a marked value (chance, zero), `bounds` the fixed y range, if any."""

    title: str
    series: tuple[Series, ...]
    reference: float | None = None
    bounds: tuple[float, float] | None = None


PANELS = (
    Panel("Reward of the policy’s traces", (Series("reward"),)),
    Panel("Correct answers", (Series("rewards/correct/mean"),), bounds=(0, 1)),
    Panel("AUROC within a prompt", (Series("monitor/within_prompt_auroc"),), reference=0.5, bounds=(0, 1)),
    Panel("Expert above its perturbed copy", (Series("monitor/perturbation_auroc"),), reference=0.5, bounds=(0, 1)),
    Panel("Correlation of reward and correctness", (Series("monitor/point_biserial_r"),), reference=0.0),
    Panel("Correlation of reward and length", (Series("monitor/length_reward_r"),), reference=0.0),
    Panel("Discriminator loss", (Series("discriminator/loss"),)),
    Panel(
        "Discriminator accuracy",
        (
            Series("discriminator/accuracy_expert", "positives", "positive"),
            Series("discriminator/accuracy_policy", "negatives", "negative"),
            Series("discriminator/held_out_accuracy", "held-out pairs"),
        ),
        reference=0.5,
        bounds=(0, 1),
    ),
    Panel("KL to the reference policy", (Series("kl"), Series("monitor/kl"))),
    Panel("Entropy of the policy", (Series("entropy"),)),
    Panel("Length of completions, tokens", (Series("completions/mean_length"),)),
    Panel("Distinct completions of a prompt", (Series("monitor/distinct_share"),), bounds=(0, 1)),
    Panel("Repetition (4-grams)", (Series("monitor/repetition"),)),
    Panel("Reward variance inside right traces", (Series("monitor/token_noise"),)),
)


STAND_INS = {
    "ink": "#0a0b01",
    "faint": "#0a0b02",
    "curve": "#0a0b03",
    "positive": "#0a0b04",
    "negative": "#0a0b05",
    "correct": "#0a0b06",
    "wrong": "#0a0b07",
}


Drawn = list[tuple[Series, list[float], list[float]]]


def curves(rows: list[dict], axis: str) -> list[dict[str, Any]]:
    """One figure per panel with at least one finite value; none if all rows are of one step."""
    figures: list[dict[str, Any]] = []
    for panel, drawn, block, ends in _panels(rows, axis):
        figures.append(
            {
                "title": panel.title,
                "series": [
                    {"name": series.name, "colour": series.colour, "last": _significant(end)}
                    for (series, _, _), end in zip(drawn, ends)
                ],
                "note": f"means of {block} rows" if block > 1 else "",
                "svg": to_svg(_panel_figure(panel, drawn, axis), f"{panel.title} by {axis}"),
            }
        )
    return figures


def run_figures(folder: str | Path) -> "dict[str, Figure]":
    """The charts of a run's report as matplotlib figures, by title; also of a run that is still going on.

    Args:
        folder: the run folder.

    Raises:
        InputError: it has no ``metrics.jsonl``.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a run")
    rows = read_jsonl(path)
    warmup = [row for row in rows if row.get("phase") == "warmup"]
    training = [row for row in rows if row.get("phase") != "warmup"]
    return {
        f"{panel.title}{after}": _coloured(_panel_figure(panel, drawn, axis))
        for part, axis, after in ((training, "step", ""), (warmup, "update", " (warm-up)"))
        for panel, drawn, _, _ in _panels(part, axis)
    }


def _coloured(figure: "Figure") -> "Figure":
    """A figure with the colours of a light page in place of the stand-ins."""
    from matplotlib.colors import to_hex

    colours = {stand_in: SHOWN[name] for name, stand_in in STAND_INS.items()}
    for artist in figure.findobj(lambda one: hasattr(one, "get_color") and hasattr(one, "set_color")):
        drawn: Any = artist
        colour = to_hex(drawn.get_color())
        if colour in colours:
            drawn.set_color(colours[colour])
    for axes in figure.axes:
        axes.tick_params(labelcolor=SHOWN["ink"], grid_color=SHOWN["faint"])
    return figure


def _panels(rows: list[dict], axis: str) -> Iterator[tuple[Panel, Drawn, int, list[float]]]:
    """Each panel with values, its curves, the size of their blocks, and their last values."""
    if len({row.get(axis) for row in rows}) < 2:
        return
    for panel in PANELS:
        drawn = [(series, *_points(rows, axis, series.key)) for series in panel.series]
        drawn = [(series, x, y) for series, x, y in drawn if any(map(math.isfinite, y))]
        if not drawn:
            continue
        ends = [next(value for value in reversed(y) if math.isfinite(value)) for _, _, y in drawn]
        block = max(math.ceil(len(x) / MAX_POINTS) for _, x, _ in drawn)
        yield panel, [(series, _block_means(x, block), _block_means(y, block)) for series, x, y in drawn], block, ends


def _points(rows: list[dict], axis: str, key: str) -> tuple[list[float], list[float]]:
    """x and y of one metric, sorted by x. Later rows (of a resumed run) replace earlier ones; non-numbers are NaN."""
    points = {row[axis]: _real(row[key]) for row in rows if key in row and math.isfinite(_real(row.get(axis)))}
    x = sorted(points)
    return [float(value) for value in x], [points[value] for value in x]


def _real(value: object) -> float:
    """`value` if it is a number, else NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


def _block_means(values: list[float], size: int) -> list[float]:
    """Means of the finite values of consecutive blocks of `size` values; NaN for a block without finite values."""
    means: list[float] = []
    for start in range(0, len(values), size):
        finite = [value for value in values[start : start + size] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _panel_figure(panel: Panel, drawn: Drawn, axis: str) -> "Figure":
    """A small line chart; isolated values are plotted as dots."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(4.3, 2.3)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=STAND_INS["ink"], alpha=0.55, linewidth=0.8, dashes=(3, 3))
    for series, x, y in drawn:
        colour = STAND_INS[series.colour]
        axes.plot(x, y, color=colour, linewidth=1.7)
        padded = [math.nan, *y, math.nan]
        alone = [
            (x[i], y[i])
            for i in range(len(y))
            if math.isfinite(y[i]) and not math.isfinite(padded[i]) and not math.isfinite(padded[i + 2])
        ]
        if alone:
            axes.plot(*zip(*alone), linestyle="none", marker="o", markersize=3, color=colour)
    if panel.bounds is not None:
        low, high = panel.bounds
        pad = 0.04 * (high - low)
        axes.set_ylim(low - pad, high + pad)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    if len({value for _, x, _ in drawn for value in x}) == 1:
        axes.set_xlim(drawn[0][1][0] - 1, drawn[0][1][0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel(axis)
    return figure


SHOWN = {
    "ink": "#1d2126",
    "faint": "#d9dbdf",
    "curve": "#1f6fb2",
    "positive": "#1f6fb2",
    "negative": "#c4650c",
    "correct": "#1f6fb2",
    "wrong": "#c4650c",
}
"""Colours outside of a page, which has its own."""


def table_figure(table: Table) -> dict[str, Any]:
    """A line for each numeric column of a table over the numbers of its first column; other rows are dots.

    Args:
        table: up to three numeric columns after the first, as fractions.
    """
    figure, axes = new_figure(4.3, 2.6)
    labels = [str(row[0]) for row in table.rows]
    numbered = sum(label.isdigit() for label in labels)
    for index, colour in enumerate(("positive", "correct", "negative")[: len(table.columns) - 1], 1):
        values = [_real(row[index]) for row in table.rows]
        style = {"color": STAND_INS[colour], "marker": "o", "markersize": 4}
        axes.plot(range(numbered), values[:numbered], label=table.columns[index], linewidth=1.7, **style)
        axes.plot(range(numbered, len(labels)), values[numbered:], linestyle="none", **style)
    axes.set_xticks(range(len(labels)), [label if label.isdigit() else "mean" for label in labels])
    axes.set_xlabel(table.columns[0])
    axes.legend(frameon=False, fontsize=9, labelcolor=STAND_INS["ink"])
    return {"title": table.title, "svg": to_svg(figure, table.title)}


def histogram(correct: Sequence[float], wrong: Sequence[float]) -> dict[str, Any] | None:
    """Histogram of trace rewards: correct traces above the axis, wrong ones below; None if there are no values."""
    import numpy as np

    groups = {
        "correct": [value for value in correct if math.isfinite(value)],
        "wrong": [value for value in wrong if math.isfinite(value)],
    }
    both = groups["correct"] + groups["wrong"]
    if not both:
        return None
    low, high = min(both), max(both)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 29)
    figure, axes = new_figure(5.4, 2.9)
    tallest = 0.0
    for (name, values), sign in zip(groups.items(), (1, -1)):
        if not values:
            continue
        share = np.histogram(values, edges)[0] / len(values) * 100
        tallest = max(tallest, float(share.max()))
        width = edges[1] - edges[0]
        axes.bar(edges[:-1] + width / 2, sign * share, 0.88 * width, color=STAND_INS[name], linewidth=0)
    reach = 1.35 * tallest
    for (name, values), sign in zip(groups.items(), (1, -1)):
        if not values:
            continue
        median = float(np.median(values))
        axes.plot([median, median], [0, sign * 1.08 * tallest], color=STAND_INS["ink"], linewidth=1.2)
        left_half = median < (low + high) / 2
        axes.annotate(
            f"{name}, median {signed(median)}",
            (median, sign * 1.12 * tallest),
            ha="left" if left_half else "right",
            va="bottom" if sign > 0 else "top",
            color=STAND_INS["ink"],
        )
    axes.axhline(0, color=STAND_INS["ink"], linewidth=0.8)
    axes.set_ylim(-reach if groups["wrong"] else 0, reach if groups["correct"] else 0)
    axes.set_yticks([tick for tick in axes.get_yticks() if abs(tick) <= 1.02 * tallest])
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g} %")
    axes.set_xlabel("reward of the trace (log-odds)")
    svg = to_svg(figure, "Histogram of trace rewards, correct traces above and wrong traces below")
    return {"svg": svg, **{name: f"{len(values):,}" for name, values in groups.items()}}


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A transparent figure of `width` x `height` inches with faint horizontal grid lines and no frame."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for side in ("top", "left", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=STAND_INS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=STAND_INS["ink"])
    axes.xaxis.label.set(color=STAND_INS["ink"], fontsize=9.5)
    return figure, axes


def to_svg(figure: "Figure", label: str) -> Markup:
    """Convert a figure to inline SVG that scales with its container; text stays text, colours become CSS variables."""
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\n\s*", "\n", svg)
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    opening = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", opening, svg, count=1).replace("xlink:href", "href")
    for name, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return Markup(svg)


def _significant(value: float) -> str:
    """Format with three significant digits."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "−")
