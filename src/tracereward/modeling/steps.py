r"""How a trace is cut into steps: one rule for supervision, rewards, perturbations, guided decoding and display.

A rule is a function of the text alone, so that training, scoring and serving cut alike. By ``delimiter`` every
occurrence of a text ends a step. The other rules leave Markdown code blocks and display formulas (``\[...\]``,
``$$...$$``, ``\begin{...}...\end{...}``) whole; one that is not closed goes up to the end of the text, so that what is
written later does not move an earlier cut.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tracereward.errors import InputError, check_choice, check_text

NAMED = ("line", "blank", "numbered", "sentence")
"""Rules with a name; any other value of ``steps`` is a regular expression."""
JOINTS = {"line": "\n", "blank": "\n\n", "numbered": "\n", "sentence": " "}
"""What is written between steps that are given one by one."""

_LINE = re.compile(r"\n(?:[^\S\n]*\n)*")
_BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")
# "Step 2:", "### Step 2", "**Step 2.**", and "2. ", "2) ", "(2) ", "**2.** ". Deeper than a space is a nested list.
_LABEL = re.compile(
    r"^[ ]?(?:\#{1,6}[ ]+)?[*_]{0,3}"
    r"(?:(?P<step>step[ ]+[0-9]{1,3}(?=[ ]*(?:[.:)*_\u2013\u2014-]|$)))|\(?[0-9]{1,3}[.):][*_]{0,3}(?=[ \t]+\S))",
    re.MULTILINE | re.IGNORECASE,
)
_WIDE = "\u3002\uff01\uff1f"  # full stops of Chinese and Japanese, without white space behind them
_SEVERAL = ("..", ".!", ".?")
_SENTENCE = re.compile(rf"[.!?\u2026]+[\"'\u201d\u2019)\]*_]*(?=\s)|[{_WIDE}]+[\u201d\u2019\u300d\u300f\uff09]*")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|cf|al|Fig|Eq|Eqs|Thm|Lem|[a-z]\.[a-z])"
    r"|(?:^[ \t]*[*_(]{0,3}|[.!?]\s+)(?:[0-9]{1,3}|[A-Z]))\.\Z",
    re.IGNORECASE | re.MULTILINE,
)
_OPENING = re.compile(
    r"^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})|(?<!\\)(?P<dollars>\$\$)|(?<!\\)(?P<bracket>\\\[)"
    r"|\\begin\{(?P<name>[^{}\n]+)\}",
    re.MULTILINE,
)
# A formula within a line opens before and closes behind a visible character, so that prices are none.
_INLINE = re.compile(r"(?<![\\$])\$(?=[^\s$])[^$\n]*?(?<=\S)\$(?![\d$])|\\\([^\n]*?\\\)|`[^`\n]+`")


@dataclass(frozen=True)
class StepRule:
    r"""Where the steps of a trace end.

    Attributes:
        delimiter: the text that ends a step if `steps` is "".
        steps: ``line``; ``blank``: at blank lines; ``numbered``: before each "1.", "(2)" or "Step 3:" that starts a
            line, of the kind that comes first; ``sentence``: at the end of a line, or behind ``.``, ``!`` or ``?``
            (not of an abbreviation or an inline formula) before white space and no small letter; or a regular
            expression of what ends a step.

    Raises:
        InputError: the delimiter is empty, or `steps` is no rule.
    """

    delimiter: str = "\n"
    steps: str = ""

    def __post_init__(self) -> None:
        if not check_text("step_delimiter", self.delimiter):
            raise InputError("step_delimiter is empty: give the text that ends a step, or leave it out for the task's")
        if not check_text("steps", self.steps) or self.steps in NAMED:
            return
        if re.fullmatch(r"\w+", self.steps):
            check_choice("steps", self.steps, NAMED)
        try:
            pattern = re.compile(self.steps)
        except re.error as error:
            raise InputError(
                f"steps {self.steps!r} is none of {', '.join(NAMED)}, and no regular expression: {error}"
            ) from error
        if pattern.search(""):
            raise InputError(_empty(self.steps))

    @property
    def joint(self) -> str:
        """What is written between steps that are given one by one."""
        return JOINTS.get(self.steps, self.delimiter)

    def cuts(self, text: str) -> list[int]:
        """The place of the first character of each step but the first, increasing.

        There is text on both sides of a cut: neither blank lines nor what ends the trace make a step. White space at
        the end of a delimiter such as ". " starts the next step, because most tokenizers put it into the next word's
        token.
        """
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        return [_behind(text, *final) for start, final in self._runs(text) if start > first and final[1] < last]

    def pieces(self, text: str) -> list[tuple[int, int]]:
        """The characters of each step with white space around it, without the delimiter; blank ones are left out."""
        if self.steps:
            bounds = [0, *self.cuts(text), len(text)]
            pairs = list(itertools.pairwise(bounds))
        else:
            matches = re.finditer(re.escape(self.delimiter), text)
            bounds = [0, *itertools.chain.from_iterable(match.span() for match in matches), len(text)]
            pairs = list(zip(bounds[::2], bounds[1::2]))
        return [(start, end) for start, end in pairs if text[start:end].strip()]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each step, without white space around it and without the delimiter."""
        return [
            (end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip()))
            for start, end in self.pieces(text)
        ]

    def join(self, steps: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """One text of steps, and the characters of each step.

        A step that already ends with the visible part of the joint (the "." of ". ") gets only the rest of it.
        """
        joint = self.joint
        visible = joint.rstrip()
        text, spans = "", []
        for step in steps:
            if text:
                text += joint[len(visible) :] if visible and text.endswith(visible) else joint
            spans.append((len(text), len(text) + len(step)))
            text += step
        return text, spans

    def check(self, texts: Iterable[str]) -> None:
        """Check a rule that was asked for on the traces that it is asked for.

        Raises:
            InputError: it cuts none of them; or a regular expression matches nothing, or in several ways.
        """
        if not self.steps:
            return
        count = cut = 0
        for text in texts:
            count += 1
            cut += bool(self.cuts(text))
            if self.steps not in NAMED:
                _check_matches(re.compile(self.steps), text)
        if count and not cut:
            what = "matches in" if self.steps not in NAMED else "cuts"
            raise InputError(
                f"steps {self.steps!r} {what} none of the {count} demonstrations, so each would be one step: use "
                f"another rule ({', '.join(NAMED)}, or a regular expression of what ends a step)"
            )

    def _runs(self, text: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """What separates two steps: its start and, as a span, its last part; parts without text between are one run."""
        if not self.steps:
            delimiter = re.escape(self.delimiter)
            matches = re.finditer(rf"(?:{delimiter}\s*?)*{delimiter}", text)
            yield from ((match.start(), match.span()) for match in matches)
            return
        blocks = _blocks(text)
        if self.steps == "sentence":
            blocks = sorted([*blocks, *(match.span() for match in _INLINE.finditer(text))])
        parts = _outside(self._parts(text), blocks)
        run: tuple[int, tuple[int, int]] | None = None
        for part in _of_one_kind(text, parts) if self.steps == "numbered" else parts:
            if run is not None and text[run[1][1] : part[0]].strip():
                yield run
                run = None
            run = (part[0] if run is None else run[0], part)
        if run is not None:
            yield run

    def _parts(self, text: str) -> Iterator[tuple[int, int]]:
        if self.steps == "sentence":
            return iter(sorted([*_sentences(text), *(match.span() for match in _LINE.finditer(text))]))
        if self.steps == "numbered":
            return ((match.start(), match.start()) for match in _LABEL.finditer(text))
        pattern = {"line": _LINE, "blank": _BLANK}.get(self.steps) or re.compile(self.steps)
        return (match.span() for match in pattern.finditer(text) if match[0])


def check_steps(delimiter: str | None, steps: str | None) -> None:
    """Refuse options that are no rule; None stands for a default.

    Raises:
        InputError: see `StepRule`, or `steps` is empty.
    """
    if steps == "":
        raise InputError(f"steps is empty: give one of {', '.join(NAMED)}, a regular expression, or leave it out")
    StepRule(delimiter="\n" if delimiter is None else delimiter, steps=steps or "")


LINES = StepRule()
"""Steps that end with a newline."""


def _behind(text: str, start: int, end: int) -> int:
    """Where the next step starts: behind the visible part of what ended a step, or behind all of it."""
    return start + len(text[start:end].rstrip()) if text[start:end].strip() else end


def _of_one_kind(text: str, labels: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The labels of the first one's kind: "Step 1:" or "1."."""
    first: bool | None = None
    for span in labels:
        label = _LABEL.match(text, span[0])
        of_step = label is not None and label["step"] is not None
        first = of_step if first is None else first
        if of_step == first:
            yield span


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    for match in _SENTENCE.finditer(text):
        mark, at = match[0], match.start()
        if mark[0] in _WIDE:
            yield match.span()
            continue
        behind = text[match.end() : match.end() + 100].lstrip()
        before = ("x" if at > 20 else "") + text[max(0, at - 20) : at + 1]  # "x": a line does not start here
        if not behind[:1].islower() and (mark[:2] in _SEVERAL or mark[0] != "." or not _ABBREVIATION.search(before)):
            yield match.span()


def _blocks(text: str) -> list[tuple[int, int]]:
    """Spans of code blocks and display formulas."""
    found: list[tuple[int, int]] = []
    at = 0
    while opening := _OPENING.search(text, at):
        at = _closing(text, opening)
        found.append((opening.start(), at))
    return found


def _closing(text: str, opening: re.Match[str]) -> int:
    """Where a block ends."""
    if opening["name"]:
        name = re.escape(opening["name"])
        depth = 1
        for mark in re.compile(rf"\\(begin|end)\{{{name}\}}").finditer(text, opening.end()):
            depth += 1 if mark[1] == "begin" else -1
            if not depth:
                return mark.end()
        return len(text)
    if fence := opening["fence"]:
        pattern = re.compile(rf"^[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$", re.MULTILINE)
    else:
        pattern = re.compile(r"(?<!\\)\$\$" if opening["dollars"] else r"(?<!\\)\\\]")
    closing = pattern.search(text, opening.end())
    return closing.end() if closing else len(text)


def _outside(candidates: Iterable[tuple[int, int]], blocks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Candidates, in order, that do not end within a block."""
    place = 0
    for start, end in candidates:
        while place < len(blocks) and blocks[place][1] <= end:
            place += 1
        if place == len(blocks) or end <= blocks[place][0]:
            yield start, end


def _check_matches(pattern: re.Pattern[str], text: str) -> None:
    for match in pattern.finditer(text):
        if not match[0]:
            raise InputError(_empty(pattern.pattern))
        for start in range(match.start() + 1, match.end()):
            other = pattern.match(text, start)
            if other and other.end() > match.end():
                both = text[match.start() : other.end()]
                raise InputError(
                    f"steps {pattern.pattern!r} matches overlapping texts in {both[:60]!r}, so a step could end in "
                    "several places: match only what ends a step, and put what follows it into (?=...)"
                )


def _empty(pattern: str) -> str:
    return (
        f"steps {pattern!r} can match nothing, so that a step could end anywhere: match at least one character of what "
        r"ends a step, such as \n(?=Step)"
    )
