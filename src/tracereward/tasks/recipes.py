"""Recipes: how the rows of a public data set become demonstrations, and how its answers are found and compared.

Every prompt says in one line how the answer is to be written and ends in a newline, and every completion made here
starts and ends with a visible character: so prompt and completion, tokenised apart, give the tokens of the whole.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tracereward.errors import check_choice
from tracereward.tasks import answers

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        name: what `--task` takes.
        dataset: Hub id of the data used when the user names none; None when there is no such set.
        subset: configuration of that Hub set.
        example: raw row -> ``{"prompt", "completion", "answer"}``; completion and answer are None if the row has none.
            Reads the row only. Raises KeyError(field) for a missing field, ValueError for one that cannot be used.
        extract: completion -> final answer, or None when none is stated.
        equal: (extracted answer, gold answer) -> whether they are equal.
        completion_field: raw field that holds the trace, for error messages.
        step_delimiter: text that ends a step of a trace.
        answer_line: how a trace of this kind states its answer.
    """

    name: str
    dataset: str | None
    subset: str | None
    example: Callable[[dict], dict]
    extract: Callable[[str], str | None]
    equal: Callable[[str, str], bool]
    completion_field: str = "completion"
    step_delimiter: str = "\n"
    answer_line: str = "#### {}"

    def verify(self, completion: str, answer: str) -> bool:
        """Whether the answer that `completion` states equals the gold `answer`; False when it states none."""
        stated = self.extract(completion)
        return stated is not None and self.equal(stated, answer)


def get_task(name: str) -> Task:
    """Return the recipe called `name`.

    Raises:
        InputError: there is none; names the nearest.
    """
    return TASKS[check_choice("task", name, TASKS)]


def _text(row: dict, field: str) -> str:
    """Required text of a row, without space around it."""
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value.strip()


def _optional_text(row: dict, field: str) -> str | None:
    """Text of a row, or None when the field is missing, null or blank."""
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(row, field)


def gsm8k(row: dict) -> dict:
    """Fields question, answer. The trace loses its calculator marks ``<<48/2=24>>``, the gold answer its separators."""
    prompt = f"Question: {_text(row, 'question')}\nEnd with #### and the number.\nAnswer:\n"
    trace = _optional_text(row, "answer")
    if trace is None:
        return {"prompt": prompt, "completion": None, "answer": None}
    trace = re.sub(r"<<[^<>]*>>", "", trace)
    completion = "\n".join(line.rstrip() for line in trace.splitlines())
    return {"prompt": prompt, "completion": completion, "answer": answers.extract_hashes(completion)}


def math(row: dict) -> dict:
    r"""Fields problem, solution with its answer in ``\boxed{}``. A field answer, where there is one, has precedence."""
    prompt = f"Problem: {_text(row, 'problem')}\nPut the final answer in \\boxed{{}}.\nSolution:\n"
    completion = _optional_text(row, "solution")
    answer = _optional_text(row, "answer")
    if answer is None and completion is not None:
        answer = answers.extract_boxed(completion)
    return {"prompt": prompt, "completion": completion, "answer": answer}


def mmlu_pro(row: dict) -> dict:
    """Fields question, options (list), answer (letter), and the trace in ``trace`` or, on the Hub, ``cot_content``.

    A trace that states no answer (26 of 6,358 that we read; most were cut off by their writer's token limit) gets the
    gold answer on a line of its own, so that every demonstration ends with one.
    """
    options = _options(row)
    answer = _optional_text(row, "answer")
    if answer is not None and (len(answer) != 1 or answer not in LETTERS[: len(options)]):
        raise ValueError(f"field 'answer' is {answer!r}, not a letter from A to {LETTERS[len(options) - 1]}")
    trace = _optional_text(row, "trace") or _optional_text(row, "cot_content")
    if trace is not None:
        trace = re.sub(r"\AA:\s*(?=\S)", "", trace)
        if answer is not None and answers.extract_letter(trace) is None:
            trace = f"{trace}\nThe answer is ({answer})."
    return {"prompt": _choice_prompt(row, options), "completion": trace, "answer": answer}


