"""`report.html`: one self-contained page with a run's tables, curves, reward histogram and token heatmaps."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup, escape

from tracereward.files import atomic_write_text
from tracereward.scores import TokenScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# sRGB of (limit below zero, zero, limit above zero). Orange to blue, told apart with every common colour blindness;
# the page's text keeps a contrast of at least 4.5 : 1 on all of them.
LIGHT = ((0xF2, 0x9E, 0x4C), (0xF6, 0xF6, 0xF4), (0x6A, 0xAE, 0xDE))
DARK = ((0x9A, 0x50, 0x0A), (0x26, 0x29, 0x2E), (0x1B, 0x62, 0xA0))

MAX_POINTS = 400  # per curve; longer runs are drawn as means of consecutive blocks


@dataclass(frozen=True)
class Trace:
    """One scored candidate.

    Attributes:
        question: the prompt, as text.
        completion: the text that `scores.offsets` index.
        scores: its token rewards.
        correct: whether the answer is right; None if it was not checked.
        answer: the extracted answer; None if there is none.
        label: what this trace is, e.g. "expert" or "highest of 8".
    """

    question: str
    completion: str
    scores: TokenScores
    correct: bool | None
    answer: str | None
    label: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: its heading.
        columns: one name per column.
        rows: cells; None and NaN show as a dash.
        note: a sentence below the table.
        best: index of the row to emphasise; None for no emphasis.
    """

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    note: str = ""
    best: int | None = None

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: row {i} has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Series:
    """One curve: the key in `metrics.jsonl`, its name in a panel of several, and its colour (a CSS variable)."""

    key: str
    name: str = ""
    colour: str = "curve"


@dataclass(frozen=True)
class Panel:
    """One small multiple; `reference` is a value to mark (chance, zero), `bounds` the fixed range of y, if any."""

    title: str
    series: tuple[Series, ...]
    reference: float | None = None
    bounds: tuple[float, float] | None = None


PANELS = (
    Panel("Reward of the policy’s traces", (Series("reward"),)),
    Panel("Correct answers", (Series("rewards/correct/mean"),), bounds=(0, 1)),
    Panel("AUROC within a prompt", (Series("monitor/within_prompt_auroc"),), reference=0.5, bounds=(0, 1)),
    Panel("Correlation of reward and correctness", (Series("monitor/point_biserial_r"),), reference=0.0),
    Panel("Discriminator loss", (Series("discriminator/loss"),)),
    Panel(
        "Discriminator accuracy",
        (
            Series("discriminator/accuracy_expert", "expert", "positive"),
            Series("discriminator/accuracy_policy", "policy", "negative"),
        ),
        reference=0.5,
        bounds=(0, 1),
    ),
    Panel("KL to the reference policy", (Series("kl"),)),
    Panel("Entropy of the policy", (Series("entropy"),)),
    Panel("Length of completions, tokens", (Series("completions/mean_length"),)),
)


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    summary: str,
    tables: list[Table],
    metrics: list[dict],
    rewards_correct: list[float],
    rewards_wrong: list[float],
    traces: list[Trace],
    command: str,
    config: dict | None = None,
) -> None:
    """Write the report to `path`: one HTML file that needs no network. An older report stays if this one fails.

    Args:
        path: where the page goes.
        title: its heading.
        summary: one sentence: what was run and what came out.
        tables: shown in this order.
        metrics: rows of `metrics.jsonl`; rows with `phase == "warmup"` count in `update`, the others in `step`. Keys
            that `PANELS` names are drawn if present; None and NaN leave gaps.
        rewards_correct: trace rewards (log-odds) of traces with the right answer, for the histogram.
        rewards_wrong: the same of traces with a wrong answer.
        traces: shown as token heatmaps on one common colour scale; neighbours with the same question share its heading.
        command: the command that made the run.
        config: the resolved configuration, if it is to be shown.
    """
    limit = _common_limit(traces)
    warmup = [row for row in metrics if row.get("phase") == "warmup"]
    training = [row for row in metrics if row.get("phase") != "warmup"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html.jinja").render(
        title=title,
        summary=summary,
        command=command,
        tables=[_table_view(table) for table in tables],
        curves=[
            (heading, figures)
            for heading, figures in (
                ("Training", _curves(training, "step")),
                ("Warm-up of the discriminator", _curves(warmup, "update")),
            )
            if figures
        ],
        histogram=_histogram(rewards_correct, rewards_wrong),
        questions=[
            (question, [_trace_view(trace, limit) for trace in group])
            for question, group in groupby(traces, key=lambda trace: trace.question)
        ],
        limit=_digits(limit),
        config=_config_text(config),
        heatmap_css=HEATMAP_CSS,
        palette_css=_palette_css(),
    )
    # A lone surrogate (a broken escape in a data file) cannot be written as UTF-8; it shows as a question mark.
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"))


