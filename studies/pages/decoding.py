"""Sections and figures of the studies of guided decoding and self-correction, from their cells' JSON."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.measures.equal_tokens import margin
from studies.pages.markdown import cell, signed, table
from tracereward.metrics import mean_interval

Result = dict[str, Any]
Row = dict[str, Any]
POOL = {
    "greedy": "greedy, one trace",
    "shortest": "shortest",
    "majority": "majority",
    "logprob": "log-prob best-of-N",
    "logprob_vote": "log-prob-weighted vote",
    "reward": "reward best-of-N",
    "vote": "reward-weighted vote",
    "reward_logprob": "reward + log-prob best-of-N",
    "reward_logprob_vote": "vote weighted by reward + log-prob",
    "oracle": "oracle",
}
"""What chooses among whole samples."""
SCORES = {"reward": "reward", "reward_logprob": "reward + log-prob", "logprob": "log-prob"}
AGAINST = {
    "reward best-of-N": ("reward",),
    "reward + log-prob best-of-N": ("reward_logprob",),
    "shortest": ("shortest",),
    "the better of majority and log-prob": ("majority", "logprob"),
}
"""Baselines of the differences."""
_EQUAL = (
    "Differences are at equal sampled tokens: a baseline's accuracy is interpolated, linearly in log tokens, between "
    "its numbers of samples, for each seed by itself. Accuracies of N whole samples are means over random subsets of "
    "all that were drawn."
)


def _mean(results: Sequence[Result], value: Callable[[Result], float], digits: int = 1) -> str:
    return cell(mean_interval([value(result) for result in results]), digits)


def _gain(results: Sequence[Result], value: Callable[[Result], float]) -> str:
    """A difference in points."""
    return signed(mean_interval([100 * value(result) for result in results]))


def _points(rows: Sequence[Row], method: str) -> list[tuple[float, float]]:
    """(tokens, accuracy) of a method that chooses among whole samples."""
    return [(row["sampled_tokens"], row["accuracy"]) for row in rows if row["method"] == method and "score" not in row]


def _above(row: Row, rows: Sequence[Row], methods: Sequence[str]) -> float:
    """A row's accuracy minus the best of some baselines' at its tokens."""
    return margin((row["sampled_tokens"], row["accuracy"]), *(_points(rows, method) for method in methods))


def _by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def _heading(arms: Mapping[str, Any], arm: str) -> list[str]:
    return [f"### {arm}"] if len(arms) > 1 else []


# ---------- guided decoding ----------


def decoding_sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page of guided decoding, and beside `path` a figure for each arm."""
    arms, parts = _by_arm(results), []
    for arm, own in arms.items():
        name = f"{path.stem}.png" if len(arms) == 1 else f"{path.stem}-{arm.replace(' ', '-')}.png"
        decoding_figure(path.with_name(name), own)
        parts += [
            *_heading(arms, arm),
            f"![Accuracy against sampled tokens]({name})",
            _budgets(own),
            _EQUAL,
            _equal_tokens(own),
            _tuning_words(own),
            _tuning(own),
        ]
    return parts


def _key(row: Row) -> tuple[str, str]:
    return row["method"], row.get("score", "")


def _label(method: str, score: str) -> str:
    return f"{method} by {SCORES[score]}" if score else POOL[method]


def _find(result: Result, key: tuple[str, str], budget: int) -> Row:
    """The row of a method at a budget."""
    return next(row for row in result["decoding"]["rows"] if _key(row) == key and row["budget"] == budget)


