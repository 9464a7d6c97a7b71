"""`tracereward sample`: completions of a policy, plain or guided by a reward model, as rows."""

from collections.abc import Iterator
from dataclasses import asdict
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
    load_questions,
    read_questions,
    sample_row,
    with_precision,
)
from tracereward.commands.sample_guided import Guidance, finished_guided, guided_rows
from tracereward.console import say
from tracereward.errors import InputError
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.modeling.loading import best_device, load_causal_lm
from tracereward.modeling.precision import reading_precision
from tracereward.rewards.settings import check_reward_model
from tracereward.tasks.recipes import get_task


def run_sample(
    model: str,
    questions: Questions,
    sampling: SamplingParams,
    *,
    n: int = 8,
    guidance: Guidance | None = None,
    output: Output = STDOUT,
) -> None:
    """Sample completions and write one JSON row each.

    Args:
        model: folder or Hub id of the policy.
        questions: the questions to sample for.
        sampling: how to sample.
        n: completions of each question; unused if guided, where the method sets it.
        guidance: decode with a reward model.
        output: where the rows go.

    Raises:
        InputError: unreadable or inconsistent input, the output may not be replaced (see `check_output`), or the
            unfinished one is from another run.
    """
    models = {"model": model, "--reward-model": None, "--reference": None}
    questions = in_force(questions, model, None if guidance is None else check_reward_model(guidance.reward_model))
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
    check_output(output, [data, *models.values()])
    origin = None if output.to_stdout else origin_of("sample", models, data, **options)
    done = 0
    if is_finished(output):
        return
    if part := unfinished(output, origin):
        if guidance is None:
            done = finished_questions(part, n, sampling.prompts_together(n))
        else:
            done = finished_guided(part, sampling.prompts_together(guidance.method.at_once))
        say(f"resuming after {done} questions")
    if guidance is None:
        chunks = sample_rows(model, questions, sampling, n=n, done=done)
    else:
        chunks = guided_rows(model, questions, sampling, guidance, done=done)
    right = wrong = 0
    # With a delay the bar appears after the first chunk, not above a message about the input.
    progress = tqdm(desc="questions", total=len(read_questions(questions)), initial=done, unit="", delay=0.1)
    with progress, rows_to(output, origin) as file:
        for rows in chunks:
            for row in rows:
                write_row(file, row)
                right += row["correct"] is True
                wrong += row["correct"] is False
            file.flush()
            progress.update(len({row["question"] for row in rows}))
    if right + wrong:
        earlier = f" sampled now, without the {done} questions of before" if done else ""
        say(f"{right} of {right + wrong} samples{earlier} have the right answer ({right / (right + wrong):.1%})")


def sample_rows(
    model: str, questions: Questions, sampling: SamplingParams, *, n: int, done: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Completions of a set of questions; see `generation.sampling.sample`.

    The first `done` questions (complete chunks) are skipped.

    Yields:
        For each chunk of prompts, rows with question (its index), prompt, completion, answer (gold), extracted,
        correct, finished, length (in tokens), logprob.

    Raises:
        InputError: unreadable input; raised before the model is loaded.
    """
    if sampling.temperature == 0 and n > 1:
        raise InputError(f"n is {n}: at temperature 0 all completions of a prompt are the same; use -n 1")
    questions = in_force(questions, model)
    task = get_task(str(questions.task))
    rows, prompts, tokenizer = load_questions(questions, model, sampling.max_new_tokens)
    precision = reading_precision(model, sampling.dtype).say(f"{model} samples")
    policy = load_causal_lm(model, precision.dtype, best_device())
    first_chunk = done // sampling.prompts_together(n)
    for chunk in sample(policy, tokenizer, prompts, sampling, n=n, first_chunk=first_chunk):
        yield [sample_row(s, rows[s.prompt], task) for s in chunk]
