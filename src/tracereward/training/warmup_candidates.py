"""Candidates from a file as the warm-up's rollouts, matched with the demonstrations and labelled."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.console import note
from tracereward.data.candidates import read_candidates
from tracereward.data.demonstrations import check_lengths
from tracereward.data.matching import match
from tracereward.modeling.rendering import Rendering, render
from tracereward.tasks.recipes import Task
from tracereward.training.label_rules import remarks_on_labels
from tracereward.training.rollout_labels import RolloutLabels


def warmup_candidates(
    source: str, task: Task, demonstrations: Sequence[Mapping[str, Any]], labels: RolloutLabels
) -> list[dict[str, Any]]:
    """The candidates of the demonstrations' prompts, each once for every demonstration of its prompt.

    Says what is odd about them and how many have which label.

    Args:
        source: file or Hub id.
        task: reads them.
        demonstrations: as read, before rendering.
        labels: of these demonstrations' rollouts.

    Returns:
        Rows with ``prompt``, ``completion``, ``source`` and ``finished``, with ``demonstration``, its index, and with
        their ``label``.

    Raises:
        InputError: they cannot be read, answer none of the prompts, or none is a negative.
    """
    questions, remarks = match(demonstrations, read_candidates(source, task))
    usable = [question for question in questions if question.demonstrations and question.candidates]
    place = {row["source"]: index for index, row in enumerate(demonstrations)}
    rows, all_labels = [], []
    for question in usable:
        indices = [place[row["source"]] for row in question.demonstrations]
        gold = demonstrations[indices[0]].get("answer")
        found = []
        for candidate in question.candidates:
            answer, finished = candidate.answer, candidate.finished
            right = labels.mixed and None not in (answer, gold) and task.equal(str(answer), str(gold))
            label = labels.label(indices[0], answer, finished=finished, right=right)
            found.append(label)
            row = {"prompt": question.prompt, "completion": candidate.completion, "source": candidate.where}
            rows += [{**row, "finished": finished, "demonstration": index, "label": label} for index in indices]
        all_labels.append(found)
    for remark in [*remarks, *remarks_on_labels(usable, all_labels, labels.name)]:
        note(remark)
    return rows


def rendered_candidates(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    limit: int,
    *,
    on_long: str,
) -> list[dict[str, Any]]:
    """Candidates as the demonstrations are rendered, without those that are too long.

    Args:
        rows: of `warmup_candidates`.
        tokenizer: the policy's.
        rendering: of the demonstrations.
        limit: longest completion, in tokens.
        on_long: ``refuse`` or ``drop``.

    Raises:
        InputError: one is too long, under ``refuse``; names the first and the longest.
    """
    rows, dropped = check_lengths(render(rows, tokenizer, rendering), tokenizer, None, limit, on_long=on_long)
    if dropped:
        note(f"{dropped} candidates dropped: longer than {limit} tokens (--max_completion_length)")
    return rows
