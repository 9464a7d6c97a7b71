"""`tracereward watch`: how far the traces of a period are from the experts', and from those of an earlier period."""

import dataclasses
import heapq
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from tracereward.commands.partial_output import check_file
from tracereward.commands.watch_traces import Scoring, Traces, read_experts, read_period, reward_model_of
from tracereward.console import note, say
from tracereward.data.drift import ALPHA, PROBE, Period, Shift, question_means, shifts
from tracereward.data.surface_probe import LABELS, leak_warning, surface_probe
from tracereward.errors import InputError
from tracereward.files import atomic_write_json, without_nan
from tracereward.reports.inspection_page import write_inspection
from tracereward.reports.tables import Table, print_tables
from tracereward.rewards.parts import task_of
from tracereward.rewards.settings import check_reward_model

LOW = 0.05
"""Quantile of the experts' rewards under which a trace is called low."""
SHOWN = 10
"""Traces on the page: those that moved most."""
NAMES = {
    "reward": "reward, log-odds",
    "reward_spread": "distance of the reward from the median",
    "low_reward": f"share under the experts' {100 * LOW:g} % quantile",
    "no_answer": "share whose answer cannot be read",
    "tokens": "length in tokens",
    **LABELS,
    PROBE: "surface probe, all surface features together",
}


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Options of `tracereward watch`.

    Attributes:
        traces: rows of this period, scored or not.
        reference: run folder of `fit` or `train`, or folder or Hub id of a reward model.
        before: rows of an earlier period; None to compare with the experts.
        experts: demonstrations; None for those of the run.
        task: reads answers; the reward model's if None.
        output: HTML page, next to which the figures are stored as JSON; None for the terminal only.
        overwrite: replace both.
        dtype: precision of the reward model.
    """

    traces: str
    reference: str
    before: str | None = None
    experts: str | None = None
    task: str | None = None
    output: Path | None = None
    overwrite: bool = False
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The result: the lines that are printed, the table and what is stored as JSON."""

    lines: list[str]
    table: Table
    stored: dict[str, Any]

    @property
    def drifted(self) -> bool:
        """Whether a feature differs, from the earlier period or, without one, from the experts."""
        return bool(self.stored["drifted"])


def run_watch(options: WatchOptions) -> Watched:
    """`tracereward watch`: print the comparison, and write the page and its JSON.

    Raises:
        InputError: an input cannot be read, or has too few questions; before a model is loaded where that can be known.
        RunFailed: a reward is not finite.
    """
    model, run = reward_model_of(options.reference)
    settings = check_reward_model(model)
    task = task_of(settings, options.task)
    inputs = [options.traces, options.before, options.experts, model]
    if options.output is not None:
        if options.output.suffix == ".json":
            raise InputError(f"{options.output}: name the page, such as {options.output.with_suffix('.html')}")
        for path in (options.output, options.output.with_suffix(".json")):
            check_file(path, inputs, overwrite=options.overwrite)
    elif options.overwrite:
        raise InputError("--overwrite needs --output, a file")
    experts = read_experts(options.experts, run, settings)
    if experts is None and options.before is None:
        raise InputError(f"{options.reference} does not say which experts it learned from: give --experts or --before")
    earlier = None if options.before is None else read_period(options.before, settings, model)
    rows = read_period(options.traces, settings, model)
    scoring = Scoring(model, options.dtype)
    sources = {"experts": Traces(), "before": Traces(), "now": Traces()}
    for name, given in (("experts", experts), ("before", earlier)):
        for row in scoring.scores(given or [], name):
            sources[name].add(row, task)
    base = movement_from(sources["experts" if earlier is None else "before"])
    now, moved, order = sources["now"], [], count()
    for row in scoring.scores(rows, "now"):
        change = now.add(row, task) - base(now.questions[-1])
        item = (abs(change), -next(order), change, {**row, "reward": now.rows[-1]["reward"]})  # of equals the first
        if len(moved) < SHOWN:
            heapq.heappush(moved, item)
        else:
            heapq.heappushpop(moved, item)
    if not now.rows:
        raise InputError(f"{options.traces}: no row can be scored")
    found = compare({name: one for name, one in sources.items() if one.rows})
    for line in found.lines:
        say(line)
    print_tables([found.table])
    if options.output is not None:
        shown = [(change, row) for _, _, change, row in sorted(moved, key=lambda item: item[:2], reverse=True)]
        atomic_write_json(options.output.with_suffix(".json"), without_nan(found.stored))
        _write_page(options.output, found, shown)
        note(
            f"the {len(shown)} traces that moved most: {options.output}; figures: {options.output.with_suffix('.json')}"
        )
    return found


def movement_from(earlier: Traces) -> Callable[[str], float]:
    """What a trace's reward is compared with: its question's mean reward before, else that of all questions."""
    if not earlier.rows:
        return lambda question: 0.0
    means = question_means(earlier.questions, earlier.column("reward")[:, None])
    overall = float(np.mean([value[0] for value in means.values()]))
    return lambda question: float(means[question][0]) if question in means else overall


