"""The page of the study of logged traces, Markdown and a figure, from its results alone."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from studies.pages.figures import COLOURS, GREY
from studies.pages.markdown import table

Row = Mapping[str, Any]
POOLS = {"all": "All models", "weaker": "The weaker half of the models"}
DATA = {
    "gsm8k": "GSM8K: test questions with the answers of 16 open models from ZeroEval",
    "mmlu_pro": "MMLU-Pro: test questions with the answers of ten models",
}
INTRO = """\
Can a reward be learned from traces that exist already? The frozen model's hidden states, averaged over a trace's
tokens, go into a linear head, fitted as in `tracereward fit --readout`. Five folds by question: a question is scored by
a head that has seen neither it nor its answer; layers and penalty are chosen by cross-validation inside the other four
folds, which also give the scores' scales and the temperature of the tuned vote. Experts are the questions' own
solutions (`human`) or the traces of the model that is most often right on the training folds (`strongest`). Label
rules are `positives/negatives`: a trace agrees if its answer is the expert's; `gold`, the upper line, uses the pool's
own labels instead. The choice is among seven layers; `mean of layers` reads the mean of the heads on all of them, and
`layer or mean` chooses between the two as well, as `tracereward fit` does.

Scorers: the reward, its sum with the frozen model's mean log-prob (both standardised), and the reward minus the mean of
its model on the training folds, which says what is left when it cannot tell models apart. `which model` is the model's
accuracy on the training folds. Each model has one answer a question, so an AUROC within the question and the model does
not exist.

AUROC: within the question, over the questions that have right and wrong candidates; at matched length it is over all
candidates. Vote: weighted by exp(z), z the score standardised within the question; tuned: by exp(score / t). Any
weighted vote breaks the ties that majority gives to the answer given first, so that its gain over the vote weighted by
log-prob counts too. In brackets 95 % intervals over questions; differences are paired, to log-prob by AUROC and
best-of-N, to majority by vote, and bold where the interval excludes 0. All figures but N are percent or points."""


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write `path`, and one figure next to it for each data set and model with curves.

    Args:
        path: ``logged.md``.
        rows: of `studies.logged`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["model"]), []).append(row)
    parts = ["# Rewards from logged traces of real models", INTRO, *_in_short(groups)]
    for group in groups.values():
        parts += _section(path, group)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


SHOWN = {
    "expert/all, pairwise": "the experts against all others",
    "agreeing/disagreeing, pairwise, layer or mean": "agreeing against disagreeing, as `fit` does",
    "agreeing/disagreeing, pairwise, without expert traces, layer or mean": "the same without the experts' traces",
    "gold, pairwise": "right against wrong, one layer",
}
"""The arms of the first table, without their experts."""


def _in_short(groups: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    """The main arms of each data set and model, with the questions' own solutions as experts where there are any."""
    parts = ["## In short"]
    for (data, model), rows in groups.items():
        free = next(row for row in rows if row["method"] == "none")
        arms = {row["arm"]: row for row in rows if row["method"] == "readout" and "pools" in row}
        experts = "human" if any(arm.startswith("human") for arm in arms) else "strongest"
        lines = {"log-prob": _line(free["pools"], "log-prob")}
        for arm, name in SHOWN.items():
            if row := arms.get(f"{experts}, {arm}"):
                lines[name] = _line(row["pools"], "reward")
                lines[f"{name}, + log-prob"] = _line(row["pools"], "reward + log-prob")
        parts += [f"{model} on {data}, {free['questions']} questions:", table("reward", pd.DataFrame(lines).T)]
    return parts


def _line(pools: Mapping[str, Row], score: str) -> dict[str, str]:
    values, weaker = pools["all"][score], pools["weaker"][score]
    return {
        "AUROC": _share(values["auroc"]),
        "minus log-prob": "" if score == "log-prob" else _points(values["auroc difference"]),
        "best-of-N minus log-prob's": "" if score == "log-prob" else _points(values["best difference"]),
        "tuned vote minus majority": _points(values["tuned vote difference"]),
        "AUROC, weaker models": _share(weaker["auroc"]),
        "tuned vote minus majority, weaker models": _points(weaker["tuned vote difference"]),
    }


