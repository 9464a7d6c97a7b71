"""Comparison of final answers: as text, as yes or no, as a span, as mathematics.

Every comparison is symmetric. Plain numbers with their units are compared exactly, lists, tuples, intervals and
matrices element by element; only expressions go to math-verify (`symbolic`).
"""

import re
import string
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from tracereward.tasks import symbolic
from tracereward.tasks.quantities import MAX_LENGTH, Quantity, read_quantity, same_quantity
from tracereward.tasks.spelling import plain_latex, unwrapped, without_text_commands
from tracereward.tasks.units import NO_UNIT, Unit, ratio, read_unit

YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WORDS = re.compile(r"[^\W\d_][\w\s.,'\N{RIGHT SINGLE QUOTATION MARK}/()&-]*")
_FUNCTION_NAMES = """
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt lim max min gcd lcm deg det mod
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])|!=")
_INTERVALS = frozenset(["()", "(]", "[)", "[]", "union"])
_COMPARED = re.compile(r"(<=|>=|!=|<|>|\\(?:le|ge|lt|gt|ne)(?![A-Za-z]))")
_SIGNS = {"<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!"} | {
    r"\lt": "<",
    r"\gt": ">",
    r"\le": "<=",
    r"\ge": ">=",
    r"\ne": "!",
}
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
_ABOUT = re.compile(r"\A([A-Za-z]) ?\\approx(?![A-Za-z])")
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{[^{}]*\}))?'?(?:\([A-Za-z](?:, ?[A-Za-z])*\))?|\([a-z](?:, ?[a-z])+\)"
)
_VARIABLE = re.compile(
    r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\\(?:alpha|beta|gamma|theta|phi|lambda|mu|omega|delta)(?![a-z])"
)
_MATRIX = re.compile(r"\A\\begin\{([bpvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\Z")
_DETACHED = re.compile(
    r"(?P<head>.*[\d)}\]]|.*\\[a-z]+)(?P<tail> ?\N{DEGREE SIGN}[CFK]?| [A-Za-z/][A-Za-z/ ^{}\d.-]{0,40})\Z"
)
_TRIGONOMETRY = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ANGLE = re.compile(r"(\d+(?:\.\d+)?) ?\N{DEGREE SIGN}")
_LIST_WORDS = re.compile(r"\s*(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*|\s*;\s*")


@lru_cache(maxsize=100_000)
def plain_text(answer: str) -> str:
    r"""Case-folded answer without ``$``, emphasis, ``\text{}`` wrappers, repeated spaces and a final full stop."""
    bare = unwrapped(without_text_commands(answer)).replace("\\$", "").replace("$", "")
    return " ".join(bare.split()).removesuffix(".").strip().casefold()


def equal_text(answer: str, gold: str) -> bool:
    """Whether two answers are the same words, by `plain_text`."""
    return plain_text(answer) == plain_text(gold)


def equal_yes_no(answer: str, gold: str) -> bool:
    """Whether two answers are equal as yes or no; "true" is "yes" and "false" is "no"."""
    answer, gold = plain_text(answer), plain_text(gold)
    return YES_NO.get(answer, answer) == YES_NO.get(gold, gold)


def normalised(answer: str) -> str:
    """Normalisation of SQuAD and HotpotQA: lower case, without ASCII punctuation, articles and repeated spaces."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def equal_span(answer: str, gold: str) -> bool:
    """Whether two answers are equal after `normalised`; after `plain_text` if that leaves both empty."""
    left, right = normalised(answer), normalised(gold)
    return left == right if left or right else equal_text(answer, gold)


@dataclass(frozen=True)
class Words:
    """An answer in words, compared as text only: math-verify would read them as products of letters."""

    text: str


@dataclass(frozen=True)
class Expression:
    """Anything else: an expression or relation for math-verify, without the unit behind it."""

    text: str
    unit: Unit = NO_UNIT


@dataclass(frozen=True)
class Collection:
    r"""Elements between brackets: a tuple, interval, set, ratio or matrix, or a list without brackets.

    Attributes:
        brackets: the opening and the closing one; ``{}`` of a set, ``:`` of a ratio, "" of a list, "union", and
            "matrix 2" with the number of columns.
        items: the elements; the order counts except in sets, lists and unions.
    """

    brackets: str
    items: tuple["Form", ...]


@dataclass(frozen=True)
class Solved:
    """``x = 5`` or ``x > 5``: a name and its value or interval."""

    name: str
    value: "Form"
    text: str


Form = Quantity | Words | Expression | Collection | Solved


