"""Multiple choice: rows of a question and its options as prompt, completion and the letter of the answer."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tracereward.tasks import extraction
from tracereward.tasks.fields import folded, optional_text, read_text

LETTERS = "ABCDEFGHIJ"


def mmlu_pro(row: dict) -> dict:
    """Fields question, options (list), answer (letter), and the trace in ``trace`` or, on the Hub, ``cot_content``.

    If a trace states no answer (26 of 6,358; most were truncated by a token limit), the gold answer is appended on its
    own line, so that every demonstration ends with one.
    """
    options = _options(row["options"])
    answer = optional_text(row, "answer")
    trace = optional_text(row, "trace") or optional_text(row, "cot_content")
    return _example(
        _asked(row),
        options,
        None if answer is None else _letter("answer", answer, LETTERS[: len(options)]),
        trace if trace is None else re.sub(r"\AA:\s*(?=\S)", "", trace),
    )


def medreason(row: dict) -> dict:
    """Fields question, options (list, or lines "A. ..."), reasoning, answer (a letter, or the text of an option).

    If the answer is an option's text, an explanation after it is ignored. The completion is the reasoning and, on its
    own line, the answer.
    """
    options = _options(row["options"])
    answer = None if optional_text(row, "answer") is None else _option_letter(read_text(row, "answer"), options)
    return _example(_asked(row), options, answer, _concluded(optional_text(row, "reasoning"), answer))


def medqa(row: dict) -> dict:
    """Fields question, options (``{"A": ..., "B": ...}``, ``[{"key": "A", "value": ...}]``, or as in `medreason`).

    The answer is the letter in ``answer_idx``; without it, ``answer``, the text of an option. The data has no traces:
    one in ``trace`` is read, and ends with the answer.
    """
    options = _options(row["options"])
    letter, answer = optional_text(row, "answer_idx"), optional_text(row, "answer")
    if letter is not None:
        letter = _letter("answer_idx", letter, LETTERS[: len(options)])
    elif answer is not None:
        letter = _option_letter(answer, options)
    return _example(_asked(row), options, letter, optional_text(row, "trace"))


def medmcqa(row: dict, first: int = 0) -> dict:
    """Fields question, opa, opb, opc, opd, cop, exp: the trace is the explanation and, on its own line, the answer.

    Args:
        row: of the data set.
        first: number of the first option in ``cop``: 0 on the Hub, where -1 is unknown, 1 in the authors' files.
    """
    options = [read_text(row, field) for field in ("opa", "opb", "opc", "opd")]
    number = None if first == 0 and row.get("cop") == -1 else row.get("cop")
    fix = "; the authors' files count from 1, the Hub from 0: --task medmcqa_from_1, --task medmcqa"
    answer = _numbered("cop", number, len(options), first=first, fix=fix)
    return _example(_asked(row), options, answer, _concluded(optional_text(row, "exp"), answer))


def casehold(row: dict) -> dict:
    """Fields context, endings, label (LexGLUE), or citing_prompt, holding_0 to holding_4, label (the authors').

    The context has ``<HOLDING>`` where the holding of the cited case was removed, and the label counts from 0. The data
    has no traces: one in ``trace`` is read, and ends with the answer.
    """
    if "citing_prompt" in row:
        context, options = read_text(row, "citing_prompt"), [read_text(row, f"holding_{n}") for n in range(5)]
    else:
        context, options = read_text(row, "context"), _options(row["endings"], "endings")
    question = f"Context: {context}\nQuestion: Which holding belongs in the place of <HOLDING>?"
    answer = _numbered("label", row.get("label"), len(options))
    return _example(question, options, answer, optional_text(row, "trace"))


def arc(row: dict) -> dict:
    """Fields question, choices (``{"text": [...], "label": [...]}``), answerKey, one of the labels.

    Labels may be letters or numbers; in the prompt they are letters. CommonsenseQA has the same fields. The data has no
    traces: one in ``trace`` is read, and ends with the answer.
    """
    choices = row["choices"]
    texts, labels = (choices.get(name) if isinstance(choices, Mapping) else None for name in ("text", "label"))
    if not isinstance(texts, (list, tuple)) or not isinstance(labels, (list, tuple)) or len(texts) != len(labels):
        raise ValueError("field 'choices' must be {'text': [...], 'label': [...]} with a label for each text")
    options, key = _options(texts, "choices"), optional_text(row, "answerKey")
    if key is not None and key not in labels:
        raise ValueError(f"field 'answerKey' is {key!r}, none of the labels {', '.join(map(str, labels))}")
    answer = None if key is None else LETTERS[labels.index(key)]
    return _example(_asked(row), options, answer, optional_text(row, "trace"))


def gpqa(row: dict) -> dict:
    """Fields Question, Correct Answer, Incorrect Answer 1 to 3, Explanation: the trace, with the answer added.

    The options are ordered by the SHA-256 of question and option: the same on any machine, and the position says
    nothing about which is right.
    """
    question = read_text(row, "Question")
    correct = read_text(row, "Correct Answer")
    wrong = [read_text(row, f"Incorrect Answer {n}") for n in (1, 2, 3)]
    options = sorted([correct, *wrong], key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    answer = LETTERS[options.index(correct)]
    return _example(f"Question: {question}", options, answer, _concluded(optional_text(row, "Explanation"), answer))


def _example(question: str, options: Sequence[str], answer: str | None, trace: str | None) -> dict:
    """A prompt of question, lettered options and answer format; a trace without an answer gets the gold one."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    if trace is not None and extraction.extract_letter(trace) is None:
        trace = _concluded(trace, answer)
    prompt = f"{question}\nOptions:\n{listed}\nEnd with: The answer is (letter).\nAnswer:\n"
    return {"prompt": prompt, "completion": trace, "answer": answer}


def _asked(row: dict) -> str:
    return f"Question: {read_text(row, 'question')}"


def _concluded(trace: str | None, answer: str | None) -> str | None:
    """A trace and, on its own line, the answer; only the trace if the answer is unknown."""
    return trace if trace is None or answer is None else f"{trace}\nThe answer is ({answer})."


def _options(options: Any, field: str = "options") -> list[str]:
    """Options as a list of texts without their letters."""
    if isinstance(options, str):
        # "Answer Choices:\nA. first\nB. second": everything from one letter to the next; text before A is ignored.
        parts = re.split(r"^[ \t]*\(?([A-J])[.):][ \t]*", options, flags=re.MULTILINE)
        options = dict(zip(parts[1::2], parts[2::2], strict=True))
        if len(options) < len(parts) // 2:
            raise ValueError(f"field {field!r} has letters that do not run A, B, C, ...")
    elif isinstance(options, (list, tuple)) and all(isinstance(one, Mapping) for one in options):
        options = {one.get("key"): one.get("value") for one in options}
    if isinstance(options, Mapping):
        # A column of a table has all letters in all its rows.
        options = {letter: option for letter, option in options.items() if option is not None}
        if "".join(map(str, options)) != LETTERS[: len(options)]:
            raise ValueError(f"field {field!r} has letters that do not run A, B, C, ...")
        options = list(options.values())
    if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"field {field!r} must hold 2 to {len(LETTERS)} options: a list, or lines such as 'A. ...'")
    return [str(option).strip() for option in options]


