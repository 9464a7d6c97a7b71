"""Distillation of a reward model with any head into a plain token-classification checkpoint.

A checkpoint with a `token` head loads directly in transformers, vLLM's pooling runner and TRL; the other heads need
this package, or log-probs. The fit is measured on held-out prompts.
"""

import dataclasses
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from tracereward.data.labels import judge
from tracereward.data.trace_rows import check_facts, gold_of
from tracereward.errors import InputError, RunFailed
from tracereward.metrics import within_prompt_auroc
from tracereward.modeling.batching import token_budget_batches
from tracereward.modeling.rendering import completion_text, render_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.parts import task_of
from tracereward.rewards.records import EncodedTrace, ForwardOptions, Trace

HELD_OUT = 0.2  # of the prompts


@dataclass(frozen=True, kw_only=True)
class Example(EncodedTrace):
    """A trace whose rewards are distilled, and whether it is correct."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    correct: bool | None


@dataclass(frozen=True)
class Fit:
    """How well the student reproduces the teacher's rewards on held-out prompts.

    Attributes:
        r2: 1 - sum (student - teacher)^2 / sum (teacher - mean)^2 over supervised positions.
        auroc_before: the teacher's within-prompt AUROC for correctness, NaN if correctness is unknown.
        auroc_after: the student's.
        traces: number of training traces.
        held_out: number of held-out traces.
    """

    r2: float
    auroc_before: float
    auroc_after: float
    traces: int
    held_out: int


def check_rows(rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Reject rows that no model can be distilled on.

    Raises:
        InputError: a row has no completion or several, or a field has the wrong type; fewer than two prompts, since one
            is held out.
    """
    prompts = set()
    for where, row in rows:
        if "candidates" in row or "completion" not in row:
            raise InputError(f"{where}: export needs one completion a row; `tracereward sample` writes such rows")
        check_facts(where, row)
        prompts.add(json.dumps(row["prompt"]))
    if len(prompts) < 2:
        raise InputError("export measures the fit on held-out prompts: give rows with at least two prompts")


def examples_of(rows: Iterable[tuple[str, dict[str, Any]]], model: TokenRewardModel) -> list[Example]:
    """Tokenize rows with a prompt, a completion and optionally finished and correct or a gold answer.

    Args:
        rows: rows that passed `check_rows`.
        model: the reward model.

    Raises:
        InputError: a trace is longer than the model's context.
    """
    found, task = [], task_of(model.settings)
    for where, row in rows:
        prompt = render_prompt(model.tokenizer, row["prompt"], model.settings.rendering, where)
        finished = row.get("finished") is not False
        text = completion_text(model.tokenizer, row["completion"], model.settings.rendering, where)
        trace = model.encode(Trace(where=where, prompt=prompt, completion=text, finished=finished))
        ids = {"prompt": tuple(trace.prompt), "completion": tuple(trace.completion)}
        found.append(Example(where=where, **ids, correct=judge(row, text, task, gold_of(row)).correct))
    return found


