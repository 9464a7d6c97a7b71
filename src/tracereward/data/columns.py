"""Columns of other tools' data, read as prompt, completion and answer where there is only one way to read them.

What is read as what is said once for each data set; what can be read in several ways, or would lose a column that
matters, is refused with the command that fits.
"""

from collections.abc import Mapping
from typing import Any

from tracereward.console import note
from tracereward.data.readers import STDIN, data_name, format_of
from tracereward.errors import InputError
from tracereward.messages import REASONING_FIELDS, check_messages, message_text, read_sharegpt, reasoning_of
from tracereward.tasks.extraction import extract_any
from tracereward.tasks.recipes import TASKS, Task, generic

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns with a conversation; its last message, if it is the assistant's, is the completion."""
PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input")
"""Columns with a prompt; next to ``instruction``, ``input`` and ``context`` are a part of it (Alpaca, Dolly)."""
TRACES = ("completion", "candidates", "steps", "response", "solution", "output", "generated_solution")
"""Columns with a trace; without one, ``answer`` is it, or for questions the gold answer if it is one line."""
GOLDS = ("answer", "expected_answer")
"""Columns with the gold answer."""
RATIONALES = ("rationale", "explanation", "cot", "thought", *REASONING_FIELDS)
"""Columns with an expert's trace, next to ``answer`` of one line, which ends it."""
OWN_TRACES = TRACES[:3]
SEVERAL = ("completions", "responses", "outputs", "solutions", "samples", "generations")
"""Columns with a list of traces, read as candidates."""
CHOICES = ("options", "choices", "chosen", "rejected", "rationale", "explanation", "cot", "thought")
"""Columns that matter, and that no text of a row says how to read."""


def reads_columns(task: Task) -> bool:
    """Whether a task reads any prompt and completion, not the fields of one data set."""
    return task.example is generic


def own_columns(
    row: dict[str, Any], where: str, source: str, *, question: bool = False, expert: bool = False
) -> dict[str, Any]:
    """A row with the columns prompt, completion (or candidates, steps) and answer, made from those it has.

    Args:
        row: not changed; one that has these columns, or none that is known, is returned as it is.
        where: its location.
        source: its file or data set.
        question: whether a prompt is enough, and a short answer is the gold answer.
        expert: whether the trace is an expert's: a rationale and the answer next to it are one, and so is the preferred
            one of a pair.

    Raises:
        InputError: it can be read in several ways, or a column that matters would be lost; names `where`.
    """
    chat = next((name for name in CONVERSATIONS if _has(row, name)), None)
    if _has(row, "prompt") and (question or chat is None) and (question or any(name in row for name in OWN_TRACES)):
        return row
    if _has(row, "prompt") and any(_has(row, name) for name in OWN_TRACES):
        return row
    try:
        if chat is None and expert and not any(name in row for name in PROMPTS) and isinstance(row.get("chosen"), list):
            chat = "chosen"  # of preference data whose prompt is in both conversations
        found = _of_expert(row) if expert and chat is None else None
        found = found or (_of_texts(row, question) if chat is None else _of_conversation(row, chat))
    except ValueError as error:
        raise InputError(f"{where}: {error}{fix(row, source, question=question)}") from error
    if found is None:
        return row
    read, used = found
    if expert and _has(row, "rejected"):
        used = {**used, "worse trace, which is not read": ["rejected"]}
    _say(source, ", ".join(f"{' and '.join(map(repr, names))} as the {what}" for what, names in used.items()), row)
    kept = {name: value for name, value in row.items() if name != "answer"}
    return {**kept, **read}


_SAID: set[tuple[str, str]] = set()


def _say(source: str, what: str, row: Mapping[str, Any]) -> None:
    """Say once for each data set what is read as what, and which task fits too."""
    if (source, what) in _SAID:
        return
    _SAID.add((source, what))
    tasks = fitting_tasks(row)
    more = f" (--task {tasks[0]} reads them too, and states in the prompt how an answer is written)" if tasks else ""
    note(f"{data_name(source)}: reading {what}{more}")


