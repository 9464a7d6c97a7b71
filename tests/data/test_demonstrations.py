"""Reading, checking, rendering and splitting demonstrations; every message is checked by its text."""

import contextlib
import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from helpers.paths import SHARED
from tracereward.data.demonstrations import check_lengths, check_positions, load_demonstrations, split_rows
from tracereward.data.readers import read_rows
from tracereward.errors import InputError
from tracereward.modeling.rendering import Rendering, render
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.synthetic.arithmetic import build_tokenizer, generate
from tracereward.tasks.recipes import TASKS

GENERIC = TASKS["generic"]
ROWS = [
    {"prompt": "1 + 2 = ?\n", "completion": "#### 3"},
    {"prompt": "2 + 2 = ?\n", "completion": "#### 4", "answer": "4"},
]


def write_lines(path: Path, lines: list) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


# ---------- reading ----------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [{"prompt": "p é", "n": 1}, {"prompt": "q", "n": 2}]
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, rows)
    assert list(read_rows(str(path))) == [(f"{path}:1", rows[0]), (f"{path}:2", rows[1])]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ["", {"a": 1}, "  ", {"a": 2}])
    assert [location for location, _ in read_rows(source)] == [f"{source}:2", f"{source}:4"]


def test_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert [row for _, row in read_rows(str(path))] == [{"a": 1}]


def test_many_parquet_batches_keep_their_row_numbers(tmp_path):
    path = tmp_path / "many.parquet"
    parquet.write_table(pa.table({"n": list(range(1, 200_001))}), path)
    *_, last = read_rows(str(path))
    assert last == (f"{path}:200000", {"n": 200_000})


def refused(source: str, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(source, **kwargs))
    return str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
    write_lines(tmp_path / "train.jsonl.gz", ROWS)
    hint = f"no such file; did you mean {tmp_path / 'train.jsonl.gz'}?"
    assert refused(str(tmp_path / "trian.jsonl.gz")).endswith(hint)
    assert f"no such file in {tmp_path}" in refused(str(tmp_path / "x.parquet"))
    assert f"the folder {tmp_path / 'no'} does not exist either" in refused(str(tmp_path / "no" / "a.jsonl"))


def test_unknown_suffix_names_the_known_ones(tmp_path):
    source = write_lines(tmp_path / "a.yaml", ["a,b"])
    hint = "use one of .jsonl, .json, .parquet, .csv, .tsv, .jsonl.gz, or a folder"
    assert refused(source) == f"{source}: cannot tell the format from the name; {hint}"
    source = write_lines(tmp_path / "data-00000-of-00001.arrow", [])
    assert refused(source).endswith("give the folder that it is in")


def test_invalid_json_names_its_line(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"a": 1}, "", "{'a': 2}"])
    assert refused(source).startswith(f"{source}:3: not valid JSON: Expecting property name enclosed in double quotes")
    source = write_lines(tmp_path / "b.jsonl", [{"a": 1}, "[1, 2]"])
    assert refused(source) == f"{source}:2: a JSON array, not an object with fields: an array of rows is a .json file"
    source = write_lines(tmp_path / "c.jsonl", ["null"])
    assert refused(source) == f"{source}:1: a JSON null, not an object with fields"
    source = write_lines(tmp_path / "d.jsonl", ["1" * 5000])
    assert refused(source).startswith(f"{source}:1: not valid JSON: Exceeds the limit")


def test_json_lines_under_a_json_suffix(tmp_path):
    source = write_lines(tmp_path / "a.json", ROWS)
    assert refused(source) == f"{source}:2: not valid JSON: Extra data (one object a line? then name it .jsonl)"
    source = write_lines(tmp_path / "b.json", [{"data": []}])
    assert refused(source) == f"{source}: must hold an array of objects; one object a line is .jsonl"


def test_corrupt_files(tmp_path):
    path = Path(write_lines(tmp_path / "a.jsonl.gz", generate("style", 400, seed=0)))
    path.write_bytes(path.read_bytes()[:-200])
    message = refused(str(path))
    assert f"{path}: corrupt gzip file after line " in message
    assert message.endswith("copy or download it again")
    (tmp_path / "b.jsonl.gz").write_text("{}")
    assert "corrupt gzip file after line 0: Not a gzipped file" in refused(str(tmp_path / "b.jsonl.gz"))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    assert "not a readable Parquet file after row 0" in refused(str(tmp_path / "d.parquet"))


