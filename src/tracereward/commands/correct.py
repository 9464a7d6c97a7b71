"""`tracereward correct`: rows whose traces are self-corrected."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tracereward.commands.guided import load_guide
from tracereward.commands.partial_output import whole_rows
from tracereward.commands.sample import check_drawing
from tracereward.data.trace_rows import candidate_rows, check_facts, gold_of
from tracereward.errors import InputError, check_choice
from tracereward.files import write_jsonl
from tracereward.generation.self_correction import lowest_steps, self_correct, threshold_of
from tracereward.modeling.loading import check_model
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import load_tokenizer, pad_id, render_prompt
from tracereward.rewards.log_prob_scorer import LogProbs
from tracereward.rewards.scoring import Trace
from tracereward.rewards.settings import check_reward_model
from tracereward.tasks import get_task

SUSPECTS = ("reward", "logprob")
"""What may say where a trace is to be cut."""


def finished_corrections(part: Path, batch_size: int, k: int) -> list[dict[str, Any]]:
    """Rows of the whole chunks in an unfinished output; those behind them are removed from it."""
    rows, size = whole_rows(part, "sampled_tokens"), max(1, batch_size // k)
    whole = rows[: len(rows) // size * size]
    write_jsonl(part, whole)
    return whole


def corrected_rows(
    model: str,
    data: str,
    reward_model: str,
    rounds: int,
    k: int,
    suspect: str,
    threshold: float | None,
    share: float | None,
    task_name: str | None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    reference: str | None = None,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Rows with a prompt and a completion, self-corrected; see `correct.self_correct`.

    Args:
        model: folder or Hub id of the policy, which draws.
        data: file of the rows.
        reward_model: folder or Hub id of what judges.
        rounds, k: see there.
        suspect: one of `SUSPECTS`: the reward model's reward, or the policy's own log-prob.
        threshold: of a step's mean, in log-odds for the reward and in nats for the log-prob.
        share: in its place, of the rows in which a step is to be suspected. Neither: 0 for the reward.
        task_name: recipe that checks answers; None: the reward model's.
        max_new_tokens: length limit of a trace.
        temperature, top_p, seed, batch_size, reference: see `Guide`.
        done: first rows, whole chunks of them, that are left out.

    Yields:
        For each chunk its rows: question and answer as given, prompt, completion, extracted, correct and correct_before
        (None where no answer is known), finished, length, logprob, reward, reward_before, cuts and sampled_tokens.

    Raises:
        InputError: before a model is loaded, if anything cannot be read; a trace or a prompt with `max_new_tokens` more
            is longer than the reward model reads.
    """
    check_drawing(temperature, top_p)
    if temperature == 0 and k > 1:
        raise InputError(f"-k is {k}: at temperature 0 all continuations are the same; use -k 1")
    check_choice("suspect", suspect, SUSPECTS)
    if threshold is not None and share is not None:
        raise InputError("--threshold and --share say the same in two ways: give one of them")
    if threshold is not None and math.isnan(threshold):
        raise InputError("--threshold must be a number, not nan")
    if suspect == "logprob" and threshold is None and share is None:
        raise InputError(
            "what a low log-prob is depends on the policy: give --share 0.2 to suspect a step in that share of the "
            "traces, or --threshold, in nats"
        )
    settings = check_reward_model(reward_model)
    task = get_task(task_name or settings.task)
    rows = list(candidate_rows(data, template=settings.template))
    if not rows:
        raise InputError(f"{data}: no rows")
    for where, row in rows:
        check_facts(where, row)
        if "completion" not in row:
            raise InputError(f"{where}: correct needs a completion in each row; `tracereward sample` writes it")
    check_model(model)
    tokenizer = load_tokenizer(model)
    prompts = [render_prompt(tokenizer, row["prompt"], settings.template, where) for where, row in rows]
    given = {"temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    guide = load_guide(model, tokenizer, reward_model, prompts, max_new_tokens, reference, **given)
    encoded = []
    for prompt, (where, row) in zip(prompts, rows, strict=True):
        finished = row.get("finished") is not False
        trace = guide.scorer.encode(Trace(where=where, prompt=prompt, completion=row["completion"], finished=finished))
        encoded.append((trace.prompt, trace.completion))
    detector = guide
    if suspect == "logprob":
        detector = replace(guide, scorer=LogProbs(guide.policy, tokenizer, settings), reference=None)
    if share is not None:
        lowest = lowest_steps(detector, [ids for ids, _ in encoded], [ids for _, ids in encoded])
        threshold = threshold_of(lowest, share)
    cut_under = threshold or 0.0
    pairs = iter(list(zip(rows, encoded, strict=True))[done:])
    while chunk := list(islice(pairs, max(1, batch_size // k))):
        asked = [prompt for _, (prompt, _) in chunk]
        traces = [trace for _, (_, trace) in chunk]
        found = self_correct(guide, asked, traces, rounds, k, cut_under, None if detector is guide else detector)
        log_probs = mean_log_probs(guide.policy, asked, [c.ids for c in found], pad_id(tokenizer))
        out = []
        for ((_, row), (_, old)), new, log_prob in zip(chunk, found, log_probs, strict=True):
            # A trace that was left alone keeps its text: its tokens may spell it a little differently.
            text = row["completion"] if new.ids == old else str(tokenizer.decode(new.ids, skip_special_tokens=True))
            gold = gold_of(row)
            out.append(
                {
                    **{name: row[name] for name in ("question", "prompt") if name in row},
                    "completion": text,
                    "answer": row.get("answer"),
                    "extracted": task.extract(text),
                    "correct_before": None if gold is None else task.verify(row["completion"], gold),
                    "correct": None if gold is None else task.verify(text, gold),
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
    """What self-correction did, in a sentence or two.

    Args:
        rows: as `corrected_rows` makes them, or only their numbers and flags.
    """
    tokens = sum(row["sampled_tokens"] for row in rows)
    changed = sum(row["reward"] > row["reward_before"] for row in rows)
    text = f"{len(rows)} traces, {changed} changed, {tokens} tokens drawn"
    known = [(row["correct_before"], row["correct"]) for row in rows if row["correct"] is not None]
    if known:
        before, after = (sum(pair[side] for pair in known) for side in (0, 1))
        broken, repaired = known.count((True, False)), known.count((False, True))
        text += f"; of {len(known)} with a known answer {before} right before, {after} right after"
        text += f" ({repaired} repaired, {broken} broken)"
    return text
