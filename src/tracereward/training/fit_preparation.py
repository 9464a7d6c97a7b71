"""The rows of `tracereward fit` as its data: matched, labelled, encoded, split by question and weighted."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.console import note, warn
from tracereward.data.candidates import CandidateRow, read_candidates
from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.marks import without_dropped
from tracereward.data.matching import Question, match, prompt_text
from tracereward.data.surface_probe import leak_warning
from tracereward.errors import InputError
from tracereward.modeling.loading import context_length, read_config
from tracereward.modeling.lost_text import check_texts
from tracereward.modeling.rendering import Rendering, check_reasoning, render
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.tasks.recipes import Task
from tracereward.training.discriminator_batch import Expert, shared_ids
from tracereward.training.fit_data import FitCandidate, FitData, FitQuestion
from tracereward.training.fit_options import FitOptions
from tracereward.training.label_rules import (
    LabelRule,
    agreement,
    choose_rule,
    expert_answers,
    labels_of,
    remarks_on_labels,
)
from tracereward.training.loss_weights import balance_weights
from tracereward.training.token_probe import token_probe


def read_fit_data(
    options: FitOptions,
    task: Task,
    demonstrations: Any,
    candidates: Any,
) -> tuple[list[Question], LabelRule, str]:
    """Read and match the rows and choose the label rule; says what is odd about them.

    Args:
        options: of the run.
        task: reads the rows.
        demonstrations: rows, or their file.
        candidates: likewise.

    Raises:
        InputError: a row cannot be read, nothing is shared, or there would be one class only.
    """
    subset = task.subset if isinstance(demonstrations, str) and demonstrations == task.dataset else None
    experts = load_demonstrations(demonstrations, task, subset=subset)
    experts, dropped = without_dropped(experts, options.drop)
    rows = read_candidates(candidates, task, questions=options.questions)
    questions, remarks = match(experts, rows)
    remarks = [dropped, *remarks] if dropped else remarks
    positives, negatives = options.positives, options.negatives
    if options.objective == "nnpu":
        positives, negatives = "expert", "all"
    rule, said = choose_rule(questions, task, positives, negatives)
    usable = [question for question in questions if question.demonstrations and question.candidates]
    unpaired, remark = unpaired_questions(questions, options, rule)
    remarks += [remark] if remark else []
    usable += unpaired
    labels = [labels_of(question, rule, task) for question in usable]
    for remark in [*remarks, said, *remarks_on_labels(usable, labels, rule.name)]:
        note(remark)
    return usable, rule, said


def unpaired_questions(
    questions: Sequence[Question], options: FitOptions, rule: LabelRule
) -> tuple[list[Question], str]:
    """The questions without a demonstration that can be learned from, and a sentence on all of them.

    Under ``expert/all`` their candidates are negatives, which bce and nnpu compare with all experts. A question whose
    id, or whose wording apart from white space and case, is that of a question with a demonstration is left out: the
    latter may be held out, and nothing may be learned from it.

    Args:
        questions: of `match`.
        options: of the run.
        rule: for the labels.
    """
    found = [question for question in questions if question.candidates and not question.demonstrations]
    if not found:
        return [], ""
    count = f"{sum(len(question.candidates) for question in found)} candidates of questions without a demonstration"
    if rule.reads_answers:
        return [], f"{count} are not used: label rule {rule.name} compares them with their demonstration's answer"
    if options.objective not in ("bce", "nnpu"):
        return (
            [],
            f"{count} are not used: --objective {options.objective} compares within a question, bce does not",
        )
    if options.balance != "none":
        return [], f"{count} are not used: --balance {options.balance} needs positives and negatives of each question"
    known = {name for question in questions if question.demonstrations for name in _names(question)}
    own = [question for question in found if known.isdisjoint(_names(question))]
    used = sum(len(question.candidates) for question in own)
    kind = "unlabelled" if options.objective == "nnpu" else "negatives"
    said = f"{used} of {count} are {kind}, too"
    if close := [question.where for question in found if not known.isdisjoint(_names(question))]:
        said += (
            f"; {len(close)} of these questions are left out, since one with a demonstration has the same id or "
            f"wording, the first at {close[0]}"
        )
    return own, said


def _names(question: Question) -> set[str]:
    """What a question may be called: its wording, without regard to white space and case, and its ids."""
    ids = {row.question for row in question.candidates}
    return {" ".join(prompt_text(name).split()).casefold() for name in (question.prompt, *ids)}


def encode_questions(
    questions: Sequence[Question],
    options: FitOptions,
    rule: LabelRule,
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
) -> list[FitQuestion]:
    """Render and tokenise all traces, and label the candidates.

    Raises:
        InputError: texts outside the vocabulary, or traces that are too long, under ``--on_long refuse``.
    """
    traces = _Traces(options, tokenizer)
    found = []
    for question in questions:
        rows = [{**row, "kind": "demonstration"} for row in question.demonstrations]
        rows += [
            {"prompt": question.prompt, "completion": row.completion, "source": row.where, "kind": "candidate"}
            for row in question.candidates
        ]
        rendered = render(rows, tokenizer, rendering)
        count = len(question.demonstrations)
        check_reasoning(rendered[:count], tokenizer, rendering)
        text = rendered[0]["prompt"]
        prompt = encode_prompt(tokenizer, text)
        ended = [True] * count + [row.finished for row in question.candidates]
        ids = [
            traces.add(row, prompt, encode_completion(tokenizer, row["completion"], end))
            for row, end in zip(rendered, ended, strict=True)
        ]
        answers = expert_answers(question, task)
        candidates = [
            FitCandidate(row=row, ids=of_row, label=label, correct=_correct(row, answers, task))
            for row, of_row, label in zip(
                question.candidates, ids[count:], labels_of(question, rule, task), strict=True
            )
            if of_row
        ]
        experts = [
            Expert(prompt, of_row, row["completion"])
            for row, of_row in zip(rendered[:count], ids[:count], strict=True)
            if of_row
        ]
        found.append(
            FitQuestion(where=question.where, text=text, prompt=prompt, experts=experts, candidates=candidates)
        )
    traces.check()
    return [question for question in found if question.candidates]


def _correct(row: CandidateRow, answers: Sequence[str], task: Task) -> bool | None:
    """Whether a candidate is right: its own label or gold answer, else the answers that the demonstrations state."""
    if row.correct is not None or not answers:
        return row.correct
    return bool(agreement(row.answer, answers, task))


class _Traces:
    """Lengths and texts of all traces, checked together once all are known."""

    def __init__(self, options: FitOptions, tokenizer: PreTrainedTokenizerBase):
        self.options = options
        self.tokenizer = tokenizer
        self.positions: float = context_length(read_config(str(options.model)))
        self.limit: float = options.max_completion_length or self.positions
        self.texts: list[tuple[str, list[str]]] = []
        self.long: list[tuple[int, int, str]] = []

    def add(self, row: dict[str, Any], prompt: list[int], ids: list[int]) -> list[int]:
        """The trace's token ids; none if it is left out."""
        where = row["source"]
        self.texts.append((where, [row["prompt"], row["completion"]]))
        if len(ids) <= self.limit and len(prompt) + len(ids) <= self.positions:
            return shared_ids(ids)
        self.long.append((len(ids), len(prompt), where))
        return []

    def check(self) -> None:
        """Refuse or report what does not fit.

        Raises:
            InputError: with counts, the first, the longest, and the fix.
        """
        total = len(self.texts)
        check_texts(self.tokenizer, self.texts, "the traces")
        if not self.long:
            return
        length, prompt, where = max(self.long)
        read = f"{self.options.model} reads {self.positions:.0f}"
        limit = f"over {self.limit:.0f} tokens" if self.options.max_completion_length else f"longer than {read}"
        what = (
            f"{len(self.long)} of {total} traces are {limit}, the first at {self.long[0][2]}, the longest at {where} "
            f"({prompt} prompt and {length} completion tokens)"
        )
        if self.options.on_long == "refuse" or len(self.long) == total:
            raise InputError(
                f"{what}. Traces are never truncated: use --on_long drop, or a model with a longer context"
            )
        note(f"{what}: they are left out")


