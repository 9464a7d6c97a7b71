"""Tasks: conversion of a public dataset's rows to demonstrations, and extraction and comparison of its answers.

Every prompt states the answer format in one line and ends in a newline, and every completion starts and ends with a
visible character. So prompt and completion, tokenized separately, give the same tokens as the concatenated text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tracereward.errors import check_choice, check_text
from tracereward.messages import check_messages
from tracereward.tasks import answers, extraction
from tracereward.thinking import ANY, Thinking

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset format and its answer checking.

    Attributes:
        name: value of `--task`.
        dataset: Hub id of the default dataset; None if there is none.
        subset: configuration of that dataset.
        example: raw row -> ``{"prompt", "completion", "answer"}``; completion and answer are None if the row has none.
            Does not modify the row. Raises KeyError(field) for a missing field, ValueError for an invalid one.
        read: answer part of a completion -> final answer, or None if none is stated.
        equal: (extracted answer, gold answer) -> whether they are equal.
        completion_field: raw field that holds the trace, for error messages.
        step_delimiter: text that ends a step of a trace.
        answer_line: format of the line that states the answer.
        thinking: how completions are split into thinking and answer; None knows the marks of well-known models.
    """

    name: str
    example: Callable[[dict], dict]
    read: Callable[[str], str | None]
    equal: Callable[[str, str], bool]
    dataset: str | None = None
    subset: str | None = None
    completion_field: str = "completion"
    step_delimiter: str = "\n"
    answer_line: str = "#### {}"
    thinking: Thinking | None = None

    def extract(self, completion: str) -> str | None:
        """The final answer; None if none is stated, or if the thinking is not closed: answers in it do not count."""
        answer = (self.thinking or ANY).answer(completion)
        return None if answer is None else self.read(answer)

    def verify(self, completion: str, answer: str) -> bool:
        """Whether the answer extracted from `completion` equals the gold `answer`; False if there is none."""
        stated = self.extract(check_text("completion", completion))
        return stated is not None and self.equal(stated, check_text("answer", answer))


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        InputError: there is no such task; the message suggests the nearest name.
    """
    return TASKS[check_choice("task", name, TASKS)]


def _text(row: dict, field: str) -> str:
    """Required text field of a row, stripped."""
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value.strip()


def _optional_text(row: dict, field: str) -> str | None:
    """Optional text field of a row, stripped; None if it is missing, null or blank."""
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(row, field)


def gsm8k(row: dict) -> dict:
    """Fields question, answer. Removes calculator annotations ``<<48/2=24>>``, and separators of the gold answer."""
    prompt = f"Question: {_text(row, 'question')}\nEnd with #### and the number.\nAnswer:\n"
    trace = _optional_text(row, "answer")
    if trace is None:
        return {"prompt": prompt, "completion": None, "answer": None}
    trace = re.sub(r"<<[^<>]*>>", "", trace)
    completion = "\n".join(line.rstrip() for line in trace.splitlines())
    return {"prompt": prompt, "completion": completion, "answer": extraction.extract_hashes(completion)}


def math(row: dict) -> dict:
    r"""Fields problem, solution with its answer in ``\boxed{}``. The optional field answer takes precedence."""
    prompt = f"Problem: {_text(row, 'problem')}\nPut the final answer in \\boxed{{}}.\nSolution:\n"
    completion = _optional_text(row, "solution")
    answer = _optional_text(row, "answer")
    if answer is None and completion is not None:
        answer = extraction.extract_boxed(completion)
    return {"prompt": prompt, "completion": completion, "answer": answer}


def mmlu_pro(row: dict) -> dict:
    """Fields question, options (list), answer (letter), and the trace in ``trace`` or, on the Hub, ``cot_content``.

    If a trace states no answer (26 of 6,358; most were truncated by a token limit), the gold answer is appended on its
    own line, so that every demonstration ends with one.
    """
    options = _options(row)
    answer = _optional_text(row, "answer")
    if answer is not None and (len(answer) != 1 or answer not in LETTERS[: len(options)]):
        raise ValueError(f"field 'answer' is {answer!r}, not a letter from A to {LETTERS[len(options) - 1]}")
    trace = _optional_text(row, "trace") or _optional_text(row, "cot_content")
    if trace is not None:
        trace = re.sub(r"\AA:\s*(?=\S)", "", trace)
        if answer is not None and extraction.extract_letter(trace) is None:
            trace = f"{trace}\nThe answer is ({answer})."
    return {"prompt": _choice_prompt(row, options), "completion": trace, "answer": answer}


def medreason(row: dict) -> dict:
    """Fields question, options (list, or lines "A. ..."), reasoning, answer (a letter, or the text of an option).

    If the answer is an option's text, an explanation after it is ignored. The completion is the reasoning and, on its
    own line, the answer.
    """
    options = _options(row)
    answer = None if _optional_text(row, "answer") is None else _option_letter(_text(row, "answer"), options)
    completion = _optional_text(row, "reasoning")
    if completion is not None and answer is not None:
        completion = f"{completion}\nThe answer is ({answer})."
    return {"prompt": _choice_prompt(row, options), "completion": completion, "answer": answer}


def _options(row: dict) -> list[str]:
    """Options as a list of texts without their letters."""
    options = row["options"]
    if isinstance(options, str):
        # "Answer Choices:\nA. first\nB. second": everything from one letter to the next; text before A is ignored.
        parts = re.split(r"^[ \t]*\(?([A-J])[.):][ \t]*", options, flags=re.MULTILINE)
        if "".join(parts[1::2]) != LETTERS[: len(parts) // 2]:
            raise ValueError("field 'options' has letters that do not run A, B, C, ...")
        options = parts[2::2]
    if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"field 'options' must hold 2 to {len(LETTERS)} options: a list, or lines such as 'A. ...'")
    return [str(option).strip() for option in options]


def _option_letter(answer: str, options: list[str]) -> str:
    """Letter of the option that `answer` gives: its text, possibly followed by an explanation, or its letter."""
    letters = LETTERS[: len(options)]
    # "B", "(B)", "B. text": but not "A patient with ...".
    named = re.fullmatch(rf"\(?([{letters}])\)?|\(?([{letters}])[.):].*", answer, flags=re.DOTALL)
    texts = [_bare(option) for option in options]
    # The longest match wins: "Type II" must not match the option "Type I".
    bare = _bare(answer)
    fits = [i for i, text in enumerate(texts) if text and re.match(re.escape(text) + r"(?!\w)", bare)]
    if fits:
        return letters[max(fits, key=lambda i: len(texts[i]))]
    if named:
        return named[1] or named[2]
    raise ValueError(f"field 'answer' ({answer[:60]!r}) matches none of the options")


def _bare(text: str) -> str:
    """Case-folded text with single spaces and no final full stop."""
    return " ".join(text.split()).rstrip(".").casefold()


def _choice_prompt(row: dict, options: list[str]) -> str:
    """Question, lettered options, and the answer format."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    return f"Question: {_text(row, 'question')}\nOptions:\n{listed}\nEnd with: The answer is (letter).\nAnswer:\n"


