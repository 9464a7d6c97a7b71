"""A reward model by a read-out: states of all traces from the frozen model, then the head, then the model cut off."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import Interrupted
from tracereward.modeling.alignment import step_ends, token_offsets
from tracereward.modeling.hidden_states import StateCache, TraceStates, readable_layers, trace_states
from tracereward.modeling.loading import best_device, load_causal_lm, model_fingerprint
from tracereward.modeling.tokenization import pad_id
from tracereward.rewards import parts
from tracereward.rewards.heads import LinearHead
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.parts import thinking_tokens
from tracereward.rewards.settings import RewardSettings
from tracereward.training.readout import PENALTIES, Examples, Readout, fit_readout, layers_to_try

CHUNK = 256  # traces between two files of the cache: a few minutes of a small model on a CPU
CLIPPED = 64  # traces whose token logits set the clip


@dataclass(frozen=True, kw_only=True)
class LabelledTrace:
    """A trace to learn from.

    Attributes:
        prompt: token ids.
        completion: token ids.
        label: True for a positive.
        question: number of the question that it answers.
        weight: in the loss ``bce``.
    """

    prompt: list[int]
    completion: list[int]
    label: bool
    question: int
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ReadoutOptions:
    """How a read-out is fitted.

    Attributes:
        objective: ``pairwise`` or ``bce``.
        cache: folder of the features, which other runs may share.
        dtype: in which the frozen model computes.
        seed: of folds and sampled pairs.
    """

    objective: str
    cache: Path
    dtype: torch.dtype
    seed: int = 0


def cached_states(
    model: PreTrainedModel,
    traces: Sequence[LabelledTrace],
    cache: StateCache,
    pad: int,
    *,
    shares: Callable[[Sequence[int]], Tensor],
    stopped: Callable[[], bool] = lambda: False,
) -> TraceStates:
    """The features of traces, computed where the cache lacks them; each chunk is on the disk when it is complete.

    Args:
        model: the frozen causal LM.
        traces: in any order; those of one prompt next to each other are faster.
        cache: of this model and these shares.
        pad: any token id.
        shares: of a completion's tokens in the average.
        stopped: asked between chunks.

    Raises:
        Interrupted: the user stopped it; what was computed is kept.
    """
    keys = [cache.key(trace.prompt, trace.completion) for trace in traces]
    missing = list({key: index for index, key in enumerate(keys) if key not in cache.known}.values())
    with tqdm(total=len(traces), initial=len(traces) - len(missing), desc="traces read", unit="") as progress:
        for start in range(0, len(missing), CHUNK):
            if stopped():
                raise Interrupted(f"stopped after {progress.n} of {len(traces)} traces were read; they are kept")
            chunk = missing[start : start + CHUNK]
            prompts, completions = [traces[i].prompt for i in chunk], [traces[i].completion for i in chunk]
            rows: list[int] = []
            parts: list[TraceStates] = []
            of_chunk = [shares(completion) for completion in completions]
            for of_batch, found in trace_states(model, prompts, completions, pad, shares=of_chunk):
                rows += [chunk[i] for i in of_batch]
                parts.append(found)
                progress.update(len(of_batch))
            states = torch.cat([part.states for part in parts])
            log_probs = torch.cat([part.log_probs for part in parts])
            cache.write([keys[i] for i in rows], TraceStates(states=states, log_probs=log_probs))
    return cache.read(keys)


def token_shares(settings: RewardSettings, tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> Tensor:
    """(T,) share of each token of a completion in the trace's mean reward."""
    ends, inside = [False] * len(completion), 0
    if settings.granularity == "step" or settings.thinking_weight is not None:
        text, offsets = token_offsets(tokenizer, completion)
        ends, inside = step_ends(text, offsets, settings.step_rule), thinking_tokens(settings, text, offsets)
    mask, thinking = torch.ones(1, len(completion)), torch.arange(len(completion))[None] < inside
    return parts.token_shares(settings, mask, torch.tensor([ends]), thinking)[0]


def clip_for(model: TokenRewardModel, traces: Sequence[LabelledTrace]) -> float:
    """A clip that acts on hardly any token: the largest logit of some traces, half as much again, and at least 5.

    The trace reward is the read-out's score only where no token is clipped.
    """
    some = traces[:: max(1, len(traces) // CLIPPED)]
    model.settings = replace(model.settings, beta_clip=1e9)
    rewards = model.token_rewards([trace.prompt for trace in some], [trace.completion for trace in some])
    return float(math.ceil(max(5.0, 1.5 * max(float(values.abs().max()) for values in rewards))))


def states_of(
    name: str,
    settings: RewardSettings,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[LabelledTrace],
    *,
    options: ReadoutOptions,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[TraceStates, tuple[int, ...]]:
    """The states of traces under the frozen model, and their layers; arguments as in `train_readout`."""
    model = load_causal_lm(name, options.dtype, best_device())
    known = StateCache(
        options.cache,
        f"{model_fingerprint(name)} {options.dtype}",
        f"{settings.granularity} {settings.interval} {settings.step_delimiter!r}"
        + (f" {settings.steps!r}" if settings.steps else "")
        + (f" {settings.thinking} {settings.thinking_weight}" if settings.thinking_weight is not None else ""),
    )
    shares = functools.partial(token_shares, settings, tokenizer)
    found = cached_states(model, traces, known, pad_id(tokenizer), shares=shares, stopped=stopped)
    return found, readable_layers(model)


def examples_of(traces: Sequence[LabelledTrace]) -> Examples:
    """Labels, questions and weights of traces."""
    return Examples(
        labels=np.array([trace.label for trace in traces]),
        questions=np.array([trace.question for trace in traces]),
        weights=np.array([trace.weight for trace in traces]),
    )


def train_readout(
    name: str,
    settings: RewardSettings,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[LabelledTrace],
    *,
    options: ReadoutOptions,
    dtype: torch.dtype = torch.float32,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[TokenRewardModel, Readout]:
    """Fit a read-out and make it a reward model with head ``token``, whose trace reward is the read-out's score.

    Args:
        name: folder or Hub id of the causal LM.
        settings: of the reward model; its clip is raised so that it hardly ever acts.
        tokenizer: the causal LM's.
        traces: positives and negatives.
        options: loss, seed, precision and the folder of the features.
        dtype: of the reward model's weights; its head is in float32.
        stopped: whether the user asked to stop.

    Raises:
        InputError: too few questions have both classes.
        Interrupted: the user stopped it; the same call continues.
    """
    found, layers = states_of(name, settings, tokenizer, traces, options=options, stopped=stopped)
    examples = examples_of(traces)
    with tqdm(total=len(layers_to_try(layers)) * len(PENALTIES), desc="heads fitted", unit="") as progress:
        fitted = fit_readout(
            found.states, layers, examples, options.objective, seed=options.seed, progress=progress.update
        )
    head = LinearHead(layers=fitted.layers, weight=fitted.weight, bias=fitted.bias)
    made = TokenRewardModel.from_readout(name, head, settings, tokenizer, dtype=dtype).to(best_device())
    made.settings = replace(made.settings, beta_clip=clip_for(made, traces))
    return made, fitted
