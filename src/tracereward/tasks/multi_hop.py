"""Several hops: rows with facts, supporting sentences or a proof as prompt, completion and answer."""

import re

from tracereward.tasks.fields import folded, optional_text, read_text


def strategyqa(row: dict) -> dict:
    """Fields question, answer (bool), facts (list or string): the trace is the facts, one per line, and the answer.

    The field decomposition is not used: its questions refer to one another by number, and in two rows of three their
    number differs from that of the facts.
    """
    prompt = f"Question: {read_text(row, 'question')}\nEnd with: The answer is yes. (or no.)\nAnswer:\n"
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
    question = f"Question: {read_text(row, 'question')}\nEnd with: The answer is (a few words, yes or no).\nAnswer:\n"
    answer = optional_text(row, "answer")
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
    prompt = f"Context: {read_text(row, 'context')}\nQuestion: {read_text(row, 'question')}\n"
    gold = None if row.get("answer") is None else _truth(row)
    return {
        "prompt": f"{prompt}End with: The answer is true. (or false.)\nAnswer:\n",
        "completion": _steps_and_answer(row.get("explanation"), gold),
        "answer": gold,
    }


def _truth(row: dict) -> str:
    """``true`` or ``false``: the answer of a row, or the option with that letter."""
    answer = folded(str(row["answer"]))
    if len(answer) == 1 and row.get("options"):
        listed = (re.fullmatch(r"\(?([A-Ja-j])[.):]\s*(.*)", str(option).strip()) for option in row["options"])
        answer = next((folded(option[2]) for option in listed if option and option[1].casefold() == answer), answer)
    if answer not in ("true", "false"):
        raise ValueError(f"field 'answer' is {str(row['answer'])[:60]!r}, not true, false or the letter of an option")
    return answer
