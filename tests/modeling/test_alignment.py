"""Token offsets and step ends of a word tokenizer, and of byte-level and byte-fallback ones that split characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.byte_tokenizers import BYTES, KEPT, STRIPPED, TEXT
from tracereward.errors import InputError
from tracereward.modeling.alignment import _ends_by_prefixes, _ends_by_stream, step_ends, token_offsets
from tracereward.modeling.steps import StepRule


def check(tokenizer, ids) -> tuple[str, list[tuple[int, int]]]:
    """Text and offsets of `ids`, after checking their invariants."""
    text, offsets = token_offsets(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(offsets) == len(ids)
    position = 0
    for start, end in offsets:  # without gaps or overlaps, in order
        assert start == position
        assert end >= start
        position = end
    assert position == len(text)
    return text, offsets


def tokens_of(tokenizer, text: str) -> list[str]:
    ids = tokenizer(text)["input_ids"]
    decoded, offsets = check(tokenizer, ids)
    assert decoded == text
    return [text[start:end] for start, end in offsets]


def ends_of(tokenizer, text: str, delimiter: str = "\n") -> list[str]:
    """The text of each step, up to and including its last token."""
    ids = tokenizer(text)["input_ids"]
    _, offsets = check(tokenizer, ids)
    steps, start = [], 0
    for (_, end), is_last in zip(offsets, step_ends(text, offsets, StepRule(delimiter)), strict=True):
        if is_last:
            steps.append(text[start:end])
            start = end
    return steps


# ---------- offsets ----------


def test_word_tokens_by_hand(tokenizer):
    ids = [*tokenizer("13 - 5 = 8\n#### 8")["input_ids"], tokenizer.eos_token_id]
    text, offsets = check(tokenizer, ids)
    assert text == "13 - 5 = 8\n#### 8"
    assert [text[a:b] for a, b in offsets] == ["13", " - ", "5", " = ", "8", "\n", "#### ", "8", ""]
    assert offsets[-1] == (17, 17)


@given(ids=st.lists(st.integers(0, 40), max_size=20))
def test_sampled_word_tokens(tokenizer, ids):
    check(tokenizer, ids)


def test_character_belongs_to_the_last_of_its_tokens():
    assert len(BYTES("😀")["input_ids"]) == 4
    assert tokens_of(BYTES, "😀") == ["", "", "", "😀"]
    assert "".join(tokens_of(BYTES, TEXT)) == TEXT


@given(text=st.text(st.sampled_from("ab .\n😀日é🧮ñ"), max_size=20))
def test_multi_byte_text_is_covered(text):
    tokens_of(BYTES, text)


@given(ids=st.lists(st.integers(0, len(BYTES) - 1), max_size=16))
def test_sampled_bytes_that_are_invalid_utf8(ids):
    """A policy may sample part of a character, also at the end if truncated."""
    check(BYTES, ids)


def test_trace_truncated_inside_a_character():
    ids = BYTES("ok 😀")["input_ids"]
    text, offsets = check(BYTES, ids[:-1])
    assert text == "ok \N{REPLACEMENT CHARACTER}"
    assert offsets[-1] == (3, 4)
    text, offsets = check(BYTES, [*ids[:-1], BYTES.eos_token_id])
    assert offsets[-2:] == [(3, 4), (4, 4)]  # special tokens stay empty


def fallback_spans(*pieces: str) -> tuple[str, list[str]]:
    text, offsets = check(KEPT, KEPT.convert_tokens_to_ids(list(pieces)))
    return text, [text[start:end] for start, end in offsets]


def test_byte_fallback_characters_belong_to_the_last_byte():
    assert fallback_spans("a", "<0xC3>", "<0xA9>", "<0xC3>", "<0xB1>", "b") == ("aéñb", ["a", "", "é", "", "ñ", "b"])


def test_stray_byte_invalidates_the_character_before_it():
    """Byte fallback decodes a run of bytes together; a stream that has emitted "é" cannot revoke it."""
    lost = "\N{REPLACEMENT CHARACTER}"
    assert fallback_spans("a", "<0xC3>", "<0xA9>", "<0xC3>", "b", "1") == (
        f"a{lost * 3}b1",
        ["a", "", "", "", f"{lost * 3}b", "1"],
    )
    assert fallback_spans("a", "<0xC3>", "<0xA9>", "<0xC3>", "<eos>")[1] == ["a", "", "", lost * 3, ""]
    assert fallback_spans("<0x61>", "<0xC3>", "<0x61>")[1] == ["", "", lost * 3]
    assert fallback_spans("<0x61>", "<0xC3>", "<0x61>", "b", "1")[1] == ["", "", "", f"{lost * 3}b", "1"]


@pytest.mark.parametrize("tokenizer", [STRIPPED, KEPT], ids=["stripped", "kept"])
@given(ids=st.lists(st.integers(0, len(KEPT) - 1), max_size=16))
def test_sampled_fallback_bytes_that_are_invalid_utf8(tokenizer, ids):
    check(tokenizer, ids)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<▁"), max_size=20))
def test_fallback_token_spans_cover_any_text(text):
    tokens_of(KEPT, text)
    tokens_of(STRIPPED, text)


def test_space_added_by_encoding_is_in_no_span():
    assert STRIPPED.convert_ids_to_tokens(STRIPPED(" 12")["input_ids"]) == ["▁", "▁12"]
    assert tokens_of(STRIPPED, " 12") == ["", " 12"]
    assert tokens_of(STRIPPED, "12 12") == ["12", " 12"]
    assert tokens_of(STRIPPED, "a ") == ["a", " "]
    assert tokens_of(KEPT, " 12 12") == [" 12", " 12"]


@given(text=st.text(st.sampled_from("ab .\n😀日é🧮ñ"), max_size=20), special=st.integers(0, 20))
def test_stream_matches_decoded_prefixes(text, special):
    """If no token contains a full character and part of the next, as in byte-fallback vocabularies."""
    for tokenizer in (KEPT, STRIPPED):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ids.insert(special, tokenizer.pad_token_id)
        backend = tokenizer.backend_tokenizer
        ends = [end for _, end in check(tokenizer, ids)[1]]
        assert _ends_by_stream(backend, ids, text) == _ends_by_prefixes(backend, ids, text) == ends


def test_token_with_a_character_and_part_of_the_next():
    ids = BYTES.convert_tokens_to_ids(["a", "aÃ", "©"])
    assert check(BYTES, ids) == ("aaé", [(0, 1), (1, 1), (1, 3)])


def test_text_takes_linear_time(monkeypatch):
    monkeypatch.setattr("tracereward.modeling.alignment._ends_by_prefixes", None)
    for tokenizer in (BYTES, KEPT, STRIPPED):
        assert "".join(tokens_of(tokenizer, TEXT)) == TEXT


def test_special_tokens_are_not_text():
    ids = [0, *BYTES("a")["input_ids"], 0, 1]
    assert check(BYTES, ids) == ("a", [(0, 0), (0, 1), (1, 1), (1, 1)])


def test_no_tokens():
    assert token_offsets(BYTES, []) == ("", [])
    assert step_ends("", []) == []


def test_slow_tokenizer_is_refused():
    class Slow:
        name_or_path = "some/slow-model"

    with pytest.raises(InputError, match=r"some/slow-model: token offsets need a fast tokenizer"):
        token_offsets(Slow(), [1])


# ---------- steps ----------


def test_steps_of_the_word_tokenizer(tokenizer):
    assert ends_of(tokenizer, "1 + 2 = 3\n3 + 4 = 7\n#### 7") == ["1 + 2 = 3\n", "3 + 4 = 7\n", "#### 7"]


def test_token_with_a_full_stop_and_two_newlines():
    assert ".\n\n" in tokens_of(BYTES, "The cat.\n\nSo")
    assert ends_of(BYTES, "The cat.\n\nSo the dog.\n\nok") == ["The cat.\n\n", "So the dog.\n\n", "ok"]


def test_blank_lines_are_not_steps():
    assert ends_of(BYTES, "a\n\n\nb\n \n c") == ["a\n\n\n", "b\n \n", " c"]


def test_end_of_sequence_after_a_newline_is_no_step():
    assert step_ends("a\nb\n", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]) == [False, True, False, False, True]
    assert step_ends("A. B. ", [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 6)], StepRule(". ")) == [0, 1, 0, 0, 0, 1]
    assert step_ends("\n\na\n", [(0, 2), (2, 3), (3, 4), (4, 4)]) == [False, False, False, True]
    assert step_ends("\n", [(0, 1), (1, 1)]) == [False, True]


def test_last_token_always_ends_a_step():
    offsets = [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert step_ends("a\nb", offsets) == [False, True, False, True]
    assert step_ends("a\nb", offsets[:1]) == [True]


def test_delimiter_split_across_tokens():
    """The step ends where the delimiter ends, not where it begins."""
    assert step_ends("a##b", [(0, 1), (1, 2), (2, 3), (3, 4)], StepRule("##")) == [False, False, True, True]
    assert step_ends("a##b#c", [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)], StepRule("##")) == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_delimiter_with_bytes_split_across_tokens():
    text = "a😀b"
    ids = BYTES(text)["input_ids"]
    _, offsets = check(BYTES, ids)
    assert step_ends(text, offsets, StepRule("😀")) == [False, False, False, False, True, True]


def test_space_of_a_sentence_delimiter_starts_the_next_step():
    """In a byte-level vocabulary the space after a full stop is part of the next word's token."""
    assert " The" in tokens_of(BYTES, "The cat sat. The dog")
    assert ends_of(BYTES, "The cat sat. The dog. So", ". ") == ["The cat sat.", " The dog.", " So"]


def test_decimal_point_does_not_end_a_sentence():
    assert ends_of(BYTES, "3.5 cats. So 2.5", ". ") == ["3.5 cats.", " So 2.5"]


@given(text=st.text(st.sampled_from("ab \n"), min_size=1, max_size=24))
def test_one_character_tokens_follow_the_definition(text):
    """A newline ends a step if text is on both sides of it, and no later newline before the text behind it."""
    offsets = [(i, i + 1) for i in range(len(text))]
    expected = []
    for i, character in enumerate(text):
        rest = text[i + 1 :]
        gap = rest[: len(rest) - len(rest.lstrip())]
        inside = bool(text[:i].strip() and rest.strip())
        expected.append((character == "\n" and "\n" not in gap and inside) or i == len(text) - 1)
    assert step_ends(text, offsets) == expected


def test_thousands_of_blank_lines_take_linear_time():
    """The pattern repeats inside a repeat; it must not backtrack exponentially."""
    text = "a" + "\n \n\t" * 5000 + "b" + "\n" * 5000
    ends = step_ends(text, [(i, i + 1) for i in range(len(text))])
    assert [i for i, end in enumerate(ends) if end] == [1 + 4 * 5000 - 2, len(text) - 1]
