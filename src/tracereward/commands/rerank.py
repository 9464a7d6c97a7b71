"""`tracereward rerank`: choose one of the scored candidates of each question."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tracereward.commands.partial_output import STDOUT, Output, check_new, check_output, of_stream, rows_to, write_row
from tracereward.commands.score import check_any_rows, score_rows
from tracereward.console import note, print_json, say
from tracereward.data.candidates import each_candidate
from tracereward.data.labels import judge, judged_by, judgement_counts
from tracereward.data.readers import STDIN
from tracereward.data.trace_rows import candidate_rows, check_facts, gold_of
from tracereward.errors import InputError, check_choice
from tracereward.files import atomic_write_json, without_nan
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.reports.tables import print_ranking
from tracereward.rewards.abstention import threshold_of
from tracereward.rewards.engines import load_scorer
from tracereward.rewards.parts import task_of
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings, check_reward_model
from tracereward.rewards.token_scores import AGGREGATES
from tracereward.selection import RERANK_METHODS, Candidate, choose, outcomes, ranking_aurocs, ranking_table
from tracereward.tasks.recipes import Task
from tracereward.verdict import BASELINES, verdict


@dataclass(frozen=True, kw_only=True)
class RerankOptions:
    """Options of `tracereward rerank`.

    Attributes:
        model: folder or Hub id of the reward model.
        data: rows with a prompt and one completion, or candidates, a list of texts; stdin is always streamed.
        task: task that checks answers; the reward model's if None.
        method: one of `RERANK_METHODS`.
        aggregate: how token rewards are reduced to a trace reward; as in the reward model's settings if None.
        abstain: bound on the probability of an answer that is wrong, see `rewards.abstention`; None answers all.
        output: where the chosen rows go.
        json_table: print the table as JSON on stdout.
        dtype: precision of the reward model, see `scoring_precision`.
        stream: choose as the rows come, which must be sorted by question; without the table and the verdict, which need
            all of them.
    """

    model: str
    data: str
    task: str | None = None
    method: str = "vote"
    aggregate: str | None = None
    abstain: float | None = None
    output: Output = STDOUT
    json_table: bool = False
    dtype: str | None = None
    stream: bool = False

    @property
    def streamed(self) -> bool:
        """Whether the rows are read once, as they come."""
        return self.stream or self.data == STDIN


def run_rerank(options: RerankOptions) -> None:
    """`tracereward rerank`: write the chosen rows; if answers are known, print a table and the verdict.

    With an output file ``NAME.jsonl`` the verdict is also in ``NAME.verdict.json``.

    Raises:
        InputError: an input cannot be read, or a row lacks a field that the method needs.
        RunFailed: a reward is not finite.
    """
    check_choice("method", options.method, RERANK_METHODS)
    if options.aggregate is not None:
        check_choice("aggregate", options.aggregate, AGGREGATES)
    if options.json_table and options.output.path == "-":
        raise InputError("--json prints the table on stdout: give a file for the chosen rows, -o FILE")
    if options.json_table and options.streamed:
        raise InputError("--json prints a table of all questions, which a stream does not keep: give a file")
    settings = check_reward_model(options.model)
    if options.abstain is not None:
        threshold_of(settings.abstention, options.method, options.abstain)
        if options.aggregate not in (None, settings.aggregate):
            raise InputError(f"--abstain was calibrated for --aggregate {settings.aggregate}: leave the option out")
    task = task_of(settings, options.task)
    options = replace(options, output=of_stream(options.output, options.data))
    check_output(options.output, [options.model, options.data])
    if options.streamed:
        _rerank_stream(options, settings, task)
        return
    verdict_file = None
    if options.output.path is not None and not options.output.to_stdout:
        verdict_file = Path(options.output.path).with_suffix(".verdict.json")
        check_new(verdict_file, [options.model, options.data], overwrite=options.output.overwrite)
    rows = list(_rows(options, settings))
    check_any_rows(len(rows), options.data, None)
    model = _scorer(options, settings)
    chosen, questions = rerank_rows(score_rows(model, rows), task, options.method)
    _abstain(chosen, options, settings)
    table = summary(questions, task, options.method)
    if options.abstain is not None:
        said = answered(chosen, questions, task, options.method)
        note(f"{said}; at most {100 * options.abstain:g} % are expected to be answered wrongly")
    if not options.output.to_stdout or not options.json_table:
        with rows_to(options.output) as file:
            for row in chosen:
                write_row(file, row)
    if verdict_file is not None:
        verdict_file.unlink(missing_ok=True)  # of rows that --overwrite has replaced
        if table is not None and table["verdict"] is not None:
            atomic_write_json(verdict_file, table["verdict"])
    if options.json_table:
        print_json(table)
    elif table is not None:
        print_ranking(table)
        say(judged_by(table["judged"]))
    if table is None:
        counts = judgement_counts(c for candidates in questions for c in candidates)
        if counts["labelled"] or counts["graded"]:
            note(f"no accuracies: {counts['unknown']} rows have neither correct nor a gold answer")


def _abstain(chosen: list[dict[str, Any]], options: RerankOptions, settings: RewardSettings) -> list[dict[str, Any]]:
    """Add to chosen rows whether they are not answered, and why, if that was asked for."""
    if options.abstain is not None:
        for row in chosen:
            why = settings.why_not(options.method, row["reward"], options.abstain)
            row |= {"abstained": why is not None} | ({} if why is None else {"reason": why})
    return chosen


def answered(
    chosen: Sequence[dict[str, Any]], questions: Sequence[Sequence[Candidate]], task: Task, method: str
) -> str:
    """How many questions are answered, and how many of all wrongly if that is known, in a sentence."""
    kept = [not row["abstained"] for row in chosen]
    said = f"{sum(kept)} of {len(chosen)} questions answered"
    if any(c.correct is None for candidates in questions for c in candidates):
        return said
    right = outcomes(questions, method, task.equal)
    wrong = sum(keep and not is_right for keep, is_right in zip(kept, right, strict=True))
    return f"{said}, {wrong} of them wrongly ({100 * wrong / len(chosen):.1f} % of all)"


def _rerank_stream(options: RerankOptions, settings: RewardSettings, task: Task) -> None:
    """Write the chosen row of each question as soon as its candidates are scored; memory use is constant."""
    note("the rows are read as they come: no table and no verdict, which compare all questions (give a file)")
    rows = _adjacent(_rows(options, settings))
    first = list(itertools.islice(rows, 1))
    check_any_rows(len(first), options.data, None)
    scored = score_rows(_scorer(options, settings), itertools.chain(first, rows))
    with rows_to(options.output) as file:
        for _, group in itertools.groupby(scored, key=question_key):
            for row in _abstain(rerank_rows(group, task, options.method)[0], options, settings):
                write_row(file, row)
            if options.output.to_stdout:  # the next command of a pipe need not wait
                file.flush()


def _scorer(options: RerankOptions, settings: RewardSettings) -> Scorer:
    model = load_scorer(options.model, dtype=options.dtype)
    if options.aggregate is not None:
        model.settings = replace(settings, aggregate=options.aggregate)
    return model


def _rows(options: RerankOptions, settings: RewardSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """One row for each candidate.

    Raises:
        InputError: a row lacks a field that the method needs, or one has a wrong type.
    """
    tokenizer = load_tokenizer(options.model)
    for where, row in candidate_rows(
        options.data, template=settings.template, tokenizer=tokenizer, stream=options.streamed
    ):
        for one in each_candidate(row, where):
            check_facts(where, one)
            if "completion" not in one or ("logprob" in options.method and one.get("logprob") is None):
                single = "completion" in one
                need = f"a logprob in each row for --method {options.method}" if single else "a completion in each row"
                raise InputError(f"{where}: rerank needs {need}; `tracereward sample` writes it")
            yield where, one


def question_key(row: dict[str, Any]) -> str:
    """What the candidates of one question have in common."""
    return json.dumps([row.get("question"), row["prompt"]])


def _adjacent(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, if those of each question are adjacent. Of a question that is over only a hash is kept, and its line.

    Raises:
        InputError: a question returns; names its last line and the new one.
    """
    ended: dict[bytes, str] = {}
    last: tuple[bytes, str] | None = None
    for where, row in rows:
        key = hashlib.blake2b(question_key(row).encode(), digest_size=12).digest()
        if last is not None and last[0] != key:
            ended[last[0]] = last[1]
            if key in ended:
                raise InputError(
                    f"{where}: the question of {ended[key]} returns: in a stream the candidates of a question must be "
                    "adjacent; sort the rows, or give them as a file without --stream"
                )
        last = key, where
        yield where, row


