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
from tracereward.runs.verdict import FreshTrace
from tracereward.training.trainer import AdversarialTrainer


def fit_marks(
    run: Run,
    trainer: AdversarialTrainer,
    reward_model: TokenRewardModel,
    *,
    questions: Sequence[HeldOutQuestion],
    traces: Sequence[FreshTrace],
) -> str:
    """Fit the rule on held-out experts and on rollouts, and store it with the reward model.

    The rollouts are those of the final policy that the verdict is on and, for the other questions, one of the starting
    policy: reward models judge both. Without enough traces, or if the rule cannot be trusted, none is stored.

    Args:
        run: the open run folder; its policy and reward model are saved.
        trainer: of the finished run.
        reward_model: the trained reward model.
        questions: see `held_out_questions`.
        traces: rollouts of the final policy, of some of these questions or of others.

    Returns:
        What was fitted, or why nothing was, for the report, with a leading space; also printed.
    """
    prompts, gold = trainer.bridge.prompts, {one.prompt: one.answer for one in questions if one.answer is not None}
    experts = [
        JudgedTrace(prompt=prompts.get(one.prompt, one.prompt), completion=one.completion, right=True)
        for one in questions
        if one.completion is not None
    ]
    rollouts = [
        JudgedTrace(
            prompt=prompts.get(trace.question, trace.question),
            completion=trace.completion,
            right=bool(trace.correct),
            finished=trace.finished,
            source="rollout",
        )
        for trace in traces
        if trace.question in gold
    ]
    asked = {prompt: answer for prompt, answer in gold.items() if prompt not in {trace.question for trace in traces}}
    try:
        if asked and len(experts) + len(gold) >= RIGHT_TRACES:
            with zero3_disabled():  # under ZeRO-3 `generate` would wait for the other processes
                rollouts += starting_rollouts(run, trainer, asked)
        rule, text = find_rule(reward_model, [*experts, *rollouts], trainer.config.seed)
    except torch.OutOfMemoryError:
        rule, text = None, no_rule("policy and reward model did not fit in memory with the trainer")
    if rule is not None:
        write_fitted(run.folder / "reward_model", first_error=rule)
    note(text)
    return f" {text}"


def starting_rollouts(run: Run, trainer: AdversarialTrainer, gold: dict[str, str]) -> list[JudgedTrace]:
    """One rollout of the starting policy for each question.

    Args:
        run: the open run folder.
        trainer: of the finished run.
        gold: rendered prompts with their answers.
    """
    config, prompts = trainer.config, trainer.bridge.prompts
    clear_device_cache(garbage_collection=True)
    policy = load_policy(run.job.model).to(trainer.accelerator.device)  # pyright: ignore[reportArgumentType]
    params = SamplingParams(max_new_tokens=config.max_completion_length or 0, seed=config.seed, batch_size=128)
    asked = list(gold)
    samples = [s for chunk in sample(policy, trainer.tokenizer, asked, params, n=1) for s in chunk]
    return [
        JudgedTrace(
            prompt=prompts.get(asked[s.prompt], asked[s.prompt]),
            completion=s.text,
            right=trainer.task.verify(s.text, gold[asked[s.prompt]]),
            finished=s.finished,
            source="rollout",
        )
        for s in samples
    ]
