"""The command that compares a period's traces with the experts' and with an earlier period's. Imports are inside it."""

from pathlib import Path
from typing import Annotated

import typer

from tracereward.cli.reward import AnswerTask, Dtype
from tracereward.cli.rules import CheckedTyper

monitoring = CheckedTyper()
DRIFT = 3
"""Exit code of ``--fail-on-drift``."""


@monitoring.command()
def watch(
    traces: Annotated[
        str, typer.Argument(help="Traces of this period: rows as for `tracereward score`, or its output.")
    ],
    reference: Annotated[
        str, typer.Option(help="Run folder of fit or train, or a reward model: its rewards, and the run's experts.")
    ],
    before: Annotated[
        str | None, typer.Option(help="Traces of an earlier period. Default: compare with the experts.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="Demonstrations. Default: those of the run.")] = None,
    task: AnswerTask = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML page; the figures go to a .json file of the same name.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
    fail_on_drift: Annotated[
        bool, typer.Option("--fail-on-drift", help=f"Exit with code {DRIFT} if a feature differs significantly.")
    ] = False,
    dtype: Dtype = None,
) -> None:
    """Has the output of a model drifted: rewards, readable answers, length and surface, with permutation tests."""
    from tracereward.commands.watch import WatchOptions, run_watch

    found = run_watch(
        WatchOptions(
            traces=traces,
            reference=reference,
            before=before,
            experts=experts,
            task=task,
            output=output,
            overwrite=overwrite,
            dtype=dtype,
        )
    )
    if fail_on_drift and found.drifted:
        raise typer.Exit(DRIFT)
