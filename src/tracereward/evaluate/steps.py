"""Step-level evaluation: how well a reward model and its baselines find the first error of a trace."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import InputError, check_choice
from tracereward.evaluate.first_error import (
    STEP_AGGREGATES,
    Outcome,
    fit_threshold,
    outcomes,
    random_outcome,
    step_values,
    summarise,
)
from tracereward.evaluate.step_data import StepTrace, prompt_of
from tracereward.files import without_nan
from tracereward.modeling.batching import pack, scoring_budget, token_budget_batches
from tracereward.modeling.loading import context_length
from tracereward.modeling.log_probs import log_probs_and_entropies
from tracereward.modeling.rendering import render_prompt
from tracereward.modeling.tokenization import encode_trace, pad_id, without_ends
from tracereward.reports.tables import Table, interval, percent
from tracereward.rewards.first_error_rules import differences, suspicions
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import EncodedTrace, ForwardOptions, Trace
from tracereward.rewards.scorer import check_finite
from tracereward.rewards.token_scores import slices
from tracereward.tasks.recipes import Task, get_task

LABELS = {
    "reward": "reward",
    "reward_drop": "reward drop",
    "reward_rule": "rule for the first error",
    "rule": "the model's own rule",
    "logprob": "log-prob",
    "reward_logprob": "reward + log-prob",
    "reward_logprob_drop": "reward + log-prob drop",
    "logprob_drop": "log-prob drop",
    "entropy": "entropy",
    "noise": "random scores",
    "first_step": "first step",
    "random": "random",
    "no_error": "always no error",
}


@dataclass(frozen=True, kw_only=True)
class EncodedSteps(EncodedTrace):
    """A trace as token ids, and the token indices of each of its steps."""

    steps: list[list[int]]


def encode_steps(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> EncodedSteps:
    """Tokenize a trace and find the tokens that overlap each step.

    Tokens are assigned by character offsets, because a step may contain the delimiter. The delimiter's own tokens and
    the end-of-sequence token belong to no step; a token that overlaps two steps belongs to both.

    Raises:
        InputError: a step has no token.
    """
    prompt, ids = encode_trace(tokenizer, trace.prompt, trace.completion)
    text, _ = without_ends(tokenizer, trace.completion)
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    offsets: Any = encoding["offset_mapping"]
    steps = [[t for t, (a, b) in enumerate(offsets) if a < end and b > start] for start, end in trace.spans]
    if [] in steps:
        step = steps.index([])
        raise InputError(
            f"{trace.where}: step {step} (from 0) has no token in the reward model's vocabulary; edit or remove it"
        )
    return EncodedSteps(where=trace.where, prompt=prompt, completion=ids, steps=steps)


def position_limit(*models: PreTrainedModel | torch.nn.Module | None) -> float:
    """Smallest context length of the models in tokens; infinity if no config has one."""
    return min((context_length(model.config) for model in models if model is not None), default=math.inf)


# ---------- scores ----------


def token_values(
    model: TokenRewardModel,
    traces: Sequence[EncodedSteps],
    *,
    policy: PreTrainedModel | None = None,
    token_budget: int | None = None,
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Yield index and token values of each trace, longest first: reward and, with a policy, logprob and entropy.

    Entropy is negated, so that low values suggest an error in all of them. Shows progress on stderr.

    Raises:
        RunFailed: a value is not finite.
    """
    token_budget = token_budget or scoring_budget(model.device)
    if policy is not None:
        policy.eval()
    options = ForwardOptions(token_budget=token_budget)
    with tqdm(total=len(traces), desc="scored", unit="") as progress:
        for rows in token_budget_batches([trace.length for trace in traces], token_budget):
            chunk = [traces[i] for i in rows]
            values = {"reward": model.rewards_of(chunk, options)}
            if policy is not None:
                ids = [trace.prompt for trace in chunk], [trace.completion for trace in chunk]
                log_probs, entropies = log_probs_and_entropies(
                    policy, pack(*ids, pad_id(model.tokenizer)).to(model.device)
                )
                values |= {"logprob": list(log_probs.cpu()), "entropy": list(-entropies.cpu())}
            for place, (index, trace) in enumerate(zip(rows, chunk, strict=True)):
                found = {name: of[place][: len(trace.completion)].tolist() for name, of in values.items()}
                for name, of_tokens in found.items():
                    check_finite(trace.where, LABELS[name], of_tokens)
                yield index, found
            progress.update(len(rows))


