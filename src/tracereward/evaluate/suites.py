"""The suites as commands run them: read and check everything, load models, evaluate, write JSON and a report."""

import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tracereward.commands.partial_output import check_folder_writable, check_new
from tracereward.commands.questions import Questions, in_force_at, read_questions
from tracereward.commands.sample import TRANSFORMERS, load_sampler
from tracereward.console import note, print_json, say, warn
from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.labels import judged_by, judgement_counts
from tracereward.errors import InputError, check_choice
from tracereward.evaluate.figures import pool_figures
from tracereward.evaluate.first_error import STEP_AGGREGATES
from tracereward.evaluate.perturbation import evaluate_perturbations
from tracereward.evaluate.perturbation import step_tables as perturbation_tables
from tracereward.evaluate.policy import evaluate_policy, policy_tables
from tracereward.evaluate.pool import evaluate_pool, pool_tables, score_pool, split_questions
from tracereward.evaluate.pool_data import PoolRow, read_pool
from tracereward.evaluate.step_data import read_step_traces, split_by_question
from tracereward.evaluate.steps import evaluate_steps, step_tables
from tracereward.files import atomic_write_json, read_json
from tracereward.generation.engine import EngineOptions
from tracereward.generation.params import SamplingParams
from tracereward.metrics import auroc, auroc_interval
from tracereward.modeling.hub import looks_local, split_name
from tracereward.modeling.loading import check_model, local_folder
from tracereward.modeling.rendering import render_prompt
from tracereward.reports.report import Report, write_report
from tracereward.reports.tables import Table, print_tables
from tracereward.reports.verdicts import verdict_html
from tracereward.rewards.abstention import fit_abstention
from tracereward.rewards.calibration import Calibration, check_labels, fit_calibration
from tracereward.rewards.engines import load_log_prob_model, load_reward_model, precision_of
from tracereward.rewards.first_error_fit import JudgedTrace, find_rule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.parts import task_of
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import check_reward_model, write_fitted
from tracereward.tasks.recipes import Task, get_task
from tracereward.verdict import Verdict