def _methods(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Methods in the order of `POOL`, then the guided ones in the order of the cells."""
    keys = list(dict.fromkeys(_key(row) for row in results[0]["decoding"]["rows"]))
    return [(name, "") for name in POOL if (name, "") in keys] + [key for key in keys if key[1]]


def _at(results: Sequence[Result], key: tuple[str, str], budget: int, name: str) -> str:
    """Mean over seeds of a method's accuracy in %, or of its tokens."""
    scale, digits = (100, 1) if name == "accuracy" else (1, 0)
    return _mean(results, lambda result: scale * _find(result, key, budget)[name], digits)


def _budgets(results: Sequence[Result]) -> str:
    """Accuracy of each method by its number of samples, and the tokens that the largest took."""
    rows = results[0]["decoding"]["rows"]
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for key in _methods(results):
        known = [row["budget"] for row in rows if _key(row) == key]
        cells = [_at(results, key, n, "accuracy") if n in known else "" for n in budgets]
        lines.append([_label(*key), *cells, _at(results, key, max(known), "sampled_tokens")])
    return table(["accuracy, %", *(f"N = {n}" for n in budgets), "tokens of a question, largest N"], lines)


def _equal_tokens(results: Sequence[Result]) -> str:
    """Guided methods, and what chooses by the reward, against baselines at the same tokens; three budgets of each."""
    rows = results[0]["decoding"]["rows"]
    most = max(row["budget"] for row in rows if "score" in row)
    learned = [
        key for key in _methods(results) if key[1] or key[0] in ("vote", "reward_logprob", "reward_logprob_vote")
    ]
    lines = []
    for key in learned:
        for n in [row["budget"] for row in rows if _key(row) == key and row["budget"] <= most][-3:]:

            def above(result: Result, methods: Sequence[str], key: tuple[str, str] = key, n: int = n) -> float:
                return _above(_find(result, key, n), result["decoding"]["rows"], methods)

            lines.append(
                [
                    f"{_label(*key)}, N = {n}",
                    _at(results, key, n, "sampled_tokens"),
                    _at(results, key, n, "accuracy"),
                    *(
                        "" if methods == (key[0],) and not key[1] else _gain(results, lambda r, m=methods: above(r, m))
                        for methods in AGAINST.values()
                    ),
                ]
            )
    return table(["", "tokens", "accuracy, %", *(f"minus {name}" for name in AGAINST)], lines)


def _tuning_words(results: Sequence[Result]) -> str:
    tuning = results[0]["decoding"]["tuning"]
    return (
        f"What was tried, on {tuning['questions']} validation questions of seed {tuning['seed']}; the choice, "
        "in bold, stands for all seeds. It is farthest above best-of-N by the same score at the same tokens, in "
        "points. Shape square: width and expansions are alike; narrow: one partial trace; wide: two expansions of each."
    )


def _tuning(results: Sequence[Result]) -> str:
    lines = []
    for score, methods in results[0]["decoding"]["tuning"]["grids"].items():
        for method, grid in methods.items():
            for place, row in enumerate(grid["tried"]):
                options = [(name, value) for name, value in row.items() if name not in _MEASURED]
                setting = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in options)
                chosen = place == grid["chosen"]
                lines.append(
                    [
                        f"{_label(method, score)}, N = {row['budget']}",
                        f"**{setting}**" if chosen else setting,
                        f"{row['sampled_tokens']:.0f}",
                        f"{100 * row['accuracy']:.1f}",
                        f"{100 * row['margin']:+.1f}",
                    ]
                )
    return table(["tried", "setting", "tokens", "accuracy, %", "above best-of-N"], lines)


_MEASURED = ("budget", "accuracy", "sampled_tokens", "margin")
_BASELINES = {"majority": ":", "logprob": "--", "shortest": "-."}
_BEST_OF = {"reward": ("#0b6e4f", "--"), "reward_logprob": ("#0b6e4f", "-"), "oracle": ("#bbbbbb", "-")}
_GUIDED = {"beam": "#c2571a", "reject": "#8a2be2", "tilt": "#1f6fb2", "top-k": "#1f6fb2"}


