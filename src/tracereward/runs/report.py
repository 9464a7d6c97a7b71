"""The report of an adversarial run: curves, the verdict, and fresh rollouts of the final policy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from trl import ModelConfig

from tracereward.console import note
from tracereward.data.labels import judge
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.modeling.distributed import zero3_disabled
from tracereward.reports.report import ScoredTrace
from tracereward.reports.verdicts import verdict_html, verdict_markdown
from tracereward.rewards.model import TokenRewardModel
from tracereward.runs.cards import about_run, write_reward_card
from tracereward.runs.finish import load_policy
from tracereward.runs.first_error import fit_marks
from tracereward.runs.folder import Run
from tracereward.runs.held_out import HeldOutQuestion
from tracereward.runs.verdict import (
    SAMPLES,
    FreshTrace,
    judged_questions,
    record_movement,
    record_verdict,
    verdict_on,
)
from tracereward.training.trainer import AdversarialTrainer

SHOWN = 16
"""Prompts with rollouts in the report, at least; training prompts if the held-out questions are fewer."""


def report_rewards(
    run: Run,
    trainer: AdversarialTrainer,
    reward_model: TokenRewardModel,
    rows: list[dict[str, Any]],
    *,
    questions: Sequence[HeldOutQuestion],
    chosen: str,
) -> None:
    """Write the rule for the first error, the verdict and the report: curves, rewards of rollouts, five heatmaps.

    Everything else, the final policy included, is saved before. If policy and reward model do not fit in memory, the
    rollouts are skipped. In the main process only.

    Args:
        run: the finished run.
        trainer: trained.
        reward_model: saved.
        rows: the demonstrations.
        questions: those that the verdict is on, see `held_out_questions`.
        chosen: how the policy was selected, see `train_and_choose`.
    """
    config, step = trainer.config, trainer.state.global_step
    judged, missing = judged_questions(questions)
    missing = missing or "none: the rollouts of the held-out questions are longer than the reward model reads"
    gold: dict[str, str | None] = {**judged}
    for row in rows:
        if len(gold) < SHOWN:
            gold.setdefault(row["prompt"], row["answer"])
    policy = dataclasses.replace(run.job.model, model_name_or_path=str(run.folder / "policy"), model_revision="main")
    counts = [f"{len(judged)} held-out questions"] * bool(judged)
    counts += [f"{len(gold) - len(judged)} training prompts"] * (len(gold) > len(judged))
    shown = f"Rewards and heatmaps: {SAMPLES} fresh rollouts of the final policy for each of {' and '.join(counts)}."
    try:
        with zero3_disabled():  # under ZeRO-3 `generate` would wait for the other processes
            traces = fresh_traces(trainer, policy, reward_model, gold)
    except torch.OutOfMemoryError:
        missing = "none: policy and reward model did not fit in memory with the trainer; `tracereward rerank` gives one"
        traces, shown = (
            [],
            "No rewards and heatmaps: policy and reward model did not fit in memory with the trainer.",
        )
        note(shown)
    marks = fit_marks(run, trainer, reward_model, questions=questions, traces=traces)
    found = verdict_on([trace for trace in traces if trace.question in judged], trainer)
    moved = record_movement(run, step)
    record_verdict(run, found, missing, step)
    write_reward_card(run, reward_model.settings, verdict_markdown(found, missing) + about_run(run, len(rows), chosen))
    how = config.reward_aggregate
    right = [t.scores.aggregate(how) for t in traces if t.correct]
    wrong = [t.scores.aggregate(how) for t in traces if t.correct is False]
    failure = trainer.watch.stopped
    ended = "" if failure is None else f" Stopped at step {failure.step} by the rule {failure.name}: {failure.reason}."
    gold_answers = " Uses gold answers: verified rollouts were positives." if config.positives == "mixed" else ""
    run.report(
        f"Adversarial training on {len(rows)} demonstrations of {trainer.task.name}."
        f" Label rule: {trainer.labels.name}.{ended}{chosen}{marks}{gold_answers}{moved} {shown}",
        verdict=verdict_html(found, missing),
        rewards_correct=right,
        rewards_wrong=wrong,
        traces=pick_traces(traces),
    )


def fresh_traces(
    trainer: AdversarialTrainer, model: ModelConfig, reward_model: TokenRewardModel, gold: dict[str, str | None]
) -> list[FreshTrace]:
    """`SAMPLES` rollouts per prompt by the final policy, with the rewards of training: also the log-probs that it adds.

    Those that are longer than the reward model reads are left out.

    Args:
        trainer: of the finished run.
        model: where the final policy is.
        reward_model: the trained reward model.
        gold: rendered prompts, each with its gold answer or None.
    """
    config, device, task, prompts = trainer.config, trainer.accelerator.device, trainer.task, list(gold)
    clear_device_cache(garbage_collection=True)
    reward_model.to(device)
    policy = load_policy(model).to(device)  # pyright: ignore[reportArgumentType]
    assert config.max_completion_length is not None
    params = SamplingParams(max_new_tokens=config.max_completion_length, seed=config.seed, batch_size=128)
    bridge, limit = trainer.bridge, reward_model.max_positions
    sampled = [s for chunk in sample(policy, trainer.tokenizer, prompts, params, n=SAMPLES) for s in chunk]
    encoded = [(s, bridge.prompt(prompts[s.prompt]), bridge.completion(s.ids)) for s in sampled]
    encoded = [(s, prompt_ids, ids) for s, prompt_ids, ids in encoded if len(prompt_ids) + len(ids) <= limit]
    form, start = trainer.form, None
    if form.adds_reference:
        start = load_policy(dataclasses.replace(model, model_name_or_path=form.reference_model)).to(device).eval()  # pyright: ignore[reportArgumentType]
    scored = reward_model.score_ids(
        [prompt_ids for _, prompt_ids, _ in encoded],
        [ids for _, _, ids in encoded],
        token_budget=config.discriminator_token_budget,
        reference=start,
        policy=policy if form.subtracts_policy else None,
    )
    traces = []
    for (s, _, _), scores in zip(encoded, scored, strict=True):
        answer, prompt = gold[prompts[s.prompt]], prompts[s.prompt]
        judged = judge({}, s.text, task, answer)
        traces.append(
            FreshTrace(
                question=prompt,
                completion=s.text,
                scores=scores,
                correct=judged.correct,
                answer=judged.answer,
                logprob=s.logprob,
                finished=s.finished,
            )
        )
    return traces


def pick_traces(traces: Sequence[ScoredTrace], count: int = 5) -> list[ScoredTrace]:
    """Up to `count` distinct traces: pairs of a wrong and a right one of the same question first, then the rest."""
    questions: dict[str, dict[str, ScoredTrace]] = {}
    for trace in traces:
        questions.setdefault(trace.question, {}).setdefault(trace.completion, trace)
    pairs, rest = [], []
    for candidates in questions.values():
        wrong = [t for t in candidates.values() if t.correct is False]
        right = [t for t in candidates.values() if t.correct is not False]
        if wrong and right:
            pairs += [wrong.pop(0), right.pop(0)]
        rest += wrong + right
    chosen = (pairs + rest)[:count]
    return sorted(chosen, key=lambda t: list(questions).index(t.question))