@lru_cache(maxsize=100_000)
def equal_math(answer: str, gold: str) -> bool:
    r"""Whether two mathematical answers are equal; tried in this order:

    1. the same text (`equal_text`);
    2. answers over `MAX_LENGTH` characters: equal only by 1;
    3. plain numbers: exactly equal ("0.5" = "1/2" = "50%" = ``\frac{1}{2}``, but "0.333" is not "1/3"), see
       `quantities.same_quantity` for percent signs and units;
    4. lists and sets, tuples, intervals, ratios and matrices: their elements are equal;
    5. ``x = 5`` equals ``5``, but not ``y = 5``; the last side of a calculation, ``9 + 9 = 18``, is its answer;
    6. words ("Monday") equal only by 1;
    7. expressions and relations: by math-verify, in a separate process with a time limit.

    Raises:
        RuntimeError: math-verify cannot be started.
    """
    if equal_text(answer, gold):
        return True
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    return same_form(read_form(answer), read_form(gold))


def same_form(left: Form, right: Form) -> bool:
    """Whether two answers are equal, see `equal_math`. Symmetric."""
    if left == right:
        return True
    if isinstance(left, Solved) and isinstance(right, Solved):
        if left.name == right.name or isinstance(left.value, Quantity) or isinstance(right.value, Quantity):
            return left.name == right.name and same_form(left.value, right.value)
        return symbolic.same_expression(left.text, right.text)  # y = 2x, x = y/2
    if isinstance(left, Solved) or isinstance(right, Solved):
        solved, other = (left, right) if isinstance(left, Solved) else (right, left)
        assert isinstance(solved, Solved)
        if isinstance(other, Expression) and (_EQUALS.search(other.text) or _RELATION.search(other.text)):  # 2x = 10
            if isinstance(solved.value, Collection):  # 2x > 6 is x > 3
                return same_form(solved.value, other)
            return symbolic.same_expression(solved.text, other.text)
        return same_form(solved.value, other)
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        return same_quantity(left, right)
    if isinstance(left, Words) or isinstance(right, Words):
        return False
    if isinstance(left, Collection) and isinstance(right, Collection):
        return _same_collection(left, right)
    if isinstance(left, Collection) or isinstance(right, Collection):
        collection, other = (left, right) if isinstance(left, Collection) else (right, left)
        assert isinstance(collection, Collection)
        if isinstance(other, Expression) and _RELATION.search(other.text) and collection.brackets in _INTERVALS:
            # 2x > 6 is (3, \infty)
            return symbolic.same_expression(_written(collection), other.text)
        return False
    return _same_value(left, right)


def _same_value(left: Quantity | Expression, right: Quantity | Expression) -> bool:
    """Equality of expressions with units; a percent sign of a quantity is read both ways."""
    factor = ratio(left.unit, right.unit)
    if factor is None:
        return False
    texts = [_value_text(left, factor), _value_text(right, Fraction(1))]
    if isinstance(left, Quantity) and left.per != 1:
        texts_per = [_value_text(replace(left, value=left.value * left.per), factor), texts[1]]
        return symbolic.same_expression(*texts) or symbolic.same_expression(*texts_per)
    if isinstance(right, Quantity) and right.per != 1:
        return _same_value(right, left)
    return symbolic.same_expression(*texts)


def _value_text(form: Quantity | Expression, factor: Fraction) -> str:
    if isinstance(form, Quantity):
        value = form.value * factor
        sign, over, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
        return f"{sign}{over}" if under == 1 else rf"{sign}\frac{{{over}}}{{{under}}}"
    if factor == 1:
        return form.text
    return rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({form.text})"


def _same_collection(left: Collection, right: Collection) -> bool:
    """Elements in order, or in any order for sets, lists and unions. A list without brackets may be tuple or set."""
    if len(left.items) != len(right.items):
        return False
    kinds = {left.brackets, right.brackets}
    if kinds == {"", "()"}:
        return all(map(same_form, left.items, right.items))
    if kinds <= {"", "{}"} or kinds <= {"", "union"}:  # x < 1 or x > 3
        return _same_in_any_order(left.items, right.items)
    return len(kinds) == 1 and all(map(same_form, left.items, right.items))


