"""Byte-level and byte-fallback BPE tokenizers."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "The cat sat. The dog sees é and 日本語, naïve.\n\nSo the answer is 12.\n\n  Thus 3.5 😀🧮 ok.\n"


def train_bytes() -> PreTrainedTokenizerFast:
    """Byte-level BPE: frequent words and ".\\n\\n" are one token each, an unseen emoji is four."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=".\n\n", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace("😀🧮 ", "").replace("日本語", "")] * 5, trainer)
    tokenizer.add_tokens([".\n\n"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def build_fallback(at_start: str) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback: "▁" for a space starts a token.

    Args:
        at_start: "stripped" as in Llama 2, where encoding adds a space before the text and decoding removes it;
            "kept" as in Gemma.
    """
    pieces = ["<pad>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdnos.1234567890\né", "▁a", "▁1", "▁12", "12", "123", "ab", "▁▁", "\n\n", "▁▁▁▁"]
    merges = [("▁", "a"), ("▁", "1"), ("▁1", "2"), ("1", "2"), ("12", "3"), ("a", "b"), ("▁", "▁"), ("\n", "\n")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [*merges, ("▁▁", "▁▁")], byte_fallback=True, unk_token="<unk>"))
    steps: list = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if at_start == "stripped":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


BYTES = train_bytes()


STRIPPED = build_fallback("stripped")


KEPT = build_fallback("kept")
