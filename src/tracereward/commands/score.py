"""`tracereward score`: add the rewards of its traces to each row."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from tqdm.auto import tqdm

from tracereward.commands.partial_output import (
    STDOUT,
    Output,
    check_output,
    finished_rows,
    is_finished,
    of_stream,
    origin_of,
    rows_to,
    unfinished,
    write_row,
)
from tracereward.console import say
from tracereward.data.readers import STDIN, data_name, windows
from tracereward.data.trace_rows import candidate_rows, traces_of
from tracereward.errors import InputError, check_choice
from tracereward.modeling.rendering import completion_text, render_prompt
from tracereward.modeling.tokenization import load_tokenizer, without_ends
from tracereward.rewards.engines import (
    ENGINES,
    check_engine,
    check_log_prob_models,
    load_log_prob_models,
    load_scorer,
    precision_of,
)
from tracereward.rewards.records import CHUNK, EncodedTrace, LogProbModels, Trace
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings, check_reward_model
from tracereward.rewards.token_scores import AGGREGATES, TokenScores


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of `tracereward score`.

    Attributes:
        model: folder or Hub id of the reward model.
        data: input of `candidate_rows`; stdin is always streamed.
        output: where the rows go; with engine ``ray`` a folder shared by all machines.
        split: split of a Hub data set.
        engine: one of `ENGINES`, or ``ray``.
        workers: processes of engine ``ray``, each with a model; if None, one per GPU of the cluster, or one.
        reference: folder or Hub id of the model whose log-prob is added.
        policy: folder or Hub id of the model whose log-prob is subtracted.
        skip_bad: skip rows that cannot be scored, instead of stopping.
        dtype: precision of all models, see `modeling.precision`.
        stream: read and check the rows once, as they come, instead of checking all before the model is loaded.
    """

    model: str
    data: str
    output: Output = STDOUT
    split: str = "train"
    engine: str = "transformers"
    workers: int | None = None
    reference: str | None = None
    policy: str | None = None
    skip_bad: bool = False
    dtype: str | None = None
    stream: bool = False

    @property
    def streamed(self) -> bool:
        """Whether the rows are read once, as they come."""
        return self.stream or self.data == STDIN

    @property
    def calibrated(self) -> bool:
        """Whether what was fitted to rewards applies: only if these contain no other models' log-probs."""
        return self.reference is None and self.policy is None


def run_score(options: ScoreOptions) -> None:
    """`tracereward score`: write scored rows to the output and report skipped rows on stderr.

    Raises:
        InputError: an option or a row is invalid (before a model is loaded), or a row is too long.
        RunFailed: a reward is not finite, or the disk is full.
    """
    check_choice("engine", options.engine, [*ENGINES, "ray"])
    if options.workers is not None and options.engine != "ray":
        raise InputError("--workers needs --engine ray")
    if options.engine == "ray":
        if options.streamed:
            raise InputError("--engine ray splits checked rows into shards: give it a file, without --stream")
        from tracereward.commands.score_ray import score_to_folder

        _note_uncalibrated(check_reward_model(options.model), options)
        skipped = score_to_folder(options)
    else:
        skipped = _score_to_file(options)
    for text in skipped:
        say(f"skipped: {text}")


def _note_uncalibrated(settings: RewardSettings, options: ScoreOptions) -> None:
    for stored, what in ((settings.calibration, "probability"), (settings.first_error, "suspected error")):
        if stored is not None and not options.calibrated:
            say(f"no {what}: it was fitted for rewards without --reference and --policy")


def _score_to_file(options: ScoreOptions) -> list[str]:
    """Score in this process; return the error of each skipped row that is not reported yet."""
    options = replace(options, output=of_stream(options.output, options.data))
    settings = check_engine(options.model, options.engine)
    check_log_prob_models(settings, options.reference, options.policy, options.engine)
    check_output(options.output, [options.model, options.data, options.reference, options.policy])
    _note_uncalibrated(settings, options)
    skipped: list[str] | None = [] if options.skip_bad else None
    count = None
    if not options.streamed:  # all rows are checked before the model is loaded
        count = sum(1 for _ in _rows(options, settings, skipped))
        check_any_rows(count, options.data, skipped)
    origin, done = None, 0
    if not options.output.to_stdout and options.data != STDIN:
        models = {"model": options.model, "--reference": options.reference, "--policy": options.policy}
        precision = precision_of(options.model, options.dtype)
        named = {} if precision.own else {"dtype": precision.name}  # may be this machine's choice
        origin = origin_of("score", models, options.data, split=options.split, engine=options.engine, **named)
    if is_finished(options.output):
        return []
    if part := unfinished(options.output, origin):
        done = finished_rows(part)
        say(f"resuming after {done} rows")
    if options.streamed:
        rows = _rows(options, settings, skipped)
        first = list(islice(rows, 1))  # what is wrong with all rows is seen before the model is loaded
        check_any_rows(len(first), options.data, skipped)
        rows = chain(first, rows)
    else:
        rows = candidate_rows(options.data, options.split, [] if options.skip_bad else None, settings.template)
    model = load_scorer(options.model, options.engine, options.dtype)
    extra = load_log_prob_models(model, reference=options.reference, policy=options.policy, dtype=options.dtype)
    scored = score_rows(model, rows, extra=extra, skipped=skipped, done=done)
    progress = tqdm(desc="scored", total=count, initial=done, unit="")
    with rows_to(options.output, origin) as file, progress:
        for row in scored:
            write_row(file, row)
            progress.update()
            if options.output.to_stdout:  # the next command of a pipe need not wait
                file.flush()
            if options.streamed and skipped:
                for text in skipped:
                    tqdm.write(f"skipped: {text}", file=sys.stderr)
                skipped.clear()
    return skipped or []


