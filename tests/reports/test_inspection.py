import base64
import hashlib
import io
import json
import re
import weakref

import jinja2
import pytest

from helpers.inspection import row_of
from tracereward.errors import InputError
from tracereward.reports.inspection import (
    colour_limit,
    largest_drop,
    questions_of,
    visible,
)
from tracereward.reports.inspection_page import packed, write_inspection
from tracereward.reports.inspection_terminal import print_ansi

HOSTILE = "</script><script>alert(1)</script> & \"x\" 'y' <!-- \u2028 \x1b[31m\u202e\x9b \ud800 é🙂"
ESCAPED = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace("\x9b", r"\x9b")
ESCAPED = ESCAPED.replace("\ud800", r"\ud800")


def arithmetic_row(**fields) -> dict:
    tokens = ["23", " -", " 7", " =", " 26", "\n", "#### ", "31", "</s>"]
    rewards = [-1.0, -1.0, -2.0, -2.0, -3.0, -3.0, 0.5, 0.5, 1.25]
    return row_of(tokens, rewards, **{"suspected_error": 0, **fields})


def trace_of(row: dict) -> dict:
    [question] = questions_of([row], None)
    [trace] = question["traces"]
    return trace


def write(path, traces, **changes) -> str:
    write_inspection(path, traces, **{"title": "Traces", "command": "tracereward inspect", **changes})
    return path.read_text(encoding="utf-8")


def data_of(html: str) -> dict:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[0])


