"""The command line. Each command imports what it needs inside itself, so that ``--help`` answers at once."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from tracereward import __version__
from tracereward.errors import InputError, Interrupted, RunFailed


class Commands(typer.core.TyperGroup):
    """The commands, with Ctrl-C and a closed pipe brought to `main` before typer makes its own exit codes of them."""

    def invoke(self, ctx: Any) -> object:
        """Run a command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=Commands,
    help="Reward models for reasoning, learned from expert traces alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _training(kind: str, argv: list[str]) -> None:
    from tracereward.arguments import parse, print_help

    if "--help" in argv or "-h" in argv:
        print_help(kind)
        return
    data, config, model, resume = parse(kind, argv)
    from tracereward import run

    folder = {"sft": run.run_sft, "train": run.run_train, "grpo": run.run_grpo}[kind](data, config, model, resume)
    _say(f"done: {folder}")
    for part in ("policy", "reward_model", "report.html"):
        if (folder / part).exists():
            print(folder / part)


@app.command(context_settings=PASS_THROUGH)
def sft(ctx: typer.Context) -> None:
    """Fine-tune a model on expert traces (options: tracereward sft --help)."""
    _training("sft", ctx.args)


@app.command(context_settings=PASS_THROUGH)
def train(ctx: typer.Context) -> None:
    """Learn a reward model from expert traces and train the policy on it."""
    _training("train", ctx.args)


@app.command(context_settings=PASS_THROUGH)
def grpo(ctx: typer.Context) -> None:
    """Train a policy on a given reward: the verifier, or its own log-prob."""
    _training("grpo", ctx.args)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the policy.")],
    data: Annotated[str | None, typer.Option(help="File or Hub id with prompts. Default: the task's own set.")] = None,
    task: Annotated[str, typer.Option(help="Recipe that reads the rows and checks answers.")] = "generic",
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Completions of each prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a completion.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub set.")] = "test",
    template: Annotated[str, typer.Option(help="plain or chat.")] = "plain",
    batch_size: Annotated[int, typer.Option(help="Completions generated together.")] = 64,
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL file. Default: stdout.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished --output.")] = False,
) -> None:
    """Draw completions from a policy: one JSON row each."""
    from tqdm.auto import tqdm

    from tracereward.pool import finished_questions, rows_to, sample_rows, write_row

    done = 0
    if resume:
        if output is None:
            raise InputError("--resume needs --output")
        part = Path(output + ".part")
        size = max(1, batch_size // n)
        if Path(output).is_file() and not part.exists():
            _say(f"{output} is finished")
            return
        if part.is_file():
            done = finished_questions(part, n, size)
            _say(f"going on after {done} questions")
    chunks = sample_rows(
        model, data, task, n, max_new_tokens, temperature, top_p, seed, limit, split, template, batch_size, done
    )
    with tqdm(desc="samples", initial=done * n, unit="") as progress, rows_to(output, append=resume) as file:
        for rows in chunks:
            for row in rows:
                write_row(file, row)
            file.flush()
            progress.update(len(rows))


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the reward model.")],
    data: Annotated[
        str, typer.Argument(help="JSONL or Parquet rows: prompt and completion, or prompt and candidates.")
    ],
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL file. Default: stdout.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model whose log-prob is added, as training with logit_plus_logprob did.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy whose log-prob is taken off: the logit of the heads airl and implicit.")
    ] = None,
) -> None:
    """Score traces: token rewards with character offsets, step rewards, and one reward a trace."""
    from tqdm.auto import tqdm

    from tracereward.models import check_model
    from tracereward.pool import best_device, candidate_rows, load_beside, rows_to, score_rows, write_row
    from tracereward.reward_model import TokenRewardModel
    from tracereward.reward_settings import check_reward_model

    check_reward_model(model)
    count = sum(1 for _ in candidate_rows(data))  # all rows are checked before the model is loaded
    if count == 0:
        raise InputError(f"{data}: no rows")
    for other in (reference, policy):
        if other is not None:
            check_model(other)
    reward_model = TokenRewardModel.from_pretrained(model).to(best_device())
    others = [load_beside(reward_model, other) for other in (reference, policy)]
    with rows_to(output) as file:
        for row in tqdm(score_rows(reward_model, candidate_rows(data), *others), desc="scored", total=count, unit=""):
            write_row(file, row)


