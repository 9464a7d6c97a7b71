import errno
import math
import os
import re
from html.parser import HTMLParser

import jinja2
import pytest
from markupsafe import Markup

from tracereward.reports import plots
from tracereward.reports.report import Report, ScoredTrace, write_report
from tracereward.reports.tables import Table
from tracereward.rewards import heatmap
from tracereward.rewards.heatmap import heatmap_html, reward_colour
from tracereward.rewards.token_scores import TokenScores

HOSTILE = "<script>alert(1)</script> & \"x\" 'y'\n\n</div>&lt;"


def scores_of(tokens: list[str], rewards: list[float], step_ends: list[bool], eos: bool = False) -> TokenScores:
    offsets, end = [], 0
    for token in tokens:
        offsets.append((end, end + len(token)))
        end += len(token)
    if eos:
        offsets[-1] = (offsets[-1][0], offsets[-1][0])
    return TokenScores(tokens, offsets, rewards, step_ends, step_ends)


def arithmetic_trace() -> ScoredTrace:
    tokens = ["23", " -", " 7", " =", " 26", "\n", "#### ", "31", "</s>"]
    rewards = [-1.0, -1.0, -2.0, -2.0, -3.0, -3.0, 0.5, 0.5, 1.25]
    ends = [False] * 5 + [True, False, False, True]
    return ScoredTrace(
        "23 - 7 + 5 = ?\n", "23 - 7 = 26\n#### 31", scores_of(tokens, rewards, ends, eos=True), False, "31"
    )


