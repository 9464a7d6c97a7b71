"""Means over seeds of quickstart runs, as the Markdown tables of docs/quickstart.md.

    for seed in 0 1 2; do tracereward quickstart --seed $seed -o runs/quickstart-$seed; done
    python benchmarks/quickstart_seeds.py runs/quickstart-0 runs/quickstart-1 runs/quickstart-2

Intervals are 95 % Student t intervals over the seeds. They hold what a seed changes (pretraining, experts, rollouts,
samples), not which questions were asked: those are the same for all.
"""

import json
import statistics
import sys
from pathlib import Path

from scipy import stats


def row(label: str, values: list[float]) -> str:
    mean = statistics.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"| {label} | {100 * mean:.1f} ± {100 * half:.1f} | {each} |"


def difference(name: str, ours: list[float], theirs: list[float]) -> str:
    return row(name, [a - b for a, b in zip(ours, theirs, strict=True)])


def main(folders: list[str]) -> None:
    runs = [json.loads((Path(folder) / "results.json").read_text()) for folder in folders]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    print(f"| policy, greedy accuracy % | mean | seeds {seeds} |\n|---|---|---|")
    for rows in zip(*(run["policies"] for run in runs), strict=True):
        print(row(rows[0]["label"], [r["accuracy"] for r in rows]))
    print(f"\n| one of 8 samples of the SFT policy, accuracy % | mean | seeds {seeds} |\n|---|---|---|")
    for label in runs[0]["ranking"]["accuracy"]:
        print(row(label, [run["ranking"]["accuracy"][label][0] for run in runs]))
    print(f"\n| AUROC for correctness, % | mean | seeds {seeds} |\n|---|---|---|")
    for score in ("reward", "logprob", "reward_logprob"):
        for kind, name in (("", "pooled"), ("_within_prompt", "within the prompt")):
            label = f"{score.replace('_', ' + ').replace('logprob', 'log-prob')}, {name}"
            print(row(label, [run["ranking"][f"{score}_auroc{kind}"] for run in runs]))
    print(f"\n| difference within a seed, points | mean | seeds {seeds} |\n|---|---|---|")
    ours = [run["policies"][-1] for run in runs]
    for rows in zip(*(run["policies"][:-1] for run in runs), strict=True):
        name = f"{ours[0]['label']} - {rows[0]['label']}"
        print(difference(name, [r["accuracy"] for r in ours], [r["accuracy"] for r in rows]))
    chosen = {label: [run["ranking"]["accuracy"][label][0] for run in runs] for label in runs[0]["ranking"]["accuracy"]}
    for label in ("reward best-of-8", "reward + log-prob best-of-8", "reward-weighted vote@8"):
        for other in ("log-prob best-of-8", "majority@8"):
            print(difference(f"{label} - {other}", chosen[label], chosen[other]))


if __name__ == "__main__":
    main(sys.argv[1:])
