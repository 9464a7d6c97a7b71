"""Tables of pages: means with their intervals, and Markdown."""

import math
from collections.abc import Sequence


def cell(interval: tuple[float, float, float], digits: int = 1) -> str:
    """``mean ± half the interval``; the mean alone where one seed has no interval."""
    mean, low, high = interval
    if math.isnan(mean):
        return "undefined"
    half = (high - low) / 2
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def signed(interval: tuple[float, float, float], digits: int = 1) -> str:
    """A difference; bold where its interval excludes 0."""
    mean, low, high = interval
    text = ("+" if mean >= 0 else "") + cell(interval, digits)
    return f"**{text}**" if low > 0 or high < 0 else text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
