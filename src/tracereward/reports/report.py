"""`report.html`: one self-contained HTML page with a run's tables, curves, reward histogram and token heatmaps."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml
from markupsafe import Markup

from tracereward.files import atomic_write_text
from tracereward.reports.pages import page_template, table_view
from tracereward.reports.plots import curves, histogram
from tracereward.reports.tables import Table
from tracereward.rewards.first_error_rules import lowest_steps
from tracereward.rewards.heatmap import HEATMAP_CSS, reward_colour, signed, token_spans
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True)
class ScoredTrace:
    """One scored candidate.

    Attributes:
        question: the prompt, as text.
        completion: the text that `scores.offsets` index.
        scores: its token rewards.
        correct: whether the answer is correct; None if it was not verified.
        answer: the extracted answer; None if there is none.
        label: description, e.g. "expert" or "highest of 8".
    """

    question: str
    completion: str
    scores: TokenScores
    correct: bool | None
    answer: str | None
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Content of a report.

    Attributes:
        title: heading of the page.
        summary: one sentence: what was run, and the result.
        verdict: HTML below it, see `verdicts.verdict_html`; empty for none.
        command: the command that started the run.
        tables: shown in this order.
        metrics: rows of `metrics.jsonl`; rows with `phase == "warmup"` are indexed by `update`, the others by `step`.
            Keys listed in `PANELS` are plotted if present; None and NaN leave gaps.
        rewards_correct: trace rewards (log-odds) of correct traces, for the histogram.
        rewards_wrong: trace rewards of wrong traces.
        traces: shown as token heatmaps on a common colour scale; consecutive traces of a question share its heading.
        config: the resolved configuration; not shown if None.
        figures: title and svg of additional figures.
    """

    title: str
    summary: str
    command: str
    verdict: str = ""
    tables: Sequence[Table] = ()
    metrics: Sequence[dict] = ()
    rewards_correct: Sequence[float] = ()
    rewards_wrong: Sequence[float] = ()
    traces: Sequence[ScoredTrace] = ()
    config: dict | None = None
    figures: Sequence[dict[str, Any]] = ()


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write a report as one HTML file that needs no network. On failure an existing report is kept."""
    limit = _common_limit(report.traces)
    warmup = [row for row in report.metrics if row.get("phase") == "warmup"]
    training = [row for row in report.metrics if row.get("phase") != "warmup"]
    html = page_template("report.html.jinja").render(
        title=report.title,
        summary=report.summary,
        command=report.command,
        verdict=report.verdict,
        tables=[table_view(table) for table in report.tables],
        curves=[
            (heading, figures)
            for heading, figures in (
                ("Training", curves(training, "step")),
                ("Warm-up of the discriminator", curves(warmup, "update")),
            )
            if figures
        ],
        histogram=histogram(report.rewards_correct, report.rewards_wrong),
        figures=report.figures,
        questions=[
            (question, [_trace_view(trace, limit) for trace in group])
            for question, group in groupby(report.traces, key=lambda trace: trace.question)
        ],
        limit=_digits(limit),
        config=_config_text(report.config),
        heatmap_css=HEATMAP_CSS,
        palette_css=palette_css(),
    )
    # A lone surrogate (a broken escape in a data file) cannot be encoded as UTF-8; it becomes a question mark.
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"))


def _common_limit(traces: Sequence[ScoredTrace]) -> float:
    """The largest |reward| of all tokens, so that colours are comparable across traces; 1 if there are no tokens."""
    sizes = [abs(reward) for trace in traces for reward in trace.scores.rewards if math.isfinite(reward)]
    return max(sizes, default=0.0) or 1.0


def palette_css() -> Markup:
    """The legend's colours as CSS variables, for light and dark pages."""

    def variables(dark: bool) -> str:
        names = (("low", -1.0), ("zero", 0.0), ("high", 1.0))
        return " ".join(f"--{name}: {reward_colour(value, 1.0, dark)};" for name, value in names)

    return Markup(
        f":root {{ {variables(False)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(True)} }} }}"
    )


def _trace_view(trace: ScoredTrace, limit: float) -> dict[str, Any]:
    """Template variables of one trace."""
    scores = trace.scores
    return {
        "label": trace.label,
        "answer": trace.answer,
        "correct": trace.correct,
        "mean": signed(scores.aggregate("mean")) if scores.rewards else "–",
        "heatmap": token_spans(scores, limit, trace.completion),
        "steps": _step_rows(trace, limit),
    }


def _step_rows(trace: ScoredTrace, limit: float) -> list[dict[str, Any]]:
    """One row per step: its text, mean reward and colours; with several steps, the lowest is marked."""
    scores = trace.scores
    rewards = scores.step_rewards()
    lowest = next(iter(lowest_steps(rewards)), None) if len(rewards) > 1 else None
    rows: list[dict[str, Any]] = []
    start = 0
    for end, is_end in enumerate(scores.step_ends):
        if is_end:
            reward = rewards[len(rows)]
            text = trace.completion[scores.offsets[start][0] : scores.offsets[end][1]]
            rows.append(
                {
                    "text": text.strip(),
                    "reward": signed(reward),
                    "light": reward_colour(reward, limit),
                    "dark": reward_colour(reward, limit, dark=True),
                    "lowest": len(rows) == lowest,
                }
            )
            start = end + 1
    return rows


# --- numbers ---


def _digits(value: float) -> str:
    """A magnitude with up to two decimals, without trailing zeros, e.g. ``3.2``."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _config_text(config: dict | None) -> str:
    """The configuration as YAML; values without a YAML type (paths) as text. Empty if there is no configuration."""
    if not config:
        return ""
    plain = json.loads(json.dumps(config, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
