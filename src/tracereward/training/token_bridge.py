"""Conversion between the tokens of the policy and of the reward model, whose tokenizers may differ.

With a shared tokenizer ids pass through, except that a policy with several end-of-sequence tokens has one here.
Otherwise rollouts are re-tokenised from their text, and rewards are projected back by character offsets.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tracereward.modeling.alignment import project, token_offsets
from tracereward.modeling.tokenization import encode_completion, encode_prompt, same_tokenizer, with_own_end
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.shaping import backfill


class TokenBridge:
    """Converts a policy's rollouts to the reward model's tokens, and token rewards back to the policy's.

    Args:
        tokenizer: the policy's.
        model: the reward model.
        ends: the policy's end-of-sequence ids.
        prompts: maps prompts as rendered for the policy to prompts for the reward model, where chat templates differ.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: TokenRewardModel,
        ends: Sequence[int],
        prompts: Mapping[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.model = model
        self.ends: frozenset[int] = frozenset(ends)
        self.prompts: Mapping[str, str] = prompts or {}
        self.same: bool = same_tokenizer(tokenizer, model.tokenizer)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, for the reward model."""
        return encode_prompt(self.model.tokenizer, self.prompts.get(text, text))

    def finished(self, ids: Sequence[int]) -> bool:
        """Whether a rollout ends with the end-of-sequence token."""
        return bool(ids) and ids[-1] in self.ends

    def completion(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a rollout for the reward model, with its end-of-sequence token if the rollout has any."""
        if self.same:
            return with_own_end(self.tokenizer, ids, self.ends)
        text, _ = token_offsets(self.tokenizer, ids)
        encoded = encode_completion(self.model.tokenizer, text, self.finished(ids))
        return encoded or encode_completion(self.model.tokenizer, text)  # never empty

    def rewards(self, ids: Sequence[int], reward_ids: Sequence[int], rewards: Tensor) -> Tensor:
        """Project rewards from the reward model's tokens to the policy's: of supervised tokens, then backfilled.

        Args:
            ids: the rollout's T tokens.
            reward_ids: its `completion`, S tokens.
            rewards: (S,) clipped and backfilled.

        Returns:
            (T,).
        """
        if self.same:
            return rewards
        scores = self.model.to_scores(reward_ids, rewards)
        _, offsets = token_offsets(self.tokenizer, ids)
        values, supervised = project(
            scores.rewards, scores.supervised, scores.offsets, offsets, ended=self.finished(ids)
        )
        beta = self.model.settings.beta_clip  # sums may exceed it
        clipped = torch.tensor([values]).clamp(-beta, beta)
        return backfill(clipped, torch.tensor([supervised]))[0]
