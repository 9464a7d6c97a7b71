"""Plain numbers with what is behind them: ``1.5 million``, ``$1,200``, ``50%``, ``5 km/h``, ``18 apples``."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from tracereward.tasks.spelling import plain_latex
from tracereward.tasks.units import CURRENCY_SIGNS, NO_UNIT, Unit, ratio, read_unit

MAX_LENGTH = 300
"""Characters; longer answers are compared as text only."""

_POWER = r"\{?\s*[+-]?\d{1,3}\s*\}?(?!\d)"
_NUMBER = re.compile(
    r"(?P<minus>[+-]?)\s*(?:"
    r"(?P<whole>\d+)\s*(?:and\s+)?\\frac\{\s*(?P<over>\d+)\s*\}\{\s*(?P<under>\d+)\s*\}"
    r"|\\frac\{\s*(?P<top>-?\s*\d+(?:\.\d+)?)\s*\}\{\s*(?P<bottom>-?\s*\d+(?:\.\d+)?)\s*\}"
    r"|(?P<mixed>\d+)\s+(?:and\s+)?(?P<a>\d+)\s*/\s*(?P<b>\d+)(?![\d.])"
    r"|(?P<digits>\d+)_\{?\s*(?P<radix>\d{1,2})\s*\}?"
    r"|(?P<c>\d+(?:\.\d+)?)\s*/\s*(?P<d>\d+(?:\.\d+)?)(?![\d.])"
    rf"|(?P<base>10)\s*\^\s*(?P<tens>{_POWER})"
    r"|(?P<start>\d*\.\d*)\\overline\{\s*(?P<period>\d+)\s*\}"
    r"|(?P<decimal>\d+\.?\d*|\.\d+)(?:[eE](?P<exponent>[+-]?\d{1,3})(?!\d)"
    rf"|\s*\\(?:times|cdot)\s*10\s*\^\s*(?P<power>{_POWER}))?"
    r")",
    flags=re.ASCII,
)
_APPROXIMATE = re.compile(
    r"\A(?:\\approx|about|approximately|around|roughly|nearly|exactly|only|(?:a )?total of)\s*", flags=re.I
)
_CURRENCY = re.compile(
    rf"(?P<minus>[+-]?)\s*(?:(?:US|USD|EUR|GBP|Rs\.?|INR)\s*)?(?P<sign>[{re.escape(CURRENCY_SIGNS)}])|(?P<code>USD|EUR|GBP|INR|Rs)\b\.?"
)
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "lakh": 10**5,
    "crore": 10**7,
}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b", flags=re.I)
_MONEY_SCALE = re.compile(r"\s*([kKMB]|bn|mn)(?![A-Za-z])")
_MONEY_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9}
_PERCENT = re.compile(r"\s*(?:%|per ?cent\b|percentage points?\b|pct\b)", flags=re.I)
_RATE = re.compile(r"\s*(?:/|(?:per|an?|each|every)\b)", flags=re.I)
_DOZEN = re.compile(r"\s*dozens?\b", flags=re.I)
_ORDINAL = re.compile(r"\A ?(?:st|nd|rd|th)\b")
_IN_DIGITS = re.compile(r"\A([^\d()]+?)\s+\(\d[\d,.]*\)\Z")
_ASIDE = re.compile(r"(?<=[\w%\N{DEGREE SIGN}])\s+[(\[][^()\[\]]*[A-Za-z]{2}[^()\[\]]*[)\]]")
_NEXT_PART = re.compile(r"(?<=[A-Za-z.])(?:\s*,)?\s+(?:and\s+)?(?=\d)")
_ONES_NAMES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
"""
_ONES = _ONES_NAMES.split()
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORD_VALUES = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_NUMBER_WORDS = re.compile(
    rf"({'|'.join(_TENS)})[- ]({'|'.join(_ONES[1:10])})\b|({'|'.join(sorted(_WORD_VALUES, reverse=True))})\b"
)

_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_PART_WORDS = re.compile(
    rf"(?:(?:an?|({'|'.join(_ONES[1:10])}))[- ]({'|'.join(_PARTS)})s?|(half|quarter))\b(?:\s+(?:of\s+)?(?:an?|the)\b)?"
)
_AND_PART = re.compile(rf"\s+and\s+(?:an?|one)[- ]({'|'.join(_PARTS)})\b")


@dataclass(frozen=True)
class Quantity:
    """A plain number.

    Attributes:
        value: exact; not divided by 100 if there is a percent sign, not multiplied by 12 for dozens.
        per: 1/100 behind a percent sign, 12 behind "dozen", else 1.
        unit: what is behind it.
    """

    value: Fraction
    per: Fraction = Fraction(1)
    unit: Unit = NO_UNIT


def same_quantity(left: Quantity, right: Quantity) -> bool:
    """Whether two quantities are exactly equal.

    If only one has a percent sign (or "dozen"), both readings are tried, "50%" = "0.5" and "50%" = "50", because
    datasets use both. A percentage is no measurement. A unit on one side only is not compared; different units of the
    same kind are converted.
    """
    factor = ratio(left.unit, right.unit)
    if factor is None:
        return False
    if left.per != right.per and (left.unit.dimensions or right.unit.dimensions):
        return False
    a, b = left.value * factor, right.value
    return a == b if left.per == right.per else a == b or a * left.per == b * right.per


