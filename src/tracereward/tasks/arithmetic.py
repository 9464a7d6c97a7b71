"""Arithmetic worlds: generated, seeded problems with worked traces, small enough to train a model on a CPU.

A problem is a chain of operations worked from left to right, as on a pocket calculator (no precedence)::

    prompt      "23 - 7 + 5 = ?\\n"
    completion  "23 - 7 = 16\\n16 + 5 = 21\\n#### 21"
    answer      "21"

Two worlds share one vocabulary:

- ``misconception``: 2 or 3 additions and subtractions of 1 to 9, start 3 to 29, true running values 0 to 30. With
  ``mistake_rate`` p, a subtraction across a ten (units of the value smaller than the operand) is worked with the
  borrow dropped, ``v - k + 10``, with probability p, and the error is carried on: "13 - 5 = 18". A policy pretrained on
  such a corpus is fluent, confident and wrong by a rule.
- ``style``: 2 to 4 additions, subtractions and multiplications, values 0 to 20, always right; 60 % of the experts skip
  the working and write only ``#### n``.
"""

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tracereward.errors import InputError, check_choice

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST = 40
"""Largest number in the vocabulary: the largest value that a mistaken line of the misconception world may reach."""
SKIP_RATE = 0.6
"""Share of the style world's experts that write only the answer."""
_TEST_SEED = 20_261
_TRIES = 20_000
"""Draws in a row without a new prompt after which a world counts as used up."""

# (value, operator, operand, result as written)
Line = tuple[int, str, int, int]


def generate(
    world: str,
    n: int,
    seed: int,
    mistake_rate: float = 0.0,
    exclude: Iterable[str] = (),
    unique: bool = True,
) -> list[dict]:
    """Draw `n` problems.

    Args:
        world: ``misconception`` or ``style``.
        n: number of rows.
        seed: the same seed gives the same rows.
        mistake_rate: misconception world only: probability that an affected line drops the borrow; 0.8 with
            ``unique=False`` makes a pretraining corpus.
        exclude: prompts that must not appear.
        unique: no prompt twice.

    Returns:
        Rows ``{"prompt", "completion", "answer"}``; the answer is the true one even where the completion is mistaken.

    Raises:
        InputError: unknown world, a mistake rate outside 0..1 or in the style world, or more rows than there are.
    """
    draw = _WORLDS[check_choice("world", world, _WORLDS)]
    if mistake_rate and world == "style":
        raise InputError("mistake_rate is for the misconception world: the style world's experts are always right")
    if not 0 <= mistake_rate <= 1:
        raise InputError(f"mistake_rate is {mistake_rate}: it is a probability, 0 to 1")
    rng = random.Random(seed)
    seen = set(exclude)
    rows: list[dict] = []
    rejected = 0
    while len(rows) < n:
        row = draw(rng, mistake_rate)
        if row["prompt"] in seen:
            rejected += 1
            if rejected == _TRIES:
                raise InputError(f"world {world!r} has no more new problems after {len(rows)} of {n}: ask for fewer")
            continue
        rejected = 0
        if unique:
            seen.add(row["prompt"])
        rows.append(row)
    return rows


def splits(
    world: str, seed: int, n_experts: int, n_validation: int = 200, n_test: int = 300, n_unlabeled: int = 3000
) -> dict[str, list[dict]]:
    """Disjoint sets of problems.

    The test set depends on `n_test` only, so that all seeds and numbers of experts are measured on the same questions.

    Returns:
        ``experts``, ``validation`` and ``test`` rows, and ``unlabeled`` rows, whose completion is None (their answer is
        kept for controls that train on a verifier). No prompt is in two of them.

    Raises:
        InputError: unknown world, or more rows than it has.
    """
    sizes = {"experts": n_experts, "validation": n_validation, "unlabeled": n_unlabeled}
    parts = {"test": generate(world, n_test, _TEST_SEED)}
    used = {row["prompt"] for row in parts["test"]}
    rows = generate(world, sum(sizes.values()), seed, exclude=used)
    start = 0
    for name, size in sizes.items():
        parts[name] = rows[start : start + size]
        start += size
    parts["unlabeled"] = [{**row, "completion": None} for row in parts["unlabeled"]]
    return parts


def _misconception(rng: random.Random, mistake_rate: float) -> dict:
    """One problem of the misconception world."""
    while True:
        start = written = true = rng.randint(3, 29)
        lines: list[Line] = []
        for _ in range(rng.randint(2, 3)):
            operator, k = rng.choice("+-"), rng.randint(1, 9)
            result = _apply(written, operator, k)
            # The rule looks at the value on the page, which may already be wrong.
            if operator == "-" and written % 10 < k and rng.random() < mistake_rate:
                result += 10
            lines.append((written, operator, k, result))
            written, true = result, _apply(true, operator, k)
            if not (0 <= true <= 30 and 0 <= written <= LARGEST):
                break
        else:
            return _row(start, lines, working=True, answer=true)


def _style(rng: random.Random, mistake_rate: float) -> dict:
    """One problem of the style world; `mistake_rate` is 0 there."""
    while True:
        start = value = rng.randint(1, 9)
        lines: list[Line] = []
        for _ in range(rng.randint(2, 4)):
            operator = rng.choice("++--*")
            k = rng.randint(2, 3) if operator == "*" else rng.randint(1, 5)
            result = _apply(value, operator, k)
            lines.append((value, operator, k, result))
            value = result
            if not 0 <= value <= 20:
                break
        else:
            return _row(start, lines, working=rng.random() >= SKIP_RATE, answer=value)


_WORLDS: dict[str, Callable[[random.Random, float], dict]] = {"misconception": _misconception, "style": _style}


def _apply(value: int, operator: str, k: int) -> int:
    """Result of one operation."""
    return value + k if operator == "+" else value - k if operator == "-" else value * k


def _row(start: int, lines: list[Line], working: bool, answer: int) -> dict:
    """Text of one problem."""
    prompt = str(start) + "".join(f" {operator} {k}" for _, operator, k, _ in lines) + " = ?\n"
    steps = [f"{value} {operator} {k} = {result}" for value, operator, k, result in lines] if working else []
    return {"prompt": prompt, "completion": "\n".join([*steps, f"#### {lines[-1][3]}"]), "answer": str(answer)}


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Word-level tokenizer of both worlds; a number, an operator with its spaces, ``#### `` or a newline is one token.

    Encoding adds no special tokens, and ``decode(encode(text)) == text`` for every text of the worlds. A number over
    `LARGEST` or any other text becomes ``<unk>``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "\n", "#### ", " = ", " + ", " - ", " * ", "?", *map(str, range(LARGEST + 1))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" [=+*-] |#### |\n|\?|\d+"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: "PreTrainedTokenizerFast", seed: int, hidden_size: int = 64, layers: int = 2, heads: int = 4
) -> "LlamaForCausalLM":
    """Untrained Llama for the arithmetic worlds (113 thousand parameters), on the CPU in float32.

    The same seed gives the same weights; torch's global random state is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
