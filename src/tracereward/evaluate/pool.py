"""`tracereward evaluate pool`: how well a reward separates correct from wrong traces, and best-of-N accuracy."""

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from scipy.special import expit
from scipy.stats import pearsonr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tracereward.data.labels import judged_by, judgement_counts
from tracereward.errors import EmptyTrace, InputError, TooLong
from tracereward.evaluate.pool_data import PoolRow, by_question
from tracereward.evaluate.selective import evaluate_selective, selective_tables
from tracereward.evaluate.steps import position_limit
from tracereward.files import without_nan
from tracereward.metrics import auprc, auroc, bootstrap_interval, length_matched_auroc, spearman, within_prompt_auroc
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.rendering import render_prompt
from tracereward.modeling.tokenization import pad_id
from tracereward.reports.tables import Table
from tracereward.rewards.calibration import METHODS as CALIBRATIONS
from tracereward.rewards.calibration import (
    Calibration,
    brier_score,
    expected_calibration_error,
    fit_calibration,
    log_loss,
    reliability,
)
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import CHUNK, EncodedTrace, Trace
from tracereward.rewards.scorer import check_finite
from tracereward.selection import (
    Candidate,
    fit_vote_temperature,
    model_scores,
    outcomes,
    ranking_curves,
    ranking_table,
)
from tracereward.verdict import verdict


def score_pool(
    model: TokenRewardModel, rows: Sequence[PoolRow], policy: PreTrainedModel | None = None
) -> tuple[list[list[Candidate]], int]:
    """Candidates of each question with their rewards, and how many were skipped as empty or too long for a model.

    Args:
        model: the reward model.
        rows: rows of a pool.
        policy: causal LM with the same tokenizer, for the candidates' mean log-prob; the rows' own log-prob if None.

    Raises:
        InputError: a prompt does not fit the model's template, or no trace is left.
        RunFailed: a reward or a log-prob is not finite.
    """
    limit = position_limit(model.backbone, policy)
    tokenizer, rendering = model.tokenizer, model.settings.rendering
    prompts = {id(row): render_prompt(tokenizer, row.prompt, rendering, row.where) for row in rows}
    questions, skipped = [], 0
    with tqdm(total=len(rows), desc="scored", unit="", file=sys.stderr) as progress:
        for chunk in _chunks(rows):
            encoded: dict[int, tuple[PoolRow, EncodedTrace]] = {}
            for row in (row for group in chunk for row in group):
                trace = Trace(
                    where=row.where, prompt=prompts[id(row)], completion=row.completion, finished=row.finished
                )
                with suppress(EmptyTrace, TooLong):
                    encoded[id(row)] = row, model.encode(trace, limit)
            scored = dict(zip(encoded, _candidates(model, list(encoded.values()), policy), strict=True))
            for group in chunk:
                candidates = [scored[id(row)] for row in group if id(row) in scored]
                skipped += len(group) - len(candidates)
                if candidates:
                    questions.append(candidates)
                progress.update(len(group))
    if not questions:
        raise InputError(
            f"{rows[0].where}: from here on none of {len(rows)} traces can be scored: each is empty or longer, "
            f"with its prompt, than the model's {limit:.0f} positions; use shorter traces or a longer backbone"
        )
    return questions, skipped


