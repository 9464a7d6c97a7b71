"""Units of measurement and the nouns behind numbers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

_PREFIXES = {
    "k": ("kilo", 10**3),
    "d": ("deci", Fraction(1, 10)),
    "c": ("centi", Fraction(1, 100)),
    "m": ("milli", Fraction(1, 10**3)),
    "\N{GREEK SMALL LETTER MU}": ("micro", Fraction(1, 10**6)),
    "n": ("nano", Fraction(1, 10**9)),
    "M": ("mega", 10**6),
    "G": ("giga", 10**9),
    "T": ("tera", 10**12),
}
# symbol, names, dimensions, factor: the units that take metric prefixes. Base units: m, g, s, A, mol, bit.
_METRIC = [
    ("m", "meter metre", {"length": 1}, 1),
    ("g", "gram gramme", {"mass": 1}, 1),
    ("s", "second", {"time": 1}, 1),
    ("L", "liter litre", {"length": 3}, Fraction(1, 1000)),
    ("J", "joule", {"mass": 1, "length": 2, "time": -2}, 1000),
    ("N", "newton", {"mass": 1, "length": 1, "time": -2}, 1000),
    ("W", "watt", {"mass": 1, "length": 2, "time": -3}, 1000),
    ("Pa", "pascal", {"mass": 1, "length": -1, "time": -2}, 1000),
    ("Hz", "hertz", {"time": -1}, 1),
    ("V", "volt", {"mass": 1, "length": 2, "time": -3, "current": -1}, 1000),
    ("A", "ampere amp", {"current": 1}, 1),
    ("C", "coulomb", {"current": 1, "time": 1}, 1),
    ("mol", "mole", {"amount": 1}, 1),
    ("Wh", "watt-hour", {"mass": 1, "length": 2, "time": -2}, 3600 * 1000),
    ("cal", "calorie", {"mass": 1, "length": 2, "time": -2}, 4184),
    ("eV", "electronvolt", {"mass": 1, "length": 2, "time": -2}, Fraction(1602176634, 10**25)),
    ("B", "byte", {"data": 1}, 8),
    ("bit", "bit", {"data": 1}, 1),
]
_INCH = Fraction(254, 10**4)
_POUND = Fraction(45359237, 10**5)
_GALLON = 231 * _INCH**3
# names (the plural in s or es is understood), dimensions, factor. Months and years have no exact length in days.
_OTHER = [
    ("inch in", {"length": 1}, _INCH),
    ("foot feet ft", {"length": 1}, 12 * _INCH),
    ("yard yd", {"length": 1}, 36 * _INCH),
    ("mile mi", {"length": 1}, 63360 * _INCH),
    ("acre", {"length": 2}, 43560 * (12 * _INCH) ** 2),
    ("hectare ha", {"length": 2}, 10**4),
    ("cc", {"length": 3}, Fraction(1, 10**6)),
    ("gallon gal", {"length": 3}, _GALLON),
    ("quart qt", {"length": 3}, _GALLON / 4),
    ("pint pt", {"length": 3}, _GALLON / 8),
    ("cup", {"length": 3}, _GALLON / 16),
    ("tablespoon tbsp", {"length": 3}, _GALLON / 256),
    ("teaspoon tsp", {"length": 3}, _GALLON / 768),
    ("pound lb", {"mass": 1}, _POUND),
    ("ounce oz", {"mass": 1}, _POUND / 16),
    ("ton", {"ton": 1}, 1),  # short, long or metric
    ("tonne", {"mass": 1}, 10**6),
    ("kilo", {"mass": 1}, 1000),
    ("sec", {"time": 1}, 1),
    ("minute min", {"time": 1}, 60),
    ("hour hr h", {"time": 1}, 3600),
    ("day", {"time": 1}, 86400),
    ("week wk", {"time": 1}, 7 * 86400),
    ("month mo", {"month": 1}, 1),
    ("year yr", {"month": 1}, 12),
    ("decade", {"month": 1}, 120),
    ("century centuries", {"month": 1}, 1200),
    ("mph", {"length": 1, "time": -1}, Fraction(63360 * _INCH, 3600)),
    ("kph kmph kmh", {"length": 1, "time": -1}, Fraction(1000, 3600)),
    ("degree deg \N{DEGREE SIGN}", {"degree": 1}, 1),
    ("radian rad", {"radian": 1}, 1),
    ("am a.m AM A.M", {"before noon": 1}, 1),
    ("pm p.m PM P.M", {"after noon": 1}, 1),
    ("celsius \N{DEGREE SIGN}C", {"celsius": 1}, 1),
    ("fahrenheit \N{DEGREE SIGN}F", {"fahrenheit": 1}, 1),
    ("kelvin", {"kelvin": 1}, 1),
    ("dollar buck $ USD US$", {"dollar": 1}, 1),
    ("cent \N{CENT SIGN}", {"dollar": 1}, Fraction(1, 100)),
    ("euro \N{EURO SIGN} EUR", {"euro": 1}, 1),
    ("\N{POUND SIGN} GBP", {"sterling": 1}, 1),
    ("pence penny pennies", {"penny": 1}, 1),
    ("rupee Rs \N{INDIAN RUPEE SIGN} INR", {"rupee": 1}, 1),
    ("yen \N{YEN SIGN} JPY", {"yen": 1}, 1),
    ("yuan CNY RMB", {"yuan": 1}, 1),
    ("won \N{WON SIGN} KRW", {"won": 1}, 1),
]
Dimensions = tuple[tuple[str, int], ...]


def _table() -> dict[str, tuple[dict[str, int], Fraction]]:
    table: dict[str, tuple[dict[str, int], Fraction]] = {}
    for symbol, names, dimensions, factor in _METRIC:
        for prefix, (word, scale) in [("", ("", 1)), *_PREFIXES.items()]:
            entry = (dimensions, Fraction(factor) * scale)
            table[prefix + symbol] = entry
            table.update({word + name: entry for name in names.split()})
    for names, dimensions, factor in _OTHER:
        table.update({name: (dimensions, Fraction(factor)) for name in names.split()})
    table["l"], table["ml"], table["dl"], table["cl"] = (table[name] for name in ("L", "mL", "dL", "cL"))
    return table


_UNITS = _table()
CURRENCY_SIGNS = "$\N{EURO SIGN}\N{POUND SIGN}\N{INDIAN RUPEE SIGN}\N{YEN SIGN}\N{WON SIGN}\N{CENT SIGN}"
_ATTACHED = {"m", "g", "s", "h", "L", "l"}  # one letter right behind the number: a unit, not a variable
_SPACED = _ATTACHED | {"J", "N", "W", "V", "A", "C", "B", "K"}
_LETTERS = r"A-Za-z\N{GREEK SMALL LETTER MU}"
_TOKEN = re.compile(
    "\N{DEGREE SIGN}[CFK](?![A-Za-z])"
    + rf"|[{_LETTERS}][\w{_LETTERS}'.]*"
    + "|[/\N{DEGREE SIGN}"
    + re.escape(CURRENCY_SIGNS)
    + r"-]|\^ ?\{? ?-?[1-9] ?\}?|\\cdot"
)
_DEGREES = re.compile(
    "\\b(?:degrees?|deg)\\b\\.? ?(celsius|fahrenheit|[CF]\\b)|\N{DEGREE SIGN} ?(?=[CFK]\\b)", flags=re.I
)
_SQUARES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS = {"squared": 2, "cubed": 3}
_OPERATOR_WORDS = """
    and or to plus minus times over divided by mod modulo choose factorial squared cubed is equals base x if when not
    pi sqrt root sin cos tan cot sec csc log ln exp lim max min gcd lcm inf infinity theta alpha beta