def split_questions(
    questions: Sequence[FitQuestion], fraction: float, seed: int
) -> tuple[list[FitQuestion], list[FitQuestion]]:
    """Training and held-out questions, chosen at random; at least one is left to train on.

    Args:
        questions: all.
        fraction: share held out.
        seed: the same seed holds out the same questions.
    """
    count = min(len(questions) - 1, round(fraction * len(questions)))
    chosen = set(random.Random(f"held out {seed}").sample(range(len(questions)), max(0, count)))
    train = [question for index, question in enumerate(questions) if index not in chosen]
    return train, [questions[index] for index in sorted(chosen)]


def prepare_fit_data(
    options: FitOptions,
    task: Task,
    read: tuple[list[Question], LabelRule, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
) -> FitData:
    """Encode and split the questions.

    Args:
        options: of the run.
        task: compares answers.
        read: of `read_fit_data`.
        tokenizer: the model's.
        rendering: of the prompts.

    Raises:
        InputError: see `encode_questions`; or the questions to train on have no negative.
    """
    questions, rule, said = read
    encoded = encode_questions(questions, options, rule, task=task, tokenizer=tokenizer, rendering=rendering)
    paired = [question for question in encoded if question.experts]
    alone = {question.where for question in questions if not question.demonstrations}
    unpaired = [question for question in encoded if question.where in alone]
    train, held_out = split_questions(paired, options.held_out_fraction, options.seed)
    both = sum(question.negatives > 0 for question in train)
    if both < 2:
        raise InputError(
            f"{both} of {len(train)} questions to train on have a negative under label rule {rule.name}, and 2 are "
            "needed (better 50): give more questions, or candidates of which some disagree with the experts"
            + (", or a lower --held_out_fraction" if held_out else "")
        )
    data = FitData(train=balanced(train, options), unpaired=unpaired, held_out=[], rule=rule, said=said)
    probe = token_probe(data.experts, data.rollouts(perturbed=options.perturbed_per_expert > 0), tokenizer)
    if (warning := leak_warning(probe, "candidates")) is not None:
        warn(warning)
        said += f"; {warning}" + ("" if rule.reads_answers else ": the reward may learn style alone")
    return replace(data, held_out=held_out, said=said, leaks=probe.row)


def balanced(questions: list[FitQuestion], options: FitOptions) -> list[FitQuestion]:
    """The questions with the weights of ``--balance``; see `balance_weights`.

    Raises:
        InputError: nothing can be balanced.
    """
    if options.balance == "none" or (options.balance == "question" and not options.readout):
        return questions  # the discriminator weighs the questions of each update itself
    if options.balance == "model" and all(c.row.model is None for question in questions for c in question.candidates):
        raise InputError("--balance model: no candidate has the field model: add it, or leave the option out")
    rows: list[tuple[bool | None, int, str | None]] = []
    for number, question in enumerate(questions):
        rows += [(True, number, None) for _ in question.experts]
        rows += [(candidate.label, number, candidate.row.model) for candidate in question.candidates]
    labels, numbers, models = zip(*rows, strict=True)
    weights = iter(balance_weights(labels, numbers, models, options.balance))
    found = [
        replace(
            question,
            experts=[expert._replace(weight=next(weights)) for expert in question.experts],
            candidates=[replace(candidate, weight=next(weights)) for candidate in question.candidates],
        )
        for question in questions
    ]
    if not any(expert.weight for question in found for expert in question.experts):
        raise InputError(
            "--balance model: no question is left with positives and negatives, since each model's candidates are all "
            "on one side: use --balance none or question"
        )
    left_out = [question.where for question in found if not any(expert.weight for expert in question.experts)]
    if left_out:
        note(
            f"--balance {options.balance}: {len(left_out)} of {len(found)} questions have one side only and weigh "
            f"nothing, the first at {left_out[0]}"
        )
    return found
