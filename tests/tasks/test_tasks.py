"""Tasks, and extraction and equality of answers. Expected texts are written by hand; rates come from real datasets."""

import gzip
import json
import logging
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from helpers.paths import SHARED
from tracereward.errors import InputError
from tracereward.tasks import answers
from tracereward.tasks.recipes import TASKS, get_task

DATA = SHARED


def real_rows(name: str) -> list[dict]:
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"real data is not here: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---------- extraction ----------


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
        ("the box is 5", None),
    ],
)
def test_extract_boxed(text, answer):
    assert answers.extract_boxed(text) == answer


nested = st.recursive(
    st.text(alphabet="abc123+-^_ ", min_size=1, max_size=5),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: "".join(f"{{{part}}}" for part in parts)),
    max_leaves=8,
)


@given(before=st.text(alphabet="xyz {}", max_size=10), content=nested, after=st.text(alphabet="xyz {}.", max_size=10))
def test_extract_boxed_finds_any_balanced_content(before, content, after):
    found = answers.extract_boxed(f"{before}\\boxed{{{content}}}{after}")
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
    ],
)
def test_extract_hashes(text, answer):
    assert answers.extract_hashes(text) == answer


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
    ],
)
def test_extract_letter(text, answer):
    assert answers.extract_letter(text) == answer


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
    ],
)
def test_extract_yes_no(text, answer):
    assert answers.extract_yes_no(text) == answer


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
    ],
)
def test_extract_any_priority(text, answer):
    assert answers.extract_any(text) == answer


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
    assert answers.extract_span(text) == answer


def test_own_form_has_priority():
    both = r"#### 5 but \boxed{6}"
    # The rest of the line; the comparison decides.
    assert answers.extract_number(both) == "5 but \\boxed{6}"
    assert answers.extract_number("\\boxed{6}\n#### 5") == "5"
    assert answers.extract_math("\\boxed{6}\n#### 5") == "6"


# ---------- equality ----------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("0.5", "1/2"),
        ("0.5", "50%"),
        ("0.5", r"\frac{1}{2}"),
        ("50%", r"\dfrac12"),
        ("50%", "50"),
        ("1,234", "1234"),
        ("$18", "18"),
        ("18.00", "18"),
        (r"\$18.", "18"),
        ("\u22123", "-3"),
        (r"-\frac{1}{2}", "-.5"),
        (r"3\frac{1}{2}", "3.5"),
        ("1 1/2", "1.5"),
        ("-1 1/2", "-1.5"),
        ("1.5e3", "1500"),
        (r"10{,}000", "10000"),
        ("0.1", "0.10"),
        (r"\text{Monday}", "monday"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("(1,2)", "(1, 2)"),
        ("1, 2, 3", "3, 2, 1"),
        (r"5\text{ cm}", "5"),
        ("12_8", "12_{8}"),
    ],
)
def test_equal_math(a, b):
    assert answers.equal_math(a, b)
    assert answers.equal_math(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("0.333", "1/3"),
        ("0.1", "0.2"),
        ("-2", "2"),
        ("18", "1.8"),
        (r"3\frac{1}{2}", "31/2"),
        (r"\frac{1}{2}3", "1/23"),
        ("1 1/2", "1"),
        ("0.1000000000000000000000000001", "0.1"),  # exact, though equal as floats
        ("may", "yam"),  # equal as products of letters
        ("12_8", "12_7"),
        ("[1,2]", "(1,2)"),
        ("(1,2)", "(2,1)"),
        ("18 million", "18"),
        ("Step 4: Final answer", "4"),
        ("1/0", "2/0"),
        ("x", ""),
    ],
)
def test_not_equal_math(a, b):
    assert not answers.equal_math(a, b)
    assert not answers.equal_math(b, a)


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(1, 1000))
def test_number_is_exact(a, b, k):
    value, percent = answers.number(f"{a * k}/{b * k}")  # type: ignore[misc]
    assert (value.numerator * b, percent) == (value.denominator * a, False)
    assert answers.number(f"{a:,}") == answers.number(str(a)) == (a, False)
    assert answers.number(rf"\frac{{{a}}}{{{b}}}") == (value, False)


@settings(max_examples=300)
@given(st.text(alphabet=r"0123456789.,/%$\{}frac eE+-_^ab", max_size=20))
def test_number_never_raises(text):
    found = answers.number(text)
    assert found is None or found[0] == found[0]


