"""Data frames of selection among the SFT policy's samples, and differences to a baseline."""

from typing import Any

import pandas as pd


def ranking_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """Expand each cell's ``ranking`` into columns.

    Args:
        cells: with columns ``samples`` and ``ranking``.

    Returns:
        The cells with the accuracy of each selection method, the AUROCs, and ``plain``, the better accuracy of
        majority and log-prob.
    """
    n = cells["samples"].iloc[0]
    rows = pd.DataFrame([_row(ranking) for ranking in cells["ranking"]], index=cells.index)
    rows["plain"] = rows[[f"majority@{n}", f"log-prob best-of-{n}"]].max(axis=1)
    return cells.drop(columns=["ranking", *cells.columns.intersection(rows.columns)]).join(rows)


def _row(ranking: dict[str, Any]) -> dict[str, Any]:
    reached = {label: value for label, (value, _, _) in ranking["accuracy"].items()}
    return {**{name: value for name, value in ranking.items() if name != "accuracy"}, **reached}


def against(cells: pd.DataFrame, baseline: pd.DataFrame, alike: list[str]) -> pd.Series:
    """Accuracy of each cell minus that of the baseline cell with equal columns `alike`; nan without one."""
    partner = baseline.set_index(alike)["accuracy"].rename("partner")
    return cells["accuracy"] - cells.join(partner, on=alike)["partner"]


def with_control(lines: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Lines of a figure in legend order: the first, the control, then the others."""
    is_first = lines["line"] == lines["line"].iloc[0]
    return pd.concat([lines[is_first], control, lines[~is_first]])
