"""The command line. Commands import lazily, so that ``--help`` is fast."""

import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from tracereward import __version__
from tracereward.cli.audit import auditing
from tracereward.cli.evaluate import (
    Api,
    ChatTemplateKwargs,
    Concurrency,
    QuestionTask,
    SamplingEngine,
    Template,
    json_object,
    suites,
)
from tracereward.cli.reward import Overwrite, PolicyDtype, Resume, Seed, Stream, commands
from tracereward.cli.rules import CheckedTyper, with_hyphens
from tracereward.cli.serve import server
from tracereward.cli.training import fit, grpo, plan, sft, train
from tracereward.cli.watch import monitoring
from tracereward.console import open_streams, say
from tracereward.errors import InputError, Interrupted, RunFailed


class Commands(typer.core.TyperGroup):
    """Command group that handles Ctrl-C and a closed pipe before typer turns them into its own exit codes."""

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


app = CheckedTyper(
    cls=Commands,
    context_settings={"token_normalize_func": with_hyphens},
    help="Reward models for reasoning, learned from expert traces alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for _command in (sft, train, grpo, fit, plan):
    app.command(context_settings=PASS_THROUGH)(_command)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the policy, or its name at the server.")],
    data: Annotated[
        str | None, typer.Option(help="File or Hub id with prompts, - for stdin. Default: the task's own set.")
    ] = None,
    task: QuestionTask = None,
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, help="Completions per prompt. Default: 8.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a completion.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy decoding. Default: 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling. Default: 1, all tokens.")] = None,
    use_generation_config: Annotated[
        bool, typer.Option(help="Sample as the policy's generation_config.json recommends. Default: ignore it.")
    ] = False,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N rows.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub set.")] = "test",
    template: Template = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions generated together.")] = 64,
    dtype: PolicyDtype = None,
    engine: SamplingEngine = "transformers",
    api: Api = None,
    concurrency: Concurrency = 32,
    output: Annotated[str | None, typer.Option("-o", "--output", help="JSONL file. Default: stdout.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    guide: Annotated[str | None, typer.Option(help="Decoding guided by --reward-model: beam, reject or tilt.")] = None,
    reward_model: Annotated[str | None, typer.Option(help="With --guide: folder or Hub id; same tokenizer.")] = None,
    beam: Annotated[int | None, typer.Option(min=1, help="With beam: partial traces kept. Default: 4.")] = None,
    expansions: Annotated[
        int | None, typer.Option(min=1, help="With beam: next steps sampled from each. Default: 4.")
    ] = None,
    lookahead: Annotated[
        int | None, typer.Option(min=0, help="With beam: greedy steps before scoring. Default: 0.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="With reject: survivors of the -n traces. Default: 1.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="With tilt: weight of the reward. Default: 1.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="With tilt: next tokens scored. Default: 8.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="With --guide: model whose log-prob is added to the rewards, as for score.")
    ] = None,
    stream: Stream = False,
) -> None:
    """Sample completions from a policy: one JSON row each."""
    from tracereward.commands.partial_output import Output
    from tracereward.commands.questions import Questions
    from tracereward.commands.sample import run_sample
    from tracereward.commands.sample_guided import Guidance, guide_options
    from tracereward.generation.engine import EngineOptions
    from tracereward.generation.params import SamplingParams
    from tracereward.generation.settings import recommended_options

    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = SamplingParams(max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size, dtype=dtype, **given)
    if use_generation_config:
        if guide is not None:
            raise InputError("--guide samples from the policy itself: remove --use-generation-config")
        sampling = dataclasses.replace(sampling, **recommended_options(model, given))
    options = {"beam": beam, "expansions": expansions, "lookahead": lookahead, "keep": keep, "alpha": alpha}
    options["top_k"] = top_k
    guidance = None
    if guide is not None:
        if reward_model is None:
            raise InputError("--guide needs --reward-model")
        method = guide_options(guide, n=n, **options)
        guidance = Guidance(reward_model=reward_model, method=method, reference=reference)
    elif any(value is not None for value in (reward_model, reference, *options.values())):
        raise InputError("--reward-model, --reference and the options of beam, reject and tilt need --guide")
    run_sample(
        model,
        Questions(
            data=data,
            task=task,
            split=split,
            limit=limit,
            template=template,
            chat_template_kwargs=json_object("--chat-template-kwargs", chat_template_kwargs),
            stream=stream,
        ),
        sampling,
        n=n or 8,
        guidance=guidance,
        engine=EngineOptions(name=engine, api=api, concurrency=concurrency),
        output=Output(path=output, resume=resume, overwrite=overwrite),
    )


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")] = Path("runs/quickstart"),
    world: Annotated[
        str, typer.Option(help="exposure, checked, hops, misconception, terse, style or multi-skill.")
    ] = "exposure",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(help="Resume an unfinished run.")] = False,
    fast: Annotated[
        bool, typer.Option(help="One minute instead of several: fewer steps, less reliable figures.")
    ] = False,
    from_scratch: Annotated[
        bool, typer.Option(help="Pretrain the policy too, instead of taking the package's; other seeds and worlds do.")
    ] = False,
    json_table: Annotated[bool, typer.Option("--json", help="Print the tables as JSON on stdout.")] = False,
) -> None:
    """The full method on generated arithmetic and a tiny Llama, offline, in minutes on two CPU cores."""
    from tracereward.quickstart.run import run_quickstart

    run_quickstart(output, world, seed, resume=resume, fast=fast, from_scratch=from_scratch, json_table=json_table)


app.add_typer(commands)
app.add_typer(auditing)
app.add_typer(monitoring)
app.add_typer(server)
app.add_typer(suites, name="evaluate")


def main(application: typer.Typer = app) -> NoReturn:
    """Entry point. Exit codes: 0 success, 1 failed run, 2 bad input or usage, 3 drift (`watch`), 130
    interrupted."""
    open_streams()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Deprecated transformers names that TRL still uses: users cannot fix these.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    code: str | int | None = 0
    try:
        application()
    except SystemExit as error:
        code = error.code
    except InputError as error:
        say(f"tracereward: {error}")
        code = 2
    except RunFailed as error:
        say(f"\ntracereward: {error}")  # on a new line after a progress bar
        code = 1
    except Interrupted as error:
        say(f"\ntracereward: {error}")
        code = 130
    except KeyboardInterrupt:
        say("\ntracereward: interrupted")
        code = 130
    except Exception as error:
        from tracereward.cli.unforeseen import explained

        say(f"\ntracereward: {explained(error)}")
        code = 1
    leave(code)


def leave(code: str | int | None) -> NoReturn:
    """End the process with this exit status; in a distributed run, after destroying the process group.

    A distributed process also skips the interpreter's shutdown, where a gloo thread that releases a tensor aborts the
    process, so that a finished run would count as failed (https://github.com/pytorch/pytorch/pull/179291).
    """
    distributed = sys.modules.get("torch.distributed")
    if (
        isinstance(code, str)
        or distributed is None
        or not (distributed.is_available() and distributed.is_initialized())
    ):
        sys.exit(code)
    # The launcher sends it when another process fails; this one still has to report.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if code in (0, None):  # after a failure it could hang, waiting for the other processes
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)
