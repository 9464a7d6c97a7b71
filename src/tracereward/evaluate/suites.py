"""The suites as commands run them: read and check everything, load models, evaluate, write JSON and a report."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tracereward.commands.sample import load_questions, sample_rows
from tracereward.console import note
from tracereward.data.demonstrations import load_demonstrations
from tracereward.errors import InputError, check_choice
from tracereward.evaluate.first_error import STEP_AGGREGATES
from tracereward.evaluate.perturbation import evaluate_perturbations
from tracereward.evaluate.perturbation import step_tables as perturbation_tables
from tracereward.evaluate.policy import evaluate_policy, policy_tables
from tracereward.evaluate.pool import evaluate_pool, pool_figures, pool_tables, score_pool, split_questions
from tracereward.evaluate.pool_data import read_pool
from tracereward.evaluate.step_data import read_step_traces, split_by_question
from tracereward.evaluate.steps import evaluate_steps, step_tables
from tracereward.files import atomic_write_json
from tracereward.metrics import auroc
from tracereward.modeling.loading import best_device, check_model, local_folder
from tracereward.reports.report import Report, write_report
from tracereward.reports.tables import Table, print_tables
from tracereward.rewards.calibration import Calibration, fit_calibration
from tracereward.rewards.engines import load_log_prob_model
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import check_reward_model, write_calibration
from tracereward.tasks.recipes import Task, get_task


def load(model: str, policy: str | None) -> tuple[TokenRewardModel, PreTrainedModel | None]:
    """A reward model and the causal LM beside it, on the best device."""
    reward_model = TokenRewardModel.from_pretrained(model).to(best_device())
    return reward_model, load_log_prob_model(reward_model, policy)


def check(model: str, policy: str | None, task: str | None) -> Task:
    """Refuse what cannot be used before anything long starts; the recipe, the reward model's own by default."""
    settings = check_reward_model(model)
    if policy is not None:
        check_model(policy)
    return get_task(task or settings.task)


def check_answers(rows: Sequence[dict[str, Any]]) -> None:
    """Refuse questions whose gold answer is not known.

    Raises:
        InputError: there is one, by file and line.
    """
    for row in rows:
        if row["answer"] is None:
            raise InputError(f"{row['source']}: no gold answer: accuracy cannot be measured")


def output_folder(model: str, output: Path | None) -> Path:
    """Where an evaluation goes: `output`, else ``evaluation`` in the run folder of the model, or here.

    Raises:
        InputError: a file is in the way.
    """
    beside = Path(model).parent
    folder = output or (beside if (beside / "config.yaml").is_file() else Path()) / "evaluation"
    in_the_way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise InputError(f"{in_the_way}: is a file, not a folder; choose another --output")
    return folder


