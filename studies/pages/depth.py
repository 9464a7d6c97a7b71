"""Page section and figure of results by number of hops."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from studies.pages.figures import depth_lines
from studies.pages.markdown import mean, percent, points, table
from studies.pages.rankings import ranking_frame, with_control
from studies.results_file import Result

CHOICES = (
    *("mean sample", "shortest", "majority@{n}", "log-prob best-of-{n}", "reward best-of-{n}"),
    *("reward + log-prob best-of-{n}", "oracle@{n}"),
)
FOUND = {
    "chance": "chance",
    "first": "always the first line",
    "logprob": "log-prob",
    "reward": "reward",
    "reward_logprob": "reward + log-prob",
}
"""Keys of `measures.depth.localisation`, and their labels."""
_HOW_TO_READ = (
    "Results by number of hops. First wrong line: the share of wrong samples whose lowest-scored line (mean of its "
    "token values) is the first one that an expert would not write; chance is a random line."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page `path`; writes ``NAME-depth.png`` next to it."""
    figure = path.with_name(f"{path.stem}-depth.png")
    rows = pd.DataFrame(
        [
            {name: result[name] for name in ("arm", "seed", "samples")}
            | {"x": int(depth), "point": f"{result['arm']}, {depth} hops", **of_depth["localisation"]}
            | {"ranking": of_depth["ranking"]}
            for result in results
            for depth, of_depth in result["depth"].items()
        ]
    ).astype(dict.fromkeys(FOUND, float))
    rows = ranking_frame(rows)
    n = results[0]["samples"]
    rows["gain"] = rows[f"reward + log-prob best-of-{n}"] - rows["plain"]
    _draw(figure, rows)
    picture = f"![Gain and localisation against depth]({figure.name})"
    return ["### By depth", _HOW_TO_READ, picture, _choice(rows, n), _localisation(rows)]


def _choice(rows: pd.DataFrame, n: int) -> str:
    """Accuracy of each way of choosing one of `n` samples, and within-prompt AUROCs."""
    cells = rows.groupby("point", sort=False)
    shown = {
        "questions": cells["questions"].first(),
        **{label: cells[label].agg(percent) for label in (choice.format(n=n) for choice in CHOICES)},
        f"reward + log-prob best-of-{n} minus the better of majority and log-prob": cells["gain"].agg(points),
        "within-prompt AUROC, log-prob": cells["logprob_auroc_within_prompt"].agg(mean, digits=3),
        "within-prompt AUROC, reward": cells["reward_auroc_within_prompt"].agg(mean, digits=3),
    }
    return table(f"choosing one of {n} samples", pd.DataFrame(shown))


def _localisation(rows: pd.DataFrame) -> str:
    """Share of wrong samples whose first wrong line is found, in %, by score."""
    cells = rows.assign(more=rows["reward"] - rows["logprob"]).groupby("point", sort=False)
    shown = {
        "wrong samples per seed": cells["wrong"].mean().map("{:.0f}".format),
        **{name: cells[score].agg(percent) for score, name in FOUND.items()},
        "reward minus log-prob": cells["more"].agg(points),
    }
    return table("first wrong line found", pd.DataFrame(shown))


def _draw(figure: Path, rows: pd.DataFrame) -> None:
    """Figure of gains and localisation; log-prob and chance are the same for all arms and drawn once."""
    rewards, *controls = (
        rows.assign(line=line, value=100 * rows[score])
        for score, line in (("reward", "reward, " + rows["arm"]), ("logprob", "log-prob"), ("chance", "chance"))
    )
    control = pd.concat(controls).drop_duplicates(["line", "x", "seed"])
    depth_lines(figure, rows.assign(line=rows["arm"], value=100 * rows["gain"]), with_control(rewards, control))
