"""The page of `tracereward audit`: one demonstration at a time, to be marked keep, fix or drop with the keyboard.

It needs no network. Marks stay in the browser, and are exported as the file that ``--drop`` reads.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tracereward.files import atomic_write_text
from tracereward.reports.inspection import visible
from tracereward.reports.pages import csp_hash, embedded_json, page_template
from tracereward.reports.report import palette_css
from tracereward.rewards.heatmap import HEATMAP_CSS

_DIGITS = 2


def write_audit(
    path: str | os.PathLike, rows: Sequence[dict[str, Any]], title: str, *, order: str, command: str
) -> None:
    """Write audited demonstrations as one HTML file. On failure an existing page is kept.

    Args:
        path: the output file.
        rows: of ``audit.jsonl``, the most suspicious one first.
        title: the page's heading.
        order: how they are ordered, in words.
        command: the command that made the page.
    """
    here = Path(__file__).parent
    texts = [(here / name).read_text(encoding="utf-8") for name in ("inspection.css", "audit.css", "audit.js")]
    css = f"\n{HEATMAP_CSS}{palette_css()}\n{texts[0]}\n{texts[1]}"
    script = "\n" + texts[2]
    shown = [_shown(row) for row in rows]
    rewards = [abs(step["reward"]) for row in shown for step in row["steps"] if step["reward"] is not None]
    name = hashlib.sha256("".join(row["id"] for row in rows).encode()).hexdigest()[:16]
    html = page_template("audit.html.jinja").render(
        title=visible(title),
        command=visible(command),
        order=visible(order),
        css=Markup(css),
        css_hash=csp_hash(css),
        script=Markup(script),
        script_hash=csp_hash(script),
        data=embedded_json({"name": name, "limit": max(rewards, default=0.0) or 1.0, "rows": shown}),
        count=len(rows),
        scored=bool(rewards),
    )
    atomic_write_text(path, html)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a row: text escaped by `visible` where it is shown, and as it is where it is exported."""
    return {
        "id": row["id"],
        "source": visible(str(row["source"])),
        "question": visible(_text(row["prompt"])),
        "answer": None if row["answer"] is None else visible(row["answer"]),
        "reward": _rounded(row.get("reward")),
        "log_prob": _rounded(row.get("logprob")),
        "lowest": row.get("lowest_step"),
        "findings": [visible(finding["text"]) for finding in row["findings"]],
        "steps": [
            {
                "text": visible(step["text"].strip("\n")),
                "reward": _rounded(step.get("reward")),
                "log_prob": _rounded(step.get("logprob")),
            }
            for step in row["steps"]
        ],
        "export": {"prompt": row["prompt"], "completion": row["completion"]},
    }


def _text(prompt: Any) -> str:
    """A prompt as text; a conversation as ``role: content`` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