def _axes(axis: Any, title: str, ticks: Sequence[int]) -> None:
    """Log tokens below, accuracy at the left."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sampled tokens of a question, mean", fontsize=8)
    axis.set_title(title, loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _line(results: Sequence[Result], rows_of: Callable[[Result], Sequence[Row]]) -> tuple[list[float], list[float]]:
    """Means over seeds of tokens and of accuracy in %; each seed has the same rows."""
    rows = [rows_of(result) for result in results]
    columns = list(zip(*rows, strict=True))
    return (
        [sum(row["sampled_tokens"] for row in column) / len(column) for column in columns],
        [100 * sum(row["accuracy"] for row in column) / len(column) for column in columns],
    )


def _draw_pool(axis: Any, results: Sequence[Result], rows_of: Callable[[Result], Sequence[Row]]) -> None:
    """The lines of what chooses among whole samples, but the oracle's."""

    def of(method: str) -> tuple[list[float], list[float]]:
        return _line(results, lambda r: [row for row in rows_of(r) if _key(row) == (method, "")])

    for method, stroke in _BASELINES.items():
        axis.plot(*of(method), stroke, color="#7a7a7a", linewidth=1.3, label=POOL[method])
    for method in ("reward", "reward_logprob"):
        colour, stroke = _BEST_OF[method]
        axis.plot(*of(method), stroke, color=colour, linewidth=1.3, label=POOL[method])


TICKS = (25, 50, 100, 200, 400, 800)


