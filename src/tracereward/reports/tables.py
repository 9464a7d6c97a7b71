"""Result tables in the terminal: on stdout, or on stderr when stdout carries data."""

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

WIDTH = 120
"""Columns if the output is not a terminal."""
AUROC_LABELS = {"reward": "reward", "logprob": "log-prob", "reward_logprob": "reward + log-prob"}


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: its heading.
        columns: one name per column.
        rows: cells; None and NaN are shown as a dash.
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


def is_numeric(column: list[str | float | int | None]) -> bool:
    """Whether all cells are numbers, including strings such as ``71.3 ± 0.4`` or ``[0.61, 0.69]``."""
    held = [cell for cell in column if cell is not None and cell != ""]
    return bool(held) and all(
        re.fullmatch(r"[\d\s.,:%±+\-−–/×()\[\]]*\d[\d\s.,:%±+\-−–/×()\[\]]*", cell)
        if isinstance(cell, str)
        else not isinstance(cell, bool)
        for cell in held
    )


def column_text(column: list[str | float | int | None]) -> list[str]:
    """Format a column's cells; its floats get the same number of decimals."""
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


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def interval(low: float, high: float) -> str:
    """A 95 % interval in percent."""
    return f"[{percent(low)}, {percent(high)}]"


def _console(stdout: bool) -> Console:
    """A console that prints data verbatim: no rich markup (a model may be called ``[/x]``) and no emoji."""
    width = WIDTH if stdout and not sys.stdout.isatty() else None
    return Console(file=sys.stdout if stdout else sys.stderr, width=width, markup=False, emoji=False)


def _auroc(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def print_ranking(summary: dict[str, Any]) -> None:
    """Print the result of `commands.rerank.summary` on stderr: stdout may carry the rows."""
    console = _console(stdout=False)
    table = RichTable(title=f"Choosing one of the candidates, {summary['questions']} questions", title_justify="left")
    table.add_column("method")
    table.add_column("accuracy %", justify="right")
    table.add_column("95 % interval", justify="right")
    for label, (accuracy, low, high) in summary["accuracy"].items():
        table.add_row(label, percent(accuracy), interval(low, high))
    console.print(table)
    for name, label in AUROC_LABELS.items():
        if f"{name}_auroc" in summary:
            pooled, within = summary[f"{name}_auroc"], summary[f"{name}_auroc_within_prompt"]
            text = f"AUROC of {label}: {_auroc(pooled)} pooled, {_auroc(within)} within the prompt"
            console.print(text, highlight=False)
    if summary["verdict"] is not None:
        console.print(f"Verdict: {summary['verdict']['line']}", highlight=False, soft_wrap=True)
    if summary["no_answer"]:
        console.print(f"{summary['no_answer']} candidates have no answer in the task's format", highlight=False)


def print_tables(tables: list[Table], *, stdout: bool = True) -> None:
    """Print a report's tables on stdout, or on stderr where stdout carries data."""
    console = _console(stdout)
    for found in tables:
        columns = [[row[i] for row in found.rows] for i in range(len(found.columns))]
        table = RichTable(title=found.title, title_justify="left")
        for name, column in zip(found.columns, columns, strict=True):
            table.add_column(name, justify="right" if is_numeric(column) else "left")
        for cells in zip(*map(column_text, columns), strict=True):
            table.add_row(*cells)
        console.print(table)
        if found.note:
            console.print(found.note, highlight=False)
