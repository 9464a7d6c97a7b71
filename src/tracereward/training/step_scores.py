"""Cross-fitted scores of the steps of demonstrations: no step is judged by a head that has seen its question.

The examples are steps in their context: the experts' own, and the first changed step of wrong copies of their traces.
Their features are a frozen model's mean states over the step's tokens. A read-out is fitted on them as by
`tracereward fit`, and each step has the score of the fold's head that learned from other questions.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.data.near_duplicates import near_groups
from tracereward.data.wrong_copies import KINDS, wrong_copy
from tracereward.errors import InputError, Interrupted
from tracereward.modeling.alignment import step_ends, token_offsets
from tracereward.modeling.hidden_states import StateCache, TraceStates, readable_layers, step_states
from tracereward.modeling.loading import best_device, load_causal_lm, model_fingerprint
from tracereward.modeling.steps import StepRule
from tracereward.modeling.tokenization import encode_completion, encode_prompt, pad_id
from tracereward.tasks.recipes import Task
from tracereward.training.first_difference import first_difference
from tracereward.training.readout import PENALTIES, Readout, fit_readout, layers_to_try
from tracereward.training.readout_training import CHUNK, LabelledTrace, cached_states, examples_of

COPIES = 3  # wrong copies of a demonstration


@dataclass(frozen=True, kw_only=True)
class SteppedTrace:
    """A demonstration in token ids, with its steps.

    Attributes:
        prompt: token ids.
        completion: token ids.
        steps: of each step the first token, and the one after its last.
        question: number of the question that it answers.
    """

    prompt: list[int]
    completion: list[int]
    steps: list[tuple[int, int]]
    question: int

    def step(self, span: tuple[int, int], label: bool) -> LabelledTrace:
        """A step as an example: its context is its prompt."""
        start, end = span
        return LabelledTrace(
            prompt=self.prompt + self.completion[:start],
            completion=self.completion[start:end],
            label=label,
            question=self.question,
        )

    @property
    def examples(self) -> list[LabelledTrace]:
        """Its steps as positives."""
        return [self.step(span, True) for span in self.steps]


def steps_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rule: StepRule) -> list[tuple[int, int]]:
    """The steps of a completion: of each the first token, and the one after its last."""
    ends = [place + 1 for place, is_end in enumerate(step_ends(*token_offsets(tokenizer, ids), rule)) if is_end]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def stepped_traces(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, rule: StepRule
) -> list[SteppedTrace]:
    """Demonstrations in token ids. Those whose prompts are nearly the same count as answers to one question.

    Args:
        rows: rendered.
        tokenizer: the model's.
        rule: what ends a step.
    """
    numbers = near_groups([row["prompt"] for row in rows])
    traces = []
    for row, number in zip(rows, numbers, strict=True):
        ids = encode_completion(tokenizer, row["completion"], row.get("finished") is not False)
        traces.append(
            SteppedTrace(
                prompt=encode_prompt(tokenizer, row["prompt"]),
                completion=ids,
                steps=steps_of(tokenizer, ids, rule),
                question=number,
            )
        )
    return traces


def step_texts(trace: SteppedTrace, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each step."""
    text, offsets = token_offsets(tokenizer, trace.completion)
    return [text[offsets[start][0] : offsets[end - 1][1]] for start, end in trace.steps]


def changed_steps(
    trace: SteppedTrace,
    row: Mapping[str, Any],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: "StepOptions",
) -> list[LabelledTrace]:
    """The first changed step of each of some wrong copies of a demonstration, as negatives; no two are the same.

    Args:
        trace: the demonstration.
        row: its rendered ``prompt`` and ``completion``.
        task: reads its answer.
        tokenizer: of the trace.
        options: kinds and seed of the changes, which also depend on the demonstration's text.
    """
    rule = options.rule
    rng, found = random.Random(f"copies {options.seed} {row['prompt']} {row['completion']}"), {}
    for _ in range(options.copies):
        copy = wrong_copy(row["completion"], row["prompt"], task, rng, kinds=options.kinds, rule=rule)
        if copy is None:
            break
        ids = encode_completion(tokenizer, copy[0])
        place = min(first_difference(ids, trace.completion), len(ids) - 1)
        changed = SteppedTrace(
            prompt=trace.prompt, completion=ids, steps=steps_of(tokenizer, ids, rule), question=trace.question
        )
        span = next(span for span in changed.steps if span[0] <= place < span[1])
        example = changed.step(span, False)
        found[(*example.prompt, -1, *example.completion)] = example
    return list(found.values())


