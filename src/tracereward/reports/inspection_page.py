"""The page of `tracereward inspect`: one self-contained HTML file, with a question's candidates side by side.

An index of all traces comes first. The tokens of each trace are in a block of their own, which the page reads when the
trace is shown, so that a page of long traces opens at once, and is written without keeping them.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from markupsafe import Markup

from tracereward.files import atomic_file
from tracereward.reports.inspection import DIGITS, about_marks, colour_limit, contents, scored, visible
from tracereward.reports.pages import csp_hash, embedded_json, page_template, table_view
from tracereward.reports.report import palette_css
from tracereward.reports.tables import Table
from tracereward.rewards.heatmap import HEATMAP_CSS

BLOCKS = Markup("<!-- blocks -->")
"""Where blocks go in the rendered template; no text of a trace holds it, since all are escaped."""
FIRST_BYTES = 1 << 20
"""Blocks up to this size are before the script, so that it shows the first traces without waiting for the others."""


def write_inspection(
    path: str | os.PathLike,
    traces: Iterable[dict[str, Any]],
    title: str,
    *,
    command: str = "",
    threshold: float | None = None,
    lines: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> None:
    """Write scored traces as one HTML file that needs no network. On failure an existing page is kept.

    Memory use grows with the number of traces, not with their lengths.

    Args:
        path: the output file.
        traces: rows, see `contents`; those with the same prompt are shown side by side.
        title: the page's heading.
        command: the command that made the page, shown below the heading.
        threshold: mark the first step with a lower reward instead of the suspected error.
        lines: sentences above the traces.
        tables: below these.

    Raises:
        InputError: see `contents`.
    """
    with tempfile.TemporaryFile("w+b", dir=Path(path).absolute().parent) as blocks:
        index, facts = _write_blocks(blocks, traces, threshold)
        facts |= {"lines": list(map(visible, lines)), "tables": list(map(table_view, tables))}
        html = _page(index, title=visible(title), command=visible(command), **facts)
        start, script, end = html.split(BLOCKS)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            blocks.seek(0)
            file.write(start.encode())
            while blocks.tell() < FIRST_BYTES and (line := blocks.readline()):
                file.write(line)
            file.write(script.encode())
            shutil.copyfileobj(blocks, file, 1 << 20)
            file.write(end.encode())


def _write_blocks(
    blocks: IO[bytes], traces: Iterable[dict[str, Any]], threshold: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one block, a line, for each trace; return the page's index and the template's facts about all traces."""
    questions: dict[str, dict[str, Any]] = {}
    limit, count, ruled, checked, marked = 0.0, 0, False, False, False
    for new, trace in contents(traces, threshold):
        question = questions.setdefault(new["prompt"], {**new, "traces": []})
        tokens = list(scored(trace))
        limit = max(limit, colour_limit(piece[1] for piece in tokens) if tokens else 0.0)
        ruled |= trace.pop("ruled")
        checked |= trace["correct"] is not None
        marked |= any("s" in piece[2] for piece in tokens)
        held = {"id": count, "number": len(question["traces"]) + 1, "tokens": len(tokens)}
        question["traces"].append({**trace, **held, "steps": len(trace["steps"])})
        block = f'<script type="application/json" id="t{count}">{embedded_json(packed(trace["steps"]))}</script>\n'
        blocks.write(block.encode())
        count += 1
    limit = limit or 1.0
    facts = {"count": count, "checked": checked, "marked": marked, "suspected": about_marks(ruled, threshold)}
    return {"limit": limit, "questions": list(questions.values())}, {**facts, "limit": f"{limit:.2f}"}


def packed(steps: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The steps of a trace as flat lists, about half the size; the page's function `unpacked` is the inverse.

    Returns:
        The `text` of each piece; its `value` in 1e-4, or None; by its place the `kinds` of those that have some, "-"
        for text that no token covers; and for each step its reward and its number of pieces.
    """
    text, values, kinds, counts = [], [], {}, []
    for step in steps:
        counts.append([step["reward"], len(step["tokens"])])
        for piece, *token in step["tokens"]:
            reward, kind = token or (None, "-")
            if kind:
                kinds[len(text)] = kind
            text.append(piece)
            values.append(None if reward is None else round(reward * 10**DIGITS))
    return {"text": text, "values": values, "kinds": kinds, "steps": counts}


def _page(index: dict[str, Any], **given: Any) -> str:
    """The page without its blocks."""
    here = Path(__file__).parent
    css = f"\n{HEATMAP_CSS}{palette_css()}\n{(here / 'inspection.css').read_text(encoding='utf-8')}"
    script = "\n" + (here / "inspection.js").read_text(encoding="utf-8")
    return page_template("inspection.html.jinja").render(
        css=Markup(css),
        css_hash=csp_hash(css),
        script=Markup(script),
        script_hash=csp_hash(script),
        data=embedded_json(index),
        blocks=BLOCKS,
        **given,
    )
