"""Characters that a tokenizer cannot hold, counted by hand for vocabularies of several kinds."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.byte_tokenizers import BYTES, KEPT, STRIPPED
from helpers.command_line import bench, command, refused  # noqa: F401
from tracereward import TokenRewardModel
from tracereward.errors import InputError
from tracereward.modeling.lost_text import Loss, check_texts, loss_of

ANY = "caf\u00e9 \u4e2d\u6587 \U0001f9ee \\frac{1}{2}\n"


def word_piece() -> PreTrainedTokenizerFast:
    """Lower case without accents, as BERT's."""
    vocabulary = {token: n for n, token in enumerate(["[UNK]", "cafe", "the", "##s", "2", ".", "[PAD]"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Unigram with NFKC, as SentencePiece trains it; no byte fallback."""
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ["\u2581", *"fixabc2=+", "\u2581f"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="<unk>")


def dropping() -> PreTrainedTokenizerFast:
    """BPE without ``<unk>``: what it does not know has no token."""
    tokenizer = Tokenizer(models.BPE({character: n for n, character in enumerate("ab2 ")}, []))
    tokenizer.normalizer = normalizers.Replace(Regex("[#]"), "")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token=" ")


@pytest.mark.parametrize("tokenizer", [BYTES, KEPT, STRIPPED], ids=["byte-level", "byte fallback", "Llama 2"])
def test_bytes_hold_everything(tokenizer):
    assert loss_of(tokenizer, ANY).lost == 0


@pytest.mark.parametrize(
    ("tokenizer", "text", "lost", "visible", "example"),
    [
        (word_piece(), "The  CAF\u00c9s.\n2", 0, 10, ""),  # case, accents and white space: by design
        (word_piece(), "the \u4e2d 2", 1, 5, "\u4e2d"),
        (word_piece(), "the axiom.", 5, 9, "axiom"),  # one unknown word
        (sentence_piece(), "\ufb01x \u00b2=2", 0, 5, ""),  # NFKC: a ligature and a superscript
        (sentence_piece(), "ab {c}", 2, 5, "{"),
        (dropping(), "ab 2", 0, 3, ""),
        (dropping(), "ab #2 xyz", 4, 7, "#"),
    ],
)
def test_loss_by_hand(tokenizer, text, lost, visible, example):
    assert loss_of(tokenizer, text) == Loss(lost, visible, example)


def test_words_outside_an_arithmetic_vocabulary(tokenizer):
    """Digits and signs are held, words are not; a sample that spells the unknown token holds what it says."""
    assert loss_of(tokenizer, "3 + 4 = 7\n#### 7") == Loss(0, 10)
    assert loss_of(tokenizer, "so 3 + 4 = 7") == Loss(2, 7, "so")
    assert loss_of(tokenizer, "<unk>3") == Loss(0, 6)


def test_sets_are_refused_or_warned_of_by_their_share(tokenizer, capfd):
    """One odd character in 1000 is a warning with its share; one in 50 is refused, with the rows it is in."""
    rows = [(f"a:{n}", ["1 + 1", "2 + 2"]) for n in range(166)]  # 6 visible characters each
    check_texts(tokenizer, rows, "a")
    assert capfd.readouterr().err == ""
    check_texts(tokenizer, [*rows, ("a:167", ["1 + 1", "\u00e9"])], "a")
    said = capfd.readouterr().err
    assert "warning: a: 0.1 % of the characters, in 1 of 167 rows" in said
    assert "(first a:167: '\u00e9')" in said
    with pytest.raises(InputError, match=r"a: 2 % of the characters, in 1 of 9 rows.*first a:9: 'e'"):
        check_texts(tokenizer, [*rows[:8], ("a:9", ["e"])], "a")


WORDS = {
    "prompt": "How many apples?",
    "completion": "Seven, as three and four are seven.",
    "answer": "7",
    "correct": True,
}


@pytest.mark.parametrize("name", ["sft", "train", "grpo", "score", "rerank", "inspect", "sample", "policy"])
def test_commands_refuse_text_outside_the_vocabulary(command, bench, tmp_path, name):
    """Before any model loads: the models here cannot be loaded."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(WORDS) + "\n")
    training = ["--dataset_name", data, "--model_name_or_path", bench.bare, "--output_dir", tmp_path / "run"]
    words = {
        "sample": ["sample", bench.bare, "--data", data],
        "policy": ["evaluate", "policy", bench.bare, "--data", data, "-o", tmp_path / "out"],
        "inspect": ["inspect", data, "--model", bench.bare_reward],
    }.get(name, [name, *training] if name in ("sft", "train", "grpo") else [name, bench.bare_reward, data])
    refused(command(*words), str(data), " of the characters", "vocabulary")
    assert not (tmp_path / "run").exists()


def test_skipped_rows_and_the_share_of_the_rest(command, bench, tmp_path):
    data = tmp_path / "rows.jsonl"
    right = {"prompt": "3 + 4 = ?\n", "completion": "3 + 4 = 7\n#### 7"}
    odd = {"prompt": "3 + 4 = ?\n", "completion": "3 + 4 = 7\n3 + 4 = 7\n\u00e9#### 7"}
    data.write_text("".join(json.dumps(row) + "\n" for row in (right, WORDS, odd)))
    done = command("score", bench.reward_model, data, "--skip-bad")
    assert done.code == 0, done.err
    assert [json.loads(line)["completion"] for line in done.out.splitlines()] == [
        right["completion"],
        odd["completion"],
    ]
    assert f"skipped: {data}:2: " in done.err
    assert "characters, in 1 of 2 rows" in done.err
    assert f"first {data}:3: 'é'" in done.err


def test_python(bench):
    model = TokenRewardModel.from_pretrained(str(bench.reward_model))
    for call in (
        lambda: model.score(["3 + 4 = ?\n"], ["seven"]),
        lambda: model.rerank("How many?", ["7", "8"]),
    ):
        with pytest.raises(InputError, match=r"of the characters .* are not in the vocabulary"):
            call()
