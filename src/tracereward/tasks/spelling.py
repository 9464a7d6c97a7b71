r"""One spelling for answers: Unicode mathematics, LaTeX layout and Markdown become plain LaTeX.

Only the spelling changes, never the value: ``\dfrac12`` and ``½`` become ``\frac{1}{2}``, ``10\,000`` becomes
``10000``.
"""

import re
import unicodedata

_SYMBOLS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u00b7\u22c5\u2219", r"\cdot "),
    **dict.fromkeys("\u00b0\u00ba\u02da", "\N{DEGREE SIGN}"),
    **dict.fromkeys("\u201c\u201d\u2018", '"'),
    "\u2019": "'",
    "\u3002": ".",
    "\u00d7": r"\times ",
    "\u00f7": r"\div ",
    "\u2248": r"\approx ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u00b1": r"\pm ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u2115": r"\mathbb{N}",
    "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}",
    "\u00b5": "\N{GREEK SMALL LETTER MU}",
}
_GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi
    psi omega
"""
_SYMBOLS |= {
    unicodedata.lookup(f"GREEK SMALL LETTER {name.upper().replace('LAMBDA', 'LAMDA')}"): rf"\{name} "
    for name in _GREEK.split()
    if name not in ("mu", "omicron")  # a micro sign is part of a unit
}
_SUPERSCRIPTS = dict(
    zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n", strict=True)
)
_SUBSCRIPTS = {chr(0x2080 + digit): str(digit) for digit in range(10)}
_ROOT = re.compile(r"([\u221a\u221b])\s*(?:\(([^()]*)\)|(\{[^{}]*\})|(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+))")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt)|mbox|bf|rm|operatorname)\s*\{([^{}]*)\}"
)
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|boldsymbol|mathrm|mathbf|rm|bf)(?![A-Za-z])|\\!"
)
_SPACE = re.compile(
    r"(?<!\\)\\[,;: \n]|\\(?:quad|qquad|thinspace|enspace|space|nobreakspace)(?![A-Za-z])|~|\\\\\s*$|\s+"
)
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])\s*$")
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*")
_SHORT_FRACTION = re.compile(
    r"\\frac(?:(\d)\s*(\d)(?!\d)|(\d)\s*(\{[^{}]*\})|(\{[^{}]*\})\s*(\w)|(\\[a-z]+)\s*(\d|\{[^{}]*\}))"
)
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))")
_THOUSANDS = re.compile(
    r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+"
    r"|\d{1,3}(?:'\d{3})+|\d{1,3}(?:_\d{3})+)"
    r"(?![\d_']|,\d| \d)"
)
_LATEX_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,;: !]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SYNONYMS = {
    "leq": "le",
    "geq": "ge",
    "neq": "ne",
    "infin": "infty",
    "leqslant": "le",
    "geqslant": "ge",
    "varnothing": "emptyset",
}
_SYNONYM = re.compile(rf"\\({'|'.join(_SYNONYMS)})(?![A-Za-z])")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp)(?=[({_^\\\d]| [({\\\d]| ?[a-z](?![A-Za-z]))"
)
_NAMES = {"pi": "pi", "infinity": "infty"}
_NAMED = re.compile(rf"(?<![A-Za-z\\])(?:{'|'.join(_NAMES)})(?![A-Za-z])", flags=re.I)
_POWER = re.compile(r"(?<=[\w)\]}])\*\*(?=[\w({-])")
_QUOTED = re.compile(r"\A([\"'`]+)(.+?)\1\Z")


def unwrapped(text: str) -> str:
    r"""Text without Markdown emphasis, code marks, quotes and math delimiters (``$``, ``\(``, ``\[``) around it.

    A ``$`` that has no partner is a currency sign and stays.
    """
    text = text.replace("**", "").replace("__", "").strip().strip("`").strip()
    text = re.sub(r"\\[()\[\]]", " ", text).strip()
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text).strip()
    text = re.sub(r"\A[*_]+(?=\S)|(?<=\S)[*_]+\Z", "", text)
    quoted = _QUOTED.match(text)
    return quoted[2].strip() if quoted else text


def without_thousands(text: str) -> str:
    r"""Text whose numbers have no thousands separators: ``1,000``, ``1{,}000``, ``1\,000``, ``1'000``, ``1,00,000``."""
    text = _LATEX_THOUSANDS.sub(",", text)
    return _THOUSANDS.sub(lambda found: re.sub(r"[ ,'_]", "", found[0]), text)


def without_text_commands(text: str) -> str:
    r"""Text with the content of ``\text{...}``, ``\mathrm{...}`` and their kin, set off by spaces."""
    for _ in range(4):  # nested ones
        found = _TEXT.sub(r" \1 ", text)
        if found == text:
            break
        text = found
    return text


def plain_latex(text: str) -> str:
    """The one spelling of an answer; applying it again changes nothing that matters."""
    text = _POWER.sub("^", _scripts(text))
    text = _ROOT.sub(_root, text)
    text = _vulgar_fractions(text)
    text = "".join(_SYMBOLS.get(char, char) for char in text)
    text = unicodedata.normalize("NFKC", text)
    text = unwrapped(text.replace(r"\$", "$") if text.count("$") == text.count(r"\$") == 1 else text).replace(
        r"\$", "$"
    )
    text = _DEGREE.sub("\N{DEGREE SIGN}", text)
    text = without_text_commands(text)
    text = _LATEX_THOUSANDS.sub("", text)
    text = _LAYOUT.sub("", text).replace("{,}", ",").replace(r"\%", "%").replace(r"\&", "&")
    text = _SPACE.sub(" ", text)
    text = _SYNONYM.sub(lambda found: "\\" + _SYNONYMS[found[1]], text)
    text = _FUNCTION.sub(r"\\\1", text)
    text = _FRACTION.sub(r"\\frac", text)
    text = _SHORT_FRACTION.sub(_fraction, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d) ?[xX*] ?(?=\d)", r" \\times ", text)
    if not re.search(r"[(\[{][^)\]}]*,", text):  # commas within brackets separate elements
        text = without_thousands(text)
    text = _NAMED.sub(lambda found: rf"\{_NAMES[found[0].casefold()]} ", text)
    text = " ".join(text.split()).rstrip(" .,;:")
    # The point of ".5" is part of the number.
    return re.sub(r"\A(?:[ ,;:]|\.(?!\d)|=|#(?=\d))+", "", text)


def _scripts(text: str) -> str:
    """Runs of superscript and subscript characters as ``^{...}`` and ``_{...}``."""
    for table, mark in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
        run = re.compile(f"[{''.join(table)}]+")
        text = run.sub(
            lambda found, table=table, mark=mark: f"{mark}{{{''.join(table[one] for one in found[0])}}}", text
        )
    return text


def _vulgar_fractions(text: str) -> str:
    r"""Characters such as ``½`` as ``\frac{1}{2}``."""
    for char in {char for char in text if unicodedata.decomposition(char).startswith("<fraction>")}:
        over, _, under = unicodedata.normalize("NFKC", char).partition("\u2044")
        if over and under:
            text = text.replace(char, rf"\frac{{{over}}}{{{under}}}")
    return text


def _root(found: re.Match[str]) -> str:
    index = "[3]" if found[1] == "\u221b" else ""
    return rf"\sqrt{index}{{{found[2] or (found[3] or '')[1:-1] or found[4]}}}"


def _fraction(found: re.Match[str]) -> str:
    over, under = (part for part in found.groups() if part)
    return rf"\frac{{{over.strip('{}') if over.count('{') == 1 else over}}}{{{under.strip('{}')}}}"
