"""Worker process for math-verify: reads one JSON list per line from stdin, writes one JSON value per line to stdout.

``[text]`` asks for the fingerprint of an expression, ``[answer, gold]`` for their equality. `symbolic` starts it as a
script; the package never imports it. Only a separate process can stop a comparison that hangs inside one big-integer
operation (`5^(5^(5^5))`): signals are not delivered there, and never outside the main thread. So math-verify's own
timeouts (alarms) are disabled by the zeros below. The process exits when its stdin closes.
"""

import json
import logging
import signal
import sys
import zlib
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

# Units are read by the caller: math-verify would delete them, and with them variables such as t and h.
SPELLING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
CONFIG = [LatexExtractionConfig(normalization_config=SPELLING)]
PLAIN = (
    sympy.Number,
    sympy.NumberSymbol,
    sympy.core.numbers.ImaginaryUnit,
    sympy.Symbol,
    sympy.Add,
    sympy.Mul,
    sympy.Pow,
)
HUGE = 1e100
# math-verify logs every expression that it cannot parse; here that just means "not equal".
logging.disable(logging.CRITICAL)
# Ctrl-C reaches the entire process group; the parent handles it.
signal.signal(signal.SIGINT, signal.SIG_IGN)


@lru_cache(maxsize=10_000)
def parsed(text: str) -> list:
    """math-verify's reading of an answer: an expression, if it can be parsed, and its normalised text."""
    return parse(f"\\boxed{{{text}}}", extraction_config=CONFIG, parsing_timeout=0)


def fingerprint(text: str) -> list | None:
    """Kind of an expression and its values at two points; None if it cannot be parsed.

    Kinds: ``scalar``; ``huge``, of which the values are logarithms; ``infinite``, with signs; ``relation 1``,
    ``relation 2``, ... (a chain of so many equations or inequalities; for each, the quotient of left minus right at
    the two points, which no factor changes); ``letters`` (a product of symbols, without values); ``other`` (nothing is
    known).
    """
    found: Any = next((one for one in parsed(text) if not isinstance(one, str)), None)
    if found is None:
        return None
    if isinstance(found, sympy.Symbol):
        return ["letters", []]
    if isinstance(found, sympy.Mul) and all(isinstance(part, sympy.Symbol) or part == sympy.E for part in found.args):
        return ["letters", []]
    if isinstance(found, sympy.Expr):
        values = values_of(found)
        if values and any(value.is_infinite for value in values):
            return ["infinite", [[float(sympy.sign(value)), 0.0] for value in values]]
        if values and any(abs(value) > HUGE for value in values):
            return ["huge", [[float(sympy.log(abs(value))), float(sympy.arg(value))] for value in values]]
        return ["scalar", as_pairs(values)] if values else ["other", []]
    links: Any = found.args if isinstance(found, sympy.And) else (found,)
    if all(isinstance(link, sympy.core.relational.Relational) for link in links):
        differences = [values_of(link.lhs - link.rhs) for link in links]
        known = [values for values in differences if values and values[1]]
        if len(known) == len(differences):
            quotients = sorted((complex(first / second) for first, second in known), key=lambda z: (z.real, z.imag))
            return [f"relation {len(links)}", as_pairs(quotients)]
    return ["other", []]


def as_pairs(values: list) -> list[list[float]]:
    """Complex numbers for JSON."""
    return [[complex(value).real, complex(value).imag] for value in values]


def values_of(expression: Any) -> list[Any] | None:
    """Values at two points; None if the expression has other parts than elementary functions, or no finite values."""
    values = [value_at(expression, start) for start in (1, 2)] if simple(expression) else [None]
    return None if None in values else values


def simple(expression: Any) -> bool:
    """Whether it has elementary functions of numbers and symbols only; sums and integrals need not end."""
    return all(
        isinstance(part, PLAIN) or type(part).__module__.startswith("sympy.functions.elementary")
        for part in sympy.preorder_traversal(expression)
    )


def value_at(expression: Any, start: int) -> Any:
    """Value where each symbol has a value that depends on its name and `start` only; None if there is none."""
    point = {
        symbol: sympy.Rational(zlib.crc32(f"{symbol.name}{start}".encode()) % 10_007 + 5_003, 10_007)
        for symbol in expression.free_symbols
    }
    try:
        value = expression.subs(point).evalf(15)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return value if value.is_number and (value.is_finite or value.is_extended_real) else None


for line in sys.stdin:
    request = json.loads(line)
    try:
        if len(request) == 1:
            reply = fingerprint(request[0])
        else:
            answer, gold = (parsed(text) for text in request)
            # verify() is not symmetric: the gold answer comes first.
            reply = bool(verify(gold, answer, timeout_seconds=0) or verify(answer, gold, timeout_seconds=0))
    except Exception:  # sympy has many ways to fail on nonsense
        reply = None if len(request) == 1 else False
    print(json.dumps(reply), flush=True)