def strategyqa(row: dict) -> dict:
    """Fields question, answer (bool), facts (list or string): the trace is the facts, one per line, and the answer.

    The field decomposition is not used: its questions refer to one another by number, and in two rows of three their
    number differs from that of the facts.
    """
    prompt = f"Question: {_text(row, 'question')}\nEnd with: The answer is yes. (or no.)\nAnswer:\n"
    answer, facts = row.get("answer"), row.get("facts")
    if answer is not None and not isinstance(answer, bool):
        raise ValueError(f"field 'answer' is {type(answer).__name__}, not true or false")
    gold = None if answer is None else "yes" if answer else "no"
    return {"prompt": prompt, "completion": _steps_and_answer(facts, gold), "answer": gold}


def _steps_and_answer(steps: list | tuple | str | None, answer: str | None) -> str | None:
    """The steps, one per line, and a line that states the answer; None without steps or without an answer."""
    steps = [steps] if isinstance(steps, str) else steps or []
    lines = [line for line in (" ".join(str(step).split()) for step in steps) if line]
    return None if answer is None or not lines else "\n".join([*lines, f"The answer is {answer.removesuffix('.')}."])


def hotpotqa(row: dict) -> dict:
    """Fields question, context, supporting_facts, answer, in the format of the authors' files or of the Hub.

    The prompt has all paragraphs, one per line. The trace is the supporting sentences in the order of
    supporting_facts, one per line, and the answer. Facts with a sentence index out of range are dropped: the public
    dataset has a few.
    """
    paragraphs = _pairs(row, "context", "title", "sentences")
    texts = {str(title): sentences for title, sentences in paragraphs}
    if not all(isinstance(sentences, (list, tuple)) for sentences in texts.values()):
        raise ValueError("field 'context' must hold a list of sentences for each title")
    listed = [f"{title}: {' '.join(' '.join(map(str, sentences)).split())}" for title, sentences in texts.items()]
    question = f"Question: {_text(row, 'question')}\nEnd with: The answer is (a few words, yes or no).\nAnswer:\n"
    answer = _optional_text(row, "answer")
    hops = []
    for title, number in _pairs(row, "supporting_facts", "title", "sent_id") if row.get("supporting_facts") else []:
        if title not in texts:
            raise ValueError(f"field 'supporting_facts' names {str(title)[:60]!r}, which no paragraph of 'context' has")
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"field 'supporting_facts' has {number!r} instead of a sentence index")
        hops += texts[title][number : number + 1]
    return {
        "prompt": "\n".join(["Context:", *listed, question]),
        "completion": _steps_and_answer(hops, answer),
        "answer": answer,
    }


