"""`tracereward evaluate policy`: accuracy of a policy's greedy and sampled traces, pass@k, and how they fail."""

from collections.abc import Sequence
from itertools import groupby
from math import comb
from typing import Any

from tracereward.metrics import bootstrap_interval, wilson_interval
from tracereward.reports.tables import Table


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - right, k) / C(n, k) (Chen et al. 2021).

    Args:
        n: samples.
        right: how many of them are right.
        k: at most n.
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def evaluate_policy(greedy: Sequence[dict[str, Any]], sampled: Sequence[dict[str, Any]], seed: int = 0) -> dict:
    """Accuracies with 95 % intervals (greedy: Wilson; sampled and pass@k: bootstrap over questions), and failures.

    Args:
        greedy: one row a question, as `sample_rows` makes them; ``correct`` must be known.
        sampled: rows of the same questions, as many for each, a question's together; may be empty.
        seed: of the bootstrap.

    Returns:
        For greedy and, if there are any, sampled: traces, accuracy, interval, and shares of them that are wrong with an
        answer, finished without one, and cut off at the length limit. ``pass_at_k`` for k = 1, 2, 4, ..., n.
    """
    result: dict[str, Any] = {"questions": len(greedy), "greedy": _failures(greedy)}
    low, high = wilson_interval(sum(bool(row["correct"]) for row in greedy), len(greedy))
    result["greedy"]["interval"] = [low, high]
    if not sampled:
        return result
    groups = [[bool(row["correct"]) for row in rows] for _, rows in groupby(sampled, key=lambda row: row["question"])]
    n = len(groups[0])
    result["sampled"] = _failures(sampled)
    result["sampled"]["interval"] = list(bootstrap_interval([sum(group) / n for group in groups], seed))
    result["pass_at_k"] = {}
    for k in [k for k in (1 << power for power in range(n.bit_length())) if k < n] + [n]:
        values = [pass_at_k(n, sum(group), k) for group in groups]
        result["pass_at_k"][str(k)] = [sum(values) / len(values), *bootstrap_interval(values, seed)]
    return result


def _failures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many traces there are, and the shares that are right, wrong, without an answer, and cut off."""
    right = sum(bool(row["correct"]) for row in rows)
    cut_off = sum(not row["correct"] and not row["finished"] for row in rows)
    no_answer = sum(row["finished"] and row["extracted"] is None for row in rows)
    total = len(rows)
    return {
        "traces": total,
        "accuracy": right / total,
        "wrong_answer": (total - right - cut_off - no_answer) / total,
        "no_answer": no_answer / total,
        "cut_off": cut_off / total,
    }


def policy_tables(result: dict[str, Any]) -> list[Table]:
    """The result as tables."""
    kinds = [name for name in ("greedy", "sampled") if name in result]
    rows = [[name, result[name]["traces"], *(100 * value for value in _cells(result[name]))] for name in kinds]
    columns = ["decoding", "traces", "accuracy %", "low", "high", "wrong answer %", "no answer %", "cut off %"]
    tables = [Table(f"Accuracy on {result['questions']} questions", columns, rows)]  # pyright: ignore[reportArgumentType]
    if "pass_at_k" in result:
        found = [[int(k), *(100 * value for value in values)] for k, values in result["pass_at_k"].items()]
        tables.append(Table("pass@k, unbiased estimate", ["k", "%", "95 % low", "95 % high"], found))
    return tables


def _cells(part: dict[str, Any]) -> list[float]:
    return [part["accuracy"], *part["interval"], part["wrong_answer"], part["no_answer"], part["cut_off"]]