def distill(
    teacher: TokenRewardModel,
    folder: str | Path,
    examples: Sequence[Example],
    *,
    epochs: int = 3,
    learning_rate: float = 1e-4,
    token_budget: int = 8192,
    seed: int = 0,
) -> tuple[TokenRewardModel, Fit]:
    """Fit a token head on the teacher's backbone to the teacher's rewards at supervised positions.

    loss = mean over supervised positions of (f_t - r_t)^2, r the teacher's clipped reward, since scoring clips too. A
    teacher that already is a token classifier of one layer is not trained.

    Args:
        teacher: the reward model.
        folder: the teacher's folder; the student starts from its backbone.
        examples: training traces, similar to those that will be scored.
        epochs: passes over the examples.
        learning_rate: peak learning rate of AdamW, with linear warm-up and cosine decay.
        token_budget: padded tokens per step.
        seed: seed of the split, the order and the new head.

    Raises:
        RunFailed: the loss, or a reward of either model, is not finite.
    """
    settings = dataclasses.replace(
        teacher.settings,
        head="token",
        layers=(),
        reward_form="",
        reference_model="",
        temperature=1.0,
        calibration=None,
        first_error=None,
    )
    prompts = sorted({example.prompt for example in examples})
    rng = random.Random(seed)
    held = set(rng.sample(prompts, max(1, round(HELD_OUT * len(prompts)))))
    train = [example for example in examples if example.prompt not in held]
    test = [example for example in examples if example.prompt in held]
    if teacher.settings.is_classifier:
        same = {name: getattr(teacher.settings, name) for name in ("temperature", "calibration", "first_error")}
        settings = dataclasses.replace(settings, **same)
        student = TokenRewardModel(teacher.backbone, teacher.tokenizer, settings)
        return student.eval(), measure(teacher, student, test, trained=len(train), token_budget=token_budget)
    torch.manual_seed(seed)
    student = TokenRewardModel.from_backbone(str(folder), settings, teacher.tokenizer, dtype=teacher.backbone.dtype)
    student.to(teacher.device)
    targets = rewards_of(teacher, train, token_budget)
    batches = list(token_budget_batches([example.length for example in train], token_budget))
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.01)
    total = epochs * len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, total // 10, total)
    student.train()
    with tqdm(total=total, desc="export", unit="step") as progress:
        for _ in range(epochs):
            for rows in rng.sample(batches, len(batches)):
                loss = squared_error(student, [train[i] for i in rows], [targets[i] for i in rows])
                value = loss.item()
                if not math.isfinite(value):
                    raise RunFailed(f"the loss is {value}: use a lower --learning-rate")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix({"loss": f"{value:.3g}"})
    return student.eval(), measure(teacher, student, test, trained=len(train), token_budget=token_budget)


def squared_error(student: TokenRewardModel, examples: Sequence[Example], targets: Sequence[Tensor]) -> Tensor:
    """Mean of (f_t - r_t)^2 over the supervised positions of the batch."""
    batch = student.pack([e.prompt for e in examples], [e.completion for e in examples])
    supervised = student.supervision(batch)
    wanted = torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True).to(supervised.device)
    return (student(batch) - wanted)[supervised].square().mean()


def rewards_of(model: TokenRewardModel, examples: Sequence[Example], token_budget: int) -> list[Tensor]:
    """Token rewards of each example.

    Raises:
        RunFailed: a reward is not finite.
    """
    return model.rewards_of(examples, ForwardOptions(token_budget=token_budget))


def measure(
    teacher: TokenRewardModel,
    student: TokenRewardModel,
    test: Sequence[Example],
    *,
    trained: int,
    token_budget: int,
) -> Fit:
    """Compare student and teacher on held-out traces; `trained` is the number of training traces."""
    before = rewards_of(teacher, test, token_budget)
    try:
        after = rewards_of(student, test, token_budget)
    except RunFailed as error:
        raise RunFailed("the fitted model gives rewards that are not finite: use a lower --learning-rate") from error
    masks = []
    for example, values in zip(test, before, strict=True):
        masks.append(torch.tensor(teacher.to_scores(example.completion, values).supervised))
    y = torch.cat([values[mask] for values, mask in zip(before, masks, strict=True)]).double()
    fitted = torch.cat([values[mask] for values, mask in zip(after, masks, strict=True)]).double()
    spread = float((y - y.mean()).square().sum())
    r2 = 1 - float((y - fitted).square().sum()) / spread if spread else math.nan
    known = [index for index, example in enumerate(test) if example.correct is not None]
    correct, groups = [bool(test[i].correct) for i in known], [test[i].prompt for i in known]
    aurocs = [
        within_prompt_auroc([float(rewards[i].mean()) for i in known], correct, groups) if known else math.nan
        for rewards in (before, after)
    ]
    return Fit(r2=r2, auroc_before=aurocs[0], auroc_after=aurocs[1], traces=trained, held_out=len(test))
