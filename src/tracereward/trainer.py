"""`AdversarialTrainer`: TRL's GRPO with a reward that is learned beside the policy.

One private hook of TRL is overridden, `_generate_and_score_completions`, and only to draw the warm-up's rollouts and to
put (B, T) advantages in the place of (B,): `_compute_loss` accepts both. The reward itself is an ordinary reward
function. A contract test pins what is used.
"""

import contextlib
import copy
import io
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from tracereward.callbacks import MetricsFile, StopSignal
from tracereward.checkpoints import SafeTrainer
from tracereward.config import AdversarialConfig
from tracereward.demonstrations import encode_completion, encode_prompt
from tracereward.discriminator import Discriminator
from tracereward.errors import InputError
from tracereward.files import read_jsonl, write_jsonl
from tracereward.monitor import reward_monitor
from tracereward.reward_model import TokenRewardModel
from tracereward.sampling import generate
from tracereward.shaping import group_moments, moments_to_statistics, token_advantages
from tracereward.tasks import Task

NO_DEMONSTRATION = -1
DISCRIMINATOR_FILE = "discriminator.pt"  # not in a subfolder with an adapter's name: Trainer would load it as one


class AdversarialTrainer(SafeTrainer, GRPOTrainer):
    """GRPO on the log-odds of a discriminator that learns to tell the demonstrations from the policy's rollouts.

    Args:
        model: the starting policy.
        reward_model: the starting discriminator.
        demonstrations: rows with prompt (rendered text), completion and, for monitoring only, answer.
        args: the run's options.
        task: recipe that verifies answers for the monitors.
        processing_class: the tokenizer of both models.
        unlabeled: rows with a prompt and no completion, for further rollouts of the policy.
        peft_config: LoRA settings of the policy.
        metrics_file: where the warm-up logs; training steps log through TRL.
        stop: asked during the warm-up whether to stop.
        callbacks: as in TRL.
    """

    _tag_names: ClassVar = ["trl", "tracereward"]

    def __init__(
        self,
        model: PreTrainedModel,
        reward_model: TokenRewardModel,
        demonstrations: list[dict[str, Any]],
        args: AdversarialConfig,
        task: Task,
        processing_class: PreTrainedTokenizerBase,
        unlabeled: Sequence[dict[str, Any]] = (),
        peft_config: LoraConfig | None = None,
        metrics_file: MetricsFile | None = None,
        stop: StopSignal | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.task = task
        self.tokenizer = processing_class
        self.config = args
        self._starting_policy = None
        if args.reward_form != "logit" and peft_config is None:
            self._starting_policy = copy.deepcopy(model).eval().requires_grad_(False)
        self.metrics_file = metrics_file
        self.stop = stop or StopSignal()
        rows = prompt_rows(demonstrations, unlabeled, args.expert_prompt_share)
        monitored = all(row["answer"] is not None for row in rows)
        functions = [self.learned_reward, self.correct] if monitored else [self.learned_reward]
        args.reward_weights = [1.0, 0.0][: len(functions)]  # correctness is watched, never trained on
        super().__init__(
            model=model,
            reward_funcs=functions,  # pyright: ignore[reportArgumentType] (lists are invariant)
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=[*(callbacks or []), _WarmUpFirst(self)],
        )
        experts = [
            (encode_prompt(processing_class, row["prompt"]), encode_completion(processing_class, row["completion"]))
            for row in demonstrations
        ]
        self.demonstration_rows = rows[: len(demonstrations)]
        reward_model.to(self.accelerator.device)
        if args.gradient_checkpointing:
            reward_model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.discriminator = Discriminator(reward_model, experts, args)
        self._pooled: list[tuple[int, list[int]]] | None = None
        self._rewards: list[Tensor] = []
        self._correct: list[float] = []

    @property
    def policy(self) -> PreTrainedModel:
        """The model that is trained; transformers allows it to be absent."""
        assert self.model is not None
        return self.model  # pyright: ignore[reportReturnType]

    # Reward functions, called by TRL with the local rows of a batch of rollouts.

    def learned_reward(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        demonstration: list[int],
        answer: list[str | None],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """Train the discriminator on the rollouts, then reward each by the aggregate of its token rewards."""
        rollouts = [
            (index, list(ids))
            for index, ids in zip(demonstration, completion_ids, strict=True)
            if index != NO_DEMONSTRATION
        ]
        if self._pooled is not None:
            self._pooled += rollouts
            self._correct = [math.nan] * len(prompts)
            return [0.0] * len(prompts)
        if self.policy.training:
            fresh = gather_object(rollouts)
            with self.accelerator.autocast():  # the discriminator is not prepared: it would train in float32
                metrics = self.discriminator.learn(fresh)
            for name, value in metrics.items():
                log_metric(f"discriminator/{name}", value)
        prompt_ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        with self.accelerator.autocast(), self._reference() as reference:
            self._rewards = self.discriminator.model.token_rewards(
                prompt_ids, completion_ids, self.config.discriminator_token_budget, reference
            )
        how = torch.min if self.config.reward_aggregate == "min" else torch.mean
        trace_rewards = [float(how(rewards)) for rewards in self._rewards]
        self._correct = [
            math.nan if gold is None else float(self.task.verify(text, gold))
            for text, gold in zip(completions, answer, strict=True)
        ]
        local = list(zip(prompts, map(len, completion_ids), trace_rewards, self._correct, strict=True))
        for name, value in reward_monitor(gather_object(local)).items():
            log_metric(f"monitor/{name}", value)
        return trace_rewards

    @contextlib.contextmanager
    def _reference(self) -> Iterator[torch.nn.Module | None]:
        """The starting policy where the reward needs it: under LoRA the policy without its adapter, else a copy."""
        if self.config.reward_form == "logit":
            yield None
        elif self._starting_policy is not None:
            yield self._starting_policy.to(self.accelerator.device)
        else:
            policy = self.accelerator.unwrap_model(self.model)
            was_training = policy.training
            with policy.eval().disable_adapter():
                yield policy
            policy.train(was_training)

    def correct(self, prompts: list[str], **_: Any) -> list[float]:
        """Whether each rollout's answer is right; weight 0."""
        return self._correct

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._pooled is None and self.config.advantages == "token":
            output["advantages"] = self._token_advantages(output["completion_mask"])
        return output

    def _token_advantages(self, mask: Tensor) -> Tensor:
        """(B, T) advantages; group statistics over all processes' real tokens, as a group may span two of them."""
        rewards = torch.zeros(mask.shape, device=mask.device)
        for row, values in enumerate(self._rewards):
            rewards[row, : len(values)] = values.to(mask.device)
        group = self.num_generations if self.policy.training else self.num_generations_eval
        moments = self.accelerator.gather(group_moments(rewards, mask))
        assert isinstance(moments, Tensor)
        assert group is not None
        mean, std = moments_to_statistics(moments, group)
        local = slice(self.accelerator.process_index * len(mask), (self.accelerator.process_index + 1) * len(mask))
        return token_advantages(rewards, mask, mean[local], std[local], self.config.gamma)

    # Warm-up: the policy does not move, so its rollouts are drawn once and it has no backward pass.

    def warm_up(self) -> None:
        """Train the discriminator on a pool of the starting policy's rollouts; goes on where a kill left it.

        Uses no random state of the caller's and leaves a state that depends on the seed only, so that a run which was
        interrupted here continues as if it had not been.
        """
        total = self.config.discriminator_warmup_updates
        tokens_seen = self.state.num_input_tokens_seen
        if self.discriminator.updates == 0 and total:
            self.discriminator.remember(self._draw_pool(self._warm_up_rows()))
        progress = tqdm(
            total=total, initial=self.discriminator.updates, desc="warm-up", disable=self._quiet, leave=False
        )
        while self.discriminator.updates < total and not self.stop.received:
            # Dropout draws from the global generator: each update has a seed of its own, as it may be the first to run.
            set_seed(self.config.seed + 500_000 + self.discriminator.updates, device_specific=True)
            with self.accelerator.autocast():
                row = self.discriminator.update([])
            done = self.discriminator.updates
            progress.update()
            if self.metrics_file is not None and self.is_world_process_zero():
                named = {f"discriminator/{name}": value for name, value in row.items()}
                self.metrics_file.append({"phase": "warmup", "update": done, **named})
            if done % self.config.warmup_save_updates == 0 or done == total or self.stop.received:
                self._save_warm_up()
        progress.close()
        self.state.num_input_tokens_seen = tokens_seen
        self._metrics["train"].clear()  # the warm-up's rollouts are not a training step's
        set_seed(self.config.seed + 1, device_specific=True)

    @property
    def _quiet(self) -> bool:
        return self.args.disable_tqdm is True or not self.is_world_process_zero()

    @property
    def _warm_up_folder(self) -> Path:
        return Path(str(self.args.output_dir)) / "warmup"

    def _save_warm_up(self) -> None:
        if self.is_world_process_zero():
            save_state(self._warm_up_folder / DISCRIMINATOR_FILE, self.discriminator.state_dict())

    def load_warm_up(self) -> int:
        """Continue a warm-up that was interrupted; returns the updates done, 0 if there is nothing to continue."""
        path = self._warm_up_folder / DISCRIMINATOR_FILE
        if path.is_file():
            self.discriminator.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return self.discriminator.updates

    def _warm_up_rows(self) -> list[dict[str, Any]]:
        """The demonstrations whose prompts the warm-up's rollouts answer, each `warmup_rollouts` times."""
        count = min(self.config.warmup_prompts, len(self.demonstration_rows))
        chosen = random.Random(self.config.seed).sample(self.demonstration_rows, count)
        rows = [row for row in chosen for _ in range(self.config.warmup_rollouts)]
        size = self.config.generation_batch_size
        assert size is not None
        return rows + list(islice(cycle(rows), -len(rows) % size))  # every process needs a full share of the last chunk

    def _draw_pool(self, rows: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """A rollout of each row's prompt, by the engine that the run uses, or by `warmup_model`.

        Drawn in chunks of one generation batch, each with a seed of its own and saved when it is done.
        """
        path = self._warm_up_folder / "rollouts.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        pool = [(row["demonstration"], row["ids"]) for row in read_jsonl(path)]
        size = self.config.generation_batch_size
        assert size is not None
        local = size // self.accelerator.num_processes
        other = self._load_warm_up_model() if len(pool) < len(rows) else None
        starts = range(len(pool), len(rows), size)
        for start in tqdm(starts, desc="warm-up rollouts", disable=self._quiet, leave=False):
            if self.stop.received:
                break
            set_seed(self.config.seed + 1000 + start, device_specific=True)
            begin = start + self.accelerator.process_index * local
            mine = rows[begin : begin + local]
            pool += gather_object(self._rollouts(mine) if other is None else self._rollouts_of(other, mine))
            if self.is_world_process_zero():
                write_jsonl(path, [{"demonstration": index, "ids": ids} for index, ids in pool])
        return pool

    def _rollouts(self, rows: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """The policy's rollouts of the local rows, by way of the hook that serves all of TRL's engines."""
        self.policy.train()
        self._pooled = []
        try:
            self._generate_and_score_completions(rows)
            return self._pooled
        finally:
            self._pooled = None

    def _rollouts_of(self, model: PreTrainedModel, rows: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        limit = self.config.max_completion_length
        assert limit is not None
        drawn = generate(
            model, self.tokenizer, [row["prompt"] for row in rows], 1, limit, self.config.temperature, self.config.top_p
        )
        return [(row["demonstration"], ids) for row, ids in zip(rows, drawn, strict=True)]

    def _load_warm_up_model(self) -> PreTrainedModel | None:
        if self.config.warmup_model is None:
            return None
        dtype = self.policy.dtype
        return AutoModelForCausalLM.from_pretrained(self.config.warmup_model, dtype=dtype).to(self.accelerator.device)

    # Checkpoints: the discriminator's state rides in each.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_world_process_zero():
            save_state(Path(output_dir) / DISCRIMINATOR_FILE, self.discriminator.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / DISCRIMINATOR_FILE
            self.discriminator.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


class _WarmUpFirst(TrainerCallback):
    """Runs the warm-up when the policy is wrapped and placed, before its first step."""

    def __init__(self, trainer: AdversarialTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.warm_up()
            if self.trainer.stop.received:
                control.should_training_stop = True


def save_state(path: Path, state: dict[str, Any]) -> None:
    """`torch.save` under a temporary name, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def prompt_rows(
    demonstrations: Sequence[dict[str, Any]], unlabeled: Sequence[dict[str, Any]], expert_share: float
) -> list[dict[str, Any]]:
    """Rows of the policy's prompts: prompt, answer or None, and the index of the demonstration or -1.

    With unlabeled prompts, the demonstrations' are repeated so that they make up about `expert_share` of all rows:
    without fresh rollouts beside experts the discriminator would not follow the policy.
    """
    if not demonstrations:
        raise InputError("there is no demonstration to learn from")
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
