"""Synthetic worlds: generated, seeded problems with worked traces, small enough to train a model on a CPU.

A problem is a chain of operations evaluated from left to right (no precedence)::

    prompt      "23 - 7 + 5 = ?\\n"
    completion  "23 - 7 = 16\\n16 + 5 = 21\\n#### 21"
    answer      "21"

``hops`` has memorised facts instead of sums. The worlds share one vocabulary; each is a module in this folder that
documents its problems and traces: ``misconception``, ``checked``, ``exposure``, ``hops``, ``terse``, ``style`` and
``multi-skill``. ``word-problems`` is for a pretrained language model and its tokenizer.
"""

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tracereward.errors import InputError, check_choice
from tracereward.synthetic import checked, exposure, hops, misconception, multi_skill, style, terse, word_problems
from tracereward.synthetic.chains import LARGEST

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORLDS: dict[str, Callable[[random.Random, float], dict]] = {
    "misconception": misconception.sample,
    "checked": checked.sample,
    "exposure": exposure.sample,
    "hops": hops.sample,
    "terse": terse.sample,
    "style": style.sample,
    "multi-skill": multi_skill.sample,
    "word-problems": word_problems.sample,
}
_UNSEEN: dict[str, Callable[[random.Random, float], dict]] = {"word-problems": word_problems.sample_unseen}
"""Source of a quarter of the test questions: templates that no other split uses."""
MISTAKE_RATES = {
    "misconception": misconception.MISTAKE_RATE,
    "checked": checked.MISTAKE_RATE,
    "exposure": exposure.MISTAKE_RATE,
    "hops": hops.MISTAKE_RATE,
    "terse": terse.MISTAKE_RATE,
}
"""Mistake rate of each world whose pretraining corpus has mistakes; the policy learns them as the most likely."""
_TEST_SEED = 20_261
_TRIES = 20_000
"""Consecutive duplicate prompts after which a world counts as exhausted."""


def generate(
    world: str,
    n: int,
    seed: int,
    *,
    mistake_rate: float = 0.0,
    exclude: Iterable[str] = (),
    unique: bool = True,
    unseen: bool = False,
) -> list[dict]:
    """Sample `n` problems.

    Args:
        world: one of `WORLDS`.
        n: number of rows.
        seed: the same seed gives the same rows.
        mistake_rate: worlds of `MISTAKE_RATES` only: probability of a mistake in an affected line. A pretraining corpus
            uses the world's own rate and ``unique=False``.
        exclude: prompts that must not appear.
        unique: whether prompts must be distinct.
        unseen: use the templates reserved for the test split; ``word-problems`` only.

    Returns:
        Rows ``{"prompt", "completion", "answer"}``; the answer is the correct one even if the completion is wrong.

    Raises:
        InputError: unknown world, a mistake rate outside 0..1 or in another world, or more rows than the world has.
    """
    sample = (_UNSEEN if unseen else WORLDS)[check_choice("world", world, WORLDS)]
    if mistake_rate and world not in MISTAKE_RATES:
        known = ", ".join(MISTAKE_RATES)
        raise InputError(f"mistake_rate is for the worlds {known}: traces of {world} are always correct")
    if not 0 <= mistake_rate <= 1:
        raise InputError(f"mistake_rate is {mistake_rate}, not a probability from 0 to 1")
    rng = random.Random(seed)
    seen = set(exclude)
    rows: list[dict] = []
    rejected = 0
    while len(rows) < n:
        row = sample(rng, mistake_rate)
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
    world: str, seed: int, n_experts: int, *, n_validation: int = 200, n_test: int = 300, n_unlabeled: int = 3000
) -> dict[str, list[dict]]:
    """Disjoint splits of problems.

    The test split depends on `n_test` only, so that all seeds and numbers of experts are evaluated on the same
    questions. If the world has templates reserved for it, a quarter of the rows uses them and has a field ``unseen``.

    Returns:
        ``experts``, ``validation`` and ``test`` rows, and ``unlabeled`` rows, whose completion is None (their answer is
        kept for controls that train on a verifier). No prompt is in two splits.

    Raises:
        InputError: unknown world, or more rows than it has.
    """
    sizes = {"experts": n_experts, "validation": n_validation, "unlabeled": n_unlabeled}
    unseen = n_test // 4 if world in _UNSEEN else 0
    rows_of = {"test": generate(world, n_test - unseen, _TEST_SEED)}
    if unseen:
        rows_of["test"] += [{**row, "unseen": True} for row in generate(world, unseen, _TEST_SEED, unseen=True)]
    used = {row["prompt"] for row in rows_of["test"]}
    rows = generate(world, sum(sizes.values()), seed, exclude=used)
    start = 0
    for name, size in sizes.items():
        rows_of[name] = rows[start : start + size]
        start += size
    rows_of["unlabeled"] = [{**row, "completion": None} for row in rows_of["unlabeled"]]
    return rows_of


def build_tokenizer(digits: bool = False) -> "PreTrainedTokenizerFast":
    """Word-level tokenizer of all worlds; a number, an operator with its spaces, ``#### `` or a newline is one token.

    With `digits`, each digit of a number is a token.

    Encoding adds no special tokens, and ``decode(encode(text)) == text`` for every text of the worlds. A number over
    `LARGEST` or any other text becomes ``<unk>``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = map(str, range(10 if digits else LARGEST + 1))
    words = ["<pad>", "<eos>", "<unk>", "\n", "#### ", " = ", " + ", " - ", " * ", "?", *numbers]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" [=+*-] |#### |\n|\?|\d" + ("" if digits else "+")), behavior="isolated"
    )
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
    tokenizer: "PreTrainedTokenizerFast", seed: int, *, hidden_size: int = 64, layers: int = 2, heads: int = 4
) -> "LlamaForCausalLM":
    """Untrained Llama for the arithmetic worlds (113 thousand parameters), on the CPU in float32.

    The same seed gives the same weights; torch's global random state is not changed.
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
        max_position_embeddings=128,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