# --- token heatmaps ---


HEATMAP_CSS = Markup("""\
.heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; color: #1d2126; background: #fff;
  font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.heat .t { position: relative; margin-right: 1px; padding: .16em 0 .24em; border-radius: 2px; cursor: default;
  background: var(--l);
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.heat .s { box-shadow: inset 0 -2px #6b7280; }
.heat .n::before { content: "↵"; opacity: .45; }
.heat .z::before { content: "·"; opacity: .6; }
.heat .e::before { content: "■"; opacity: .6; font-size: .7em; padding: 0 .3em; }
.heat .t:hover { outline: 1px solid #6b7280; }
.heat .t:focus { outline: 2px solid #1d2126; z-index: 1; }
.heat .t:focus::after { content: attr(title); position: absolute; left: 0; bottom: calc(100% + 4px);
  transform: translateX(-30%); padding: .1em .45em; border-radius: 3px; background: #1d2126; color: #fff;
  font-size: .8rem; line-height: 1.5; white-space: nowrap; pointer-events: none; }
@media screen and (prefers-color-scheme: dark) {
  .heat { color: #e9ebee; background: #16181b; }
  .heat .t { background: var(--d); }
  .heat .s { box-shadow: inset 0 -2px #9aa1ab; }
  .heat .t:focus { outline-color: #e9ebee; }
  .heat .t:focus::after { background: #e9ebee; color: #16181b; }
}
""")


def reward_colour(reward: float, limit: float, dark: bool = False) -> str:
    """The colour of a reward, `#rrggbb`: linear in sRGB from neutral at 0 to blue at `limit` and orange at `-limit`.

    Rewards beyond the limit have the colour of the limit. `dark` chooses the palette for a dark page.
    """
    low, neutral, high = DARK if dark else LIGHT
    weight = min(abs(reward) / limit, 1.0) if limit > 0 and not math.isnan(reward) else 0.0
    end = high if reward > 0 else low
    return "#" + "".join(f"{round(n + weight * (e - n)):02x}" for n, e in zip(neutral, end))


def heatmap_html(scores: TokenScores, limit: float) -> Markup:
    """The token heatmap of one trace, with its own style: for a notebook or a page of one's own.

    Args:
        scores: the token rewards.
        limit: the reward (log-odds) with the strongest colour, on both sides of 0.
    """
    return Markup("<style>{}</style>{}").format(HEATMAP_CSS, _heatmap(scores, limit, _joined_text(scores)))


def _heatmap(scores: TokenScores, limit: float, completion: str) -> Markup:
    """One span per token. The spans' text, joined, is exactly `completion`: marks are drawn by the style sheet."""
    spans: list[Markup] = []
    shown = 0
    last = len(scores.tokens) - 1
    for i, (reward, supervised) in enumerate(zip(scores.rewards, scores.supervised)):
        start, end = scores.offsets[i]
        if start > shown:  # text between tokens, which no token carries
            spans.append(escape(completion[shown:start]))
            shown = start
        text = completion[shown:end]
        shown = max(shown, end)
        kind, name = "", text
        if not text:  # the end of the sequence, or a later byte of a character that is already shown
            kind, name = (" e", "end of sequence") if i == last else (" z", "part of a character")
        elif text.startswith("\n"):
            kind, name = " n", text.replace("\n", "line break ")
        spans.append(
            Markup(
                '<span class="t{kind}{mark}" style="--l:{light};--d:{dark}" tabindex="0" role="img" '
                'aria-label="{name}: {reward}{note}" title="{reward}">{text}</span>'
            ).format(
                kind=kind,
                mark=" s" if supervised else "",
                light=reward_colour(reward, limit),
                dark=reward_colour(reward, limit, dark=True),
                name=name.strip() or "space",
                reward=_signed(reward),
                note=", supervised" if supervised else "",
                text=text,
            )
        )
    spans.append(escape(completion[shown:]))
    return Markup('<div class="heat" role="group" aria-label="Token rewards" dir="auto">{}</div>').format(
        Markup("").join(spans)
    )


