"""Plot the README's figure from the results of `training_step.py` and `memory.py`.

python benchmarks/plot.py [--results benchmarks/results] [--output docs/images/benchmarks.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "rollouts": "#4c78a8",
    "policy": "#9ecae9",
    "discriminator: update": "#e4572e",
    "discriminator: rewards": "#f2a65a",
    "discriminator: monitors": "#f6d8ae",
    "rest": "#bab0ac",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path, default=Path("docs/images/benchmarks.png"))
    args = parser.parse_args()
    steps = json.loads((args.results / "training_step.json").read_text(encoding="utf-8"))
    memory = json.loads((args.results / "memory.json").read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=[2.2, 1], sharey=True)
    names = [row["variant"] for row in steps["rows"]]
    starts = [0.0] * len(names)
    for part, colour in COLOURS.items():
        widths = [row[part] for row in steps["rows"]]
        left.barh(names, widths, left=starts, color=colour, label=part)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for name, end, row in zip(names, starts, steps["rows"], strict=True):
        left.text(end, name, f"  {row['ratio']:.2f}x", va="center", fontsize=9)
    left.set_xlim(0, 1.1 * max(starts))
    left.set_xlabel("seconds a step")
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", ncols=6, fontsize=8, frameon=False)
    peaks = {row["variant"]: row for row in memory["rows"]}
    names = [name for name in names if name in peaks]
    right.barh(names, [peaks[name]["peak, MiB"] for name in names], color=COLOURS["rollouts"])
    for name in names:
        peak = peaks[name]["peak, MiB"]
        right.text(peak, name, f"  {peaks[name]['ratio']:.2f}x", va="center", fontsize=9)
    right.set_xlim(0, 1.25 * max(row["peak, MiB"] for row in peaks.values()))
    right.set_xlabel("peak memory, MiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
