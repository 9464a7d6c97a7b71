"""`tracereward evaluate guided`: guided decoding and self-correction against choosing among samples, by budget."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tracereward.commands.questions import Questions, in_force, load_questions, task_reading
from tracereward.commands.sample_guided import check_template, load_guide
from tracereward.console import note
from tracereward.errors import InputError
from tracereward.evaluate.suites import Results, check_answers, publish
from tracereward.generation.decoding import beam, reject, tilt
from tracereward.generation.guide import Guide, Guided
from tracereward.generation.params import SamplingParams
from tracereward.generation.self_correction import self_correct
from tracereward.metrics import bootstrap_interval
from tracereward.reports.tables import Table
from tracereward.rewards.first_error_rules import MarksSteps
from tracereward.rewards.scorer import check_finite
from tracereward.rewards.settings import check_reward_model
from tracereward.selection import Candidate, outcomes
from tracereward.tasks.recipes import Task, get_task

POOL_METHODS = (
    "shortest",
    "majority",
    "logprob",
    "logprob_vote",
    "reward",
    "reward_logprob",
    "vote",
    "reward_logprob_vote",
    "oracle",
)
"""Those of `selection.METHODS` that choose among plain samples: a reward must beat the ones without it."""
ROUNDS = 3
"""Of self-correction; the budget's other samples are divided among them."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        budgets: samples of a question.
        alpha, top_k: of tilted sampling, see `tilt`.
        threshold: of self-correction: a step with a lower reward is suspected; None for the reward model's own rule.
    """

    budgets: tuple[int, ...] = (4, 16)
    alpha: float = 1.0
    top_k: int = 8
    threshold: float | None = None

    def rule(self, guide: Guide) -> MarksSteps | None:
        """Where self-correction cuts; None if there is no threshold, and no rule for the guide's rewards."""
        if self.threshold is not None or (guide.reference is None and guide.scorer.settings.first_error is not None):
            return guide.scorer.settings.first_error_rule(self.threshold, "--threshold")
        return None


