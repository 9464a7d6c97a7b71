"""Extraction of answers. Expected texts are written by hand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracereward.tasks import extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace is not a group
        (r"\boxed{\boxed{3}}", "3"),
        (r"first \boxed{1}, then cut off in \boxed{\frac{1}", None),
        (r"\boxed{}", None),
        (r"\boxed{7}, or not: \boxed{}", "7"),
        (r"\boxed 7 and \fbox{8}", "8"),
        ("the box is 5", None),
    ],
)
def test_extract_boxed(text, answer):
    assert extraction.extract_boxed(text) == answer


nested = st.recursive(
    st.text(alphabet="abc123+-^_ ", min_size=1, max_size=5),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: "".join(f"{{{part}}}" for part in parts)),
    max_leaves=8,
)


@given(before=st.text(alphabet="xyz {}", max_size=10), content=nested, after=st.text(alphabet="xyz {}.", max_size=10))
def test_extract_boxed_finds_any_balanced_content(before, content, after):
    found = extraction.extract_boxed(f"{before}\\boxed{{{content}}}{after}")
    assert found == (content.strip() or None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 18", "18"),
        ("#### 1\nno, again\n#### 2\n", "2"),
        ("#### 18.", "18"),
        ("#### $18", "18"),
        ("#### \\$18.50.", "18.50"),
        ("#### 1,234,567", "1234567"),
        ("#### 1,2", "1,2"),  # not thousands
        ("#### 18 apples", "18 apples"),
        ("####", None),
        ("####\n18", None),
        ("18", None),
        ("#### **18**", "18"),
        ("#### Answer: **18**", "18"),
        ("#### The answer is 18.", "18"),
        ("#### Total: 18", "18"),
        (r"#### \boxed{18}", "18"),
        (r"#### 10{,}000", "10000"),
        (r"#### 10\,000", "10000"),
        ("#### 18\n#### Step 2: check", "18"),
        ("#### 18\n#### 2. Check", "18"),
        ("#### 18\n#### Check:", "18"),
    ],
)
def test_extract_hashes(text, answer):
    assert extraction.extract_hashes(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Thus the answer is (C).", "C"),
        ("The answer is (c)", "C"),
        ("THE ANSWER IS C.", "C"),
        ("The answer is C", "C"),
        ("The answer is **C**.", "C"),
        ("The answer is **(C)**", "C"),
        ("Answer: D\n", "D"),
        ("The answer is (A). On reflection, the answer is (B).", "B"),
        (r"hence \boxed{\text{E}}", "E"),
        (r"hence \boxed{(E)}", "E"),
        ("#### F", "F"),
        (r"\boxed{7} so the answer is (B)", "B"),
        ("The answer is a matter of taste", None),
        ("The answer is A matter of taste", None),
        ("The answer is not listed, but is closest to (G).", None),
        ("The answer is (Insufficient information).", None),
        ("I would choose C.", None),
        (r"\boxed{7}", None),
        ("The answer is $B$.", "B"),
        ("The answer is B) Argon", "B"),
        ("The answer is B. Argon", "B"),
        ("The answer is B because argon is one.", "B"),
        ("The answer is (B) Argon, as in (A)", "B"),
        (r"So \boxed{B. Argon}", "B"),
        (r"So \boxed{\textbf{(B)}\ 5}", "B"),
        (r"So \boxed{\text{b}}", "B"),
        ("The correct option is **B**.", "B"),
        ("Answer: option B", "B"),
        (r"\boxed{\text{Option B}}", "B"),
        ('The answer is "B".', "B"),
        ("**Final Answer:**\n\n**B**", "B"),
        ("Noble gases do not react.\n**B**", "B"),
        ("#### B. Argon", "B"),
        ("#### A. Setup\nand so on", None),
        ("The answer is B, I think.", "B"),
        ("The answer is (A) and (C).", None),
        ("The answer is A, C", None),
        ("The answer is (A). No: the answer is (B) or (C).", None),
        (r"\boxed{A, C}", None),
    ],
)
def test_extract_letter(text, answer):
    assert extraction.extract_letter(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is yes.", "yes"),
        ("The answer is No", "no"),
        ("The answer is TRUE.", "yes"),
        ("The answer is: false, of course", "no"),
        (r"\boxed{\text{Yes}}", "yes"),
        ("#### no.", "no"),
        ("The answer is no longer known", None),
        ("yes", None),
        ("The answer is 5.", None),
        ("The answer is **Yes**, because it is.", "yes"),
        ("The answer is no because it is not.", "no"),
        (r"\boxed{\textbf{No.}}", "no"),
    ],
)
def test_extract_yes_no(text, answer):
    assert extraction.extract_yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"#### 5 and \boxed{6}, the answer is 7.", "6"),
        ("the answer is 7.\n#### 5", "5"),
        ("The answer is (B), I think", "B"),
        ("The answer is 3.5. Done.", "3.5"),
        ("Therefore, the final answer is: $x+1$.", "x+1"),
        ("The answer is Paris", "Paris"),
        ("Paris it is.", None),
        ("#### Conclusion\nThe answer is 18.", "18"),
        ("Paris is the capital.\n#### Paris", "Paris"),
        ("The answer is 18, since 9 + 9 = 18.", "18"),
        ("The answer is 18 (eighteen).", "18"),
        ("The answer is Paris, the capital of France.", "Paris"),
        ("The answer is Paris, which lies on the Seine", "Paris"),
        ("The answer is Springfield, Illinois.", "Springfield, Illinois"),
        ("The answer is 18. I checked that the answer is correct.", "18"),
        ("<answer>Paris</answer>", "Paris"),
    ],
)
def test_extract_any_priority(text, answer):
    assert extraction.extract_any(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is: Osby.", "Osby"),
        ("The answer is Ann B. Lee, Jr..\nGood.", "Ann B. Lee, Jr."),
        ("The answer is May 3, 1850.", "May 3, 1850"),
        ("The answer is **the Lind**.", "the Lind"),
        ("The answer is Osby. No, the answer is Holm", "Holm"),
        ("The answer is\nOsby", None),
        ("The answer is.", None),
        (r"It is \boxed{Osby}", "Osby"),
        ("#### Osby.", "Osby"),
        ("The answer isn't known", None),
        ("Osby", None),
    ],
)
def test_extract_span(text, answer):
    assert extraction.extract_span(text) == answer


# The answer of one trace as a number and as mathematics.
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### Step 1: add\n9 + 9 = 18\nSo it is \\boxed{18}", "18"),
        ("#### Adding both: 9 + 9 = 18\nThe answer is 20", "20"),
        ("#### 2. Add\n9 + 9 = 18\nThe answer is 18 pens", "18 pens"),
        ("#### 18, since 9 + 9 = 18", "18"),
        ("#### 9 + 9 = 18", "18"),
        ("#### 9 pens + 9 pens = 18 pens. He has 18 pens.", "18 pens"),
        ("The answer is **18**.", "18"),
        ("The answer is $18$ dollars.", "18 dollars"),
        ("So the answer is 1,200 apples, and 3 pears are left.", "1200 apples"),
        ("The answer is 3.5. Done.", "3.5"),
        ("The answer is 18 because 9 + 9 = 18.", "18"),
        ("The answer is 18; 9 + 9 is 18.", "18"),
        ("The answer is therefore about 3.14", "about 3.14"),
        ("Answer: 18", "18"),
        ("**Answer:**\n\n18", "18"),
        ("**Final answer**: 18", "18"),
        ("### Final Answer\n\n18", "18"),
        ("#### $2.5k", "$2.5k"),
        ("#### = 18", "18"),
        ("The answer is\n\\[ 18 \\]", "18"),
        ('The answer is "18".', "18"),
        ("<answer>18</answer>", "18"),
        ("That makes 18.\n**18**", "18"),
        ("That makes 18.\n$$18$$", "18"),
        ("The answer is 18. Let me check: the answer is correct.", "18"),
        ("#### Solution\n#### 18", "18"),
        ("The answer is (1, 2).", "(1, 2)"),
        ("The answer is x = 3, y = 4.", "x = 3, y = 4"),
        ("The answer is not 18.", None),
        ("The answer is a number", None),
        ("#### Conclusion", None),
        ("#### 3 apples and 2 pears", None),
        ("so it must be 18", None),
        ("18", None),
        ("**He has 18 pens**", None),
    ],
)
def test_extract_number_and_math(text, answer):
    assert extraction.extract_number(text) == answer
    assert extraction.extract_math(text) == answer


def test_own_form_has_priority():
    assert extraction.extract_number("\\boxed{6}\n#### 5") == "5"
    assert extraction.extract_math("\\boxed{6}\n#### 5") == "6"
    assert extraction.extract_number("#### 5 \\boxed{6}") == "6"  # a box within the line


EXTRACTORS = [
    extraction.extract_number,
    extraction.extract_math,
    extraction.extract_letter,
    extraction.extract_yes_no,
    extraction.extract_any,
    extraction.extract_span,
]


@pytest.mark.parametrize("extract", EXTRACTORS, ids=lambda extract: extract.__name__)
def test_extraction_is_linear(extract):
    start = time.monotonic()
    for piece in ("\\boxed{", "#### ", "the answer is ", "Answer: \n", " ", "*", "$", "1,", "=", "answer to x "):
        extract(piece * 5_000)
        extract("The answer is " + piece * 5_000)
    assert time.monotonic() - start < 3  # quadratic time would take minutes


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "#### ",
                "\\boxed{",
                "}",
                "The answer is ",
                "**",
                "$",
                "18",
                "B",
                "yes",
                ", ",
                ". ",
                "\n",
                " ",
                "(",
                ")",
                "since",
                "=",
                "\\text{",
                "|",
                "\\",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_extraction_never_raises_and_gives_text(text):
    for extract in EXTRACTORS:
        found = extract(text)
        assert found is None or found.strip()


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        (extraction.extract_letter, "Answer - B", "B"),
        (extraction.extract_letter, "Answer: \u201cB\u201d", "B"),
        (extraction.extract_letter, "Answer: \uff08\uff22\uff09", "B"),
        (extraction.extract_letter, "\u7b54\u6848\uff1aB", "B"),
        (extraction.extract_letter, "The answer is B<|im_end|>", "B"),
        (extraction.extract_letter, "The answer is (B)(C)", None),
        (extraction.extract_letter, "The answer - as I said - is long", None),
        (extraction.extract_number, "\u7b54\u6848\u662f 18", "18"),
        (extraction.extract_number, "#### 18<|eot_id|>", "18"),
        (extraction.extract_number, "#### 18 ####", "18"),
        (extraction.extract_number, "<think>The answer is 18</think>", "18"),
    ],
)
def test_other_spellings_of_a_statement(extract, text, answer):
    assert extract(text) == answer
