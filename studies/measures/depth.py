"""World ``hops`` by the number of hops: accuracy of reranking and localisation of the first wrong line."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from studies.setup import judging
from studies.setup.site import Site
from tracereward.evaluate.first_error import chance, hit, step_values
from tracereward.modeling.batching import pack, scoring_budget, token_budget_batches
from tracereward.modeling.log_probs import log_probs_and_entropies
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer, pad_id
from tracereward.synthetic import hops

Row = dict[str, Any]


def by_depth(site: Site, scored: Sequence[Row]) -> dict[str, Any]:
    """`summaries` of scored samples of the SFT policy, with that policy's log-probs."""
    return summaries(scored, token_log_probs(site, "sft", scored))


def token_log_probs(site: Site, arm: str, rows: Sequence[Row]) -> list[list[float]]:
    """Log-prob of each completion token under an arm's policy, in nats."""
    policy = judging.load_policy(site, arm).eval()
    tokenizer = load_tokenizer(str(site.folder / "init"))
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    completions = [encode_completion(tokenizer, row["completion"], row["finished"]) for row in rows]
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions)]
    found: list[list[float]] = [[] for _ in rows]
    for batch in token_budget_batches(lengths, scoring_budget(policy.device)):
        packed = pack([prompts[i] for i in batch], [completions[i] for i in batch], pad_id(tokenizer))
        for i, values in zip(batch, log_probs_and_entropies(policy, packed)[0].tolist(), strict=True):
            found[i] = values[: len(completions[i])]
    return found


def summaries(scored: Sequence[Row], log_probs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Ranking and localisation for each number of hops.

    Args:
        scored: rows of `judging.rank`, grouped by question.
        log_probs: token log-probs of each row.

    Returns:
        By depth, as text: the outputs of `judging.ranking` and `localisation`.
    """
    pairs = list(zip(scored, log_probs, strict=True))
    depths = sorted({hops.depth_of(row["prompt"]) for row in scored})
    result = {}
    for depth in depths:
        chosen = [(row, values) for row, values in pairs if hops.depth_of(row["prompt"]) == depth]
        result[str(depth)] = {
            "ranking": judging.ranking([row for row, _ in chosen]),
            "localisation": localisation([row for row, _ in chosen], [values for _, values in chosen]),
        }
    return result


def localisation(scored: Sequence[Row], log_probs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Share of wrong traces whose lowest-scored line is the first wrong one; a line scores its mean token value.

    Returns:
        wrong: number of wrong traces with a first wrong line (a trace that stops too early has none).
        reward, logprob, reward_logprob: shares by score, see `first_error.hit`. chance: share for a random line.
        first: share for always naming the first line. The shares are None without a wrong trace.
    """
    hits: dict[str, list[float]] = {name: [] for name in ("reward", "logprob", "reward_logprob", "chance", "first")}
    for row, values in zip(scored, log_probs, strict=True):
        steps = _steps(row["step_ends"])
        wrong = None if row["correct"] else hops.first_wrong_line(row["prompt"], row["completion"])
        # A blank line is not a step, so lines and steps of such a trace do not match.
        if wrong is None or not wrong < len(steps) == row["completion"].count("\n") + 1:
            continue
        reward, logprob = (step_values(of, steps, "mean") for of in (row["token_rewards"], values))
        hits["reward"].append(hit(reward, wrong))
        hits["logprob"].append(hit(logprob, wrong))
        hits["reward_logprob"].append(hit([a + b for a, b in zip(reward, logprob)], wrong))
        hits["chance"].append(chance(len(steps), wrong))
        hits["first"].append(float(wrong == 0))
    count = len(hits["chance"])
    return {"wrong": count} | {name: sum(shares) / count if count else None for name, shares in hits.items()}


def _steps(ends: Sequence[bool]) -> list[range]:
    """Token range of each step."""
    last = [-1, *(place for place, is_end in enumerate(ends) if is_end)]
    return [range(before + 1, end + 1) for before, end in pairwise(last)]
