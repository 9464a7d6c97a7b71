"""Fitting the rule for the first error on traces that a reward model did not train on."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tracereward.data.perturbations import first_changed_character, perturb
from tracereward.errors import EmptyTrace, TooLong
from tracereward.rewards.first_error_rules import FirstErrorRule, RatedTrace, fit_rule
from tracereward.rewards.records import EncodedTrace, Trace
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class RightTrace:
    """A trace that counts as right: an expert's, or one with the right answer.

    Attributes:
        prompt: rendered as in training.
        completion: its text.
        finished: whether it ended by itself.
        source: see `RatedTrace`.
    """

    prompt: str
    completion: str
    finished: bool = True
    source: str = "expert"


def fit_first_error(model: Scorer, traces: Sequence[RightTrace], seed: int = 0) -> FirstErrorRule:
    """The rule for the first error, from right traces and copies of them with one inserted error.

    Each trace is perturbed once (`perturbations.perturb`): the step of the first changed character is the copy's first
    wrong step, so no step labels are needed. Traces that the model cannot read, and repeated ones, are left out.

    Args:
        model: the reward model; rewards are those without further models' log-probs.
        traces: not trained on.
        seed: seed of the perturbations.

    Raises:
        InputError: see `fit_rule`.
        RunFailed: a reward is not finite.
    """
    rows: list[tuple[RightTrace, int | None]] = []  # with the first changed character
    encoded: list[EncodedTrace] = []
    for number, trace in enumerate(dict.fromkeys(traces)):
        original = _read(trace, trace.completion)
        changed = perturb(
            original.completion, random.Random(f"{seed} {number}"), delimiter=model.settings.step_delimiter
        )
        copies = [original] if changed is None else [original, _read(trace, changed.text)]
        try:
            ids = [model.encode(copy, known=False) for copy in copies]
        except (EmptyTrace, TooLong):
            continue
        if len(ids) == 2 and ids[0].completion != ids[1].completion:  # a vocabulary may lack the difference
            rows.append((trace, first_changed_character(original.completion, copies[1].completion)))
            encoded.append(ids[1])
        rows.append((trace, None))
        encoded.append(ids[0])
    return fit_rule(
        [
            RatedTrace(
                steps=scores.by_step(),
                question=trace.prompt,
                first_error=None if character is None else step_of(scores, character),
                source=trace.source,
            )
            for (trace, character), scores in zip(rows, model.score_encoded(encoded), strict=True)
        ]
    )


def _read(trace: RightTrace, text: str) -> Trace:
    return Trace(where="a trace", prompt=trace.prompt, completion=text, finished=trace.finished)


def step_of(scores: TokenScores, character: int) -> int:
    """The step of the token that holds a character of the text; the last step for one behind the text."""
    ends = itertools.accumulate(scores.step_ends, initial=0)
    return next((step for (_, end), step in zip(scores.offsets, ends) if end > character), sum(scores.step_ends) - 1)