def _joined_text(scores: TokenScores) -> str:
    """The completion's text, from the tokens placed at their offsets."""
    text = [" "] * max((end for _, end in scores.offsets), default=0)
    for token, (start, end) in zip(scores.tokens, scores.offsets):
        for i, character in enumerate(token[: end - start]):
            text[start + i] = character
    return "".join(text)


def _common_limit(traces: Sequence[Trace]) -> float:
    """The largest |reward| of all tokens, so that colours compare across traces; 1 if there is none."""
    sizes = [abs(reward) for trace in traces for reward in trace.scores.rewards if math.isfinite(reward)]
    return max(sizes, default=0.0) or 1.0


def _palette_css() -> Markup:
    """The legend's end and middle colours, as CSS variables for both schemes."""

    def variables(dark: bool) -> str:
        names = (("low", -1.0), ("zero", 0.0), ("high", 1.0))
        return " ".join(f"--{name}: {reward_colour(value, 1.0, dark)};" for name, value in names)

    return Markup(
        f":root {{ {variables(False)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(True)} }} }}"
    )


def _trace_view(trace: Trace, limit: float) -> dict[str, Any]:
    """What the template shows of one trace."""
    scores = trace.scores
    return {
        "label": trace.label,
        "answer": trace.answer,
        "correct": trace.correct,
        "mean": _signed(scores.aggregate("mean")) if scores.rewards else "–",
        "heatmap": _heatmap(scores, limit, trace.completion),
        "steps": _step_rows(trace, limit),
    }


def _step_rows(trace: Trace, limit: float) -> list[dict[str, Any]]:
    """One row per step: its text, mean reward and colours; the lowest of several is marked."""
    scores = trace.scores
    rewards = scores.step_rewards()
    lowest = min(range(len(rewards)), key=rewards.__getitem__) if len(rewards) > 1 else None
    rows: list[dict[str, Any]] = []
    start = 0
    for end, is_end in enumerate(scores.step_ends):
        if is_end:
            reward = rewards[len(rows)]
            text = trace.completion[scores.offsets[start][0] : scores.offsets[end][1]]
            rows.append(
                {
                    "text": text.strip(),
                    "reward": _signed(reward),
                    "light": reward_colour(reward, limit),
                    "dark": reward_colour(reward, limit, dark=True),
                    "lowest": len(rows) == lowest,
                }
            )
            start = end + 1
    return rows


# --- plots: matplotlib draws with stand-in colours, which become CSS variables, so that one SVG serves both schemes ---


STAND_INS = {
    "ink": "#0a0b01",
    "faint": "#0a0b02",
    "curve": "#0a0b03",
    "positive": "#0a0b04",
    "negative": "#0a0b05",
    "correct": "#0a0b06",
    "wrong": "#0a0b07",
}


def _curves(rows: list[dict], axis: str) -> list[dict[str, Any]]:
    """One figure per panel that has a finite value."""
    figures: list[dict[str, Any]] = []
    for panel in PANELS:
        drawn = [(series, *_points(rows, axis, series.key)) for series in panel.series]
        drawn = [(series, x, y) for series, x, y in drawn if any(map(math.isfinite, y))]
        if not drawn:
            continue
        ends = [next(value for value in reversed(y) if math.isfinite(value)) for _, _, y in drawn]
        block = max(math.ceil(len(x) / MAX_POINTS) for _, x, _ in drawn)
        drawn = [(series, _block_means(x, block), _block_means(y, block)) for series, x, y in drawn]
        figures.append(
            {
                "title": panel.title,
                "series": [
                    {"name": series.name, "colour": series.colour, "last": _significant(end)}
                    for (series, _, _), end in zip(drawn, ends)
                ],
                "note": f"means of {block} rows" if block > 1 else "",
                "svg": _panel_svg(panel, drawn, axis),
            }
        )
    return figures


