"""Synthetic worlds, checked with Python's own arithmetic, and their tokenizer and model."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tracereward.errors import InputError
from tracereward.synthetic import arithmetic, hops, word_problems
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate, splits
from tracereward.synthetic.chains import LARGEST
from tracereward.tasks.recipes import TASKS

WORLDS = ["misconception", "exposure", "style"]
ALL = [*WORLDS, "multi-skill", "hops", "terse"]


def value_of(prompt: str) -> int:
    """Left-to-right value of ``a + b - c = ?``, by evaluating one operation at a time."""
    words = prompt.removesuffix(" = ?\n").split(" ")
    value = words[0]
    for operator, operand in zip(words[1::2], words[2::2]):
        value = str(eval(f"{value} {operator} {operand}"))
    return int(value)


def parse_lines(completion: str) -> list[tuple[str, int, str, int, int]]:
    """``(left side, value, operator, operand, result)`` of every working line."""
    found = []
    for line in completion.split("\n")[:-1]:
        left, result = line.split(" = ")
        value, operator, operand = left.split(" ")
        found.append((left, int(value), operator, int(operand), int(result)))
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_expert_traces_are_correct(world):
    for row in generate(world, 500, seed=3):
        true = value_of(row["prompt"])
        assert row["answer"] == str(true)
        assert row["completion"].split("\n")[-1] == f"#### {true}"
        chain = row["prompt"].split(" ")[0]
        for left, value, _, _, result in parse_lines(row["completion"]):
            assert eval(left) == result
            assert str(value) == chain  # each line starts from the result before it
            chain = str(result)
        assert TASKS["arithmetic"].verify(row["completion"], row["answer"])


def test_terse_experts_write_the_answer_alone_and_the_corpus_mostly_the_working():
    for row in generate("terse", 300, seed=3):
        assert row["completion"] == f"#### {value_of(row['prompt'])}" == f"#### {row['answer']}"
    corpus = generate("terse", 2000, seed=3, mistake_rate=0.6, unique=False)
    worked = [row for row in corpus if "\n" in row["completion"]]
    assert abs(len(worked) / len(corpus) - 0.9) < 0.03
    right = [TASKS["arithmetic"].verify(row["completion"], row["answer"]) for row in worked]
    assert 0.65 < sum(right) / len(right) < 0.9  # most, not all


def test_exposure_chain_lengths():
    long = generate("exposure", 300, seed=1)
    assert {row["completion"].count("\n") for row in long} == {6, 7, 8}
    corpus = generate("exposure", 600, seed=1, mistake_rate=0.8, unique=False)
    assert {row["completion"].count("\n") for row in corpus} == set(range(2, 9))
    wrong = sum(not TASKS["arithmetic"].verify(row["completion"], row["answer"]) for row in corpus)
    assert 200 < wrong < 500


def test_multi_skill_strategies_are_correct():
    """Each line is true, the last one gives the answer, and every operand is used once."""
    kinds = {"lines": 0, "pairs": 0, "gather": 0}
    for row in generate("multi-skill", 900, seed=3):
        assert row["answer"] == str(value_of(row["prompt"]))
        *lines, last = row["completion"].split("\n")
        assert last == f"#### {row['answer']}"
        assert lines[-1].endswith(f" = {row['answer']}")
        for line in lines:
            left, result = line.split(" = ")
            assert value_of(f"{left} = ?\n") == int(result)
        operations = re.findall(r"[+-] \d+", row["prompt"])
        worked = re.findall(r"[+-] \d+", " ".join(line.split(" = ")[0] for line in lines))
        if worked == operations and any(line.count(" ") == 6 for line in lines):
            kinds["pairs"] += 1
        elif worked == operations:
            kinds["lines"] += 1
        else:
            kinds["gather"] += 1
    # Without two subtractions `gather` may look like `lines`; `pairs` always has a line of two operations.
    assert abs(kinds["pairs"] / 900 - 1 / 3) < 0.06
    assert kinds["lines"] > kinds["gather"] > 90


@pytest.mark.parametrize("sample", [word_problems.sample, word_problems.sample_unseen])
def test_word_problem_solutions_are_correct(sample):
    """Each line has one correct calculation on numbers of the question or earlier lines; the last is the answer."""
    rng = random.Random(5)
    for _ in range(2000):
        row = sample(rng)
        known = set(re.findall(r"\d+", row["prompt"]))
        *lines, last = row["completion"].split("\n")
        for line in lines:
            ((left, result),) = re.findall(r"(\d+ [*/+-] \d+) = (\d+)", line)
            assert eval(left) == int(result)
            assert {left.split(" ")[0], left.split(" ")[2]} <= known
            known.add(result)
        assert last == f"#### {result}"
        assert result == row["answer"]
        assert not re.search(r"[{}]", row["prompt"] + row["completion"])


def test_quarter_of_word_problem_test_split_uses_unseen_templates():
    parts = splits("word-problems", 3, 200, n_validation=50, n_test=60, n_unlabeled=100)
    stories = {name: {re.sub(r"[A-Z]\w+|\d+", "", row["prompt"]) for row in rows} for name, rows in parts.items()}
    unseen = {re.sub(r"[A-Z]\w+|\d+", "", row["prompt"]) for row in parts["test"] if row.get("unseen")}
    assert sum(bool(row.get("unseen")) for row in parts["test"]) == 15
    assert not any(row.get("unseen") for name in ("experts", "validation", "unlabeled") for row in parts[name])
    assert not unseen & (stories["experts"] | stories["validation"] | stories["unlabeled"])
    assert {row["prompt"] for row in parts["test"]}.isdisjoint(row["prompt"] for row in parts["experts"])
    for name in ("misconception", "style"):
        assert not any(
            row.get("unseen") for row in splits(name, 3, 5, n_validation=5, n_test=20, n_unlabeled=5)["test"]
        )


def test_text_form():
    assert re.fullmatch(r"\d+( [+-] \d){2,3} = \?\n", generate("misconception", 1, seed=0)[0]["prompt"])
    worked = next(row for row in generate("style", 50, seed=0) if "\n" in row["completion"])
    assert re.fullmatch(r"(\d+ [+*-] \d = \d+\n){2,4}#### \d+", worked["completion"])


def test_value_ranges():
    rows = generate("misconception", 2000, seed=1)
    starts = [int(row["prompt"].split(" ")[0]) for row in rows]
    operands = [int(k) for row in rows for k in row["prompt"].split(" ")[2:-2:2]]
    results = [line[4] for row in rows for line in parse_lines(row["completion"])]
    assert (min(starts), max(starts)) == (3, 29)
    assert (min(operands), max(operands)) == (1, 9)
    assert (min(results), max(results)) == (0, 30)
    style = [line for row in generate("style", 2000, seed=1) for line in parse_lines(row["completion"])]
    assert (min(line[4] for line in style), max(line[4] for line in style)) == (0, 20)
    assert {line[2] for line in style} == {"+", "-", "*"}


def test_style_skip_rate():
    rows = generate("style", 4000, seed=2)
    skipped = sum(row["completion"].count("\n") == 0 for row in rows) / len(rows)
    assert abs(skipped - 0.6) < 4 * (0.6 * 0.4 / len(rows)) ** 0.5


def test_misconception_mistakes_follow_rule_and_propagate():
    """By hand: 13 - 5 with the borrow dropped is 18; 18 - 4 crosses no ten."""
    rows = generate("misconception", 3000, seed=4, mistake_rate=1.0)
    lines = [line for row in rows for line in parse_lines(row["completion"])]
    by_left = {left: result for left, *_, result in lines}
    assert by_left["13 - 5"] == 18
    assert by_left["21 - 9"] == 22
    assert by_left["18 - 4"] == 14
    for left, value, operator, operand, result in lines:
        affected = operator == "-" and value % 10 < operand
        assert result == eval(left) + 10 * affected
        assert 0 <= result <= LARGEST


@pytest.mark.parametrize(("world", "share"), [("exposure", 0.3), ("checked", 0.5)])
def test_wrong_facts_are_consistent_and_marked(world, share):
    """With mistake rate 1 each fact has one result; a share of them is wrong, and only those have the marker."""
    lines = {}
    for row in generate(world, 3000, seed=3, mistake_rate=1.0, unique=False):
        written = row["completion"].split("\n")[:-1]
        for index, line in enumerate(written):
            left, result = line.rstrip("?").split(" = ")
            if " - " in left:
                marked = (written[index + 1] if world == "checked" else line).endswith("?")
                lines.setdefault(left, set()).add((int(result), marked))
            else:
                assert eval(left) == int(result)
    assert all(len(found) == 1 for found in lines.values())
    facts = [(eval(left), *found.pop()) for left, found in lines.items()]
    assert all((result != true) == marked for true, result, marked in facts)
    wrong = sum(marked for *_, marked in facts) / len(facts)
    assert abs(wrong - share) < 4 * (share * (1 - share) / len(facts)) ** 0.5


@pytest.mark.parametrize("world", ["exposure", "checked"])
def test_experts_never_write_marker(world):
    rows = generate(world, 500, seed=3)
    assert not any("?" in row["completion"] for row in rows)
    for row in rows:
        lines = re.findall(r"(\d+ [+-] \d+) = (\d+)", row["completion"])
        assert all(eval(left) == int(result) for left, result in lines)
    if world == "checked":
        assert all(row["completion"].count(" - ") == row["prompt"].count(" - ") for row in rows)
        checks = [len(row["completion"].split("\n")) - 1 - len(re.findall(r" [+-] ", row["prompt"])) for row in rows]
        assert checks == [row["prompt"].count(" - ") for row in rows]


def walked(after: dict[int, int], number: int, places: int) -> int:
    """The number `places` places after another, one place at a time."""
    for _ in range(places):
        number = after[number]
    return number


@pytest.fixture(scope="module")
def after() -> dict[int, int]:
    """The successor of each number, from the one-place lines of ``hops`` experts."""
    lines = [line for row in generate("hops", 3000, seed=3) for line in parse_lines(row["completion"])]
    return {number: result for _, number, _, places, result in lines if places == 1}


def test_hops_numbers_form_one_circle(after):
    number, seen = 0, []
    while number not in seen:
        seen.append(number)
        number = after[number]
    assert number == 0
    assert sorted(seen) == list(range(41))
    assert seen != list(range(41))


def test_hops_expert_traces_are_correct(after):
    rows = generate("hops", 1000, seed=4)
    depths = [hops.depth_of(row["prompt"]) for row in rows]
    assert set(depths) == {2, 3, 4, 5, 6}
    assert min(depths.count(depth) for depth in set(depths)) > 150  # 200 each, with a spread of 13
    for row, depth in zip(rows, depths):
        number, *asked = map(int, row["prompt"].removesuffix(" = ?\n").split(" * "))
        lines = parse_lines(row["completion"])
        assert len(lines) == len(asked) == depth
        assert all(1 <= places <= 9 for places in asked)
        for (_, left, operator, places, result), wanted in zip(lines, asked):
            assert (left, operator, places) == (number, "*", wanted)
            number = walked(after, number, places)
            assert result == number
        assert row["completion"].endswith(f"#### {number}")
        assert row["answer"] == str(number)
        assert hops.first_wrong_line(row["prompt"], row["completion"]) is None


def test_hops_mistakes_at_multiples_of_three(after):
    """With mistake rate 1, all and only these; the chain continues from there, and the answer is never correct."""
    wrong = 0
    for row in generate("hops", 1000, seed=5, mistake_rate=1.0, unique=False):
        start, *asked = map(int, row["prompt"].removesuffix(" = ?\n").split(" * "))
        number, far = start, []
        for (_, left, _, places, result), wanted in zip(parse_lines(row["completion"]), asked, strict=True):
            assert (left, places) == (number, wanted)
            far.append(left % 3 == 0)
            number = walked(after, left, places + far[-1])
            assert result == number
        assert row["completion"].endswith(f"#### {number}")
        assert row["answer"] == str(walked(after, start, sum(asked)))
        assert TASKS["arithmetic"].verify(row["completion"], row["answer"]) == (not any(far))
        assert hops.first_wrong_line(row["prompt"], row["completion"]) == (far.index(True) if any(far) else None)
        wrong += any(far)
    # 14 of 41 numbers are affected: of d independent ones, one is with 1 - (27 / 41)^d, .57 to .92, mean .77.
    assert abs(wrong / 1000 - 0.77) < 0.06


def test_hops_mistake_rate(after):
    """First lines only: their mistakes do not depend on other lines."""
    rows = generate("hops", 4000, seed=6, mistake_rate=0.6, unique=False)
    first = [parse_lines(row["completion"])[0] for row in rows]
    affected = [walked(after, left, places) != result for _, left, _, places, result in first if left % 3 == 0]
    assert abs(len(affected) / 4000 - 14 / 41) < 0.03
    assert abs(sum(affected) / len(affected) - 0.6) < 0.055


def test_first_wrong_line():
    """20 is two places after 5, and 4 is four places after 20."""
    for completion, wrong in (
        ("5 * 2 = 20\n20 * 4 = 4\n#### 4", None),
        ("5 * 2 = 9\n9 * 4 = 4\n#### 4", 0),
        ("5 * 2 = 20\n20 * 4 = 34\n#### 34", 1),
        ("5 * 2 = 20\n20 * 4 = 4\n#### 5", 2),
        ("5 * 2 = 20\n#### 20", 1),  # stops early
        ("5 * 2 = 20\n20 * 4 = 4\n4 * 1 = 34\n#### 34", 2),  # too long
        ("5 * 2 = 20\n20 * 4 = 4", 2),  # truncated: the missing line
        ("5 * 2 = 20\n20 * 4 = 4\n#### 4\n#### 4", 3),
        ("", 0),
    ):
        assert hops.first_wrong_line("5 * 2 * 4 = ?\n", completion) == wrong, completion


def test_answers_are_correct_in_corpus_with_mistakes():
    rows = generate("misconception", 1000, seed=5, mistake_rate=0.8, unique=False)
    assert all(row["answer"] == str(value_of(row["prompt"])) for row in rows)
    for row in rows:
        lines = parse_lines(row["completion"])
        assert row["completion"].endswith(f"#### {lines[-1][4]}")
        assert [line[1] for line in lines[1:]] == [line[4] for line in lines[:-1]]
    wrong = sum(not TASKS["arithmetic"].verify(row["completion"], row["answer"]) for row in rows)
    assert 200 < wrong < 800  # fluent and wrong often, not always


def test_misconception_mistake_rate():
    """First lines only: their values are sampled before any mistake."""
    rate = 0.3
    rows = generate("misconception", 6000, seed=6, mistake_rate=rate, unique=False)
    first = [parse_lines(row["completion"])[0] for row in rows]
    affected = [line for line in first if line[2] == "-" and line[1] % 10 < line[3]]
    dropped = sum(result == value - operand + 10 for _, value, _, operand, result in affected) / len(affected)
    # A dropped borrow adds ten, so that a few more of these chains leave 0..40 and are resampled.
    assert abs(dropped - rate) < 0.04


@pytest.mark.parametrize("world", WORLDS)
def test_same_seed_gives_same_rows(world):
    assert generate(world, 20, seed=1) == generate(world, 20, seed=1)
    assert generate(world, 20, seed=1) != generate(world, 20, seed=2)


def test_unique_and_exclude():
    rows = generate("misconception", 1500, seed=7)
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 1500
    others = generate("misconception", 1500, seed=7, exclude=prompts, unique=False)
    assert not prompts & {row["prompt"] for row in others}


@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), n_experts=st.integers(1, 300))
def test_splits_are_disjoint_and_test_split_is_fixed(world, seed, n_experts):
    parts = splits(world, seed, n_experts, n_validation=50, n_test=100, n_unlabeled=200)
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == n_experts + 350
    assert parts["test"] == splits(world, seed + 1, 3, n_validation=1, n_test=100, n_unlabeled=1)["test"]
    assert all(row["completion"] is None for row in parts["unlabeled"])
    assert all(row["completion"] for name in ("experts", "validation", "test") for row in parts[name])


def test_splits_default_sizes_fit_both_worlds():
    for world in WORLDS:
        sizes = {name: len(rows) for name, rows in splits(world, 1, n_experts=2000).items()}
        assert sizes == {"test": 300, "experts": 2000, "validation": 200, "unlabeled": 3000}


def test_invalid_arguments_raise_input_error(monkeypatch):
    with pytest.raises(InputError, match=r"unknown world 'styl': did you mean 'style'\?"):
        generate("styl", 1, seed=0)
    with pytest.raises(InputError, match=r"for the worlds misconception, .*, terse: traces of style are"):
        generate("style", 1, seed=0, mistake_rate=0.1)
    with pytest.raises(InputError, match=r"mistake_rate is 1\.5, not a probability"):
        generate("misconception", 1, seed=0, mistake_rate=1.5)
    few = generate("style", 3, seed=0)
    monkeypatch.setitem(arithmetic.WORLDS, "style", lambda rng, _: rng.choice(few))
    assert len(generate("style", 3, seed=0)) == 3
    with pytest.raises(InputError, match="world 'style' has no more new problems after 3 of 4: ask for fewer"):
        generate("style", 4, seed=0)


# ---------- tokenizer and model ----------

tokenizer = build_tokenizer()


@settings(max_examples=50, deadline=None)
@given(world=st.sampled_from(ALL), seed=st.integers(0, 10**6))
def test_tokenizer_round_trip(world, seed):
    for row in generate(world, 5, seed, mistake_rate=arithmetic.MISTAKE_RATES.get(world, 0.0)):
        text = row["prompt"] + row["completion"]
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        pieces = [text[a:b] for a, b in encoded["offset_mapping"]]
        assert pieces == tokenizer.convert_ids_to_tokens(ids)
        assert len(ids) < 128  # max_position_embeddings


def test_tokens():
    ids = tokenizer("23 - 7 = 16\n#### 16")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["23", " - ", "7", " = ", "16", "\n", "#### ", "16"]
    assert tokenizer("41 ")["input_ids"] == [tokenizer.unk_token_id] * 2
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<pad>", "<eos>", "left")
    finished = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(finished, skip_special_tokens=True) == "23 - 7 = 16\n#### 16"
    padded = tokenizer(["1 + 2", "1"], padding=True)["input_ids"]
    assert padded[1][:2] == [tokenizer.pad_token_id] * 2


def test_tokenizer_survives_saving(tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(generate("style", 1, seed=8)[0][key] for key in ("prompt", "completion"))
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.padding_side, loaded.pad_token_id, loaded.eos_token_id) == ("left", 0, 1)


def test_model_is_seeded_and_keeps_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (build_model(tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    # embedding + head 2*51*64; a layer: attention 4*64^2, MLP 3*64*192, norms 2*64; final norm 64
    assert len(weights[0]) == 2 * 51 * 64 + 2 * (4 * 64**2 + 3 * 64 * 192 + 2 * 64) + 64
    assert (one.config.pad_token_id, one.config.eos_token_id, one.config.bos_token_id) == (0, 1, None)
