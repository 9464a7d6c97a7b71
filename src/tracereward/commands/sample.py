"""`tracereward sample`: completions of a policy, plain or guided by a reward model, as rows."""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tracereward.commands.partial_output import (
    STDOUT,
    Output,
    check_output,
    finished_questions,
    is_finished,
    of_stream,
    origin_of,
    rows_to,
    unfinished,
    write_row,
)
from tracereward.commands.questions import (
    Questions,
    in_force,
    in_force_at,
    load_questions,
    read_questions,
    sample_row,
    server_prompts,
    task_reading,
    with_precision,
)
from tracereward.commands.sample_guided import Guidance, finished_guided, guided_rows
from tracereward.commands.sample_stream import first_window
from tracereward.console import note, say
from tracereward.data.readers import STDIN
from tracereward.errors import InputError, RunFailed
from tracereward.generation.engine import Engine, EngineOptions, Prompt, TransformersEngine, Unanswered
from tracereward.generation.params import SamplingParams
from tracereward.generation.server_engine import ServerEngine
from tracereward.generation.vllm_engine import COMPLETIONS, VllmEngine, check_vllm
from tracereward.modeling.loading import best_device, context_length, load_causal_lm, read_config
from tracereward.modeling.precision import reading_precision
from tracereward.modeling.tokenization import encode_prompt
from tracereward.rewards.settings import check_reward_model
from tracereward.tasks.recipes import Task, get_task

TRANSFORMERS = EngineOptions()
STREAMED_POSITIONS = 32768
"""Longest prompt with completion that vLLM reserves memory for, of a stream, where the longest prompt is not known."""
MENTIONED = 5
"""Questions that a message names."""


def run_sample(
    model: str,
    questions: Questions,
    sampling: SamplingParams,
    *,
    n: int = 8,
    guidance: Guidance | None = None,
    engine: EngineOptions = TRANSFORMERS,
    output: Output = STDOUT,
) -> None:
    """Sample completions and write one JSON row each.

    Args:
        model: folder or Hub id of the policy, or its name at the server.
        questions: the questions to sample for.
        sampling: how to sample.
        n: completions of each question; unused if guided, where the method sets it.
        guidance: decode with a reward model.
        engine: where to sample; unused if guided.
        output: where the rows go.

    Raises:
        InputError: unreadable or inconsistent input, the output may not be replaced (see `check_output`), or the
            unfinished one is from another run.
        RunFailed: a server has not answered all questions; the rows of the others are kept.
    """
    output = of_stream(output, questions.data)
    rest: Iterable[Questions] = ()
    if questions.streamed:
        if guidance is not None:
            raise InputError("--guide reads all questions first: give them as a file, without --stream")
        questions, rest = first_window(questions, model, engine, size=_window(engine, sampling, n))
    models = {"model": model, "--reward-model": None, "--reference": None}
    if guidance is None:
        questions, engine = in_force_at(engine, questions, model)
    else:
        questions = in_force(questions, model, check_reward_model(guidance.reward_model))
    if not engine.is_server:
        sampling = with_precision(model, sampling)
    data, options = questions.data, {**questions.options, **asdict(sampling)}
    if sampling.dtype is None:
        del options["dtype"]
    if not sampling.settings:  # outputs of earlier versions have none
        del options["settings"]
    if guidance is None:  # a batch has one random seed, so rows depend on its size
        options["n"] = n
    else:
        models |= {"--reward-model": guidance.reward_model, "--reference": guidance.reference}
        del options["batch_size"]
        options |= {"guide": guidance.method.name, **asdict(guidance.method)}
    if engine.name != "transformers":
        del options["batch_size"]
        options["engine"] = "vllm"
    check_output(output, [data, *models.values()])
    if engine.is_server:  # whose address may change
        models["model"] = None
        options |= {"engine": "a server", "model": model, "api": engine.api}
    origin = None if output.to_stdout or data == STDIN else origin_of("sample", models, data, **options)
    done: Set[int] = set()
    if is_finished(output):
        return
    if part := unfinished(output, origin):
        if guidance is None:
            done = finished_questions(part, n, engine.questions_together(sampling, n))
        else:
            done = {*range(finished_guided(part, sampling.prompts_together(guidance.method.at_once)))}
        say(f"resuming after {len(done)} questions")
    if guidance is None:
        chunks = sample_rows(model, questions, sampling, n=n, done=done, engine=engine, rest=rest)
    else:
        chunks = guided_rows(model, questions, sampling, guidance, done=len(done))
    if output.to_stdout and engine.is_server:
        chunks = in_order(chunks)
    right = wrong = 0
    # With a delay the bar appears after the first chunk, not above a message about the input.
    total = len(read_questions(questions)) if questions.rows is None else None
    progress = tqdm(desc="questions", total=total, initial=len(done), unit="", delay=0.1)
    with progress, rows_to(output, origin, sorted_by="question") as file:
        for rows in chunks:
            for row in rows:
                write_row(file, row)
                right += row["correct"] is True
                wrong += row["correct"] is False
            file.flush()
            progress.update(len({row["question"] for row in rows}))
    if right + wrong:
        earlier = f" sampled now, without the {len(done)} questions of before" if done else ""
        say(f"{right} of {right + wrong} samples{earlier} have the right answer ({right / (right + wrong):.1%})")


