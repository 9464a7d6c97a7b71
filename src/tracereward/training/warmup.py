"""The warm-up: the policy does not move, so its rollouts are drawn once and it has no backward pass."""

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
from tracereward.data.surface_probe import TraceText, leak_warning, surface_probe
from tracereward.files import read_jsonl, write_jsonl
from tracereward.generation.sampling import generate
from tracereward.modeling.batching import Batch
from tracereward.modeling.distributed import broadcast_object, zero3_disabled
from tracereward.modeling.loading import load_causal_lm
from tracereward.modeling.log_probs import completion_log_probs
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.checkpoints import save_state
from tracereward.training.discriminator_batch import Rollout

DISCRIMINATOR_FILE = "discriminator.pt"  # not in a subfolder with an adapter's name: Trainer would load it as one
SAVED_UPDATES = 20  # updates between two saves


class RolloutCollector:
    """Reward functions for rollouts that are only collected: the first keeps them, the others know nothing of them.

    Args:
        trainer: an AdversarialTrainer, which imports this module.
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
        self.rollouts += self.trainer.as_rollouts(demonstration, completion_ids, correct)
        return [0.0] * len(completions)

    def unknown(self, completions: list[str], **_: Any) -> list[float]:
        """Called by TRL with the local rows."""
        return [math.nan] * len(completions)


class WarmUp(TrainerCallback):
    """Trains the discriminator on a pool of the starting policy's rollouts, before the policy's first step.

    It goes on where a kill left it, uses no random state of the caller's, and leaves one that depends on the seed only,
    so that a run which was interrupted here continues as if it had not been.
    """

    def __init__(self, trainer: Any):  # an AdversarialTrainer, which imports this module
        self.trainer = trainer
        self.config: AdversarialConfig = trainer.config
        self.model: PreTrainedModel | None = None  # another model that draws the pool

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer when the policy is wrapped and placed."""
        if state.global_step == 0:
            self.run()
            if self.trainer.stop.received():
                control.should_training_stop = True

    def run(self) -> None:
        """Draw the pool, probe it for surface leaks, and update the discriminator on it."""
        trainer, config, discriminator = self.trainer, self.config, self.trainer.discriminator
        total = config.discriminator_warmup_updates
        tokens_seen = trainer.state.num_input_tokens_seen
        self.model = self._load_model()
        leaks: dict[str, Any] = {}
        if total and discriminator.updates == 0:
            pool = self._draw(self._rows())
            discriminator.remember(pool)
            leaks = {} if trainer.stop.received() else self._leaks(pool)
        progress = tqdm(total=total, initial=discriminator.updates, desc="warm-up", disable=trainer.quiet, leave=False)
        while discriminator.updates < total and not trainer.stop.received():
            # Dropout draws from the global generator: each update has a seed of its own, as it may be the first to run.
            set_seed(config.seed + 500_000 + discriminator.updates, device_specific=True)
            with trainer.accelerator.autocast():
                row = discriminator.update([])
            done = discriminator.updates
            accuracy = self._accuracy()
            if accuracy is not None:
                row["held_out_accuracy"] = accuracy
            progress.update()
            if trainer.metrics_file is not None and trainer.is_world_process_zero():
                named = {f"discriminator/{name}": value for name, value in row.items()}
                trainer.metrics_file.append({"phase": "warmup", "update": done, **named, **leaks})
                leaks = {}
            last = done == total or trainer.stop.received()
            if last or done % SAVED_UPDATES == 0:
                self.save()
        progress.close()
        self.model = None
        trainer.state.num_input_tokens_seen = tokens_seen
        trainer._metrics["train"].clear()  # the warm-up's rollouts are not a training step's
        set_seed(config.seed + 1, device_specific=True)

    def _accuracy(self) -> float | None:
        """The held-out accuracy, after every `monitor_every`-th update."""
        discriminator = self.trainer.discriminator
        if not discriminator.held_out or discriminator.updates == 0:
            return None
        if discriminator.updates % self.config.monitor_every:
            return None
        return broadcast_object(discriminator.held_out_accuracy())  # all processes go by one number

    def log_probs(self, batch: Batch) -> torch.Tensor | None:
        """log pi of the model that drew the pool; None where that is the policy, or the warm-up is over."""
        return None if self.model is None else completion_log_probs(self.model, batch)[0]

    # State

    @property
    def folder(self) -> Path:
        """Where the pool and the discriminator's state are kept."""
        return Path(str(self.trainer.args.output_dir)) / "warmup"

    def save(self) -> None:
        """Write the discriminator's state."""
        state = self.trainer.discriminator.state_dict()
        if self.trainer.is_world_process_zero():
            save_state(self.folder / DISCRIMINATOR_FILE, state)

    def load(self) -> int:
        """Continue a warm-up that was interrupted; returns the updates done, 0 if there is nothing to continue."""
        path = self.folder / DISCRIMINATOR_FILE
        if path.is_file():
            self.trainer.discriminator.load(path)
        return self.trainer.discriminator.updates

    # The pool

    def _rows(self) -> list[dict[str, Any]]:
        """The demonstrations whose prompts the warm-up's rollouts answer, each `warmup_rollouts` times."""
        rows = self.trainer.demonstration_rows
        count = min(self.config.warmup_prompts, len(rows))
        chosen = random.Random(self.config.seed).sample(rows, count)
        held_out = self.trainer.discriminator.held_out
        if all(row["demonstration"] in held_out for row in chosen):  # of a few; there would be nothing to learn from
            chosen[0] = next(row for row in rows if row["demonstration"] not in held_out)
        repeated = [row for row in chosen for _ in range(self.config.warmup_rollouts)]
        return filled(repeated, self._batch_size)

    @property
    def _batch_size(self) -> int:
        size = self.config.generation_batch_size
        assert size is not None
        return size

    def _draw(self, rows: list[dict[str, Any]]) -> list[Rollout]:
        """A rollout of each row's prompt, by the engine that the run uses, or by `warmup_model`.

        Drawn in chunks of one generation batch, each with a seed of its own and saved when it is done.
        """
        trainer, size = self.trainer, self._batch_size
        path = self.folder / "rollouts.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        pool = [Rollout(row["demonstration"], row["ids"], row["verified"]) for row in read_jsonl(path)]
        local = size // trainer.accelerator.num_processes
        starts = range(len(pool), len(rows), size)
        for start in tqdm(starts, desc="warm-up rollouts", disable=trainer.quiet, leave=False):
            if trainer.stop.received():
                break
            set_seed(self.config.seed + 1000 + start, device_specific=True)
            begin = start + trainer.accelerator.process_index * local
            draw: Callable[[list[dict[str, Any]]], list[Rollout]]
            draw = trainer.collect if self.model is None else self._by_the_other
            pool += gather_object(draw(rows[begin : begin + local]))
            if trainer.is_world_process_zero():
                write_jsonl(path, [dict(rollout._asdict()) for rollout in pool])
        return pool

    def _by_the_other(self, rows: list[dict[str, Any]]) -> list[Rollout]:
        trainer, config = self.trainer, self.config
        assert self.model is not None
        limit = config.max_completion_length
        assert limit is not None
        prompts = [row["prompt"] for row in rows]
        drawn = generate(
            self.model,
            trainer.tokenizer,
            prompts,
            max_new_tokens=limit,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        texts = trainer.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        correct = trainer.verify(texts, [row["answer"] for row in rows])
        return trainer.as_rollouts([row["demonstration"] for row in rows], drawn, correct)

    def _load_model(self) -> PreTrainedModel | None:
        name = self.config.warmup_model
        if name is None or not self.config.discriminator_warmup_updates:
            return None
        with zero3_disabled():
            return load_causal_lm(name, self.trainer.policy.dtype, self.trainer.accelerator.device)

    def _leaks(self, pool: list[Rollout]) -> dict[str, Any]:
        """Can surface features alone tell the experts from the pool? Warns if so.

        Returns:
            `surface/auroc`, and the features most responsible.
        """
        discriminator = self.trainer.discriminator
        tokenizer = discriminator.model.tokenizer
        used = sorted({rollout.demonstration for rollout in pool})
        experts = [TraceText(str(index), discriminator.experts[index].text, True) for index in used]
        texts = tokenizer.batch_decode([rollout.ids for rollout in pool], skip_special_tokens=True)
        probe = surface_probe(
            experts,
            [
                TraceText(str(rollout.demonstration), text, rollout.ids[-1:] == [tokenizer.eos_token_id])
                for rollout, text in zip(pool, texts, strict=True)
            ],
        )
        warning = leak_warning(probe)
        if warning is not None:
            warn(warning)
        return {"surface/auroc": probe.auroc, "surface/features": [feature.name for feature in probe.features]}


def filled(rows: list[Any], size: int) -> list[Any]:
    """Rows, the first of them again until their number is a multiple of `size`: processes need equal shares."""
    return rows + list(islice(cycle(rows), -len(rows) % size))
