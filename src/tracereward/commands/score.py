"""`tracereward score`: rows with the rewards of their traces."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedModel

from tracereward.data.trace_rows import traces_of
from tracereward.errors import InputError
from tracereward.modeling.tokenization import render_prompt
from tracereward.rewards.scorer import Scorer, check_finite
from tracereward.rewards.token_scores import AGGREGATES, TokenScores

CHUNK = 256  # rows scored together: enough to sort by length, few enough to see that it goes on


def score_rows(
    model: Scorer,
    rows: Iterable[tuple[str, dict[str, Any]]],
    reference: PreTrainedModel | None = None,
    policy: PreTrainedModel | None = None,
    skipped: list[str] | None = None,
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """The same rows in the same order with their scores (`as_row`); of several candidates a list of them in `scores`.

    Steps are joined to a completion.

    Rows are read and scored `CHUNK` at a time, so that a million take no more memory than a thousand.

    Args:
        model: the reward model.
        rows: as `candidate_rows` yields them.
        reference: as in `Scorer.score`.
        policy: as in `Scorer.score`.
        skipped: takes what is wrong with each row that the model cannot read, too long for one, which is then left
            out; None makes it fatal.
        done: how many rows that can be scored are left out at the start, since an earlier run has scored them. A chunk
            that it scored in part is scored whole once more: other neighbours would change the last digits.

    Raises:
        InputError: a row that the model cannot read.
        RunFailed: a reward is not finite.
    """
    rows = iter(rows)
    calibrated = reference is None and policy is None  # a calibration is fitted to the reward without them
    while chunk := list(islice(rows, CHUNK)):
        kept: list[tuple[str, dict[str, Any], list[str], list[tuple[int, int]]]] = []
        ids: list[tuple[list[int], list[int]]] = []
        for where, row in chunk:
            traces, ended, spans = traces_of(row, model.settings.step_delimiter)
            try:
                rendered = render_prompt(model.tokenizer, row["prompt"], model.settings.template, where)
                encoded = [model.check_length(where, rendered, *trace) for trace in zip(traces, ended, strict=True)]
                if spans:
                    model.check_steps(where, traces[0], spans, encoded[0][1])
            except InputError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
                continue
            kept.append((where, row, traces, spans))
            ids += encoded
        if done >= len(kept):
            done -= len(kept)
            continue
        prompts, completions = [prompt for prompt, _ in ids], [completion for _, completion in ids]
        scores = iter(model.score_ids(prompts, completions, reference=reference, policy=policy))
        for index, (where, row, traces, spans) in enumerate(kept):
            found = [next(scores) for _ in traces]
            for trace in found:
                check_finite(where, "reward", trace.rewards)
            scored = [as_row(trace, model, calibrated) for trace in found]
            if spans:
                scored[0] |= {"completion": traces[0], "step_rewards": found[0].span_rewards(spans)}
            if index >= done:
                yield {**row, "scores": scored} if "candidates" in row else {**row, **scored[0]}
        done = 0


def as_row(scores: TokenScores, model: Scorer, calibrated: bool = True) -> dict[str, Any]:
    """What `score` writes of one trace: its reward, the probability that it is right where the model is calibrated for
    this reward, every aggregate, the steps' rewards, and for each token its text, place, reward and whether it ends a
    step."""
    reward = scores.aggregate(model.settings.aggregate)
    calibration = model.settings.calibration if calibrated else None
    return {
        "reward": reward,
        **({} if calibration is None else {"probability": calibration.probability(reward)}),
        "aggregates": {how: scores.aggregate(how) for how in AGGREGATES},
        "step_rewards": scores.step_rewards(),
        "tokens": scores.tokens,
        "offsets": scores.offsets,
        "token_rewards": scores.rewards,
        "supervised": scores.supervised,
        "step_ends": scores.step_ends,
    }
