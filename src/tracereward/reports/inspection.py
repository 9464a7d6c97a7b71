"""What `tracereward inspect` shows: scored traces by question, with the steps and tokens of each.

`inspection_page` writes it as a page, `inspection_terminal` prints it.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tracereward.data.trace_rows import check_scores, text_read, traces_in
from tracereward.files import without_nan
from tracereward.modeling.alignment import step_ends
from tracereward.rewards.first_error_rules import RATE, first_below
from tracereward.rewards.settings import HOW_TO_FIT
from tracereward.rewards.token_scores import TokenScores

DIGITS = 4
"""Decimals of the values that are shown."""
# Control characters except newline and tab, lone surrogates, and bidirectional overrides.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def largest_drop(step_rewards: Sequence[float]) -> float | None:
    """The largest ``step_rewards[i] - step_rewards[i + 1]``, in log-odds; None for fewer than two steps."""
    return max((before - after for before, after in itertools.pairwise(step_rewards)), default=None)


def visible(text: str) -> str:
    r"""Escape characters that control a terminal or reorder text, e.g. as ``\x1b``; newline and tab are kept."""
    return _UNSAFE.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def about_marks(ruled: bool, threshold: float | None) -> str:
    """Which steps are marked as the suspected first error, or why none is, in a sentence.

    Args:
        ruled: whether a trace has the field `suspected_error`.
        threshold: of `questions_of`.
    """
    if threshold is not None:
        return f"The suspected first error is the first step whose reward is below {threshold:g}: a hint, not a proof."
    if ruled:
        return (
            f"The suspected first error is a hint, not a proof: the reward model's rule was fitted so that at most "
            f"{100 * RATE:g} % of right traces get one."
        )
    return f"No step is marked: the scores are of a reward model without a rule for the first error ({HOW_TO_FIT})."


def questions_of(rows: Iterable[dict[str, Any]], threshold: float | None) -> list[dict[str, Any]]:
    """Group traces by question, in order of first occurrence.

    Returns:
        Questions as of `contents`, each with the list `traces`; a trace has its `number` in it.

    Raises:
        InputError: as for `contents`.
    """
    questions: dict[str, dict[str, Any]] = {}
    for new, trace in contents(rows, threshold):
        question = questions.setdefault(new["prompt"], {**new, "traces": []})
        question["traces"].append({"number": len(question["traces"]) + 1, **trace})
    return list(questions.values())


def contents(
    rows: Iterable[dict[str, Any]], threshold: float | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What is shown of each trace and its question, one by one.

    Args:
        rows: as `tracereward score` writes them; those with the same prompt are of one question. `step_ends` and
            `supervised` are used if present; without `step_ends`, steps end with a newline. The fields `reward`,
            `correct`, `extracted`, `answer` (the correct one), `logprob` and `model` are shown if present, and the step
            `suspected_error` is marked.
        threshold: mark the first step with a lower reward instead.

    Yields:
        The question, with `prompt`, `answer`, and `not_shown`, the number of further traces. The trace, with its row's
        fields, `error` (index of the marked step, or None), `drop` (`largest_drop`), `steps`, and `ruled`, whether the
        row has a suspected error or none. JSON values only, numbers with 4 decimals, text escaped by `visible`.

    Raises:
        InputError: a row's scores are missing or inconsistent (see `check_scores`); rows are numbered from 1.
    """
    for number, row in enumerate(itertools.chain.from_iterable(map(traces_in, rows)), 1):
        check_scores(f"row {number}", row)
        question = {
            "prompt": _prompt_text(row["prompt"]),
            "answer": _text(row.get("answer")),
            "not_shown": row.get("not_shown", 0),
        }
        yield question, _trace(row, threshold)


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text; a conversation as ``role: content`` paragraphs."""
    if isinstance(prompt, str):
        return visible(prompt)
    if len(prompt) == 1:
        return visible(str(prompt[0]["content"]))
    return visible("\n\n".join(f"{message['role']}: {message['content']}" for message in prompt))


def _trace(row: dict[str, Any], threshold: float | None) -> dict[str, Any]:
    """One trace: its fields, and its steps with their tokens."""
    offsets = [(start, end) for start, end in row["offsets"]]
    tokens, rewards = row["tokens"], row["token_rewards"]
    supervised = row.get("supervised")
    text = text_read(tokens, offsets, row["completion"])
    ends = list(step_ends(text, offsets) if row.get("step_ends") is None else row["step_ends"])
    ends[-1:] = [True] * min(len(ends), 1)  # the last token always ends a step, so that every token is shown
    means = TokenScores(tokens=tokens, offsets=offsets, rewards=rewards, supervised=[], step_ends=ends).step_rewards()
    given = row.get("step_rewards") or []
    # Scores of earlier versions: the page shows lines, where the step rewards and the mark count given steps.
    as_given = not given or len(given) == len(means)
    step_rewards, suspected = (given or means, row.get("suspected_error")) if as_given else (means, None)
    # Mark supervised positions only if some positions are unsupervised.
    marks = supervised if supervised is not None and not all(supervised) else [False] * len(tokens)
    pieces = _pieces(text, tokens, offsets, rewards=rewards, ends=ends, marks=marks)
    reward = row.get("reward")
    return {
        "reward": _rounded(sum(rewards) / len(rewards) if reward is None and rewards else reward),
        "correct": row.get("correct"),
        "answer": _text(row.get("extracted")),
        "logprob": _rounded(row.get("logprob")),
        "parts": {name: _rounded(value) for name, value in (row.get("parts") or {}).items()},
        "model": _text(row.get("model")),
        "drop": _rounded(largest_drop(step_rewards)),
        "ruled": "suspected_error" in row,
        "error": suspected if threshold is None else first_below(step_rewards, threshold),
        "steps": [{"reward": _rounded(value), "tokens": held} for value, held in zip(step_rewards, pieces)],
    }


def _pieces(
    text: str,
    tokens: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    rewards: Sequence[float],
    *,
    ends: Sequence[bool],
    marks: Sequence[bool],
) -> list[list[list[Any]]]:
    """The pieces of each step: ``[text, reward, kinds]`` for a token, or ``[text]`` for text not covered by a token.

    Kinds are letters, the classes of `HEATMAP_CSS`: s supervised; e end of sequence; z part of a character that an
    earlier token shows; n starts with a line break; m ends with a line break that is hidden because the step ends.
    """
    steps: list[list[list[Any]]] = [[]]
    shown = 0
    for i, (start, end) in enumerate(offsets):
        if start > shown:
            steps[-1].append([visible(text[shown:start])])
        piece = text[max(shown, start) : end]
        shown = max(shown, end)
        kinds = "s" if marks[i] else ""
        if not piece:
            kinds += "e" if start == end and tokens[i] else "z"
        elif ends[i] and piece.endswith("\n"):
            kinds += "m"
            piece = piece.rstrip("\n")
        if piece.startswith("\n"):
            kinds += "n"
        steps[-1].append([visible(piece), _rounded(rewards[i]), kinds])
        if ends[i] and i + 1 < len(offsets):
            steps.append([])
    if shown < len(text):
        steps[-1].append([visible(text[shown:])])
    return steps


def colour_limit(rewards: Iterable[float | None]) -> float:
    """The largest |reward| of all tokens, which gets the strongest colour; 1 if there are no tokens."""
    return max((abs(reward) for reward in rewards if reward is not None), default=0.0) or 1.0


def scored(trace: dict[str, Any]) -> Iterator[list[Any]]:
    """The pieces of a trace that are tokens."""
    for step in trace["steps"]:
        yield from (piece for piece in step["tokens"] if len(piece) > 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else without_nan(round(value, DIGITS))


def _text(value: object) -> str | None:
    return None if value is None else visible(str(value))
