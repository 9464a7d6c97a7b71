"""The commands that use a reward model: score, rerank, correct, inspect, ... Imports are inside each."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tracereward.cli.rules import CheckedTyper
from tracereward.console import print_json, say
from tracereward.errors import check_choice
from tracereward.generation.params import MAX_SEED

commands = CheckedTyper()

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the reward model.")]
Reference = Annotated[
    str | None, typer.Option(help="Model whose log-prob is added, as training with logit_plus_logprob did.")
]
Policy = Annotated[
    str | None, typer.Option(help="Policy whose log-prob is subtracted: the logit of the heads airl and implicit.")
]
Engine = Annotated[str, typer.Option(help="transformers, or vllm (head token; pip install 'tracereward[vllm]').")]
AnswerTask = Annotated[
    str | None, typer.Option("--task", help="Task that checks answers. Default: the reward model's.")
]
Resume = Annotated[bool, typer.Option(help="Resume an unfinished --output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read rows once, as they come (a Hub set while it downloads), in constant memory. Always with -, stdin.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]


def _dtype(value: str | None) -> str | None:
    """Refuse an unknown precision."""
    if value is not None:
        check_choice("dtype", value, ("auto", "float32", "bfloat16", "float16"))
    return value


Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        callback=_dtype,
        help="Precision of the models: float32, bfloat16 or float16. Default: that in which the reward model was "
        "calibrated; of others bfloat16 on a CPU that has it, if they are large.",
    ),
]
PolicyDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        callback=_dtype,
        help="Precision of the policy: float32, bfloat16 or float16. Default: the checkpoint's; on a CPU bfloat16 if "
        "the processor has it and the model is large, else float32.",
    ),
]


@commands.command()
def score(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL, CSV, Parquet or Hub rows, - for stdin: prompt, and completion, candidates or steps."
        ),
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="JSONL file; a folder with --engine ray. Default: stdout.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub set.")] = "train",
    engine: Annotated[
        str, typer.Option(help="transformers, vllm (head token), or ray (many machines; tracereward[ray]).")
    ] = "transformers",
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray. Default: the GPUs of the cluster, or one.")
    ] = None,
    reference: Reference = None,
    policy: Policy = None,
    dtype: Dtype = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Report and skip rows that cannot be scored, instead of stopping.")
    ] = False,
    stream: Stream = False,
) -> None:
    """Score traces: token rewards with character offsets, step rewards, and one reward a trace."""
    from tracereward.commands.partial_output import Output
    from tracereward.commands.score import ScoreOptions, run_score

    run_score(
        ScoreOptions(
            model=model,
            data=data,
            output=Output(path=output, resume=resume, overwrite=overwrite),
            split=split,
            engine=engine,
            workers=workers,
            reference=reference,
            policy=policy,
            skip_bad=skip_bad,
            dtype=dtype,
            stream=stream,
        )
    )


@commands.command()
def rerank(
    model: Model,
    data: Annotated[str, typer.Argument(help="JSONL rows with prompt and completion or candidates; - for stdin.")],
    task: AnswerTask = None,
    method: Annotated[
        str,
        typer.Option(
            help="vote, sigmoid_vote, reward, reward_logprob, reward_logprob_vote, majority, logprob, logprob_vote, "
            "shortest or random."
        ),
    ] = "vote",
    aggregate: Annotated[
        str | None, typer.Option(help="Trace reward: mean, min, last or discounted. Default: the reward model's.")
    ] = None,
    abstain: Annotated[
        float | None,
        typer.Option(
            help="Do not answer where the reward is too low: the probability of a wrong answer is then at most this, "
            "for questions like those of `tracereward calibrate`. With --method vote or reward."
        ),
    ] = None,
    dtype: Dtype = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL of the chosen rows.")] = None,
    overwrite: Overwrite = False,
    json_table: Annotated[bool, typer.Option("--json", help="Print the table as JSON on stdout.")] = False,
    stream: Stream = False,
) -> None:
    """Choose among candidates; with known answers, compare with majority, log-prob, length and oracle."""
    from tracereward.commands.partial_output import Output
    from tracereward.commands.rerank import RerankOptions, run_rerank

    run_rerank(
        RerankOptions(
            model=model,
            data=data,
            task=task,
            method=method,
            aggregate=aggregate,
            abstain=abstain,
            output=Output(path=output, resume=None, overwrite=overwrite),
            json_table=json_table,
            dtype=dtype,
            stream=stream,
        )
    )


@commands.command()
def select(
    data: Annotated[str, typer.Argument(help="Rows that `tracereward score` wrote; - for stdin.")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL file. Default: stdout.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="sft: traces; dpo: pairs; kto: the traces of pairs with a label. As in TRL.")
    ] = "sft",
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="Traces or pairs of a question, at most.")] = 1,
    threshold: Annotated[float | None, typer.Option(help="Lowest reward of a trace that is kept, in log-odds.")] = None,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of all candidates that is kept at most, the best ones.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Smallest difference of the rewards of a pair.")] = 0.0,
    answers: Annotated[str, typer.Option(help="Answers of a pair: any, different or same.")] = "any",
    controls: Annotated[
        bool, typer.Option("--controls", help="Also write sets of the same size: random, shortest, logprob, majority.")
    ] = False,
    task: Annotated[str, typer.Option(help="Task that reads and compares answers.")] = "generic",
    overwrite: Overwrite = False,
) -> None:
    """Turn scored candidates into training data: the best traces, or pairs, and sets of the same size to compare."""
    from tracereward.commands.partial_output import Output
    from tracereward.commands.select import SelectOptions, run_select
    from tracereward.data.keeping import Keeping

    run_select(
        SelectOptions(
            data=data,
            keeping=Keeping(top=top, threshold=threshold, share=share, format=form, margin=margin, answers=answers),
            controls=controls,
            task=task,
            output=Output(path=output, resume=None, overwrite=overwrite),
        )
    )


@commands.command()
def correct(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the policy.")],
    data: Annotated[str, typer.Argument(help="JSONL rows with prompt and completion, as `tracereward sample` writes.")],
    reward_model: Annotated[str, typer.Option(help="Folder or Hub id of the reward model; same tokenizer.")],
    rounds: Annotated[int, typer.Option(min=1, help="Maximum number of cuts per trace.")] = 3,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Continuations sampled from each cut.")] = 4,
    suspect: Annotated[
        str, typer.Option(help="What a cut is based on: a low reward, or the policy's own logprob.")
    ] = "reward",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Steps with a lower mean are suspected: log-odds of the reward, or nats. Default: the reward model's "
            "own rule."
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Instead of --threshold: share of traces with a suspected step."),
    ] = None,
    task: AnswerTask = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a trace.")] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of the continuations.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Traces generated together.")] = 64,
    dtype: PolicyDtype = None,
    reference: Reference = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL file. Default: stdout.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut traces before their first suspected step, continue them, keep what the reward prefers."""
    from tracereward.commands.correct import Correcting, run_correct
    from tracereward.commands.partial_output import Output
    from tracereward.generation.params import SamplingParams

    correcting = Correcting(
        reward_model=reward_model,
        rounds=rounds,
        k=k,
        suspect=suspect,
        threshold=threshold,
        share=share,
        task=task,
        reference=reference,
    )
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
    )
    run_correct(model, data, correcting, sampling, output=Output(path=output, resume=resume, overwrite=overwrite))


