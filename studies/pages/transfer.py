"""Sections and figure of the study of transfer, from its cells' JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.pages.markdown import cell, signed, table
from studies.setup.backbones import LABELS, OWN_TOKENIZER
from tracereward.metrics import mean_interval

Result = dict[str, Any]
Interval = tuple[float, float, float]
RESTORED = 0.9
"""Share of the own reward's gain that an adapted one must reach."""
_ALONE = {"log-prob best-of": "logprob", "shortest": "shortest", "oracle": "oracle"}
_LEGEND = (
    "Rows: the backbone that the reward was learned with. Columns: the backbone whose SFT policy wrote the samples. "
    "Gain: choosing one of 8 by reward + log-prob, minus the better of majority vote and log-prob, in points. Each "
    "policy has its own log-prob."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME-matrix.png`` beside `path`."""
    figure = path.with_name(f"{path.stem}-matrix.png")
    found = by_reward(results)
    heat_maps(figure, found)
    return [
        "### Every reward on every policy",
        f"![Within-prompt AUROC and gain of each reward on each policy]({figure.name})",
        _LEGEND,
        _matrix(found, "within-prompt AUROC of", "auroc", 1, 3),
        _matrix(found, "gain by", "gain", 100, 1),
        _policies(found),
        _words(found),
        _degradation(found),
        "### Adapted with few demonstrations",
        f"Gain by the number of demonstrations. Restored: the smallest number whose mean gain is at least "
        f"{RESTORED:.0%} of that of the policy's own reward, which saw all of them. With three seeds the "
        "intervals are wide: a mean over that line is no proof.",
        _adaptation(found),
    ]


def by_reward(results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """For each reward's backbone its results of each seed, in the order of seeds."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        own = result["options"]["policies"][0]
        found.setdefault(result.get("backbone") or own, []).append(result["transfer"])
    return {name: found[name] for name in LABELS if name in found}


Found = Mapping[str, Sequence[dict[str, Any]]]


def values(found: Found, reward: str, policy: str, key: str, count: str = "0") -> list[float]:
    """One measure of each seed; nan where it is undefined."""
    return [seed[policy][count].get(key, math.nan) for seed in found[reward]]


def _matrix(found: Found, what: str, key: str, unit: float, digits: int) -> str:
    show: Callable[[Interval, int], str] = signed if key == "gain" else cell
    rows = [
        [
            f"{what} the reward of {LABELS[reward]}",
            *(
                show(mean_interval([unit * v for v in values(found, reward, policy, key)]), digits)
                for policy in policies(found)
            ),
        ]
        for reward in found
    ]
    return table(["on samples of", *(LABELS[policy] for policy in policies(found))], rows)


def policies(found: Found) -> list[str]:
    """Backbones of the policies."""
    return list(next(iter(found.values()))[0])


def _policies(found: Found) -> str:
    """What each policy's own log-prob and votes reach, which no reward changes, and what its own reward adds."""
    names = {"within-prompt AUROC of log-prob": ("auroc_logprob", 1, 3), "majority, %": ("majority", 100, 1)}
    names |= {f"{name}, %": (key, 100, 1) for name, key in _ALONE.items()}
    rows = []
    for head, (key, unit, digits) in names.items():
        of_first = next(iter(found))
        cells = (
            cell(mean_interval([unit * v for v in values(found, of_first, policy, key)]), digits)
            for policy in policies(found)
        )
        rows.append([head, *cells])
    return table(["the policy alone", *(LABELS[policy] for policy in policies(found))], rows)


def differences(found: Found, key: str, pairs: Sequence[tuple[str, str]], unit: float = 1) -> list[list[float]]:
    """For each pair of reward and policy, its measure minus that of the policy's own reward, seed by seed."""
    return [
        [
            unit * (one - other)
            for one, other in zip(values(found, reward, policy, key), values(found, policy, policy, key), strict=True)
        ]
        for reward, policy in pairs
    ]


def pairs_of(found: Found) -> list[tuple[str, str]]:
    """Rewards on other backbones' policies."""
    return [(reward, policy) for reward in found for policy in policies(found) if reward != policy and policy in found]


def _degradation(found: Found) -> str:
    """Differences to the own reward, paired by seed."""
    rows = []
    pairs = pairs_of(found)
    aurocs, gains = differences(found, "auroc", pairs), differences(found, "gain", pairs, 100)
    for (reward, policy), auroc, gain in zip(pairs, aurocs, gains, strict=True):
        cells = (signed(mean_interval(auroc), 3), signed(mean_interval(gain)))
        rows.append([f"reward of {LABELS[reward]} on {LABELS[policy]}", *cells])
    groups = {
        "mean over all pairs": pairs,
        "mean over pairs with one tokenizer": [pair for pair in pairs if OWN_TOKENIZER.isdisjoint(pair)],
        "mean over pairs with two tokenizers": [pair for pair in pairs if not OWN_TOKENIZER.isdisjoint(pair)],
    }
    for name, of_group in groups.items():
        if of_group:
            auroc, gain = (
                mean_interval(np.mean(differences(found, key, of_group, unit), axis=0).tolist())
                for key, unit in (("auroc", 1), ("gain", 100))
            )
            rows.append([name, signed(auroc, 3), signed(gain)])
    heads = ["minus the policy's own reward, paired by seed", "within-prompt AUROC", "gain"]
    return table(heads, rows)


def _words(found: Found) -> str:
    """How often the own reward is the best, and what could not be read."""
    own = [policy for policy in policies(found) if policy in found]

    def mean(reward: str, policy: str, key: str) -> float:
        return float(np.mean(values(found, reward, policy, key)))

    best = {key: sum(max(found, key=lambda r: mean(r, p, key)) == p for p in own) for key in ("auroc", "gain")}
    unknown = max(v for reward in found for policy in policies(found) for v in values(found, reward, policy, "unknown"))
    return (
        f"By the means, a policy's own reward is the best of {len(found)} for {best['auroc']} of {len(own)} policies "
        f"in AUROC and for {best['gain']} in gain. At most {unknown:.1%} of a policy's samples hold a number that a "
        "reward's tokenizer cannot write."
    )


def smallest_number(gains: Mapping[int, float], own: float) -> int | None:
    """The smallest number of demonstrations whose gain is at least `RESTORED` of `own`; None if there is none.

    Where `own` is not positive there is nothing to restore: None.
    """
    if own <= 0:
        return None
    return min((count for count, gain in gains.items() if gain >= RESTORED * own), default=None)


def _adaptation(found: Found) -> str:
    pairs = pairs_of(found)
    counts = sorted(int(count) for count in found[pairs[0][0]][0][pairs[0][1]])
    rows, numbers = [], []
    for reward, policy in pairs:
        gains = {count: [100 * v for v in values(found, reward, policy, "gain", str(count))] for count in counts}
        own = [100 * v for v in values(found, policy, policy, "gain")]
        means = {count: float(np.mean(of_count)) for count, of_count in gains.items()}
        number = smallest_number(means, float(np.mean(own)))
        numbers.append(math.inf if number is None else number)
        rows.append(
            [
                f"reward of {LABELS[reward]} on {LABELS[policy]}",
                *(signed(mean_interval(of_count)) for of_count in gains.values()),
                signed(mean_interval(own)),
                "nothing to restore" if np.mean(own) <= 0 else "none of these" if number is None else str(number),
            ]
        )
    everywhere = [
        np.mean([values(found, reward, policy, "gain", str(count)) for reward, policy in pairs], axis=0) * 100
        for count in counts
    ]
    own = np.mean([values(found, policy, policy, "gain") for _, policy in pairs], axis=0) * 100
    reached = sum(number < math.inf for number in numbers)
    rows.append(
        [
            "mean over all pairs",
            *(signed(mean_interval(of_count.tolist())) for of_count in everywhere),
            signed(mean_interval(own.tolist())),
            f"{reached} of {len(pairs)} pairs",
        ]
    )
    heads = ["gain with demonstrations", *map(str, counts), "the policy's own reward", "restored"]
    return table(heads, rows)


def heat_maps(path: Path, found: Found) -> None:
    """Write a PNG of two matrices, rewards by policies: within-prompt AUROC and gain in points, means over seeds."""
    from matplotlib.figure import Figure

    columns = policies(found)
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axis, (key, unit, form, title) in zip(
        figure.subplots(1, 2),
        (("auroc", 1, ".3f", "within-prompt AUROC of the reward"), ("gain", 100, "+.1f", "gain in reranking, points")),
        strict=True,
    ):
        grid = [[unit * float(np.mean(values(found, reward, policy, key))) for policy in columns] for reward in found]
        image = axis.imshow(grid, cmap="YlGn", aspect="auto")
        middle = (np.min(grid) + np.max(grid)) / 2
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                colour = "white" if value > middle else "black"
                axis.text(column, row, format(value, form), ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(columns)), [LABELS[name].replace(", ", ",\n") for name in columns], fontsize=8)
        axis.set_yticks(range(len(found)), [LABELS[name].replace(", ", ",\n") for name in found], fontsize=8)
        axis.set_xlabel("policy", fontsize=8)
        axis.set_ylabel("reward", fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)
