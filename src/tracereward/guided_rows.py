"""Files of questions and traces, through guided decoding and self-correction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward import decode
from tracereward.correct import lowest_steps, self_correct, threshold_of
from tracereward.demonstrations import render
from tracereward.errors import InputError, check_choice
from tracereward.files import write_jsonl
from tracereward.guide import Guide, Guided, check_tokenizers
from tracereward.log_probs import LogProbs
from tracereward.models import check_model, load_tokenizer, local_folder, pad_id
from tracereward.outputs import whole_rows
from tracereward.pool import best_device, check_drawing, load_beside, load_policy, load_questions, sample_row
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import check_reward_model
from tracereward.sampling import mean_log_probs
from tracereward.tasks import get_task
from tracereward.traces import candidate_rows, check_facts, gold_of

OPTIONS = {
    "beam": {"beam": 4, "expansions": 4, "lookahead": 0},
    "reject": {"n": 8, "keep": 1},
    "tilt": {"n": 8, "alpha": 1.0, "top_k": 8},
}
"""What each method of `decode.GUIDES` is given, and the defaults."""
SUSPECTS = ("reward", "logprob")
"""What may say where a trace is to be cut."""


def guide_options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, defaults filled in; those in `given` that are None were not given.

    Raises:
        InputError: there is no such method, one of the options belongs to another, or has no such value.
    """
    check_choice("guide", method, decode.GUIDES)
    known = OPTIONS[method]
    for name, value in given.items():
        if value is not None and name not in known:
            owner = " and ".join(other for other, names in OPTIONS.items() if name in names)
            dash = "-" if len(name) == 1 else "--"
            raise InputError(f"{dash}{name.replace('_', '-')} is of --guide {owner}, not of {method}")
    options = {name: default if given.get(name) is None else given[name] for name, default in known.items()}
    if method == "reject" and options["keep"] > options["n"]:
        raise InputError(f"--keep {options['keep']}: only -n {options['n']} traces are drawn")
    if method == "tilt" and not math.isfinite(options["alpha"]):
        raise InputError(f"--alpha must be a finite number, not {options['alpha']}")
    return options


def run_guide(guide: Guide, method: str, prompts: Sequence[str], options: dict[str, Any]) -> list[list[Guided]]:
    """Each prompt's traces by one of `decode.GUIDES`; `options` as `guide_options` gives them."""
    if method == "beam":
        return decode.beam(guide, prompts, options["beam"], options["expansions"], options["lookahead"])
    if method == "reject":
        return decode.reject(guide, prompts, options["n"], options["keep"])
    return decode.tilt(guide, prompts, options["n"], options["alpha"], options["top_k"])


def traces_at_once(method: str, options: dict[str, Any]) -> int:
    """Traces of one prompt that are drawn together."""
    return options["beam"] * options["expansions"] if method == "beam" else options["n"]


def chunk_size(method: str, options: dict[str, Any], batch_size: int) -> int:
    """Questions that are guided together."""
    return max(1, batch_size // traces_at_once(method, options))


def finished_guided(part: Path, method: str, options: dict[str, Any], batch_size: int) -> int:
    """Questions in an unfinished output whose whole chunk is there; rows behind them are removed from it."""
    rows, size = whole_rows(part, "question"), chunk_size(method, options, batch_size)
    whole = rows[-1]["question"] // size * size if rows else 0  # a question may have fewer traces than were asked for
    write_jsonl(part, [row for row in rows if row["question"] < whole])
    return whole


def finished_corrections(part: Path, batch_size: int, k: int) -> list[dict[str, Any]]:
    """Rows of the whole chunks in an unfinished output; those behind them are removed from it."""
    rows, size = whole_rows(part, "sampled_tokens"), max(1, batch_size // k)
    whole = rows[: len(rows) // size * size]
    write_jsonl(part, whole)
    return whole


def check_template(reward_model: str, template: str) -> None:
    """That prompts are rendered as those that a reward model was trained on.

    Raises:
        InputError: they are not, or there is no such reward model.
    """
    settings = check_reward_model(reward_model)
    if template != settings.template:
        raise InputError(f"{reward_model} was trained on prompts by --template {settings.template}, not {template}")


def load_guide(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    reference: str | None = None,
    **given: Any,
) -> Guide:
    """A policy and a reward model, on the accelerator if there is one.

    Args:
        model: folder or Hub id of the policy.
        tokenizer: its tokenizer.
        reward_model: folder or Hub id.
        prompts: rendered; all are measured.
        max_new_tokens: length limit of a trace.
        reference: folder or Hub id of the model whose log-prob is added to the rewards.
        **given: other fields of `Guide`.

    Raises:
        InputError: their tokenizers differ (said before either is loaded), or a prompt leaves too little room.
    """
    check_tokenizers(tokenizer, load_tokenizer(str(local_folder(reward_model))))
    if reference is not None:
        check_model(reference)
    scorer = TokenRewardModel.from_pretrained(reward_model).to(best_device())
    beside = load_beside(scorer, reference)
    guide = Guide(load_policy(model), tokenizer, scorer, max_new_tokens, reference=beside, **given)
    guide.encode(prompts)
    return guide


def guided_rows(
    model: str,
    reward_model: str,
    method: str,
    options: dict[str, Any],
    data: str | None,
    task_name: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    split: str = "test",
    template: str = "plain",
    batch_size: int = 64,
    reference: str | None = None,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Guided completions of a set's prompts: rows as `pool.sample_rows` makes them, with reward and sampled_tokens.

    The first `done` questions, whole chunks of them, are left out.

    Yields:
        For each chunk of questions its rows; those of a question stand together, by reward from the highest.

    Raises:
        InputError: before a model is loaded, if anything cannot be read or does not fit.
    """
    check_drawing(temperature, top_p)
    at_once = traces_at_once(method, options)
    if temperature == 0 and at_once > 1:
        raise InputError(f"at temperature 0 all draws are the same: --guide {method} would draw {at_once}")
    check_template(reward_model, template)
    rows, prompts, tokenizer = load_questions(model, data, task_name, limit, split, template)
    given = {"temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    guide = load_guide(model, tokenizer, reward_model, prompts, max_new_tokens, reference, **given)
    size = chunk_size(method, options, batch_size)
    for start in range(done, len(prompts), size):
        found = run_guide(guide, method, prompts[start : start + size], options)
        yield [
            {
                **sample_row(trace, rows[start + trace.prompt], get_task(task_name)),
                "question": start + trace.prompt,
                "reward": trace.reward,
                "sampled_tokens": trace.sampled_tokens,
            }
            for traces in found
            for trace in traces
        ]


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
    bare = [{"prompt": row["prompt"], "completion": None, "answer": None, "source": where} for where, row in rows]
    prompts = [row["prompt"] for row in render(bare, tokenizer, settings.template)]
    given = {"temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    guide = load_guide(model, tokenizer, reward_model, prompts, max_new_tokens, reference, **given)
    encoded = [
        guide.scorer.check_length(where, prompt, row["completion"], row.get("finished") is not False)
        for prompt, (where, row) in zip(prompts, rows, strict=True)
    ]
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
