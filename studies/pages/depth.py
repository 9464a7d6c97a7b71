"""Section and figure of results against the number of hops, from the rows of a study's results."""

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
"""Keys of `depth.localisation`, and what they are called."""
_HOW_TO_READ = (
    "By the number of hops that a question takes. First wrong line: of the wrong samples, the share whose lowest line, "
    "by the mean of its tokens' values, is the first that an expert would not write; chance is a line drawn at random."
)


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page `path`; writes ``NAME-depth.png`` beside it."""
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
    return ["### Against depth", _HOW_TO_READ, picture, _choice(rows, n), _localisation(rows)]


def _choice(rows: pd.DataFrame, n: int) -> str:
    """What each way of choosing one of `n` samples reaches, and within-prompt AUROCs."""
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
    """Share of wrong samples whose first wrong line is found, in %."""
    cells = rows.assign(more=rows["reward"] - rows["logprob"]).groupby("point", sort=False)
    shown = {
        "wrong samples a seed": cells["wrong"].mean().map("{:.0f}".format),
        **{name: cells[score].agg(percent) for score, name in FOUND.items()},
        "reward minus log-prob": cells["more"].agg(points),
    }
    return table("first wrong line found", pd.DataFrame(shown))


def _draw(figure: Path, rows: pd.DataFrame) -> None:
    """Gain of each arm, and localisation by each score; of log-prob and chance it is the same in all arms."""
    rewards, *controls = (
        rows.assign(line=line, value=100 * rows[score])
        for score, line in (("reward", "reward, " + rows["arm"]), ("logprob", "log-prob"), ("chance", "chance"))
    )
    control = pd.concat(controls).drop_duplicates(["line", "x", "seed"])
    depth_lines(figure, rows.assign(line=rows["arm"], value=100 * rows["gain"]), with_control(rewards, control))
