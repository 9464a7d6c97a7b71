"""Section and figure of arms that are lines over the demonstrations ("LINE @ X"), from the cells' JSON."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from studies.pages.figures import curve_lines
from studies.pages.markdown import cell, signed, table
from tracereward.metrics import mean_interval

Result = dict[str, Any]
Points = dict[tuple[str, int], list[Result]]
AT = " @ "
SFT = "SFT"
SCORES = {"reward": "reward best-of-{n}", "reward_logprob": "reward + log-prob best-of-{n}"}


def is_point(result: Result) -> bool:
    """Whether a cell's arm is a point of a line."""
    return AT in result["arm"]


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page `path`; writes the figure ``NAME.png`` beside it."""
    points: Points = {}
    for result in results:
        line, _, x = result["arm"].partition(AT)
        points.setdefault((line, int(x)), []).append(result)
    figure = path.with_suffix(".png")
    accuracies: dict[str, dict[int, tuple[float, float, float]]] = {}
    aurocs: dict[str, dict[int, tuple[float, float, float]]] = {}
    for (line, x), of_seeds in points.items():
        if not frozen(of_seeds[0]):
            accuracies.setdefault(line, {})[x] = percent(of_seeds, lambda r: r["accuracy"])
        if "ranking" in of_seeds[0]:
            aurocs.setdefault(line, {})[x] = percent(of_seeds, lambda r: auroc(r, "reward_logprob"))
            aurocs.setdefault("log-prob", {})[x] = percent(of_seeds, lambda r: auroc(r, "logprob"))
    label = "wrong demonstrations, %" if "corrupt" in results[0] else "demonstrations, % of the world's"
    curve_lines(figure, label, accuracies, aurocs)
    parts = [f"![Accuracy and AUROC along the lines]({figure.name})", policies(points)]
    return [*parts, baselines(points), rankings(points)] if aurocs else parts


def frozen(result: Result) -> bool:
    """Whether an arm is a reward model alone: its discriminator is frozen, its policy hardly moved."""
    return result["options"].get("discriminator_updates") == 0


def percent(results: Sequence[Result], value: Callable[[Result], float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % interval, in %."""
    return mean_interval([100 * value(result) for result in results])


def auroc(result: Result, score: str) -> float:
    """Within-prompt AUROC of one score; nan where it is undefined."""
    return number(result["ranking"][f"{score}_auroc_within_prompt"])


def number(value: float | None) -> float:
    """JSON's null, of what is undefined, as nan."""
    return math.nan if value is None else value


def paired(results: Sequence[Result], others: Sequence[Result] | None) -> str:
    """Mean difference of accuracies in points, paired by seed; nothing without a partner."""
    of_seed = {other["seed"]: other["accuracy"] for other in others or ()}
    pairs = [100 * (r["accuracy"] - of_seed[r["seed"]]) for r in results if r["seed"] in of_seed]
    return signed(mean_interval(pairs)) if pairs else ""


def policies(points: Points) -> str:
    """Accuracy of each trained policy, against SFT on the same demonstrations and against its line's first point."""
    rows = []
    for (line, x), of_seeds in points.items():
        if frozen(of_seeds[0]):
            continue
        least = min(other for name, other in points if name == line)
        rows.append(
            [
                f"{line}, {x} %",
                cell(percent(of_seeds, lambda r: r["accuracy"])),
                "" if line == SFT else paired(of_seeds, points.get((SFT, x))),
                "" if x == least else paired(of_seeds, points[line, least]),
                "" if line == SFT else f"{sum(r['collapsed'] for r in of_seeds)}/{len(of_seeds)}",
                f"{sum(r['chosen'] == 'start' for r in of_seeds)}/{len(of_seeds)}" if "chosen" in of_seeds[0] else "",
            ]
        )
    heads = ["arm, share", "greedy accuracy", "minus SFT with that share", "minus the line's least", "collapsed"]
    return table([*heads, "start kept"], rows)


def baselines(points: Points) -> str:
    """What choosing among the SFT policy's samples reaches without a reward, for each share."""
    shares: dict[int, list[Result]] = {}
    for (_, x), of_seeds in points.items():
        if "ranking" in of_seeds[0]:
            shares.setdefault(x, of_seeds)  # all lines rank the same samples
    n = next(iter(shares.values()))[0]["samples"]
    names = ["mean sample", f"majority@{n}", f"log-prob best-of-{n}", "shortest", f"oracle@{n}"]
    rows = [
        [f"{x} %", *(cell(percent(of_seeds, lambda r, name=name: reached(r)[name])) for name in names)]
        for x, of_seeds in shares.items()
    ]
    return table([f"{n} samples of the SFT policy with that share, %", *names], rows)


def reached(result: Result) -> dict[str, float]:
    """Accuracy of each way of choosing."""
    return {name: value[0] for name, value in result["ranking"]["accuracy"].items()}


def rankings(points: Points) -> str:
    """What the rewards say of samples of the SFT policy with the same share, and what choosing by them gains."""
    rows = []
    for (line, x), of_seeds in points.items():
        if "ranking" not in of_seeds[0]:
            continue
        n = of_seeds[0]["samples"]

        def gain(result: Result, label: str, n: int = n) -> float:
            of = reached(result)
            return of[label.format(n=n)] - max(of[f"majority@{n}"], of[f"log-prob best-of-{n}"])

        def against_shortest(result: Result, n: int = n) -> float:
            of = reached(result)
            return of[SCORES["reward_logprob"].format(n=n)] - of["shortest"]

        rows.append(
            [
                f"{line}, {x} %",
                cell(mean_interval([auroc(r, "logprob") for r in of_seeds]), 3),
                *(cell(mean_interval([auroc(r, score) for r in of_seeds]), 3) for score in SCORES),
                cell(mean_interval([number(r["ranking"].get("reward_r")) for r in of_seeds]), 3),
                *(signed(percent(of_seeds, lambda r, label=label: gain(r, label))) for label in SCORES.values()),
                signed(percent(of_seeds, against_shortest)),
            ]
        )
    n = next(of[0]["samples"] for of in points.values())
    return table(
        [
            f"{n} samples of the SFT policy with that share",
            "within-prompt AUROC, log-prob",
            "reward",
            "reward + log-prob",
            "reward-correctness r",
            f"reward best-of-{n} minus the better of majority and log-prob",
            "reward + log-prob, the same",
            "reward + log-prob minus the shortest",
        ],
        rows,
    )