def medreason(row: dict) -> dict:
    """Fields question, options (list, or lines "A. ..."), reasoning, answer (a letter, or the text of an option).

    Where the answer is an option's text, an explanation after it is ignored. The completion is the reasoning and, on a
    line of its own, the answer.
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
        # "Answer Choices:\nA. first\nB. second": everything from one letter to the next, whatever stands before A.
        parts = re.split(r"^[ \t]*\(?([A-J])[.):][ \t]*", options, flags=re.MULTILINE)
        if "".join(parts[1::2]) != LETTERS[: len(parts) // 2]:
            raise ValueError("field 'options' has letters that do not run A, B, C, ...")
        options = parts[2::2]
    if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"field 'options' must hold 2 to {len(LETTERS)} options: a list, or lines such as 'A. ...'")
    return [str(option).strip() for option in options]


def _option_letter(answer: str, options: list[str]) -> str:
    """Letter of the option that `answer` names: by its text, maybe with an explanation after it, or by its letter."""
    letters = LETTERS[: len(options)]
    # "B", "(B)", "B. text": but not "A patient with ...".
    named = re.fullmatch(rf"\(?([{letters}])\)?|\(?([{letters}])[.):].*", answer, flags=re.DOTALL)
    texts = [_bare(option) for option in options]
    # The longest match wins: "Type II" must not be taken for the option "Type I".
    bare = _bare(answer)
    fits = [i for i, text in enumerate(texts) if text and re.match(re.escape(text) + r"(?!\w)", bare)]
    if fits:
        return letters[max(fits, key=lambda i: len(texts[i]))]
    if named:
        return named[1] or named[2]
    raise ValueError(f"field 'answer' ({answer[:60]!r}) names none of the options")


def _bare(text: str) -> str:
    """Case-folded text with single spaces and no final full stop."""
    return " ".join(text.split()).rstrip(".").casefold()


def _choice_prompt(row: dict, options: list[str]) -> str:
    """Question, lettered options, and how to answer."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    return f"Question: {_text(row, 'question')}\nOptions:\n{listed}\nEnd with: The answer is (letter).\nAnswer:\n"


def strategyqa(row: dict) -> dict:
    """Fields question, answer (bool), facts (list, or text): the trace is the facts, one a line, and the answer.

    The field decomposition of the authors' file is not used: it holds questions that refer to one another by number,
    and in two rows of three there are more or fewer of them than facts.
    """
    prompt = f"Question: {_text(row, 'question')}\nEnd with: The answer is yes. (or no.)\nAnswer:\n"
    answer, facts = row.get("answer"), row.get("facts")
    if answer is not None and not isinstance(answer, bool):
        raise ValueError(f"field 'answer' is {type(answer).__name__}, not true or false")
    gold = None if answer is None else "yes" if answer else "no"
    return {"prompt": prompt, "completion": _steps_and_answer(facts, gold), "answer": gold}


def _steps_and_answer(steps: list | tuple | str | None, answer: str | None) -> str | None:
    """The steps, one a line, and a line that states the answer; None without any step or without an answer."""
    steps = [steps] if isinstance(steps, str) else steps or []
    lines = [line for line in (" ".join(str(step).split()) for step in steps) if line]
    return None if answer is None or not lines else "\n".join([*lines, f"The answer is {answer.removesuffix('.')}."])


