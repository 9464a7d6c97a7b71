"""Evaluation without labels: does a reward model detect and locate an error inserted into a correct trace?"""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from tracereward.data.perturbations import KINDS, perturb
from tracereward.errors import InputError, check_choice
from tracereward.evaluate.first_error import STEP_AGGREGATES, outcome, step_values, summarise
from tracereward.evaluate.steps import (
    LABELS,
    EncodedSteps,
    encode_steps,
    position_limit,
    token_values,
)
from tracereward.files import without_nan
from tracereward.metrics import auroc, bootstrap_interval, perturbation_auroc
from tracereward.modeling.rendering import render
from tracereward.reports.tables import Table, interval, percent
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import Trace
from tracereward.rewards.token_scores import aggregate_rewards


def changed_step(spans: Sequence[tuple[int, int]], first_change: int) -> int:
    """The step with the first changed character.

    If a step was dropped, this is the step that follows it; if two steps were swapped, the first of the two.
    """
    return max((step for step, (start, _) in enumerate(spans) if start <= first_change), default=0)


def evaluate_perturbations(
    model: TokenRewardModel,
    rows: Sequence[dict[str, Any]],
    *,
    policy: PreTrainedModel | None = None,
    kinds: Sequence[str] = KINDS,
    aggregate: str = "mean",
    token_budget: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Corrupt each correct trace once with each applicable kind of error, and compare it with the original.

    Metrics of each kind, for the reward and the policy's log-prob: hit_at_1 and hit_within_1 (the lowest step is the
    changed one) with their normalised forms, see `first_error.summarise`; auroc, the probability that an original
    scores above a corrupted trace, over all pairs; win_rate, the same over pairs of a trace and its corrupted copy. A
    trace's reward is aggregated as in the reward model's settings, its log-prob is the mean over tokens.

    Args:
        model: the reward model.
        rows: correct traces with prompt and completion, as returned by `load_demonstrations`.
        policy: causal LM with the reward model's tokenizer, on its device, for the baseline; None skips it.
        kinds: some of `perturbations.KINDS`.
        aggregate: ``mean`` or ``min`` over a step's tokens.
        token_budget: padded tokens per forward pass; chosen for the device if None.
        seed: seed of the perturbations and the bootstraps.

    Returns:
        A dict for JSON: ``traces``, ``left_out`` (originals longer than the models' ``positions``) and ``kinds`` by
        name, each with ``applied``, ``not_applicable``, ``left_out`` (corrupted traces that are too long) and
        ``methods``.

    Raises:
        InputError: unknown kind or aggregate, or all traces are too long.
    """
    check_choice("aggregate", aggregate, STEP_AGGREGATES)
    for kind in kinds:
        check_choice("perturbation", kind, KINDS)
    limit = position_limit(model.backbone, policy)
    rule = model.settings.step_rule
    rendered = render(list(rows), model.tokenizer, model.settings.rendering)

    def encode(row: dict[str, Any], text: str) -> EncodedSteps | None:
        spans = rule.spans(text)
        where = row.get("source", "a row")
        one = encode_steps(model.tokenizer, Trace(where=where, prompt=row["prompt"], completion=text, spans=spans))
        return one if one.length <= limit else None

    originals = {i: one for i, row in enumerate(rendered) if (one := encode(row, row["completion"])) is not None}
    if not originals:
        raise InputError(
            f"none of {len(rows)} traces fits into the model's {limit:.0f} positions: use a longer backbone"
        )
    encoded = list(originals.values())
    places = {index: place for place, index in enumerate(originals)}  # index of each original in `encoded`
    found: dict[str, list[tuple[int, int, int]]] = {}  # by kind: row, index of the copy in `encoded`, changed step
    counts: dict[str, dict[str, int]] = {}
    for kind in kinds:
        found[kind] = []
        counts[kind] = {"applied": 0, "not_applicable": 0, "left_out": 0}
        for index, original in originals.items():
            row = rendered[index]
            changed = perturb(row["completion"], random.Random(f"{seed} {kind} {index}"), [kind], rule)
            one = None if changed is None else encode(row, changed.text)
            if changed is None or (one is not None and one.completion == original.completion):
                counts[kind]["not_applicable"] += 1  # or the tokens are the same: the vocabulary lacks the difference
            elif one is None:
                counts[kind]["left_out"] += 1
            else:
                counts[kind]["applied"] += 1
                step = changed_step(rule.spans(changed.text), changed.first_change)
                found[kind].append((index, len(encoded), step))
                encoded.append(one)

    traces: list[dict[str, float]] = [{} for _ in encoded]
    steps: list[dict[str, list[float]]] = [{} for _ in encoded]
    for index, values in token_values(model, encoded, policy=policy, token_budget=token_budget):
        values.pop("entropy", None)
        for name, of_tokens in values.items():
            how = model.settings.aggregate if name == "reward" else "mean"
            ids = encoded[index].completion
            traces[index][name] = (
                model.trace_reward(ids, of_tokens, how) if name == "reward" else aggregate_rewards(of_tokens, how)
            )
            steps[index][name] = step_values(of_tokens, encoded[index].steps, aggregate)

    def metrics(kind: str, name: str) -> dict[str, Any]:
        outcomes = [outcome(steps[copy][name], step, None) for _, copy, step in found[kind]]
        questions = [rendered[index]["prompt"] for index, _, _ in found[kind]]
        hits = {k: v for k, v in summarise(outcomes, questions, seed).items() if k.startswith("hit")}
        right = [traces[places[index]][name] for index, _, _ in found[kind]]
        wrong = [traces[copy][name] for _, copy, _ in found[kind]]
        pooled = auroc([*right, *wrong], [True] * len(right) + [False] * len(wrong))
        wins = [perturbation_auroc([a], [b]) for a, b in zip(right, wrong)]
        return {
            **hits,
            "auroc": without_nan(pooled),
            "win_rate": sum(wins) / len(wins),
            "win_rate_interval": list(bootstrap_interval(wins, seed)),
        }

    return {
        "traces": len(originals),
        "left_out": len(rows) - len(originals),
        "positions": without_nan(limit),
        "aggregate": aggregate,
        "kinds": {
            kind: {**counts[kind], "methods": {n: metrics(kind, n) for n in traces[0]} if found[kind] else {}}
            for kind in kinds
        },
    }


def step_tables(result: dict[str, Any]) -> list[Table]:
    """The result of `evaluate_perturbations` as a table, in percent."""
    columns = ["error", "traces", "score", "Hit@1", "95 %", "over chance", "AUROC", "above its copy", "95 %"]
    rows: list[list[str | float | int | None]] = []
    for kind, of in result["kinds"].items():
        if not of["methods"]:
            rows.append([kind, 0, None, None, None, None, None, None, None])
        for name, values in of["methods"].items():
            over = values["hit_at_1_normalised"]
            hits = [percent(values["hit_at_1"]), interval(*values["hit_at_1_interval"])]
            cells = [*hits, None if over is None else percent(over), values["auroc"]]
            wins = [percent(values["win_rate"]), interval(*values["win_rate_interval"])]
            rows.append([kind, of["applied"], LABELS[name], *cells, *wins])
    note = f"{result['traces']} correct traces, each compared with a copy that has one error of the kind"
    if result["left_out"]:
        note += f"; {result['left_out']} skipped as longer than {result['positions']} positions"
    return [Table("Inserted errors", columns, rows, f"{note}.")]
