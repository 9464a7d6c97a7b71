"""What HTML pages share: the templates of this folder, and tables as template variables."""

import html
import re
from pathlib import Path
from typing import Any

import jinja2

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
