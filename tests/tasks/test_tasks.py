"""Tasks. Expected texts are written by hand; rates come from real datasets."""

import subprocess
import sys

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from helpers.paths import real_rows
from tracereward.errors import InputError
from tracereward.tasks import answers, extraction, symbolic
from tracereward.tasks.recipes import TASKS, get_task


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
    assert completed == sum(extraction.extract_letter(raw["trace"]) is None for raw in raws)
    assert completed < 0.01 * len(raws)


def unread_answers(step: int) -> list[str]:
    """Expressions in every `step`-th gold answer that math-verify cannot parse."""
    golds = sorted({TASKS["math"].example(raw)["answer"] for raw in real_rows("math/traces")})[::step]
    forms = [answers.read_form(gold) for gold in golds if len(gold) <= 300]
    return [form.text for form in forms if isinstance(form, answers.Expression) and not symbolic.fingerprint(form.text)]


def test_math_verify_parses_real_answers():
    assert unread_answers(step=20) == []


@pytest.mark.slow
def test_math_verify_parses_all_real_answers():
    assert unread_answers(step=1) == []


def test_real_answers_are_judged_as_labelled():
    """Short final answers of 16 models to GSM8K questions against the labels that came with them."""
    golds = [TASKS["gsm8k"].example(row)["answer"] for row in real_rows("gsm8k/test")]
    rows = real_rows("zeroeval_gsm8k/pool_even")
    judged = [TASKS["gsm8k"].equal(str(row["answer"]), golds[int(row["qid"])]) == row["correct"] for row in rows]
    assert sum(judged) >= 10_196


def test_import_loads_no_heavy_packages():
    code = "import sys, tracereward.synthetic.arithmetic, tracereward.data.demonstrations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "sympy", "math_verify"} & set(done.stdout.split())
