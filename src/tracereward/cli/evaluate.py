"""The commands `tracereward evaluate SUITE`. Imports are inside each.

typer reads options from signatures, so the suites repeat their options on purpose; the option types are shared.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from tracereward.cli.reward import Dtype, PolicyDtype
from tracereward.cli.rules import CheckedTyper
from tracereward.errors import InputError
from tracereward.generation.params import MAX_SEED

suites = CheckedTyper(no_args_is_help=True, help="Evaluate a reward model or a policy: one command per suite.")


def _finite(value: float | None) -> float | None:
    """Reject NaN, and infinity in open ranges, which typer accepts."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """A JSON object on the command line; None if it is not given.

    Raises:
        InputError: it is none; names the option.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{option} {text}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{option} {text}: must be a JSON object, as in '{{\"enable_thinking\": false}}'")
    return found


Model = Annotated[str, typer.Argument(help="Folder or Hub id of the reward model.")]
TaskName = Annotated[str | None, typer.Option("--task", help="Task. Default: the reward model's.")]
Policy = Annotated[str | None, typer.Option(help="Causal LM whose log-probs are a baseline for the reward.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use N rows.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]
Temperature = Annotated[float, typer.Option(min=0, callback=_finite, help="Sampling temperature.")]
Split = Annotated[str, typer.Option(help="Split of a Hub set.")]
Aggregate = Annotated[str, typer.Option(help="Step reward: mean or min of its tokens.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder. Default: evaluation/ in the model's run folder, or here.")
]
QuestionData = Annotated[str | None, typer.Option(help="Questions with gold answers. Default: the task's own set.")]
QuestionTask = Annotated[
    str | None,
    typer.Option("--task", help="Task that reads the rows and checks answers. Default: the policy's, else generic."),
]
Template = Annotated[
    str | None, typer.Option(help="plain or chat. Default: as the policy was trained by tracereward, else plain.")
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(help="Variables of the chat template as JSON. Default: as the policy was trained, else none."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of a trace.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Traces generated together.")]
SamplingEngine = Annotated[
    str,
    typer.Option(
        "--engine", help="transformers, vllm (tracereward[vllm]), or the URL of an OpenAI-compatible server, with /v1."
    ),
]
Api = Annotated[
    str | None,
    typer.Option(help="With a server: send texts (completions) or messages (chat). Default: by template and model."),
]
Concurrency = Annotated[int, typer.Option(min=1, help="With a server: requests in flight.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results of the same suite in --output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@suites.command()
def pool(
    model: Model,
    data: Annotated[str, typer.Argument(help="Candidates: rows with a trace, and correct or a gold answer.")],
    questions: Annotated[str | None, typer.Option(help="Questions, if rows only have their ids.")] = None,
    task: TaskName = None,
    policy: Policy = None,
    dtype: Dtype = None,
    fit: Annotated[str | None, typer.Option(help="Other candidates to fit on. Default: a share of DATA.")] = None,
    fit_share: Annotated[
        float, typer.Option(min=0.05, max=0.95, callback=_finite, help="Share of the questions to fit on.")
    ] = 0.5,
    limit: Limit = None,
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
    json_table: Json = False,
) -> None:
    """Candidates of many questions: AUROC, best-of-N and vote curves, and calibration, with baselines."""
    from tracereward.evaluate.suites import Results, Trial, run_pool

    results = Results(folder=output, overwrite=overwrite, as_json=json_table)
    trial = Trial(
        model=model, data=data, task=task, policy=policy, limit=limit, seed=seed, results=results, dtype=dtype
    )
    run_pool(trial, questions=questions, fit=fit, fit_share=fit_share)


def _step_suite(name: str, about: str) -> None:
    """Register a suite of labelled steps; they differ only in the format of their rows."""

    def suite(
        model: Model,
        data: Annotated[str, typer.Argument(help="File or Hub id of the labelled traces.")],
        fit: Annotated[
            str | None, typer.Option(help="Another subset to fit the threshold on. Default: half of DATA.")
        ] = None,
        split: Split = "test",
        fit_split: Annotated[str, typer.Option(help="Split of a Hub set in --fit.")] = "test",
        task: TaskName = None,
        policy: Policy = None,
        dtype: Dtype = None,
        aggregate: Aggregate = "mean",
        limit: Limit = None,
        seed: Seed = 0,
        output: Output = None,
        overwrite: Overwrite = False,
        json_table: Json = False,
    ) -> None:
        from tracereward.evaluate.suites import Results, Trial, run_steps

        results = Results(folder=output, overwrite=overwrite, as_json=json_table)
        trial = Trial(
            model=model, data=data, task=task, policy=policy, limit=limit, seed=seed, results=results, dtype=dtype
        )
        run_steps(name, trial, split=split, fit=fit, fit_split=fit_split, aggregate=aggregate)

    suites.command(name, help=about)(suite)


_step_suite("processbench", "First wrong step, with ProcessBench's rows and protocol: F1, Hit@1, Hit@+-1.")
_step_suite("prmbench", "First wrong step in PRMBench's rows of injected errors.")
_step_suite("mrben", "First wrong step in MR-Ben's rows, labelled by people.")


@suites.command()
def perturbation(
    model: Model,
    data: Annotated[str, typer.Argument(help="Correct traces, as for training: file or Hub id.")],
    split: Split = "test",
    task: TaskName = None,
    policy: Policy = None,
    dtype: Dtype = None,
    aggregate: Aggregate = "mean",
    limit: Limit = None,
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
    json_table: Json = False,
) -> None:
    """First wrong step without labels: errors of several kinds injected into correct traces."""
    from tracereward.evaluate.suites import Results, Trial, run_perturbation

    results = Results(folder=output, overwrite=overwrite, as_json=json_table)
    trial = Trial(
        model=model, data=data, task=task, policy=policy, limit=limit, seed=seed, results=results, dtype=dtype
    )
    run_perturbation(trial, split=split, aggregate=aggregate)


@suites.command("policy")
def policy_suite(
    policy: Annotated[str, typer.Argument(help="Folder or Hub id of the policy, or its name at the server.")],
    data: QuestionData = None,
    task: QuestionTask = None,
    n: Annotated[int, typer.Option("-n", "--n", min=0, help="Samples per question; 0 for greedy only.")] = 8,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 1.0,
    split: Split = "test",
    template: Template = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    dtype: PolicyDtype = None,
    engine: SamplingEngine = "transformers",
    api: Api = None,
    concurrency: Concurrency = 32,
    output: Output = None,
    overwrite: Overwrite = False,
    json_table: Json = False,
) -> None:
    """Greedy and sampled accuracy, pass@k, and the shares of traces without an answer or truncated."""
    from tracereward.commands.questions import Questions
    from tracereward.evaluate.suites import Results, run_policy
    from tracereward.generation.engine import EngineOptions
    from tracereward.generation.params import SamplingParams

    kwargs = json_object("--chat-template-kwargs", chat_template_kwargs)
    questions = Questions(
        data=data, task=task, split=split, limit=limit, template=template, chat_template_kwargs=kwargs
    )
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size, dtype=dtype
    )
    run_policy(
        policy,
        questions,
        sampling,
        n=n,
        engine=EngineOptions(name=engine, api=api, concurrency=concurrency),
        results=Results(folder=output, overwrite=overwrite, as_json=json_table),
    )


@suites.command("guided")
def guided_suite(
    policy: Annotated[str, typer.Argument(help="Folder or Hub id of the policy.")],
    reward_model: Annotated[str, typer.Option(help="Folder or Hub id of the reward model; same tokenizer.")],
    data: QuestionData = None,
    task: QuestionTask = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Samples per question; repeatable. Default: 4 and 16.")
    ] = None,
    alpha: Annotated[float, typer.Option(callback=_finite, help="With tilt: weight of the reward.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, help="With tilt: next tokens scored.")] = 8,
    threshold: Annotated[
        float | None,
        typer.Option(
            callback=_finite,
            help="With self-correction: steps with a lower reward are suspected. Default: the reward model's own rule.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 1.0,
    split: Split = "test",
    template: Template = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    dtype: PolicyDtype = None,
    reference: Annotated[
        str | None, typer.Option(help="Model whose log-prob is added, as training with logit_plus_logprob did.")
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
    json_table: Json = False,
) -> None:
    """Beam search, rejection, tilting and self-correction against best-of-N and votes, with the tokens sampled."""
    from tracereward.commands.questions import Questions
    from tracereward.evaluate.guided import Comparison, run_guided
    from tracereward.evaluate.suites import Results
    from tracereward.generation.params import SamplingParams

    kwargs = json_object("--chat-template-kwargs", chat_template_kwargs)
    questions = Questions(
        data=data, task=task, split=split, limit=limit, template=template, chat_template_kwargs=kwargs
    )
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size, dtype=dtype
    )
    comparison = Comparison(budgets=tuple(budget or (4, 16)), alpha=alpha, top_k=top_k, threshold=threshold)
    run_guided(
        policy,
        questions,
        sampling,
        comparison,
        reward_model=reward_model,
        reference=reference,
        results=Results(folder=output, overwrite=overwrite, as_json=json_table),
    )
