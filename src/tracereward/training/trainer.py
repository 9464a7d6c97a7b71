"""`AdversarialTrainer`: TRL's GRPO with a reward that is learned together with the policy.

The reward is an ordinary reward function. One private TRL method is overridden, `_generate_and_score_completions`, to
replace TRL's advantages by token advantages (`_compute_loss` accepts (B, T) as well as (B,)). Contract tests pin the
TRL behaviour that this relies on.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tracereward.console import warn
from tracereward.data.demonstrations import check_demonstrations
from tracereward.errors import InputError, RunFailed
from tracereward.modeling.adapters import POLICY, AdapterView
from tracereward.modeling.batching import Batch, pack
from tracereward.modeling.distributed import all_reduce_max, is_distributed, is_sharded, shard
from tracereward.modeling.loading import frozen_copy
from tracereward.modeling.log_probs import completion_log_probs
from tracereward.modeling.rendering import row_location
from tracereward.modeling.tokenization import encode_completion, encode_prompt, eos_ids, keep_tags, pad_id
from tracereward.rewards.heads import subtracts_policy
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.shaping import aggregate
from tracereward.tasks.recipes import Task
from tracereward.training import rollout_metrics
from tracereward.training.advantages import (
    batch_statistics,
    group_moments,
    moments_to_statistics,
    token_advantages,
    whiten,
)
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.callbacks import FailureWatch, MetricsFile, StopSignal
from tracereward.training.checkpoints import DISCRIMINATOR_FILE, better_than_start, save_state, score_of_checkpoint
from tracereward.training.discriminator import Discriminator, held_out_demonstrations
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.failures import Failure
from tracereward.training.perturbed_pairs import TracePair, pair_auroc, pair_traces, perturbed_pairs
from tracereward.training.rollout_labels import RolloutLabels
from tracereward.training.rollout_trainer import RolloutTrainer
from tracereward.training.token_bridge import TokenBridge
from tracereward.training.warmup import RolloutCollector, WarmUp

NO_DEMONSTRATION = -1
KL_ROWS = 32  # rollouts per process in the KL estimate


class AdversarialTrainer(RolloutTrainer):
    """GRPO on the log-odds of a discriminator trained to distinguish demonstrations from the policy's rollouts.

    Args:
        model: the starting policy; with its LoRA adapter if the reward model shares its base model.
        reward_model: the initial discriminator; its tokenizer may differ from the policy's.
        demonstrations: rows with prompt (rendered text), completion and, for monitoring only, answer. Rows whose
            completion is None are unlabeled: further prompts for the policy's rollouts. `reward_prompt` is the prompt
            as rendered for the reward model, if that differs. `candidates` of `warmup_candidates` are the warm-up's
            rollouts instead of sampled ones.
        args: the options of the run. Like all arguments after it, keyword-only.
        task: verifies answers for monitoring.
        processing_class: the policy's tokenizer.
        peft_config: LoRA settings of the policy.
        callbacks: as in TRL. The warm-up logs to the `MetricsFile` among them and obeys the `StopSignal`.

    Raises:
        InputError: an option requires answers that are missing, or the same tokenizer for both models.
    """

    _tag_names: ClassVar = ["trl", "tracereward"]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_model: TokenRewardModel,
        demonstrations: list[dict[str, Any]],
        *,
        args: AdversarialConfig,
        task: Task,
        processing_class: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_demonstrations(demonstrations)
        reward_prompts = {row["prompt"]: row["reward_prompt"] for row in demonstrations if "reward_prompt" in row}
        unlabeled = [row for row in demonstrations if row["completion"] is None]
        demonstrations = [row for row in demonstrations if row["completion"] is not None]
        keep_tags(processing_class)  # TRL decodes with it
        self.task = task
        self.tokenizer = processing_class
        self.config = args
        self.form: RewardSettings = reward_model.settings
        self.bridge: TokenBridge = TokenBridge(
            processing_class, reward_model, eos_ids(model, processing_class), reward_prompts or None
        )
        if not self.bridge.same and (subtracts_policy(args.head) or self.form.adds_reference):
            raise InputError(
                f"head {args.head} with reward_form {self.form.form} adds log-probs of the policy's tokens to the "
                "reward model's, so both need the same tokenizer. Use head token or action with reward_form logit."
            )
        self._starting_policy = None
        if self.form.adds_reference and peft_config is None and not isinstance(model, PeftModel):
            self._starting_policy = frozen_copy(model)
        callbacks = callbacks or []
        self.metrics_file: MetricsFile | None = next((c for c in callbacks if isinstance(c, MetricsFile)), None)
        self.stop: StopSignal = next((c for c in callbacks if isinstance(c, StopSignal)), StopSignal())
        rows = prompt_rows(demonstrations, unlabeled, args.expert_prompt_share)
        monitored = all(row["answer"] is not None for row in rows)
        if args.positives == "mixed" and not any(row.get("answer") for row in demonstrations):
            raise InputError("positives mixed needs answers, but no demonstration has one; use positives expert")
        self.labels: RolloutLabels = RolloutLabels(demonstrations, task, args.positives, args.negatives)
        functions = [self.learned_reward, self.correct] if monitored else [self.learned_reward]
        args.reward_weights = [1.0, 0.0][: len(functions)]  # correctness is monitored, never trained on
        self.watch: FailureWatch = FailureWatch(args.on_failure, warn)
        self.warm_up: WarmUp = WarmUp(self)
        super().__init__(
            model=model,
            reward_funcs=functions,  # pyright: ignore[reportArgumentType] (lists are invariant)
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=[*callbacks, self.watch, self.warm_up],
        )
        experts = [
            Expert(
                self.bridge.prompt(row["prompt"]),
                encode_completion(reward_model.tokenizer, row["completion"]),
                row["completion"],
            )
            for row in demonstrations
        ]
        for row, expert in zip(demonstrations, experts, strict=True):
            reward_model.check_ids(row_location(row), expert.prompt, expert.completion)
        self.demonstration_rows: list[dict[str, Any]] = rows[: len(demonstrations)]
        if not (args.shard_discriminator and is_distributed()):  # a sharded one never fits on one device in full
            reward_model.to(self.accelerator.device)
        if reward_model.shares_base and is_sharded(self):
            raise InputError("shared_base needs the full base model on each process: use DDP, not FSDP or DeepSpeed")
        if args.gradient_checkpointing and not reward_model.shares_base:
            reward_model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.given: list[Rollout] = [
            Rollout(
                index,
                encode_completion(reward_model.tokenizer, candidate["completion"], candidate["finished"]),
                candidate["label"],
            )
            for index, row in enumerate(demonstrations)
            for candidate in row.get("candidates", ())
        ]
        held_out = held_out_demonstrations(experts, args.held_out_fraction, args.seed)
        self.discriminator: Discriminator = Discriminator(
            reward_model,
            experts,
            args,
            seed=args.seed,
            held_out=held_out,
            judged_every=args.monitor_every,
            device=args.device,
            policy_log_probs=self._policy_log_probs,
        )
        if self._starting_policy is not None:
            if self.discriminator.sharded:
                shard(self._starting_policy, self.accelerator.device)
            self._starting_policy.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]
        self.perturbed_pairs: list[TracePair] = perturbed_pairs(
            experts, held_out, self.discriminator.perturbed, args.seed
        )
        self._rewards: list[Tensor] = []
        self._trace_rewards: list[float] = []
        self._correct: list[float] = []

    @property
    def policy(self) -> PreTrainedModel:
        """The trained model (optional in transformers, always present here)."""
        assert self.model is not None
        return self.model  # pyright: ignore[reportReturnType]

    @property
    def quiet(self) -> bool:
        """Whether progress bars are disabled on this process."""
        return self.args.disable_tqdm is True or not self.is_world_process_zero()

    # Reward functions, called by TRL with the local rows of a batch of rollouts.

    def learned_reward(
        self,
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        demonstration: list[int],
        answer: list[str | None],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """Reward function: train the discriminator on the rollouts, then aggregate each rollout's token rewards."""
        self._correct = self.verify(completions, answer)
        rollouts = self.as_rollouts(demonstration, completions, completion_ids, self._correct)
        self.remark_on_labels()
        prompt_ids = [self.bridge.prompt(prompt) for prompt in prompts]
        reward_ids = [self.bridge.completion(ids) for ids in completion_ids]
        self.check_positions(prompt_ids, reward_ids)
        if self.policy.training:
            fresh = gather_object(rollouts)
            with self.accelerator.autocast():  # not prepared by accelerate, the discriminator would train in float32
                metrics = self.discriminator.learn(fresh)
            # Its gradients take memory, and on a shared base model they would count in the policy's gradient norm.
            self.discriminator.optimizer.zero_grad()
            for name, value in metrics.items():
                log_metric(f"discriminator/{name}", value)
        rewards = self.token_rewards(prompt_ids, reward_ids)
        self.check_rewards(prompts, completions, completion_ids, [values.tolist() for values in rewards])
        if self.config.whiten_rewards:
            mean, std = self._statistics(rewards)
            rewards = [whiten(values, mean, std) for values in rewards]
        self._trace_rewards = [self._aggregate(*pair) for pair in zip(reward_ids, rewards, strict=True)]
        triples = zip(completion_ids, reward_ids, rewards, strict=True)
        self._rewards = [self.bridge.rewards(ids, translated, values) for ids, translated, values in triples]
        self._monitor(prompts, completion_ids, log_metric)
        return self._trace_rewards

    def check_positions(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> None:
        """Stop the run at a rollout that is longer than the reward model reads. A collective call.

        Raises:
            RunFailed: on every process.
        """
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
        longest, limit = all_reduce_max(max(lengths, default=0)), self.discriminator.model.max_positions
        if longest > limit:
            raise RunFailed(
                f"a prompt and its rollout at step {self.state.global_step + 1} have {longest} tokens, but the reward "
                f"model reads {limit:.0f}: lower --max_completion_length, or use one with a longer context"
            )

    def correct(self, prompts: list[str], **_: Any) -> list[float]:
        """Reward function with weight 0: whether each rollout's answer is correct."""
        return self._correct

    def verify(self, completions: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        """1 or 0 per completion; nan without a gold answer."""
        return [
            math.nan if gold is None else float(self.task.verify(text, gold))
            for text, gold in zip(completions, answers, strict=True)
        ]

    def as_rollouts(
        self,
        demonstrations: Sequence[int],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        correct: Sequence[float],
    ) -> list[Rollout]:
        """The rollouts of demonstrations' prompts, in the reward model's tokens, with their labels."""
        rollouts = []
        for index, text, ids, right in zip(demonstrations, completions, completion_ids, correct, strict=True):
            if index != NO_DEMONSTRATION:
                answer, finished = self.task.extract(text), self.bridge.finished(ids)
                label = self.labels.label(index, answer, finished=finished, right=right == 1)
                rollouts.append(Rollout(index, self.bridge.completion(ids), label))
        return rollouts

    def remark_on_labels(self) -> None:
        """Warn, once, if the label rule calls many rollouts wrong that have the experts' answer."""
        remark = self.labels.remark()
        if remark is not None:
            warn(remark)

    def collect(self, rows: list[dict[str, Any]]) -> list[Rollout]:
        """Generate rollouts for the local rows with the run's engine, without training on them."""
        collector, functions = RolloutCollector(self), self.reward_funcs
        self.reward_funcs: list[Any] = [collector.keep, *([collector.unknown] * (len(functions) - 1))]
        self.policy.train()
        try:
            super()._generate_and_score_completions(rows)
        finally:
            self.reward_funcs = functions
        return collector.rollouts

    def token_rewards(self, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
        """Token rewards as used in training: the averaged discriminator's, in the run's reward form."""
        with (
            self.accelerator.autocast(),
            self._reference() as reference,
            self._evaluated() as policy,
            self.discriminator.averaged() as model,
        ):
            return model.token_rewards(
                prompts,
                completions,
                token_budget=self.config.discriminator_token_budget,
                reference=reference if self.form.adds_reference else None,
                policy=policy if self.form.subtracts_policy else None,
                sharded=is_sharded(self) or self.discriminator.sharded,
            )

    def _aggregate(self, ids: Sequence[int], rewards: Tensor) -> float:
        if self.form.thinking_weight is not None:
            return self.discriminator.model.trace_reward(ids, rewards.tolist(), self.config.reward_aggregate)
        return float(aggregate(rewards[None], torch.ones(1, len(rewards)), self.config.reward_aggregate))

    def _statistics(self, rewards: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the token rewards over all processes. A collective call."""
        moments = torch.cat([group_moments(values[None], torch.ones(1, len(values))) for values in rewards])
        return batch_statistics(self._gather(moments).cpu())

    def _gather(self, values: Tensor) -> Tensor:
        gathered = self.accelerator.gather(values.to(self.accelerator.device))
        assert isinstance(gathered, Tensor)
        return gathered

    # Monitoring

    def _monitor(self, prompts: list[str], completion_ids: list[list[int]], log: Callable[[str, float], None]) -> None:
        local = [
            rollout_metrics.RewardedRollout(
                prompt=prompt,
                ids=list(ids),
                finished=self.bridge.finished(ids),
                rewards=values.tolist(),
                reward=reward,
                correct=right,
            )
            for prompt, ids, values, reward, right in zip(
                prompts, completion_ids, self._rewards, self._trace_rewards, self._correct, strict=True
            )
        ]
        metrics = rollout_metrics.rollout_metrics(gather_object(local))
        if self.discriminator.batches % self.config.monitor_every == 0:
            metrics |= self._perturbation() | self._kl(prompts, completion_ids)
        for name, value in metrics.items():
            log(f"monitor/{name}", value)

    def _perturbation(self) -> dict[str, float]:
        """AUROC of experts against their perturbed copies; needs no answers."""
        if not self.perturbed_pairs:
            return {}
        prompts, ids = pair_traces(self.perturbed_pairs)
        rewards = self.token_rewards(prompts, ids)
        decode = self.discriminator.model.tokenizer.batch_decode
        self.check_rewards(decode(prompts), decode(ids), ids, [values.tolist() for values in rewards])
        return {"perturbation_auroc": pair_auroc(self.perturbed_pairs, list(map(self._aggregate, ids, rewards)))}

    @torch.no_grad()
    def _kl(self, prompts: list[str], completion_ids: list[list[int]]) -> dict[str, float]:
        """E[exp(d) - d - 1], d = log pi_start - log pi: TRL's estimator, used where TRL logs none."""
        with self._reference() as reference:
            if reference is None or self.config.beta:
                return {}
            ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts[:KL_ROWS]]
            batch = pack(ids, completion_ids[:KL_ROWS], pad_id(self.tokenizer)).to(self.accelerator.device)
            of_start, _ = completion_log_probs(reference, batch)
        with self._evaluated() as policy, self.accelerator.autocast():
            gap = of_start - completion_log_probs(policy, batch)[0]
        # Padding can hold any gap, and 0 * exp of a large one is nan.
        gap = gap[batch.completion_mask.bool()]
        return {"kl": float((gap.exp() - gap - 1).mean())}

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module | None]:
        """The starting policy: with LoRA the policy without its adapter, otherwise the frozen copy, if there is one."""
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel):
            yield AdapterView(policy, None).eval()
        else:
            yield self._starting_policy

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[nn.Module]:
        """The policy in evaluation mode."""
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel):
            yield AdapterView(policy, POLICY).eval()
            return
        was_training = policy.training
        policy.eval()
        try:
            yield policy
        finally:
            policy.train(was_training)

    @torch.no_grad()
    def _policy_log_probs(self, batch: Batch) -> Tensor:
        """log pi(y_t) of the model that generated the discriminator's rollouts."""
        of_another = self.warm_up.log_probs(batch)
        if of_another is not None:
            return of_another
        with self._evaluated() as policy:
            return completion_log_probs(policy, batch)[0]

    # Advantages

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.config.advantages == "token":
            output["advantages"] = self._token_advantages(output["completion_mask"])
        return output

    @property
    def _group_size(self) -> int:
        group = self.num_generations if self.policy.training else self.num_generations_eval
        assert group is not None
        return group

    def _local(self, values: Tensor) -> Tensor:
        """This process's slice of gathered values; a group may span two processes."""
        share = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * share :][:share]

    def _token_advantages(self, mask: Tensor) -> Tensor:
        """(B, T) advantages of the local rollouts; group statistics include the real tokens of all processes."""
        rewards = torch.zeros(mask.shape, device=mask.device)
        for row, values in enumerate(self._rewards):
            rewards[row, : len(values)] = values.to(mask.device)
        moments = self._gather(group_moments(rewards, mask))
        mean, std = moments_to_statistics(moments, self._group_size)
        return token_advantages(rewards, mask, self._local(mean), self._local(std), gamma=self.config.gamma)

    # Checkpoints contain the discriminator's state; the best one is kept for `restore_best`.

    def rate_checkpoint(self) -> None:
        """Rate by validation questions; without them the checkpoint before, whose own rollouts are known only now."""
        if self.validation is None:
            self.keep_if_best(self.saved[1], score_of_checkpoint(self.watch.history, *self.saved))
        super().rate_checkpoint()

    def beats_start(self) -> bool:
        """Whether the best checkpoint is worth restoring."""
        if self.validation is not None:
            return super().beats_start()
        return better_than_start(self.state.best_metric, self.watch.history)

    def load_before_training(self) -> int:
        """Resume an interrupted warm-up."""
        return self.warm_up.load()

    @property
    def failure(self) -> Failure | None:
        """The failure that stopped the run, if any."""
        return self.watch.stopped

    def restore_best(self) -> str | None:
        """Restore the discriminator with the policy, or its state after the warm-up if no checkpoint is good enough."""
        if self.validation is None:
            self.rate_checkpoint()
        restored = super().restore_best()
        if restored is None:
            self.warm_up.load()
        else:
            self.discriminator.load(Path(str(self.args.output_dir)) / restored / DISCRIMINATOR_FILE)
        return restored

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.discriminator.state_dict()
        if self.is_world_process_zero():
            save_state(Path(output_dir) / DISCRIMINATOR_FILE, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.discriminator.load(Path(checkpoint) / DISCRIMINATOR_FILE)


def prompt_rows(
    demonstrations: Sequence[dict[str, Any]], unlabeled: Sequence[dict[str, Any]], expert_share: float
) -> list[dict[str, Any]]:
    """The policy's training rows: prompt, answer or None, and the index of the demonstration or -1.

    With unlabeled prompts, the demonstrations' prompts are repeated to make up about `expert_share` of all rows: the
    discriminator can only follow the policy if its prompts have fresh rollouts.

    Raises:
        InputError: there are no demonstrations.
    """
    if not demonstrations:
        raise InputError("no demonstrations: at least one row needs a completion")
    labeled = [
        {"prompt": row["prompt"], "answer": row.get("answer"), "demonstration": index}
        for index, row in enumerate(demonstrations)
    ]
    extra = [
        {"prompt": row["prompt"], "answer": row.get("answer"), "demonstration": NO_DEMONSTRATION} for row in unlabeled
    ]
    if not extra or expert_share == 0:
        return labeled + extra
    wanted = len(extra) * expert_share / max(1e-9, 1 - expert_share)
    repeats = max(1, min(len(extra), round(wanted / len(labeled))))
    return labeled * repeats + extra
