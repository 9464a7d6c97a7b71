"""The inspection page in a real browser; skipped if Chromium, its driver or selenium is missing."""

import random
import time

import pytest

from helpers.browser import Page, driver, pytestmark  # noqa: F401
from helpers.inspection import row_of
from tracereward.reports import inspection_page
from tracereward.reports.inspection_page import write_inspection

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


CHAIN = "23 - 7 + 5 = ?"
ROWS = [
    row_of(
        ["23 - 7", " = 26", "\n", "#### 31"],
        [1.0, -3.0, -1.0, 2.0],
        **{"prompt": CHAIN, "correct": False, "answer": "21", "suspected_error": 0},
    ),
    row_of(
        ["23 - 7", " = 16", "\n", "#### 21"],
        [1.5, 2.5, 2.0, 2.25],
        **{"prompt": CHAIN, "correct": True, "answer": "21", "suspected_error": None},
    ),
    row_of(["4 + 4 = 8", "\n", "#### 8"], [0.5, 0.5, 1.0], prompt="4 + 4 = ?", correct=True),
    row_of(
        [HOSTILE, "\n", "x" * 300],
        [-0.25, 0.25, -0.12345],
        **{"prompt": f"Hostile {HOSTILE}", "extracted": HOSTILE, "model": "m" * 90},
    ),
]


@pytest.fixture
def page(driver, tmp_path):
    """The page of `ROWS` on a desktop screen; the console must be empty afterwards."""
    page = Page(driver)
    page.media()
    page.size(1280, 900)
    path = tmp_path / "inspection.html"
    write_inspection(path, ROWS, "Four traces", command="tracereward inspect scores.jsonl")
    page.open(path)
    yield page
    assert driver.get_log("browser") == []


