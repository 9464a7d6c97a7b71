"""A verdict in a folder, on a page and on a model card."""

import dataclasses
import json
import math

import pytest

from tracereward import console
from tracereward.reports.verdicts import read_verdict, verdict_html, verdict_markdown, write_verdict
from tracereward.verdict import Comparison, Verdict

VERDICT = Verdict(
    method="vote",
    questions=40,
    outcome="better",
    comparisons=(
        Comparison(baseline="majority", difference=0.1, low=-0.0154, high=0.18),
        Comparison(baseline="shortest", difference=0.25, low=0.125, high=0.375),
    ),
    aurocs={"reward": {"within_prompt": 0.8125, "pooled": math.nan}},
    about="4 samples of a <policy>",
)


def test_stored_verdict_is_read_back(tmp_path):
    assert read_verdict(tmp_path) is None
    write_verdict(tmp_path, dataclasses.replace(VERDICT, aurocs={"reward": {"pooled": 0.5}}))
    assert read_verdict(tmp_path) == dataclasses.replace(VERDICT, aurocs={"reward": {"pooled": 0.5}})
    write_verdict(tmp_path, VERDICT)
    assert json.loads((tmp_path / "verdict.json").read_text())["aurocs"]["reward"]["pooled"] is None
    assert math.isnan(read_verdict(tmp_path).aurocs["reward"]["pooled"])
    write_verdict(tmp_path, None)
    assert not any(tmp_path.iterdir())


def broken(**changes: object) -> str:
    return json.dumps(VERDICT.to_dict() | {"aurocs": {}} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        broken()[:-20],
        broken(outcome="splendid"),
        broken(method="charm"),
        broken(comparisons=[]),
        broken(comparisons=[{"baseline": "majority", "difference": 0.1, "low": None, "high": 0.2}]),
        broken(questions=None),
        broken(aurocs={"reward": 3}),
        "[" * 100_000,
        "\udcff",
    ],
)
def test_damaged_file_is_a_warning(tmp_path, monkeypatch, text):
    said = []
    monkeypatch.setattr("tracereward.reports.verdicts.warn", said.append)
    (tmp_path / "verdict.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert read_verdict(tmp_path) is None
    assert len(said) == 1
    assert str(tmp_path / "verdict.json") in said[0]


def test_one_warning_on_stderr(tmp_path, capsys):
    (tmp_path / "verdict.json").mkdir()
    assert read_verdict(tmp_path) is None
    assert capsys.readouterr().err.count("warning:") == 1
    assert console.is_main_process()


def test_markdown_has_the_line_and_the_numbers():
    text = verdict_markdown(VERDICT)
    assert f"**{VERDICT.line}**" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows == [
        ["baseline", "gain, points", "95 % interval"],
        ["---"] * 3,
        ["majority", "+10.0", "[−1.5, +18.0]"],
        ["shortest", "+25.0", "[+12.5, +37.5]"],
        ["score", "within the prompt", "pooled"],
        ["---"] * 3,
        ["reward", "0.812", "–"],
    ]
    assert "no reason" in verdict_markdown(None, "no reason")


def test_html_is_escaped_and_needs_no_style():
    html = verdict_html(VERDICT)
    assert VERDICT.line in html
    assert "&lt;policy&gt;" in html
    assert "style" not in html
    assert ">0.812<" in html
    assert "Verdict: none stored" in verdict_html(None)
