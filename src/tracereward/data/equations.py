"""Equations of numbers in a text that do not hold, such as ``12 + 5 = 18``."""

import ast
import operator
import re
from collections.abc import Iterator
from fractions import Fraction

_NUMBER = r"\$?\s?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)%?"
_SIGN = r"\s*(?:[-+*/×÷−–]|(?<=\s)x(?=\s))\s*"
_CALCULATION = rf"\(*(?:{_NUMBER})(?:\)*{_SIGN}\(*(?:{_NUMBER}))+\)*"
_EQUATION = re.compile(
    rf"(?P<left>{_CALCULATION})\s*=\s*(?P<right>{_CALCULATION}|-?\s?{_NUMBER})(?![\d.,]*\d|\s*[:^\\(*/×÷]|[A-Za-z]*\^)"
)
# What belongs to the left side, if it comes before it: a sign, a variable, a bracket, "of"; but not "x =" or "a".
_CONTINUED = re.compile(
    r"(?:[-+*/×÷−–^<>\\_{}%]|[\d)]|\b(?![aAI]\b)[A-Za-z]|\b(?:of|times|plus|minus|less|over|by))\s*\Z"
)
_TWO_QUOTIENTS = re.compile(rf"[/÷]\s*{_NUMBER}\s*[/÷]")  # "25 / 1/3": of which quotient is not clear
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def wrong_equations(text: str) -> Iterator[str]:
    """The equations of numbers alone that do not hold, in order.

    Read are calculations with ``+ - * /`` (also ``x × ÷``, dollars, percent, parentheses) before ``=`` and a number or
    another calculation. A number may be rounded or cut off at its last written place, and be 85 or 0.85 for 85 %. An
    equation that words or variables continue at the left is left out: a missed one is better than a wrong alarm.

    Args:
        text: a trace.
    """
    start = 0
    while found := _EQUATION.search(text, start):
        start = found.start("right")  # which may be the left side of the next equation
        left, right = found["left"], found["right"]
        if _CONTINUED.search(text[max(0, found.start() - 20) : found.start()]) or _TWO_QUOTIENTS.search(left + right):
            continue
        value, stated = _value(left), _value(right)
        if value is not None and stated is not None and not _agree(value, stated, right):
            yield " ".join(found[0].split())


def _agree(value: Fraction, stated: Fraction, right: str) -> bool:
    """Whether a value is the stated one at its last written place."""
    places = len(right.rstrip("%").rpartition(".")[2]) if "." in right else 0
    allowed = [(value, stated, places)]
    if right.endswith("%"):
        allowed = [(100 * value, 100 * stated, places), (value, 100 * stated, places)]
    elif "%" not in right:
        allowed.append((100 * value, stated, places) if value < 1 < stated else (value, stated, places))
    return any(abs(a - b) < Fraction(1, 10**digits) for a, b, digits in allowed)


def _value(text: str) -> Fraction | None:
    """The value of a calculation; None if it cannot be read, or divides by zero."""
    for signs, sign in (("×x", "*"), ("÷", "/"), ("−–", "-")):
        text = re.sub(f"[{signs}]", sign, text)
    text = re.sub(r"([\d.]+)%", r"(\1/100)", re.sub(r"[$,]", "", text))
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python has no number 05
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError(ast.dump(node))