def _pairs(row: dict, field: str, first: str, second: str) -> list[tuple]:
    """Pairs of a field that is a list of pairs (the authors' files) or a dict of two equally long lists (the Hub)."""
    value = row[field]
    if isinstance(value, dict):
        left, right = value.get(first), value.get(second)
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
            return list(zip(left, right))
    elif isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return [tuple(pair) for pair in value]
    raise ValueError(f"field {field!r} is neither a list of pairs nor {{{first!r}: [...], {second!r}: [...]}}")


def prontoqa(row: dict) -> dict:
    """Fields context, question, answer, explanation (list or string): the trace is the proof and the answer.

    The proof has one step per line. The answer is true or false, as a boolean, a word, or the letter of one of the
    options ("A) True").
    """
    prompt = f"Context: {_text(row, 'context')}\nQuestion: {_text(row, 'question')}\n"
    gold = None if row.get("answer") is None else _truth(row)
    return {
        "prompt": f"{prompt}End with: The answer is true. (or false.)\nAnswer:\n",
        "completion": _steps_and_answer(row.get("explanation"), gold),
        "answer": gold,
    }


def _truth(row: dict) -> str:
    """``true`` or ``false``: the answer of a row, or the option with that letter."""
    answer = _bare(str(row["answer"]))
    if len(answer) == 1 and row.get("options"):
        listed = (re.fullmatch(r"\(?([A-Ja-j])[.):]\s*(.*)", str(option).strip()) for option in row["options"])
        answer = next((_bare(option[2]) for option in listed if option and option[1].casefold() == answer), answer)
    if answer not in ("true", "false"):
        raise ValueError(f"field 'answer' is {str(row['answer'])[:60]!r}, not true, false or the letter of an option")
    return answer


def generic(row: dict) -> dict:
    """TRL's prompt-completion rows: fields prompt, completion and, optionally, answer; strings or lists of messages.

    Only trailing white space of a completion is removed: a policy would not learn to write it, and a discriminator
    would recognise it. A missing, null or blank completion is None.
    """
    prompt, completion, answer = row["prompt"], row.get("completion"), row.get("answer")
    if isinstance(prompt, str):
        _text(row, "prompt")
    else:
        check_messages(prompt, "prompt")
    if isinstance(completion, str):
        completion = completion.rstrip() or None
    elif completion is not None:
        check_messages(completion, "completion")
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise ValueError(f"field 'answer' is {type(answer).__name__}, not text or a number")
    answer = None if answer is None else str(answer).strip() or None
    return {"prompt": prompt, "completion": completion, "answer": answer}


def equal_any(answer: str, gold: str) -> bool:
    """Equal as mathematics, as yes or no, or as text."""
    return answers.equal_math(answer, gold) or answers.equal_yes_no(answer, gold)


# A table: its entries look alike on purpose.
_ALL = (
    Task(name="arithmetic", example=generic, read=extraction.extract_number, equal=answers.equal_math),
    Task(
        name="gsm8k",
        dataset="openai/gsm8k",
        subset="main",
        example=gsm8k,
        read=extraction.extract_number,
        equal=answers.equal_math,
        completion_field="answer",
    ),
    # The traces are long numbered lists: a line is a step.
    Task(
        name="medreason",
        dataset="UCSC-VLAA/MedReason",
        example=medreason,
        read=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="reasoning",
        answer_line="The answer is ({}).",
    ),
    # The traces are single paragraphs: a sentence is a step.
    Task(
        name="mmlu_pro",
        dataset="TIGER-Lab/MMLU-Pro",
        example=mmlu_pro,
        read=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="trace",
        step_delimiter=". ",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="strategyqa",
        dataset="ChilleD/StrategyQA",
        example=strategyqa,
        read=extraction.extract_yes_no,
        equal=answers.equal_yes_no,
        completion_field="facts",
        answer_line="The answer is {}.",
    ),
    Task(
        name="hotpotqa",
        dataset="hotpotqa/hotpot_qa",
        subset="distractor",
        example=hotpotqa,
        read=extraction.extract_span,
        equal=answers.equal_span,
        completion_field="supporting_facts",
        answer_line="The answer is {}.",
    ),
    # The Hub datasets have questions and answers without proofs.
    Task(
        name="prontoqa",
        example=prontoqa,
        read=extraction.extract_yes_no,
        equal=answers.equal_yes_no,
        completion_field="explanation",
        answer_line="The answer is {}.",
    ),
    Task(
        name="math",
        dataset="DigitalLearningGmbH/MATH-lighteval",
        example=math,
        read=extraction.extract_math,
        equal=answers.equal_math,
        completion_field="solution",
        answer_line="\\boxed{{{}}}",
    ),
    Task(name="generic", example=generic, read=extraction.extract_any, equal=equal_any),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