"""
_OPERATORS = set(_OPERATOR_WORDS.split())
_IGNORED_WORDS = """
    left total in altogether all more less fewer each every remaining remain remains old away long tall high wide deep
    of the a an are is was were be there for at on that it they he she so only too extra additional combined overall
    per approximately about worth now then still together longer later earlier ago apart faster slower older younger
"""
_IGNORED = set(_IGNORED_WORDS.split())


@dataclass(frozen=True)
class Unit:
    """What is behind a number.

    Attributes:
        dimensions: powers of base dimensions, sorted; empty if no unit is known. A noun after "per" is a dimension.
        factor: the unit in base units.
        nouns: stems of the words of an unknown unit ("18 red apples"); empty if the unit is known.
    """

    dimensions: Dimensions = ()
    factor: Fraction = Fraction(1)
    nouns: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.dimensions or self.nouns)


NO_UNIT = Unit()


def ratio(left: Unit, right: Unit) -> Fraction | None:
    """How many `right` one `left` is; None for different units. A missing unit is any unit.

    Two unknown units are the same if they share a noun.
    """
    if not left or not right:
        return Fraction(1)
    if left.nouns and right.nouns:
        return Fraction(1) if left.nouns & right.nouns else None
    degrees = {("degree",), ("celsius",), ("fahrenheit",)}
    names = [tuple(name for name, _ in unit.dimensions) for unit in (left, right)]
    if ("degree",) in names and set(names) <= degrees:
        return Fraction(1)
    if {*names} == {("sterling",), ("mass",)} and _POUND in (left.factor, right.factor):
        return Fraction(1)  # "5 pounds" may be money
    return left.factor / right.factor if left.dimensions == right.dimensions else None


def read_unit(text: str, *, known_only: bool = False) -> Unit | None:
    """The unit that a text names, ``km/h``, ``square feet of grass``, ``red apples left``; None if it is none.

    Args:
        text: what follows a number, spaces before it included: ``5m`` is a length, ``5 x`` and ``5ab`` are algebra.
        known_only: refuse nouns that are no units of measurement.
    """
    text = _DEGREES.sub(lambda found: "\N{DEGREE SIGN}" + (found[1] or "")[:1].upper(), text)
    body = text.strip()
    if not body:
        return Unit()
    tokens = _tokens(body)
    if tokens is None or len(tokens) > 14:
        return None
    words = [token for token in tokens if token[0].isalpha()]
    if (
        not words
        and not set(tokens) & {*CURRENCY_SIGNS, "\N{DEGREE SIGN}"}
        and not tokens[0].startswith("\N{DEGREE SIGN}")
    ):
        return None
    first = tokens[0].rstrip(".")
    if len(first) == 1 and first.isalpha() and first not in (_ATTACHED if text[0].isalpha() else _SPACED):
        return None
    if first in _ATTACHED - {"m"} and text[0].isalpha() and len(tokens) > 1 and tokens[1].startswith("^"):
        return None  # 3s^2 is algebra
    dimensions, factor, used = _known(tokens)
    rest = [token.rstrip(".").casefold() for token in tokens[used:]]
    if used:
        # What comes behind a known unit says what was measured, not another unit.
        good = all(token.isalpha() or "'" in token or token == "-" for token in rest)
        if not good or (known_only and rest) or (rest and rest[0] in _OPERATORS - _IGNORED):
            return None
        return Unit(tuple(sorted((name, power) for name, power in dimensions.items() if power)), factor)
    if known_only or (text[0].isalpha() and len(first) < 4) or first.casefold() in _OPERATORS - _IGNORED:
        return None
    if any(token.startswith("^") or token == "\\cdot" for token in tokens) or any(map(str.isdigit, body)):
        return None
    if len(first) < 3 and first.casefold() not in _IGNORED:
        return None
    return Unit(
        nouns=frozenset(_stem(word) for word in rest if word.isalpha() and word not in _IGNORED and len(word) > 1)
    )


def _tokens(text: str) -> list[str] | None:
    """Words, ``/``, ``-`` and powers; None if the text has anything else."""
    tokens, at = [], 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        found = _TOKEN.match(text, at)
        if not found:
            return None
        tokens.append(found[0])
        at = found.end()
    return tokens


def _lookup(word: str) -> tuple[dict[str, int], Fraction] | None:
    word = word.rstrip(".")
    if word in _UNITS:
        return _UNITS[word]
    low = word.casefold()
    for name in (low, low.removesuffix("s"), low.removesuffix("es")):
        if name in _UNITS and (len(name) > 1 or name == low == word) and (len(name) > 2 or low == word):
            return _UNITS[name]
    return None


def _known(tokens: list[str]) -> tuple[dict[str, int], Fraction, int]:
    """Dimensions and factor of the known unit at the start, and the number of its tokens (0 if there is none)."""
    dimensions: dict[str, int] = {}
    factor, at, used, sign = Fraction(1), 0, 0, 1
    while at < len(tokens):
        word = tokens[at]
        if used and sign == 1 and (word == "/" or word.casefold() in ("per", "a", "an", "each", "every")):
            # "10 miles an hour"; but "3 hours a" is no unit
            at, sign = at + 1, -1
            continue
        if used and word in ("-", "\\cdot"):
            at += 1
            continue
        power = _SQUARES.get(word.casefold().rstrip("."), 1)
        if power > 1:
            at += 1
        found = _lookup(tokens[at]) if at < len(tokens) else None
        if found and tokens[at] == "in" and at + 1 < len(tokens) and tokens[at + 1][0].isalpha():
            found = None  # "in total"
        if not found and sign < 0 and at < len(tokens) and tokens[at].isalpha() and tokens[at - 1] in ("/", "per"):
            found = ({_stem(tokens[at].casefold()): 1}, Fraction(1))  # "per person"
        if not found:
            break
        at += 1
        if at < len(tokens) and tokens[at].startswith("^"):
            power *= int(re.sub(r"[^\d-]", "", tokens[at]))
            at += 1
        elif at < len(tokens) and tokens[at].casefold() in _POWERS:
            power *= _POWERS[tokens[at].casefold()]
            at += 1
        _multiply(dimensions, found[0].items(), sign * power)
        factor *= found[1] ** (sign * power)
        used = at
        if sign < 0:
            break
    return dimensions, factor, used


def _multiply(dimensions: dict[str, int], by: Iterable[tuple[str, int]], power: int) -> None:
    for name, exponent in by:
        dimensions[name] = dimensions.get(name, 0) + power * exponent


def _stem(word: str) -> str:
    """A word without its plural ending."""
    for ending, instead in (
        ("ies", "y"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("sses", "ss"),
        ("xes", "x"),
        ("ss", "ss"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + instead
    return word