def encode_fitting(
    model: TokenRewardModel, traces: Sequence[StepTrace], task: Task, limit: float
) -> tuple[list[StepTrace], list[EncodedSteps]]:
    """The traces with at most `limit` tokens, prompt included, and their token ids."""
    kept: list[StepTrace] = []
    encoded: list[EncodedSteps] = []
    for trace in traces:
        prompt = render_prompt(model.tokenizer, prompt_of(trace, task), model.settings.rendering, trace.where)
        text, spans = model.settings.step_rule.join(trace.steps)
        one = encode_steps(model.tokenizer, Trace(where=trace.where, prompt=prompt, completion=text, spans=spans))
        if one.length <= limit:
            kept.append(trace)
            encoded.append(one)
    return kept, encoded


def step_scores(
    model: TokenRewardModel,
    encoded: Sequence[EncodedSteps],
    aggregate: str,
    *,
    policy: PreTrainedModel | None = None,
    token_budget: int | None = None,
) -> dict[str, list[list[float]]]:
    """Step scores of each trace, by method."""
    scores: dict[str, list[list[float]]] = {}
    for index, values in token_values(model, encoded, policy=policy, token_budget=token_budget):
        steps = {name: step_values(v, encoded[index].steps, aggregate) for name, v in values.items()}
        rewards = slices(values["reward"], [step[0] for step in encoded[index].steps])
        steps["reward_drop"] = differences(steps["reward"])
        steps["reward_rule"] = suspicions(rewards)
        if model.settings.first_error is not None:
            steps["rule"] = steps["reward_rule"]
        if policy is not None:
            steps["reward_logprob"] = [a + b for a, b in zip(steps["reward"], steps["logprob"])]
            steps["reward_logprob_drop"] = differences(steps["reward_logprob"])
            steps["logprob_drop"] = differences(steps["logprob"])
        for name, of_trace in steps.items():
            scores.setdefault(name, [[] for _ in encoded])[index] = of_trace
    return {name: scores[name] for name in LABELS if name in scores}


# ---------- evaluation ----------