@commands.command()
def inspect(
    data: Annotated[str, typer.Argument(help="Rows that `tracereward score` wrote, or rows to score with --model.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a reward model, for rows without scores.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="HTML file. Default: the terminal.")] = None,
    overwrite: Overwrite = False,
    task: Annotated[str | None, typer.Option(help="Task that finds and checks answers.")] = None,
    reference: Reference = None,
    policy: Policy = None,
    dtype: Dtype = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Steps with a lower reward, in log-odds, are suspected. Default: as the reward model's own rule says."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Show the first N rows.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page. Default: the file's name.")] = None,
    colour: Annotated[str, typer.Option(help="Terminal: auto, never, 256 or truecolor.")] = "auto",
    width: Annotated[int | None, typer.Option(min=20, help="Terminal: columns.")] = None,
) -> None:
    """Look at traces token by token: one HTML page that needs no network, or the terminal."""
    from tqdm.auto import tqdm

    from tracereward.commands.inspect import InspectOptions, rows_to_inspect
    from tracereward.commands.partial_output import check_file
    from tracereward.errors import InputError, check_choice, check_number
    from tracereward.reports.inspection_page import write_inspection
    from tracereward.reports.inspection_terminal import COLOURS, print_ansi

    if threshold is not None:
        check_number("--threshold", threshold)
    check_choice("colour", colour, COLOURS)
    if output is not None:
        check_file(output, [data, model, reference, policy], overwrite=overwrite)
    elif overwrite:
        raise InputError("--overwrite needs --output, a file")
    rows = rows_to_inspect(
        InspectOptions(data=data, model=model, task=task, reference=reference, policy=policy, limit=limit, dtype=dtype)
    )
    if output is None:
        print_ansi(rows, sys.stdout, width=width, colour=colour, threshold=threshold)
        return
    command = " ".join(["tracereward", *sys.argv[1:]])
    with tqdm(rows, desc="rows", unit="", delay=1) as progress:
        write_inspection(output, progress, title or Path(data).name, command=command, threshold=threshold)
    say(f"{progress.n} rows: {output}")


@commands.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of the reward model.")],
    data: Annotated[str, typer.Argument(help="Labelled traces: rows with correct or a gold answer.")],
    questions: Annotated[str | None, typer.Option(help="Questions, if rows only have their ids.")] = None,
    task: Annotated[str | None, typer.Option(help="Task. Default: the reward model's.")] = None,
    method: Annotated[str, typer.Option(help="platt, temperature or isotonic.")] = "platt",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model's calibration.")] = False,
) -> None:
    """Fit the probability that a trace is correct on a small labelled set, and save it with the reward model."""
    import dataclasses

    from tracereward.errors import check_choice
    from tracereward.evaluate.suites import run_calibrate
    from tracereward.rewards.calibration import METHODS

    check_choice("method", method, METHODS)
    calibration, left_out = run_calibrate(
        model, data, questions=questions, task=task, method=method, overwrite=overwrite, dtype=dtype
    )
    if left_out:
        say(f"{left_out} traces were skipped: empty, or longer than the reward model reads")
    say(f"fitted on {calibration.traces} traces and written to {model}/tracereward.json")
    print_json(dataclasses.asdict(calibration))


@commands.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A run folder, a policy or a reward model.")],
    name: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name, or a name of your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, created if it does not exist. Default: main.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a finished policy, reward model, or both to the Hugging Face Hub, with their model cards."""
    from tracereward.commands.push import run_push
    from tracereward.runs.upload import Repository

    to = Repository(name=name, private=private or None, revision=revision)
    for kind, address in run_push(folder, to, commit_message).items():
        print(f"{kind} {address}")


@commands.command()
def export(
    model: Model,
    data: Annotated[str, typer.Option(help="JSONL or Parquet rows to fit on, as `tracereward sample` writes them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new reward model.")],
    head: Annotated[str, typer.Option(help="token: a plain token-classification checkpoint.")] = "token",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="AdamW learning rate.")] = 1e-4,
    token_budget: Annotated[int, typer.Option(min=1, help="Padded tokens per step.")] = 8192,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a reward model in --output.")] = False,
) -> None:
    """Distil a reward model into a token-classification checkpoint and report the fit."""
    from tracereward.commands.export import ExportOptions, run_export
    from tracereward.errors import check_choice

    check_choice("head", head, ["token"])
    run_export(
        ExportOptions(
            model=model,
            data=data,
            output=output,
            epochs=epochs,
            learning_rate=learning_rate,
            token_budget=token_budget,
            seed=seed,
            overwrite=overwrite,
        )
    )
