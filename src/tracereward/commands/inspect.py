"""`tracereward inspect`: rows with their scores, to look at."""

from itertools import islice
from typing import Any

from tracereward.commands.score import score_rows
from tracereward.data.readers import read_rows
from tracereward.data.trace_rows import candidate_rows, check_facts, check_scores, gold_of, traces_in
from tracereward.errors import InputError
from tracereward.modeling.loading import best_device, check_model
from tracereward.rewards.engines import load_beside
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import check_policy, check_reward_model
from tracereward.tasks import get_task


def rows_to_inspect(
    data: str, model: str | None, task: str | None, reference: str | None, policy: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """Rows with scores, which `score` wrote or `model` gives now, with their answers found and checked.

    Raises:
        InputError: rows without scores and no model, or anything that cannot be read.
    """
    rows = list(islice(read_rows(data), limit))
    if not rows:
        raise InputError(f"{data}: no rows")
    bare = [where for where, row in rows if ("scores" if "candidates" in row else "token_rewards") not in row]
    recipe = get_task(task) if task else None
    scored = [row for _, row in rows]
    if bare:
        if model is None:
            raise InputError(f"{bare[0]}: no scores; give --model, or rows that `tracereward score` wrote")
        settings = check_reward_model(model)
        check_policy(settings, policy)
        for other in (reference, policy):
            if other is not None:
                check_model(other)
        recipe = recipe or get_task(settings.task)
        checked = list(islice(candidate_rows(data, template=settings.template), limit))
        for where, row in checked:
            check_facts(where, row)
        reward_model = TokenRewardModel.from_pretrained(model).to(best_device())
        beside = load_beside(reward_model, reference), load_beside(reward_model, policy)
        scored = list(score_rows(reward_model, checked, *beside))
    else:
        for where, row in rows:
            if "candidates" in row and not _fit(row["candidates"], row["scores"]):
                raise InputError(f"{where}: scores must be a list with the scores of each of the candidates")
            for trace in traces_in(row):
                check_scores(where, trace)
    if recipe is None:
        return scored
    for row in scored:
        for text, found in zip(row["candidates"], row["scores"]) if "candidates" in row else [(row["completion"], row)]:
            found.setdefault("extracted", recipe.extract(text))
            if (gold := gold_of(row)) is not None:
                found.setdefault("correct", recipe.verify(text, gold))
    return scored


def _fit(candidates: Any, scores: Any) -> bool:
    """Whether scores are one record for each candidate."""
    lists = isinstance(candidates, list) and isinstance(scores, list) and len(candidates) == len(scores)
    return lists and all(isinstance(record, dict) for record in scores)
