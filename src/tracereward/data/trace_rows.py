"""Reading rows of traces and checking the fields that commands use; errors name the row's location."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tracereward.data.columns import fix, own_columns
from tracereward.data.readers import data_name, not_json, read_rows
from tracereward.errors import InputError, check_number
from tracereward.messages import check_messages, content_text, reasoning_of
from tracereward.modeling.lost_text import MOST_OF_A_TEXT, Tally, too_much
from tracereward.modeling.seam import without_end_marks
from tracereward.modeling.steps import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_PROMPT = "no prompt"
NO_TRACE = "needs a completion, or candidates or steps, a list of texts that are not empty"


def candidate_rows(
    source: str,
    split: str = "train",
    skipped: list[str] | None = None,
    template: str | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stream: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with a prompt and a completion, candidates (a list of texts) or steps (a list of texts, joined later).

    Args:
        source: file or Hub id, or with `stream` stdin.
        split: of a Hub set.
        skipped: receives a message for each invalid row, which is then skipped; None makes the first one an error.
        template: of the reward model; ``plain`` refuses lists of messages. None: not checked.
        tokenizer: of the reward model; rows that are largely outside its vocabulary are invalid, and the share of the
            rest is said at the end. None: not checked.
        stream: see `read_rows`.

    Yields:
        Location and row, its traces without end marks (`without_marks`).

    Raises:
        InputError: a row lacks them or does not fit in JSON; names file and line.
    """
    tally = None if tokenizer is None else Tally(tokenizer)
    for where, row in read_rows(source, split, skipped=skipped, stream=stream):
        try:
            row = without_marks(own_columns(row, where, source))
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        wrong = not_json(row) or _wrong_prompt(row, template) or _wrong_trace(row)
        if wrong in (NO_PROMPT, NO_TRACE):
            wrong += fix(row, source)
        if wrong is None and tally is not None:
            wrong = too_much(tally.tokenizer, tally.add(where, texts_in(row), MOST_OF_A_TEXT))
        if wrong is None:
            yield where, row
        elif skipped is None:
            raise InputError(f"{where}: {wrong}")
        else:
            skipped.append(f"{where}: {wrong}")
    if tally is not None:
        tally.report(data_name(source), most=1.0)


def texts_in(row: dict[str, Any]) -> list[str]:
    """The texts of a row's prompt and traces, messages included."""
    found: list[str] = []
    for name in ("prompt", "completion", "candidates", "steps"):
        values = row.get(name)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, dict):
                found += [text for text in (content_text(value.get("content")), reasoning_of(value)) if text]
            elif isinstance(value, str):
                found.append(value)
    return found