def test_equal_yes_no():
    assert answers.equal_yes_no("True", "yes")
    assert answers.equal_yes_no("no.", "false")
    assert not answers.equal_yes_no("yes", "no")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("The Lind", "lind.", True),
        ("Ann B Lee Jr", "Ann B. Lee, Jr.", True),
        ("U.S.", "US", True),
        ("6,960", "6960", True),
        ("a  cat and the dog", "Cat and dog", True),
        ("theatre", "atre", False),  # articles are full words only
        ("Lind river", "Lind", False),
        ("yes", "no", False),
        ("The", "the.", True),  # both normalise to nothing
        ("The", "A", False),
        ("the", "Lind", False),
    ],
)
def test_equal_span(a, b, equal):
    assert answers.equal_span(a, b) is answers.equal_span(b, a) is equal


def test_extraction_is_linear_in_white_space():
    gap = " " * 20_000
    start = time.monotonic()
    assert answers.extract_any(f"The answer is x{gap}x.") == f"x{gap}x"
    assert answers.extract_any(f"The answer is 5 \t\n . {gap}x") == "5"
    assert time.monotonic() - start < 0.5  # quadratic time would take minutes


def test_long_answers_are_compared_as_text_without_math_verify():
    long = "+".join(["x"] * 400)
    start = time.monotonic()
    assert not answers.equal_math(long, "400x")
    assert answers.equal_math(long, long + ".")
    assert time.monotonic() - start < 0.5


def test_timeout_stops_hanging_comparison_and_restarts_worker(monkeypatch, caplog):
    assert answers.equal_math("y+1", "1+y")  # starts the process
    monkeypatch.setattr(answers, "TIME_LIMIT", 1.0)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert not answers.math_verify_equal("5^{5^{5^{5}}}", "7y")
    assert time.monotonic() - start < 3
    assert "stopped after 1 s" in caplog.text
    assert "5^" not in caplog.text  # user input must not be logged
    monkeypatch.undo()
    assert answers.math_verify_equal("y+2", "2+y")


def test_equal_math_is_thread_safe():
    results = {}

    def compare(i: int) -> None:
        results[i] = answers.equal_math(f"z+{i}", f"{i % 4}+z")

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i < 4 for i in range(8)}


def test_failed_worker_raises_instead_of_returning_false(monkeypatch, tmp_path):
    broken = tmp_path / "math_worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(answers, "_worker", None)
    monkeypatch.setattr(answers, "__file__", str(tmp_path / "answers.py"))
    with pytest.raises(RuntimeError, match="math-verify exited with code 3 at startup"):
        answers.math_verify_equal("q+1", "1+q")


# ---------- tasks ----------


def test_get_task_suggests_nearest_name():
    assert get_task("gsm8k") is TASKS["gsm8k"]
    with pytest.raises(InputError, match=r"unknown task 'gsm8': did you mean 'gsm8k'\?"):
        get_task("gsm8")


def test_task_names_match_their_keys():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}


def test_gsm8k_row():
    raw = {"question": " Two bags of 600 nuts? ", "answer": "2*600 = <<2*600=1200>>1200 nuts \n#### 1,200"}
    copy = dict(raw)
    row = TASKS["gsm8k"].example(raw)
    assert row == {
        "prompt": "Question: Two bags of 600 nuts?\nEnd with #### and the number.\nAnswer:\n",
        "completion": "2*600 = 1200 nuts\n#### 1,200",
        "answer": "1200",
    }
    assert raw == copy
    assert TASKS["gsm8k"].verify("... \n#### 1200.0", row["answer"])
    assert not TASKS["gsm8k"].verify("so 1200", row["answer"])  # right, but not stated


def test_math_row():
    row = TASKS["math"].example({"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": 1})
    assert row == {
        "prompt": "Problem: Half of one?\nPut the final answer in \\boxed{}.\nSolution:\n",
        "completion": r"It is $\boxed{\frac{1}{2}}$.",
        "answer": r"\frac{1}{2}",
    }
    assert TASKS["math"].verify(r"\boxed{0.5}", row["answer"])


CHOICE = "Question: Which is red?\nOptions:\nA. sky\nB. blood\nEnd with: The answer is (letter).\nAnswer:\n"