def blocks_of(html: str) -> dict[str, dict]:
    found = re.findall(r'<script type="application/json" id="(t\d+)">(.*?)</script>', html, re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def printed(traces, **options) -> str:
    file = io.StringIO()
    print_ansi(traces, file, **{"width": 60, "colour": "never", **options})
    return file.getvalue()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "inspection.html"


def test_largest_drop_is_between_neighbours():
    assert largest_drop([1.0, 3.0, 0.5, -1.0]) == 2.5
    assert largest_drop([1.0, 2.0, 4.0]) == -1.0
    assert largest_drop([1.0]) is None


def test_steps_tokens_and_fields():
    trace = trace_of(arithmetic_row(reward=-1.0833333, correct=False, extracted=31, logprob=float("nan")))
    steps = [[piece[0] for piece in step["tokens"]] for step in trace["steps"]]
    assert steps == [["23", " -", " 7", " =", " 26", ""], ["#### ", "31", ""]]
    assert [step["tokens"][-1] for step in trace["steps"]] == [["", -3.0, "m"], ["", 1.25, "e"]]
    assert [step["reward"] for step in trace["steps"]] == [-2.0, 0.75]  # -12 / 6 and 2.25 / 3
    assert trace["error"] == 0
    assert trace["drop"] == -2.75
    assert (trace["reward"], trace["correct"], trace["answer"], trace["logprob"]) == (-1.0833, False, "31", None)


def test_marks_are_those_of_the_rows_or_of_a_threshold(path):
    """Step rewards by hand: -2 and .75. The scores of a reward model without a rule have no field."""
    marked, clean, bare = arithmetic_row(), arithmetic_row(suspected_error=None), arithmetic_row()
    del bare["suspected_error"]
    for row, threshold, error, line in (
        (marked, None, 0, "at most 5 % of right traces get one"),
        (clean, None, None, "at most 5 % of right traces get one"),
        (bare, None, None, "No step is marked: the scores are of a reward model without a rule"),
        (bare, -1.9, 0, "first step whose reward is below -1.9"),
        (marked, -2.0, None, "first step whose reward is below -2"),
    ):
        html = write(path, [row], threshold=threshold)
        assert data_of(html)["questions"][0]["traces"][0]["error"] == error
        assert line in html
        text = printed([row], threshold=threshold, width=200)
        assert line in text
        assert ("!  1" in text or "! 1" in text) == (error == 0)
    # Of an earlier version, for one given step that holds a line break.
    row = arithmetic_row(step_rewards=[-1.0], suspected_error=0)
    assert trace_of(row)["error"] is None


def test_given_step_ends_and_step_rewards_override_the_newline_rule():
    ends = [False, False, True, False, False, False, False, False, False]  # the trace's last token ends a step anyway
    trace = trace_of(arithmetic_row(step_ends=ends, step_rewards=[1.0, -5.0]))
    assert [len(step["tokens"]) for step in trace["steps"]] == [3, 6]
    assert [step["reward"] for step in trace["steps"]] == [1.0, -5.0]
    trace = trace_of(arithmetic_row(step_ends=ends, step_rewards=[1.0]))  # wrong number of steps: means are used
    assert [step["reward"] for step in trace["steps"]] == [-1.3333, -0.9583]  # -4 / 3 and -5.75 / 6


def test_supervised_positions_are_marked_unless_all_are_supervised():
    some = [False] * 5 + [True, False, False, True]
    kinds = [piece[2] for step in trace_of(arithmetic_row(supervised=some))["steps"] for piece in step["tokens"]]
    assert kinds == ["", "", "", "", "", "sm", "", "", "se"]
    kinds = [piece[2] for step in trace_of(arithmetic_row(supervised=[True] * 9))["steps"] for piece in step["tokens"]]
    assert kinds == ["", "", "", "", "", "m", "", "", "e"]


def test_all_text_is_shown_when_tokens_share_or_skip_characters():
    # Both tokens of "é" cover it; the space at 2 and the full stop at 4 have no token.
    row = {
        **{"prompt": "q", "completion": "aé 🙂.", "tokens": ["aé", "é", "🙂", "</s>"]},
        **{"offsets": [[0, 2], [1, 2], [3, 4], [4, 4]], "token_rewards": [1.0, 1.0, -1.0, 0.0]},
    }
    [step] = trace_of(row)["steps"]
    assert step["tokens"] == [["aé", 1.0, ""], ["", 1.0, "z"], [" "], ["🙂", -1.0, ""], ["", 0.0, "e"], ["."]]


def test_tokens_replace_the_text_if_the_tokenizer_normalised_it():
    row = row_of(["caf\u00e9", " au"], [1.0, 2.0])
    row["completion"] = "cafe\u0301 au"  # decomposed: its offsets would be off by one
    assert [piece[0] for piece in trace_of(row)["steps"][0]["tokens"]] == ["caf\u00e9", " au"]


def test_rows_with_the_same_prompt_form_one_question_in_file_order():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [
        row_of(["a"], [1.0], prompt="first", answer="4"),
        row_of(["b"], [1.0], prompt=chat),
        row_of(["c"], [1.0], prompt="first"),
    ]
    questions = questions_of(rows, None)
    assert [question["prompt"] for question in questions] == ["first", "system: Be brief.\n\nuser: 2 + 2?"]
    assert [trace["number"] for trace in questions[0]["traces"]] == [1, 2]
    assert [question["answer"] for question in questions] == ["4", None]


def test_candidates_of_a_row_become_separate_traces():
    first, second = row_of(["a"], [1.0]), row_of(["b", "</s>"], [2.0, 4.0])
    names = ("tokens", "offsets", "token_rewards")
    scores = [{name: row[name] for name in names} for row in (first, second)]
    [question] = questions_of([{"prompt": "q", "candidates": ["a", "b"], "scores": scores, "answer": "b"}], None)
    assert [trace["reward"] for trace in question["traces"]] == [1.0, 3.0]  # the mean where there is no reward
    with pytest.raises(InputError, match="row 1: no tokens; `tracereward score` writes"):
        questions_of([{"prompt": "q", "candidates": ["a", "b"]}], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_rewards": None}, "row 2: no token_rewards; `tracereward score` writes"),
        ({"token_rewards": [1.0]}, "row 2: 9 tokens but 1 token_rewards"),
        ({"step_ends": [True]}, "row 2: 9 tokens but 1 step_ends"),
        ({"suspected_error": "1"}, "row 2: suspected_error must be the index of a step, from 0, or null"),
        ({"offsets": [[5, 99]] * 9}, "row 2: its offsets do not fit its completion of 19 characters"),
    ],
)
def test_invalid_rows_are_named(change, message, path):
    with pytest.raises(InputError, match=message):
        write_inspection(path, [arithmetic_row(), {**arithmetic_row(), **change}], "Traces")
    assert not path.exists()


