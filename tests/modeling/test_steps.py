"""Rules that cut traces into steps: by hand for each rule, and properties of any text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.byte_tokenizers import BYTES
from tracereward.errors import InputError
from tracereward.modeling.alignment import step_ends, token_offsets
from tracereward.modeling.steps import NAMED, StepRule

RULES = [StepRule(), StepRule(". "), *(StepRule(steps=name) for name in NAMED), StepRule(steps=r"\n+(?=So|\d)|; ")]
BLOCKS = (
    "```python\na = 1\n\n1. b = 2. So\n```",
    "~~~~\nx\n~~~\n\n1. y\n~~~~",
    "\\[\nx = 1\n\n1. \\\\[2pt] y. So\n\\]",
    "$$\nx\n\n1. y. So\n$$",
    "\\begin{align}\nx\n\n\\begin{align}\n1. y\n\\end{align}\n1. So. So\n\\end{align}",
)
JOINTS = (("line", "\n|"), ("blank", "\n\n|"), ("sentence", "\n|"), ("numbered", "\n|1. X\n"))


@pytest.mark.parametrize(
    ("steps", "marked"),
    [
        ("line", "a\n\n| b\n|c\n"),
        ("blank", "a\nb\n \n\n|c\n\n|d"),
        ("blank", "a\r\nb\r\n\r\n|c"),
        ("numbered", "Let x be it.\n\n|1. We have\n   x = 5.\n   1. nested\n\n|2) So\n|(3) **Done**\n12.5 is no label"),
        (
            "numbered",
            "To do:\n|**Step 1.** Count.\n1. apples\n|### Step 2: Add\nStep 3 apples are left.\n|Step 4 - end",
        ),
        ("numbered", "no label\nat all"),
        ("sentence", "By Dr. Lee, e.g. Eq. 3, x is 2.5.| So y!| (It is.)| Then?| 2. no small letter"),
        ("sentence", "1. First.| Next\n|2. Second.| 3. Third"),
        ("sentence", "It costs $5.| Then $3.| So `a. B` and $a. B$."),
        ("sentence", "\u56e0\u6b64\u662f\u3002|\u6240\u4ee5\u5bf9"),
        (r"\n(?=So)", "a\nb\n|So c\n|So d"),
        (r";\s", "a;| b;|  c"),
        *((steps, f"a{joint}{block}{joint}c") for block in BLOCKS for steps, joint in JOINTS),
        ("line", "a \\\\[2pt]\n|b \\$\\$\n|use ```x``` here\n|c"),  # neither opens a block
        ("line", "a\n|$$ x\ny"),  # a block without an end
    ],
)
def test_cuts_by_hand(steps, marked):
    pieces = marked.split("|")
    expected = list(itertools.accumulate(map(len, pieces[:-1])))
    assert StepRule(steps=steps).cuts("".join(pieces)) == expected


PARTS = ["a", "So", " ", "\n", "\n\n", ". ", "; ", "1. ", "Step 2:", "$$", "```", "\\[", "\\]", "日", "😀"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@given(rule=st.sampled_from(RULES), text=TEXTS)
def test_steps_partition_the_text_and_token_ends_agree(rule, text):
    """The token that ends a step holds the character before the cut, also if it spans the cut (".\\n\\n" of a BPE)."""
    cuts = rule.cuts(text)
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    assert "".join(pieces) == text
    assert not cuts or all(map(str.strip, pieces))
    spans = [text[start:end] for start, end in rule.spans(text)]
    assert all(span == span.strip() != "" for span in spans)
    assert not rule.steps or spans == [piece.strip() for piece in pieces if piece.strip()]

    text, offsets = token_offsets(BYTES, BYTES(text)["input_ids"])
    holders = {next(i for i, (start, end) in enumerate(offsets) if start < cut <= end) for cut in rule.cuts(text)}
    ends = {i for i, end in enumerate(step_ends(text, offsets, rule)) if end}
    assert ends == holders | ({len(offsets) - 1} if offsets else set())


@given(rule=st.sampled_from(RULES[2:]), text=TEXTS, more=TEXTS)
def test_more_text_moves_no_earlier_cut(rule, text, more):
    """Guided decoding cuts a trace that is still written; only the last cut may need more text."""
    settled = rule.cuts(text)[:-1]
    assert rule.cuts(text + more)[: len(settled)] == settled


def test_long_texts_take_linear_time():
    for rule in RULES:
        assert len(rule.cuts("a. B\n\n1. c $x$ `y` \n" * 2000)) >= (1999 if rule.steps else 1)
        rule.cuts("$$ \\[ ``` \\begin{a}" * 2000)
        rule.cuts("$x `y \n \t" * 2000)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("numbred", "did you mean 'numbered'"),
        ("(", r"steps '\(' is none of line, blank, numbered, sentence, and no regular expression"),
        (r"\n*", "can match nothing"),
        (r"(?=Step)", "can match nothing"),
        (r"\n.*\n", "matches overlapping texts"),
        (r"\n##", "matches in none of the 2 demonstrations"),
        ("blank", "cuts none of the 2 demonstrations"),
        ("numbered", None),
        (r"\n+", None),
    ],
)
def test_rules_that_say_too_much_or_nothing(steps, message):
    texts = ["Step 1: a\nb\nStep 2\nc\n", "one"]
    if message is None:
        StepRule(steps=steps).check(texts)
        return
    with pytest.raises(InputError, match=message):
        StepRule(steps=steps).check(texts)


@pytest.mark.parametrize("steps", NAMED)
def test_given_steps_are_joined_as_the_rule_cuts(steps):
    rule, given_steps = StepRule(steps=steps), ["1. A b.", "2. C d.", "3. E"]
    text, spans = rule.join(given_steps)
    assert [text[start:end] for start, end in spans] == given_steps
    assert rule.spans(text) == spans
