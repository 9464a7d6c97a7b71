"""The quickstart's results: in the terminal, and as a page."""

from pathlib import Path
from typing import Any

from tracereward.console import note
from tracereward.files import read_jsonl
from tracereward.reports.report import Report, ScoredTrace, write_report
from tracereward.reports.tables import AUROC_LABELS, Table, interval, percent, print_tables
from tracereward.reports.verdicts import verdict_html
from tracereward.rewards.token_scores import TokenScores
from tracereward.runs.report import pick_traces
from tracereward.tasks.recipes import get_task
from tracereward.verdict import Verdict

BEST = "vote@8 weighted by reward + log-prob"


def print_results(output: Path, results: dict[str, Any]) -> None:
    """Print four rows on stdout, what they say about policy and reward, and what to do next."""
    policies = {row["label"]: row for row in results["policies"]}
    start, (sft, *_, trained) = results["policies"][0], list(policies.values())[1:]
    value, low, high = results["ranking"]["accuracy"][BEST]
    rows: list[list[str | float | int | None]] = [
        [row["label"], percent(row["accuracy"]), interval(row["low"], row["high"])] for row in (start, sft)
    ]
    rows.append([f"SFT, {BEST}", percent(value), interval(low, high)])
    rows.append([trained["label"], percent(trained["accuracy"]), interval(trained["low"], trained["high"])])
    title = f"Right answers to {results['questions']} questions that nothing was trained on"
    print_tables([Table(title, ["policy", "%", "95 % interval"], rows)])
    if results["ranking"]["verdict"] is not None:
        note(f"The reward: {results['ranking']['verdict']['line']}")
    note(f"The policy trained on it: {gains_text(results)}")
    note(
        f"""All figures, curves and traces: {output / "report.html"}
Next:
  tracereward inspect {output / "samples.jsonl"} -o traces.html    # where each trace goes wrong, token by token
  tracereward sample {output / "train" / "policy"} --data {output / "data" / "test.jsonl"} -n 4 -o samples.jsonl
  tracereward fit --help    # a reward model from your own expert traces and logged traces"""
    )


def gains_text(results: dict[str, Any]) -> str:
    """What the policy trained on the reward gains over SFT and over GRPO on log-prob."""
    gains = {gain["baseline"]: gain for gain in results["gains"]}
    return "; ".join(gain_text(gains[name]) for name in (results["policies"][1]["label"], list(gains)[-1]))


def gain_text(gain: dict[str, Any]) -> str:
    """The difference of two accuracies, a stored `verdict.Comparison`."""
    points = [f"{100 * gain[name]:+.1f}" for name in ("difference", "low", "high")]
    return f"{points[0]} points over {gain['baseline']} ({points[1]} to {points[2]})"


def write_quickstart_report(output: Path, world: str, seed: int, results: dict[str, Any]) -> None:
    """Write ``report.html``: policies, reranking, metrics and scored traces."""
    samples, found = read_jsonl(output / "samples.jsonl"), results["ranking"]["verdict"]
    traces = []
    for row in samples:
        scores = TokenScores(
            tokens=row["tokens"],
            offsets=[tuple(o) for o in row["offsets"]],
            rewards=row["token_rewards"],
            supervised=row["supervised"],
            step_ends=row["step_ends"],
        )
        answer = get_task("arithmetic").extract(row["completion"])
        traces.append(ScoredTrace(row["prompt"], row["completion"], scores, correct=row["correct"], answer=answer))
    policies = Table(
        f"Greedy accuracy on {results['questions']} held-out questions, %",
        ["policy", "accuracy", "95 % interval", "no answer"],
        [
            [r["label"], percent(r["accuracy"]), interval(r["low"], r["high"]), r["no_answer"]]
            for r in results["policies"]
        ],
        note="Wilson intervals. A reward model must beat the controls.",
    )
    gains = Table(
        "The policy trained on the reward, points",
        ["against", "difference", "95 % interval"],
        [
            [one["baseline"], f"{100 * one['difference']:+.1f}", f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]"]
            for one in results["gains"]
        ],
        note="Paired by question.",
    )
    ranking = Table(
        "Choosing one of 8 samples of the SFT policy, %",
        ["method", "accuracy", "95 % interval"],
        [
            [label, percent(value), interval(low, high)]
            for label, (value, low, high) in results["ranking"]["accuracy"].items()
        ],
        note="Bootstrap intervals over questions.",
    )
    aurocs = Table(
        "AUROC for correctness of the same samples",
        ["score", "pooled", "within the prompt"],
        [
            [label, results["ranking"][f"{key}_auroc"], results["ranking"][f"{key}_auroc_within_prompt"]]
            for key, label in AUROC_LABELS.items()
        ],
        note="Pooled AUROC mostly measures which questions are hard; within-prompt AUROC matters for reranking.",
    )
    report = Report(
        title=f"tracereward quickstart: {world}",
        summary=f"The policy trained on the reward: {gains_text(results)}. Generated arithmetic, a tiny Llama, no "
        "verifier in training; all figures on this page are from this run.",
        verdict=verdict_html(Verdict.from_dict(found)) if found else "",
        tables=[policies, gains, ranking, aurocs],
        metrics=read_jsonl(output / "train" / "metrics.jsonl"),
        rewards_correct=[row["reward"] for row in samples if row["correct"]],
        rewards_wrong=[row["reward"] for row in samples if not row["correct"]],
        traces=pick_traces(traces),
        command=f"tracereward quickstart --world {world} --seed {seed}",
    )
    write_report(output / "report.html", report)