def publish(
    folder: Path,
    suite: str,
    result: dict[str, Any],
    tables: list[Table],
    figures: list[dict[str, Any]],
    as_json: bool,
) -> None:
    """Write ``SUITE.json`` and ``SUITE.html``, and print the tables, or the JSON, on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / f"{suite}.json", result)
    write_report(
        folder / f"{suite}.html",
        Report(
            title=f"Evaluation: {suite}",
            summary=f"{result.get('model') or result['policy']} on {result['data']}",
            command=" ".join(["tracereward", *sys.argv[1:]]),
            tables=tables,
            figures=figures,
        ),
    )
    if as_json:
        print(json.dumps(result))
    else:
        print_tables(tables)
    note(f"written: {folder / suite}.json and .html")


def run_pool(
    model: str,
    data: str,
    questions: str | None,
    task: str | None,
    policy: str | None,
    fit: str | None,
    fit_share: float,
    limit: int | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """`tracereward evaluate pool`.

    Raises:
        InputError: anything that cannot be read, too few questions to fit and to judge on, or one that is in both sets.
    """
    recipe = check(model, policy, task)
    folder = output_folder(model, output)
    rows = read_pool(data, recipe, questions, limit)
    fit_rows = read_pool(fit, recipe, questions) if fit else []
    asked = {row.asked: row.where for row in rows}
    for row in fit_rows:
        if row.asked in asked:
            raise InputError(f"{row.where}: its question is judged too, in {asked[row.asked]}: fit on other questions")
    reward_model, beside = load(model, policy)
    judged, left_out = score_pool(reward_model, rows, beside)
    if fit:
        fit_questions = score_pool(reward_model, fit_rows, beside)[0]
    else:
        fit_questions, judged = split_questions(judged, fit_share, seed)
        if not judged or not fit_questions:
            count = len(judged) + len(fit_questions)
            raise InputError(f"{data}: too few questions, {count}, to fit on some and judge on others: give --fit")
    result: dict[str, Any] = {"model": model, "data": data, "policy": policy, "left_out": left_out, "seed": seed}
    result |= evaluate_pool(judged, fit_questions, recipe.equal, seed)
    if left_out:
        note(f"{left_out} candidates are empty or longer than the model reads and were left out")
    if result["uncalibrated"]:
        note(f"{fit or data}: no calibrations: {result['uncalibrated']}")
    publish(folder, "pool", result, pool_tables(result), pool_figures(result), as_json)


def run_steps(
    suite: str,
    model: str,
    data: str,
    fit: str | None,
    split: str,
    fit_split: str,
    task: str | None,
    policy: str | None,
    aggregate: str,
    limit: int | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """`tracereward evaluate processbench`, `prmbench` and `mrben`."""
    recipe = check(model, policy, task)
    check_choice("aggregate", aggregate, STEP_AGGREGATES)
    folder = output_folder(model, output)
    traces = read_step_traces(data, suite, split, limit=limit)
    if fit:
        fit_traces = read_step_traces(fit, suite, fit_split)
    else:
        fit_traces, traces = split_by_question(traces, 0.5, seed)
    reward_model, beside = load(model, policy)
    result = {"model": model, "data": data, "policy": policy, "fit": fit}
    result |= evaluate_steps(
        reward_model, traces, fit_traces, policy=beside, task=recipe.name, aggregate=aggregate, seed=seed
    )
    publish(folder, suite, result, step_tables(result), [], as_json)


def run_perturbation(
    model: str,
    data: str,
    split: str,
    task: str | None,
    policy: str | None,
    aggregate: str,
    limit: int | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """`tracereward evaluate perturbation`."""
    recipe = check(model, policy, task)
    check_choice("aggregate", aggregate, STEP_AGGREGATES)
    folder = output_folder(model, output)
    subset = recipe.subset if data == recipe.dataset else None
    rows = load_demonstrations(data, recipe, split, subset, limit)
    reward_model, beside = load(model, policy)
    result = {"model": model, "data": data, "policy": policy}
    result |= evaluate_perturbations(reward_model, rows, policy=beside, aggregate=aggregate, seed=seed)
    publish(folder, "perturbation", result, perturbation_tables(result), [], as_json)


def run_policy(
    policy: str,
    data: str | None,
    task: str,
    n: int,
    max_new_tokens: int,
    temperature: float,
    split: str,
    template: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """`tracereward evaluate policy`.

    Raises:
        InputError: a question without a gold answer, or several samples of each at temperature 0.
    """
    if n > 1 and temperature == 0:
        raise InputError(f"n is {n}: at temperature 0 all samples of a question are the same; use -n 0")
    folder = output_folder(policy, output)
    common: dict[str, Any] = {"limit": limit, "split": split, "template": template, "batch_size": batch_size}
    check_answers(load_questions(policy, data, task, limit, split, template)[0])
    greedy = [row for chunk in sample_rows(policy, data, task, 1, max_new_tokens, 0.0, **common) for row in chunk]
    drawn = sample_rows(policy, data, task, n, max_new_tokens, temperature, seed=seed, **common) if n else []
    sampled = [row for chunk in drawn for row in chunk]
    result = {"policy": policy, "data": data or get_task(task).dataset, "temperature": temperature, "seed": seed}
    result |= evaluate_policy(greedy, sampled, seed)
    publish(folder, "policy", result, policy_tables(result), [], as_json)


def run_calibrate(
    model: str, data: str, questions: str | None, task: str | None, method: str
) -> tuple[Calibration, int]:
    """`tracereward calibrate`: fit on labelled traces and store the fit in the model's ``tracereward.json``.

    Returns:
        The calibration, and how many traces were left out as empty or too long.

    Raises:
        InputError: anything that cannot be read, or too few traces of a kind.
    """
    recipe = check(model, None, task)
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"{model}: the calibration is written into the model: give a local folder")
    rows = read_pool(data, recipe, questions)
    groups, left_out = score_pool(load(model, None)[0], rows)
    flat = [c for candidates in groups for c in candidates]
    rewards, correct = [c.reward for c in flat], [bool(c.correct) for c in flat]
    try:
        calibration = fit_calibration(rewards, correct, method)
    except InputError as error:
        raise InputError(f"{data}: {error}") from error
    area = auroc(rewards, correct)
    if area < 0.5 or calibration.slope < 0:
        slope = "" if method == "isotonic" else f", slope {calibration.slope:.3g}"
        note(
            f"warning: {data}: the reward does not rise with correctness (AUROC {area:.3f} of {sum(correct)} right and "
            f"{len(correct) - sum(correct)} wrong traces{slope}): the probabilities say little about other traces"
        )
    write_calibration(local_folder(model), calibration)
    return calibration, left_out
