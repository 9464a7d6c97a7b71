"""Heads of the discriminator: how a backbone's output becomes one number f_t for each completion token.

- ``token``: f_t = w . h_t on the hidden state after y_t; the logit is f_t (arXiv 2510.01857). A token classifier.
- ``action``: f_t = a log p_phi(y_t) + b + w . h_t, at the start a = 1, b = w = 0; the logit is f_t. A language model.
- ``airl``: f_t = w . h_t; the logit is f_t - log pi(y_t). A token classifier.
- ``implicit``: f_t = log p_phi(y_t); the logit is f_t - log pi(y_t). A language model.

pi is the policy whose rollouts the discriminator sees. Where the logit is f - log pi, the reward that explains the
experts is f itself (Fu et al. 2018): with pi moving, f can stay.
"""

import torch
from torch import Tensor, nn


def reads_log_probs(head: str) -> bool:
    """Whether f comes from a language model's log-probs; otherwise from a token classifier."""
    return head in ("action", "implicit")


def subtracts_policy(head: str) -> bool:
    """Whether the discriminator's logit is f - log pi; otherwise it is f."""
    return head in ("airl", "implicit")


def default_reward_form(head: str) -> str:
    """``f`` where the logit is f - log pi, else ``logit``."""
    return "f" if subtracts_policy(head) else "logit"


class ActionHead(nn.Module):
    """a, b and w of the ``action`` head; starts as the backbone's own log-prob."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.a: nn.Parameter = nn.Parameter(torch.ones(()))
        self.b: nn.Parameter = nn.Parameter(torch.zeros(()))
        self.w: nn.Parameter = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, log_probs: Tensor, hidden: Tensor) -> Tensor:
        """(B, T) log-probs and (B, T, H) hidden states after each token -> (B, T) values f_t."""
        return self.a * log_probs + self.b + hidden.float() @ self.w