def test_mmlu_pro_row():
    raw = {"question": "Which is red?", "options": ["sky", "blood"], "answer": "B", "category": "other"}
    task = TASKS["mmlu_pro"]
    assert task.example(raw) == {"prompt": CHOICE, "completion": None, "answer": "B"}
    stated = task.example({**raw, "trace": "Blood is. The answer is (B)."})
    assert stated["completion"] == "Blood is. The answer is (B)."
    hub = task.example({**raw, "cot_content": "A: Blood is. The answer is (B)."})
    assert hub["completion"] == "Blood is. The answer is (B)."
    cut_off = task.example({**raw, "trace": "Blood is red because its cells"})
    assert cut_off["completion"] == "Blood is red because its cells\nThe answer is (B)."
    with pytest.raises(ValueError, match="field 'answer' is 'C', not a letter from A to B"):
        task.example({**raw, "answer": "C"})


@pytest.mark.parametrize("options", [["sky", "blood"], "Answer Choices:\nA. sky\nB. blood", "(A) sky\n(B) blood\n"])
@pytest.mark.parametrize("answer", ["B", "(B)", "B. blood", "blood", "Blood.", "Blood. Explanation: cells are red."])
def test_medreason_row(options, answer):
    raw = {"question": "Which is red?", "options": options, "answer": answer, "reasoning": "Think.\nBlood is."}
    assert TASKS["medreason"].example(raw) == {
        "prompt": CHOICE,
        "completion": "Think.\nBlood is.\nThe answer is (B).",
        "answer": "B",
    }


def test_medreason_matches_longest_option_and_rejects_unknown_answers():
    raw = {"question": "q", "options": ["Type I", "Type II", "Type I and II"], "reasoning": "r"}
    for answer, letter in (("type ii", "B"), ("Type I", "A"), ("Type I and II.", "C")):
        assert TASKS["medreason"].example({**raw, "answer": answer})["answer"] == letter
    with pytest.raises(ValueError, match="matches none of the options"):
        TASKS["medreason"].example({**raw, "answer": "A patient of type III"})
    with pytest.raises(ValueError, match="letters that do not run A, B, C"):
        TASKS["medreason"].example({**raw, "answer": "A", "options": "A. x\nC. y"})


def test_strategyqa_row():
    raw = {"question": "Is ice cold?", "answer": True, "facts": ["Ice is  frozen.", " Frozen is cold. "]}
    task = TASKS["strategyqa"]
    assert task.example(raw) == {
        "prompt": "Question: Is ice cold?\nEnd with: The answer is yes. (or no.)\nAnswer:\n",
        "completion": "Ice is frozen.\nFrozen is cold.\nThe answer is yes.",
        "answer": "yes",
    }
    assert task.example({**raw, "facts": "Ice is frozen.", "answer": False})["completion"].endswith("The answer is no.")
    with pytest.raises(ValueError, match="field 'answer' is str, not true or false"):
        task.example({**raw, "answer": "yes"})


HOTPOT = {
    "question": "On which river is the town where Ada Holm was born?",
    "answer": "the Lind.",
    "context": [
        ["Ada Holm", ["Ada Holm was a  painter.", " She was born in Osby."]],
        ["Osby", ["Osby is a town on the Lind.", " It is old."]],
    ],
    "supporting_facts": [["Osby", 0], ["Ada Holm", 1]],
}


def hub_format(raw: dict) -> dict:
    """The same row in the Hub's column format."""
    context = dict(zip(("title", "sentences"), map(list, zip(*raw["context"]))))
    facts = dict(zip(("title", "sent_id"), map(list, zip(*raw["supporting_facts"]))))
    return {**raw, "context": context, "supporting_facts": facts}


@pytest.mark.parametrize("form", [dict, hub_format])
def test_hotpotqa_row(form):
    task, raw = TASKS["hotpotqa"], form(HOTPOT)
    assert task.example(raw) == {
        "prompt": "Context:\nAda Holm: Ada Holm was a painter. She was born in Osby.\n"
        "Osby: Osby is a town on the Lind. It is old.\n"
        "Question: On which river is the town where Ada Holm was born?\n"
        "End with: The answer is (a few words, yes or no).\nAnswer:\n",
        "completion": "Osby is a town on the Lind.\nShe was born in Osby.\nThe answer is the Lind.",
        "answer": "the Lind.",
    }
    assert task.verify("The answer is Lind", "the Lind.")
    assert not task.verify("It must be the Lind.", "the Lind.")
    for field in ("answer", "supporting_facts"):
        assert task.example({**raw, field: None})["completion"] is None
    assert task.example({**raw, "answer": None})["prompt"] == task.example(raw)["prompt"]


