"""Files of candidates: drawing them from a policy, scoring them, and choosing among them."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tracereward.demonstrations import load_demonstrations, render
from tracereward.errors import InputError, RunFailed, check_choice
from tracereward.models import check_model, load_tokenizer, same_tokenizer
from tracereward.reading import read_rows
from tracereward.rerank import Candidate, choose, ranking_aurocs, ranking_table
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import RewardSettings, check_policy, check_reward_model
from tracereward.sampling import Sample, sample
from tracereward.scored_rows import check_scores, traces_in
from tracereward.scorer import Scorer
from tracereward.scores import AGGREGATES, TokenScores
from tracereward.tasks import Task, get_task
from tracereward.traces import candidate_rows, check_facts, gold_of, traces_of

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


def check_drawing(temperature: float, top_p: float) -> None:
    """Refuse what tokens cannot be drawn by.

    Raises:
        InputError: names the option.
    """
    if not 0 <= temperature < math.inf:  # nan is not either
        raise InputError(f"--temperature must be a number from 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p must be over 0 and at most 1, not {top_p}")


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
    check_drawing(temperature, top_p)
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
            source = {"prompt": row["prompt"], "completion": None, "answer": None, "source": where}
            traces, ended, spans = traces_of(row, model.settings.step_delimiter)
            try:
                rendered = render([source], model.tokenizer, model.settings.template)[0]["prompt"]
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
            if not all(math.isfinite(reward) for trace in found for reward in trace.rewards):
                raise RunFailed(f"{where}: the model gives rewards that are not finite: its weights may be damaged")
            scored = [as_row(trace, model, calibrated) for trace in found]
            if spans:
                scored[0] |= {"completion": traces[0], "step_rewards": found[0].span_rewards(spans)}
            if index >= done:
                yield {**row, "scores": scored} if "candidates" in row else {**row, **scored[0]}
        done = 0


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


def candidate_of(row: dict[str, Any], task: Task) -> Candidate:
    """A scored row as a candidate; its answer is extracted, and verified where the gold one is known."""
    text, gold, correct = row["completion"], gold_of(row), row.get("correct")
    correct = task.verify(text, gold) if gold is not None else None if correct is None else bool(correct)
    return Candidate(text, task.extract(text), row["reward"], row.get("logprob"), len(text), correct)


def rerank_rows(
    scored: Iterable[dict[str, Any]], task: Task, method: str
) -> tuple[list[dict[str, Any]], list[list[Candidate]]]:
    """The chosen row of each question, in the order in which questions first come, and all questions' candidates."""
    groups: dict[str, list[tuple[dict[str, Any], Candidate]]] = {}
    for row in scored:
        kept = {name: row[name] for name in ("question", "prompt", "completion", "answer", "reward") if name in row}
        key = json.dumps([row.get("question"), row["prompt"]])
        groups.setdefault(key, []).append((kept, candidate_of(row, task)))
    chosen, questions = [], []
    for group in groups.values():
        candidates = [candidate for _, candidate in group]
        best = choose(candidates, method, task.equal)
        found = {"extracted": candidates[best].answer, "method": method, "of": len(group)}
        chosen.append({**group[best][0], **found})
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
    bare = [where for where, row in rows if ("scores" if "candidates" in row else "token_rewards") not in row]
    recipe = get_task(task) if task else None
    scored = [row for _, row in rows]
    if bare:
        if model is None:
            raise InputError(f"{bare[0]}: no scores; give --model, or rows that `tracereward score` wrote")
        settings = check_reward_model(model)
        check_policy(settings, policy)
        for other in (reference, policy):
            if other is not None:
                check_model(other)
        recipe = recipe or get_task(settings.task)
        checked = list(islice(candidate_rows(data, template=settings.template), limit))
        for where, row in checked:
            check_facts(where, row)
        reward_model = TokenRewardModel.from_pretrained(model).to(best_device())
        beside = load_beside(reward_model, reference), load_beside(reward_model, policy)
        scored = list(score_rows(reward_model, checked, *beside))
    else:
        for where, row in rows:
            if "candidates" in row and not _fit(row["candidates"], row["scores"]):
                raise InputError(f"{where}: scores must be a list with the scores of each of the candidates")
            for trace in traces_in(row):
                check_scores(where, trace)
    if recipe is None:
        return scored
    for row in scored:
        for text, found in zip(row["candidates"], row["scores"]) if "candidates" in row else [(row["completion"], row)]:
            found.setdefault("extracted", recipe.extract(text))
            if (gold := gold_of(row)) is not None:
                found.setdefault("correct", recipe.verify(text, gold))
    return scored


def _fit(candidates: Any, scores: Any) -> bool:
    """Whether scores are one record for each candidate."""
    lists = isinstance(candidates, list) and isinstance(scores, list) and len(candidates) == len(scores)
    return lists and all(isinstance(record, dict) for record in scores)
