"""The server's page in a real browser; skipped if Chromium, its driver or selenium is missing."""

import threading

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
import uvicorn

from helpers.browser import Page, driver, pytestmark  # noqa: F401
from helpers.served import save_reward_model, traces, wait_for
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.first_error_rules import FirstErrorRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.serving.app import create_app
from tracereward.serving.service import Settings

PROMPT, RIGHT = traces(1)[0]
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    calibration = Calibration("platt", slope=0.5, traces=20)
    fitted = {"calibration": calibration, "first_error": FirstErrorRule(threshold=0.0)}
    folder = save_reward_model(tmp_path_factory.mktemp("browser") / "rm", tokenizer, **fitted)
    model = TokenRewardModel.from_pretrained(str(folder))
    keep = model.to_scores
    # The arithmetic tokenizer has no letters: replace the last token's text by an attack.
    model.to_scores = lambda ids, rewards: with_last(keep(ids, rewards), HOSTILE)
    return model


def with_last(scores, text):
    scores.tokens[-1] = text
    return scores


@pytest.fixture(scope="module")
def url(model):
    """The URL of a server in a thread."""
    config = uvicorn.Config(create_app(model, Settings("rm", api_key="sesame")), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, "the server's start")
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(60)


@pytest.fixture
def page(driver, url):
    page = Page(driver)
    page.media()
    page.size(1000, 900)
    driver.get_log("browser")
    driver.get(url)
    return page


def fill(page, **fields):
    for name, text in fields.items():
        field = page.one(f"#{name}")
        field.clear()
        field.send_keys(text)
    page.one("button").click()


def test_question_is_scored_as_entered(page, model):
    """With one line break at its end, typed or not; without one if the box is cleared."""
    for prompt, ends, scored in (("1 + 1 = ?", True, "1 + 1 = ?\n"), ("1 + 1 = ?\n", True, "1 + 1 = ?\n"),
                                 ("1 + 1 = ?", False, "1 + 1 = ?")):  # fmt: skip
        if page.one("#newline").is_selected() != ends:
            page.one("#newline").click()
        page.driver.execute_script("document.getElementById('ranking').replaceChildren()")
        fill(page, prompt=prompt, candidates=RIGHT, key="sesame")
        page.wait(lambda: len(page.all("#ranking li")) == 1)
        [scores] = model.score([scored], [RIGHT])
        assert f"{abs(scores.aggregate()):.3f}" in page.one("#ranking li").text


def test_candidates_are_ranked_with_coloured_tokens(page, model):
    prompt = PROMPT.removesuffix("\n")
    candidates = ["2 + 2 = 9", RIGHT]
    fill(page, prompt=prompt, candidates="\n---\n".join(candidates), key="sesame")
    page.wait(lambda: "2 ranked" in page.one("#status").text)
    scores = model.score([PROMPT] * 2, candidates)
    order = sorted(range(2), key=lambda index: -scores[index].aggregate())
    items = page.all("#ranking li")
    for item, index in zip(items, order, strict=True):
        reward = scores[index].aggregate()
        shown = f"reward {'+' if reward > 0 else '−'}{abs(reward):.3f}"
        assert item.text.startswith(shown)
        assert f"(candidate {index + 1})" in item.text
        assert f"probability {1 / (1 + 2.718281828 ** (-0.5 * reward)):.2f}" in item.text
        tokens = item.find_elements("css selector", ".trace span")
        assert [token.get_property("textContent") for token in tokens] == scores[index].tokens
        assert [token.get_attribute("class") for token in tokens] == [
            "hi" if reward > 0 else "lo" for reward in scores[index].rewards
        ]
        assert HOSTILE in item.text  # as text
    assert page.driver.execute_script("return document.querySelectorAll('#ranking script').length") == 0
    strongest = max(range(len(scores[order[0]].rewards)), key=lambda i: abs(scores[order[0]].rewards[i]))
    token = items[0].find_elements("css selector", ".trace span")[strongest]
    assert token.value_of_css_property("background-color") != "rgba(0, 0, 0, 0)"
    assert page.driver.get_log("browser") == []  # no errors, and nothing blocked by the policy


def test_suspected_error_is_marked_as_in_inspect(page, model):
    """The tokens of the suspected step, and no others; a trace without one has no mark."""
    candidates = [RIGHT, "2 + 2 = 9\n9 - 1 = 8\n#### 8", "1", "5 - 1"]
    fill(page, prompt=PROMPT.removesuffix("\n"), candidates="\n---\n".join(candidates), key="sesame")
    page.wait(lambda: "4 ranked" in page.one("#status").text)
    scores = model.score([PROMPT] * 4, candidates)
    order = sorted(range(4), key=lambda index: -scores[index].aggregate())
    found = []
    for item, index in zip(page.all("#ranking li"), order, strict=True):
        steps, place = scores[index].by_step(), model.settings.first_error.mark(scores[index].by_step())
        marks = item.find_elements("css selector", "mark")
        found.append(place)
        assert len(marks) == (place is not None)
        if marks:
            assert marks[0].text.startswith("suspected first error")
            tokens = [token.get_property("textContent") for token in marks[0].find_elements("css selector", "span")]
            start = sum(map(len, steps[:place]))
            assert tokens == scores[index].tokens[start : start + len(steps[place])]
    assert len(set(found)) > 1


def test_content_security_policy_blocks_injected_scripts(page):
    """A script injected into the page does not run."""
    page.driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert page.driver.execute_script("return window.ran") is None
    assert "Content Security Policy" in page.driver.get_log("browser")[0]["message"]


def test_errors_are_shown(page):
    fill(page, prompt="1 + 1 = ?", candidates="2", key="wrong")
    page.wait(lambda: "key" in page.one("#status").text)
    fill(page, prompt="1 + 1 = ?", candidates=" + 1" * 100, key="sesame")
    page.wait(lambda: "reads 128" in page.one("#status").text)
    assert page.all("#ranking li") == []
    fill(page, prompt="1 + 1 = ?", candidates="---")
    page.wait(lambda: "at least one candidate" in page.one("#status").text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen_has_no_horizontal_scroll(page, scheme, tmp_path):
    page.media(scheme)
    page.size(360, 800, mobile=True)
    fill(page, prompt=PROMPT.strip(), candidates=f"{RIGHT}\n---\n{'1 + 1 = 2 ' * 6}", key="sesame")
    page.wait(lambda: "2 ranked" in page.one("#status").text)
    page.driver.save_screenshot(str(tmp_path / "page.png"))
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