def decoding_figure(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG: accuracy against mean sampled tokens, a line for each method, a panel for each score that guides."""
    from matplotlib.figure import Figure

    scores = list(dict.fromkeys(score for _, score in _methods(results) if score))
    figure = Figure(figsize=(3.6 * len(scores), 3.6), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for axis, score in zip(panels, scores, strict=True):
        _draw_pool(axis, results, lambda r: r["decoding"]["rows"])
        for method in (method for method, of in _methods(results) if of == score):
            line = _line(results, lambda r, key=(method, score): [x for x in r["decoding"]["rows"] if _key(x) == key])
            stroke = "o:" if method == "top-k" else "o-"
            axis.plot(*line, stroke, color=_GUIDED[method], markersize=4, linewidth=1.6, label=method)
        _axes(axis, f"guided by {SCORES[score]}", TICKS)
    panels[0].set_ylabel("accuracy, %", fontsize=8)
    lines = {line.get_label(): line for axis in panels for line in axis.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


# ---------- self-correction ----------


def correction_sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page of self-correction, and beside `path` a figure for each arm."""
    arms, parts = _by_arm(results), []
    for arm, own in arms.items():
        name = f"{path.stem}.png" if len(arms) == 1 else f"{path.stem}-{arm.replace(' ', '-')}.png"
        correction_figure(path.with_name(name), own)
        parts += [
            *_heading(arms, arm),
            f"![Accuracy against sampled tokens]({name})",
            _whole_samples(own),
            f"{_EQUAL} The sample that is corrected counts too. Mended: of wrong traces those that are right "
            "afterwards. Broken: of right traces those that are wrong afterwards. Suspected: with a step under the "
            "threshold.",
            _corrections(own),
            _THRESHOLDS,
            _thresholds(own),
        ]
    return parts


def _way(row: Row) -> tuple[str, str]:
    return row["detector"], row["judge"]


def _way_label(way: tuple[str, str]) -> str:
    return f"{SCORES[way[0]]} suspects, {SCORES[way[1]]} judges"


def _whole_samples(results: Sequence[Result]) -> str:
    """What choosing among whole samples reaches."""
    rows = results[0]["self_correction"]["pool"]
    budgets = sorted({row["budget"] for row in rows})

    def accuracy(result: Result, method: str, n: int) -> float:
        found = result["self_correction"]["pool"]
        return next(100 * row["accuracy"] for row in found if (row["method"], row["budget"]) == (method, n))

    def tokens(result: Result, n: int) -> float:
        return next(row["sampled_tokens"] for row in result["self_correction"]["pool"] if row["budget"] == n)

    lines = [
        [label, *(_mean(results, lambda r, m=method, n=n: accuracy(r, m, n)) for n in budgets)]
        for method, label in POOL.items()
        if any(row["method"] == method for row in rows)
    ]
    lines.append(["tokens of a question", *(_mean(results, lambda r, n=n: tokens(r, n), 0) for n in budgets)])
    return table(["choosing among whole samples, %", *(f"N = {n}" for n in budgets)], lines)


def _corrections(results: Sequence[Result]) -> str:
    lines = []
    for place, first in enumerate(results[0]["self_correction"]["rows"]):

        def share(result: Result, name: str, place: int = place) -> float:
            value = result["self_correction"]["rows"][place][name]
            return float("nan") if value is None else 100 * value

        def above(result: Result, methods: Sequence[str], place: int = place) -> float:
            found = result["self_correction"]
            return _above(found["rows"][place], found["pool"], methods)

        judge = first["judge"]
        lines.append(
            [
                f"{_way_label(_way(first))}: r {first['rounds']}, k {first['k']}",
                _mean(results, lambda r, place=place: r["self_correction"]["rows"][place]["sampled_tokens"], 0),
                _mean(results, lambda r: share(r, "accuracy")),
                _gain(results, lambda r, judge=judge: above(r, (judge,))),
                _gain(results, lambda r: above(r, AGAINST["the better of majority and log-prob"])),
                *(
                    _mean(results, lambda r, name=name: share(r, name))
                    for name in ("mended", "broken", "suspected_wrong", "suspected_right", "untouched")
                ),
            ]
        )
    heads = ["", "tokens", "accuracy, %", "minus best-of-N by the judge", "minus the better of majority and log-prob"]
    return table(
        [*heads, "mended, %", "broken, %", "wrong: suspected, %", "right: suspected, %", "untouched, %"], lines
    )


_THRESHOLDS = (
    "The threshold of each way and seed is the one farthest above best-of-N by the same judge at the same tokens, on "
    "the seed's validation questions, with two rounds of two. Those that were tried let suspect a given share of the "
    "validation traces; with 100 % each trace is drawn anew from its beginning."
)


def _thresholds(results: Sequence[Result]) -> str:
    """Of each way the margins of the thresholds tried, and how often each share was chosen."""
    ways = results[0]["self_correction"]["tuning"]
    lines = []
    for place, first in enumerate(ways):
        own = [result["self_correction"]["tuning"][place] for result in results]
        cells = []
        for at in range(len(first["tried"])):
            gain = _gain(own, lambda way, at=at: way["tried"][at]["margin"])
            cells.append(f"{gain} ({sum(way['chosen'] == at for way in own)})")
        lines.append([_way_label(_way(first)), *cells])
    heads = [f"{100 * row['share']:.0f} % suspected" for row in ways[0]["tried"]]
    return table(["validation: above best-of-N by the judge (seeds that chose it)", *heads], lines)


_WAYS = {
    ("reward", "reward"): ("#0b6e4f", "s"),
    ("reward_logprob", "reward_logprob"): ("#c2571a", "o"),
    ("logprob", "reward_logprob"): ("#1f6fb2", "v"),
    ("logprob", "logprob"): ("#7a7a7a", "D"),
}


def correction_figure(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG: accuracy against mean sampled tokens, a mark for each way, number of rounds and of continuations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    axis = figure.subplots()
    _draw_pool(axis, results, lambda r: r["self_correction"]["pool"])
    for way in dict.fromkeys(map(_way, results[0]["self_correction"]["rows"])):
        line = _line(results, lambda r, way=way: [x for x in r["self_correction"]["rows"] if _way(x) == way])
        colour, mark = _WAYS[way]
        axis.plot(*line, mark, color=colour, markersize=4.5, alpha=0.8, label=_way_label(way))
    _axes(axis, "self-correction: 1 to 3 rounds of 1, 2 or 4 continuations", TICKS[:-1])
    axis.set_ylabel("accuracy, %", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
