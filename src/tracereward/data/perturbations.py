"""Perturbations: wrong traces made from correct ones by one small change that surface features do not reveal.

A perturbed expert trace is a negative for the discriminator and the test of its label-free monitor (arXiv 2510.01857).
Each kind changes one thing and keeps the rest of the text: its layout, its number formats, its last step. Text that
only resembles arithmetic (hyphens, ranges, dates, step labels) is not changed: fewer perturbations are better than ones
that read like misprints.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tracereward.errors import check_choice
from tracereward.modeling.steps import LINES, StepRule

KINDS = ("operator", "nearby_number", "number", "drop_step", "swap_steps")

_NEARBY = 2
"""Units of the last written place by which a nearby number differs at most, and another number at least exceeds."""
_MOST_DIGITS = 100
"""Longer digit runs are not numbers of a trace, and Python refuses to convert the longest."""

_FLIPPED = {"-": "+", "−": "+", "–": "+", "*": "/", "/": "*", "×": "÷", "÷": "×"}  # "+" depends on the text's minus

_LETTER = r"[^\W\d_]"
_QUANTITY = r"[0-9]++(?:,[0-9]+)*+(?:\.[0-9]+)?+"

# The number of a list item or a step, with what it hangs on: "1. ", "**2) ", "(3) ", "Step 4:".
_LABEL = r"^[ \t*#-]*(?:step[ ]+[0-9]+[.):]?|\(?[0-9]{1,2}[.):](?=[ \t]+\S))"
_STEP_LABEL = re.compile(_LABEL, re.IGNORECASE)

# Neither a part of a word, an index (x_2, x_{2}), a version (1.2.3) or a name (COVID-19), nor an ordinal (2nd).
_NUMBER = re.compile(
    rf"""
    {_LABEL}
    | (?<![\w.]) (?<!_\{{) (?<!{_LETTER}{{2}}-)
      (?P<number> (?> (?: [0-9]{{1,3}} (?:,[0-9]{{3}})+ (?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ ) )
      (?! \.?[0-9] ) (?! (?:st|nd|rd|th)\b )
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)

# An operator with the end of its left operand and the start of its right one, and the same space on both sides.
# Dates and numbers such as 1e-5 are matched first, so that nothing in them is taken for an operator.
_OPERATION = re.compile(
    rf"""
    (?<![0-9]) (?: [0-9]{{4}}([-/])[0-9]{{1,2}}\1[0-9]{{1,2}} | [0-9]{{1,2}}([-/])[0-9]{{1,2}}\2[0-9]{{4}} ) (?![0-9])
    | [0-9]e[-+][0-9]
    | (?P<left> (?<![0-9])(?<![0-9][.,]){_QUANTITY} | [)\]}}%°] | (?<!{_LETTER}){_LETTER}++ )
      (?P<space> [ ]? ) (?P<operator> [-+*/×÷−–] ) (?P=space)
      (?! [ai][ ]{_LETTER} )
      (?= [-−]? (?: (?P<right> {_QUANTITY} ) | [$£€(\[{{] | \.[0-9] | \\[a-z$] | {_LETTER}(?!{_LETTER}|') ) )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLAUSE = re.compile(r"(?:(?![.;!?]\s)[^\n])+")


@dataclass(frozen=True)
class Perturbed:
    """A wrong trace.

    Attributes:
        text: the changed text, never equal to the original.
        kind: one of `KINDS`.
        first_change: index of the first character in which `text` differs from the original; the shorter length where
            one is a prefix of the other.
    """

    text: str
    kind: str
    first_change: int


def perturb(text: str, rng: random.Random, kinds: Sequence[str] = KINDS, rule: StepRule = LINES) -> Perturbed | None:
    """Make one wrong trace from a correct expert trace.

    The kinds are tried in random order; the first that applies is used, at a position sampled uniformly.

    - operator: one binary operator becomes its opposite, + and -, * and /, × and ÷. A tight operator, a minus or a
      slash counts only in a clause with an equals sign.
    - nearby_number: one number moves by 1 or 2 units of its last written place.
    - number: one number becomes another that differs by more than 2 such units. Both keep the number of digits, the
      decimals and the thousands separators; neither becomes zero or makes a new leading zero.
    - drop_step: one step is removed with its delimiter, never the last. A numbered step is removed only if no
      numbered one follows, because a gap in the numbers would be visible.
    - swap_steps: two adjacent, different steps exchange places, neither of them the last. White space, delimiters and
      the numbers of numbered steps stay where they are.

    Args:
        text: the correct trace.
        rng: the same state and arguments give the same result.
        kinds: the kinds to choose from.
        rule: what ends a step; a run of delimiters is one boundary, and blank steps do not count.

    Returns:
        The wrong trace, or None where no kind applies.

    Raises:
        InputError: unknown kind.
    """
    for kind in kinds:
        check_choice("perturbation", kind, KINDS)
    for kind in rng.sample(kinds, len(kinds)):
        changed = _change(text, rng, kind, rule)
        if changed is not None:
            return Perturbed(changed, kind, first_changed_character(text, changed))
    return None


def first_changed_character(original: str, changed: str) -> int:
    """Index of the first character in which two texts differ.

    The shorter length where one is a prefix of the other; the common length where they are equal.
    """
    for index, (a, b) in enumerate(zip(original, changed)):
        if a != b:
            return index
    return min(len(original), len(changed))


def _change(text: str, rng: random.Random, kind: str, rule: StepRule) -> str | None:
    if kind == "operator":
        return _flip_operator(text, rng)
    if kind == "drop_step":
        return _drop_step(text, rng, rule)
    if kind == "swap_steps":
        return _swap_steps(text, rng, rule)
    return _change_number(text, rng, nearby=kind == "nearby_number")


# ---------- operators ----------


def _flip_operator(text: str, rng: random.Random) -> str | None:
    places = list(_operators(text))
    if not places:
        return None
    place = rng.choice(places)
    flipped = _FLIPPED | {"+": "−" if "−" in text else "-"}
    return text[:place] + flipped[text[place]] + text[place + 1 :]


def _operators(text: str) -> Iterator[int]:
    """Index of each binary operator."""
    for clause in _CLAUSE.finditer(text):
        equation = "=" in clause[0] or "≈" in clause[0]
        number = re.search("[0-9]", clause[0])
        for match in _OPERATION.finditer(clause[0]):
            operator, tight = match["operator"], not match["space"]
            if operator is None:
                continue
            # "10 - 12 years", "120 / 80 mmHg", "A+B": arithmetic only in a clause with an equals sign.
            if not equation and (tight or operator in "-−–/"):
                continue
            # A word is the unit of a number before it ("5 hats - 3 hats"); otherwise it is a heading ("Monday - 5").
            word = len(match["left"]) > 1 and match["left"].isalpha()
            if word and (tight or number is None or number.start() > match.start()):
                continue
            # "$18/h" is a rate; "10-12" goes up, as ranges do.
            if tight and operator == "/" and clause[0][match.end()].isalpha():
                continue
            if tight and operator in "-−–" and _goes_up(match["left"], match["right"]):
                continue
            yield clause.start() + match.start("operator")


def _goes_up(left: str, right: str | None) -> bool:
    """Whether both are numbers, and the right one is larger."""
    return left[0].isdigit() and right is not None and float(left.replace(",", "")) < float(right.replace(",", ""))


# ---------- numbers ----------


def _change_number(text: str, rng: random.Random, nearby: bool) -> str | None:
    numbers = list(_numbers(text))
    if not numbers:
        return None
    start, end = rng.choice(numbers)
    old = text[start:end]
    digits = "".join(filter(str.isdigit, old))
    value = int(digits)
    lowest, highest = _same_format(old, digits)
    if nearby:
        near = range(max(lowest, value - _NEARBY), min(highest, value + _NEARBY) + 1)
        new = rng.choice([other for other in near if other != value])
    else:
        new = value
        while abs(new - value) <= _NEARBY:
            new = rng.randint(lowest, highest)
    new_digits = iter(str(new).zfill(len(digits)))
    written = "".join(next(new_digits) if character.isdigit() else character for character in old)
    return text[:start] + written + text[end:]


def _numbers(text: str) -> Iterator[tuple[int, int]]:
    """Span of each number; a sign is no part of it."""
    for match in _NUMBER.finditer(text):
        start, end = match.span("number")
        if 0 < end - start <= _MOST_DIGITS:
            yield start, end


def _same_format(number: str, digits: str) -> tuple[int, int]:
    """Smallest and largest digit run of the same length that make no new leading zero, nor zero (avoids "1/0")."""
    whole = number.partition(".")[0]
    lowest = 10 ** (len(digits) - 1) if len(whole) > 1 and digits[0] != "0" else 1
    return lowest, 10 ** len(digits) - 1


# ---------- steps ----------


class _Step(NamedTuple):
    """One step: where it starts with its white space, where its body starts and ends, and whether it is numbered."""

    start: int
    body: int
    end: int
    numbered: bool


def _steps(text: str, rule: StepRule) -> list[_Step]:
    steps = []
    for start, stop in rule.pieces(text):
        content = text[start:stop].strip()
        label = _STEP_LABEL.match(content)
        body = content[label.end() :].lstrip() if label else content
        end = start + len(text[start:stop].rstrip())
        steps.append(_Step(start, end - len(body), end, label is not None))
    return steps


def _drop_step(text: str, rng: random.Random, rule: StepRule) -> str | None:
    steps = _steps(text, rule)
    last_number = max((i for i, step in enumerate(steps) if step.numbered), default=0)
    places = [
        i for i, step in enumerate(steps[:-1]) if step.body < step.end and (not step.numbered or i == last_number)
    ]
    if not places:
        return None
    place = rng.choice(places)
    return text[: steps[place].start] + text[steps[place + 1].start :]


def _swap_steps(text: str, rng: random.Random, rule: StepRule) -> str | None:
    places = []
    steps = _steps(text, rule)
    for one, two in itertools.pairwise(steps[:-1]):
        first, between, second = text[one.body : one.end], text[one.end : two.body], text[two.body : two.end]
        swapped = second + between + first
        if first and second and swapped != text[one.body : two.end]:
            places.append((one.body, swapped, two.end))
    if not places:
        return None
    start, swapped, end = rng.choice(places)
    return text[:start] + swapped + text[end:]
