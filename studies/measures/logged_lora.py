"""LoRA adapters against read-outs of the same logged traces, by `tracereward fit`, on one fold."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from studies.measures.logged import (
    SEED,
    Arm,
    Fold,
    Values,
    accuracies,
    by_question,
    fit_fold,
    free_scores,
    interval,
    paired,
    question_folds,
)
from studies.setup.logged_pool import LoggedPool, encoded
from tracereward import TokenRewardModel, fit

ARMS = [
    Arm(layers="any"),
    Arm(layers="any", rule="expert/all"),
    Arm(layers="any", loss="bce"),
]
UPDATES, PROMPTS, CANDIDATES, RATE = 60, 8, 4, 1e-4
"""Of the adapters' training: 40 traces an update, three passes over 160 questions."""


def split(count: int, learn: int) -> np.ndarray:
    """The first outer fold's test questions, then `learn` of its other questions.

    Args:
        count: number of all questions.
        learn: number to learn from.
    """
    number = question_folds(count)
    others = np.random.default_rng((SEED, learn)).permutation(np.flatnonzero(number != 0))
    return np.concatenate([np.flatnonzero(number == 0), others[:learn]])


def lora_row(pool: LoggedPool, arm: Arm, *, questions: str, model: str, states: Path) -> dict[str, Any]:
    """Train adapters from the read-out, as `tracereward fit --readout false` does, and measure both.

    Args:
        pool: the traces of the questions of `split`.
        arm: labels and loss; experts are the questions' own solutions.
        questions: their file.
        model: folder of the model that reads.
        states: folder of its features.
    """
    train = question_folds(pool.asked)[pool.questions] != 0
    fold = Fold(train=train, test=~train & (pool.models != ""), accuracy=accuracies(pool, train))
    log_prob = free_scores(pool, fold)["log-prob"]
    adapted = _adapted(pool, fold, arm, questions=questions, model=model, states=states)
    places = np.flatnonzero(fold.test)
    traces = encoded([pool.rows[i] for i in places], model, "plain")
    rewards = adapted.token_rewards([trace.prompt for trace in traces], [trace.completion for trace in traces])
    scores = {"read-out": fit_fold(pool, fold, arm).scores, "LoRA": np.zeros(len(pool.rows))}
    scores["LoRA"][places] = [float(values.mean()) for values in rewards]
    free = {"log-prob": by_question(pool, fold, "all", log_prob, tuned=False)}
    found: dict[str, Values] = {}
    for name, values in scores.items():
        found[name] = by_question(pool, fold, "all", values, tuned=False)
        both = _standardised(values, fold.test) + _standardised(log_prob, fold.test)
        found[f"{name} + log-prob"] = by_question(pool, fold, "all", both, tuned=False)
    return {
        "arm": f"{arm.name}, LoRA",
        "method": "lora",
        **asdict(arm),
        "updates": UPDATES,
        "tested on": len(np.unique(pool.questions[fold.test])),
        "log-prob": _measures(free["log-prob"], {}),
        "scores": {name: _measures(values, {**free, "read-out": found["read-out"]}) for name, values in found.items()},
    }


def _measures(values: Values, others: Mapping[str, Values]) -> dict[str, list[float]]:
    """Each measure with its interval, and its differences to the others'."""
    means = {name: interval([of[i] for i in sorted(of)]) for name, of in values.items()}
    return means | {
        f"{name} minus {other}'s": paired(name, values[name], of[name])
        for other, of in others.items()
        for name in means
    }


def _standardised(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    known = values[members]
    return (values - known.mean()) / (known.std() or 1.0)


def _adapted(pool: LoggedPool, fold: Fold, arm: Arm, *, questions: str, model: str, states: Path) -> TokenRewardModel:
    """The reward model with adapters trained on the fold's questions."""
    positives, negatives = arm.rule.split("/")
    train = [pool.rows[i] for i in np.flatnonzero(fold.train & (pool.models != ""))]
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            questions,  # those without a candidate are left out
            [{"prompt": row.prompt, "completion": row.completion} for row in train],
            model=model,
            output_dir=folder,
            task=pool.task.name,
            template="plain",
            states=str(states),
            positives=positives,
            negatives=negatives,
            objective=arm.loss,
            readout=False,
            use_peft=True,
            updates=UPDATES,
            update_prompts=PROMPTS,
            update_candidates=CANDIDATES,
            learning_rate=RATE,
            held_out_fraction=0.0,
            seed=SEED,
        ).reward_model
