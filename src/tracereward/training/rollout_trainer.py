"""How the policy samples rollouts and trains on them.

It trains on micro-batches sorted by length, see `micro_batches`. With `compile_rollouts`, transformers samples with one
tensor shape for the run, so that the decoding step is compiled once.

A small model's decoding on a GPU is limited by kernel launches. With compilation, transformers captures the decoding
step with a static cache as CUDA graphs, once per shape; TRL disables compilation and pads prompts to the longest of
each batch. None of this applies to vLLM.

Under bfloat16 autocast, rotary attention yields float32 keys and bfloat16 values, which a static cache does not
support, and each step casts all weights again. With compilation, and on a CPU, rollouts are then sampled by a bfloat16
copy of the policy, which is updated before each batch, as vLLM's is.

The policy's ``generation_config.json`` has no part in it, see `generation.settings`: TRL leaves some fields to it.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from tracereward.errors import InputError, RunFailed
from tracereward.files import atomic_write_json
from tracereward.generation.settings import only
from tracereward.modeling.distributed import all_reduce_max
from tracereward.modeling.tokenization import encode_prompt
from tracereward.training.checkpoints import SafeTrainer
from tracereward.training.micro_batches import by_length, may_change_places, may_shift, window


class RolloutTrainer(SafeTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` with complete checkpoints, micro-batches by length and optionally compiled decoding.

    Attributes:
        prompt_width: width to which prompts are padded while sampling: the longest prompt of the run; None: TRL's.
        half: bfloat16 copy of the policy that samples; None if the policy itself does.
    """

    pad_to_multiple_of: int | None  # TRL's
    model_wrapped: Any  # transformers'
    prompt_width: int | None = None
    half: nn.Module | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        assert isinstance(config, GRPOConfig)
        if getattr(config, "compile_rollouts", False):
            self._compile()
        on_cpu = self.accelerator.device.type == "cpu" and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        assert self.model is not None
        casts = config.bf16 and any(weight.dtype == torch.float32 for weight in self.model.parameters())
        if casts and not config.use_vllm and (on_cpu or self.prompt_width is not None):
            self.half = copy.deepcopy(self.model).requires_grad_(False).eval()
            nn.Module.to(self.half, torch.bfloat16)
            for module in self.half.modules():  # otherwise TRL's fused forward of the copy would call the policy's
                module.__dict__.pop("forward", None)

    def _compile(self) -> None:
        """Prepare sampling with one tensor shape; see the module's docstring."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("compile_rollouts needs an unsharded policy on each GPU: remove it, or use vLLM")
        prompts = self.train_dataset["prompt"]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        self.prompt_width = max(len(encode_prompt(self._tokenizer, prompt)) for prompt in set(prompts))
        assert self.max_completion_length is not None
        self.generation_config.disable_compile = False
        self.generation_config.max_cache_len = self.prompt_width + self.max_completion_length

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """As `encode_prompt`: TRL would keep an end-of-sequence token that a tokenizer adds behind every text."""
        return [encode_prompt(self._tokenizer, prompt) for prompt in prompts], None, {}

    def _prepare_inputs(self, inputs: Any) -> Any:
        before = self._buffered_inputs
        prepared = super()._prepare_inputs(inputs)
        if self._buffered_inputs is None or self._buffered_inputs is before:
            return prepared
        config = self.args
        assert isinstance(config, GRPOConfig)
        assert config.steps_per_generation is not None
        size = 1
        if may_change_places(self):
            size = window(config.gradient_accumulation_steps, config.steps_per_generation)
        assert self.model is not None
        shift = may_shift(self.accelerator.unwrap_model(self.model).config)
        self._buffered_inputs = by_length(self._buffered_inputs, size, shift, self.pad_to_multiple_of)
        return self._buffered_inputs[self._step % config.steps_per_generation]

    def check_rewards(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        rewards: Sequence[Sequence[float]],
    ) -> None:
        """Stop the run at a reward that is not finite: TRL would make it 0, the best of a group of negative rewards.

        A collective call.

        Args:
            prompts: of this process's traces.
            completions: their texts.
            completion_ids: their tokens.
            rewards: the numbers of each trace that must be finite.

        Raises:
            RunFailed: on every process; names the step and the first such trace, which is also written to
                ``not_finite.json`` next to the checkpoints.
        """
        bad = [row for row, values in enumerate(rewards) if not all(map(math.isfinite, values))]
        if not all_reduce_max(len(bad)):
            return
        step, path = self.state.global_step + 1, Path(str(self.args.output_dir)) / "not_finite.json"
        found = gather_object(
            [
                {
                    "step": step,
                    "prompt": prompts[row],
                    "completion": completions[row],
                    "completion_ids": list(completion_ids[row]),
                    "rewards": [repr(value) for value in rewards[row]],
                }
                for row in bad[:1]
            ]
        )
        if self.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, found[0])
        text = "; ".join(f"{name} {found[0][name][:200]!r}" for name in ("prompt", "completion"))
        raise RunFailed(f"a reward is not finite at step {step}: {text} (the trace is in {path})")

    def _calculate_rewards(
        self, inputs: Any, prompts: list[str], completions: list[str], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        start = self.accelerator.process_index * len(prompts)
        counting = (self.reward_weights != 0).to(rewards.device)  # correctness may be unknown: it only monitors
        own = rewards[start : start + len(prompts)][:, counting]
        self.check_rewards(prompts, completions, completion_ids_list, own.tolist())
        return rewards

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        padded, wrapped = self.pad_to_multiple_of, self.model_wrapped
        if self.prompt_width is not None:
            self.pad_to_multiple_of = self.prompt_width
        if self.half is not None:
            self._refresh(self.half)
            self.model_wrapped = self.half
        alone = contextlib.nullcontext()
        if (
            not self.use_vllm
        ):  # vLLM gets complete sampling parameters from TRL, and of the model's file only end tokens
            alone = only(self.accelerator.unwrap_model(self.model_wrapped), self.generation_config)
        try:
            with alone:
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.pad_to_multiple_of, self.model_wrapped = padded, wrapped

    @torch.no_grad()
    def _refresh(self, half: nn.Module) -> None:
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        for mine, its in zip(half.parameters(), policy.parameters(), strict=True):
            mine.copy_(its)