def test_hotpotqa_missing_facts():
    """A sentence index out of range is dropped (a few rows of the public dataset need it); an unknown title raises."""
    example = TASKS["hotpotqa"].example
    beyond = example({**HOTPOT, "supporting_facts": [["Osby", 2], ["Ada Holm", 1]]})
    assert beyond["completion"] == "She was born in Osby.\nThe answer is the Lind."
    assert example({**HOTPOT, "supporting_facts": [["Osby", 2]]})["completion"] is None
    with pytest.raises(ValueError, match="names 'Holm', which no paragraph of 'context' has"):
        example({**HOTPOT, "supporting_facts": [["Holm", 0]]})
    with pytest.raises(ValueError, match="has '0' instead of a sentence index"):
        example({**HOTPOT, "supporting_facts": [["Osby", "0"]]})
    with pytest.raises(ValueError, match=r"field 'context' is neither a list of pairs nor \{'title': \[\.\.\.\]"):
        example({**HOTPOT, "context": "Osby is a town."})
    with pytest.raises(ValueError, match="field 'context' is neither"):
        example({**HOTPOT, "context": {"title": ["Osby"], "sentences": []}})
    with pytest.raises(ValueError, match="field 'context' must hold a list of sentences for each title"):
        example({**HOTPOT, "context": [["Osby", "Osby is a town."]]})
    with pytest.raises(KeyError, match="context"):
        example({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    ("answer", "gold"), [("B", "false"), ("a", "true"), ("False", "false"), (True, "true"), ("true.", "true")]
)
def test_prontoqa_row(answer, gold):
    raw = {"context": "Gorps are  loud. Tim is a gorp.", "question": "True or false? Tim is not loud."}
    proof = {"explanation": ["Tim is a gorp.", "Gorps are loud. "], "options": ["A) True", "B) False"]}
    task = TASKS["prontoqa"]
    assert task.example({**raw, **proof, "answer": answer}) == {
        "prompt": "Context: Gorps are  loud. Tim is a gorp.\nQuestion: True or false? Tim is not loud.\n"
        "End with: The answer is true. (or false.)\nAnswer:\n",
        "completion": f"Tim is a gorp.\nGorps are loud.\nThe answer is {gold}.",
        "answer": gold,
    }
    assert task.verify("The answer is FALSE.", gold) == (gold == "false")
    assert task.example({**raw, "answer": answer, "options": proof["options"]})["completion"] is None
    assert task.example({**raw, **proof})["completion"] is None


@pytest.mark.parametrize("more", [{"answer": "C"}, {"answer": "maybe"}, {"answer": "A", "options": None}])
def test_prontoqa_rejects_unknown_answers(more):
    raw = {"context": "c", "question": "q", "options": ["A) True", "B) False", "C) Unknown"], "explanation": ["e"]}
    with pytest.raises(ValueError, match=f"field 'answer' is '{more['answer']}', not true, false or the letter"):
        TASKS["prontoqa"].example({**raw, **more})


def test_generic_row():
    messages = [{"role": "user", "content": "hi"}]
    reply = [{"role": "assistant", "content": "The answer is 2."}]
    example = TASKS["generic"].example
    assert example({"prompt": "hi", "completion": " there\n", "answer": 2, "more": 1}) == {
        "prompt": "hi",
        "completion": " there",
        "answer": "2",
    }
    row = {"prompt": messages, "completion": reply}
    assert example(row) == {**row, "answer": None}
    assert example({"prompt": "hi", "completion": "  "})["completion"] is None
    with pytest.raises(ValueError, match="field 'prompt' is int, neither text nor a list"):
        example({"prompt": 3})
    with pytest.raises(ValueError, match="field 'completion' is list, neither text nor a list of"):
        example({"prompt": "hi", "completion": [{"content": "x"}]})
    verify = TASKS["generic"].verify
    assert verify("The answer is 0.5.", "1/2")
    assert verify("The answer is True.", "yes")
    assert not verify("perhaps 0.5", "1/2")


# Pre-tokenization patterns of GPT-2, and of Llama 3 and Qwen.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3])
@pytest.mark.parametrize("trace", ["Ice. #### 3", "#### 3", "3", "- 3", "$3", "\n 3 ", "\\boxed{3}"])
def test_no_token_spans_prompt_and_completion(pattern, trace):
    raw = {
        "question": "q",
        "problem": "q",
        "options": ["a", "b"],
        "facts": [trace],
        "solution": trace,
        "reasoning": trace,
        "explanation": trace,
        "context": [["t", [trace]]],
        "supporting_facts": [["t", 0]],
    }
    given = {"gsm8k": trace, "math": "3", "mmlu_pro": "A", "medreason": "A", "strategyqa": True, "hotpotqa": "3"}
    for name, answer in given.items():
        row = TASKS[name].example({**raw, "trace": trace, "answer": answer})
        pieces = Split(Regex(pattern), "isolated").pre_tokenize_str(row["prompt"] + row["completion"])
        assert len(row["prompt"]) in {start for _, (start, _) in pieces}


# ---------- real datasets ----------


@pytest.mark.parametrize(
    ("task", "name", "rows"),
    [
        ("gsm8k", "gsm8k/train", 7473),
        ("math", "math/traces", 4044),
        ("mmlu_pro", "mmlu_pro/traces_train", 6358),
        ("strategyqa", "strategyqa/train", 2061),
        ("hotpotqa", "hotpotqa/train100", 100),
        ("prontoqa", "prontoqa/dev", 500),
    ],
)
def test_real_demonstrations_state_their_gold_answer(task, name, rows):
    examples = [TASKS[task].example(raw) for raw in real_rows(name)]
    assert len(examples) == rows
    wrong = [e["completion"][-80:] for e in examples if not TASKS[task].verify(e["completion"], e["answer"])]
    assert wrong == []
    for e in examples:
        assert "<<" not in e["completion"] or task != "gsm8k"
        assert e["completion"] == e["completion"].strip()
        assert e["prompt"].endswith(":\n")


def test_real_hotpotqa_steps_are_supporting_sentences():
    """One line per supporting fact, each contained in the prompt; the Hub format gives the same."""
    for raw in real_rows("hotpotqa/train100"):
        example = TASKS["hotpotqa"].example(raw)
        *hops, last = example["completion"].split("\n")
        assert len(hops) == len(raw["supporting_facts"]) >= 2
        assert all(hop in example["prompt"] for hop in hops)
        assert last.removeprefix("The answer is ").rstrip(".") == raw["answer"].rstrip(".")
        assert TASKS["hotpotqa"].example(hub_format(raw)) == example


def test_real_proofs_end_with_statement_or_negation():
    for raw in real_rows("prontoqa/dev"):
        example = TASKS["prontoqa"].example(raw)
        *steps, last = example["completion"].split("\n")
        assert steps == raw["explanation"]
        asked = raw["question"].removeprefix("Is the following statement true or false? ")
        assert last == f"The answer is {'true' if steps[-1] == asked else 'false'}."


def test_span_extraction_on_handwritten_traces():
    """Handwritten traces of four datasets end in "So the answer is: X."; all match their gold answers."""
    rows = real_rows("ircot_cot/annotated")
    assert all(TASKS["hotpotqa"].verify(row["cot"], row["answer"]) for row in rows)


def test_few_mmlu_pro_traces_lack_an_answer():
    raws = real_rows("mmlu_pro/traces_train")
    completed = sum(TASKS["mmlu_pro"].example(raw)["completion"] != raw["trace"].strip() for raw in raws)
    assert completed == sum(answers.extract_letter(raw["trace"]) is None for raw in raws)
    assert completed < 0.01 * len(raws)


def math_verify_accepts(step: int) -> float:
    """Share of every `step`-th gold answer that math-verify finds equal to itself."""
    golds = sorted({TASKS["math"].example(raw)["answer"] for raw in real_rows("math/traces")})[::step]
    return sum(answers.math_verify_equal(gold, gold) for gold in golds) / len(golds)


def test_math_verify_parses_real_answers():
    assert math_verify_accepts(step=20) >= 0.99


@pytest.mark.slow
def test_math_verify_parses_all_real_answers():
    assert math_verify_accepts(step=1) >= 0.99


def test_import_loads_no_heavy_packages():
    code = "import sys, tracereward.synthetic.arithmetic, tracereward.data.demonstrations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "sympy", "math_verify"} & set(done.stdout.split())