def without_marks(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose traces are without end marks; one that had a mark is finished, whatever the row says."""
    if holds_steps(row):
        steps = row["steps"]
        if not (isinstance(steps, list) and steps and isinstance(steps[-1], str)):
            return row
        text, ended = without_end_marks(steps[-1])
        return {**row, "steps": [*steps[:-1], text], "finished": True} if ended else row
    if "candidates" not in row:
        if not isinstance(row.get("completion"), str):
            return row
        text, ended = without_end_marks(row["completion"])
        return {**row, "completion": text, "finished": True} if ended else row
    texts = row["candidates"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return row
    pairs = [without_end_marks(text) for text in texts]
    if not any(ended for _, ended in pairs):
        return row
    given = row.get("finished")
    flags = given if isinstance(given, list) and len(given) == len(pairs) else [given] * len(pairs)
    finished = [True if ended else flag for (_, ended), flag in zip(pairs, flags)]
    return {**row, "candidates": [text for text, _ in pairs], "finished": finished}


def _wrong_prompt(row: dict[str, Any], template: str | None) -> str | None:
    prompt = row.get("prompt")
    if prompt is None or prompt == "" or prompt == []:
        return NO_PROMPT
    if isinstance(prompt, str):
        return None
    try:
        check_messages(prompt, "prompt")
    except ValueError as error:
        return str(error)
    if template == "plain":
        return "the prompt is a list of messages; the reward model was trained on plain texts: give the prompt as text"
    return None


def _wrong_trace(row: dict[str, Any]) -> str | None:
    if holds_steps(row):
        steps = row["steps"]
        valid = isinstance(steps, list) and steps and all(isinstance(step, str) and step.strip() for step in steps)
        return _wrong_finished(row, 1) if valid else "steps must be a list of texts that are not empty"
    if "candidates" not in row and isinstance(row.get("completion"), list):
        try:
            check_messages(row["completion"], "completion")
        except ValueError as error:
            return NO_TRACE if all(isinstance(part, str) for part in row["completion"]) else str(error)
        return _wrong_finished(row, 1)
    traces = row["candidates"] if "candidates" in row else [row.get("completion")]
    if isinstance(traces, list) and traces and all(isinstance(trace, str) for trace in traces):
        # An empty trace is only an end-of-sequence token; its row must say that it is finished.
        ended = row["finished"] if isinstance(row.get("finished"), list) else [row.get("finished")] * len(traces)
        wrong = _wrong_finished(row, len(traces))
        if wrong is not None or all(trace or end is True for trace, end in zip(traces, ended, strict=True)):
            return wrong
    return NO_TRACE


def _wrong_finished(row: dict[str, Any], count: int) -> str | None:
    finished = row.get("finished")
    if "candidates" in row and isinstance(finished, list):
        right = len(finished) == count and all(end is None or isinstance(end, bool) for end in finished)
        return None if right else f"finished must have true or false for each of the {count} candidates"
    return None if finished is None or isinstance(finished, bool) else "finished must be true or false"


def check_facts(where: str, row: dict[str, Any]) -> None:
    """Check the types of a row's answer, correct and logprob; each may be missing or null.

    Raises:
        InputError: names `where` and the field.
    """
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, (str, bool, int, float)):
        raise InputError(f"{where}: answer must be a text or a number, not {answer!r}")
    check_labels(where, row)


def check_labels(where: str, row: dict[str, Any]) -> None:
    """Check the types of a row's correct and logprob; each may be missing or null.

    Raises:
        InputError: names `where` and the field.
    """
    if row.get("correct") not in (None, 0, 1):  # True is 1
        raise InputError(f"{where}: correct must be true or false, not {row['correct']!r}")
    if row.get("logprob") is not None:
        check_number(f"{where}: logprob", row["logprob"])


def is_number(value: Any) -> bool:
    """Whether a value is a JSON number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def gold_of(row: dict[str, Any]) -> str | None:
    """The gold answer of a row as text, as in demonstrations; None if unknown."""
    answer = row.get("answer")
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return None if answer is None else str(answer)


def holds_steps(row: dict[str, Any]) -> bool:
    """Whether a row's trace is given step by step."""
    return "steps" in row and "completion" not in row and "candidates" not in row


def traces_of(row: dict[str, Any], rule: StepRule) -> tuple[list[str], list[bool], list[tuple[int, int]]]:
    """The traces of a row from `candidate_rows`.

    Returns:
        Its traces; whether each is finished (true if not given); the character span of each step for a row of steps,
        else an empty list.
    """
    spans: list[tuple[int, int]] = []
    if holds_steps(row):
        text, spans = rule.join(row["steps"])
        traces = [text]
    else:
        traces = row["candidates"] if "candidates" in row else [row["completion"]]
    finished = row.get("finished")
    ended = finished if isinstance(finished, list) else [finished] * len(traces)
    return traces, [end is not False for end in ended], spans


_NEEDED = ("prompt", "completion", "tokens", "offsets", "token_rewards")


def traces_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per trace: a row of `candidates` has a list of `scores`."""
    if "candidates" not in row:
        return [row]
    shared = {name: row[name] for name in ("prompt", "answer", "model", "not_shown") if name in row}
    scores = row.get("scores") or [{}] * len(row["candidates"])
    return [{**shared, "completion": text, **found} for text, found in zip(row["candidates"], scores)]


def check_scores(where: str, row: dict[str, Any]) -> None:
    """Check that a trace has scores as `tracereward score` writes them.

    Raises:
        InputError: names `where` and the field.
    """
    missing = [name for name in _NEEDED if row.get(name) is None]
    if missing:
        raise InputError(f"{where}: no {missing[0]}; `tracereward score` writes rows with token rewards")
    for name, (what, fits) in _KINDS.items():
        value = row.get(name)
        if value is not None and not fits(value):
            raise InputError(f"{where}: {name} must be {what}; `tracereward score` writes such rows")
    for name in ("offsets", "token_rewards", "supervised", "step_ends"):
        if row.get(name) is not None and len(row[name]) != len(row["tokens"]):
            raise InputError(f"{where}: {len(row['tokens'])} tokens but {len(row[name])} {name}")
    text = text_read(row["tokens"], row["offsets"], row["completion"])
    if any(not 0 <= start <= end <= len(text) for start, end in row["offsets"]):
        raise InputError(f"{where}: its offsets do not fit its completion of {len(text)} characters")


def text_read(tokens: Sequence[str], offsets: Sequence[tuple[int, int]], completion: str) -> str:
    """The text that the offsets index: the joined tokens if the spans tile it, else the completion.

    The two differ where a tokenizer normalises the completion before it is tokenised.
    """
    placed = [(token, start, end) for token, (start, end) in zip(tokens, offsets) if end > start]
    starts = [0, *(end for _, _, end in placed)]
    if all(start == at and len(token) == end - start for at, (token, start, end) in zip(starts, placed)):
        return "".join(token for token, _, _ in placed)
    return completion


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (list, tuple)) and all(map(fits, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_span(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(place) is int for place in value)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    try:
        check_messages(value, "prompt")
    except ValueError:
        return False
    return True


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("a text or a list of messages", _is_prompt),
    "completion": ("a text", _is_text),
    "tokens": ("a list of texts", _all(_is_text)),
    "offsets": ("a list of pairs of whole numbers", _all(_is_span)),
    "token_rewards": ("a list of numbers", _all(is_number)),
    "step_rewards": ("a list of numbers", _all(is_number)),
    "suspected_error": ("the index of a step, from 0, or null", lambda value: type(value) is int and value >= 0),
    "supervised": ("a list of true and false", _all(_is_flag)),
    "step_ends": ("a list of true and false", _all(_is_flag)),
    "reward": ("a number", is_number),
    "parts": ("numbers by name", lambda value: isinstance(value, dict) and all(map(is_number, value.values()))),
    "logprob": ("a number", is_number),
    "correct": ("true or false", lambda value: value in (0, 1)),
}
