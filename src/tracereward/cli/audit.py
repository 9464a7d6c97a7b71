"""The command `tracereward audit`. Imports are inside it."""

from typing import Annotated

import typer

from tracereward.cli.reward import Seed
from tracereward.cli.rules import CheckedTyper

auditing = CheckedTyper()


@auditing.command()
def audit(
    data: Annotated[str, typer.Argument(help="Demonstrations: JSONL, CSV or Parquet file, a folder, or Hub id.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the causal LM that reads them. Without one only the text is checked."),
    ] = None,
    task: Annotated[str, typer.Option(help="Task that maps a dataset's fields and reads answers.")] = "generic",
    candidates: Annotated[
        str | None, typer.Option(help="Logged traces of models for the same questions: do they give the same answers?")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="File or Hub id of the questions, if --candidates has only their ids.")
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of the results.")] = "runs/audit",
    order: Annotated[
        str, typer.Option(help="What comes first: contrast, reward, lowest_reward, logprob, lowest_logprob or sum.")
    ] = "lowest_reward",
    template: Annotated[
        str | None, typer.Option(help="plain or chat. Default: as the model was trained by tracereward, else plain.")
    ] = None,
    step_delimiter: Annotated[str | None, typer.Option(help="Text that ends a step. Default: the task's.")] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="What ends a step instead: line, blank, numbered, sentence, or a regular expression."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N demonstrations.")] = None,
    states: Annotated[
        str | None, typer.Option(help="Folder of the model's states, which audits may share. Default: in --output-dir.")
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[str | None, typer.Option(help="Precision of the model: float32, bfloat16 or float16.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --output-dir.")] = False,
) -> None:
    """Find odd or wrong demonstrations, in an order and on a page to mark them: keep, fix or drop."""
    from tracereward.commands.audit import AuditOptions, run_audit

    page = run_audit(
        AuditOptions(
            data=data,
            model=model,
            task=task,
            candidates=candidates,
            questions=questions,
            output_dir=output_dir,
            order=order,
            template=template,
            step_delimiter=step_delimiter,
            steps=steps,
            limit=limit,
            states=states,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
        )
    )
    print(page)