MIN_SPREAD = 0.05
"""Of the probabilities of a calibration, from the 5th to the 95th percentile; under it `calibrate` warns."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Where a suite writes its results, and what it prints.

    Attributes:
        folder: None is ``evaluation`` in the run folder of the model, or here.
        overwrite: replace results of the same suite in that folder.
        as_json: print JSON instead of tables.
    """

    folder: Path | None = None
    overwrite: bool = False
    as_json: bool = False

    def checked(self, suite: str, model: str, inputs: Sequence[str | None]) -> Path:
        """Path of the results without its ending, checked before anything slow starts: the suite's name in the folder.

        Where that has results of another model or other data, it gets a number: ``pool-2``.

        Args:
            suite: name of the suite.
            model: folder or Hub id of the model that is evaluated.
            inputs: what else the suite reads, see `check_new`.

        Raises:
            InputError: it cannot be written, or has results that may not be replaced.
        """
        run = Path(model).parent
        folder = self.folder or (run if (run / "config.yaml").is_file() else Path()) / "evaluation"
        check_folder_writable(folder)
        names = itertools.chain([suite], (f"{suite}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if not _of_others(folder / f"{name}.json", {model, *inputs}))
        if self.overwrite and not (folder / f"{name}.json").exists():
            name = suite
        if name != suite:
            note(f"{folder / suite}.json has results of other inputs and is kept: these go to {name}.json")
        for suffix in ("json", "html"):
            check_new(folder / f"{name}.{suffix}", [model, *inputs], overwrite=self.overwrite)
        return folder / name


def _of_others(path: Path, inputs: Collection[str | None]) -> bool:
    """Whether a file has results of a model or of data that are not among `inputs`."""
    try:
        stored = read_json(path)
        # Next to a reward model the policy is a baseline only.
        judged = ("model",) if "model" in stored else ("policy", "reward_model")
        named = {stored.get(name) for name in (*judged, "data")} - {None}
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return not named <= set(inputs)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The options that all suites of a reward model have.

    Attributes:
        model: folder or Hub id of the reward model.
        data: file or Hub id to judge it on.
        task: name of a task; None is the reward model's.
        policy: causal LM whose log-probs are a baseline.
        limit: use as many rows only.
        seed: of every random number.
        results: where the results go.
        dtype: precision of the models, see `modeling.precision`.
    """

    model: str
    data: str
    task: str | None = None
    policy: str | None = None
    limit: int | None = None
    seed: int = 0
    results: Results = Results()
    dtype: str | None = None


def load(model: str, policy: str | None, dtype: str | None = None) -> tuple[TokenRewardModel, PreTrainedModel | None]:
    """A reward model and the causal LM of its baseline, on the best device; `dtype` as for `modeling.precision`."""
    reward_model = load_reward_model(model, dtype)
    return reward_model, load_log_prob_model(reward_model, policy, dtype)


def check(model: str, policy: str | None, task: str | None) -> Task:
    """Refuse unusable models before anything slow starts; returns the task, by default the reward model's own."""
    settings = check_reward_model(model)
    if policy is not None:
        check_model(policy)
    return task_of(settings, task)


def check_answers(rows: Sequence[dict[str, Any]]) -> None:
    """Refuse questions without a gold answer.

    Raises:
        InputError: there is one, by file and line.
    """
    for row in rows:
        if row["answer"] is None:
            raise InputError(f"{row['source']}: no gold answer: accuracy cannot be measured")


def publish(
    base: Path,
    result: dict[str, Any],
    tables: list[Table],
    *,
    as_json: bool,
    figures: Sequence[dict[str, Any]] = (),
) -> None:
    """Write ``BASE.json`` and ``BASE.html``, and print the tables, or the JSON, on stdout."""
    found = Verdict.from_dict(result["verdict"]) if result.get("verdict") else None
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(base.with_name(f"{base.name}.json"), result)
        write_report(
            base.with_name(f"{base.name}.html"),
            Report(
                title=f"Evaluation: {base.name}",
                summary=f"{result.get('model') or result['policy']} on {result['data']}.",
                command=" ".join(["tracereward", *sys.argv[1:]]),
                verdict="" if found is None else verdict_html(found),
                tables=tables,
                figures=figures,
            ),
        )
    finally:  # on a full disk too
        if as_json:
            print_json(result)
        else:
            print_tables(tables)
    if found is not None:
        say(f"Verdict: {found.line}")
    note(f"written: {base}.json and .html")


def run_pool(trial: Trial, *, questions: str | None, fit: str | None, fit_share: float) -> None:
    """`tracereward evaluate pool`.

    Args:
        trial: options of all suites.
        questions: file of the questions, where rows name them by id only.
        fit: other candidates to fit on; None: a share of the data.
        fit_share: share of the questions to fit on.

    Raises:
        InputError: anything that cannot be read, too few questions to fit and to judge on, or one that is in both sets.
    """
    model, data, policy, seed = trial.model, trial.data, trial.policy, trial.seed
    task_spec = check(model, policy, trial.task)
    base = trial.results.checked("pool", model, [data, policy, questions, fit])
    verdict = base.with_name(f"verdict{base.name.removeprefix('pool')}.json")
    check_new(verdict, [model, data, policy, questions, fit], overwrite=trial.results.overwrite)
    rows = read_pool(data, task_spec, questions, trial.limit)
    fit_rows = read_pool(fit, task_spec, questions) if fit else []
    asked = {row.asked: row.where for row in rows}
    for row in fit_rows:
        if row.asked in asked:
            raise InputError(f"{row.where}: its question is judged too, in {asked[row.asked]}: fit on other questions")
    reward_model, baseline = load(model, policy, trial.dtype)
    judged, left_out = score_pool(reward_model, rows, baseline)
    if fit:
        fit_questions = score_pool(reward_model, fit_rows, baseline)[0]
    else:
        fit_questions, judged = split_questions(judged, fit_share, seed)
        if not judged or not fit_questions:
            count = len(judged) + len(fit_questions)
            raise InputError(f"{data}: too few questions, {count}, to fit on some and judge on others: give --fit")
    result: dict[str, Any] = {"model": model, "data": data, "policy": policy, "left_out": left_out, "seed": seed}
    result |= evaluate_pool(judged, fit_questions, task_spec.equal, seed)
    if left_out:
        note(f"{left_out} candidates are empty or longer than the model reads and were left out")
    if result["uncalibrated"]:
        note(f"{fit or data}: no calibrations: {result['uncalibrated']}")
    if result["verdict"]:
        base.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(verdict, result["verdict"])
    publish(base, result, pool_tables(result), as_json=trial.results.as_json, figures=pool_figures(result))


def run_steps(suite: str, trial: Trial, *, split: str, fit: str | None, fit_split: str, aggregate: str) -> None:
    """`tracereward evaluate processbench`, `prmbench` and `mrben`.

    Args:
        suite: its name.
        trial: options of all suites.
        split: of a Hub set.
        fit: another subset, for the threshold; None: half of the data.
        fit_split: split of a Hub set in `fit`.
        aggregate: of a step's token rewards, one of `STEP_AGGREGATES`.
    """
    model, data, policy, seed = trial.model, trial.data, trial.policy, trial.seed
    task_spec = check(model, policy, trial.task)
    check_choice("aggregate", aggregate, STEP_AGGREGATES)
    base = trial.results.checked(suite, model, [data, policy, fit])
    traces = read_step_traces(data, suite, split=split, limit=trial.limit)
    if fit:
        fit_traces = read_step_traces(fit, suite, split=fit_split)
    else:
        fit_traces, traces = split_by_question(traces, 0.5, seed)
    reward_model, baseline = load(model, policy, trial.dtype)
    result = {"model": model, "data": data, "policy": policy, "fit": fit}
    result |= evaluate_steps(
        reward_model, traces, fit_traces, policy=baseline, task=task_spec.name, aggregate=aggregate, seed=seed
    )
    publish(base, result, step_tables(result), as_json=trial.results.as_json)


def run_perturbation(trial: Trial, *, split: str, aggregate: str) -> None:
    """`tracereward evaluate perturbation`.

    Args:
        trial: options of all suites.
        split: of a Hub set.
        aggregate: of a step's token rewards, one of `STEP_AGGREGATES`.
    """
    model, data, policy = trial.model, trial.data, trial.policy
    task_spec = check(model, policy, trial.task)
    check_choice("aggregate", aggregate, STEP_AGGREGATES)
    base = trial.results.checked("perturbation", model, [data, policy])
    subset = task_spec.subset if data == task_spec.dataset else None
    rows = load_demonstrations(data, task_spec, split=split, subset=subset, limit=trial.limit)
    reward_model, baseline = load(model, policy, trial.dtype)
    result = {"model": model, "data": data, "policy": policy}
    result |= evaluate_perturbations(reward_model, rows, policy=baseline, aggregate=aggregate, seed=trial.seed)
    publish(base, result, perturbation_tables(result), as_json=trial.results.as_json)


def run_policy(
    policy: str,
    questions: Questions,
    sampling: SamplingParams,
    *,
    n: int,
    engine: EngineOptions = TRANSFORMERS,
    results: Results,
) -> None:
    """`tracereward evaluate policy`.

    Args:
        policy: folder or Hub id, or its name at the server.
        questions: with gold answers.
        sampling: of the samples; greedy traces have the same length limit.
        n: samples of each question; 0 for greedy alone.
        engine: where to sample.
        results: where the results go.

    Raises:
        InputError: a question without a gold answer, or several samples of each at temperature 0.
        RunFailed: a server has not answered all questions.
    """
    if n > 1 and sampling.temperature == 0:
        raise InputError(f"n is {n}: at temperature 0 all samples of a question are the same; use -n 0")
    base = results.checked("policy", policy, [questions.data or get_task(str(questions.task)).dataset])
    questions, engine = in_force_at(engine, questions, policy)
    check_answers(read_questions(questions))
    sampler = load_sampler(policy, questions, sampling, engine)
    greedy_chunks = sampler.sample(replace(sampling, temperature=0.0), n=1)
    chunks = sampler.sample(sampling, n=n) if n else []
    # A server answers in any order.
    greedy, sampled = (
        sorted((row for chunk in each for row in chunk), key=lambda row: row["question"])
        for each in (greedy_chunks, chunks)
    )
    result = {
        "policy": policy,
        "data": questions.data or get_task(str(questions.task)).dataset,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    result |= evaluate_policy(greedy, sampled, sampling.seed)
    publish(base, result, policy_tables(result), as_json=results.as_json)


def useless_fit(
    calibration: Calibration, rewards: Sequence[float], correct: Sequence[bool], prompts: Sequence[int]
) -> Iterator[str]:
    """Reasons why a calibration's probabilities do not separate right from wrong traces, on the traces of its fit."""
    low, high = auroc_interval(rewards, correct, prompts)
    right = sum(correct)
    kinds = f"{right} right and {len(correct) - right} wrong traces"
    if calibration.slope < 0 or not low > 0.5:
        slope = "" if calibration.method == "isotonic" else f", slope {calibration.slope:.3g}"
        yield (
            f"the reward does not rise with correctness beyond chance (AUROC {auroc(rewards, correct):.3f} of {kinds}, "
            f"95 % interval {low:.3f} to {high:.3f}{slope})"
        )
    first, last = np.percentile(calibration.probabilities(rewards), [5, 95])
    if last - first < MIN_SPREAD:
        yield f"nine probabilities in ten lie between {first:.3f} and {last:.3f}, whatever the reward"


def run_calibrate(
    model: str,
    data: str,
    *,
    questions: str | None,
    task: str | None,
    method: str,
    overwrite: bool = False,
    dtype: str | None = None,
) -> tuple[Calibration, int]:
    """`tracereward calibrate`: fit on labelled traces and store the fit in the model's ``tracereward.json``.

    The precision is stored too: rewards in another one have other digits, so `score` uses it by default.

    Returns:
        The calibration, and how many traces were left out as empty or too long.

    Raises:
        InputError: anything that cannot be read, too few traces of a kind, or a calibration that may not be replaced.
    """
    if not looks_local(model):
        raise InputError(
            f"{model}: the calibration is written into the model's folder: download it first, for example with "
            f"`hf download {split_name(model)[0]} --local-dir reward_model`"
        )
    task_spec = check(model, None, task)
    stored = check_reward_model(model).calibration
    if stored is not None and not overwrite:
        raise InputError(
            f"{model} has a calibration already ({stored.method}, fitted on {stored.traces} traces): replace it with "
            "--overwrite"
        )
    check_folder_writable(local_folder(model))
    rows = read_pool(data, task_spec, questions)
    try:
        check_labels([row.correct for row in rows])
    except InputError as error:
        raise InputError(f"{data}: {error}") from error
    reward_model, _ = load(model, None, dtype)
    groups, left_out = score_pool(reward_model, rows)
    flat = [c for candidates in groups for c in candidates]
    rewards, correct = [c.reward for c in flat], [bool(c.correct) for c in flat]
    try:
        calibration = fit_calibration(rewards, correct, method)
    except InputError as error:
        raise InputError(f"{data}: {error}") from error
    note(f"{data}: {judged_by(judgement_counts(flat))} {sum(c.answer is None for c in flat)} traces state no answer.")
    prompts = [index for index, candidates in enumerate(groups) for _ in candidates]
    for reason in useless_fit(calibration, rewards, correct, prompts):
        warn(f"{data}: {reason}: the probabilities say little about other traces")
    precision = precision_of(model, dtype)
    records = fit_abstention(groups, task_spec.equal)
    name = "" if precision.own else precision.name
    write_fitted(local_folder(model), calibration=calibration, abstention=records, dtype=name)
    note(f"{data}: {len(groups)} questions for --abstain of rerank and serve: risks from {records[0].lowest_risk:.3g}")
    rule, text = find_rule(reward_model, judged_traces(reward_model, rows))
    if rule is not None:
        write_fitted(local_folder(model), first_error=rule)
    note(text)
    return calibration, left_out


def judged_traces(model: Scorer, rows: Sequence[PoolRow]) -> list[JudgedTrace]:
    """Labelled rows as traces to fit the rule for the first error on."""
    settings = model.settings
    return [
        JudgedTrace(
            prompt=render_prompt(model.tokenizer, row.prompt, settings.rendering, row.where),
            completion=row.completion,
            right=row.correct,
            finished=row.finished,
            source="rollout",
        )
        for row in rows
    ]
