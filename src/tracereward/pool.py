"""Files of candidates: drawing them from a policy, scoring them, and choosing among them."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tracereward.alignment import join_steps
from tracereward.demonstrations import load_demonstrations, render
from tracereward.errors import InputError, check_choice
from tracereward.models import check_model, load_tokenizer, same_tokenizer
from tracereward.reading import read_rows
from tracereward.rerank import Candidate, choose, ranking_aurocs, ranking_table
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import RewardSettings, check_reward_model
from tracereward.sampling import Sample, sample
from tracereward.scorer import Scorer
from tracereward.scores import AGGREGATES, TokenScores
from tracereward.tasks import Task, get_task

ENGINES = ("transformers", "vllm")
CHUNK = 256  # rows scored together: enough to sort by length, few enough to see that it goes on


def best_device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def check_engine(model: str, engine: str) -> RewardSettings:
    """Settings of a reward model that `engine` can run; loads nothing.

    Raises:
        InputError: there is no such engine, it is not installed, or it cannot run this model.
    """
    check_choice("engine", engine, ENGINES)
    if engine == "vllm":
        from tracereward.vllm_scorer import check_vllm

        return check_vllm(model)
    return check_reward_model(model)


def load_scorer(model: str, engine: str) -> Scorer:
    """A reward model that is ready to score, on the accelerator if there is one."""
    if engine == "vllm":
        from tracereward.vllm_scorer import VllmScorer

        return VllmScorer(model)
    return TokenRewardModel.from_pretrained(model).to(best_device())


def sample_rows(
    model: str,
    data: str | None,
    task_name: str,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    split: str = "test",
    template: str = "plain",
    batch_size: int = 64,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Completions of a set's prompts, as rows; see `sampling.sample`.

    Yields:
        For each chunk of prompts, rows with question (its number), prompt, completion, answer (gold), extracted,
        correct, finished, length (in tokens), logprob.

    Raises:
        InputError: before the model is loaded, if anything cannot be read.
    """
    if temperature == 0 and n > 1:
        raise InputError(f"n is {n}: at temperature 0 all completions of a prompt are the same; use -n 1")
    rows, prompts, tokenizer = load_questions(model, data, task_name, limit, split, template)
    policy = load_policy(model)
    size = max(1, batch_size // n)
    for chunk in sample(
        policy, tokenizer, prompts, n, max_new_tokens, temperature, top_p, seed, batch_size, first_chunk=done // size
    ):
        yield [sample_row(s, rows[s.prompt], get_task(task_name)) for s in chunk]


def load_questions(
    model: str, data: str | None, task_name: str, limit: int | None, split: str, template: str
) -> tuple[list[dict[str, Any]], list[str], PreTrainedTokenizerBase]:
    """The questions to draw completions of, their rendered prompts and the policy's tokenizer; loads no model.

    Raises:
        InputError: anything cannot be read.
    """
    task = get_task(task_name)
    source = data or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no set of its own: give --data, a file or a Hub id")
    subset = task.subset if data in (None, task.dataset) else None
    rows = load_demonstrations(source, task, split, subset, limit, require_completion=False)
    check_model(model)
    tokenizer = load_tokenizer(model)
    prompts = [row["prompt"] for row in render([{**row, "completion": None} for row in rows], tokenizer, template)]
    return rows, prompts, tokenizer


def load_policy(model: str) -> PreTrainedModel:
    """A causal LM, on the accelerator if there is one."""
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(best_device())  # pyright: ignore[reportArgumentType]


def sample_row(drawn: Sample, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """What `sample` writes of one completion of the question in `row`."""
    return {
        "question": drawn.prompt,
        "prompt": row["prompt"],
        "completion": drawn.text,
        "answer": row["answer"],
        "extracted": task.extract(drawn.text),
        "correct": None if row["answer"] is None else task.verify(drawn.text, row["answer"]),
        "finished": drawn.finished,
        "length": len(drawn.ids),
        "logprob": drawn.logprob,
    }


def candidate_rows(source: str, split: str = "train", skipped: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Rows with a prompt and a completion, candidates (a list of texts) or steps (a list of texts, joined later).

    Args:
        source: file or Hub id.
        split: of a Hub set.
        skipped: takes what is wrong with each bad row, which is then left out; None makes the first one fatal.

    Raises:
        InputError: a row without them, by file and line.
    """
    for where, row in read_rows(source, split, skipped=skipped):
        wrong = _what_is_wrong(row)
        if wrong is None:
            yield where, row
        elif skipped is None:
            raise InputError(f"{where}: {wrong}")
        else:
            skipped.append(f"{where}: {wrong}")


def _what_is_wrong(row: dict[str, Any]) -> str | None:
    """Why a row cannot be scored; None if it can."""
    if not row.get("prompt"):
        return "no prompt"
    if "steps" in row and "completion" not in row and "candidates" not in row:
        steps = row["steps"]
        whole = isinstance(steps, list) and steps and all(isinstance(step, str) and step.strip() for step in steps)
        return None if whole else "steps must be a list of texts that are not empty"
    traces = row["candidates"] if "candidates" in row else [row.get("completion")]
    ended_at_once = row.get("finished") is True  # a policy's trace of nothing but the end-of-sequence token
    if (
        not isinstance(traces, list)
        or not traces
        or not all(isinstance(trace, str) and (trace or ended_at_once) for trace in traces)
    ):
        return "needs a completion, or candidates or steps, a list of texts that are not empty"
    return None


def score_rows(
    model: Scorer,
    rows: Iterable[tuple[str, dict[str, Any]]],
    reference: PreTrainedModel | None = None,
    policy: PreTrainedModel | None = None,
    skipped: list[str] | None = None,
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """The same rows in the same order with their scores (`as_row`); of several candidates a list of them in `scores`.

    Rows are read and scored `CHUNK` at a time, so that a million take no more memory than a thousand.

    Args:
        model: the reward model.
        rows: as `candidate_rows` yields them.
        reference: as in `Scorer.score`.
        policy: as in `Scorer.score`.
        skipped: takes what is wrong with each row too long for the model, which is then left out; None makes it fatal.
        done: how many rows that can be scored are left out at the start, since an earlier run has scored them. A chunk
            that it scored in part is scored whole once more: other neighbours would change the last digits.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        kept: list[tuple[dict[str, Any], int, list[tuple[int, int]]]] = []
        ids: list[tuple[list[int], list[int]]] = []
        for where, row in chunk:
            source = {"prompt": row["prompt"], "completion": None, "answer": None, "source": where}
            traces, spans = traces_of(row, model.settings.step_delimiter)
            ended = bool(row.get("finished", True))
            try:
                rendered = render([source], model.tokenizer, model.settings.template)[0]["prompt"]
                encoded = [model.check_length(where, rendered, trace, ended) for trace in traces]
            except InputError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
                continue
            kept.append((row, len(traces), spans))
            ids += encoded
        if done >= len(kept):
            done -= len(kept)
            continue
        prompts, completions = [prompt for prompt, _ in ids], [completion for _, completion in ids]
        scores = iter(model.score_ids(prompts, completions, reference=reference, policy=policy))
        for index, (row, count, spans) in enumerate(kept):
            traces = [next(scores) for _ in range(count)]
            scored = [as_row(trace, model) for trace in traces]
            if spans:
                scored[0]["step_rewards"] = traces[0].span_rewards(spans)
            if index >= done:
                yield {**row, "scores": scored} if "candidates" in row else {**row, **scored[0]}
        done = 0


def traces_of(row: dict[str, Any], delimiter: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The texts of a row that `candidate_rows` let through, and of a row of steps the characters of each."""
    if "candidates" in row:
        return row["candidates"], []
    if "completion" in row:
        return [row["completion"]], []
    text, spans = join_steps(row["steps"], delimiter)
    return [text], spans


def load_beside(model: Scorer, name: str | None) -> PreTrainedModel | None:
    """A causal LM whose log-probs enter a reward model's rewards; None for no name.

    Raises:
        InputError: it has another tokenizer.
    """
    if name is None:
        return None
    if not same_tokenizer(model.tokenizer, load_tokenizer(name)):
        raise InputError(f"{name} has another tokenizer than the reward model: its log-probs are of other tokens")
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(best_device()).eval()  # pyright: ignore[reportArgumentType]


def as_row(scores: TokenScores, model: Scorer) -> dict[str, Any]:
    """What `score` writes of one trace: its reward, the probability that it is right where the model is calibrated,
    every aggregate, the steps' rewards, and for each token its text, place, reward and whether it ends a step."""
    reward = scores.aggregate(model.settings.aggregate)
    calibration = model.settings.calibration
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


def candidates_of(rows: list[dict[str, Any]], task: Task) -> list[Candidate]:
    """One question's scored rows as candidates; answers are extracted, and verified where the gold one is known."""
    candidates = []
    for row in rows:
        gold, text = row.get("answer"), row["completion"]
        correct = row.get("correct")
        if gold is not None:
            correct = task.verify(text, gold)
        candidates.append(Candidate(text, task.extract(text), row["reward"], row.get("logprob"), len(text), correct))
    return candidates


def rerank_rows(
    scored: Iterable[dict[str, Any]], task: Task, method: str
) -> tuple[list[dict[str, Any]], list[list[Candidate]]]:
    """The chosen row of each question, and all questions' candidates. Rows of a question stand together."""
    chosen, questions = [], []
    for _, group in groupby(scored, key=lambda row: (row.get("question"), json.dumps(row["prompt"]))):
        rows = list(group)
        candidates = candidates_of(rows, task)
        row = rows[choose(candidates, method, task.equal)]
        kept = {name: row[name] for name in ("question", "prompt", "completion", "answer", "reward") if name in row}
        chosen.append({**kept, "extracted": task.extract(row["completion"]), "method": method, "of": len(rows)})
        questions.append(candidates)
    return chosen, questions


def summary(questions: list[list[Candidate]], task: Task) -> dict[str, Any] | None:
    """Accuracies and AUROCs where correctness is known for all candidates, else None."""
    if any(c.correct is None for candidates in questions for c in candidates):
        return None
    rows = ranking_table(questions, task.equal)
    return {
        "questions": len(questions),
        "no_answer": sum(c.answer is None for candidates in questions for c in candidates),
        "accuracy": {row.label: [row.accuracy, row.low, row.high] for row in rows},
        # JSON has no nan: an AUROC is undefined where all candidates are right, or all wrong.
        **{name: None if math.isnan(value) else value for name, value in ranking_aurocs(questions).items()},
    }


def rows_to_inspect(
    data: str, model: str | None, task: str | None, reference: str | None, policy: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """Rows with scores, which `score` wrote or `model` gives now, with their answers found and checked.

    Raises:
        InputError: rows without scores and no model, or anything that cannot be read.
    """
    rows = list(islice(read_rows(data), limit))
    if not rows:
        raise InputError(f"{data}: no rows")
    bare = [where for where, row in rows if "token_rewards" not in row and "scores" not in row]
    recipe = get_task(task) if task else None
    scored = [row for _, row in rows]
    if bare:
        if model is None:
            raise InputError(f"{bare[0]}: no scores; give --model, or rows that `tracereward score` wrote")
        settings = check_reward_model(model)
        recipe = recipe or get_task(settings.task)
        checked = list(islice(candidate_rows(data), limit))
        reward_model = TokenRewardModel.from_pretrained(model).to(best_device())
        delimiter = reward_model.settings.step_delimiter
        beside = load_beside(reward_model, reference), load_beside(reward_model, policy)
        scored = [
            {**row, "completion": traces_of(row, delimiter)[0][0]} if "steps" in row else row
            for row in score_rows(reward_model, checked, *beside)
        ]
    for row in scored:
        if recipe is not None and isinstance(row.get("completion"), str):
            row.setdefault("extracted", recipe.extract(row["completion"]))
            if row.get("answer") is not None:
                row.setdefault("correct", recipe.verify(row["completion"], str(row["answer"])))
    return scored
