"""Between the policy's tokens and the reward model's, which may come from another family.

With one tokenizer ids pass straight through: nothing is decoded and tokenised again. With two, rollouts go through
their text, and rewards come back by character offsets.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tracereward.modeling.alignment import project, token_offsets
from tracereward.modeling.tokenization import encode_completion, encode_prompt, same_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.shaping import backfill


class TokenBridge:
    """Translates rollouts of a policy into tokens of a reward model, and its rewards back.

    Args:
        tokenizer: the policy's.
        model: the reward model.
        ends: the policy's end-of-sequence ids.
        prompts: the reward model's rendering of each prompt that the policy renders otherwise (chat templates).
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
        """Whether a rollout ended by itself."""
        return bool(ids) and ids[-1] in self.ends

    def completion(self, ids: Sequence[int]) -> list[int]:
        """A rollout's token ids for the reward model, with its end-of-sequence token where the rollout has one."""
        if self.same:
            return list(ids)
        text, _ = token_offsets(self.tokenizer, ids)
        encoded = encode_completion(self.model.tokenizer, text, self.finished(ids))
        return encoded or encode_completion(self.model.tokenizer, text)  # never empty

    def rewards(self, ids: Sequence[int], reward_ids: Sequence[int], rewards: Tensor) -> Tensor:
        """Rewards of the reward model's tokens on the policy's: projected where supervised, and backfilled.

        Args:
            ids: the rollout's T tokens.
            reward_ids: `completion` of it, S tokens.
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
        beta = self.model.settings.beta_clip  # the sum of two may leave the interval
        clipped = torch.tensor([values]).clamp(-beta, beta)
        return backfill(clipped, torch.tensor([supervised]))[0]
