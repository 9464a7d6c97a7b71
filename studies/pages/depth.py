"""Section and figure of results against the number of hops, from the cells' JSON."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from studies.pages.figures import depth_lines
from studies.pages.markdown import cell, signed, table
from tracereward.metrics import mean_interval

Result = dict[str, Any]
Interval = tuple[float, float, float]
Lines = dict[str, dict[int, Interval]]
OTHERS = ("majority@{n}", "log-prob best-of-{n}")
"""Ways of choosing that need no reward, the better of which is what a gain is above."""
BEST = "reward + log-prob best-of-{n}"
"""The way whose gain is shown."""
CHOICES = ("mean sample", "shortest", *OTHERS, "reward best-of-{n}", BEST, "oracle@{n}")
FOUND = {
    "chance": "chance",
    "first": "always the first line",
    "logprob": "log-prob",
    "reward": "reward",
    "reward_logprob": "reward + log-prob",
}
"""Keys of `depth.localisation`, and what they are called."""
_HOW_TO_READ = (
    "By the number of hops that a question takes. First wrong line: of the wrong samples, the share whose lowest line, "
    "by the mean of its tokens' values, is the first that an expert would not write; chance is a line drawn at random."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page `path`; writes ``NAME-depth.png`` beside it."""
    figure = path.with_name(f"{path.stem}-depth.png")
    rows = _by_arm_and_depth(results)
    depth_lines(figure, *_lines(rows))
    picture = f"![Gain and localisation against depth]({figure.name})"
    return ["### Against depth", _HOW_TO_READ, picture, _choice(rows, results[0]["samples"]), _localisation(rows)]


def _by_arm_and_depth(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """For each arm and depth what `depth.summaries` gives for each seed, with the number of samples."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        for depth, of_depth in result["depth"].items():
            rows.setdefault((result["arm"], depth), []).append({**of_depth, "samples": result["samples"]})
    return rows


def _accuracy(row: Result, label: str) -> float:
    """What a way of choosing reaches."""
    return row["ranking"]["accuracy"][label.format(n=row["samples"])][0]


def _gain(row: Result) -> float:
    """What `BEST` reaches above the better of `OTHERS`."""
    return _accuracy(row, BEST) - max(_accuracy(row, label) for label in OTHERS)


def _auroc(row: Result, score: str) -> float:
    return _number(row["ranking"][f"{score}_auroc_within_prompt"])


def _found(row: Result, score: str) -> float:
    return _number(row["localisation"][score])


def _number(value: float | None) -> float:
    """JSON's null, of what is undefined, as nan."""
    return math.nan if value is None else value


def _percent(rows: Sequence[Result], value: Callable[[Result], float]) -> Interval:
    """Mean over seeds with its 95 % interval, in %."""
    return mean_interval([100 * value(row) for row in rows])


def _choice(rows: dict[tuple[str, str], list[Result]], n: int) -> str:
    """What each way of choosing one of `n` samples reaches, and within-prompt AUROCs."""
    lines = []
    for (arm, depth), of_seeds in rows.items():
        reached = [cell(_percent(of_seeds, lambda row, label=label: _accuracy(row, label))) for label in CHOICES]
        aurocs = [cell(mean_interval([_auroc(row, score) for row in of_seeds]), 3) for score in ("logprob", "reward")]
        questions = f"{of_seeds[0]['ranking']['questions']}"
        lines.append([f"{arm}, {depth} hops", questions, *reached, signed(_percent(of_seeds, _gain)), *aurocs])
    heads = [f"choosing one of {n} samples", "questions", *(label.format(n=n) for label in CHOICES)]
    gain = f"{BEST.format(n=n)} minus the better of majority and log-prob"
    return table([*heads, gain, "within-prompt AUROC, log-prob", "within-prompt AUROC, reward"], lines)


def _localisation(rows: dict[tuple[str, str], list[Result]]) -> str:
    """Share of wrong samples whose first wrong line is found, in %."""
    lines = []
    for (arm, depth), of_seeds in rows.items():
        wrong = sum(row["localisation"]["wrong"] for row in of_seeds) / len(of_seeds)
        found = [cell(_percent(of_seeds, lambda row, score=score: _found(row, score))) for score in FOUND]
        gain = signed(_percent(of_seeds, lambda row: _found(row, "reward") - _found(row, "logprob")))
        lines.append([f"{arm}, {depth} hops", f"{wrong:.0f}", *found, gain])
    return table(["first wrong line found", "wrong samples a seed", *FOUND.values(), "reward minus log-prob"], lines)


def _lines(rows: dict[tuple[str, str], list[Result]]) -> tuple[Lines, Lines]:
    """The figure's lines: gain of each arm, and localisation by each score."""
    gains: Lines = {}
    found: Lines = {}
    for (arm, depth), of_seeds in rows.items():
        gains.setdefault(arm, {})[int(depth)] = _percent(of_seeds, _gain)
        # The samples are the same in all arms, and with them all but the reward.
        for score, name in (("reward", f"reward, {arm}"), ("logprob", "log-prob"), ("chance", "chance")):
            values = _percent(of_seeds, lambda row, score=score: _found(row, score))
            found.setdefault(name, {})[int(depth)] = values
    return gains, found
