"""The commands `tracereward evaluate SUITE`: each imports what it needs inside itself."""

import math
from pathlib import Path
from typing import Annotated

import typer

suites = typer.Typer(no_args_is_help=True, help="Judge a reward model, or a policy: one suite a command.")


def _finite(value: float) -> float:
    """Typer's ranges let nan through, and open ones infinity."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Model = Annotated[str, typer.Argument(help="Folder or Hub id of the reward model.")]
TaskName = Annotated[str | None, typer.Option("--task", help="Recipe. Default: the reward model's.")]
Policy = Annotated[str | None, typer.Option(help="Causal LM whose log-probs stand beside the reward as a baseline.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use N rows.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed.")]
Temperature = Annotated[float, typer.Option(min=0, callback=_finite, help="Of the samples.")]
Split = Annotated[str, typer.Option(help="Split of a Hub set.")]
Aggregate = Annotated[str, typer.Option(help="Step reward: mean or min of its tokens.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder. Default: evaluation/ in the model's run folder, or here.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@suites.command()
def pool(
    model: Model,
    data: Annotated[str, typer.Argument(help="Candidates: a trace, and correct or a gold answer, in each row.")],
    questions: Annotated[str | None, typer.Option(help="Questions, where rows name them by id only.")] = None,
    task: TaskName = None,
    policy: Policy = None,
    fit: Annotated[str | None, typer.Option(help="Other candidates to fit on. Default: a share of DATA.")] = None,
    fit_share: Annotated[
        float, typer.Option(min=0.05, max=0.95, callback=_finite, help="Share of the questions to fit on.")
    ] = 0.5,
    limit: Limit = None,
    seed: Seed = 0,
    output: Output = None,
    json_table: Json = False,
) -> None:
    """Candidates of many questions: AUROC, best-of-N and vote curves, calibration, beside the baselines."""
    from tracereward.evaluate.suites import run_pool

    run_pool(model, data, questions, task, policy, fit, fit_share, limit, seed, output, json_table)


def _step_suite(name: str, about: str) -> None:
    """Register one of the suites that differ in the form of their rows only."""

    def suite(
        model: Model,
        data: Annotated[str, typer.Argument(help="File or Hub id of the labelled traces.")],
        fit: Annotated[
            str | None, typer.Option(help="Another subset, for the threshold. Default: half of DATA.")
        ] = None,
        split: Split = "test",
        fit_split: Annotated[str, typer.Option(help="Split of a Hub set in --fit.")] = "test",
        task: TaskName = None,
        policy: Policy = None,
        aggregate: Aggregate = "mean",
        limit: Limit = None,
        seed: Seed = 0,
        output: Output = None,
        json_table: Json = False,
    ) -> None:
        from tracereward.evaluate.suites import run_steps

        run_steps(
            name, model, data, fit, split, fit_split, task, policy, aggregate, limit, seed, output, as_json=json_table
        )

    suites.command(name, help=about)(suite)


_step_suite("processbench", "First wrong step, ProcessBench's rows and protocol: F1, Hit@1, Hit@+-1.")
_step_suite("prmbench", "First wrong step in PRMBench's rows of injected errors.")
_step_suite("mrben", "First wrong step in MR-Ben's rows, labelled by people.")


@suites.command()
def perturbation(
    model: Model,
    data: Annotated[str, typer.Argument(help="Right traces, as for training: file or Hub id.")],
    split: Split = "test",
    task: TaskName = None,
    policy: Policy = None,
    aggregate: Aggregate = "mean",
    limit: Limit = None,
    seed: Seed = 0,
    output: Output = None,
    json_table: Json = False,
) -> None:
    """Without labels: errors injected at known steps of right traces, found by kind of error."""
    from tracereward.evaluate.suites import run_perturbation

    run_perturbation(model, data, split, task, policy, aggregate, limit, seed, output, json_table)


@suites.command("policy")
def policy_suite(
    policy: Annotated[str, typer.Argument(help="Folder or Hub id of the policy.")],
    data: Annotated[str | None, typer.Option(help="Questions with gold answers. Default: the task's own set.")] = None,
    task: Annotated[str, typer.Option(help="Recipe that reads the rows and checks answers.")] = "generic",
    n: Annotated[int, typer.Option("-n", "--n", min=0, help="Samples of each question; 0 for greedy alone.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a trace.")] = 512,
    temperature: Temperature = 1.0,
    split: Split = "test",
    template: Annotated[str, typer.Option(help="plain or chat.")] = "plain",
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Traces generated together.")] = 64,
    output: Output = None,
    json_table: Json = False,
) -> None:
    """Greedy and sampled accuracy, pass@k, and traces that state no answer or were cut off, counted apart."""
    from tracereward.evaluate.suites import run_policy

    run_policy(
        policy,
        data,
        task,
        n,
        max_new_tokens,
        temperature,
        split,
        template,
        limit,
        seed,
        batch_size,
        output,
        as_json=json_table,
    )


@suites.command("guided")
def guided_suite(
    policy: Annotated[str, typer.Argument(help="Folder or Hub id of the policy.")],
    reward_model: Annotated[str, typer.Option(help="Folder or Hub id of the reward model; same tokenizer.")],
    data: Annotated[str | None, typer.Option(help="Questions with gold answers. Default: the task's own set.")] = None,
    task: Annotated[str, typer.Option(help="Recipe that reads the rows and checks answers.")] = "generic",
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Samples of a question; repeatable. Default: 4 and 16.")
    ] = None,
    alpha: Annotated[float, typer.Option(callback=_finite, help="Of tilt: weight of the reward.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, help="Of tilt: next tokens scored.")] = 8,
    threshold: Annotated[
        float, typer.Option(callback=_finite, help="Of self-correction: a step is suspected under it.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a trace.")] = 512,
    temperature: Temperature = 1.0,
    split: Split = "test",
    template: Annotated[str, typer.Option(help="plain or chat.")] = "plain",
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Traces generated together.")] = 64,
    reference: Annotated[
        str | None, typer.Option(help="Model whose log-prob is added, as training with logit_plus_logprob did.")
    ] = None,
    output: Output = None,
    json_table: Json = False,
) -> None:
    """Beam, rejection, tilting and self-correction by a reward, beside best-of-N and votes, with the tokens drawn."""
    from tracereward.evaluate.guided import run_guided

    run_guided(
        policy,
        reward_model,
        data,
        task,
        budget or [4, 16],
        alpha,
        top_k,
        threshold,
        max_new_tokens,
        temperature,
        split,
        template,
        limit,
        seed,
        batch_size,
        reference,
        output,
        as_json=json_table,
    )