def beam_shape(budget: int) -> tuple[int, int]:
    """Width and expansions whose product is at most `budget`: a power of two at most its square root, and the rest."""
    width = 1 << ((budget.bit_length() - 1) // 2)
    return width, budget // width


def candidates(found: Sequence[Sequence[Guided]], golds: Sequence[str], task: Task) -> list[list[Candidate]]:
    """The traces of each question as candidates to choose among, in an order that says nothing about them."""
    rows = [
        [
            Candidate(
                text=t.text,
                answer=task.extract(t.text),
                reward=t.reward,
                logprob=t.logprob,
                length=len(t.ids),
                correct=task.verify(t.text, gold),
            )
            for t in traces
        ]
        for traces, gold in zip(found, golds, strict=True)
    ]
    for question, row in enumerate(rows):
        # Decoding sorts by reward: a vote's ties, which go to the first, would be broken by it.
        random.Random(question).shuffle(row)
    return rows


def compare(
    guide: Guide, prompts: Sequence[str], golds: Sequence[str], *, task: Task, comparison: Comparison
) -> Iterator[dict[str, Any]]:
    """Accuracy of each method at each budget, a number N of complete samples.

    greedy: one trace. `POOL_METHODS`: of N plain samples; those that add a log-prob only where the guide's reward has
    none in it. beam: width * expansions <= N. reject: N at the start. tilt: the best reward of N tilted traces.
    self_correct, with a rule: one plain sample, at most N - 1 continuations in `ROUNDS` rounds or fewer, from budget 2.

    Raises:
        RunFailed: a reward is not finite.

    Yields:
        Rows with method, budget (0 for greedy), right (1 or 0 for each question) and sampled_tokens (its mean).
    """
    rule = comparison.rule(guide)
    vocabulary = guide.policy.get_output_embeddings().weight.shape[0]  # pyright: ignore[reportOptionalMemberAccess]

    def row(method: str, budget: int, picked: Sequence[tuple[str, int]]) -> dict[str, Any]:
        right = [float(task.verify(text, gold)) for (text, _), gold in zip(picked, golds, strict=True)]
        tokens = sum(count for _, count in picked) / len(picked)
        return {"method": method, "budget": budget, "right": right, "sampled_tokens": tokens}

    def first(found: Sequence[Sequence[Guided]]) -> list[tuple[str, int]]:
        return [(traces[0].text, traces[0].sampled_tokens) for traces in found]

    greedy = replace(guide, sampling=replace(guide.sampling, temperature=0.0))
    yield row("greedy", 0, first(tilt(greedy, prompts, alpha=0.0, top_k=1)))
    singles = tilt(guide, prompts, alpha=0.0, top_k=vocabulary)
    for prompt, traces in zip(prompts, singles, strict=True):
        check_finite(f"a trace of {prompt!r}", "reward", [traces[0].reward])
    for budget in comparison.budgets:
        # With alpha 0 and the full vocabulary these are plain samples.
        plain = tilt(guide, prompts, n=budget, alpha=0.0, top_k=vocabulary)
        questions = candidates(plain, golds, task)
        tokens = sum(traces[0].sampled_tokens for traces in plain) / len(plain)
        for method in POOL_METHODS:
            if guide.reference is None or not method.startswith("reward_logprob"):
                right = outcomes(questions, method, task.equal, seed=guide.sampling.seed)
                yield {"method": method, "budget": budget, "right": right, "sampled_tokens": tokens}
        width, expansions = beam_shape(budget)
        yield row("beam", budget, first(beam(guide, prompts, width=width, expansions=expansions)))
        yield row("reject", budget, first(reject(guide, prompts, n=budget)))
        tilted = tilt(guide, prompts, n=budget, alpha=comparison.alpha, top_k=comparison.top_k)
        yield row("tilt", budget, first(tilted))
        if budget > 1 and rule is not None:
            rounds = min(ROUNDS, budget - 1)
            given = [traces[0] for traces in singles]
            asked = guide.encode(prompts)
            found = self_correct(
                guide,
                asked,
                [t.ids for t in given],
                rounds=rounds,
                k=(budget - 1) // rounds,
                rule=rule,
            )
            texts = guide.tokenizer.batch_decode([c.ids for c in found], skip_special_tokens=True)
            counts = [c.sampled_tokens + t.sampled_tokens for c, t in zip(found, given, strict=True)]
            yield row("self_correct", budget, list(zip(texts, counts, strict=True)))


def guided_table(rows: Sequence[dict[str, Any]], questions: int) -> Table:
    """The rows of the result as a table."""
    cells = [
        [r["budget"], r["method"], *(100 * x for x in (r["accuracy"], *r["interval"])), round(r["sampled_tokens"])]
        for r in rows
    ]
    columns = ["samples", "method", "accuracy %", "low", "high", "sampled tokens of a question"]
    return Table(f"Guided decoding, {questions} questions", columns, cells)


def run_guided(
    policy: str,
    questions: Questions,
    sampling: SamplingParams,
    comparison: Comparison,
    *,
    reward_model: str,
    results: Results,
    reference: str | None = None,
) -> None:
    """`tracereward evaluate guided`.

    Args:
        policy: folder or Hub id.
        questions: with gold answers.
        sampling: of the traces.
        comparison: budgets and the methods' options.
        reward_model: folder or Hub id; its tokenizer is the policy's.
        reference: folder or Hub id of the model whose log-prob is added to the rewards.
        results: where the results go.

    Raises:
        InputError: a question without a gold answer, temperature 0, or models that do not fit together.
    """
    if sampling.temperature == 0:
        raise InputError("at temperature 0 all samples of a question are the same: set --temperature above 0")
    settings = check_reward_model(reward_model)
    questions = replace(in_force(questions, policy, settings), date=settings.date)
    task = get_task(str(questions.task))
    base = results.checked("guided", policy, [reward_model, questions.data or task.dataset, reference])
    check_template(reward_model, questions)
    rows, prompts, tokenizer = load_questions(questions, policy)
    check_answers(rows)
    task = task_reading(questions, policy, prompts, tokenizer)
    guide = load_guide(policy, tokenizer, prompts, reward_model=reward_model, sampling=sampling, reference=reference)
    if comparison.rule(guide) is None:
        note(f"no self-correction: {reward_model} has no rule for the first error of such rewards; give --threshold")
    found = []
    for row in compare(guide, prompts, [r["answer"] for r in rows], task=task, comparison=comparison):
        right = row.pop("right")
        interval = bootstrap_interval(right, sampling.seed)
        found.append({**row, "accuracy": sum(right) / len(right), "interval": interval})
        note(f"{row['method']} at {row['budget'] or 1}: {100 * found[-1]['accuracy']:.1f} %")
    options = asdict(comparison)
    del options["budgets"]
    result = {
        "policy": policy,
        "reward_model": reward_model,
        "data": questions.data or task.dataset,
        "questions": len(rows),
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        **options,
        "reference": reference,
        "rows": found,
    }
    publish(base, result, [guided_table(found, len(rows))], as_json=results.as_json)