def _rows(
    options: ScoreOptions, settings: RewardSettings, skipped: list[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, checked with the tokenizer too."""
    tokenizer = load_tokenizer(options.model)
    given = {"tokenizer": tokenizer, "stream": options.streamed}
    return candidate_rows(options.data, options.split, skipped, settings.template, **given)


def check_any_rows(count: int, data: str, skipped: list[str] | None) -> None:
    """Reject data without a row that can be scored.

    Raises:
        InputError: names the first skipped row, if there is one.
    """
    if count == 0:
        raise InputError(
            f"{data_name(data)}: no rows{' that can be scored; the first: ' + skipped[0] if skipped else ''}"
        )


def score_rows(
    model: Scorer,
    rows: Iterable[tuple[str, dict[str, Any]]],
    *,
    extra: LogProbModels | None = None,
    skipped: list[str] | None = None,
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield the rows in order with their scores (`as_row`); rows with candidates get a list of them in `scores`.

    Steps are joined to a completion. Rows are read and scored `CHUNK` at a time, so memory use is constant. If reading
    fails, the rows before are scored first.

    Args:
        model: the reward model.
        rows: as `candidate_rows` yields them.
        extra: models whose log-probs enter the rewards.
        skipped: receives the error of each row that cannot be scored, which is then skipped; if None, the first such
            row raises its error.
        done: number of scorable rows to skip at the start, since an earlier run has scored them. A partly scored chunk
            is scored again in full: the last digits depend on the batch.

    Raises:
        InputError: a row cannot be scored.
        RunFailed: a reward is not finite.
    """
    calibrated = extra is None or not extra.signed  # see `ScoreOptions.calibrated`
    for chunk in windows(rows, CHUNK):
        kept: list[tuple[dict[str, Any], list[Trace]]] = []
        encoded: list[EncodedTrace] = []
        for where, row in chunk:
            try:
                traces = _traces(model, where, row)
                encoded += [model.encode(trace) for trace in traces]
            except InputError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
            else:
                kept.append((row, traces))
        if done >= len(kept):
            done -= len(kept)
            continue
        scores = iter(model.score_encoded(encoded, extra))
        for index, (row, traces) in enumerate(kept):
            scored = _scored_row(model, row, traces, scores=list(islice(scores, len(traces))), calibrated=calibrated)
            if index >= done:
                yield scored
        done = 0


def _traces(model: Scorer, where: str, row: dict[str, Any]) -> list[Trace]:
    """The traces of a row from `candidate_rows`, with the prompt rendered."""
    prompt = render_prompt(model.tokenizer, row["prompt"], model.settings.rendering, where)
    if "candidates" not in row and isinstance(row.get("completion"), list):
        text = completion_text(model.tokenizer, row["completion"], model.settings.rendering, where)
        row = {**row, "completion": text}
    texts, finished, spans = traces_of(row, model.settings.step_rule)
    traces = []
    for given, ended in zip(texts, finished, strict=True):
        text, had_end = without_ends(model.tokenizer, given)
        traces.append(
            Trace(where=where, prompt=prompt, completion=text, finished=ended or had_end, spans=_within(spans, text))
        )
    return traces


def _within(spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Spans of steps that end with the text, without the end marks that were taken off it."""
    return [(start, min(end, len(text))) for start, end in spans]


def _scored_row(
    model: Scorer, row: dict[str, Any], traces: Sequence[Trace], *, scores: Sequence[TokenScores], calibrated: bool
) -> dict[str, Any]:
    """Add scores to a row, whose text becomes the one that was read: offsets are places in it."""
    scored = [as_row(found, model, calibrated, trace.spans) for found, trace in zip(scores, traces, strict=True)]
    if "candidates" in row:
        return {**row, "candidates": [trace.completion for trace in traces], "scores": scored}
    return {**row, "completion": traces[0].completion, **scored[0]}


def as_row(
    scores: TokenScores, model: Scorer, calibrated: bool = True, spans: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """The columns that `score` writes for a trace.

    Its reward, every aggregate, that of each part if it has thinking, the step rewards, and for each token its text,
    offsets, reward and flags. If the model has a calibration for this reward, also the probability that the trace is
    correct; and if it has a rule for the first error, the index of the suspected step, or None.

    Args:
        scores: of the trace.
        model: its settings say what is written.
        calibrated: whether what was fitted to rewards applies.
        spans: of the steps, see `TokenScores.by_step`.
    """
    reward = scores.aggregate(model.settings.aggregate)
    calibration = model.settings.calibration if calibrated else None
    rule = model.settings.first_error if calibrated else None
    return {
        "reward": reward,
        **({} if calibration is None else {"probability": calibration.probability(reward)}),
        "aggregates": {how: scores.aggregate(how) for how in AGGREGATES},
        **({"parts": scores.parts(model.settings.aggregate)} if scores.thinking else {}),
        "step_rewards": scores.step_rewards(spans),
        **({} if rule is None else {"suspected_error": rule.mark(scores.by_step(spans))}),
        "tokens": scores.tokens,
        "offsets": scores.offsets,
        "token_rewards": scores.rewards,
        "supervised": scores.supervised,
        "step_ends": scores.ends_of(spans),
    }