@app.command()
def rerank(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the reward model.")],
    data: Annotated[str, typer.Argument(help="JSONL rows with prompt and completion; a question's rows together.")],
    task: Annotated[str | None, typer.Option(help="Recipe that checks answers. Default: the reward model's.")] = None,
    method: Annotated[
        str, typer.Option(help="vote, reward, reward_logprob, majority, logprob, shortest or random.")
    ] = "vote",
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL of the chosen rows.")] = None,
    json_table: Annotated[bool, typer.Option("--json", help="Print the table as JSON on stdout.")] = False,
) -> None:
    """Choose among candidates; where answers are known, compare with majority, log-prob, length and oracle."""
    import json

    from tracereward.errors import check_choice
    from tracereward.pool import best_device, candidate_rows, rerank_rows, rows_to, score_rows, summary, write_row
    from tracereward.rerank import METHODS
    from tracereward.reward_model import TokenRewardModel
    from tracereward.reward_settings import check_reward_model
    from tracereward.tasks import get_task

    check_choice("method", method, [name for name in METHODS if name not in ("mean", "oracle")])
    settings = check_reward_model(model)
    recipe = get_task(task or settings.task)
    rows = list(candidate_rows(data))
    if not rows:
        raise InputError(f"{data}: no rows")
    for where, row in rows:
        if "candidates" in row or ("logprob" in method and row.get("logprob") is None):
            need = "a completion in each row" if "candidates" in row else f"a logprob in each row for --method {method}"
            raise InputError(f"{where}: rerank needs {need}; `tracereward sample` writes it")
    reward_model = TokenRewardModel.from_pretrained(model).to(best_device())
    chosen, questions = rerank_rows(score_rows(reward_model, rows), recipe, method)
    table = summary(questions, recipe)
    if output is not None or not json_table:
        with rows_to(output) as file:
            for row in chosen:
                write_row(file, row)
    if json_table:
        print(json.dumps(table))
    elif table is not None:
        from tracereward.tables import print_ranking

        print_ranking(table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the reward model, of any head.")],
    data: Annotated[str, typer.Option(help="JSONL or Parquet rows to fit on, as `tracereward sample` writes them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new reward model.")],
    head: Annotated[str, typer.Option(help="token: a plain token-classification checkpoint.")] = "token",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="AdamW learning rate.")] = 1e-4,
    token_budget: Annotated[int, typer.Option(min=1, help="Padded tokens of one step.")] = 8192,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Distil a reward model into a token-classification checkpoint, and say how well that fits."""
    import dataclasses
    import json
    import math

    from tracereward.distill import distill, examples_of
    from tracereward.errors import check_choice
    from tracereward.models import local_folder
    from tracereward.pool import best_device, candidate_rows
    from tracereward.reward_model import TokenRewardModel
    from tracereward.reward_settings import check_reward_model

    check_choice("head", head, ["token"])
    check_reward_model(model)
    if output.exists():
        raise InputError(f"{output} exists already: choose another --output")
    rows = list(candidate_rows(data))
    teacher = TokenRewardModel.from_pretrained(model).to(best_device())
    examples = examples_of(rows, teacher)
    student, fit = distill(teacher, local_folder(model), examples, epochs, learning_rate, token_budget, seed)
    numbers = {k: None if math.isnan(value) else value for k, value in dataclasses.asdict(fit).items()}
    note = (
        f"\nDistilled from a reward model with head `{teacher.settings.head}` on {fit.traces} traces: R2 {fit.r2:.3f} "
        f"on {fit.held_out} traces of held-out prompts; within-prompt AUROC {fit.auroc_before:.3f} before, "
        f"{fit.auroc_after:.3f} after.\n"
    )
    student.save_pretrained(output, note)
    _say(note.strip())
    print(json.dumps({"output": str(output), **numbers}))


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")] = Path("runs/quickstart"),
    world: Annotated[str, typer.Option(help="misconception or style.")] = "misconception",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run.")] = False,
    fast: Annotated[
        bool, typer.Option(help="A minute instead of several: fewer steps; the figures mean less.")
    ] = False,
    json_table: Annotated[bool, typer.Option("--json", help="Print the tables as JSON on stdout.")] = False,
) -> None:
    """The whole method on generated arithmetic and a tiny Llama, offline, in minutes on two CPU cores."""
    from tracereward.quickstart import run_quickstart

    run_quickstart(output, world, seed, resume, fast, json_table)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="recipe, granularity, objective or reranking.")],
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed; repeatable. Default: the study's.")] = None,
    worlds: Annotated[
        list[str] | None, typer.Option("--world", help="World; repeatable. Default: the study's.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the pages and of each cell's JSON.")] = Path("docs/studies"),
    work: Annotated[Path, typer.Option(help="Folder of policies and reward models.")] = Path("runs/studies"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    quick: Annotated[
        bool, typer.Option(help="One seed, a tenth of the steps: to try out; the figures mean little.")
    ] = False,
) -> None:
    """Run a study on generated worlds and write its page; cells that are there are not run again."""
    from tracereward.studies.study import run_study

    run_study(name, worlds, seeds, results, work, jobs, quick)


def main() -> None:
    """Entry point: exit 0 when all went well, 1 when a run failed, 2 for bad input or usage, 130 when interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Names that TRL still uses and transformers has renamed: nothing that a user of the commands could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    try:
        app()
    except InputError as error:
        _say(f"tracereward: {error}")
        sys.exit(2)
    except RunFailed as error:
        _say(f"\ntracereward: {error}")  # behind a progress bar
        sys.exit(1)
    except Interrupted as error:
        _say(f"\ntracereward: {error}")
        sys.exit(130)