def fix(row: Mapping[str, Any], source: str, *, question: bool = False) -> str:
    """The command that fits columns which are not read, as the end of a message; "" for a row without texts."""
    tasks = fitting_tasks(row, question=question)
    if tasks:
        return f"; --task {tasks[0]} reads them"
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in ("answer", "system", "id")]
    prompt = next((name for name in PROMPTS if name in texts), None) or next(iter(texts), None)
    others = [name for name in texts if name != prompt and name not in PROMPTS]
    trace = next((name for name in (*TRACES, *REASONING_FIELDS, *CHOICES) if name in others), None)
    trace = trace or next(iter(others), None)
    names = {old: new for old, new in ((prompt, "prompt"), (trace, "completion")) if old is not None and old != new}
    if not names or trace is None:
        return ""
    if source == STDIN:
        return f"; rename the columns: jq -c '. + {{{', '.join(f'{new}: .{old}' for old, new in names.items())}}}'"
    kind = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}.get(format_of(source) or "", "json")
    of = f"'{kind}', data_files='{source}'" if format_of(source) else f"'{source}'"
    return (
        f"; rename the columns, for example: python -c \"import datasets as d; d.load_dataset({of}, split='train')"
        f".rename_columns({names}).to_json('renamed.jsonl')\""
    )


def fitting_tasks(row: Mapping[str, Any], *, question: bool = False) -> list[str]:
    """Tasks that read a prompt, an answer and, but for a question, a completion; except those that read any columns."""
    fit = []
    for task in TASKS.values():
        try:
            example = {} if reads_columns(task) else task.example(dict(row))
        except (KeyError, ValueError, TypeError, AttributeError):
            continue
        if example and example["answer"] is not None and (question or example["completion"] is not None):
            fit.append(task.name)
    return fit


def _has(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and len(value) == 0)


Found = tuple[dict[str, Any], dict[str, list[str]]]
"""Our columns of a row, and the names of the columns that each was read from."""


def _of_conversation(row: dict[str, Any], name: str) -> Found:
    """Prompt and completion in a conversation."""
    if _has(row, "tools"):
        raise ValueError("field 'tools' is not read: traces with tool calls are not supported")
    messages = (
        [_as_message(message, name) for message in row[name]] if isinstance(row[name], (list, tuple)) else row[name]
    )
    check_messages(messages, name)
    used = [name]
    if _has(row, "system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
        used = ["system", name]
    *before, last = messages
    answer = {"answer": row["answer"]} if _has(row, "answer") else {}
    gold = {"gold answer": ["answer"]} if answer else {}
    if last["role"] != "assistant":
        return {"prompt": _prompt(messages), "completion": None, **answer}, {"prompt": used, **gold}
    if not before:
        raise ValueError(f"field {name!r} has no message before the assistant's")
    completion = [last] if reasoning_of(last) else message_text(last)
    if not isinstance(completion, str):
        message_text(last)  # refuses what is not read
    read = {"prompt": _prompt(before), "completion": completion, **answer}
    return read, {
        "completion": [f"last message of {name}"],
        "prompt": ["the others"] if used == [name] else used,
        **gold,
    }


def _prompt(messages: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A prompt as messages; as text if it is one message of the user, which a chat template renders the same."""
    if [message["role"] for message in messages] == ["user"]:
        return message_text(messages[0])
    return messages


def _as_message(message: Any, name: str) -> Any:
    """A message with role and content, from one that may have ShareGPT's ``from`` and ``value``."""
    if not isinstance(message, Mapping):
        return message
    message = read_sharegpt(message)
    role = message.get("role")
    if str(role) in ("tool", "function", "function_call", "observation", "ipython"):
        raise ValueError(f"field {name!r} has a message of {role!r}: traces with tool calls are not supported")
    return message


def _of_texts(row: dict[str, Any], question: bool) -> Found | None:
    """Prompt, completion and answer in columns of texts; None if no known column has a prompt."""
    prompts = [name for name in PROMPTS if name in row]
    extra = [name for name in ("input", "context") if "instruction" in prompts and name in row]
    prompts = [name for name in prompts if name not in extra]
    traces = [name for name in TRACES if name in row]
    several = [name for name in SEVERAL if isinstance(row.get(name), (list, tuple))]
    traces += several
    answer = row.get("answer")
    alone = not traces and isinstance(answer, str)
    short = isinstance(answer, str) and _is_short(answer)
    if alone and not (question and short):
        traces = ["answer"]
    if not prompts or (prompts == ["prompt"] and not traces):
        return None
    lost = [name for name in (*CHOICES, "tools") if _has(row, name)]
    lost += [name for name in ("context",) if _has(row, name) and name not in extra]
    reasoning = [name for name in REASONING_FIELDS if _has(row, name)]
    if reasoning and traces and traces[0] in ("answer", "candidates", "steps"):
        lost += reasoning
    if lost or len(prompts) > 1 or len(traces) > 1:
        names = lost or (prompts if len(prompts) > 1 else traces)
        what = "would be lost" if lost else f"could each be the {'prompt' if names is prompts else 'completion'}"
        raise ValueError(f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))} {what}")
    used = [*prompts, *(name for name in extra if _has(row, name))]
    for name in used:
        if not isinstance(row[name], str) and not (name == prompts[0] and isinstance(row[name], list)):
            raise ValueError(f"field {name!r} is {type(row[name]).__name__}, not text")
    if several and not (row[several[0]] and all(isinstance(text, str) for text in row[several[0]])):
        raise ValueError(f"field {several[0]!r} must be a list of texts that is not empty")
    prompt = row[prompts[0]] if len(used) == 1 else "\n\n".join(row[name] for name in used)
    earlier = [name for name in ("system", "history") if _has(row, name)]
    if earlier:
        prompt = _with_earlier(row, prompt)
    read: dict[str, Any] = {"prompt": prompt}
    told = {"prompt": [*earlier, *used]}
    if traces:
        name = "completion" if traces[0] not in OWN_TRACES else traces[0]
        name = "candidates" if several else name
        read[name] = list(row[traces[0]]) if several else row[traces[0]]
        told[name] = traces
    if reasoning and traces and isinstance(row[traces[0]], str):
        thought = {"role": "assistant", "content": row[traces[0]], "reasoning_content": row[reasoning[0]]}
        read["completion"], told["completion"] = [thought], [*reasoning, *traces]
    gold = next((name for name in GOLDS if row.get(name) is not None), None)
    if gold is not None and traces != [gold]:
        read["answer"], told["gold answer"] = row[gold], [gold]
    return read, told


