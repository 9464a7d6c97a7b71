"""The page of `tracereward audit` in a real browser: marked by keyboard alone, kept, and exported."""

import json

import pytest

from helpers.browser import Page, driver, pytestmark  # noqa: F401
from tracereward.data.marks import fingerprint, read_marks
from tracereward.reports.audit import write_audit

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def row(number: int, **more) -> dict:
    given = {"prompt": f"{number} + 1 = ?\n", "completion": f"{HOSTILE}\n#### {number}"}
    return {
        "id": fingerprint(given),
        "source": f"experts.jsonl:{number}",
        **given,
        "answer": str(number),
        "findings": [],
        "reward": 0.5,
        "logprob": -1.0,
        "lowest_step": 0,
        "steps": [
            {"text": f"{HOSTILE}\n", "reward": -2.0, "logprob": -3.0},
            {"text": f"#### {number}", "reward": 3.0, "logprob": -0.5},
        ],
        **more,
    }


def test_marks_by_keyboard_are_kept_and_exported(driver, tmp_path):
    page, path = Page(driver), tmp_path / "audit.html"
    rows = [row(1, findings=[{"kind": "equation", "text": f"1 + 1 = 3 {HOSTILE}"}]), row(2), row(3), row(4)]
    write_audit(path, rows, "Audit", order="lowest first", command="tracereward audit")
    driver.get(path.as_uri())

    def press(keys: str) -> None:
        page.one("body").send_keys(keys)

    assert page.texts(".findings li") == [f"1 + 1 = 3 {HOSTILE}"]
    assert page.texts("tr.error small") == ["lowest step"]
    assert page.texts(".chip") == ["−2.00", "+3.00"]
    press("d")
    press("f")
    assert page.one("h2").text == "3 of 4"
    press("n")
    driver.switch_to.active_element.send_keys("an adjective", Keys.ESCAPE)  # its keys mark nothing
    press("a")
    press("k")
    assert page.one("h2").text == "3 of 4"
    assert page.texts("[aria-pressed=true]")[0].startswith("keep")
    driver.get(path.as_uri())
    assert page.one("h2").text == "4 of 4"  # the first without a mark
    assert "3 of 4 marked" in page.one("#status").text

    exported = tmp_path / "marks.jsonl"
    exported.write_text(driver.execute_script("return exported()"), encoding="utf-8")
    assert read_marks(str(exported)) == dict(zip([one["id"] for one in rows], ["drop", "fix", "keep"]))
    last = json.loads(exported.read_text(encoding="utf-8").splitlines()[-1])
    assert last["correct"] is True
    assert last["note"] == "an adjective"
    assert (last["prompt"], last["completion"]) == (rows[2]["prompt"], rows[2]["completion"])
    for scheme in ("light", "dark"):
        page.media(scheme)
        for width, mobile in ((1280, False), (390, True)):
            page.size(width, 800, mobile)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.get_log("browser") == []
