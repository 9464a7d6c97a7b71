"""Mathematics: rows of word problems and of competitions as prompt, completion and answer."""

import re

from tracereward.messages import check_messages, message_text, read_sharegpt
from tracereward.tasks import answers, extraction
from tracereward.tasks.fields import optional_text, read_text

COMPLETE = "is_reasoning_complete"
CORRECT = ("correctness_math_verify", "correctness_llama")
"""Fields with a mark for each of OpenR1's generations; a generation is correct if either of `CORRECT` says so."""


def gsm8k(row: dict) -> dict:
    """Fields question, answer. Removes calculator annotations ``<<48/2=24>>``, and separators of the gold answer."""
    prompt = f"Question: {read_text(row, 'question')}\nEnd with #### and the number.\nAnswer:\n"
    trace = optional_text(row, "answer")
    if trace is None:
        return {"prompt": prompt, "completion": None, "answer": None}
    trace = re.sub(r"<<[^<>]*>>", "", trace)
    completion = "\n".join(line.rstrip() for line in trace.splitlines())
    return {"prompt": prompt, "completion": completion, "answer": extraction.extract_hashes(completion)}


def math(row: dict) -> dict:
    r"""Fields problem, solution with its answer in ``\boxed{}``. The optional field answer takes precedence."""
    return _boxed(row, optional_text(row, "solution"), optional_text(row, "answer"))


def aime(row: dict) -> dict:
    r"""Fields problem, answer (0 to 999), solution; with a capital letter in some copies.

    The answer may have leading zeros; without it, the box in the solution is read. A solution that does not box the
    answer gets a line that does.
    """
    row = {name: row[name] if name in row else row.get(name.title()) for name in ("problem", "answer", "solution")}
    if row["problem"] is None:
        raise KeyError("problem")
    solution = optional_text(row, "solution")
    given = row["answer"] if row["answer"] is not None else extraction.extract_boxed(solution or "")
    if given is None:
        return _boxed(row, solution, None, "the final answer, an integer from 0 to 999,")
    if not re.fullmatch(r"\d{1,3}", str(given).strip()):
        raise ValueError(f"field 'answer' is {str(given)[:60]!r}, not an integer from 0 to 999")
    answer = str(int(given))
    if solution is not None and not answers.equal_math(extraction.extract_boxed(solution) or "", answer):
        solution = f"{solution}\nThe answer is \\boxed{{{answer}}}."
    return _boxed(row, solution, answer, "the final answer, an integer from 0 to 999,")


def openr1(row: dict) -> dict:
    r"""Fields problem, answer or expected_answer, and a trace in one of these, the first that the row has.

    - ``generations``, a list: the first one that is complete and correct by the fields `COMPLETE` and `CORRECT`, lists
      of true and false; without marks, the first one whose answer is the gold answer. None if none is.
    - ``generated_solution``, or ``messages`` or ``conversations`` of one turn of the user and one of the assistant.

    The reference in ``solution`` is not read: `math` reads it.
    """
    answer = next((row[name] for name in ("answer", "expected_answer") if row.get(name) is not None), None)
    gold = None if answer is None else str(answer).strip() or None
    chat = next((name for name in ("messages", "conversations") if row.get(name)), None)
    if row.get("generations"):
        trace = _right_generation(row, gold)
    else:
        trace = optional_text(row, "generated_solution")
        if trace is None and chat is not None:
            trace = _only_reply(row[chat], chat)
    return _boxed(row, trace, gold)


def _boxed(row: dict, completion: str | None, answer: str | None, what: str = "the final answer") -> dict:
    r"""The row of a task whose answers stand in ``\boxed{}``; without an answer, the box in the completion is read."""
    prompt = f"Problem: {read_text(row, 'problem')}\nPut {what} in \\boxed{{}}.\nSolution:\n"
    if answer is None and completion is not None:
        answer = extraction.extract_boxed(completion)
    return {"prompt": prompt, "completion": completion, "answer": answer}


def _right_generation(row: dict, gold: str | None) -> str | None:
    """The first generation that is complete and correct, None if none is."""
    texts = row["generations"]
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError("field 'generations' must be a list of texts")
    marks = {name: row[name] for name in (COMPLETE, *CORRECT) if row.get(name)}
    for name, values in marks.items():
        if not isinstance(values, (list, tuple)) or len(values) != len(texts):
            raise ValueError(f"field {name!r} must have true or false for each of the {len(texts)} generations")
    marked = [marks[name] for name in CORRECT if name in marks]
    if not marked and gold is None and len(texts) > 1:
        raise ValueError(
            f"field 'generations' has {len(texts)} traces and no field says which are right: add {CORRECT[0]!r}, true "
            "or false for each, or 'answer', the gold answer"
        )
    for index, text in enumerate(texts):
        complete = marks[COMPLETE][index] is not False if COMPLETE in marks else True
        if marked:
            right = any(values[index] for values in marked)
        else:
            right = gold is None or answers.equal_math(extraction.extract_math(text) or "", gold)
        if complete and right and text.strip():
            return text.strip()
    return None


def _only_reply(messages: object, field: str) -> str | None:
    """The assistant's message of a conversation of one turn."""
    if isinstance(messages, (list, tuple)):
        messages = [read_sharegpt(one) if isinstance(one, dict) else one for one in messages]
    check_messages(messages, field)
    assert isinstance(messages, list)
    replies = [message for message in messages if message["role"] == "assistant"]
    if len(replies) > 1:
        raise ValueError(
            f"field {field!r} has {len(replies)} messages of the assistant: only one is a trace; make a row of each, "
            "with the messages before it as 'prompt', and read them with --task generic"
        )
    return message_text(replies[0]).strip() or None if replies else None
