"""The rule for the first error, fitted at the end of adversarial training on questions that were not trained on."""

from collections.abc import Sequence

import torch
from accelerate.utils.memory import clear_device_cache

from tracereward.console import note
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.modeling.distributed import zero3_disabled
from tracereward.rewards.first_error_fit import JudgedTrace, find_rule, no_rule
from tracereward.rewards.first_error_rules import RIGHT_TRACES
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import write_fitted
from tracereward.runs.finish import load_policy
from tracereward.runs.folder import Run
from tracereward.runs.held_out import HeldOutQuestion
from tracereward.training.trainer import AdversarialTrainer


def fit_marks(
    run: Run, trainer: AdversarialTrainer, reward_model: TokenRewardModel, questions: Sequence[HeldOutQuestion]
) -> str:
    """Fit the rule on held-out experts and on the final policy's rollouts, and store it with the reward model.

    Without enough traces, or if no signal can be trusted, none is stored.

    Args:
        run: the open run folder; its policy and reward model are saved.
        trainer: of the finished run.
        reward_model: the trained reward model.
        questions: see `held_out_questions`.

    Returns:
        What was fitted, or why nothing was, for the report, with a leading space; also printed.
    """
    bridge = trainer.bridge
    experts = [
        JudgedTrace(prompt=bridge.prompts.get(one.prompt, one.prompt), completion=one.completion, right=True)
        for one in questions
        if one.completion is not None
    ]
    try:
        rollouts: list[JudgedTrace] = []
        if len(experts) + sum(one.answer is not None for one in questions) >= RIGHT_TRACES:
            with zero3_disabled():  # under ZeRO-3 `generate` would wait for the other processes
                rollouts = judged_rollouts(run, trainer, questions)
        rule, text = find_rule(reward_model, [*experts, *rollouts], trainer.config.seed)
    except torch.OutOfMemoryError:
        rule, text = None, no_rule("policy and reward model did not fit in memory with the trainer")
    if rule is not None:
        write_fitted(run.folder / "reward_model", first_error=rule)
    note(text)
    return f" {text}"


def judged_rollouts(run: Run, trainer: AdversarialTrainer, questions: Sequence[HeldOutQuestion]) -> list[JudgedTrace]:
    """One rollout of the final policy for each question whose answer is known."""
    config, bridge = trainer.config, trainer.bridge
    asked = [(one.prompt, one.answer) for one in questions if one.answer is not None]
    clear_device_cache(garbage_collection=True)
    policy = load_policy(run.job.model, str(run.folder / "policy")).to(trainer.accelerator.device)  # pyright: ignore[reportArgumentType]
    params = SamplingParams(max_new_tokens=config.max_completion_length or 0, seed=config.seed, batch_size=128)
    samples = [s for chunk in sample(policy, trainer.tokenizer, [p for p, _ in asked], params, n=1) for s in chunk]
    return [
        JudgedTrace(
            prompt=bridge.prompts.get(asked[s.prompt][0], asked[s.prompt][0]),
            completion=s.text,
            right=trainer.task.verify(s.text, asked[s.prompt][1]),
            finished=s.finished,
            source="rollout",
        )
        for s in samples
    ]
