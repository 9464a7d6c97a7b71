"""The ranking of one question's candidates: a list that shows itself in a notebook."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from pandas import DataFrame


class Ranking(list[tuple[int, float]]):
    """Pairs of a candidate's index and its trace reward in log-odds, best first.

    Args:
        pairs: the list.
        candidates: the texts that the indices are of.
    """

    def __init__(self, pairs: Iterable[tuple[int, float]], candidates: Sequence[str]):
        super().__init__(pairs)
        self.candidates: list[str] = list(candidates)

    def to_pandas(self) -> "DataFrame":
        """A row for each candidate, best first: candidate (its index), reward, text."""
        from pandas import DataFrame

        return DataFrame(
            [(index, reward, self.candidates[index]) for index, reward in self],
            columns=["candidate", "reward", "text"],
        )

    def _repr_html_(self) -> str:
        """A table, best first."""
        row = Markup(
            "<tr><td>{}</td><td>{:+.2f}</td>"
            '<td style="text-align:left"><pre style="margin:0;white-space:pre-wrap">{}</pre></td></tr>'
        )
        rows = Markup("").join(row.format(index, reward, self.candidates[index]) for index, reward in self)
        head = Markup("<tr><th>candidate</th><th>reward</th><th>text</th></tr>")
        return str(Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(head, rows))