def test_steps_are_in_a_table_with_the_suspected_error_marked(page):
    [first, *_] = page.all(".trace")
    rows = [row.text.split("\n") for row in first.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert rows == [["1", "suspected first error", "23 - 7 = 26 −1.00"], ["2 #### 31 +2.00"]]
    assert len(page.all("tr.error")) == 1
    assert page.texts("h2") == [f"Question {i} of 3" for i in (1, 2, 3)]
    assert "✗ wrong" in first.text


def test_answers_and_search_filter(page):
    assert page.count == "4 of 4 traces, 3 of 3 questions"
    page.one("[value=wrong]").click()
    page.wait(lambda: page.count == "1 of 4 traces, 1 of 3 questions")
    assert page.texts(".verdict") == ["✗ wrong"]
    assert "1 candidate filtered out" in page.one(".question").text
    page.one("[value=right]").click()
    page.wait(lambda: page.count == "2 of 4 traces, 2 of 3 questions")
    assert page.texts(".verdict") == ["✓ right", "✓ right"]
    page.one("#search").send_keys("HOSTILE")
    page.wait(lambda: page.count == "0 of 4 traces, 0 of 3 questions")
    assert page.texts("#questions") == ["No trace matches."]
    page.one("[value=all]").click()
    page.wait(lambda: page.count == "1 of 4 traces, 1 of 3 questions")
    assert page.texts("h2") == ["Question 3 of 3"]


def test_orders(page):
    def order(value: str) -> list[tuple[str, list[str]]]:
        Select(page.one("#order")).select_by_value(value)
        return [
            (section.find_element(By.TAG_NAME, "h2").text.split()[1], [h.text for h in section.find_elements(*h3)])
            for section in page.all(".question")
        ]

    h3 = (By.TAG_NAME, "h3")
    # rewards: -0.25 and 2.0625; 0.6667; -0.0412. drops: -3 and -0.25 (a rise); -0.5; 0.1235
    assert order("lowest") == [("1", ["#1", "#2"]), ("3", ["Trace"]), ("2", ["Trace"])]
    assert order("highest") == [("1", ["#2", "#1"]), ("2", ["Trace"]), ("3", ["Trace"])]
    assert order("drop") == [("3", ["Trace"]), ("1", ["#2", "#1"]), ("2", ["Trace"])]
    assert order("original") == [("1", ["#1", "#2"]), ("2", ["Trace"]), ("3", ["Trace"])]


def test_hover_shows_the_value(page):
    tokens = page.all(".t")
    ActionChains(page.driver).move_to_element(tokens[1]).perform()
    page.wait(lambda: page.readout == "= 26: −3.0000")
    ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    page.wait(lambda: page.readout == "")


def test_trace_is_one_tab_stop_with_arrow_key_navigation(page):
    page.one("#order").send_keys(Keys.TAB)
    assert page.focus.get_attribute("aria-label") == "23 - 7: +1.0000"
    assert page.readout == "23 - 7: +1.0000"
    page.press(Keys.ARROW_RIGHT)
    assert page.readout == "= 26: −3.0000"
    page.press(Keys.ARROW_RIGHT)
    assert page.readout == "line break: −1.0000"
    page.press(Keys.ARROW_DOWN)
    assert page.readout == "#### 31: +2.0000"
    page.press(Keys.ARROW_RIGHT)  # the end: stays
    assert page.readout == "#### 31: +2.0000"
    page.press(Keys.HOME, Keys.END, Keys.ARROW_UP)
    assert page.readout == "23 - 7: +1.0000"
    page.press(Keys.ESCAPE)
    assert page.readout == ""
    page.press(Keys.TAB)
    assert page.readout == "23 - 7: +1.5000"  # the next trace
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert page.focus.get_attribute("aria-label") == "23 - 7: +1.0000"
    stops = [len(heat.find_elements(By.CSS_SELECTOR, '[tabindex="0"]')) for heat in page.all(".heat")]
    assert stops == [1, 1, 1, 1]


def test_click_moves_the_tab_stop(page):
    page.all(".t")[3].click()
    assert page.readout == "#### 31: +2.0000"
    assert page.focus.get_attribute("tabindex") == "0"
    assert len(page.one(".trace").find_elements(By.CSS_SELECTOR, ".t[tabindex='0']")) == 1


def test_j_and_k_move_between_questions_except_while_typing(page):
    page.press("j")
    assert page.focus.text == "Question 1 of 3"
    page.press("j", "j", "j")
    assert page.focus.text == "Question 3 of 3"
    page.press("k")
    assert page.focus.text == "Question 2 of 3"
    page.press("/")
    assert page.focus.get_attribute("id") == "search"
    page.press("jk/")
    assert page.one("#search").get_attribute("value") == "jk/"
    assert page.count == "0 of 4 traces, 0 of 3 questions"


def test_candidates_are_side_by_side(page):
    first, second, third, _ = (trace.rect for trace in page.all(".trace"))
    assert first["y"] == second["y"] < third["y"]
    assert first["x"] + first["width"] < second["x"]


def test_hostile_text_is_shown_as_text(page):
    assert page.texts(".prompt")[2] == f"Hostile {HOSTILE}"
    assert page.all(".t")[-3].text == HOSTILE
    assert f"answer {HOSTILE}" in page.all(".trace")[3].text
    assert page.all("img, main script") == []
    assert len(page.all("script")) == 2 + len(ROWS)  # and no alert: it would make every later call fail


def test_each_step_uses_its_own_text_direction(page, tmp_path):
    row = row_of(["שלום", "\n", "answer"], [-1.0, -1.0, 1.0], suspected_error=0)
    write_inspection(path := tmp_path / "directions.html", [row], "Directions")
    page.open(path)
    cells = page.all(".heat tbody td:nth-child(2)")
    assert [cell.value_of_css_property("direction") for cell in cells] == ["rtl", "ltr"]
    assert "suspected first error" in cells[0].text


def test_page_fits_a_phone_screen(page):
    page.size(360, 740, mobile=True)
    page.driver.refresh()
    page.wait(lambda: page.count)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 360
    sides = page.driver.execute_script(
        "return [...document.querySelectorAll('main *')].map((e) => e.getBoundingClientRect().right)"
    )
    assert max(sides) <= 360
    first, second, *_ = (trace.rect for trace in page.all(".trace"))
    assert second["y"] > first["y"]
    page.all(".t")[-1].click()
    box = page.one("#readout").rect
    assert 0 <= box["x"] <= 360 - box["width"]


def test_dark_mode_and_print_palettes(page):
    # The token " = 26" has the largest |reward|: orange f29e4c on light pages, 9a500a on dark ones.
    second = ".t:nth-of-type(2)"
    assert page.background(second) == "f29e4c"
    page.media("dark")
    assert page.background(second) == "9a500a"
    assert page.background("body") == "16181b"
    page.media("dark", "print")
    assert page.background(second) == "f29e4c"
    assert page.background("body") == "ffffff"
    assert not page.one("#tools").is_displayed()


def test_noscript_message_without_javascript(page):
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.driver.refresh()
        assert page.one("noscript").text.startswith("This page needs JavaScript to show its 4 traces.")
        assert not page.one("#tools").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_thousand_traces_load_on_scroll(page, tmp_path):
    rng = random.Random(0)
    tokens = [f" word{i}" + ("\n" if i % 25 == 24 else "") for i in range(150)]
    rewards = [[rng.uniform(-3, 3) for _ in tokens] for _ in range(1000)]
    rows = [row_of(tokens, held, prompt=f"Question {i // 8}", correct=i % 2 == 0) for i, held in enumerate(rewards)]
    write_inspection(path := tmp_path / "thousand.html", rows, "A thousand traces")
    start = time.perf_counter()
    page.open(path)
    print(f"1,000 traces of 150 tokens: {time.perf_counter() - start:.2f} s to open")
    assert page.count == "1,000 of 1,000 traces, 125 of 125 questions"
    loaded = len(page.all(".trace"))
    assert 24 <= loaded < 100  # not all at once
    assert len(page.one(".trace").find_elements(By.CSS_SELECTOR, ".t")) == 150
    page.driver.execute_script("document.getElementById('more').scrollIntoView()")
    page.wait(lambda: len(page.all(".trace")) > loaded)
    page.one("#search").send_keys("question 124")
    page.wait(lambda: page.count == "8 of 1,000 traces, 1 of 125 questions")
    assert page.texts("h2") == ["Question 125 of 125"]
    page.one("#search").clear()
    page.one("[value=right]").click()
    page.wait(lambda: page.count == "500 of 1,000 traces, 125 of 125 questions")
    page.press("j" * 30)  # beyond what is loaded
    assert page.focus.text == "Question 30 of 125"


def test_long_traces_are_shown_on_a_click(page, tmp_path, monkeypatch):
    """Their blocks come after the script, which reads them when they are there."""
    monkeypatch.setattr(inspection_page, "FIRST_BYTES", 1)
    tokens = [f" w{i}" + ("\n" if i % 50 == 49 else "") for i in range(1500)]
    rows = [row_of(tokens, [n + i / 10000 for i in range(1500)], prompt=f"Question {n}") for n in range(3)]
    rows[2]["suspected_error"] = 7
    write_inspection(path := tmp_path / "long.html", [row_of(["short"], [0.5]), *rows], "Long")
    page.open(path)
    page.wait(lambda: len(page.all(".t")) == 1)  # the short one
    Select(page.one("#order")).select_by_value("highest")
    button = page.one(".open")
    assert button.text == "Show 30 steps, 1,500 tokens"
    assert "suspected first error: step 8" in page.one(".heat").text
    button.send_keys(Keys.ENTER)
    page.wait(lambda: len(page.all(".t")) == 1501)
    assert page.readout == "w0: +2.0000", "the focus moves to the first token"
    page.press(Keys.END)
    assert page.readout == "w1499: +2.1499"
    assert page.one("tr.error th").text == "8"
    assert len(page.all(".open")) == 2