def _points(rows: list[dict], axis: str, key: str) -> tuple[list[float], list[float]]:
    """x and y of one metric in order of x; a resumed run's later row replaces the earlier one; no number is NaN."""
    points = {row[axis]: _real(row[key]) for row in rows if key in row and math.isfinite(_real(row.get(axis)))}
    x = sorted(points)
    return [float(value) for value in x], [points[value] for value in x]


def _real(value: object) -> float:
    """`value` if it is a number, else NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


def _block_means(values: list[float], size: int) -> list[float]:
    """Means of consecutive blocks of `size` values, over their finite ones; NaN where there is none."""
    means: list[float] = []
    for start in range(0, len(values), size):
        finite = [value for value in values[start : start + size] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _panel_svg(panel: Panel, drawn: list[tuple[Series, list[float], list[float]]], axis: str) -> Markup:
    """A small line chart; a value without neighbours is a dot."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new_figure(4.3, 2.3)
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
    label = f"{panel.title} by {axis}"
    return _to_svg(figure, label)


def _histogram(correct: list[float], wrong: list[float]) -> dict[str, Any] | None:
    """Trace rewards of correct traces above the axis and of wrong ones below, in the same bins; None without values."""
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
    figure, axes = _new_figure(5.4, 2.9)
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
            f"{name}, median {_signed(median)}",
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
    svg = _to_svg(figure, "Histogram of trace rewards, correct traces above and wrong traces below")
    return {"svg": svg, **{name: f"{len(values):,}" for name, values in groups.items()}}


def _new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A transparent figure of `width` x `height` inches with faint horizontal lines and no frame."""
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


def _to_svg(figure: "Figure", label: str) -> Markup:
    """The figure as inline SVG: scales with its box, text stays text, colours are CSS variables."""
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


# --- numbers and tables ---


def _signed(value: float) -> str:
    """A reward with its sign, e.g. ``+1.20`` or ``−0.35``."""
    return f"{value:+.2f}".replace("-", "−")


def _digits(value: float) -> str:
    """A magnitude without needless zeros, e.g. ``3.2``."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _significant(value: float) -> str:
    """Three significant digits."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "−")


def _table_view(table: Table) -> dict[str, Any]:
    """What the template shows of a table: text cells, and which columns hold numbers."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    cells = [_column_text(column) for column in columns]
    return {
        "title": table.title,
        "columns": list(zip(table.columns, map(_is_numeric, columns))),
        "rows": [[column[i] for column in cells] for i in range(len(table.rows))],
        "note": table.note,
        "best": table.best,
    }


def _is_numeric(column: list[str | float | int | None]) -> bool:
    """Whether the column's cells are numbers, also written ones such as ``71.3 ± 0.4`` or ``[0.61, 0.69]``."""
    held = [cell for cell in column if cell is not None and cell != ""]
    return bool(held) and all(
        re.fullmatch(r"[\d\s.,:%±+\-−–/×()\[\]]*\d[\d\s.,:%±+\-−–/×()\[\]]*", cell)
        if isinstance(cell, str)
        else not isinstance(cell, bool)
        for cell in held
    )


def _column_text(column: list[str | float | int | None]) -> list[str]:
    """The cells as text; the floats of a column have the same number of decimals."""
    floats = [abs(cell) for cell in column if isinstance(cell, float) and math.isfinite(cell)]
    largest = max(floats, default=0.0)
    decimals = 3 if largest < 10 else 2 if largest < 100 else 1

    def text(cell: str | float | int | None) -> str:
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return "–"
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        if isinstance(cell, int):
            return f"{cell:,}".replace("-", "−")
        if isinstance(cell, float):
            tiny = 0 < largest < 0.001
            return (f"{cell:.1e}" if tiny else f"{cell:,.{decimals}f}").replace("-", "−").replace("inf", "∞")
        return cell

    return [text(cell) for cell in column]


def _config_text(config: dict | None) -> str:
    """The configuration as YAML, values that YAML lacks (a path) as text; empty without one."""
    if not config:
        return ""
    plain = json.loads(json.dumps(config, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
