"""Features of traces under a frozen causal LM: each layer's mean hidden state over the completion, cached on disk.

A layer's states are passed through the model's final norm, so that a linear map on them is the head of the same model
cut off after that layer: see `truncated`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracereward.files import atomic_file
from tracereward.modeling.batching import grouped_batches, pack, scoring_budget
from tracereward.modeling.log_probs import can_share_prompts, states_and_log_probs

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
"""Names of the norm after the last layer in the models of transformers."""
SHARD = 64  # traces in a file of the cache: what an interruption can lose


@dataclass(frozen=True, kw_only=True)
class TraceStates:
    """Features of N traces under a frozen model with L layers and hidden size H.

    Attributes:
        states: (N, L, H) bfloat16; at index l - 1 the normalised states after layer l, averaged over the completion.
        log_probs: (N,) float32, mean log-prob of the completion's tokens.
    """

    states: Tensor
    log_probs: Tensor


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last layer; None if the model names it in none of the usual ways."""
    base = model.base_model
    return next((getattr(base, name) for name in NORMS if isinstance(getattr(base, name, None), nn.Module)), None)


def layer_stack(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list of the model's layers; None if it is not unique."""
    count = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    return found[0] if len(found) == 1 else None


def readable_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers, counted from 1, whose states a head can read: all, or only the last if `truncated` cannot cut."""
    last = model.config.get_text_config().num_hidden_layers
    if final_norm(model) is None or layer_stack(model) is None:
        return (last,)
    return tuple(range(1, last + 1))


def truncated(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model without its layers after the first `layers`, changed in place; its final norm stays."""
    config = model.config.get_text_config()
    if layers == config.num_hidden_layers:
        return model
    stack = layer_stack(model)
    assert stack is not None
    del stack[layers:]
    config.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):  # one entry a layer
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
    return model


@torch.inference_mode()
def trace_states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    shares: Sequence[Tensor] | None = None,
    token_budget: int | None = None,
) -> Iterator[tuple[list[int], TraceStates]]:
    """Features of traces, in batches of similar length: the indices of a batch's traces, and their features.

    Args:
        model: the frozen causal LM.
        prompts: token ids.
        completions: token ids.
        pad_id: any token id.
        shares: of each completion's tokens in the average; equal ones if None.
        token_budget: padded tokens of a pass.
    """
    shares = shares or [torch.full((len(ids),), 1 / max(1, len(ids))) for ids in completions]
    for rows, means, log_probs in _mean_states(
        model, prompts, completions, pad_id, shares=[s[None] for s in shares], token_budget=token_budget
    ):
        of_rows = [values.mean() for values in log_probs]
        yield rows, TraceStates(states=torch.cat(means), log_probs=torch.stack(of_rows))


@torch.inference_mode()
def step_states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    steps: Sequence[Sequence[tuple[int, int]]],
    token_budget: int | None = None,
) -> Iterator[tuple[int, TraceStates]]:
    """Features of the steps of traces, from one pass: the index of a trace, and the features of its steps, in order.

    A step's are those that `trace_states` gives it as a completion of the prompt and all before it.

    Args:
        model: the frozen causal LM.
        prompts: token ids.
        completions: token ids.
        pad_id: any token id.
        steps: of each completion, the first token of each step and the one after its last.
        token_budget: padded tokens of a pass.
    """
    shares = []
    for ids, spans in zip(completions, steps, strict=True):
        share = torch.zeros(len(spans), len(ids))
        for row, (start, end) in zip(share, spans, strict=True):
            row[start:end] = 1 / (end - start)
        shares.append(share)
    for rows, means, log_probs in _mean_states(
        model, prompts, completions, pad_id, shares=shares, token_budget=token_budget
    ):
        for index, states, values in zip(rows, means, log_probs, strict=True):
            yield index, TraceStates(states=states, log_probs=shares[index] @ values)


def _mean_states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    shares: Sequence[Tensor],
    token_budget: int | None,
) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
    """In batches: indices of traces, for each (R, L, H) bfloat16 means by its (R, T) shares, and (T,) log-probs."""
    model.eval()
    norm, layers = final_norm(model), readable_layers(model)
    budget = token_budget or scoring_budget(model.device)
    for rows, sizes in grouped_batches(prompts, completions, budget, can_share_prompts(model)):
        batch = pack([prompts[i] for i in rows], [completions[i] for i in rows], pad_id).to(model.device)
        states, log_probs = states_and_log_probs(model, batch, sizes if len(sizes) < len(rows) else None)
        width, most = batch.completion_mask.size(1), max(len(shares[i]) for i in rows)
        share = torch.zeros(len(rows), most, width)
        for row, i in enumerate(rows):
            share[row, : len(shares[i]), : len(completions[i])] = shares[i]
        share = share.to(model.device)
        means: list[Tensor] = []
        for layer in layers:
            here = states[layer]
            if layer < len(states) - 1:  # the last is normalised already
                assert norm is not None
                here = norm(here)
            means.append(share @ here.float())  # padding has weight 0, and finite states
        found = torch.stack(means, 2).bfloat16().cpu()
        values = log_probs.float().cpu()
        yield (
            rows,
            [found[row, : len(shares[i])] for row, i in enumerate(rows)],
            [values[row, : len(completions[i])] for row, i in enumerate(rows)],
        )


class StateCache:
    """`TraceStates` on disk, found by content: model, token ids and weighting. A damaged file is computed again.

    Args:
        folder: created when something is written.
        model: fingerprint of the model, with the dtype in which it computes.
        weighting: name of the shares of the tokens.
    """

    def __init__(self, folder: Path, model: str, weighting: str):
        self.folder = folder
        self.prefix = f"{model} {weighting}"
        self.known: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(SafetensorError, OSError, ValueError, KeyError), safe_open(str(path), "pt") as file:
                for row, key in enumerate(json.loads(file.metadata()["keys"])):
                    self.known[key] = path, row

    def key(self, prompt: Sequence[int], completion: Sequence[int]) -> str:
        """Digest of all that a trace's features depend on."""
        return hashlib.sha256(f"{self.prefix} {list(prompt)} {list(completion)}".encode()).hexdigest()

    def read(self, keys: Sequence[str]) -> TraceStates:
        """The features of traces that are all there, in the order of `keys`."""
        places: dict[Path, list[tuple[int, int]]] = {}
        for index, key in enumerate(keys):
            path, row = self.known[key]
            places.setdefault(path, []).append((index, row))
        states: list[Any] = [None] * len(keys)
        log_probs: list[Any] = [None] * len(keys)
        for path, rows in places.items():
            with safe_open(str(path), "pt") as file:
                of_file, values = file.get_tensor("states"), file.get_tensor("log_probs")
            for index, row in rows:
                states[index], log_probs[index] = of_file[row], values[row]
        return TraceStates(states=torch.stack(states), log_probs=torch.stack(log_probs))

    def write(self, keys: Sequence[str], found: TraceStates) -> None:
        """Add a file with the features of some traces, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.safetensors"
        tensors = {"states": found.states.contiguous(), "log_probs": found.log_probs.contiguous()}
        with atomic_file(path) as target:
            save_file(tensors, target, metadata={"keys": json.dumps(list(keys))})
        self.known |= {key: (path, row) for row, key in enumerate(keys)}