def _same_in_any_order(left: tuple[Form, ...], right: tuple[Form, ...]) -> bool:
    """Whether the elements can be paired; greedy, because equality is almost always transitive."""
    rest = list(right)
    for item in left:
        found = next((i for i, other in enumerate(rest) if same_form(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _written(form: Form) -> str:
    """An answer as LaTeX again, for math-verify."""
    if isinstance(form, Collection):
        inner = [_written(item) for item in form.items]
        if form.brackets == "union":
            return r" \cup ".join(inner)
        left, right = (
            (rf"\{form.brackets[0]}", rf"\{form.brackets[1]}")
            if form.brackets == "{}"
            else (form.brackets[:1], form.brackets[1:])
        )
        return f"{left}{', '.join(inner)}{right}"
    return _value_text(form, Fraction(1)) if isinstance(form, Quantity | Expression) else form.text


@lru_cache(maxsize=100_000)
def read_form(answer: str) -> Form:
    """What an answer of at most `MAX_LENGTH` characters is."""
    result = None if read_quantity(answer) else calculation_result(answer)
    return read_quantity(result) or Words(plain_text(answer)) if result else _read(plain_latex(answer))


def calculation_result(text: str) -> str | None:
    """The quantity behind the last ``=`` of a calculation, also of one with words: "9 pens + 9 pens = 18 pens in all".

    None without a calculation before it, and for equations with unknowns.
    """
    before, equals, after = text.rpartition("=")
    if not equals or before[-1:] in tuple("<>!:\\"):
        return None
    calculation = re.split(r"=|[.;]\s|\n|\\n", before)[-1]
    prose = re.search(r"(?<![A-Za-z\\])[A-Za-z]{4}", before)
    unknown = r"(?<![A-Za-z\\])[a-zA-Z]\s*\Z" if prose else _VARIABLE
    if not re.search(r"\d", calculation) or re.search(unknown, re.sub(r"\s[xX]\s", " ", calculation)):
        return None
    if prose is None and re.search(r"[,;]|\b(?:and|or)\b", before):
        return None
    after = re.split(r"[.;](?=\s|\Z)|\n|\\n|,\s", after, maxsplit=1)[0].strip()
    return after if read_quantity(after) is not None else None


def _read(text: str, depth: int = 0) -> Form:
    quantity = read_quantity(text)
    if quantity is not None:
        return quantity
    if not text or depth > 8 or is_words(text):
        return Words(text.casefold())
    text = re.sub(r"\\([{}])", lambda found: _SET_MARKS[found[1]], text)
    matrix = _MATRIX.match(text)
    if matrix:
        rows = [_split(row, "&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return Collection(
            f"matrix {len(rows[0]) if rows else 0}", tuple(_read(cell, depth + 1) for row in rows for cell in row)
        )
    membership = re.match(r"[a-z] ?\\in(?![A-Za-z]) ?(?=[(\[\\])", text)
    if membership:
        return _read(text[membership.end() :], depth + 1)
    alternatives = _alternatives(text)
    if len(alternatives) > 1:
        return _list(alternatives, depth)
    solved = _solved(text, depth) or _bounded(text, depth)
    if solved:
        return solved
    if not _RELATION.search(text):
        parts = _split(text, "\\cup")
        if len(parts) > 1:
            return Collection("union", tuple(_read(part, depth + 1) for part in parts))
        enclosed = _enclosed(text)
        if enclosed:
            brackets, inner = enclosed
            items = _split(inner, ",")
            if len(items) > 1:
                return Collection(brackets, tuple(_read(item, depth + 1) for item in items))
            if brackets in ("{}", "()") and inner.strip():
                return _read(inner.strip(), depth + 1)
        parts = _split(text, ":")
        if len(parts) > 1 and all(parts):
            return Collection(":", tuple(_read(part, depth + 1) for part in parts))
    if _TRIGONOMETRY.search(text):
        text = _ANGLE.sub(r"{\\frac{\1 \\pi}{180}}", text)
    detached = _DETACHED.match(text)
    if detached:
        unit = read_unit(detached["tail"], known_only=True)
        if unit:
            return Expression(_without_marks(detached["head"].strip()), unit)
    return Expression(_without_marks(text))


# While a text is split, the braces of sets are distinguished from those of LaTeX's groups.
_SET_MARKS = {"{": "\ue000", "}": "\ue001"}


def _without_marks(text: str) -> str:
    return text.replace("\ue000", r"\{").replace("\ue001", r"\}")


def is_words(text: str) -> bool:
    """Whether an answer in `plain_latex` is words, not mathematics: it has a word, and nothing but words."""
    if not _WORDS.fullmatch(text) or any(char.isdigit() for char in text):
        return False
    words = re.findall(r"[^\W\d_]+", text)
    return any(len(word) > 2 and word.casefold() not in _FUNCTIONS for word in words)


def _alternatives(text: str) -> list[str]:
    r"""The parts of ``1, 2 and 3``, ``x = 1 or x = 2``, ``\pm 5``; a single part if the text is no list."""
    parts = [part for piece in _LIST_WORDS.split(text) for part in _split(piece, ",") if part]
    found = []
    for part in parts:
        halves = _split(part, "\\pm")
        if len(halves) == 2 and halves[1] and not _enclosed(part):
            found += [
                f"{halves[0]} + {halves[1]}".removeprefix(" + ").replace("= +", "="),
                f"{halves[0]} - {halves[1]}".strip(),
            ]
        else:
            found.append(part)
    return found


def _list(parts: list[str], depth: int) -> Form:
    items = [_read(part, depth + 1) for part in parts]
    names = {item.name for item in items if isinstance(item, Solved)}
    if len(names) == 1:  # x = 1 or x = 2, x = 1, 2
        items = [item.value if isinstance(item, Solved) else item for item in items]
    return Collection("", tuple(items))


def _solved(text: str, depth: int) -> Form | None:
    """The value of ``x = 5``, ``5 = x`` or ``9 + 9 = 18``; None for other equations and for relations."""
    sides = [side.strip() for side in _EQUALS.split(_ABOUT.sub(r"\1 = ", text))]
    if len(sides) < 2 or not all(sides) or _RELATION.search(text):
        return None
    named = [bool(_NAME.fullmatch(side)) for side in sides]
    if named[0] or named[-1]:
        name, value = (sides[0], sides[-1]) if named[0] else (sides[-1], sides[0])
        return Solved(name, _read(value, depth + 1), _without_marks(f"{name} = {value}"))
    value = _read(sides[-1], depth + 1)
    unknown = any(_VARIABLE.search(re.sub(r"\s[xX]\s", " ", side)) for side in sides[:-1])
    return value if not isinstance(value, Words) and (is_words(sides[0]) or not unknown) else None


def _bounded(text: str, depth: int) -> Solved | None:
    r"""The interval of ``x > 3``, ``3 < x``, ``1 < x \le 2`` or ``x \ne 3``; None for other relations."""
    parts = [part.strip() for part in _COMPARED.split(text)]
    if len(parts) not in (3, 5) or not all(parts) or "=" in parts[0] + parts[-1]:
        return None
    sides, signs = parts[::2], [_SIGNS[sign] for sign in parts[1::2]]
    if ">" in signs[0]:  # from left to right: the smaller one first
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if any(">" in sign for sign in signs) or (len(signs) == 2 and "!" in signs):
        return None
    names = [index for index, side in enumerate(sides) if _NAME.fullmatch(side)]
    if names != [1] and (len(sides) == 3 or len(names) != 1):
        return None
    at = names[0]
    name, others = sides[at], [_read(side, depth + 1) for side in sides[:at] + sides[at + 1 :]]
    low = others[0] if at == 1 else Expression(r"-\infty")
    high = others[-1] if at == 0 or len(sides) == 3 else Expression(r"\infty")
    value = Collection(
        ("[" if at == 1 and signs[0] == "<=" else "(")
        + ("]" if (at == 0 or len(sides) == 3) and signs[-1] == "<=" else ")"),
        (low, high),
    )
    if "!" in signs:
        below = Collection("()", (Expression(r"-\infty"), others[0]))
        value = Collection("union", (below, Collection("()", (others[0], Expression(r"\infty")))))
    return Solved(name, value, _without_marks(text))


def _enclosed(text: str) -> tuple[str, str] | None:
    """The outer brackets and what is between them, if they belong together."""
    opening, closing = text[:1], text[-1:]
    pairs = {"(": "(", "[": "[", "\ue000": "{", "{": "{"}
    ends = {")": ")", "]": "]", "\ue001": "}", "}": "}"}
    if len(text) < 2 or opening not in pairs or closing not in ends:
        return None
    depth = 0
    for index, char in enumerate(text):
        depth += (char in pairs) - (char in ends)
        if depth == 0 and index < len(text) - 1:
            return None
    brackets = pairs[opening] + ends[closing]
    if (pairs[opening] == "{") != (ends[closing] == "}"):
        return None
    return brackets, text[1:-1]


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that are outside all brackets."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        char = text[at]
        depth += (char in "([{\ue000") - (char in ")]}\ue001")
        if (
            depth <= 0
            and text.startswith(separator, at)
            and not (separator[-1].isalpha() and text[at + len(separator) : at + len(separator) + 1].isalpha())
        ):
            parts.append(text[start:at].strip())
            start = at = at + len(separator)
            continue
        at += 1
    return [*parts, text[start:].strip()]
