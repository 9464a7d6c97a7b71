"""Scoring with vLLM's pooling runner; rewards are the same as with transformers.

vLLM runs token classifiers only; `tracereward export` distils a reward model with another head into one.
"""

import importlib.util

import torch
from torch import Tensor

from tracereward.errors import InputError
from tracereward.modeling.loading import context_length, local_folder, read_config
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.records import ForwardOptions, TokenIds
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings, check_reward_model
from tracereward.rewards.shaping import token_rewards

TOKEN_BUDGET = 65_536  # tokens per call; vLLM splits them into passes by its own budget


def check_vllm(model_name_or_path: str) -> RewardSettings:
    """Settings of a reward model, checked to run on vLLM; loads no weights.

    Raises:
        InputError: vLLM is not installed, or the reward model is not a token classifier of one layer.
    """
    settings = check_reward_model(model_name_or_path)
    if settings.head != "token" or not settings.is_classifier:
        what = f"reads {len(settings.layers)} layers" if settings.layers else f"has head {settings.head}"
        raise InputError(
            f"{model_name_or_path}: the vLLM engine runs token classifiers of one layer only, and this reward model "
            f"{what}: distil it first with `tracereward export MODEL --data ROWS -o FOLDER`"
        )
    if importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm needs vLLM: pip install 'tracereward[vllm]'")
    return settings


class VllmScorer(Scorer):
    """A reward model with head ``token``, run by vLLM.

    Args:
        model_name_or_path: folder or Hub id of the reward model.
        dtype: dtype for vLLM; the checkpoint's if None. (vLLM's "auto" would cast float32 to 16 bits.)

    Raises:
        InputError: see `check_vllm`.
    """

    def __init__(self, model_name_or_path: str, dtype: str | None = None):
        self.settings = check_vllm(model_name_or_path)
        from vllm import LLM  # pyright: ignore[reportMissingImports]
        from vllm.pooling_params import PoolingParams  # pyright: ignore[reportMissingImports]

        folder = local_folder(model_name_or_path)
        config = read_config(folder)
        stored = getattr(config, "dtype", None) or torch.float32
        self.tokenizer = load_tokenizer(str(folder))
        self._positions = context_length(config)
        self._params = PoolingParams(use_activation=False)  # the default is a sigmoid
        self._llm = LLM(
            str(folder),
            runner="pooling",
            dtype=dtype or str(stored).removeprefix("torch."),
            enable_prefix_caching=False,  # a cached prefix has no outputs
            disable_log_stats=True,
        )

    @property
    def max_positions(self) -> float:
        """See `Scorer`."""
        return self._positions

    @property
    def token_budget(self) -> int:
        """Tokens per call of vLLM."""
        return TOKEN_BUDGET

    def compute_rewards(self, prompts: TokenIds, completions: TokenIds, options: ForwardOptions) -> list[Tensor]:
        """See `Scorer.compute_rewards`; log-probs of other models are not supported."""
        if options.extra.signed:
            raise InputError("the vLLM engine computes no log-probs: remove --reference and --policy")
        inputs = [{"prompt_token_ids": [*p, *c]} for p, c in zip(prompts, completions, strict=True)]
        outputs = self._llm.encode(inputs, pooling_params=self._params, pooling_task="token_classify", use_tqdm=False)
        rewards = []
        for completion, output in zip(completions, outputs, strict=True):
            values = output.outputs.data[-len(completion) :, 0].float()[None]
            mask = self.supervision(self.batch([[]], [completion]))
            rewards.append(token_rewards(values, mask, self.settings.beta_clip, self.settings.temperature)[0])
        return rewards
