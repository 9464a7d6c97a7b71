"""Sampling with vLLM in this process: large batches, and a prompt's prefix is computed once for its completions."""

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tracereward.errors import InputError, RunFailed
from tracereward.generation.engine import Prompt
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import Sample
from tracereward.generation.settings import NOT_FINITE, vllm_settings
from tracereward.modeling.loading import end_ids, local_folder, read_config
from tracereward.modeling.tokenization import encode_prompt

COMPLETIONS = 2048
"""Completions per call of vLLM, which forms its batches itself; after each call the rows are written."""


def check_vllm(params: SamplingParams) -> None:
    """Check that vLLM is installed and can sample as asked.

    Raises:
        InputError: it is not, or cannot.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm needs vLLM: pip install 'tracereward[vllm]'")
    vllm_settings(params)


class VllmEngine:
    """See `engine.Engine`. Each prompt has its own random seed, so that its completions do not depend on the batch.

    Args:
        model: folder or Hub id of the policy.
        tokenizer: its tokenizer.
        positions: longest prompt with completion, in tokens: vLLM reserves memory for it.
        dtype: precision; None or ``auto`` is the checkpoint's.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, positions: int, dtype: str | None = None):
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        folder = local_folder(model)
        stored = getattr(read_config(folder), "dtype", None) or torch.float32
        assert isinstance(tokenizer.eos_token_id, int)
        self.tokenizer, self.ends = tokenizer, sorted({*end_ids(folder), tokenizer.eos_token_id})
        self.counts = [0, 0]
        self._llm = LLM(
            str(folder),
            dtype=str(stored).removeprefix("torch.") if dtype in (None, "auto") else dtype,
            max_model_len=positions,
            enable_prefix_caching=True,
            generation_config="vllm",  # nothing of the model's file
            logprobs_mode="raw_logprobs",  # at temperature 1, as `Sample.logprob` is
            disable_log_stats=True,
        )

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int = 1,
        done: Collection[int] = (),
        before: int | None = None,
    ) -> Iterator[list[Sample]]:
        """See `Engine`; the prompts are texts.

        Raises:
            RunFailed: the token probabilities are not finite.
        """
        first, size = before or 0, max(1, COMPLETIONS // n)
        todo = [index for index in range(first, first + len(prompts)) if index not in done]
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            inputs = [
                {"prompt_token_ids": encode_prompt(self.tokenizer, str(prompts[index - first]))} for index in part
            ]
            fields = [self.request(params, n, seed=params.seed_of(index)) for index in part]
            outputs = self._llm.generate(inputs, fields, use_tqdm=False)
            self.counts[0] += sum(len(one["prompt_token_ids"]) for one in inputs)
            yield [
                self.read(index, found) for index, output in zip(part, outputs, strict=True) for found in output.outputs
            ]

    def request(self, params: SamplingParams, n: int, *, seed: int) -> Any:
        """vLLM's ``SamplingParams`` of one prompt."""
        from vllm import SamplingParams as Request  # pyright: ignore[reportMissingImports]

        given = {} if not params.temperature else {"seed": seed}
        return Request(n=n, stop_token_ids=self.ends, logprobs=0, detokenize=False, **vllm_settings(params), **given)

    def read(self, prompt: int, found: Any) -> Sample:
        """A completion as vLLM returns it, with text as of the transformers engine."""
        ids = list(found.token_ids)
        total = float(found.cumulative_logprob)
        if total != total or not ids:
            raise RunFailed(NOT_FINITE)
        self.counts[1] += len(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Sample(prompt=prompt, ids=ids, text=text, finished=ids[-1] in self.ends, logprob=total / len(ids))

    def cost(self) -> str:
        """See `Engine`."""
        (read, written), self.counts = self.counts, [0, 0]
        return f"vLLM: {read} prompt tokens, {written} completion tokens"