def candidate_of(row: dict[str, Any], task: Task) -> Candidate:
    """A scored row as a candidate, judged by `judge`."""
    text = row["completion"]
    judged = judge(row, text, task, gold_of(row))
    return Candidate(
        text=text,
        answer=judged.answer,
        reward=row["reward"],
        logprob=row.get("logprob"),
        length=len(text),
        correct=judged.correct,
        labelled=judged.labelled,
    )


def rerank_rows(
    scored: Iterable[dict[str, Any]], task: Task, method: str
) -> tuple[list[dict[str, Any]], list[list[Candidate]]]:
    """The chosen row of each question, in the order of first occurrence, and the candidates of all questions."""
    groups: dict[str, list[tuple[dict[str, Any], Candidate]]] = {}
    for row in scored:
        kept = {name: row[name] for name in ("question", "prompt", "completion", "answer", "reward") if name in row}
        groups.setdefault(question_key(row), []).append((kept, candidate_of(row, task)))
    chosen, questions = [], []
    for group in groups.values():
        candidates = [candidate for _, candidate in group]
        best = choose(candidates, method, task.equal)
        found = {"extracted": candidates[best].answer, "method": method, "of": len(group)}
        chosen.append({**group[best][0], **found})
        questions.append(candidates)
    return chosen, questions


def summary(questions: list[list[Candidate]], task: Task, method: str = "vote") -> dict[str, Any] | None:
    """Accuracies by label, the label of the ``chosen`` method, AUROCs, and the verdict.

    The verdict is on the method, or on ``vote`` if the method does not use the reward.

    None if the correctness of a candidate is unknown.
    """
    counts = judgement_counts(c for candidates in questions for c in candidates)
    if counts["unknown"]:
        return None
    rows = ranking_table(questions, task.equal)
    found = verdict(questions, task.equal, "vote" if method in (*BASELINES, "random") else method)
    return {
        "questions": len(questions),
        "no_answer": sum(c.answer is None for candidates in questions for c in candidates),
        "judged": counts,
        "chosen": next(row.label for row in rows if row.method == method),
        "accuracy": {row.label: [row.accuracy, row.low, row.high] for row in rows},
        # JSON has no NaN: an AUROC is undefined if all candidates are correct or all are wrong.
        **without_nan(ranking_aurocs(questions)),
        "verdict": None if found is None else without_nan(found.to_dict()),
    }
