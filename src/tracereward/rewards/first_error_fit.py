"""Fitting the rule for the first error on traces that a reward model did not train on."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tracereward.data.perturbations import first_changed_character, perturb
from tracereward.errors import EmptyTrace, InputError, TooLong
from tracereward.rewards.first_error_rules import FirstErrorRule, RatedTrace, fit_rule
from tracereward.rewards.records import EncodedTrace, Trace
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import HOW_TO_FIT
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class JudgedTrace:
    """A trace that counts as right, an expert's or one with the right answer, or one with a wrong answer.

    Attributes:
        prompt: rendered as in training.
        completion: its text.
        right: which of both.
        finished: whether it ended by itself.
        source: see `RatedTrace`.
    """

    prompt: str
    completion: str
    right: bool
    finished: bool = True
    source: str = "expert"


def fit_first_error(model: Scorer, traces: Sequence[JudgedTrace], seed: int = 0) -> FirstErrorRule:
    """The rule for the first error, from right and wrong traces; no step labels are needed.

    Each right trace is perturbed once (`perturbations.perturb`): the step of the first changed character is the copy's
    first wrong step. Of each question and source the first right and the first wrong trace are used, because several
    are no independent evidence. Traces that the model cannot read are left out.

    Args:
        model: the reward model; rewards are those without further models' log-probs.
        traces: not trained on.
        seed: seed of the perturbations.

    Raises:
        InputError: see `fit_rule`.
        RunFailed: a reward is not finite.
    """
    once = {(trace.prompt, trace.source, trace.right): trace for trace in reversed(traces)}
    rows: list[tuple[JudgedTrace, int | None]] = []  # with the first changed character of a copy
    encoded: list[EncodedTrace] = []
    for number, trace in enumerate(reversed(once.values())):
        original, changed = _read(trace, trace.completion), None
        if trace.right:
            rng = random.Random(f"{seed} {number}")
            changed = perturb(original.completion, rng, rule=model.settings.step_rule)
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
                right=trace.right and character is None,
                first_error=None if character is None else step_of(scores, character),
                source=trace.source,
            )
            for (trace, character), scores in zip(rows, model.score_encoded(encoded), strict=True)
        ]
    )


def find_rule(model: Scorer, traces: Sequence[JudgedTrace], seed: int = 0) -> tuple[FirstErrorRule | None, str]:
    """`fit_first_error`: the rule, or None, and a sentence on what it was fitted on or why there is none."""
    try:
        rule = fit_first_error(model, traces, seed)
    except InputError as error:
        return None, no_rule(str(error))
    right = sum(trace.right for trace in traces)
    return rule, f"{rule.line} Fitted on {right} right and {len(traces) - right} wrong traces."


def no_rule(why: str) -> str:
    """Says why there is no rule, and what to do."""
    return f"No rule for the first error, so no step is marked: {why}. {HOW_TO_FIT[0].upper()}{HOW_TO_FIT[1:]}."


def _read(trace: JudgedTrace, text: str) -> Trace:
    return Trace(where="a trace", prompt=trace.prompt, completion=text, finished=trace.finished)


def step_of(scores: TokenScores, character: int) -> int:
    """The step of the token that holds a character of the text; the last step for one behind the text."""
    ends = itertools.accumulate(scores.step_ends, initial=0)
    return next((step for (_, end), step in zip(scores.offsets, ends) if end > character), sum(scores.step_ends) - 1)
