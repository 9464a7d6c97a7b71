"""Tables of pages: means over seeds as text, and frames of texts as Markdown."""

import math

import numpy as np
import pandas as pd

from tracereward.metrics import mean_interval


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


def mean(values: pd.Series, digits: int = 1) -> str:
    """Mean over seeds, with its interval."""
    return cell(mean_interval(values), digits)


def difference(values: pd.Series, digits: int = 1) -> str:
    """Mean over seeds of a difference."""
    return signed(mean_interval(values), digits)


def percent(values: pd.Series) -> str:
    """Mean over seeds of a share, in %."""
    return mean(100 * values.astype(float))


def points(values: pd.Series) -> str:
    """Mean over seeds of a difference of shares, in points."""
    return difference(100 * values.astype(float))


def paired(values: pd.Series) -> str:
    """`points` of the seeds that have a partner; nothing without any."""
    return points(values.dropna()) if values.notna().any() else ""


def counted(flags: pd.Series) -> str:
    """How many of how many."""
    return f"{np.count_nonzero(flags)}/{len(flags)}"


def table(corner: str, frame: pd.DataFrame) -> str:
    """A Markdown table of texts; the index is the first column, all others are to the right, what is missing is blank.

    Args:
        corner: heading of the index.
        frame: texts; its columns' names are headings.
    """
    rows = frame.astype(object).where(frame.notna(), "")
    lines = ["| " + " | ".join([corner, *map(str, frame.columns)]) + " |", "|---" + "|---:" * len(frame.columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows.itertuples())])