def _letter(field: str, letter: str, letters: str) -> str:
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"field {field!r} is {letter!r}, not a letter from A to {letters[-1]}")
    return letter


def _numbered(field: str, number: Any, count: int, *, first: int = 0, fix: str = "") -> str | None:
    """Letter of the option with a number, which may be text; None for none."""
    if number is None or number == "":
        return None
    index = int(number) - first if isinstance(number, int) or str(number).strip().isdecimal() else -1
    if isinstance(number, bool) or not 0 <= index < count:
        raise ValueError(f"field {field!r} is {number!r}, not a number from {first} to {first + count - 1}{fix}")
    return LETTERS[index]


def _option_letter(answer: str, options: list[str]) -> str:
    """Letter of the option that `answer` gives: its text, possibly followed by an explanation, or its letter."""
    letters = LETTERS[: len(options)]
    # "B", "(B)", "B. text": but not "A patient with ...".
    named = re.fullmatch(rf"\(?([{letters}])\)?|\(?([{letters}])[.):].*", answer, flags=re.DOTALL)
    texts = [folded(option) for option in options]
    # The longest match wins: "Type II" must not match the option "Type I".
    bare = folded(answer)
    fits = [i for i, text in enumerate(texts) if text and re.match(re.escape(text) + r"(?!\w)", bare)]
    if fits:
        return letters[max(fits, key=lambda i: len(texts[i]))]
    if named:
        return named[1] or named[2]
    raise ValueError(f"field 'answer' ({answer[:60]!r}) matches none of the options")
