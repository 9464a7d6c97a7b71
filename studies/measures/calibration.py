"""How far a learned reward's probabilities can be trusted, and what of the backbone that goes with.

The probability that a trace is right is the sigmoid of its reward. Three states of one reward model are judged: as it
was trained, with its head tuned on a few labelled traces, and with all its weights tuned on the same traces.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedTokenizerBase

from studies.setup import judging
from studies.setup.frozen import load_frozen, once
from studies.setup.site import Site
from tracereward.metrics import auroc, within_prompt_auroc
from tracereward.modeling.batching import Batch, token_budget_batches
from tracereward.modeling.log_probs import completion_log_probs
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.calibration import (
    MIN_TRACES,
    brier_score,
    expected_calibration_error,
    fit_calibration,
    reliability,
)
from tracereward.rewards.model import TokenRewardModel

LABELLED = 100
"""Validation questions, at most a third of them, whose first sample is labelled for tuning the reward model."""
UPDATES, LEARNING_RATE = 40, 1e-4
"""Of all weights: passes over the labelled traces, each one step of AdamW."""
TOKENS = 8192
"""Padded tokens of one forward pass."""

Sample = dict[str, Any]


def run(site: Site, arm: str, samples: list[Sample]) -> dict[str, Any]:
    """Tune a backbone's reward, and judge all states on test samples of its own SFT policy.

    Args:
        site: of the backbone.
        arm: whose reward model it is.
        samples: of the SFT policy for the test questions.

    Returns:
        ``states``, for each state what `judge` gives; ``parameters``; ``accuracy`` of the samples; and
        ``digits_per_token``.
    """
    count = len(samples) // len({row["question"] for row in samples})
    labelled, fit = split(judging.draw_samples(site, "sft", "validation", count))
    models = {
        "as trained": load_frozen(site, arm),
        "head tuned": tune_head(load_frozen(site, arm), labelled),
        "all weights tuned": tune_all(load_frozen(site, arm), labelled),
    }
    texts = [row["prompt"] + row["completion"] for row in samples]
    return {
        "states": {state: judge(model, fit, samples) for state, model in models.items()},
        "parameters": sum(p.numel() for p in models["as trained"].parameters()),
        "accuracy": float(np.mean([row["correct"] for row in samples])),
        "labelled": len(labelled),
        "labelled_right": sum(row["correct"] for row in labelled),
        "digits_per_token": digits_per_token(models["as trained"].tokenizer, texts),
    }


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Labelled traces, the first of each of the first questions, and all traces of the other questions."""
    questions = sorted({row["question"] for row in samples})
    chosen = set(questions[: min(LABELLED, len(questions) // 3)])
    first: dict[int, Sample] = {}
    for row in samples:
        first.setdefault(row["question"], row)
    return [first[question] for question in sorted(chosen)], [row for row in samples if row["question"] not in chosen]


def judge(model: TokenRewardModel, fit: Sequence[Sample], test: Sequence[Sample]) -> dict[str, Any]:
    """Ranking, calibration and hidden states of one reward model on test traces.

    Args:
        model: the reward model.
        fit: traces of other questions, which Platt scaling and the linear probe are fitted on.
        test: traces that are judged.

    Returns:
        auroc, auroc_within_prompt; ece and brier of the sigmoid of the reward, and ece_platt, brier_platt after Platt
        scaling; bins and bins_platt (probability, accuracy, traces); mean_probability; separation; effective_rank;
        probe_accuracy, probe_auroc, probe_auroc_within_prompt. What is undefined, because all traces are right or all
        wrong, is left out.
    """
    correct, questions = [bool(row["correct"]) for row in test], [row["question"] for row in test]
    known = [bool(row["correct"]) for row in fit]
    rewards, of_fit = (trace_rewards(model, rows) for rows in (test, fit))
    raw, platt, probed = expit(rewards), np.full(len(test), np.nan), np.full(len(test), np.nan)
    _, hidden, spectrum = features(model, test)
    fitted = len(known) >= MIN_TRACES and len(set(known)) == 2
    if fitted:
        platt = fit_calibration(of_fit.tolist(), known).probabilities(rewards.tolist())
        _, hidden_of_fit, _ = features(model, fit)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(hidden_of_fit, known)
        probed = probe.decision_function(hidden)
    found = {
        "auroc": auroc(rewards.tolist(), correct),
        "auroc_within_prompt": within_prompt_auroc(rewards.tolist(), correct, questions),
        **{
            f"{name}{suffix}": score(probabilities, correct)
            for suffix, probabilities in (("", raw), *([("_platt", platt)] if fitted else []))
            for name, score in (("ece", expected_calibration_error), ("brier", brier_score))
        },
        "bins": _bins(raw, correct),
        "bins_platt": _bins(platt, correct) if fitted else [],
        "mean_probability": float(raw.mean()),
        "separation": separation(rewards, correct),
        "effective_rank": effective_rank(spectrum),
    }
    if fitted:
        found |= {
            "probe_accuracy": float(np.mean((probed > 0) == np.asarray(correct))),
            "probe_auroc": auroc(probed.tolist(), correct),
            "probe_auroc_within_prompt": within_prompt_auroc(probed.tolist(), correct, questions),
        }
    return {name: value for name, value in found.items() if isinstance(value, list) or not math.isnan(value)}


def _bins(probabilities: np.ndarray, correct: Sequence[bool]) -> list[list[float]]:
    return [[b.probability, b.accuracy, b.count] for b in reliability(probabilities, correct)]


def trace_rewards(model: TokenRewardModel, samples: Sequence[Sample]) -> np.ndarray:
    """Mean token reward of each trace, (n,)."""

    def rewards(rows: list[Sample]) -> list[float]:
        prompts, completions, finished = ([row[name] for row in rows] for name in ("prompt", "completion", "finished"))
        return [scores.aggregate("mean") for scores in model.score(prompts, completions, finished)]

    return np.array(once(samples, rewards))


def separation(rewards: np.ndarray, correct: Sequence[bool]) -> float:
    """Mean reward of right traces minus that of wrong ones, in standard deviations pooled over both (Cohen's d)."""
    labels = np.asarray(correct, dtype=bool)
    right, wrong = rewards[labels], rewards[~labels]
    if not len(right) or not len(wrong):
        return math.nan
    degrees = len(rewards) - 2
    variance = ((right - right.mean()) ** 2).sum() / degrees + ((wrong - wrong.mean()) ** 2).sum() / degrees
    return float((right.mean() - wrong.mean()) / np.sqrt(variance))


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007)."""
    shares = singular_values[singular_values > 0] / singular_values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def digits_per_token(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Digits in the texts, for each token with a digit in it."""
    digits = sum(len(re.findall(r"\d", text)) for text in texts)
    words = {token_id: str(tokenizer.decode([token_id])) for token_id in tokenizer.get_vocab().values()}
    with_digits = {token_id for token_id, word in words.items() if re.search(r"\d", word)}
    return digits / sum(token_id in with_digits for text in texts for token_id in encode_prompt(tokenizer, text))


def batches(model: TokenRewardModel, samples: Sequence[Sample]) -> list[tuple[list[int], Batch]]:
    """Traces in the model's tokens, by length, with their places among `samples`."""
    prompts = [encode_prompt(model.tokenizer, row["prompt"]) for row in samples]
    completions = [encode_completion(model.tokenizer, row["completion"], row["finished"]) for row in samples]
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
    return [
        (rows, model.pack([prompts[i] for i in rows], [completions[i] for i in rows]))
        for rows in token_budget_batches(lengths, TOKENS)
    ]


@torch.no_grad()
def features(model: TokenRewardModel, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the ``action`` head reads of each trace.

    Returns:
        Mean log p_phi of its tokens, (n,); mean hidden state after them, (n, H); and the H singular values of the
        matrix of all supervised tokens' hidden states.
    """
    size = model.backbone.config.get_text_config().hidden_size
    log_prob, hidden = np.zeros(len(samples)), np.zeros((len(samples), size))
    gram = torch.zeros(size, size, dtype=torch.float64)
    for rows, batch in batches(model, samples):
        log_probs, states = completion_log_probs(model.backbone, batch)
        mask = batch.completion_mask[..., None]
        lengths = batch.completion_mask.sum(1)
        log_prob[rows] = ((log_probs * batch.completion_mask).sum(1) / lengths).cpu().numpy()
        hidden[rows] = ((states * mask).sum(1) / lengths[:, None]).cpu().numpy()
        supervised = states[model.supervision(batch).bool()].double().cpu()
        gram += supervised.T @ supervised
    return log_prob, hidden, torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().numpy()


def tune_head(model: TokenRewardModel, labelled: Sequence[Sample]) -> TokenRewardModel:
    """The model with a, b and w of its head fitted to labelled traces, see `fit_head`."""
    assert model.head is not None
    log_prob, hidden, _ = features(model, labelled)
    inputs = np.column_stack([log_prob, np.ones(len(labelled)), hidden])
    a, b, w = (parameter.detach().double().cpu().numpy() for parameter in (model.head.a, model.head.b, model.head.w))
    fitted = fit_head(inputs, np.array([row["correct"] for row in labelled], dtype=float), np.array([a, b, *w]))
    with torch.no_grad():
        for parameter, value in zip((model.head.a, model.head.b, model.head.w), np.split(fitted, [1, 2]), strict=True):
            parameter.copy_(torch.from_numpy(value).view_as(parameter))
    return model


def fit_head(inputs: np.ndarray, labels: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The minimum of the summed cross-entropy of sigmoid(inputs @ theta) plus |theta - start|^2 / 2.

    Args:
        inputs: (n, d).
        labels: (n,), 0 or 1.
        start: (d,), the head before: where labels say nothing it stays.
    """

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        values = inputs @ theta
        away = theta - start
        entropy = np.logaddexp(0, values) - labels * values
        return float(entropy.sum() + away @ away / 2), inputs.T @ (expit(values) - labels) + away

    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-8}).x


def tune_all(model: TokenRewardModel, labelled: Sequence[Sample]) -> TokenRewardModel:
    """The model with all weights tuned: cross-entropy of the sigmoid of the mean value of a trace, `UPDATES` steps."""
    labels = torch.tensor([float(row["correct"]) for row in labelled], device=model.device)
    parts = batches(model, labelled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    model.train()
    for _ in range(UPDATES):
        optimizer.zero_grad()
        for rows, batch in parts:
            means = (model(batch) * batch.completion_mask).sum(1) / batch.completion_mask.sum(1)
            loss = F.binary_cross_entropy_with_logits(means, labels[rows], reduction="sum") / len(labelled)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
