"""What scores, rankings and verdicts show in a notebook and give to pandas."""

import json
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from tracereward.errors import InputError
from tracereward.reports.plots import SHOWN, STAND_INS, run_figures
from tracereward.rewards.heatmap import reward_colour
from tracereward.rewards.ranking import Ranking
from tracereward.rewards.token_scores import TokenScores
from tracereward.verdict import Comparison, Verdict


def test_scores():
    scores = TokenScores(
        tokens=["a", "\n", "b<"],
        offsets=[(0, 1), (1, 2), (2, 4)],
        rewards=[1.0, -2.0, 0.5],
        supervised=[True, False, True],
        step_ends=[False, True, True],
    )
    table = scores.to_pandas()
    assert table["step"].tolist() == [0, 0, 1]
    means = [table[table["step"] == step]["reward"].mean() for step in (0, 1)]
    assert means == scores.step_rewards() == [-0.5, 0.5]
    assert table.loc[2].to_dict() == {
        "token": "b<",
        "reward": 0.5,
        "step": 1,
        "start": 2,
        "end": 4,
        "supervised": True,
    }
    html = scores._repr_html_()
    assert "b&lt;" in html
    assert f"--l:{reward_colour(-1.0, 1.0)}" in html, "the largest has the strongest colour"
    empty = TokenScores(tokens=[], offsets=[], rewards=[], supervised=[], step_ends=[])
    assert len(empty.to_pandas()) == 0
    assert empty._repr_html_()


def test_ranking():
    ranking = Ranking([(1, 0.25), (0, -1.0)], ["<x>", "y"])
    assert ranking == [(1, 0.25), (0, -1.0)], "a list as any other"
    assert ranking.to_pandas().to_dict("list") == {"candidate": [1, 0], "reward": [0.25, -1.0], "text": ["y", "<x>"]}
    html = ranking._repr_html_()
    assert html.index("+0.25") < html.index("-1.00")
    assert "&lt;x&gt;" in html


def test_verdict():
    one = Comparison(baseline="majority", difference=0.05, low=0.01, high=0.09)
    verdict = Verdict(method="vote", questions=200, outcome="better", comparisons=(one,), aurocs={})
    [row] = verdict.to_pandas().to_dict("records")
    assert (row["difference"], row["low"], row["high"]) == (0.05, 0.01, 0.09)
    assert verdict.line in verdict._repr_html_()
    assert "+1.0 to +9.0" in verdict._repr_html_()


def test_figures_of_a_run(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        run_figures(tmp_path)
    rows = [{"phase": "warmup", "update": i, "discriminator/loss": 0.7 - 0.1 * i} for i in range(3)]
    rows += [{"phase": "train", "step": i, "reward": float(i)} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = run_figures(tmp_path)
    assert list(figures) == ["Reward of the policy’s traces", "Discriminator loss (warm-up)"]
    [line] = figures["Reward of the policy’s traces"].axes[0].lines
    assert np.asarray(line.get_ydata()).tolist() == [0, 1, 2, 3]
    assert line.get_color() == SHOWN["curve"]
    drawn: list[Any] = figures["Discriminator loss (warm-up)"].findobj(lambda one: hasattr(one, "get_color"))
    assert not {to_hex(one.get_color()) for one in drawn} & {*STAND_INS.values()}