def _section(path: Path, rows: Sequence[Row]) -> list[str]:
    """One data set and model."""
    free = next(row for row in rows if row["method"] == "none")
    fitted = [row for row in rows if row["method"] == "readout" and "pools" in row]
    adapters = [row for row in rows if row["method"] == "lora"]
    curves = next((row for row in rows if row["arm"] == "curves"), None)
    parts = [
        f"## {free['model']} on {free['data']}",
        f"{DATA.get(free['data'], free['data'])}; {free['questions']} questions, {free['candidates']} candidates.",
    ]
    for which, title in POOLS.items():
        parts += [f"### {title}", _free_table(free["pools"][which]), _separation(fitted, which)]
        parts += [_choice(fitted, which, name) for name in ("reward", "reward + log-prob")]
    if curves:
        parts += _curves(path, curves, free, fitted)
    if adapters:
        parts += ["### Training the model itself", *_adapters(adapters)]
    parts += ["### What it took", _costs(free, fitted)]
    return parts if adapters else [*parts, "LoRA adapters were not trained on these traces."]


def _adapters(rows: Sequence[Row]) -> list[str]:
    """LoRA beside the read-out from which it starts, and log-prob."""
    first = rows[0]
    said = (
        f"LoRA adapters ({first['updates']} updates of 8 questions with 4 candidates each) start from the read-out. "
        f"Both learn from the same {first['learned from']} questions and are tested on the first fold's "
        f"{first['tested on']}. With log-prob: the sum of both, standardised over the tested candidates."
    )
    lines = {"log-prob": _adapter(first["log-prob"], {}, "")}
    for row in rows:
        minutes = f"{row['seconds'] / 60:.0f}"
        for name, values in row["scores"].items():
            lines[f"{row['arm'].removesuffix(', LoRA')}: {name}"] = _adapter(values, values, minutes)
    return [said, table("reward", pd.DataFrame(lines).T)]


def _adapter(values: Row, differences: Row, minutes: str) -> dict[str, str]:
    def difference(name: str) -> str:
        return _points(differences[name]) if name in differences else ""

    return {
        "AUROC": _share(values["auroc"]),
        "minus log-prob": difference("auroc minus log-prob's"),
        "minus the read-out": difference("auroc minus read-out's"),
        "best-of-N": _share(values["best"]),
        "minus log-prob's": difference("best minus log-prob's"),
        "minutes for both": minutes,
    }


def _free_table(scores: Mapping[str, Row]) -> str:
    lines = {}
    for name, values in scores.items():
        if "auroc" in values:
            lines[name] = {
                "AUROC": _share(values["auroc"]),
                "at matched length": f"{100 * values['length-matched']:.1f}",
                "best-of-N": _share(values["best"]),
                "vote": _share(values["vote"]),
                "tuned vote": _share(values["tuned vote"]),
                "minus majority": _points(values["tuned vote difference"]),
            }
        else:
            column = "vote" if name == "majority" else "best-of-N"
            lines[{"mean": "mean candidate"}.get(name, name)] = {column: _share(values["best"])}
    return table("without a reward", pd.DataFrame(lines).T)


def _separation(rows: Sequence[Row], which: str) -> str:
    lines = {}
    for row in rows:
        scores = row["pools"][which]
        lines[row["arm"]] = {
            "reward": _share(scores["reward"]["auroc"]),
            "minus log-prob": _points(scores["reward"]["auroc difference"]),
            "at matched length": f"{100 * scores['reward']['length-matched']:.1f}",
            "reward + log-prob": _share(scores["reward + log-prob"]["auroc"]),
            "minus log-prob ": _points(scores["reward + log-prob"]["auroc difference"]),
            "reward - its model's mean": _share(scores["reward - its model's mean"]["auroc"]),
        }
    return table("AUROC", pd.DataFrame(lines).T)


def _choice(rows: Sequence[Row], which: str, score: str) -> str:
    lines = {}
    for row in rows:
        values = row["pools"][which][score]
        lines[row["arm"]] = {
            "best-of-N": _share(values["best"]),
            "minus log-prob's": _points(values["best difference"]),
            "vote": _share(values["vote"]),
            "minus majority": _points(values["vote difference"]),
            "tuned vote": _share(values["tuned vote"]),
            "minus majority ": _points(values["tuned vote difference"]),
            "minus log-prob's ": _points(values["tuned vote over log-prob's"]),
        }
    return table(f"choosing by {score}", pd.DataFrame(lines).T)