def _is_short(answer: str) -> bool:
    """Whether a text is an answer, not a trace that ends with one."""
    return "\n" not in answer.strip() and "####" not in answer


def _of_expert(row: dict[str, Any]) -> Found | None:
    """Columns with the preferred trace of a pair, or with a rationale and an answer; None if there is neither."""
    if any(name in row for name in (*TRACES, *SEVERAL)):
        return None
    if _has(row, "chosen"):
        trace, names, read_here = row["chosen"], ["chosen"], ("chosen", "rejected")
    else:
        names = [name for name in RATIONALES if _has(row, name)]
        gold = next((name for name in GOLDS if row.get(name) is not None), None)
        if gold is None or len(names) != 1 or not isinstance(row[names[0]], str) or not _is_short(str(row[gold])):
            return None
        trace, read_here = row[names[0]].rstrip(), (names[0],)
        if extract_any(trace) is None:
            answer = {True: "yes", False: "no"}[row[gold]] if isinstance(row[gold], bool) else str(row[gold]).strip()
            trace, names = f"{trace}\nThe answer is {answer.removesuffix('.')}.", [*names, gold]
    rest = {name: value for name, value in row.items() if name not in read_here}
    found = _of_texts({**rest, "completion": trace}, question=False)
    if found is None:
        return None
    read, told = found
    return read, {**told, "completion": names}


def _with_earlier(row: dict[str, Any], prompt: Any) -> list[dict[str, Any]]:
    """A prompt behind the system message and the earlier turns of its row."""
    system, history = row.get("system"), row.get("history") or []
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history) or not isinstance(prompt, str):
        raise ValueError("field 'history' must be a list of pairs of question and answer, next to a prompt of text")
    turns = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair)]
    given = [*([("system", system)] if system else []), *turns, ("user", prompt)]
    return [{"role": role, "content": text} for role, text in given]
