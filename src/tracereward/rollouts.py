"""Rollouts by transformers that keep one shape for a whole run, so that their decoding step is compiled once.

A small model's decoding on a GPU is bound by the launches of its kernels. transformers records the step of a static
cache as CUDA graphs where it may compile, and records again for every other shape; TRL forbids the compiling and pads
prompts to the longest of each batch. With vLLM none of this is used.
"""

from typing import Any

from trl import GRPOConfig, GRPOTrainer

from tracereward.checkpoints import SafeTrainer
from tracereward.demonstrations import encode_prompt


class RolloutTrainer(SafeTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` with whole checkpoints and, with `compile_rollouts`, compiled decoding.

    Attributes:
        prompt_width: to which all prompts are padded when rollouts are drawn: the longest of the run; None leaves it to
            TRL.
    """

    prompt_width: int | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        assert isinstance(config, GRPOConfig)
        if not getattr(config, "compile_rollouts", False):
            return
        prompts = self.train_dataset["prompt"]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        self.prompt_width = max(len(encode_prompt(self._tokenizer, prompt)) for prompt in set(prompts))
        assert self.max_completion_length is not None
        self.generation_config.disable_compile = False
        self.generation_config.max_cache_len = self.prompt_width + self.max_completion_length

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        padded = self.pad_to_multiple_of
        if self.prompt_width is not None:
            self.pad_to_multiple_of = self.prompt_width
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.pad_to_multiple_of = padded
