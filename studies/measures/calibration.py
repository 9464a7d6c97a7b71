"""Calibration of a learned reward, and what it correlates with.

The predicted probability that a trace is right is the sigmoid of its reward. One reward model is evaluated in three
states: as trained, with its head tuned on a few labelled traces, and with all weights tuned on the same traces.
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
"""Validation questions (at most a third) whose first sample is labelled, to tune the reward model."""
UPDATES, LEARNING_RATE = 40, 1e-4
"""AdamW steps when all weights are tuned, each on all labelled traces."""
TOKENS = 8192
"""Padded tokens per forward pass."""

Sample = dict[str, Any]


def run(site: Site, arm: str, samples: list[Sample]) -> dict[str, Any]:
    """Tune a backbone's reward model, and evaluate each state on test samples of the backbone's own SFT policy.

    Args:
        site: the backbone's site.
        arm: the arm of the reward model.
        samples: samples of the SFT policy for the test questions.

    Returns:
        ``states``: the output of `judge` by state; ``parameters``; ``accuracy`` of the samples; ``labelled`` and
        ``labelled_right``, numbers of labelled traces; and ``digits_per_token``.
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
    """Labelled traces (the first of each of the first questions), and all traces of the other questions."""
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
        fit: traces of other questions, to fit Platt scaling and the linear probe.
        test: traces to evaluate.

    Returns:
        auroc, auroc_within_prompt; ece and brier of the sigmoid of the reward, and ece_platt, brier_platt after Platt
        scaling; bins and bins_platt (probability, accuracy, traces); mean_probability; separation; effective_rank;
        probe_accuracy, probe_auroc, probe_auroc_within_prompt. Undefined values are omitted (all traces right, or all
        wrong).
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
        return [scores.aggregate("mean") for scores in model.score(prompts, completions, finished=finished)]

    return np.array(once(samples, rewards))


def separation(rewards: np.ndarray, correct: Sequence[bool]) -> float:
    """Cohen's d: mean reward of right minus wrong traces, in pooled standard deviations."""
    labels = np.asarray(correct, dtype=bool)
    right, wrong = rewards[labels], rewards[~labels]
    if not len(right) or not len(wrong):
        return math.nan
    degrees = len(rewards) - 2
    variance = ((right - right.mean()) ** 2).sum() / degrees + ((wrong - wrong.mean()) ** 2).sum() / degrees
    return float((right.mean() - wrong.mean()) / np.sqrt(variance))


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    shares = singular_values[singular_values > 0] / singular_values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def digits_per_token(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Mean number of digits per token, over tokens with digits."""
    digits = sum(len(re.findall(r"\d", text)) for text in texts)
    words = {token_id: str(tokenizer.decode([token_id])) for token_id in tokenizer.get_vocab().values()}
    with_digits = {token_id for token_id, word in words.items() if re.search(r"\d", word)}
    return digits / sum(token_id in with_digits for text in texts for token_id in encode_prompt(tokenizer, text))


def batches(model: TokenRewardModel, samples: Sequence[Sample]) -> list[tuple[list[int], Batch]]:
    """Tokenized traces in batches of similar length, each with the indices of its `samples`."""
    prompts = [encode_prompt(model.tokenizer, row["prompt"]) for row in samples]
    completions = [encode_completion(model.tokenizer, row["completion"], row["finished"]) for row in samples]
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
    return [
        (rows, model.pack([prompts[i] for i in rows], [completions[i] for i in rows]))
        for rows in token_budget_batches(lengths, TOKENS)
    ]


@torch.no_grad()
def features(model: TokenRewardModel, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs of the ``action`` head for each trace.

    Returns:
        Mean log p_phi over tokens, (n,); mean hidden state over tokens, (n, H); and the H singular values of the
        matrix of hidden states at all supervised tokens.
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
    """Fit a, b and w of the model's head to labelled traces, see `fit_head`; returns the model."""
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
    """Minimise the summed cross-entropy of sigmoid(inputs @ theta) plus |theta - start|^2 / 2.

    Args:
        inputs: (n, d).
        labels: (n,), 0 or 1.
        start: (d,), the head before fitting, which the penalty keeps where labels carry no information.
    """

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        values = inputs @ theta
        away = theta - start
        entropy = np.logaddexp(0, values) - labels * values
        return float(entropy.sum() + away @ away / 2), inputs.T @ (expit(values) - labels) + away

    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-8}).x


def tune_all(model: TokenRewardModel, labelled: Sequence[Sample]) -> TokenRewardModel:
    """Tune all weights for `UPDATES` steps: cross-entropy of the sigmoid of a trace's mean value; returns the model."""
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