def test_hub_set(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "a"}, {"question": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(read_rows("openai/gsm8k", split="test", subset="main"))
    assert found == [("openai/gsm8k:test:1", {"question": "a"}), ("openai/gsm8k:test:2", {"question": "b"})]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_hub_set_that_cannot_be_loaded(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert refused("openai/gsm8k", subset="main") == (
        "cannot load 'openai/gsm8k' (split 'train', subset 'main'): the Hugging Face Hub cannot be reached (no route). "
        "Give a local file "
        "(.jsonl, .json, .parquet, .csv, .tsv) or folder, or load it once where there is a network and keep the cache."
    )

    def unknown_split(*_, **__):
        raise ValueError('Unknown split "trian".')

    monkeypatch.setattr(datasets, "load_dataset", unknown_split)
    message = refused("openai/gsm8k", split="trian")
    assert message == "cannot load 'openai/gsm8k' (split 'trian') from the Hugging Face Hub: Unknown split \"trian\"."


# ---------- checking ----------


def test_load_demonstrations(tmp_path):
    lines = [{**ROWS[0], "more": [1]}, "", ROWS[1], ROWS[1]]
    source = write_lines(tmp_path / "a.jsonl", lines)
    assert load_demonstrations(source, GENERIC) == [
        {"prompt": "1 + 2 = ?\n", "completion": "#### 3", "answer": None, "source": f"{source}:1"},
        {"prompt": "2 + 2 = ?\n", "completion": "#### 4", "answer": "4", "source": f"{source}:3"},
        {"prompt": "2 + 2 = ?\n", "completion": "#### 4", "answer": "4", "source": f"{source}:4"},  # duplicates stay
    ]
    assert len(load_demonstrations(source, GENERIC, limit=2)) == 2


NEITHER = "neither text nor a list of {role, content} messages"
NO_COMPLETION = "no completion: field 'completion' is missing or empty for task 'generic'"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "a", "text": 1}, "field 'prompt' is missing for task 'generic'; fields: 'completion', 'text'"),
        ({}, "field 'prompt' is missing for task 'generic'; fields: none"),
        ({"prompt": " \n", "completion": "a"}, "field 'prompt' is empty"),
        ({"prompt": 3, "completion": "a"}, f"field 'prompt' is int, {NEITHER}"),
        ({"prompt": [], "completion": "a"}, "field 'prompt' is empty"),
        ({"prompt": "p"}, NO_COMPLETION),
        ({"prompt": "p", "completion": None}, NO_COMPLETION),
        ({"prompt": "p", "completion": " \n"}, NO_COMPLETION),
        (
            {"prompt": "p</s>\n", "completion": "a"},
            "the prompt ends with an end mark ('p</s>'), and",
        ),
        ({"prompt": "p", "completion": 7}, f"field 'completion' is int, {NEITHER}"),
        ({"prompt": "p", "completion": "c", "answer": [1]}, "field 'answer' is list, not text or a number"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, row, message):
    source = write_lines(tmp_path / "a.jsonl", [ROWS[0], "", row])
    with pytest.raises(InputError) as caught:
        load_demonstrations(source, GENERIC)
    assert str(caught.value).startswith(f"{source}:3: {message}")


def test_tasks_name_their_own_fields(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"question": "q"}])
    with pytest.raises(InputError, match="no completion: field 'answer' is missing or empty for task 'gsm8k'"):
        load_demonstrations(source, TASKS["gsm8k"])
    with pytest.raises(InputError, match="field 'problem' is missing for task 'math'; fields: 'question'"):
        load_demonstrations(source, TASKS["math"])
    assert load_demonstrations(source, TASKS["gsm8k"], require_completion=False)[0]["completion"] is None


