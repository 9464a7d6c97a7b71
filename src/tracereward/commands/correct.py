"""`tracereward correct`: self-correct the traces of rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tracereward.commands.partial_output import (
    STDOUT,
    Output,
    check_output,
    complete_rows,
    is_finished,
    origin_of,
    rows_to,
    unfinished,
    write_row,
)
from tracereward.commands.questions import with_precision
from tracereward.commands.sample_guided import load_guide
from tracereward.console import note, say
from tracereward.data.labels import judge
from tracereward.data.trace_rows import candidate_rows, check_facts, gold_of
from tracereward.errors import InputError, check_choice
from tracereward.files import write_jsonl
from tracereward.generation.params import SamplingParams
from tracereward.generation.self_correction import lowest_steps, self_correct, threshold_of
from tracereward.modeling.loading import check_model
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.policy_settings import remembered
from tracereward.modeling.rendering import completion_text, render_prompt
from tracereward.modeling.tokenization import load_tokenizer, pad_id
from tracereward.rewards.first_error_rules import LevelRule, MarksSteps
from tracereward.rewards.log_prob_scorer import LogProbs
from tracereward.rewards.parts import task_of
from tracereward.rewards.records import Trace
from tracereward.rewards.settings import RewardSettings, check_reward_model

SUSPECTS = ("reward", "logprob")
"""Scores that can decide where a trace is cut."""


@dataclass(frozen=True, kw_only=True)
class Correcting:
    """Options of self-correction.

    Attributes:
        reward_model: folder or Hub id of the judge.
        rounds, k: see `self_correct`.
        suspect: one of `SUSPECTS`: the reward model's reward, or the policy's own log-prob.
        threshold: a step with a lower mean is suspected; log-odds for the reward, nats for the log-prob.
        share: share of rows with a suspected step, instead of a threshold. If neither is set, the reward model's own
            rule decides.
        task: task that checks answers; None is the reward model's.
        reference: folder or Hub id of the model whose log-prob is added to the rewards.

    Raises:
        InputError: inconsistent options.
    """

    reward_model: str
    rounds: int = 3
    k: int = 4
    suspect: str = "reward"
    threshold: float | None = None
    share: float | None = None
    task: str | None = None
    reference: str | None = None

    def __post_init__(self):
        check_choice("suspect", self.suspect, SUSPECTS)
        if self.threshold is not None and self.share is not None:
            raise InputError("--threshold and --share exclude each other: give one of them")
        if self.threshold is not None and math.isnan(self.threshold):
            raise InputError("--threshold must be a number, not nan")
        if self.suspect == "logprob" and self.threshold is None and self.share is None:
            raise InputError(
                "--suspect logprob has no default threshold: give --share 0.2 to suspect a step in that share of the "
                "traces, or --threshold, in nats"
            )

    def rule(self, settings: RewardSettings) -> MarksSteps:
        """The rule that decides where traces are cut, if no `share` is given.

        Raises:
            InputError: there is no threshold, and the reward model stores no rule, or one for rewards without the
                `reference`.
        """
        if self.threshold is None and self.reference is not None and settings.first_error is not None:
            raise InputError(
                f"{self.reward_model}: its rule for the first error was fitted for rewards without --reference: give "
                "--share 0.2 to suspect a step in that share of the traces, or --threshold"
            )
        try:
            return settings.first_error_rule(self.threshold, "--threshold")
        except InputError as error:
            raise InputError(f"{self.reward_model}: {error}") from error


def run_correct(
    model: str,
    data: str,
    correcting: Correcting,
    sampling: SamplingParams,
    *,
    output: Output = STDOUT,
) -> None:
    """Self-correct the traces in `data`, write one JSON row each and print a summary.

    Args:
        model: folder or Hub id of the policy.
        data: file of the rows.
        correcting: options of self-correction.
        sampling: how continuations are sampled.
        output: where the rows go.

    Raises:
        InputError: see `corrected_rows` and `check_output`; or the unfinished output is from another run.
    """
    check_output(output, [model, data, correcting.reward_model, correcting.reference])
    done: list[dict[str, Any]] = []
    origin = None
    if not output.to_stdout:
        options: dict[str, Any] = {**asdict(correcting), **asdict(with_precision(model, sampling))}
        del options["batch_size"], options["settings"]
        if options["dtype"] is None:
            del options["dtype"]
        models = {"model": model, "--reward-model": options.pop("reward_model")}
        models["--reference"] = options.pop("reference")
        origin = origin_of("correct", models, data, **options)
    if is_finished(output):
        return
    if part := unfinished(output, origin):
        done = finished_corrections(part, sampling.prompts_together(correcting.k))
        say(f"resuming after {len(done)} rows")
    chunks = corrected_rows(model, data, correcting, sampling, done=len(done))
    with rows_to(output, origin) as file:
        for rows in chunks:
            for row in rows:
                write_row(file, row)
            file.flush()
            done += rows
    say(correction_summary(done))


def finished_corrections(part: Path, size: int) -> list[dict[str, Any]]:
    """Rows in the complete chunks of `size` of an unfinished output; removes the rows after them."""
    rows = complete_rows(part, "sampled_tokens")
    done = rows[: len(rows) // size * size]
    write_jsonl(part, done)
    return done


def corrected_rows(
    model: str, data: str, correcting: Correcting, sampling: SamplingParams, *, done: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Self-correct the completions of rows; see `self_correct`.

    The first `done` rows (complete chunks) are skipped.

    Yields:
        For each chunk its rows: question and answer as given, prompt, completion, extracted, correct and correct_before
        (None where no answer is known), finished, length, logprob, reward, reward_before, cuts and sampled_tokens.

    Raises:
        InputError: unreadable input (raised before a model is loaded); or a trace, or a prompt with the new tokens, is
            longer than the reward model reads.
    """
    k, share = correcting.k, correcting.share
    if sampling.temperature == 0 and k > 1:
        raise InputError(f"-k is {k}: at temperature 0 all continuations are the same; use -k 1")
    settings = check_reward_model(correcting.reward_model)
    task = task_of(settings, correcting.task)
    rows = list(candidate_rows(data, template=settings.template, tokenizer=load_tokenizer(correcting.reward_model)))
    if not rows:
        raise InputError(f"{data}: no rows")
    for where, row in rows:
        check_facts(where, row)
        if "completion" not in row:
            raise InputError(f"{where}: correct needs a completion in each row; `tracereward sample` writes it")
    rule = None if share is not None else correcting.rule(settings)
    check_model(model)
    stored = remembered(model)
    if stored is not None and replace(stored.rendering, date="") != replace(settings.rendering, date=""):
        note(f"prompts as {correcting.reward_model} was trained ({settings.template}); {model} was trained on others")
    tokenizer = load_tokenizer(model)
    prompts = [render_prompt(tokenizer, row["prompt"], settings.rendering, where) for where, row in rows]
    texts = [completion_text(tokenizer, row["completion"], settings.rendering, where) for where, row in rows]
    rows = [(where, {**row, "completion": text}) for (where, row), text in zip(rows, texts)]
    guide = load_guide(
        model,
        tokenizer,
        prompts,
        reward_model=correcting.reward_model,
        sampling=sampling,
        reference=correcting.reference,
    )
    encoded = []
    for prompt, (where, row) in zip(prompts, rows, strict=True):
        finished = row.get("finished") is not False
        trace = guide.scorer.encode(Trace(where=where, prompt=prompt, completion=row["completion"], finished=finished))
        encoded.append((trace.prompt, trace.completion))
    detector = guide
    if correcting.suspect == "logprob":
        detector = replace(guide, scorer=LogProbs(guide.policy, tokenizer, settings), reference=None)
    if rule is None:
        lowest = lowest_steps(detector, [ids for ids, _ in encoded], [ids for _, ids in encoded])
        rule = LevelRule(threshold_of(lowest, float(share or 0)))
    pairs = iter(list(zip(rows, encoded, strict=True))[done:])
    while chunk := list(islice(pairs, sampling.prompts_together(k))):
        prompt_ids = [prompt for _, (prompt, _) in chunk]
        traces = [trace for _, (_, trace) in chunk]
        found = self_correct(
            guide,
            prompt_ids,
            traces,
            rounds=correcting.rounds,
            k=k,
            rule=rule,
            detector=None if detector is guide else detector,
        )
        log_probs = mean_log_probs(guide.policy, prompt_ids, [c.ids for c in found], pad_id(tokenizer))
        out = []
        for ((_, row), (_, old)), new, log_prob in zip(chunk, found, log_probs, strict=True):
            # An unchanged trace keeps its text: decoding its tokens may differ slightly.
            text = row["completion"] if new.ids == old else str(tokenizer.decode(new.ids, skip_special_tokens=True))
            gold = gold_of(row)
            before = judge(row, row["completion"], task, gold)
            # A label is of the trace as it was: it holds for an unchanged one only.
            after = before if new.ids == old else judge({}, text, task, gold)
            out.append(
                {
                    **{name: row[name] for name in ("question", "prompt") if name in row},
                    "completion": text,
                    "answer": row.get("answer"),
                    "extracted": after.answer,
                    "correct_before": before.correct,
                    "correct": after.correct,
                    "finished": new.finished,
                    "length": len(new.ids),
                    "logprob": log_prob,
                    "reward": new.reward,
                    "reward_before": new.reward_before,
                    "cuts": new.cuts,
                    "sampled_tokens": new.sampled_tokens,
                }
            )
        yield out


def correction_summary(rows: Sequence[dict[str, Any]]) -> str:
    """Summary of self-correction in one or two sentences.

    Args:
        rows: as of `corrected_rows`; only numbers and flags are read.
    """
    tokens = sum(row["sampled_tokens"] for row in rows)
    changed = sum(row["reward"] > row["reward_before"] for row in rows)
    text = f"{len(rows)} traces, {changed} changed, {tokens} tokens sampled"
    pairs = [(row["correct_before"], row["correct"]) for row in rows]
    known = [pair for pair in pairs if None not in pair]
    if known:
        before, after = (sum(pair[side] for pair in known) for side in (0, 1))
        broken, repaired = known.count((True, False)), known.count((False, True))
        text += f"; of {len(known)} with a known answer {before} right before, {after} right after"
        text += f" ({repaired} repaired, {broken} broken)"
    return text
