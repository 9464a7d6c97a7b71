"""The report of an adversarial run: curves, and fresh rollouts of the final policy."""

import dataclasses
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from trl import ModelConfig

from tracereward.console import note
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.modeling.distributed import zero3_disabled
from tracereward.reports.report import ScoredTrace
from tracereward.rewards.model import TokenRewardModel
from tracereward.runs.finish import load_policy
from tracereward.runs.folder import Run
from tracereward.training.trainer import AdversarialTrainer


def report_rewards(
    run: Run,
    trainer: AdversarialTrainer,
    reward_model: TokenRewardModel,
    rows: list[dict[str, Any]],
    *,
    chosen: str,
) -> None:
    """Write the report: curves, rewards of fresh rollouts on training prompts, and heatmaps of five rollouts.

    Everything else, the final policy included, is saved before. If policy and reward model do not fit in memory, the
    rollouts are skipped.
    """
    config = trainer.config
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:16]
    answers = {row["prompt"]: row["answer"] for row in rows}
    gold = {prompt: answers[prompt] for prompt in prompts}
    policy = dataclasses.replace(run.job.model, model_name_or_path=str(run.folder / "policy"), model_revision="main")
    shown = f"Rewards and heatmaps: fresh rollouts of the final policy on {len(prompts)} of its training prompts."
    try:
        with zero3_disabled():  # under ZeRO-3 `generate` would wait for the other processes
            traces = fresh_traces(trainer, policy, reward_model, gold)
    except torch.OutOfMemoryError:
        traces, shown = (
            [],
            "No rewards and heatmaps: policy and reward model did not fit in memory with the trainer.",
        )
        note(shown)
    how = config.reward_aggregate
    right = [t.scores.aggregate(how) for t in traces if t.correct]
    wrong = [t.scores.aggregate(how) for t in traces if t.correct is False]
    failure = trainer.watch.stopped
    ended = "" if failure is None else f" Stopped at step {failure.step} by the rule {failure.name}: {failure.reason}."
    gold_answers = " Uses gold answers: verified rollouts were positives." if config.positives == "mixed" else ""
    run.report(
        f"Adversarial training on {len(rows)} demonstrations of {trainer.task.name}."
        f" Label rule: {trainer.labels.name}.{ended}{chosen}{gold_answers} {shown}",
        rewards_correct=right,
        rewards_wrong=wrong,
        traces=pick_traces(traces),
    )


def fresh_traces(
    trainer: AdversarialTrainer, model: ModelConfig, reward_model: TokenRewardModel, gold: dict[str, str | None]
) -> list[ScoredTrace]:
    """Four rollouts per prompt by the final policy, with the rewards of training: also the log-probs that it adds.

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
    samples = [s for chunk in sample(policy, trainer.tokenizer, prompts, params, n=4) for s in chunk]
    bridge = trainer.bridge
    ids = [bridge.completion(s.ids) for s in samples]
    prompt_ids = [bridge.prompt(prompts[s.prompt]) for s in samples]
    form, start = trainer.form, None
    if form.adds_reference:
        start = load_policy(dataclasses.replace(model, model_name_or_path=form.reference_model)).to(device).eval()  # pyright: ignore[reportArgumentType]
    scored = reward_model.score_ids(
        prompt_ids,
        ids,
        token_budget=config.discriminator_token_budget,
        reference=start,
        policy=policy if form.subtracts_policy else None,
    )
    traces = []
    for s, scores in zip(samples, scored, strict=True):
        answer, prompt = gold[prompts[s.prompt]], prompts[s.prompt]
        correct = None if answer is None else task.verify(s.text, answer)
        traces.append(ScoredTrace(prompt, s.text, scores, correct=correct, answer=task.extract(s.text)))
    return traces


def pick_traces(traces: list[ScoredTrace], count: int = 5) -> list[ScoredTrace]:
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
