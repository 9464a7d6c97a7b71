"""Heads of the discriminator: they map the backbone's output to one number f_t per completion token.

- ``token``: f_t = w . h_t on the hidden state after y_t; the logit is f_t (arXiv 2510.01857). A token classifier. Of
  several layers f_t = sum over l of w_l . h_lt, h_lt the state after layer l and the backbone's final norm: a token
  classifier with a label a layer.
- ``action``: f_t = a log p_phi(y_t) + b + w . h_t, initially a = 1, b = w = 0; the logit is f_t. A language model.
- ``airl``: f_t = w . h_t; the logit is f_t - log pi(y_t). A token classifier.
- ``implicit``: f_t = log p_phi(y_t); the logit is f_t - log pi(y_t). A language model.

pi is the policy that writes the discriminator's rollouts. If the logit is f - log pi, the reward that explains the
experts is f (Fu et al. 2018), which need not change as pi changes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracereward.modeling.hidden_states import final_norm, layer_stack


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
    """f_t = bias + sum over l of weight_l . h_lt on normalised states of L layers, counted from 1; weight (L, H)."""

    layers: tuple[int, ...]
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
def exact_classifier(backbone: PreTrainedModel, dtype: torch.dtype, layers: Sequence[int] = ()) -> Iterator[None]:
    """Let a token classifier's head multiply in the `dtype` of its weights also under autocast, as scoring does.

    Autocast would round the rewards of training to the 8 bits of bfloat16.

    Args:
        backbone: the token classifier; its layers may have adapters.
        dtype: of the head's weights.
        layers: that its labels read, in their order, the last of them the backbone's last; the only logit of a pass is
            then the sum of theirs. Without gradients a layer's states are not kept any longer than its successor needs
            them; with gradients autograd keeps them anyway.
    """
    names = ("score", "classifier")  # the first found is the outer one: PEFT wraps the head
    head = next(module for name, module in backbone.named_modules() if name.rpartition(".")[2] in names)
    project, patched = head.forward, vars(head).get("forward")
    norm, stack = final_norm(backbone), layer_stack(backbone)
    inner: dict[int, Tensor] = {}  # of labels: logits, or with gradients states

    def exact(states: Tensor, label: int = -1) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return project(states.to(dtype))[..., label, None]

    def added_up(states: Tensor) -> Tensor:
        total = exact(states)
        for label in range(len(layers) - 1):
            assert norm is not None
            part = inner.pop(label)
            # In a hook the norm would be part of what gradient checkpointing computes again, where there is no hook.
            total = total + (exact(norm(part), label) if torch.is_grad_enabled() else part)
        return total

    with contextlib.ExitStack() as hooks:
        if layers:
            assert stack is not None

            def keep(label: int, output: Any) -> None:
                assert norm is not None
                states = output[0] if isinstance(output, tuple) else output
                inner[label] = states if torch.is_grad_enabled() else exact(norm(states), label)

            for label, layer in enumerate(layers[:-1]):
                hook = stack[layer - 1].register_forward_hook(lambda _, __, output, label=label: keep(label, output))
                hooks.callback(hook.remove)
        head.forward = added_up
        try:
            yield
        finally:
            if patched is None:
                del head.forward
            else:
                head.forward = patched