def _window(engine: EngineOptions, sampling: SamplingParams, n: int) -> int:
    """Questions that are read before they are sampled, of a stream: one batch of transformers, several of others."""
    together = engine.questions_together(sampling, n)
    return together if engine.name == "transformers" else max(1, COMPLETIONS // n)


def in_order(chunks: Iterator[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Chunks of one question each in the order of the questions; those after one that fails come last."""
    early: dict[int, list[dict[str, Any]]] = {}
    following = 0
    try:
        for rows in chunks:
            early[rows[0]["question"]] = rows
            while following in early:
                yield early.pop(following)
                following += 1
    except RunFailed:
        yield from (early[question] for question in sorted(early))
        raise


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A set of questions and the engine that samples for them.

    Attributes:
        engine: loaded, or connected.
        rows: the questions.
        prompts: what the engine is given for each.
        task: checks the answers.
        tokenizer: that renders the prompts; None if the server does.
        before: number of questions before these, in a stream; None if these are all.
    """

    engine: Engine
    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Prompt]
    task: Task
    tokenizer: PreTrainedTokenizerBase | None = None
    before: int | None = None

    def sample(
        self, sampling: SamplingParams, *, n: int, done: Set[int] = frozenset()
    ) -> Iterator[list[dict[str, Any]]]:
        """Completions of the questions that are not in `done` as rows; see `sample_rows`. Says at the end what it cost.

        Raises:
            InputError: none of the questions is answered.
            RunFailed: some are not; raised after the rows of all others.
        """
        if sampling.temperature == 0 and n > 1:
            raise InputError(f"n is {n}: at temperature 0 all completions of a prompt are the same; use -n 1")
        answered, first = len(done), self.before or 0
        try:
            for chunk in self.engine.sample(self.prompts, sampling, n=n, done=done, before=self.before):
                yield [sample_row(s, self.rows[s.prompt - first], self.task) for s in chunk]
                answered += len({s.prompt for s in chunk})
        except Unanswered as error:
            failed = [f"{self.rows[index - first]['source']}: {why}" for index, why in sorted(error.reasons.items())]
            more = f"; and {len(failed) - MENTIONED} more" if len(failed) > MENTIONED else ""
            text = "; ".join(failed[:MENTIONED]) + more
            if not answered and not first:
                raise InputError(f"no question is answered: {text}") from error
            given_up = " in a row, so that no more are asked" if error.given_up else ""
            raise RunFailed(f"{len(failed)} of {len(self.rows)} questions have failed{given_up}: {text}") from error
        finally:
            if cost := self.engine.cost():
                note(cost)


def load_sampler(
    model: str, questions: Questions, sampling: SamplingParams, engine: EngineOptions = TRANSFORMERS
) -> Sampler:
    """Read the questions, and load the policy or reach the server.

    Args:
        model: folder or Hub id of the policy, or its name at the server.
        questions: the questions to sample for.
        sampling: how to sample; the length limit is that of all samples.
        engine: where to sample.

    Raises:
        InputError: unreadable input, an engine that is not installed, or a server that does not answer; raised before
            the policy is loaded.
    """
    if engine.name == "vllm":
        check_vllm(sampling)
    max_new_tokens = sampling.max_new_tokens
    questions, engine = in_force_at(engine, questions, model)
    task = get_task(str(questions.task))
    rows, asked, tokenizer = _prompts(model, questions, max_new_tokens, engine)
    given = {"rows": rows, "prompts": asked, "task": task, "tokenizer": tokenizer, "before": questions.before}
    if engine.is_server:
        kwargs = questions.chat_template_kwargs if engine.api == "chat" else None
        return Sampler(engine=ServerEngine(engine, model, kwargs), **given)
    assert tokenizer is not None
    if engine.name == "vllm":
        longest = max(len(encode_prompt(tokenizer, str(prompt))) for prompt in asked) + max_new_tokens
        if questions.before is not None:  # the longest prompt of a stream is not known
            longest = int(min(context_length(read_config(model)), STREAMED_POSITIONS))
        loaded: Engine = VllmEngine(model, tokenizer, longest, sampling.dtype)
    else:
        precision = reading_precision(model, sampling.dtype).say(f"{model} samples")
        loaded = TransformersEngine(load_causal_lm(model, precision.dtype, best_device()), tokenizer)
    given["task"] = task_reading(questions, model, [str(prompt) for prompt in asked[:1]], tokenizer)
    return Sampler(engine=loaded, **given)


def _prompts(
    model: str,
    questions: Questions,
    max_new_tokens: int,
    engine: EngineOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Sequence[dict[str, Any]], Sequence[Prompt], PreTrainedTokenizerBase | None]:
    """The rows, what the engine is given for each, and the tokenizer that renders it."""
    if engine.is_server:
        return server_prompts(questions, model, max_new_tokens, engine, tokenizer=tokenizer)
    return load_questions(questions, model, max_new_tokens, tokenizer)


def sample_rows(
    model: str,
    questions: Questions,
    sampling: SamplingParams,
    *,
    n: int,
    done: Set[int] = frozenset(),
    engine: EngineOptions = TRANSFORMERS,
    rest: Iterable[Questions] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Completions of a set of questions; see `generation.engine`.

    Args:
        model: folder or Hub id of the policy, or its name at the server.
        questions: the questions to sample for.
        sampling: how to sample.
        n: completions of each question.
        done: questions to leave out; with transformers those of the first complete chunks.
        engine: where to sample.
        rest: further windows of a stream, see `first_window`.

    Yields:
        For each chunk of prompts, rows with question (its index), prompt, completion, answer (gold), extracted,
        correct, finished, length (in tokens), logprob. Chunks of a server come in any order.

    Raises:
        InputError: unreadable input; raised before the model is loaded.
        RunFailed: see `Sampler.sample`.
    """
    if sampling.temperature == 0 and n > 1:
        raise InputError(f"n is {n}: at temperature 0 all completions of a prompt are the same; use -n 1")
    questions, engine = in_force_at(engine, questions, model)
    sampler = load_sampler(model, questions, sampling, engine)
    yield from sampler.sample(sampling, n=n, done=done)
    for window in rest:
        following = replace(questions, rows=window.rows, before=window.before)
        rows, prompts, _ = _prompts(model, following, sampling.max_new_tokens, engine, tokenizer=sampler.tokenizer)
        yield from replace(sampler, rows=rows, prompts=prompts, before=window.before).sample(sampling, n=n, done=done)
