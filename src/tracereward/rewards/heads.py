"""Heads of the discriminator: they map the backbone's output to one number f_t per completion token.

- ``token``: f_t = w . h_t on the hidden state after y_t; the logit is f_t (arXiv 2510.01857). A token classifier.
- ``action``: f_t = a log p_phi(y_t) + b + w . h_t, initially a = 1, b = w = 0; the logit is f_t. A language model.
- ``airl``: f_t = w . h_t; the logit is f_t - log pi(y_t). A token classifier.
- ``implicit``: f_t = log p_phi(y_t); the logit is f_t - log pi(y_t). A language model.

pi is the policy that writes the discriminator's rollouts. If the logit is f - log pi, the reward that explains the
experts is f (Fu et al. 2018), which need not change as pi changes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def reads_log_probs(head: str) -> bool:
    """Whether f is computed from a causal LM's log-probs rather than by a token classifier."""
    return head in ("action", "implicit")


def subtracts_policy(head: str) -> bool:
    """Whether the discriminator's logit is f - log pi rather than f."""
    return head in ("airl", "implicit")


def default_reward_form(head: str) -> str:
    """``f`` if the logit is f - log pi, else ``logit``."""
    return "f" if subtracts_policy(head) else "logit"


class LinearHead(NamedTuple):
    """f_t = weight . h_t + bias on the normalised hidden states h_t of one layer, counted from 1; weight (H,)."""

    layer: int
    weight: Any
    bias: float


class ActionHead(nn.Module):
    """a, b and w of the ``action`` head, initialised so that f_t is the backbone's log-prob."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.a: nn.Parameter = nn.Parameter(torch.ones(()))
        self.b: nn.Parameter = nn.Parameter(torch.zeros(()))
        self.w: nn.Parameter = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, log_probs: Tensor, hidden: Tensor) -> Tensor:
        """(B, T) log-probs and (B, T, H) hidden states after each token -> (B, T) values f_t."""
        with torch.autocast(hidden.device.type, enabled=False):  # as in scoring, in float32
            return self.a * log_probs + self.b + hidden.float() @ self.w


@contextlib.contextmanager
def classifier_outside_autocast(backbone: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a token classifier's head multiply in the `dtype` of its weights also under autocast, as scoring does.

    Autocast would round the rewards of training to the 8 bits of bfloat16.
    """
    names = ("score", "classifier")  # the first found is the outer one: PEFT wraps the head
    head = next(module for name, module in backbone.named_modules() if name.rpartition(".")[2] in names)
    project, patched = head.forward, vars(head).get("forward")

    def exact(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return project(states.to(dtype))

    head.forward = exact
    try:
        yield
    finally:
        if patched is None:
            del head.forward
        else:
            head.forward = patched
