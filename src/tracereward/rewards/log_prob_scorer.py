"""A policy's own log-prob in the place of a reward: the control that needs no reward model."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.modeling.batching import scoring_budget
from tracereward.modeling.log_probs import log_probs
from tracereward.modeling.tokenization import pad_id
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings


class LogProbs(Scorer):
    """A policy's own log-prob of each token in the place of a reward.

    Args:
        policy: a causal LM.
        tokenizer: its tokenizer.
        settings: of the reward model that it stands in for; steps and aggregate are as there.
    """

    def __init__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RewardSettings):
        self.policy, self.tokenizer, self.settings = policy, tokenizer, settings

    @property
    def max_positions(self) -> float:
        """The reward model that it stands in for sets the limit."""
        return math.inf

    @property
    def token_budget(self) -> int:
        """See `Scorer`."""
        return scoring_budget(self.policy.device)

    def token_rewards(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        token_budget: int | None = None,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
        spread: bool = False,
    ) -> list[Tensor]:
        """Log-probs in nats, neither clipped nor backfilled; there is nothing to add to them or take off."""
        assert reference is None
        assert policy is None
        return log_probs(self.policy, prompts, completions, pad_id(self.tokenizer), token_budget)
