"""The study of planted errors: what is planted, what is found by hand, and the page."""

import numpy as np
import pytest

from helpers.paths import ROOT
from studies.measures.audit import of_order
from studies.pages.audit import write_page
from studies.setup.planted import PlantedPool
from tracereward.files import read_jsonl
from tracereward.modeling.steps import LINES
from tracereward.tasks.recipes import get_task


def test_planted_rows_are_nested_and_wrong(tokenizer):
    clean = [{"prompt": f"{n} ?", "completion": f"right {n}"} for n in range(40)]
    wrong = [None if n % 4 == 0 else {"prompt": f"{n} ?", "completion": f"wrong {n}"} for n in range(40)]
    pool = PlantedPool(
        task=get_task("arithmetic"),
        rule=LINES,
        model="",
        tokenizer=tokenizer,
        clean=clean,
        wrong=wrong,
        kinds=[None] * 40,
    )
    few, many = pool.planted(0, 0.05), pool.planted(0, 0.1)
    for (rows, planted), count in ((few, 2), (many, 4)):
        assert sum(planted) == count
        assert [row["completion"] for row in rows] == [f"{('right', 'wrong')[p]} {n}" for n, p in enumerate(planted)]
    assert all(larger >= smaller for larger, smaller in zip(many[1], few[1], strict=True))
    assert pool.planted(1, 0.1)[1] != many[1]


def test_precision_counts_the_planted_among_the_first():
    values = np.array([0.5, -1.0, 0.0, -2.0, 3.0])
    planted, kinds = [False, True, True, False, False], [None, "number", "operator", None, None]
    found = of_order(values, planted, kinds)
    assert found["precision"] == 0.5  # of -2 and -1
    assert found["auroc"] == pytest.approx(4 / 6, abs=1e-4)  # -1 < 0.5 and 3, 0 < 0.5 and 3, of six pairs
    assert found["kinds"] == {"number": [1, 1], "operator": [0, 1]}


def test_page_is_of_the_results(tmp_path):
    rows = read_jsonl(ROOT / "studies" / "results" / "audit.jsonl")
    write_page(tmp_path / "audit.md", rows)
    published = ROOT / "docs" / "studies" / "audit.md"
    assert (tmp_path / "audit.md").read_text(encoding="utf-8") == published.read_text(encoding="utf-8")
