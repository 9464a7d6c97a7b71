"""The warm-up: the discriminator is trained on rollouts sampled once, while the policy stays fixed."""

import math
import random
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tracereward.console import warn
from tracereward.data.surface_probe import leak_warning
from tracereward.errors import RunFailed
from tracereward.files import read_jsonl, write_jsonl
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import generate
from tracereward.modeling.batching import Batch
from tracereward.modeling.distributed import zero3_disabled
from tracereward.modeling.loading import load_causal_lm
from tracereward.modeling.log_probs import completion_log_probs
from tracereward.modeling.tokenization import eos_ids, with_own_end
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.checkpoints import DISCRIMINATOR_FILE, save_state
from tracereward.training.discriminator_batch import Rollout
from tracereward.training.token_probe import token_probe
from tracereward.training.update_loop import UpdateLoop


class RolloutCollector:
    """Reward functions that only collect rollouts: the first stores them, the others return nan.

    Args:
        trainer: an AdversarialTrainer, whose module imports this one.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.rollouts: list[Rollout] = []

    def keep(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        demonstration: list[int],
        answer: list[str | None],
        **_: Any,
    ) -> list[float]:
        """Called by TRL with the local rows."""
        correct = self.trainer.verify(completions, answer)
        self.rollouts += self.trainer.as_rollouts(demonstration, completions, completion_ids, correct)
        return [0.0] * len(completions)

    def unknown(self, completions: list[str], **_: Any) -> list[float]:
        """Called by TRL with the local rows."""
        return [math.nan] * len(completions)


class WarmUp(TrainerCallback):
    """Trains the discriminator on the starting policy's rollouts, before the policy's first step.

    An interrupted warm-up resumes exactly: it does not use the caller's random state, and the state that it leaves
    depends on the seed only.
    """

    def __init__(self, trainer: Any):  # an AdversarialTrainer, whose module imports this one
        self.trainer = trainer
        self.config: AdversarialConfig = trainer.config
        self.model: PreTrainedModel | None = None  # `warmup_model`, if it samples the rollouts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer once the policy is wrapped and on its device."""
        if state.global_step == 0:
            self.run()
            if self.trainer.stop.received():
                control.should_training_stop = True

    def run(self) -> None:
        """Sample the rollouts, probe them for surface leaks, and train the discriminator on them."""
        trainer, config, discriminator = self.trainer, self.config, self.trainer.discriminator
        total = config.discriminator_warmup_updates
        tokens_seen = trainer.state.num_input_tokens_seen
        self.model = self._load_model()
        leaks: dict[str, Any] = {}
        if total and discriminator.updates == 0:
            rollouts = trainer.given or self._draw(self._rows())
            prompts = [discriminator.experts[rollout.demonstration].prompt for rollout in rollouts]
            trainer.check_positions(prompts, [rollout.ids for rollout in rollouts])
            discriminator.remember(rollouts)
            trainer.remark_on_labels()
            if not discriminator.replay.rollouts and not trainer.stop.received():
                raise RunFailed(
                    f"none of the warm-up's {len(rollouts)} rollouts can be trained on under label rule "
                    f"{trainer.labels.name}: all are left out, or of held-out demonstrations: use --negatives all, or "
                    "a lower --held_out_fraction"
                )
            if not trainer.stop.received():
                probe = token_probe(discriminator.experts, rollouts, discriminator.model.tokenizer)
                leaks = probe.row
                if (warning := leak_warning(probe)) is not None:
                    warn(warning)
        loop = UpdateLoop(
            discriminator=discriminator,
            seed=config.seed,
            judged_every=config.monitor_every,
            stopped=trainer.stop.received,
            log=lambda update, row: self._log(update, row, leaks),
            save=self.save,
            autocast=trainer.accelerator.autocast,
        )
        loop.run(total, "warm-up", trainer.quiet)
        if not total:
            self.save()  # what a run without a good checkpoint restores
        self.model = None
        trainer.state.num_input_tokens_seen = tokens_seen
        trainer._metrics["train"].clear()  # metrics of the warm-up's rollouts do not belong to a training step
        set_seed(config.seed + 1, device_specific=True)

    def _log(self, update: int, row: dict[str, float], leaks: dict[str, Any]) -> None:
        """Write the metrics of an update; the first row has the surface probe's figures too."""
        if self.trainer.metrics_file is None or not self.trainer.is_world_process_zero():
            return
        named = {f"discriminator/{name}": value for name, value in row.items()}
        self.trainer.metrics_file.append({"phase": "warmup", "update": update, **named, **leaks})
        leaks.clear()

    def log_probs(self, batch: Batch) -> torch.Tensor | None:
        """log pi of `warmup_model`; None if the policy sampled the rollouts or the warm-up is over."""
        return None if self.model is None else completion_log_probs(self.model, batch)[0]

    # State

    @property
    def folder(self) -> Path:
        """Folder of the rollouts and the discriminator's state."""
        return Path(str(self.trainer.args.output_dir)) / "warmup"

    def save(self) -> None:
        """Write the discriminator's state."""
        state = self.trainer.discriminator.state_dict()
        if self.trainer.is_world_process_zero():
            save_state(self.folder / DISCRIMINATOR_FILE, state)

    def load(self) -> int:
        """Load the state of an interrupted warm-up; returns the number of completed updates."""
        path = self.folder / DISCRIMINATOR_FILE
        if path.is_file():
            self.trainer.discriminator.load(path)
        return self.trainer.discriminator.updates

    # Rollouts

    def _rows(self) -> list[dict[str, Any]]:
        """Rows of the warm-up's prompts, each repeated `warmup_rollouts` times."""
        rows = self.trainer.demonstration_rows
        count = min(self.config.warmup_prompts, len(rows))
        chosen = random.Random(self.config.seed).sample(rows, count)
        held_out = self.trainer.discriminator.held_out
        if all(
            row["demonstration"] in held_out for row in chosen
        ):  # possible with few demonstrations; nothing would be left to train on
            chosen[0] = next(row for row in rows if row["demonstration"] not in held_out)
        repeated = [row for row in chosen for _ in range(self.config.warmup_rollouts)]
        return filled(repeated, self._batch_size)

    @property
    def _batch_size(self) -> int:
        size = self.config.generation_batch_size
        assert size is not None
        return size

    def _draw(self, rows: list[dict[str, Any]]) -> list[Rollout]:
        """Sample a rollout for each row, with the run's engine or with `warmup_model`.

        Sampled in chunks of one generation batch, each with its own seed and saved when complete.
        """
        trainer, size = self.trainer, self._batch_size
        path = self.folder / "rollouts.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rollouts = [_stored(row) for row in read_jsonl(path)]
        local = size // trainer.accelerator.num_processes
        starts = range(len(rollouts), len(rows), size)
        for start in tqdm(starts, desc="warm-up rollouts", disable=trainer.quiet, leave=False):
            if trainer.stop.received():
                break
            set_seed(self.config.seed + 1000 + start, device_specific=True)
            begin = start + trainer.accelerator.process_index * local
            draw: Callable[[list[dict[str, Any]]], list[Rollout]]
            draw = trainer.collect if self.model is None else self._by_warmup_model
            rollouts += gather_object(draw(rows[begin : begin + local]))
            if trainer.is_world_process_zero():
                write_jsonl(path, [dict(rollout._asdict()) for rollout in rollouts])
        return rollouts

    def _by_warmup_model(self, rows: list[dict[str, Any]]) -> list[Rollout]:
        trainer, config = self.trainer, self.config
        assert self.model is not None
        limit = config.max_completion_length
        assert limit is not None
        prompts = [row["prompt"] for row in rows]
        # As TRL's rollouts of the policy: see `RolloutTrainer`.
        more: Any = config.generation_kwargs
        settings = {
            "top_k": config.top_k or 0,
            "min_p": config.min_p,
            "repetition_penalty": config.repetition_penalty,
            **({} if config.use_vllm else more or {}),
        }
        sampling = SamplingParams(
            max_new_tokens=limit, temperature=config.temperature, top_p=config.top_p, settings=settings
        )
        completions = generate(self.model, trainer.tokenizer, prompts, sampling)
        ends = eos_ids(self.model, trainer.tokenizer)
        completions = [with_own_end(trainer.tokenizer, ids, ends) for ids in completions]
        texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
        correct = trainer.verify(texts, [row["answer"] for row in rows])
        return trainer.as_rollouts([row["demonstration"] for row in rows], texts, completions, correct)

    def _load_model(self) -> PreTrainedModel | None:
        name = self.config.warmup_model
        if name is None or not self.config.discriminator_warmup_updates:
            return None
        device = self.trainer.accelerator.device
        dtype = torch.bfloat16 if device.type == "cpu" and self.config.bf16 else self.trainer.policy.dtype
        with zero3_disabled():
            return load_causal_lm(name, dtype, device)


def _stored(row: dict[str, Any]) -> Rollout:
    """A rollout in the warm-up's file; earlier versions called its label ``verified``."""
    label = row["label"] if "label" in row else row["verified"]
    return Rollout(**{**{name: value for name, value in row.items() if name != "verified"}, "label": label})


def filled(rows: list[Any], size: int) -> list[Any]:
    """Rows, repeated from the first until their number is a multiple of `size`: processes need equal shares."""
    return rows + list(islice(cycle(rows), -len(rows) % size))