def _curves(path: Path, curves: Row, free: Row, fitted: Sequence[Row]) -> list[str]:
    """Curves over training questions and over N, of the arm that was chosen for them."""
    whole = next((row for row in fitted if row["arm"] == curves["of"]), None)
    points = list(curves["by_questions"])
    if whole:
        most = round(whole["questions"] * (whole["folds"] - 1) / whole["folds"])
        points += [
            {"questions": most, "pool": which, "score": score, **whole["pools"][which][score]}
            for which in POOLS
            for score in ("reward", "reward + log-prob")
        ]
    lines: dict[str, dict[str, str]] = {}
    for point in points:
        lines.setdefault(str(point["questions"]), {}).update(_point(point["pool"], point["score"], point))
    figure = path.with_name(f"{path.stem}-{curves['data']}-{curves['model']}.png".lower())
    _figure(figure, points, curves["by_size"], free)
    return [
        f"### More questions, more candidates ({curves['of']})",
        f"![AUROC by training questions, accuracy by candidates]({figure.name})",
        table("training questions", pd.DataFrame(lines).T),
    ]


def _point(which: str, score: str, values: Row) -> dict[str, str]:
    return {
        f"AUROC of {score}, {which}": _share(values["auroc"]),
        f"tuned vote by {score} minus majority, {which}": _points(values["tuned vote difference"]),
    }


def _figure(path: Path, points: Sequence[Row], by_size: Row, free: Row) -> None:
    """AUROC over training questions, and accuracy over N for all models and the weaker ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.8), layout="constrained")
    left, *panels = figure.subplots(1, 3)
    for place, (which, label) in enumerate(POOLS.items()):
        for score, stroke in (("reward", "o-"), ("reward + log-prob", "o--")):
            own = [p for p in points if (p["pool"], p["score"]) == (which, score)]
            values = [100 * p["auroc"][0] for p in own]
            name = f"{score}, {label.lower()}"
            left.plot([p["questions"] for p in own], values, stroke, color=COLOURS[place], markersize=4, label=name)
        base = 100 * free["pools"][which]["log-prob"]["auroc"][0]
        left.axhline(base, color=COLOURS[place], linewidth=0.8, linestyle=":", label=f"log-prob, {label.lower()}")
    left.set_xscale("log")
    _ticks(left, sorted({p["questions"] for p in points}))
    left.set_xlabel("training questions", fontsize=8)
    left.set_title("AUROC within the question, %", loc="left", fontsize=9)
    names = {
        "oracle": "oracle",
        "majority": "majority",
        "logprob": "best-of-N by log-prob",
        "reward": "best-of-N by reward",
        "vote": "vote by reward",
        "reward_logprob_vote": "vote by reward + log-prob",
    }
    for axis, (which, label) in zip(panels, POOLS.items(), strict=True):
        colours = iter(COLOURS)
        for method, name in names.items():
            line = by_size[which][method]
            colour = GREY if method in ("oracle", "majority", "logprob") else next(colours)
            stroke = {"oracle": ":", "majority": "-", "logprob": "--"}.get(method, "-")
            values, sizes = [100 * point[1] for point in line], [point[0] for point in line]
            axis.plot(sizes, values, stroke, color=colour, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        _ticks(axis, [point[0] for point in by_size[which]["majority"]])
        axis.set_xlabel("candidates", fontsize=8)
        axis.set_title(f"accuracy, %: {label.lower()}", loc="left", fontsize=9)
    for axis in (left, *panels):
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.savefig(path, dpi=110)


def _ticks(axis: Any, places: Sequence[int]) -> None:
    axis.set_xticks(places, [str(place) for place in places])
    axis.minorticks_off()


def _costs(free: Row, fitted: Sequence[Row]) -> str:
    """Minutes, memory and what was chosen."""
    took = "Computing the features was not timed."
    if free.get("minutes"):
        took = f"Computing the features of all traces took {free['minutes']:.0f} minutes."
    took += f" The study's process needed {free['gigabytes']:.1f} GB at most before fitting."
    lines = {
        row["arm"]: {
            "traces a fold": row["traces"],
            "minutes, five folds": f"{row['seconds'] / 60:.1f}",
            "layers": _counted("mean" if isinstance(layers, list) else layers for layers, _ in row["chosen"]),
            "penalties": _counted(penalty for _, penalty in row["chosen"]),
        }
        for row in fitted
    }
    return f"{took}\n\n{table('read-out', pd.DataFrame(lines).T)}"


def _counted(values: Iterable[float | str]) -> str:
    """Such as ``10 (2), 21 (2), mean (1)``."""
    found = sorted(Counter(values).items(), key=lambda item: (isinstance(item[0], str), item[0]))
    return ", ".join(f"{value if isinstance(value, str) else f'{value:g}'} ({count})" for value, count in found)


def _share(interval: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _points(interval: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in interval)
    text = f"{mean:+.1f} ({low:.1f} to {high:.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text