def compare(sources: Mapping[str, Traces]) -> Watched:
    """The traces of a period against those of an earlier one, or, without one, against the experts'.

    Args:
        sources: ``now``, and one or both of ``before`` and ``experts``, which are then shown next to the periods.
    """
    against = "before" if "before" in sources else "experts"
    experts = sources.get("experts")
    pooled = [sources[name].column("reward") for name in (against, "now")]
    median = float(np.median(np.concatenate(pooled)))
    low = None if experts is None else float(np.quantile(experts.column("reward"), LOW))
    periods = {name: _period(one, median, low) for name, one in sources.items()}
    found, area = shifts(periods[against], periods["now"], probed=list(LABELS))
    own = {
        name: surface_probe(experts.texts, one.texts)
        for name, one in sources.items()
        if experts is not None and name != "experts"
    }
    of_experts = _means(periods["experts"]) if experts is not None else {}
    lines = [_counts(sources), _verdict(found, against)]
    if experts is not None:
        lines += [
            f"From the experts, {name}: mean reward {_away(experts, sources[name]):+.2f} SD of theirs; AUROC of the "
            f"surface features {probe.auroc:.2f} (0.5: alike)."
            for name, probe in own.items()
        ]
        if (warning := leak_warning(own["now"], "these traces")) is not None:
            lines.append(f"{warning[0].upper()}{warning[1:]}.")
    stored = {
        "against": against,
        "drifted": [one.name for one in found if one.drifted],
        "level": ALPHA,
        "traces": {name: len(one.rows) for name, one in sources.items()},
        "questions": {name: len(set(one.questions)) for name, one in sources.items()},
        "features": [{**dataclasses.asdict(one), "experts": of_experts.get(one.name)} for one in found],
        "reward_quantiles": {name: _quantiles(one) for name, one in sources.items()},
        "probe_auroc": {against: area, **{f"experts_{name}": probe.auroc for name, probe in own.items()}},
        "lines": lines,
    }
    return Watched(lines=lines, table=_table(found, against, of_experts), stored=stored)


def _table(found: list[Shift], against: str, of_experts: Mapping[str, float]) -> Table:
    """A row for each feature; of the probe's scores only the tests mean something."""
    beside = against == "before" and bool(of_experts)
    columns = ["feature", *(["experts"] if beside else []), against, "now", "change, SD", "p", "corrected"]
    rows: list[list[Any]] = []
    for one in filter(lambda one: one.varies, found):
        probe = one.name == PROBE
        means = [*([of_experts.get(one.name)] if beside else []), one.before, one.now]
        shown = [None if probe or mean is None else f"{mean:,.3g}" for mean in means]
        rows.append([NAMES[one.name], *shown, f"{one.size:+.2f}", f"{one.p:.4f}", f"{one.p_corrected:.4f}"])
    how = (
        "Means over questions, each of which counts once. p: permutation tests by question; corrected: by Holm's "
        "method. Features that are the same everywhere are left out."
    )
    return Table(f"Now and {'the experts' if against == 'experts' else 'before'}", columns, rows, note=how)


def _period(traces: Traces, median: float, low: float | None) -> Period:
    """The features of a source, with those of the distribution of its rewards."""
    reward = traces.column("reward")
    features = {"reward": reward, "reward_spread": np.abs(reward - median)}
    if low is not None:
        features["low_reward"] = (reward < low).astype(float)
    features |= {name: traces.column(name) for name in traces.rows[0] if name != "reward"}
    return Period(questions=traces.questions, features={name: values.tolist() for name, values in features.items()})


def _means(period: Period) -> dict[str, float]:
    names = list(period.features)
    means = np.mean(list(question_means(period.questions, period.values(names)).values()), axis=0)
    return dict(zip(names, means.tolist()))


def _quantiles(traces: Traces) -> dict[str, float]:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {f"{share:g}": value for share, value in zip(shares, np.quantile(traces.column("reward"), shares).tolist())}


def _away(experts: Traces, traces: Traces) -> float:
    """Difference of the mean rewards in standard deviations of the experts'; nan if theirs do not vary."""
    theirs = experts.column("reward")
    return float((traces.column("reward").mean() - theirs.mean()) / theirs.std()) if np.ptp(theirs) else math.nan


def _counts(sources: Mapping[str, Traces]) -> str:
    shown = [f"{name}: {len(one.rows)} traces of {len(set(one.questions))} questions" for name, one in sources.items()]
    if "before" in sources:
        both = set(sources["now"].questions) & set(sources["before"].questions)
        shown.append(f"questions in both periods: {len(both)}")
    return "; ".join(shown)


def _verdict(found: list[Shift], against: str) -> str:
    """What differs, in a sentence."""
    tests = f"{sum(one.varies for one in found)} tests at {100 * ALPHA:g} % after Holm's correction"
    moved = sorted((one for one in found if one.drifted), key=lambda one: (one.p_corrected, -abs(one.size)))
    if not moved:
        near = min(found, key=lambda one: one.p)
        what = "No drift" if against == "before" else "No difference from the experts"
        return f"{what} ({tests}); the smallest p is {near.p:.2g}, of: {NAMES[near.name]}."
    named = [
        NAMES[one.name]
        if one.name == PROBE
        else f"{NAMES[one.name]} {'higher' if one.size > 0 else 'lower'} by {abs(one.size):.2f} SD"
        for one in moved
    ]
    return f"{'Drift' if against == 'before' else 'Different from the experts'} ({tests}): {'; '.join(named)}."


def _write_page(path: Path, found: Watched, moved: list[tuple[float, dict[str, Any]]]) -> None:
    """The page of the traces that moved most, with the tables above them."""
    base = "mean of its question before, or of all" if found.stored["against"] == "before" else "mean of the experts"
    listed = Table(
        "The traces that moved most",
        ["question", "reward", "change"],
        [[_start(row["prompt"]), f"{row['reward']:+.2f}", f"{change:+.2f}"] for change, row in moved],
        note=f"Change: the trace's reward minus the {base}, in log-odds. Below, the traces token by token.",
    )
    command = " ".join(["tracereward", *sys.argv[1:]])
    rows = [row for _, row in moved]
    write_inspection(path, rows, "What moved", command=command, lines=found.lines, tables=[found.table, listed])


def _start(prompt: Any) -> str:
    text = " ".join((prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)).split())
    return text if len(text) <= 80 else f"{text[:79]}…"