def _chunks(rows: Sequence[PoolRow]) -> Iterator[list[list[PoolRow]]]:
    """Groups of complete questions with at least `CHUNK` candidates, except the last."""
    chunk: list[list[PoolRow]] = []
    for group in by_question(list(rows)):
        chunk.append(group)
        if sum(map(len, chunk)) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _candidates(
    model: TokenRewardModel, traces: Sequence[tuple[PoolRow, EncodedTrace]], policy: PreTrainedModel | None
) -> list[Candidate]:
    """Candidates with their reward and mean log-prob, under `policy` or as given in the row.

    Raises:
        RunFailed: a reward or a log-prob is not finite.
    """
    encoded = [trace for _, trace in traces]
    scores = model.score_encoded(encoded)
    log_probs: Sequence[float | None] = [row.logprob for row, _ in traces]
    if policy is not None:
        ids = [trace.prompt for trace in encoded], [trace.completion for trace in encoded]
        log_probs = mean_log_probs(policy, *ids, pad_id(model.tokenizer))
    found = []
    for (row, _), of_trace, log_prob in zip(traces, scores, log_probs, strict=True):
        check_finite(row.where, "log-prob", [log_prob or 0.0])
        found.append(
            Candidate(
                text=row.completion,
                answer=row.answer,
                reward=of_trace.aggregate(model.settings.aggregate),
                logprob=log_prob,
                length=len(row.completion),
                correct=row.correct,
                model=row.model,
                labelled=row.labelled,
            )
        )
    return found


def split_questions(
    questions: Sequence[list[Candidate]], share: float, seed: int
) -> tuple[list[list[Candidate]], list[list[Candidate]]]:
    """Split at random: a share of the questions for fitting, and the others for the report."""
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    count = round(share * len(order))
    fit = set(order[:count])
    return [questions[i] for i in sorted(fit)], [q for i, q in enumerate(questions) if i not in fit]


def evaluate_pool(
    questions: Sequence[Sequence[Candidate]],
    fit_questions: Sequence[Sequence[Candidate]],
    equal: Callable[[str, str], bool],
    seed: int = 0,
) -> dict[str, Any]:
    """All results of the suite, ready for JSON; NaN becomes None.

    Args:
        questions: questions to evaluate; correctness of their candidates is known.
        fit_questions: other questions, to fit the calibrations and the temperature of the vote.
        equal: whether two answers are the same.
        seed: seed of random choices and the bootstrap.

    Returns:
        A dict; its field ``uncalibrated`` is the reason if no calibration could be fitted, else None.
    """
    flat = [c for candidates in questions for c in candidates]
    correct = [bool(c.correct) for c in flat]
    temperature = fit_vote_temperature(fit_questions, equal)
    fits, uncalibrated = _fits(fit_questions)
    table = ranking_table(questions, equal, seed, temperature)
    rewards = [c.reward for c in flat]
    lengths = [c.length for c in flat]
    found = verdict(questions, equal)
    result = {
        "verdict": None if found is None else found.to_dict(),
        "questions": len(questions),
        "candidates": len(flat),
        "fit_questions": len(fit_questions),
        "correct": sum(correct) / len(correct),
        "no_answer": sum(c.answer is None for c in flat),
        "judged": judgement_counts(flat),
        "vote_temperature": temperature,
        "ranking": [asdict(row) for row in table],
        "curves": _curves(questions, equal, seed, temperature),
        "selective": evaluate_selective(questions, fit_questions, equal, seed),
        "discrimination": _discrimination(questions),
        "reward_length": {"pearson": _pearson(rewards, lengths), "spearman": spearman(rewards, lengths)},
        "calibration": _calibrations(fits, rewards, correct),
        "uncalibrated": uncalibrated,
        "rewards": {"correct": _of(rewards, correct, True), "wrong": _of(rewards, correct, False)},
    }
    return without_nan(result)


def _discrimination(questions: Sequence[Sequence[Candidate]]) -> dict[str, dict[str, float]]:
    """AUROCs of the reward and its baselines: log-prob, length and the model that wrote the trace."""
    flat = [c for candidates in questions for c in candidates]
    correct = [bool(c.correct) for c in flat]
    prompts = [index for index, candidates in enumerate(questions) for _ in candidates]
    lengths = [c.length for c in flat]
    scores: dict[str, Sequence[float]] = {"reward": [c.reward for c in flat]}
    log_probs = [c.logprob for c in flat if c.logprob is not None]
    if len(log_probs) == len(flat):
        scores["log-prob"] = log_probs
        scores["reward + log-prob"] = [c.reward + p for c, p in zip(flat, log_probs, strict=True)]
    scores["shortest"] = [-length for length in lengths]
    if all(c.model is not None for c in flat):
        scores["which model"] = [value for row in model_scores(questions) for value in row]
    return {
        name: {
            "auroc": auroc(values, correct),
            "auroc_within_prompt": within_prompt_auroc(values, correct, prompts),
            "auroc_length_matched": length_matched_auroc(values, correct, lengths),
            "auprc": auprc(values, correct),
        }
        for name, values in scores.items()
    }


