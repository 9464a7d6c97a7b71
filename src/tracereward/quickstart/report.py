"""The quickstart's report."""

from pathlib import Path
from typing import Any

from tracereward.files import read_jsonl
from tracereward.reports.report import Report, ScoredTrace, write_report
from tracereward.reports.tables import AUROC_LABELS, Table
from tracereward.rewards.token_scores import TokenScores
from tracereward.runs.report import pick_traces
from tracereward.tasks.recipes import get_task


def write_quickstart_report(output: Path, world: str, seed: int, results: dict[str, Any]) -> None:
    """Write ``report.html``: policies, reranking, metrics and scored traces."""
    samples = read_jsonl(output / "samples.jsonl")
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
            [r["label"], 100 * r["accuracy"], f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]", r["no_answer"]]
            for r in results["policies"]
        ],
        note="Wilson intervals. A reward model must beat the controls.",
    )
    ranking = Table(
        "Choosing one of 8 samples of the SFT policy, %",
        ["method", "accuracy", "95 % interval"],
        [
            [label, 100 * value, f"[{100 * low:.1f}, {100 * high:.1f}]"]
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
        summary="Generated arithmetic, a tiny Llama trained from scratch on expert traces, no verifier in training. "
        "All figures on this page are from this run.",
        tables=[policies, ranking, aurocs],
        metrics=read_jsonl(output / "train" / "metrics.jsonl"),
        rewards_correct=[row["reward"] for row in samples if row["correct"]],
        rewards_wrong=[row["reward"] for row in samples if not row["correct"]],
        traces=pick_traces(traces),
        command=f"tracereward quickstart --world {world} --seed {seed}",
    )
    write_report(output / "report.html", report)
