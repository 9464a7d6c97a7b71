"""Logged traces of several models and their questions' own solutions, with the states of a frozen model."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracereward.data.candidates import CandidateRow, read_candidates, read_questions
from tracereward.data.matching import Question, match
from tracereward.errors import InputError
from tracereward.modeling.rendering import Rendering, render
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer
from tracereward.rewards.settings import RewardSettings
from tracereward.tasks.recipes import Task
from tracereward.training.readout import layers_to_try
from tracereward.training.readout_training import LabelledTrace, ReadoutOptions, states_of


@dataclass(frozen=True, kw_only=True, eq=False)
class LoggedPool:
    """N traces of Q questions: the candidates of M models, and demonstrations if the questions have solutions.

    Attributes:
        task: reads and compares answers.
        rows: (N,) the traces as read; a demonstration has no model.
        questions: (N,) number of the question in the files, from 0.
        models: (N,) name of the model; "" for a demonstration.
        correct: (N,) bool, by the pool's own label; True for a demonstration.
        lengths: (N,) tokens.
        states: (N, L, H) features at the layers that a read-out tries.
        layers: (L,) these layers.
        log_probs: (N,) mean log-prob of the tokens under the frozen model.
        seconds: that computing features took; None if all were stored.
        asked: number of questions in the files, of which Q were chosen.
    """

    task: Task
    rows: list[CandidateRow]
    questions: np.ndarray
    models: np.ndarray
    correct: np.ndarray
    lengths: np.ndarray
    states: Tensor
    layers: list[int]
    log_probs: np.ndarray
    seconds: float | None
    asked: int
    _values: dict[int, np.ndarray] = field(default_factory=dict)

    def matched(self, expert: str) -> tuple[list[Question], dict[int, int]]:
        """Questions with the experts' traces as demonstrations and the others' as candidates.

        Args:
            expert: name of a model; "" for the questions' own solutions.

        Returns:
            The questions that have both, and the index of each row of them by its `id`.
        """
        index: dict[int, int] = {}
        demonstrations, candidates = [], []
        for i, row in enumerate(self.rows):
            if self.models[i] == expert:
                demonstrations.append(
                    {"prompt": row.prompt, "completion": row.completion, "answer": row.answer, "index": i}
                )
            elif self.models[i]:
                candidates.append(row)
                index[id(row)] = i
        questions, _ = match(demonstrations, candidates)
        return [question for question in questions if question.demonstrations and question.candidates], index

    def scores(self, layers: Sequence[int], weight: np.ndarray) -> np.ndarray:
        """(N,) scores of all traces by an (L, H) head on L layers."""
        found = np.zeros(len(self.rows))
        for layer, row in zip(layers, weight, strict=True):
            if layer not in self._values:
                self._values[layer] = self.states[:, self.layers.index(layer)].float().numpy()
            found += self._values[layer] @ row.astype(np.float32)
        return found


def read_traces(pool: str, questions: str, task: Task) -> tuple[list[CandidateRow], list[CandidateRow]]:
    """The candidates whose correctness is known, and the questions' solutions, if any, as rows without a model.

    Raises:
        InputError: a row cannot be read, or has no model or label.
    """
    candidates = read_candidates(pool, task, questions=questions)
    for row in candidates:
        if row.correct is None or row.model is None:
            raise InputError(f"{row.where}: the study needs the fields model and correct")
    solutions = [row for row in read_questions(questions, task).values() if row["completion"] is not None]
    if not solutions:
        return candidates, []
    found, _ = match(solutions, candidates)
    own = [
        replace(
            question.candidates[0],
            where=question.where,
            completion=row["completion"],
            answer=row["answer"],
            correct=True,
            model=None,
        )
        for question in found
        if question.candidates
        for row in question.demonstrations
    ]
    return candidates, own


def encoded(rows: Sequence[CandidateRow], name: str, template: str) -> list[LabelledTrace]:
    """The token ids of each row, with the number of its question; labels mean nothing."""
    tokenizer = load_tokenizer(name)
    numbers: dict[str, int] = {}
    rendered = render(
        [{"prompt": row.prompt, "completion": row.completion, "source": row.where} for row in rows],
        tokenizer,
        Rendering(template=template),
    )
    prompt_of = functools.cache(functools.partial(encode_prompt, tokenizer))
    return [
        LabelledTrace(
            prompt=prompt_of(text["prompt"]),
            completion=encode_completion(tokenizer, text["completion"], row.finished),
            label=False,
            question=numbers.setdefault(row.key, len(numbers)),
        )
        for row, text in zip(rows, rendered, strict=True)
    ]


def load_pool(
    files: tuple[str, str],
    task: Task,
    model: str,
    cache: Path,
    *,
    template: str,
    chosen: Callable[[int], np.ndarray] | None = None,
) -> LoggedPool:
    """Read the traces, encode them, and read or compute their features.

    Args:
        files: of the pool and of its questions.
        task: reads them.
        model: folder of the frozen model.
        cache: folder of its features, which it computes in bfloat16.
        template: of the prompts.
        chosen: the numbers of the questions to keep, from the number of all.

    Raises:
        InputError: see `read_traces`.
    """
    candidates, own = read_traces(*files, task)
    rows = [*candidates, *own]
    traces = encoded(rows, model, template)
    asked = 1 + max(trace.question for trace in traces)
    if chosen is not None:
        kept = set(chosen(asked).tolist())
        pairs = [(row, trace) for row, trace in zip(rows, traces, strict=True) if trace.question in kept]
        rows, traces = [row for row, _ in pairs], [trace for _, trace in pairs]
    options = ReadoutOptions(objective="pairwise", cache=cache, dtype=torch.bfloat16)
    before, start = set(cache.glob("*")), time.perf_counter()
    found, layers = states_of(model, RewardSettings(head="token"), load_tokenizer(model), traces, options=options)
    seconds = time.perf_counter() - start
    tried = layers_to_try(layers)
    return LoggedPool(
        task=task,
        rows=rows,
        questions=np.array([trace.question for trace in traces]),
        models=np.array([row.model or "" for row in rows]),
        correct=np.array([bool(row.correct) for row in rows]),
        lengths=np.array([len(trace.completion) for trace in traces]),
        states=found.states[:, [layers.index(layer) for layer in tried]].clone(),
        layers=tried,
        log_probs=found.log_probs.numpy(),
        seconds=seconds if set(cache.glob("*")) > before else None,
        asked=asked,
    )