def cache_steps(
    model: PreTrainedModel,
    traces: Sequence[SteppedTrace],
    cache: StateCache,
    pad: int,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write the features of all steps of traces that the cache lacks, from one pass over each trace.

    Args:
        model: the frozen causal LM.
        traces: the demonstrations.
        cache: of this model, for averages over all tokens.
        pad: any token id.
        stopped: asked between chunks.

    Raises:
        Interrupted: the user stopped it; what was computed is kept.
    """
    keys = [[cache.key(step.prompt, step.completion) for step in trace.examples] for trace in traces]
    missing = [i for i, of_trace in enumerate(keys) if any(key not in cache.known for key in of_trace)]
    with tqdm(total=len(traces), initial=len(traces) - len(missing), desc="demonstrations read", unit="") as progress:
        for start in range(0, len(missing), CHUNK):
            if stopped():
                raise Interrupted(
                    f"stopped after {progress.n} of {len(traces)} demonstrations were read; they are kept"
                )
            chunk = [traces[i] for i in missing[start : start + CHUNK]]
            prompts, completions = [trace.prompt for trace in chunk], [trace.completion for trace in chunk]
            names: list[str] = []
            parts: list[TraceStates] = []
            for i, found in step_states(model, prompts, completions, pad, steps=[trace.steps for trace in chunk]):
                names += keys[missing[start + i]]
                parts.append(found)
                progress.update()
            states, log_probs = torch.cat([p.states for p in parts]), torch.cat([p.log_probs for p in parts])
            cache.write(names, TraceStates(states=states, log_probs=log_probs))


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How steps are read and scored.

    Attributes:
        model: folder or Hub id of the frozen causal LM.
        cache: folder of its states.
        dtype: in which it computes.
        rule: what ends a step.
        seed: of the changes and the folds.
        kinds: of the changes.
        copies: wrong copies of a demonstration.
    """

    model: str
    cache: Path
    dtype: torch.dtype
    rule: StepRule
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    copies: int = COPIES


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """What the steps of N demonstrations are worth.

    Attributes:
        rewards: of each demonstration, (S,) cross-fitted scores of its steps, in log-odds.
        log_probs: likewise, mean log-prob of a step's tokens under the frozen model.
        sizes: likewise, number of tokens.
        contrasts: of each demonstration, (C,) for each changed step the reward of the step at its place minus its own.
        changed: number of changed steps that it was learned from.
        readout: the fitted heads and what was tried.
    """

    rewards: list[np.ndarray]
    log_probs: list[np.ndarray]
    sizes: list[np.ndarray]
    contrasts: list[np.ndarray]
    changed: int
    readout: Readout


def score_steps(
    traces: Sequence[SteppedTrace],
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: StepOptions,
    stopped: Callable[[], bool] = lambda: False,
) -> StepScores:
    """Read demonstrations and wrong copies of them, fit a read-out, and score the demonstrations' steps.

    Args:
        traces: the demonstrations.
        rows: their rendered texts.
        task: reads their answers.
        tokenizer: of the traces.
        options: model, cache and seed.
        stopped: whether the user asked to stop.

    Raises:
        InputError: fewer than two questions have a demonstration that a change applies to.
        Interrupted: the user stopped it; the same call continues.
    """
    copies = [
        changed_steps(trace, row, task, tokenizer, options=options) for trace, row in zip(traces, rows, strict=True)
    ]
    changed = [step for steps in copies for step in steps]
    own = [step for trace in traces for step in trace.examples]
    examples = examples_of([*own, *changed])
    model = load_causal_lm(options.model, options.dtype, best_device())
    cache = StateCache(options.cache, f"{model_fingerprint(options.model)} {options.dtype}", "dense")
    cache_steps(model, traces, cache, pad_id(tokenizer), stopped=stopped)
    found = cached_states(model, [*own, *changed], cache, pad_id(tokenizer), shares=_equal_shares, stopped=stopped)
    layers = readable_layers(model)
    try:
        with tqdm(total=len(layers_to_try(layers)) * len(PENALTIES), desc="heads fitted", unit="") as progress:
            readout = fit_readout(found.states, layers, examples, "bce", seed=options.seed, progress=progress.update)
    except InputError as error:
        raise InputError(f"too few demonstrations have a wrong copy to be compared with: {error}") from error
    ends, count = np.cumsum([len(trace.steps) for trace in traces])[:-1], len(own)
    return StepScores(
        rewards=np.split(readout.scores[:count], ends),
        log_probs=np.split(found.log_probs[:count].numpy(), ends),
        contrasts=_contrasts(traces, copies, readout.scores),
        sizes=[np.array([end - start for start, end in trace.steps]) for trace in traces],
        changed=len(changed),
        readout=readout,
    )


def _contrasts(
    traces: Sequence[SteppedTrace], copies: Sequence[Sequence[LabelledTrace]], scores: np.ndarray
) -> list[np.ndarray]:
    """For each demonstration, the score of the step at the place of each changed step minus the changed step's."""
    own, changed = 0, sum(len(trace.steps) for trace in traces)
    found = []
    for trace, steps in zip(traces, copies, strict=True):
        places = {len(trace.prompt) + start: own + place for place, (start, _) in enumerate(trace.steps)}
        pairs = [(places.get(len(step.prompt)), changed + number) for number, step in enumerate(steps)]
        found.append(np.array([scores[mine] - scores[other] for mine, other in pairs if mine is not None]))
        own, changed = own + len(trace.steps), changed + len(steps)
    return found


def _equal_shares(completion: Sequence[int]) -> Tensor:
    return torch.full((len(completion),), 1 / len(completion))
