"""Markdown tables, and means over seeds as text."""

import math

import numpy as np
import pandas as pd

from tracereward.metrics import mean_interval


def cell(interval: tuple[float, float, float], digits: int = 1) -> str:
    """``mean ± half the interval``; only the mean if there is one seed."""
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
    """Mean over seeds with its interval."""
    return cell(mean_interval(values), digits)


def difference(values: pd.Series, digits: int = 1) -> str:
    """Mean over seeds of a difference, with its interval."""
    return signed(mean_interval(values), digits)


def percent(values: pd.Series) -> str:
    """Mean over seeds of a share, in %."""
    return mean(100 * values.astype(float))


def points(values: pd.Series) -> str:
    """Mean over seeds of a difference of shares, in points."""
    return difference(100 * values.astype(float))


def paired(values: pd.Series) -> str:
    """`points` over seeds with a partner; empty if none has one."""
    return points(values.dropna()) if values.notna().any() else ""


def counted(flags: pd.Series) -> str:
    """``true/all``."""
    return f"{np.count_nonzero(flags)}/{len(flags)}"


def table(corner: str, frame: pd.DataFrame) -> str:
    """A Markdown table with the index as first column, other columns right-aligned and missing values blank.

    Args:
        corner: heading of the index.
        frame: cell texts; column names are headings.
    """
    rows = frame.astype(object).where(frame.notna(), "")
    lines = ["| " + " | ".join([corner, *map(str, frame.columns)]) + " |", "|---" + "|---:" * len(frame.columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows.itertuples())])
