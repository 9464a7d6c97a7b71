"""Writes the README's table from the recipe study's results: ``python docs/make_results.py``; a test compares it."""

import json
from pathlib import Path

from tracereward.metrics import mean_interval

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "studies" / "results" / "recipe.jsonl"
WORLD = "exposure"
START, END = "<!-- results -->\n\n", "\n\n<!-- end of results -->"


def shares(arm: str, method: str | None = None) -> list[float]:
    """Of each seed, the accuracy of an arm's policy, or of a way to choose among the samples of the SFT policy."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = {row["seed"]: row for row in rows if row.get("arm") == arm and row.get("world") == WORLD}
    return [
        found[seed]["accuracy"] if method is None else found[seed]["ranking"]["accuracy"][method][0]
        for seed in sorted(found)
    ]


def results() -> str:
    """The table, and a sentence above it."""
    seeds = len(shares("SFT"))
    rows = {
        "imitation (SFT on the 50 traces)": shares("SFT"),
        "its most frequent answer of 8": shares("IRL", "majority@8"),
        "its best of 8 by the reward and the model's log-probability": shares("IRL", "reward + log-prob best-of-8"),
        "policy trained on the reward": shares("IRL"),
    }
    lines = [
        "Sums of six to eight steps, 50 expert traces, a tiny model, 300 held-out questions; mean and 95 % interval",
        f"over {seeds} seeds of data and training ([all rows](docs/studies/recipe.md)):",
        "",
        "| what answers | right, % | minus imitation |",
        "|---|---:|---:|",
    ]
    for name, values in rows.items():
        gains = [100 * (value - start) for value, start in zip(values, shares("SFT"), strict=True)]
        gain = signed(gains) if any(gains) else ""
        lines.append(f"| {name} | {spread([100 * value for value in values])} | {gain} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± half the interval."""
    mean, low, high = mean_interval(values)
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


def signed(values: list[float]) -> str:
    """The same with a sign."""
    return f"{'+' if mean_interval(values)[0] >= 0 else ''}{spread(values)}"


def page(text: str) -> str:
    """The README with its table made again."""
    before, _, rest = text.partition(START.rstrip())
    _, _, after = rest.partition(END.lstrip())
    return f"{before}{START}{results()}{END}{after}"


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