class Page(HTMLParser):
    """The elements of a page: tags, attributes, and the text inside each `.heat` box."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.heats: list[str] = []
        self.token_attributes: list[dict[str, str | None]] = []
        self.text = ""
        self.depth = 0
        self.feed(str(html))  # not Markup: joining slices of Markup escapes text
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if self.depth or dict(attrs).get("class") == "heat":
            self.heats += [] if self.depth else [""]
            self.depth += 1
        if self.depth and tag == "span":
            self.token_attributes.append(dict(attrs))

    def handle_endtag(self, tag):
        self.depth = max(self.depth - 1, 0)

    def handle_data(self, data):
        self.text += data
        if self.depth:
            self.heats[-1] += data


def render(path, **changes) -> str:
    arguments = {
        "title": "Arithmetic",
        "summary": "A summary.",
        "tables": [],
        "metrics": [],
        "rewards_correct": [],
        "rewards_wrong": [],
        "traces": [],
        "command": "tracereward train",
    }
    write_report(path, Report(**{**arguments, **changes}))
    return path.read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


def test_colour_is_linear_between_neutral_and_ends():
    # light: neutral f6f6f4 (246, 246, 244), blue 6aaede (106, 174, 222), orange f29e4c (242, 158, 76)
    assert reward_colour(0.0, 4.0) == "#f6f6f4"
    assert reward_colour(4.0, 4.0) == "#6aaede"
    assert reward_colour(-4.0, 4.0) == "#f29e4c"
    assert reward_colour(2.0, 4.0) == "#b0d2e9"  # (246+106)/2 = 176, (246+174)/2 = 210, (244+222)/2 = 233
    assert reward_colour(-2.0, 4.0) == "#f4caa0"  # (246+242)/2 = 244, (246+158)/2 = 202, (244+76)/2 = 160
    # dark: neutral 26292e (38, 41, 46), blue 1b62a0 (27, 98, 160); 0.2 of the way: 35.8, 52.4, 68.8
    assert reward_colour(0.0, 4.0, dark=True) == "#26292e"
    assert reward_colour(0.8, 4.0, dark=True) == "#243445"


def test_colour_is_clipped_and_scales_with_the_limit():
    assert reward_colour(9.0, 4.0) == reward_colour(4.0, 4.0)
    assert reward_colour(-math.inf, 4.0) == reward_colour(-4.0, 4.0)
    assert reward_colour(0.5, 1.0) == reward_colour(5.0, 10.0)
    assert reward_colour(math.nan, 4.0) == reward_colour(3.0, 0.0) == reward_colour(0.0, 4.0)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("dark", "text"), [(False, "#1d2126"), (True, "#e9ebee")])
def test_text_is_readable_on_every_colour(dark, text):
    assert f"color: {text}" in heatmap.HEATMAP_CSS
    for reward in (-1.0, -0.5, 0.0, 0.5, 1.0):
        light, dim = sorted([luminance(text), luminance(reward_colour(reward, 1.0, dark))], reverse=True)
        assert (light + 0.05) / (dim + 0.05) >= 4.5  # WCAG 2 AA


def test_both_ends_have_similar_contrast():
    for dark in (False, True):
        zero, low, high = (luminance(reward_colour(reward, 1.0, dark)) for reward in (0.0, -1.0, 1.0))
        assert abs(low - high) < 0.25 * abs(zero - (low + high) / 2)


def test_heatmap_text_is_the_completion():
    tokens = ["<script>", "alert(1)", "</script>", " &", ' "x"', " 'y'", "\n", "\n", "</div>", "&lt;"]
    scores = scores_of(tokens, [0.1 * i for i in range(10)], [False] * 9 + [True])
    html = heatmap_html(scores, 1.0)
    page = Page(html)
    assert isinstance(html, Markup)
    assert page.heats == [HOSTILE]
    assert "script" not in page.tags
    assert [a["title"] for a in page.token_attributes[:2]] == ["+0.00", "+0.10"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in page.token_attributes)
    assert page.token_attributes[6]["aria-label"] == "line break: +0.60"
    assert [" s" in str(a["class"]) for a in page.token_attributes] == scores.supervised


def test_heatmap_keeps_text_when_tokens_share_or_skip_characters():
    # Byte tokens: both tokens of "é" and of "🙂" cover the character; the space at 2 has no token.
    scores = TokenScores(
        tokens=["aé", "é", "🙂", "🙂", "</s>"],
        offsets=[(0, 2), (1, 2), (3, 4), (3, 4), (4, 4)],
        rewards=[1.0, 1.0, -1.0, -1.0, 0.0],
        supervised=[True] * 5,
        step_ends=[False] * 4 + [True],
    )
    page = Page(heatmap_html(scores, 1.0))
    assert page.heats == ["aé 🙂"]
    assert [str(a["class"]).split()[1] for a in page.token_attributes] == ["s", "z", "s", "z", "e"]
    assert page.token_attributes[-1]["aria-label"] == "end of sequence: +0.00, supervised"


def test_report_escapes_everything(path):
    trace = ScoredTrace(HOSTILE, HOSTILE, scores_of([HOSTILE], [1.0], [True]), True, HOSTILE, HOSTILE)
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)
    text = {"title": HOSTILE, "summary": HOSTILE, "command": HOSTILE, "config": {HOSTILE: HOSTILE}}
    html = render(path, tables=[table], traces=[trace], **text)
    page = Page(html)
    assert page.tags.count("script") == 1  # the page's own
    assert "<script>alert" not in html
    assert '<p class="summary">see <code>&lt;b&gt;</code></p>' in render(path, **{**text, "summary": "see `<b>`"})
    assert page.heats == [HOSTILE]
    # title, h1, summary, command, table title, column, cell, note, question, label, answer, step, heatmap
    assert page.text.count("alert(1)</script>") >= 13


def test_report_is_self_contained(path):
    html = render(
        path,
        metrics=[{"step": i, "reward": 0.1 * i} for i in range(3)],
        rewards_correct=[1.0, 2.0],
        rewards_wrong=[-1.0],
        traces=[arithmetic_trace()],
    )
    page = Page(html)
    links = {value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")}
    assert all(value and value.startswith("#") for value in links)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "link" not in page.tags
    assert page.tags.count("svg") == 2
    assert "#0a0b0" not in html  # every stand-in colour became a variable
    assert len(html) < 200_000


def test_step_table_has_step_means(path):
    html = render(path, traces=[arithmetic_trace()])
    rows = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', html)
    cells = [re.sub(r"<[^>]+>", "|", row).strip("|").split("|") for _, row in rows]
    # step 1: (-1 -1 -2 -2 -3 -3) / 6 = -2; step 2: (0.5 + 0.5 + 1.25) / 3 = 0.75
    assert [[cell for cell in row if cell] for row in cells] == [
        ["23 - 7 = 26", "−2.00", "lowest"],
        ["#### 31", "+0.75"],
    ]
    assert "mean reward −1.08" in html  # (-12 + 2.25) / 9 = -1.0833
    assert reward_colour(-2.0, 3.0) in html  # the largest |reward| of all traces sets the scale


def test_colour_scale_is_shared_by_all_traces(path):
    small = ScoredTrace("q", "a", scores_of(["a"], [1.0], [True]), None, None)
    large = ScoredTrace("q", "b", scores_of(["b"], [-4.0], [True]), None, None)
    page = Page(render(path, traces=[small, large]))
    styles = [a["style"] for a in page.token_attributes]
    # 1 of 4: 246 - 35 = 211, 246 - 18 = 228, 244 - 5.5 = 238.5 -> 238 (half to even)
    assert [str(style)[4:11] for style in styles] == ["#d3e4ee", "#f29e4c"]


def test_missing_values_leave_gaps(path):
    metrics = [
        {"phase": "warmup", "update": 1, "discriminator/loss": 0.69},
        {"phase": "warmup", "update": 2, "discriminator/loss": 0.5},
        {"step": 1, "reward": None, "kl": None, "entropy": math.nan, "learning_rate": 1e-4},
        {"step": 2, "reward": math.nan, "kl": None},
        {"step": 3, "reward": 0.25, "kl": None},
        {"step": 4, "reward": None, "kl": math.inf},
        {"reward": 7.0},
    ]
    html = render(path, metrics=metrics, rewards_correct=[math.nan], rewards_wrong=[])
    titles = re.findall(r"<figcaption><strong>([^<]+)</strong>", html)
    assert titles == ["Reward of the policy’s traces", "Discriminator loss"]
    assert "last 0.25" in html
    assert "last 0.5" in html
    assert "<h2>Warm-up of the discriminator</h2>" in html
    assert "Rewards of correct and wrong traces" not in html


def test_one_step_is_no_curve(path):
    rows = [{"step": 3, "kl": 0.5, "entropy": 1.0}, {"step": 3, "kl": 0.25}]
    assert plots.curves(rows, "step") == []
    titles = [figure["title"] for figure in plots.curves([*rows, {"step": 4}], "step")]
    assert titles == ["KL to the reference policy", "Entropy of the policy"]


def test_figure_of_a_table_has_its_numbered_rows_and_the_others():
    table = Table("Tried", ["layers", "penalty 1"], [[4, 0.5], [8, 0.75], ["4, 8", 0.625]])
    svg = plots.table_figure(table)["svg"]
    # Values 0.5 : 0.625 : 0.75 are equally far apart, upwards; y in SVG is downwards.
    heights = re.findall(r'<use [^>]*y="([\d.]+)" style="fill: var\(--positive\)', svg)
    first, second, mean = map(float, heights[:3])  # the fourth is in the legend
    assert first - mean == pytest.approx(mean - second)
    assert first > second
    assert ">mean<" in svg


def test_points_are_ordered_and_later_rows_replace_earlier_ones():
    rows = [{"step": 2, "kl": 5.0}, {"step": 1, "kl": 1.0}, {"step": 2, "kl": 2.0}, {"step": 2}, {"step": 3, "kl": "x"}]
    x, y = plots._points(rows, "step", "kl")
    assert x == [1.0, 2.0, 3.0]
    assert y[:2] == [1.0, 2.0]
    assert math.isnan(y[2])


def test_long_runs_are_plotted_as_block_means(path):
    assert plots._block_means([1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 2.0], 2)[:2] == [2.0, 5.0]
    assert math.isnan(plots._block_means([1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 2.0], 2)[2])
    html = render(path, metrics=[{"step": i, "kl": math.sin(i)} for i in range(2000)])
    assert "means of 5 rows" in html
    assert f"last {math.sin(1999):.3f}" in html  # not a mean
    assert len(html) < 60_000


def test_empty_report(path):
    empty = ScoredTrace("q", "", TokenScores([], [], [], [], []), None, None)
    for traces in ([], [empty]):
        page = Page(render(path, traces=traces, command=""))
        assert "svg" not in page.tags
        assert "Arithmetic" in page.text


def test_histogram_marks_both_medians(path):
    html = render(path, rewards_correct=[1.0, 2.0, 9.0], rewards_wrong=[-1.0, -2.0])
    assert "correct, median +2.00" in html
    assert "wrong, median −1.50" in html
    assert "Above the line 3 correct traces, below it 2 wrong ones" in html
    assert "<svg" in render(path, rewards_correct=[], rewards_wrong=[0.5, 0.5])


def test_table_aligns_numbers_and_emphasises_on_request_only(path):
    rows = [["first", 0.5, 1319, "71.3 ± 0.4", None], ["mean", -0.25, 7, "[0.6, 0.7]", math.nan]]
    columns = ["pick", "correct", "n", "with interval", "missing"]
    html = render(path, tables=[Table("Reranking", columns, rows, "A note.")])
    assert re.findall(r'<th scope="col"( class="number")?>', html) == ["", *[' class="number"'] * 4]
    assert re.findall(r'<td(?: class="number")?>([^<]*)</td>', html) == [
        *["0.500", "1,319", "71.3 ± 0.4", "–"],
        *["−0.250", "7", "[0.6, 0.7]", "–"],
    ]
    assert 'class="best"' not in html
    html = render(path, tables=[Table("Reranking", columns, rows, best=1)])
    assert re.findall(r'<tr class="best">\s*<th[^>]*>(\w+)', html) == ["mean"]


def test_table_with_a_short_row_is_rejected():
    with pytest.raises(ValueError, match=r"table 'T': row 1 has 1 cells for 2 columns"):
        Table("T", ["a", "b"], [[1, 2], [3]])


def test_lone_surrogate_becomes_a_question_mark(path):
    html = render(path, traces=[ScoredTrace("q", "a\ud800", scores_of(["a\ud800"], [1.0], [True]), None, None)])
    assert Page(html).heats == ["a?"]


def test_old_report_is_kept_if_rendering_fails(path, monkeypatch):
    old = render(path)

    def fail(error: Exception):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(jinja2.Template, "render", lambda *_, **__: fail(RuntimeError("cut short")))
        with pytest.raises(RuntimeError, match="cut short"):
            render(path, title="New")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: fail(OSError(errno.ENOSPC, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            render(path, title="New")
    assert path.read_text(encoding="utf-8") == old
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