def test_empty_trace_and_no_traces(path):
    assert trace_of(row_of([], []))["steps"] == []
    assert data_of(write(path, [])) == {"limit": 1.0, "questions": []}
    assert "Question" not in printed([])


def test_control_characters_are_escaped():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\r\x1b[0m\x7f\x9b\u202e\u2066") == r"\x00\x0d\x1b[0m\x7f\x9b\u202e\u2066"
    assert visible(HOSTILE) == ESCAPED


def test_page_embeds_hostile_text_as_data_only(path):
    row = row_of([HOSTILE], [1.0], prompt=HOSTILE, answer=HOSTILE, extracted=HOSTILE, model=HOSTILE)
    html = write(path, [row], title=HOSTILE, command=HOSTILE)
    json_script = 'script type="application/json" id='
    assert re.findall(r"<(script[^>]*)>", html) == [f'{json_script}"data"', f'{json_script}"t0"', "script"]
    assert html.count("</script>") == 3
    assert "alert(1)</script>" not in html
    assert "<!--" not in html
    [question] = data_of(html)["questions"]
    [trace] = question["traces"]
    assert question["prompt"] == question["answer"] == trace["answer"] == trace["model"] == ESCAPED
    assert blocks_of(html)["t0"]["text"] == [ESCAPED]
    assert "\u2028" not in html[html.index('id="data"') :]


def test_page_is_self_contained_with_hashes_in_its_policy(path):
    html = write(path, [arithmetic_row()])
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', html)[0]
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [source] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.search(r"https?://|@import|url\(| src=| href=| style=| on\w+=", html)
    assert "<noscript>" in html
    assert "innerHTML" not in html


def test_page_without_verified_answers_has_no_answer_filter(path):
    assert 'name="answers"' not in write(path, [arithmetic_row()])
    assert 'name="answers"' in write(path, [arithmetic_row(correct=True)])


def test_page_explains_underlines_only_if_present(path):
    some = [False] * 5 + [True, False, False, True]
    assert "underlined tokens" in write(path, [arithmetic_row(supervised=some)])
    assert "underlined tokens" not in write(path, [arithmetic_row(supervised=[True] * 9)])


def test_values_match_the_file_and_the_largest_sets_the_scale(path):
    html = write(path, [arithmetic_row(), row_of(["a"], [0.123456]), row_of(["b"], [float("nan")])])
    data = data_of(html)
    assert data["limit"] == 3.0
    assert "−3.00<b" in html
    blocks = blocks_of(html)
    assert blocks["t0"] == {
        "text": ["23", " -", " 7", " =", " 26", "", "#### ", "31", ""],
        "values": [-10000, -10000, -20000, -20000, -30000, -30000, 5000, 5000, 12500],
        "kinds": {"5": "m", "8": "e"},
        "steps": [[-2.0, 6], [0.75, 3]],
    }
    assert blocks["t1"] == {"text": ["a"], "values": [1235], "kinds": {}, "steps": [[0.1235, 1]]}
    assert blocks["t2"]["values"] == [None]
    assert [(trace["id"], trace["tokens"], trace["steps"]) for trace in data["questions"][0]["traces"]] == [
        (0, 9, 2),
        (1, 1, 1),
        (2, 1, 1),
    ]
    assert colour_limit([]) == 1.0
    assert packed([{"reward": None, "tokens": [["a", 1.0, "z"], [" "]]}]) == {
        "text": ["a", " "],
        "values": [10000, None],
        "kinds": {0: "z", 1: "-"},
        "steps": [[None, 2]],
    }


def test_a_page_is_written_without_keeping_its_traces(path, monkeypatch):
    """Each trace is dropped before the next but one is read; what is kept of it does not grow with its tokens."""
    monkeypatch.setattr("tracereward.reports.inspection_page.FIRST_BYTES", 3000)
    alive = weakref.WeakSet()

    class Row(dict):
        __hash__ = object.__hash__

    def read():
        for n in range(20):
            assert len(alive) <= 2
            row = Row(arithmetic_row(prompt=f"Question {n}"))
            alive.add(row)
            yield row

    html = write(path, read())
    assert list(blocks_of(html)) == [f"t{n}" for n in range(20)]
    before = html[: html.index("<script>")]
    assert 1 < before.count('id="t') < 20, "the others come after the script"
    assert len(data_of(html)["questions"]) == 20


def test_old_page_is_kept_if_rendering_fails(path, monkeypatch):
    old = write(path, [])

    def fail(*_, **__):
        raise RuntimeError("cut short")

    monkeypatch.setattr(jinja2.Template, "render", fail)
    with pytest.raises(RuntimeError, match="cut short"):
        write(path, [arithmetic_row()])
    assert path.read_text(encoding="utf-8") == old


def test_terminal_prints_a_line_per_step_and_marks_the_error():
    text = printed([arithmetic_row(correct=False, extracted="31", answer="21")])
    lines = [line.rstrip() for line in text.splitlines()]
    assert "Question 1 of 1" in lines
    assert "right answer 21" in lines
    assert "#1 of 1  ✗ wrong  answer 31  reward −1.08" in lines  # (-12 + 2.25) / 9
    [first] = [line for line in lines if "23 - 7 = 26" in line]
    [second] = [line for line in lines if "#### 31" in line]
    assert re.fullmatch(r"! 1 23 - 7 = 26↵ +−2\.00 !", first)
    assert re.fullmatch(r"  2 #### 31■ +\+0\.75", second)
    assert len(first) == 60
    assert "\x1b" not in text


def test_terminal_colours_match_the_palette():
    text = printed([row_of(["a", "b"], [4.0, -2.0])], colour="truecolor")
    # blue 6aaede at the limit; half-way to orange f29e4c from neutral f6f6f4: f4caa0, see test_report
    assert "48;2;106;174;222ma\x1b[0m" in text
    assert "48;2;244;202;160mb\x1b[0m" in text
    # rich caches the codes of a colour, so use other colours
    text = printed([row_of(["a", "b"], [3.9, -2.1])], colour="256")
    assert re.search(r"48;5;\d+mb\x1b\[0m", text)


@pytest.mark.parametrize("colour", ["never", "256", "truecolor"])
def test_trace_text_cannot_control_the_terminal(colour):
    row = row_of([HOSTILE], [1.0], prompt=HOSTILE, answer=HOSTILE, extracted=HOSTILE, model=HOSTILE)
    text = printed([row], colour=colour, width=400)
    assert text.count(r"\x1b[31m\u202e\x9b \ud800") == 5
    ours = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in ours
    assert "\x1b[31m" not in text
    assert not set("\x9b\u202e\ud800") & set(text)


def test_terminal_honours_no_color_unless_overridden(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    outputs = []
    for no_color, colour in (("", "auto"), ("1", "auto"), ("1", "256")):
        monkeypatch.setenv("NO_COLOR", no_color)
        file = Terminal()
        print_ansi([arithmetic_row()], file, width=60, colour=colour)
        outputs.append("48;5;" in file.getvalue())
    assert outputs == [True, False, True]
    assert "\x1b" not in printed([arithmetic_row()], colour="auto")  # not a terminal
    with pytest.raises(InputError, match="unknown colour 'alwys'"):
        printed([], colour="alwys")
