"""`tracereward sample`: completions of a policy, plain or guided by a reward model, as rows."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from tracereward.commands.partial_output import (
    STDOUT,
    Output,
    check_output,
    finished_questions,
    is_finished,
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
from tracereward.console import note, say
from tracereward.errors import InputError, RunFailed
from tracereward.generation.engine import Engine, EngineOptions, Prompt, TransformersEngine, Unanswered
from tracereward.generation.params import SamplingParams
from tracereward.generation.server_engine import ServerEngine
from tracereward.generation.vllm_engine import VllmEngine, check_vllm
from tracereward.modeling.loading import best_device, load_causal_lm
from tracereward.modeling.precision import reading_precision
from tracereward.modeling.tokenization import encode_prompt
from tracereward.rewards.settings import check_reward_model
from tracereward.tasks.recipes import Task, get_task

TRANSFORMERS = EngineOptions()
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
    origin = None if output.to_stdout else origin_of("sample", models, data, **options)
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
        chunks = sample_rows(model, questions, sampling, n=n, done=done, engine=engine)
    else:
        chunks = guided_rows(model, questions, sampling, guidance, done=len(done))
    if output.to_stdout and engine.is_server:
        chunks = in_order(chunks)
    right = wrong = 0
    # With a delay the bar appears after the first chunk, not above a message about the input.
    progress = tqdm(desc="questions", total=len(read_questions(questions)), initial=len(done), unit="", delay=0.1)
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
    """

    engine: Engine
    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Prompt]
    task: Task

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
        answered = len(done)
        try:
            for chunk in self.engine.sample(self.prompts, sampling, n=n, done=done):
                yield [sample_row(s, self.rows[s.prompt], self.task) for s in chunk]
                answered += len({s.prompt for s in chunk})
        except Unanswered as error:
            failed = [f"{self.rows[index]['source']}: {why}" for index, why in sorted(error.reasons.items())]
            more = f"; and {len(failed) - MENTIONED} more" if len(failed) > MENTIONED else ""
            text = "; ".join(failed[:MENTIONED]) + more
            if not answered:
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
    if engine.is_server:
        rows, asked = server_prompts(questions, model, max_new_tokens, engine)
        kwargs = questions.chat_template_kwargs if engine.api == "chat" else None
        return Sampler(engine=ServerEngine(engine, model, kwargs), rows=rows, prompts=asked, task=task)
    rows, prompts, tokenizer = load_questions(questions, model, max_new_tokens)
    if engine.name == "vllm":
        longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
        loaded: Engine = VllmEngine(model, tokenizer, longest + max_new_tokens, sampling.dtype)
    else:
        precision = reading_precision(model, sampling.dtype).say(f"{model} samples")
        loaded = TransformersEngine(load_causal_lm(model, precision.dtype, best_device()), tokenizer)
    task = task_reading(questions, model, prompts, tokenizer)
    return Sampler(engine=loaded, rows=rows, prompts=prompts, task=task)


def sample_rows(
    model: str,
    questions: Questions,
    sampling: SamplingParams,
    *,
    n: int,
    done: Set[int] = frozenset(),
    engine: EngineOptions = TRANSFORMERS,
) -> Iterator[list[dict[str, Any]]]:
    """Completions of a set of questions; see `generation.engine`.

    Args:
        model: folder or Hub id of the policy, or its name at the server.
        questions: the questions to sample for.
        sampling: how to sample.
        n: completions of each question.
        done: questions to leave out; with transformers those of the first complete chunks.
        engine: where to sample.

    Yields:
        For each chunk of prompts, rows with question (its index), prompt, completion, answer (gold), extracted,
        correct, finished, length (in tokens), logprob. Chunks of a server come in any order.

    Raises:
        InputError: unreadable input; raised before the model is loaded.
        RunFailed: see `Sampler.sample`.
    """
    if sampling.temperature == 0 and n > 1:
        raise InputError(f"n is {n}: at temperature 0 all completions of a prompt are the same; use -n 1")
    yield from load_sampler(model, questions, sampling, engine).sample(sampling, n=n, done=done)