@lru_cache(maxsize=100_000)
def read_quantity(text: str) -> Quantity | None:
    """The quantity that an answer is; None if it is anything else (algebra, a list, words, a sentence).

    Reads integers, decimals, fractions, mixed numbers, powers of ten (exponents of at most three digits), number
    words up to ninety-nine, thousands separators, "million" and its kin, percent, currencies, units, nouns, and sums of
    units such as "1 hour 30 minutes". None for a zero denominator and for more than `MAX_LENGTH` characters.
    """
    if len(text) > MAX_LENGTH:
        return None
    text = plain_latex(text)
    bare = re.fullmatch(r"\(([^()]*)\)|\{([^{}]*)\}", text)
    if bare:
        text = (bare[1] or bare[2] or "").strip()
    text = _APPROXIMATE.sub("", _IN_DIGITS.sub(r"\1", _ASIDE.sub("", text))).strip()
    if "(" in text:
        return None
    whole = _read(text)
    if whole is not None or "\\" in text:
        return whole
    parts = _NEXT_PART.split(text)
    found = [_read(part) for part in parts] if len(parts) <= 4 else [None]
    if any(part is None for part in found):
        return None
    first, *others = [part for part in found if part is not None]
    total = first
    for other in others:  # 5 feet 6 inches
        factor = ratio(other.unit, first.unit)
        if factor is None or factor == 1 or not (first.unit.dimensions and other.unit.dimensions):
            return None
        total = replace(total, value=total.value + (other.value if first.value >= 0 else -other.value) * factor)
    return total


def _read(text: str) -> Quantity | None:
    sign, unit = 1, Unit()
    currency = _CURRENCY.match(text)
    if currency:
        sign = -1 if currency["minus"] == "-" else 1
        unit = read_unit(currency["sign"] or currency["code"]) or Unit()
        text = text[currency.end() :].lstrip()
    words = None if currency else _in_words(text.casefold())
    if words:
        value, rest = words[0], text[words[1] :]
    else:
        number = _NUMBER.match(text)
        if not number:
            return None
        read = _value(number)
        if read is None:
            return None
        value, rest = sign * read, text[number.end() :]
        rest = _ORDINAL.sub("", rest) if number["decimal"] else rest
        if number["radix"]:
            unit = Unit(((f"base {number['radix']}", 1),))
    part = _AND_PART.match(rest)  # 5 and a half
    if part:
        value, rest = value + Fraction(1, _PARTS[part[1]]), rest[part.end() :]
    scale = _SCALE.match(rest) or (currency and _MONEY_SCALE.match(rest))
    if scale:
        value *= _SCALES.get(scale[1].casefold()) or _MONEY_SCALES[scale[1]]
        rest = rest[scale.end() :]
    per = Fraction(1)
    for pattern, meaning in ((_PERCENT, Fraction(1, 100)), (_DOZEN, Fraction(12))):
        marked = pattern.match(rest)
        if marked:
            per, rest = meaning, rest[marked.end() :]
            break
    if currency:
        unit = _priced(unit, rest)
        return None if unit is None else Quantity(value, per, unit)
    behind = read_unit(rest)
    if behind is None or (unit and behind):
        return None
    return Quantity(value, per, unit or behind)


def _in_words(text: str) -> tuple[Fraction, int] | None:
    """Value and length of the number words at the start of a text: "twenty-one", "two thirds", "half"."""
    part = _PART_WORDS.match(text)
    if part:
        return Fraction(_WORD_VALUES.get(part[1], 1), _PARTS[part[2] or part[3]]), part.end()
    words = _NUMBER_WORDS.match(text)
    if not words:
        return None
    value = _WORD_VALUES[words[3]] if words[3] else _WORD_VALUES[words[1]] + _WORD_VALUES[words[2]]
    return Fraction(value), words.end()


def _priced(currency: Unit, rest: str) -> Unit | None:
    """The unit of an amount of money: "$5 per hour" is a rate, "$5 dollars" and "$18 profit" are dollars."""
    if _RATE.match(rest):
        rate = read_unit("dollars " + rest.strip())
        return rate and (rate if currency.dimensions == (("dollar", 1),) else currency)
    behind = read_unit(rest)
    if behind is None or (behind.dimensions and ratio(behind, currency) is None):
        return None
    return currency


def _value(number: re.Match[str]) -> Fraction | None:
    parts = {name: part.replace(" ", "") if part else part for name, part in number.groupdict().items()}
    try:
        if parts["whole"]:
            value = Fraction(parts["whole"]) + Fraction(int(parts["over"]), int(parts["under"]))
        elif parts["top"]:
            value = Fraction(parts["top"]) / Fraction(parts["bottom"])
        elif parts["mixed"]:
            value = Fraction(parts["mixed"]) + Fraction(int(parts["a"]), int(parts["b"]))
        elif parts["radix"]:
            value = Fraction(parts["digits"])
        elif parts["period"]:
            places = len(parts["start"].partition(".")[2])
            value = Fraction(parts["start"] + "0") + Fraction(
                int(parts["period"]), 10**places * (10 ** len(parts["period"]) - 1)
            )
        elif parts["c"]:
            value = Fraction(parts["c"]) / Fraction(parts["d"])
        elif parts["base"]:
            value = Fraction(10) ** int(parts["tens"].strip("{}"))
        else:
            power = parts["exponent"] or (parts["power"] or "0").strip("{}")
            value = Fraction(parts["decimal"]) * Fraction(10) ** int(power)
    except ZeroDivisionError:
        return None
    return -value if parts["minus"] == "-" else value