def test_prompts_only(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": "p"}, {"prompt": "q", "completion": ""}, ROWS[0]])
    rows = load_demonstrations(source, GENERIC, require_completion=False)
    assert [row["completion"] for row in rows] == [None, None, "#### 3"]


def test_no_rows(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(InputError, match=r"a\.jsonl: no rows"):
        load_demonstrations(source, GENERIC)
    with pytest.raises(InputError, match="limit is 0: it must be at least 1"):
        load_demonstrations(source, GENERIC, limit=0)


def test_real_gsm8k_file():
    path = SHARED / "gsm8k" / "train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"real data is not here: {path}")
    rows = load_demonstrations(str(path), TASKS["gsm8k"])
    assert len(rows) == 7473
    assert rows[-1]["source"] == f"{path}:7473"
    train, validation = split_rows(rows, 500, seed=0)
    assert len(train) + len(validation) == 7473
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}


# ---------- rendering ----------

CHAT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(adds_bos: bool):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = CHAT
    if adds_bos:
        bos = [("<bos>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    return tokenizer


MESSAGES = {
    "prompt": [{"role": "user", "content": "1 + 1 = ?"}],
    "completion": [{"role": "assistant", "content": "#### 2\n"}],
    "source": "f:1",
}


def test_plain_keeps_texts():
    rows = [{**ROWS[0], "source": "f:1"}, {"prompt": "p", "completion": None}]
    rendered = render(rows, build_tokenizer(), Rendering(template="plain"))
    assert rendered == rows
    assert all(new is not old for new, old in zip(rendered, rows))
    with pytest.raises(InputError, match="f:1: the prompt is a list of messages: use --template chat"):
        render([MESSAGES], build_tokenizer(), Rendering(template="plain"))
    with pytest.raises(InputError, match=r"unknown template 'chatt': did you mean 'chat'\?"):
        render(rows, build_tokenizer(), Rendering(template="chatt"))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_chat_writes_bos_once(adds_bos):
    tokenizer = chat_tokenizer(adds_bos)
    text, messages = render([ROWS[0], MESSAGES], tokenizer, Rendering(template="chat"))
    assert text["prompt"] == "<bos><user>1 + 2 = ?\n<assistant>"
    assert text["completion"] == "#### 3"
    assert messages["prompt"] == "<bos><user>1 + 1 = ?<assistant>"
    assert messages["completion"] == "#### 2"
    assert encode_prompt(tokenizer, text["prompt"]).count(tokenizer.bos_token_id) == 1
    assert isinstance(MESSAGES["prompt"], list)


def test_chat_errors():
    with pytest.raises(InputError, match="has no chat template: use --template plain"):
        render(ROWS, build_tokenizer(), Rendering(template="chat"))
    tokenizer = chat_tokenizer(False)
    with pytest.raises(InputError, match="f:1: the chat template refuses the prompt: no system turn"):
        render([{**MESSAGES, "prompt": [{"role": "system", "content": "s"}]}], tokenizer, Rendering(template="chat"))
    two = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InputError, match="f:1: the completion must be one assistant message, not: assistant, user"):
        render([{**MESSAGES, "completion": two}], tokenizer, Rendering(template="chat"))


def test_encoding_by_hand():
    tokenizer = build_tokenizer()
    prompt = encode_prompt(tokenizer, "1 + 2 = ?\n")
    assert tokenizer.convert_ids_to_tokens(prompt) == ["1", " + ", "2", " = ", "?", "\n"]
    assert tokenizer.convert_ids_to_tokens(encode_completion(tokenizer, "#### 3")) == ["#### ", "3", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(encode_completion(tokenizer, "#### 3", finished=False)) == ["#### ", "3"]
    assert encode_completion(tokenizer, "", finished=False) == []
    bos = chat_tokenizer(True)
    assert bos.convert_ids_to_tokens(encode_prompt(bos, "3")) == ["<bos>", "3"]
    assert bos.convert_ids_to_tokens(encode_completion(bos, "3")) == ["3", "<eos>"]
    bos.eos_token = None
    with pytest.raises(InputError, match="has no end-of-sequence token"):
        encode_completion(bos, "3")


# ---------- lengths ----------


def long_rows() -> list[dict]:
    """Prompts of 6, 6, 8, 6 tokens and completions of 3, 9, 3 tokens with <eos>, and none."""
    return [
        {"prompt": "1 + 2 = ?\n", "completion": "#### 3", "source": "f:1"},
        {"prompt": "1 + 2 = ?\n", "completion": "1 + 2 = 3\n#### 3", "source": "f:2"},
        {"prompt": "1 + 2 + 3 = ?\n", "completion": "#### 6", "source": "f:3"},
        {"prompt": "1 + 3 = ?\n", "completion": None, "source": "f:4"},
    ]


def test_check_lengths():
    rows, tokenizer = long_rows(), build_tokenizer()
    assert check_lengths(rows, tokenizer, 8, 9, on_long="refuse") == (rows, 0)
    assert check_lengths(rows, tokenizer, None, 9, on_long="refuse") == (rows, 0)
    assert check_lengths(rows, tokenizer, 6, 8, on_long="drop") == ([rows[0], rows[3]], 2)
    with pytest.raises(InputError) as caught:
        check_lengths(rows, tokenizer, 8, 8, on_long="refuse")
    assert str(caught.value) == (
        "1 of 4 rows are too long: 1 completions over 8 tokens, first f:2 (9), longest 9 tokens. "
        "Use --max_completion_length 9 or --on_long drop."
    )
    with pytest.raises(InputError) as caught:
        check_lengths(rows, tokenizer, 5, 2, on_long="drop")
    assert str(caught.value) == (
        "4 of 4 rows are too long: 4 prompts over 5 tokens, first f:1 (6), longest 8 tokens; "
        "3 completions over 2 tokens, first f:1 (3), longest 9 tokens. "
        "Use --max_prompt_length 8 --max_completion_length 9 or --on_long drop."
    )
    with pytest.raises(InputError, match="unknown on_long 'cut'"):
        check_lengths(rows, tokenizer, 8, 9, on_long="cut")


# ---------- splitting ----------


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda p: len(set(p)) > 1),
    share=st.floats(0.01, 0.5),
    seed=st.integers(0, 100),
)
def test_split_groups_by_prompt(prompts, share, seed):
    rows = [{"prompt": f"{p}", "completion": f"{i}"} for i, p in enumerate(prompts)]
    largest = max(prompts.count(p) for p in prompts)
    if largest > (1 - share) * len(rows):  # all the other prompts together may be too few
        return
    train, validation = split_rows(rows, share, seed)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    assert sorted(row["completion"] for row in train + validation) == sorted(row["completion"] for row in rows)
    assert share * len(rows) <= len(validation) < share * len(rows) + largest
    assert (train, validation) == split_rows(rows, share, seed)
    for side in (train, validation):
        assert side
        assert [int(row["completion"]) for row in side] == sorted(int(row["completion"]) for row in side)


def test_split_by_number_and_seed():
    rows = generate("style", 100, seed=0)
    train, validation = split_rows(rows, 30, seed=1)
    assert (len(train), len(validation)) == (70, 30)
    assert split_rows(rows, 30, seed=2)[1] != validation
    messages = [{"prompt": [{"role": "user", "content": str(i % 2)}], "completion": str(i)} for i in range(4)]
    assert sorted(len(side) for side in split_rows(messages, 0.5, seed=0)) == [2, 2]


@pytest.mark.parametrize("validation", [0, -1, 2, 5])
def test_split_with_an_empty_part_is_refused(validation):
    with pytest.raises(InputError, match=f"validation is {validation} for 2 rows: give a share under 1, or fewer"):
        split_rows(ROWS, validation, seed=0)


def test_split_of_one_prompt():
    with pytest.raises(InputError, match=r"validation is 0\.5, but 3 rows have only 1 different prompts"):
        split_rows([ROWS[0]] * 3, 0.5, seed=0)


@pytest.mark.parametrize(
    ("positions", "rollouts", "message"),
    [
        (20, 10, None),
        (
            19,
            10,
            "t.jsonl:2: 10 prompt tokens and up to 10 of a completion, but .* reads 19. Use --max_completion_length 9",
        ),
        (10, 0, None),
        (9, 0, "t.jsonl:1: 4 prompt tokens and up to 6 of .* reads 9. Remove the row"),
    ],
)
def test_traces_longer_than_a_model_reads_are_refused(tmp_path, tokenizer, positions, rollouts, message):
    """Training would read, and reward, what scoring refuses. Lengths include the end of sequence."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": positions}))
    rows = [
        {"prompt": "1 + 2\n", "completion": "3 = 4\n5", "source": "t.jsonl:1"},
        {"prompt": "1 + 2 + 3 + 4 + 5\n", "completion": None, "source": "t.jsonl:2"},
    ]
    assert len(tokenizer(rows[0]["completion"])["input_ids"]) == 5
    refused = contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message)
    with refused:
        check_positions(rows if rollouts else rows[:1], tokenizer, str(tmp_path), rollouts=rollouts)


def test_rows_in_memory_read_as_those_of_a_file(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    expected = [{**row, "source": f"demonstrations[{n}]"} for n, row in enumerate(load_demonstrations(path, GENERIC))]
    table = pd.DataFrame(ROWS)
    for source in (ROWS, table, datasets.Dataset.from_pandas(table)):
        assert load_demonstrations(source, GENERIC) == expected
