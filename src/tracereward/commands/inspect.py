"""`tracereward inspect`: load or compute the scores of the rows to show."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tracereward.commands.score import score_rows
from tracereward.data.labels import judge
from tracereward.data.readers import read_rows
from tracereward.data.trace_rows import candidate_rows, check_facts, check_scores, gold_of, traces_in
from tracereward.errors import InputError
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.engines import check_log_prob_models, load_log_prob_models, load_scorer
from tracereward.rewards.parts import task_of
from tracereward.rewards.settings import check_reward_model
from tracereward.tasks.recipes import Task, get_task


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `tracereward inspect`.

    Attributes:
        data: rows written by `score`, or rows to score.
        model: folder or Hub id of the reward model, for rows without scores.
        task: task that extracts and checks answers; the reward model's if None.
        reference: folder or Hub id of the model whose log-prob is added.
        policy: folder or Hub id of the model whose log-prob is subtracted.
        limit: use the first N rows.
        dtype: precision of all models, see `modeling.precision`.
    """

    data: str
    model: str | None = None
    task: str | None = None
    reference: str | None = None
    policy: str | None = None
    limit: int | None = None
    dtype: str | None = None


def rows_to_inspect(options: InspectOptions) -> Iterator[dict[str, Any]]:
    """Rows with scores, as read or computed by the model, with extracted and checked answers.

    All rows are checked before the first is returned, and none is kept.

    Raises:
        InputError: rows have no scores and there is no model, all have scores and there is one, or an input cannot be
            read.
    """
    data, model = options.data, options.model
    bare, not_shown = _survey(options)
    task = get_task(options.task) if options.task else None
    if bare is None:
        given = {"model": model, "reference": options.reference, "policy": options.policy, "dtype": options.dtype}
        for option, value in given.items():
            if value is not None:
                raise InputError(f"--{option} {value} has no effect: the rows of {data} have their scores")
        for where, row in islice(read_rows(data), options.limit):
            if "candidates" in row and not _fit(row["candidates"], row["scores"]):
                raise InputError(f"{where}: scores must be a list with one record for each candidate")
            for trace in traces_in(row):
                check_scores(where, trace)
        scored = (row for _, row in islice(read_rows(data), options.limit))
    else:
        if model is None:
            raise InputError(f"{bare}: no scores; pass --model, or rows written by `tracereward score`")
        settings = check_reward_model(model)
        check_log_prob_models(settings, options.reference, options.policy)
        task = task_of(settings, options.task)
        checked = candidate_rows(data, template=settings.template, tokenizer=load_tokenizer(model))
        for where, row in islice(checked, options.limit):
            check_facts(where, row)
        reward_model = load_scorer(model, dtype=options.dtype)
        named = {"reference": options.reference, "policy": options.policy}
        extra = load_log_prob_models(reward_model, **named, dtype=options.dtype)
        rows = islice(candidate_rows(data, template=settings.template), options.limit)
        scored = score_rows(reward_model, rows, extra=extra)
    return (_judged(row, task, not_shown[_asked(row)]) for row in scored)


def _survey(options: InspectOptions) -> tuple[str | None, Counter[str]]:
    """Location of the first row without scores, and the number of traces of each question that are not shown.

    Raises:
        InputError: there are no rows.
    """
    read, bare, count = read_rows(options.data), None, 0
    not_shown: Counter[str] = Counter()
    for where, row in islice(read, options.limit):
        count += 1
        if bare is None and ("scores" if "candidates" in row else "token_rewards") not in row:
            bare = where
    for _, row in read:
        not_shown[_asked(row)] += len(row["candidates"]) if isinstance(row.get("candidates"), list) else 1
    if not count:
        raise InputError(f"{options.data}: no rows")
    return bare, not_shown


def _judged(row: dict[str, Any], task: Task | None, not_shown: int) -> dict[str, Any]:
    """A scored row with extracted and checked answers, and the number of its question's traces that are not shown."""
    if not_shown:
        row["not_shown"] = not_shown
    if task is None:
        return row
    for text, found in zip(row["candidates"], row["scores"]) if "candidates" in row else [(row["completion"], row)]:
        judged = judge(found, text, task, gold_of(row))
        found["extracted"] = judged.answer
        if judged.correct is not None:
            found["correct"] = judged.correct
    return row


def _asked(row: dict[str, Any]) -> str:
    """The question of a row, to count its traces."""
    return json.dumps(row.get("prompt"))


def _fit(candidates: Any, scores: Any) -> bool:
    """Whether `scores` is a list with one record for each candidate."""
    lists = isinstance(candidates, list) and isinstance(scores, list) and len(candidates) == len(scores)
    return lists and all(isinstance(record, dict) for record in scores)