def _curves(
    questions: Sequence[Sequence[Candidate]], equal: Callable[[str, str], bool], seed: int, temperature: float
) -> dict[str, list[tuple[int, float, float, float]]]:
    """`ranking_curves`, with the exact value at N = 1, where every method picks a candidate at random."""
    curves = ranking_curves(questions, equal, seed=seed, temperature=temperature)
    shares = outcomes(questions, "mean", equal)
    one = (1, sum(shares) / len(shares), *bootstrap_interval(shares, seed))
    return {method: [one, *points[1:]] for method, points in curves.items()}


def _fits(fit_questions: Sequence[Sequence[Candidate]]) -> tuple[dict[str, Calibration], str | None]:
    """All calibrations and None, or none and the reason."""
    fit = [c for candidates in fit_questions for c in candidates]
    rewards, correct = [c.reward for c in fit], [bool(c.correct) for c in fit]
    try:
        return {method: fit_calibration(rewards, correct, method) for method in CALIBRATIONS}, None
    except InputError as error:
        return {}, str(error)


def _calibrations(
    fits: Mapping[str, Calibration], rewards: Sequence[float], correct: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    """Calibration errors and reliability on the evaluated questions, uncalibrated and for each calibration."""
    probabilities: dict[str, Any] = {"none": expit(rewards)}
    probabilities |= {method: calibration.probabilities(rewards) for method, calibration in fits.items()}
    return {
        method: {
            "ece": expected_calibration_error(p, correct),
            "brier": brier_score(p, correct),
            "log_loss": log_loss(p, correct),
            "bins": [asdict(b) for b in reliability(p, correct)],
        }
        for method, p in probabilities.items()
    }


def _pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation by scipy; its last digit can differ from that of `metrics.pearson`."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(pearsonr(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _of(values: Sequence[float], correct: Sequence[bool], wanted: bool) -> list[float]:
    return [value for value, is_correct in zip(values, correct, strict=True) if is_correct == wanted]


def pool_tables(result: dict[str, Any]) -> list[Table]:
    """The result as tables: selection, discrimination and calibration."""
    percent = [[row["label"], *(100 * row[key] for key in ("accuracy", "low", "high"))] for row in result["ranking"]]
    note = (
        f"{result['questions']} questions, {result['candidates']} candidates, of which "
        f"{100 * result['correct']:.1f} % are correct and {result['no_answer']} have no answer. "
        f"{judged_by(result['judged'])}"
    )
    sources = [[name, *values.values()] for name, values in result["discrimination"].items()]
    names = {"none": "sigmoid of the reward", "platt": "Platt", "temperature": "temperature", "isotonic": "isotonic"}
    errors = [
        [names[method], values["ece"], values["brier"], values["log_loss"]]
        for method, values in result["calibration"].items()
    ]
    length = result["reward_length"]
    return [
        Table("Choosing one of the candidates", ["method", "accuracy %", "95 % low", "95 % high"], percent, note),
        Table(
            "Separating correct from wrong traces",
            ["score", "AUROC", "within-prompt AUROC", "length-matched AUROC", "AUPRC"],
            sources,
            f"Reward and characters: Pearson {_digits(length['pearson'])}, Spearman {_digits(length['spearman'])}.",
        ),
        *selective_tables(result["selective"]),
        Table(
            "Reward as a probability of being correct",
            ["calibration", "ECE", "Brier", "log loss"],
            errors,
            result["uncalibrated"] or f"Fitted on {result['fit_questions']} other questions.",
        ),
    ]


def _digits(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
