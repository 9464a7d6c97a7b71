r"""Extraction of final answers from traces.

Extraction never guesses. An answer counts only in an explicit form: ``\boxed{...}``, a ``#### ...`` line, a phrase such
as "the answer is (C)" or "Answer: 18", or a last line in bold. Each function tries its task's own form first and
documents the order; of one form the last occurrence that *is* an answer counts, so that a Markdown heading
(``#### Step 2``), an empty box or a sentence hides nothing. Without one the result is None, "no answer".
"""

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from tracereward.tasks.answers import YES_NO, calculation_result, is_words
from tracereward.tasks.quantities import MAX_LENGTH, read_quantity
from tracereward.tasks.spelling import plain_latex, unwrapped, without_text_commands, without_thousands

MAX_OCCURRENCES = 100
"""Occurrences of a form that are read, from the end of a text."""

_LEAD = re.compile(
    r"<answer>\s{0,4}|(?:\u7b54\u6848|\u7b54)\s?(?:\u662f|\u4e3a|[:\uff1a]){1,2}\s?"
    r"|(?:\A|\n)[ \t*]{0,4}(?:final\s)?answer[ \t*]{0,4}\s[-\u2013\u2014]\s"
    r"|(?:\A|\n)#{1,6}[ \t]{1,4}(?:the\s)?(?:final\s)?answer[ \t*:]{0,4}(?=\n)"
    r"|\*\*(?:final\s)?answer:?\*\*[ \t:]{0,4}|\b(?:answer|(?:correct|best|right)\s(?:answer|option|choice))"
    r"(?:\s(?:to|for)\s[^.\n:]{1,80}?)?[ \t*_]{0,4}"
    r"(?:\b(?:is|was|would\sbe|should\sbe|must\sbe|will\sbe|becomes)\b(?!n't|\snot\b)|[:=])[ \t:*_]{0,6}"
    r"(?:(?:therefore|thus|then|simply|just|indeed|clearly|now|equal\sto|given\sby)\s)?",
    flags=re.I,
)
_MONEY_SCALE = re.compile(r"\$\s?[\d.,]+\s?(?:[kKMB]|bn|mn)\b")
_INNER_LEAD = re.compile(
    r"\A(?:\W{0,4}(?:(?:so|thus|hence|therefore|and)\W{1,2})?(?:the\s)?(?:final\s|correct\s)?"
    r"(?:answer|solution|result|total|sum|conclusion)\s{0,2}(?:is\b|:|=)[\s:*_]{0,6}){1,2}",
    flags=re.I,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}(?:\{|(\w)(?!\w))")
_HASHES = re.compile(r"####(?!#)[ \t]*([^\n]*)")
_LAST_BOLD = re.compile(r"(?:\A|\n)[ \t]*(?:\*\*([^*\n]+)\*\*|\$\$?([^$\n]+)\$\$?|\\\[([^\n]+)\\\])[ \t.]*\s*\Z")
_REASONS = (
    r"since|because|as|so|which|where|who|when|while|given|thus|therefore|hence|making|giving|after|that|meaning|for|not"
    r"|but|if|i\.e|e\.g|due|assuming"
)
_CLAUSE_END = re.compile(
    rf"[.!?]\s*\Z|[.!?;](?=\s)|,?\s(?:{_REASONS})\b|,\s(?:the|an?|and)\s|,\s(?=(?-i:[a-z]{{2,}})\b(?!\s*[=<>]))"
    r"|\s[-\u2013\u2014]{1,2}\s(?=[A-Za-z]{2})",
    flags=re.I,
)
_NUMBER_END = re.compile(r"(?:,\s+|\s+\(|:\s+)(?=[A-Za-z]{2})")
_HEADING = re.compile(
    r"(?:\d{1,2}|[IVX]{2,4})[.):]\s+\S|(?:step|part|case|stage|section|question|problem|example|note|method|approach)s?\b",
    flags=re.I,
)
_CALCULATION = re.compile(
    r"[^A-Za-z=]{0,40}\d[^=]*[-+*/^\u00d7\u00f7\u2212(][^=]*=|[^A-Za-z=]{0,40}\d[^=]*\s[xX]\s[^=]*="
)
_NO_WORDS = re.compile(
    r"(?:not|correct|incorrect|right|wrong|as\sfollows|clear|obvious|below|above|shown|given|found)\b", flags=re.I
)
_SEVERAL = (
    r"(?:(?:\s*(?:,|/|&|;|\band\b|\bor\b|\bbut also\b)\s*)+(?:both\s+)?|(?<=[)\]])\s?(?=\([A-J]\)))"
    r"(?:\([A-J]\)|[A-J](?=\s*(?:[.,;:)]|\Z|\n|and\b|or\b)))"
)
_LETTER = re.compile(
    r"\s*(?:(?i:option|choice|letter|answer)s?\s+)?(?:both\s+|either\s+)?(?:[\[(]\s*([A-Ja-j])\s*[\])]|"
    rf"([A-J])(?=\s*\Z|\s*[.,;:!?)\]}}/&\n\"']|\s+(?:{_REASONS}|and|or)\b|\s+[-\u2013\u2014(]))",
)
_MORE_LETTERS = re.compile(rf"[).\]]*{_SEVERAL}")
_YES_NO = re.compile(
    rf"\W*(yes|no|true|false)(?=\s*\Z|\s*[.,;:!?)\n*\"']|\s+(?:{_REASONS})\b|\s+[-\u2013\u2014(])", flags=re.I
)
_SEVERAL_LETTERS = ""
"""What `_letter` returns for "(A) and (C)": a statement, but no answer."""

_QUOTES = re.compile("[\u201c\u201d\u2018\u2019\u300c\u300d]")
_END = re.compile(r"</(?:answer|s|think)>|<(?:eos|end_of_turn|pad)>|<\|[A-Za-z_]{2,20}\|>|####")
"""What ends an answer on its line: a closing tag or a model's end mark."""

Reader = Callable[[str], str | None]


def _last(form: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The last occurrences of a form from the end on: a text that repeats it forever must not take forever."""
    return reversed(deque(form.finditer(text), maxlen=MAX_OCCURRENCES))


def boxes(text: str) -> Iterator[str | None]:
    r"""Contents of ``\boxed{...}`` from the last to the first, braces balanced; None for an unclosed one."""
    for found in _last(_BOX, text):
        if found[1]:
            yield found[1]
            continue
        depth, at, start = 1, found.end(), found.end()
        # An answer is short: a box that stays open must not make the search quadratic.
        end = min(len(text), start + 10 * MAX_LENGTH)
        while at < end and depth:
            if text[at] == "\\":  # an escaped brace is a character of the answer, not a group
                at += 2
                continue
            depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        yield text[start : at - 1].strip() if depth == 0 else None


def extract_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` that is not empty; None if there is none, or the last one is unclosed."""
    for content in boxes(text):
        if content is None:
            return None
        if content:
            return content
    return None


def hashes(text: str) -> Iterator[str]:
    """What follows ``####`` on its line, from the last line to the first; not the headings."""
    for found in _last(_HASHES, text):
        line = _END.split(found[1])[0].strip()
        if line and not _HEADING.match(unwrapped(line)) and not line.endswith(":"):
            yield line[: 10 * MAX_LENGTH]


def extract_hashes(text: str) -> str | None:
    """Text after the last ``####`` that is no heading: without ``$``, emphasis, thousands separators and full stop.

    The result need not be a number ("18 apples"); the comparison decides.
    """
    return next((found for found in map(_tidy, hashes(text)) if found), None)


def phrases(text: str) -> Iterator[str]:
    """What follows "the answer is" or "Answer:" on its line (if empty, the next one), from the last to the first."""
    for found in _last(_LEAD, text):
        rest = text[found.end() : found.end() + 4 * MAX_LENGTH]
        line, _, after = _END.split(rest)[0].partition("\n")
        if line.strip(" \t*_$"):
            yield line
        elif re.search(r"[:#]|\*\*", found[0]) or "$$" in line or after.lstrip().startswith((r"\[", "$")):
            yield next((one for one in after.split("\n")[:4] if one.strip(" \t*_$") and one.strip() != r"\["), "")


def last_bold(text: str) -> Iterator[str]:
    """The last line, if it is nothing but bold text or a formula."""
    found = _LAST_BOLD.search(text[-2 * MAX_LENGTH :])
    if found:
        yield found[1] or found[2] or found[3]


def _first(read: Reader, forms: Iterable[Iterable[str | None]]) -> str | None:
    """The first answer that `read` finds: in the first form that has one, its last occurrence."""
    for form in forms:
        for raw in form:
            found = read(raw) if raw else None
            if found is not None:
                return found or None
    return None


def extract_number(text: str) -> str | None:
    r"""Answer of word problems: ``#### n``, then ``\boxed{n}``, "the answer is n", then a last line in bold."""
    return _first(_number, [hashes(text)]) or _boxed(text) or _first(_number, [phrases(text), last_bold(text)])


def extract_math(text: str) -> str | None:
    r"""Answer of mathematics: ``\boxed{...}``, then ``#### ...``, "the answer is ...", then a last line in bold."""
    return _boxed(text) or _first(_mathematics, [hashes(text), phrases(text), last_bold(text)])


def extract_letter(text: str) -> str | None:
    r"""Choice A to J: "the answer is (C)" or "the answer is C.", then ``\boxed{C}``, ``#### C``, a last line ``**C**``.

    Upper case. A bare letter must be a capital and end its clause: "the answer is a matter of taste" has no answer, nor
    has "(A) and (C)".
    """
    boxed = (f"\\boxed{{{content}}}" for content in boxes(text) if content)  # only a box may hold a small letter
    return _first(_letter, [phrases(text), boxed, _letter_hashes(text), last_bold(text)])


def _letter_hashes(text: str) -> Iterator[str]:
    """A ``####`` line with nothing but a letter, or with an option as the last line: "#### A. Setup" is a heading."""
    yield from _closing_hashes(text)
    yield from (line for line in hashes(text) if len(_tidy(line).strip("()")) == 1)


def extract_yes_no(text: str) -> str | None:
    r"""``yes`` or ``no``: "the answer is yes." (or no, true, false), then ``\boxed{yes}``, then ``#### yes``."""
    return _first(_yes_or_no, [phrases(text), boxes(text), hashes(text), last_bold(text)])


def extract_any(text: str) -> str | None:
    r"""Answer in any form: ``\boxed{...}``, ``#### ...``, then "the answer is (C)" or "the answer is <a clause>."."""
    answer = _boxed(text) or _first(_mathematics, [hashes(text)]) or _first(_any, [_closing_hashes(text)])
    return answer or _first(_any, [phrases(text)]) or _first(_mathematics, [last_bold(text)])


def extract_span(text: str) -> str | None:
    r"""Free text: the rest of the line after the last "the answer is", then ``\boxed{...}``, then ``#### ...``.

    The rest of the line, not of the clause as in `extract_any`: names and dates contain full stops and commas.
    """
    lines = (text[found.end() : found.end() + 4 * MAX_LENGTH].split("\n")[0] for found in _last(_LEAD, text))
    return _first(_span, [lines, boxes(text), hashes(text)])


def _boxed(text: str) -> str | None:
    found = extract_boxed(text)
    return found and (_INNER_LEAD.sub("", unwrapped(found)) or None if _INNER_LEAD.match(unwrapped(found)) else found)


def _closing_hashes(text: str) -> Iterator[str]:
    """A ``####`` line in words counts only if nothing follows it: otherwise it is a heading."""
    found = next(_last(_HASHES, text), None)
    if found and not text[found.end() :].strip():
        yield from hashes(text[found.start() :])


def _tidy(raw: str) -> str:
    """An answer without emphasis, delimiters, "Answer:", currency and thousands separators, and a final full stop."""
    bare = _INNER_LEAD.sub("", unwrapped(extract_boxed(raw) or raw)).strip().removesuffix(".")
    bare = unwrapped(bare)
    if not _MONEY_SCALE.search(bare):  # the k of $2.5k is no unknown
        bare = bare.replace("\\$", "").replace("$", "")
    bare = bare.strip().removeprefix("=").strip().removesuffix(".").strip()
    return without_thousands(bare)


def _mathematics(raw: str) -> str | None:
    """The mathematical answer that a line starts with; None for headings, words and sentences."""
    whole = _tidy(raw)
    if not whole:
        return None
    if _CALCULATION.match(whole) and not _HEADING.match(whole):
        result = calculation_result(unwrapped(raw))
        if result:
            return _tidy(result)
    end = _CLAUSE_END.search(whole)
    for part in (whole[: end.start()] if end else whole, whole):
        aside = _NUMBER_END.search(part)
        before = part[: aside.start()] if aside else ""
        # "18 (eighteen)", "18: ..."
        for head in (before, part) if read_quantity(before) else (part, before):
            head = re.sub(r"\s(?:and|or)\Z", "", head.strip().rstrip(".!?,;:"))
            if head and is_mathematics(head):
                return without_thousands(head)
    return None


def _number(raw: str) -> str | None:
    """As `_mathematics`, but an answer without digits or number words is none."""
    found = _mathematics(raw)
    return found if found and (re.search(r"\d", found) or read_quantity(found)) else None


def is_mathematics(answer: str) -> bool:
    """Whether an answer is a quantity, or mathematics without prose."""
    if len(answer) > MAX_LENGTH:
        return False
    if read_quantity(answer) is not None:
        return True
    text = plain_latex(answer)
    if not text or is_words(text):
        return False
    prose = re.sub(r"\\[A-Za-z]+|\{[^{}]*\}", " ", text)
    if "=" in text:  # 9 apples + 9 apples = 18 apples
        first, last = text.split("=", 1)[0], text.rsplit("=", 1)[1]
        started = not re.match(r"[A-Za-z]{2}", first) or is_words(first.strip())  # not "Adding both: 9 + 9 = 18"
        return (started and read_quantity(last) is not None) or not re.search(r"[A-Za-z]{3}", prose)
    return not re.search(r"(?!(?:and|sin|cos|tan|log|exp|sqrt|min|max|mod)(?![A-Za-z]))(?<![A-Za-z])[A-Za-z]{3}", prose)


def _letter(raw: str) -> str | None:
    r"""The choice that a statement starts with; `_SEVERAL_LETTERS` for several."""
    inner = extract_boxed(raw)
    text = unwrapped(without_text_commands(inner or raw).strip().removesuffix("."))
    text = unicodedata.normalize("NFKC", _INNER_LEAD.sub("", text).replace("$", "").replace("\\", " "))
    text = _QUOTES.sub('"', text).lstrip("\"'`{* ")
    lower = re.fullmatch(r"\(?([a-j])\)?", text.strip(" .}"))
    if lower and inner:
        return lower[1].upper()
    found = _LETTER.match(text)
    if not found:
        return None
    if _MORE_LETTERS.match(text, found.end()):
        return _SEVERAL_LETTERS
    return (found[1] or found[2]).upper()


def _yes_or_no(raw: str) -> str | None:
    inner = extract_boxed(raw)
    found = _YES_NO.match(unwrapped(without_text_commands(inner or raw)))
    return YES_NO[found[1].casefold()] if found else None


def _any(raw: str) -> str | None:
    """A letter, else mathematics, else the words of a clause."""
    found = _letter(raw)
    if found is not None:
        return found
    return _mathematics(raw) or _words(raw)


def _words(raw: str) -> str | None:
    text = _tidy(raw)
    end = _CLAUSE_END.search(text)
    text = (text[: end.start()] if end else text).strip(" *_,;")
    return text if not _NO_WORDS.match(text) and re.search(r"\w", text) and len(text) <= MAX_LENGTH else None


def _span(raw: str) -> str | None:
    inner = extract_boxed(raw)
    text = (inner or raw).strip("*_ \t").removesuffix(".").strip("*_ \t")
    return text if re.search(r"\w", text) else None
