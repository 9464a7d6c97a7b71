"""What HTML pages share: the templates of this folder, embedded data, and tables as template variables."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tracereward.reports.tables import Table, column_text, is_numeric


def page_template(name: str) -> jinja2.Template:
    """A template of this folder: text is escaped, and a variable that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["code"] = _code
    return environment.get_template(name)


def _code(text: str) -> str:
    """HTML of a text: what stands in backticks, as on the cards, is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def embedded_json(value: Any) -> Markup:
    r"""JSON escaped for a ``<script>`` element: it cannot close the element or end a line of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def csp_hash(source: str) -> Markup:
    """The Content-Security-Policy source expression that allows exactly this text."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'")


def table_view(table: Table) -> dict[str, Any]:
    """Template variables of a table: text cells, and which columns are numeric."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    cells = [column_text(column) for column in columns]
    return {
        "title": table.title,
        "columns": list(zip(table.columns, map(is_numeric, columns))),
        "rows": [[column[i] for column in cells] for i in range(len(table.rows))],
        "note": table.note,
        "best": table.best,
    }
