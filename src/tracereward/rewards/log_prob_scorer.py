"""Baseline scorer: the policy's own log-prob instead of a reward."""

import math

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.modeling.batching import scoring_budget
from tracereward.modeling.log_probs import log_probs
from tracereward.modeling.tokenization import pad_id
from tracereward.rewards.records import ForwardOptions, TokenIds
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings


class LogProbs(Scorer):
    """Scores each token with the policy's own log-prob.

    Args:
        policy: a causal LM.
        tokenizer: its tokenizer.
        settings: settings of the reward model that it replaces, for steps and aggregate.
    """

    def __init__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RewardSettings):
        self.policy, self.tokenizer, self.settings = policy, tokenizer, settings

    @property
    def max_positions(self) -> float:
        """Infinity: the reward model that it replaces sets the limit."""
        return math.inf

    @property
    def token_budget(self) -> int:
        """See `Scorer`."""
        return scoring_budget(self.policy.device)

    def compute_rewards(self, prompts: TokenIds, completions: TokenIds, options: ForwardOptions) -> list[Tensor]:
        """Log-probs in nats, neither clipped nor backfilled; takes no further models."""
        assert not options.extra.signed
        pad = pad_id(self.tokenizer)
        return log_probs(self.policy, prompts, completions, pad, token_budget=options.token_budget)
