"""The verdict on a reward model: stored in its folder, and as HTML for pages and Markdown for its model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tracereward.console import warn
from tracereward.errors import first_line
from tracereward.files import atomic_write_json, read_json, without_nan
from tracereward.modeling.model_folder import VERDICT_FILE
from tracereward.reports.pages import page_template, table_view
from tracereward.reports.tables import AUROC_LABELS, Table, column_text
from tracereward.verdict import Verdict, method_name

AUROC_COLUMNS = {
    "within_prompt": "within the prompt",
    "within_prompt_and_model": "within prompt and model",
    "length_matched": "at matched length",
    "pooled": "pooled",
}
NONE_STORED = "none stored with this reward model"


def write_verdict(folder: str | Path, verdict: Verdict | None) -> None:
    """Store a verdict as ``verdict.json`` in the folder of a reward model or a run; None removes an earlier one."""
    path = Path(folder) / VERDICT_FILE
    if verdict is None:
        path.unlink(missing_ok=True)
    else:
        atomic_write_json(path, without_nan(verdict.to_dict()))


def read_verdict(folder: str | Path) -> Verdict | None:
    """The verdict that is stored in a folder; None if there is none, or, with a warning, if it cannot be read."""
    path = Path(folder) / VERDICT_FILE
    try:
        return Verdict.from_dict(read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{path} cannot be read ({first_line(error)}): the reward model is used without its verdict")
        return None


def verdict_tables(verdict: Verdict) -> list[Table]:
    """The method against each baseline in points, and the AUROCs."""
    compared: list[list[Any]] = [
        [method_name(one.baseline), _points(one.difference), f"[{_points(one.low)}, {_points(one.high)}]"]
        for one in verdict.comparisons
    ]
    method = method_name(verdict.method)
    kinds = {kind: name for kind, name in AUROC_COLUMNS.items() if any(kind in one for one in verdict.aurocs.values())}
    if all(one.get("within_prompt_and_model") == one.get("within_prompt") for one in verdict.aurocs.values()):
        kinds.pop("within_prompt_and_model", None)  # one model wrote all traces
    aurocs = [
        [AUROC_LABELS.get(name, name), *(values.get(kind) for kind in kinds)] for name, values in verdict.aurocs.items()
    ]
    return [
        Table(f"{method} against", ["baseline", "gain, points", "95 % interval"], compared),
        Table("AUROC of correct against wrong traces", ["score", *kinds.values()], aurocs),
    ]


def verdict_html(verdict: Verdict | None, missing: str = NONE_STORED) -> Markup:
    """The verdict as an HTML section without styles; its classes are ``verdict``, ``line``, ``scroll`` and ``number``.

    Args:
        verdict: None if there is none.
        missing: what to say then.
    """
    return Markup(
        page_template("verdict.html.jinja").render(
            line=missing if verdict is None else verdict.line,
            about="" if verdict is None else verdict.about,
            tables=[] if verdict is None else [table_view(table) for table in verdict_tables(verdict)],
        )
    )


def verdict_markdown(verdict: Verdict | None, missing: str = NONE_STORED) -> str:
    """The verdict as a section of a model card; arguments as in `verdict_html`."""
    lines = ["", "## Verdict", ""]
    if verdict is None:
        return "\n".join([*lines, missing, ""])
    lines.append(f"**{verdict.line}**")
    if verdict.about:
        lines += ["", f"On {verdict.about}."]
    for table in verdict_tables(verdict):
        columns = [column_text([row[i] for row in table.rows]) for i in range(len(table.columns))]
        lines += ["", f"{table.title}:", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [_row(cells) for cells in zip(*columns, strict=True)]
    return "\n".join([*lines, ""])


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