def hotpotqa(row: dict) -> dict:
    """Fields question, context, supporting_facts, answer; the last two as in the authors' files or on the Hub.

    The prompt has all paragraphs, a line each. The trace is the supporting sentences in the order of supporting_facts,
    one a line, and the answer. A fact whose paragraph has no such sentence is left out: the public set has a few.
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
            raise ValueError(f"field 'supporting_facts' has {number!r} where the number of a sentence belongs")
        hops += texts[title][number : number + 1]
    return {
        "prompt": "\n".join(["Context:", *listed, question]),
        "completion": _steps_and_answer(hops, answer),
        "answer": answer,
    }


def _pairs(row: dict, field: str, first: str, second: str) -> list[tuple]:
    """Pairs of a field that is a list of them (the authors' files), or two lists of equal length by name (the Hub)."""
    value = row[field]
    if isinstance(value, dict):
        left, right = value.get(first), value.get(second)
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
            return list(zip(left, right))
    elif isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return [tuple(pair) for pair in value]
    raise ValueError(f"field {field!r} is neither a list of pairs nor {{{first!r}: [...], {second!r}: [...]}}")


def prontoqa(row: dict) -> dict:
    """Fields context, question, answer, explanation (list, or text): the trace is the proof, one step a line, and the
    answer.

    That is true or false, as a truth value, as a word, or as the letter of one of the options ("A) True").
    """
    prompt = f"Context: {_text(row, 'context')}\nQuestion: {_text(row, 'question')}\n"
    gold = None if row.get("answer") is None else _truth(row)
    return {
        "prompt": f"{prompt}End with: The answer is true. (or false.)\nAnswer:\n",
        "completion": _steps_and_answer(row.get("explanation"), gold),
        "answer": gold,
    }


def _truth(row: dict) -> str:
    """``true`` or ``false``: the answer of a row, or the option whose letter it is."""
    answer = _bare(str(row["answer"]))
    if len(answer) == 1 and row.get("options"):
        listed = (re.fullmatch(r"\(?([A-Ja-j])[.):]\s*(.*)", str(option).strip()) for option in row["options"])
        answer = next((_bare(option[2]) for option in listed if option and option[1].casefold() == answer), answer)
    if answer not in ("true", "false"):
        raise ValueError(f"field 'answer' is {str(row['answer'])[:60]!r}, neither true or false nor an option that is")
    return answer


def generic(row: dict) -> dict:
    """TRL's prompt-completion rows: fields prompt, completion and, where known, answer; texts or lists of messages.

    Nothing is changed but white space at the end of a completion, which no policy would learn to write and which a
    discriminator would recognise. A missing, null or blank completion is None.
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


def check_messages(messages: object, field: str) -> None:
    """Raise ValueError unless `messages` is a non-empty list of ``{"role": text, "content": text}``."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        kind = type(messages).__name__
        raise ValueError(f"field {field!r} is {kind}, neither text nor a list of {{role, content}} messages")
    if not any(m["content"].strip() for m in messages):
        raise ValueError(f"field {field!r} is empty")


def equal_any(answer: str, gold: str) -> bool:
    """Equal as mathematics, as yes or no, or as text."""
    return answers.equal_math(answer, gold) or answers.equal_yes_no(answer, gold)


_NUMBER = (answers.extract_number, answers.equal_math)
_LETTER = (answers.extract_letter, answers.equal_text)
_LETTER_LINE = "The answer is ({})."

TASKS: dict[str, Task] = {
    "arithmetic": Task("arithmetic", None, None, generic, *_NUMBER),
    "gsm8k": Task("gsm8k", "openai/gsm8k", "main", gsm8k, *_NUMBER, completion_field="answer"),
    # The traces are long numbered lists, a line a step.
    "medreason": Task(
        "medreason", "UCSC-VLAA/MedReason", None, medreason, *_LETTER, "reasoning", answer_line=_LETTER_LINE
    ),
    # The traces are single paragraphs: a sentence is a step.
    "mmlu_pro": Task("mmlu_pro", "TIGER-Lab/MMLU-Pro", None, mmlu_pro, *_LETTER, "trace", ". ", _LETTER_LINE),
    "strategyqa": Task(
        "strategyqa",
        "ChilleD/StrategyQA",
        None,
        strategyqa,
        answers.extract_yes_no,
        answers.equal_yes_no,
        "facts",
        answer_line="The answer is {}.",
    ),
    "hotpotqa": Task(
        "hotpotqa",
        "hotpotqa/hotpot_qa",
        "distractor",
        hotpotqa,
        answers.extract_span,
        answers.equal_span,
        "supporting_facts",
        answer_line="The answer is {}.",
    ),
    # The sets on the Hub have questions and answers without the proofs.
    "prontoqa": Task(
        "prontoqa",
        None,
        None,
        prontoqa,
        answers.extract_yes_no,
        answers.equal_yes_no,
        "explanation",
        answer_line="The answer is {}.",
    ),
    "math": Task(
        "math",
        "DigitalLearningGmbH/MATH-lighteval",
        None,
        math,
        answers.extract_math,
        answers.equal_math,
        "solution",
        answer_line="\\boxed{{{}}}",
    ),
    "generic": Task("generic", None, None, generic, answers.extract_any, equal_any),
}