def evaluate_steps(
    model: TokenRewardModel,
    traces: Sequence[StepTrace],
    fit_traces: Sequence[StepTrace],
    *,
    policy: PreTrainedModel | None = None,
    task: str | None = None,
    aggregate: str = "mean",
    token_budget: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How well step scores find the first error, for the reward and its baselines.

    A step's score is the mean (or min) of its tokens' values: the reward of `TokenRewardModel.score` without further
    models; log-prob and negative next-token entropy under `policy`; also reward + log-prob, the difference of all
    but the entropy to the previous step, the `suspicions` of the rule for the first error, and random numbers. Each has
    a threshold fitted on `fit_traces`; the row "rule" is the reward model's own rule with its own threshold. With a
    fitted threshold random numbers reach a higher F1 than the row "random", the expectation of a uniform guess among
    the steps and "no error".

    Args:
        model: the reward model.
        traces: traces to evaluate.
        fit_traces: other traces, erroneous and correct, to fit the thresholds.
        policy: causal LM with the reward model's tokenizer, on its device; without it its baselines are skipped.
        task: task that formats the prompts; the reward model's if None.
        aggregate: ``mean`` or ``min`` over a step's tokens.
        token_budget: padded tokens per forward pass; chosen for the device if None.
        seed: seed of the bootstraps and the random numbers.

    Returns:
        A dict for JSON: counts (``left_out`` and ``fit_left_out`` count traces longer than the models' ``positions``),
        ``methods`` by name, with the metrics of `summarise` and ``threshold``, and ``groups``: both by
        `StepTrace.group`.

    Raises:
        InputError: unknown aggregate or task, a question in both sets, or too few traces that fit.
    """
    check_choice("aggregate", aggregate, STEP_AGGREGATES)
    task_spec = get_task(task or model.settings.task)
    if not traces or not fit_traces:
        raise InputError(
            f"{len(traces)} traces to evaluate and {len(fit_traces)} to fit the threshold on: use more questions or "
            "fit on another subset"
        )
    asked = {trace.question: trace.where for trace in fit_traces}
    for trace in traces:
        if trace.question in asked:
            raise InputError(
                f"{trace.where}: the threshold is fitted on the same question, in {asked[trace.question]}: fit on "
                "another subset"
            )
    positions = position_limit(model.backbone, policy)
    fit_kept, fit_encoded = encode_fitting(model, fit_traces, task_spec, positions)
    kept, encoded = encode_fitting(model, traces, task_spec, positions)
    fit_errors = [trace.first_error for trace in fit_kept]
    erroneous = sum(error is not None for error in fit_errors)
    if not 0 < erroneous < len(fit_errors):
        raise InputError(
            f"{fit_traces[0].where}: the threshold needs erroneous and correct traces; from here on {erroneous} and "
            f"{len(fit_kept) - erroneous} fit into {positions:.0f} positions, {len(fit_traces) - len(fit_kept)} are "
            "too long: fit on another subset, or use a longer backbone"
        )
    if not kept:
        raise InputError(
            f"{traces[0].where}: from here on none of {len(traces)} traces fits into the model's {positions:.0f} "
            "positions: use a longer backbone"
        )

    scores = step_scores(model, [*fit_encoded, *encoded], aggregate, policy=policy, token_budget=token_budget)
    draws = [(random.Random(f"{seed} {trace.where}"), len(trace.steps)) for trace in [*fit_kept, *kept]]
    scores["noise"] = [[rng.random() for _ in range(n)] for rng, n in draws]
    errors, lengths = [t.first_error for t in kept], [len(t.steps) for t in kept]
    thresholds = {name: fit_threshold(of[: len(fit_kept)], fit_errors) for name, of in scores.items()}
    if (rule := model.settings.first_error) is not None:
        thresholds["rule"] = rule.threshold
    methods = {name: outcomes(of[len(fit_kept) :], errors, thresholds[name]) for name, of in scores.items()}
    methods["first_step"] = outcomes([[-1.0] + [0.0] * (n - 1) for n in lengths], errors, 0.0)
    methods["random"] = [random_outcome(n, first_error) for n, first_error in zip(lengths, errors)]
    methods["no_error"] = outcomes([[0.0] * n for n in lengths], errors, 0.0)
    return {
        "task": task_spec.name,
        "aggregate": aggregate,
        "positions": without_nan(positions),
        "left_out": len(traces) - len(kept),
        "fit_traces": len(fit_kept),
        "fit_left_out": len(fit_traces) - len(fit_kept),
        **_results(kept, methods, thresholds, seed),
        "groups": {
            group: _results(
                [trace for trace in kept if trace.group == group],
                {name: [o for o, t in zip(of, kept) if t.group == group] for name, of in methods.items()},
                thresholds,
                seed,
            )
            for group in sorted({trace.group for trace in kept})
        },
    }


def _results(
    traces: Sequence[StepTrace], methods: dict[str, list[Outcome]], thresholds: dict[str, float], seed: int
) -> dict[str, Any]:
    """Counts, and each method's metrics."""
    questions = [trace.question for trace in traces]
    erroneous = sum(trace.first_error is not None for trace in traces)
    return {
        "traces": len(traces),
        "erroneous": erroneous,
        "correct": len(traces) - erroneous,
        "questions": len(set(questions)),
        "methods": {
            name: {**summarise(of, questions, seed), "threshold": thresholds.get(name)} for name, of in methods.items()
        },
    }


def step_tables(result: dict[str, Any]) -> list[Table]:
    """The result of `evaluate_steps` as tables: all traces, and Hit@1 by group; in percent."""
    columns = ["method", "F1", "95 %", "erroneous", "correct", "Hit@1", "95 %", "Hit@±1", "over chance", "95 %"]
    rows: list[list[str | float | int | None]] = []
    for name, of in result["methods"].items():
        cells = [_percent(of["f1"]), _interval(of["f1_interval"]), _percent(of["acc_error"])]
        cells += [_percent(of["acc_correct"]), _percent(of["hit_at_1"]), _interval(of["hit_at_1_interval"])]
        cells += [_percent(of["hit_within_1"]), _percent(of["hit_at_1_normalised"])]
        rows.append([LABELS[name], *cells, _interval(of["hit_at_1_normalised_interval"])])
    note = f"{result['traces']} traces, {result['erroneous']} of them with an error, of {result['questions']} questions"
    note += f"; thresholds fitted on {result['fit_traces']} others. Over chance: (Hit@1 - chance) / (1 - chance)."
    if result["left_out"] or result["fit_left_out"]:
        note += f" Skipped as longer than {result['positions']} positions: {result['left_out']} of these traces"
        note += f" and {result['fit_left_out']} of those to fit on."
    names = [name for name, of in result["methods"].items() if of["threshold"] is not None]
    by_group: list[list[str | float | int | None]] = [
        [group, of["erroneous"], of["correct"], *(_percent(of["methods"][n]["hit_at_1_normalised"]) for n in names)]
        for group, of in result["groups"].items()
    ]
    heads = ["group", "erroneous", "correct", *(LABELS[name] for name in names)]
    return [
        Table("Where is the first error?", columns, rows, note),
        Table("Hit@1 over chance, by group", heads, by_group),
    ]


def _percent(value: float | None) -> str | None:
    return None if value is None else percent(value)


def _interval(value: list[float] | None) -> str | None:
    return None if value is None else interval(*value)
