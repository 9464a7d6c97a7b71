"""A scorer with scripted rewards, and a tiny policy with a tokenizer of few words."""

import math
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model

PAD, EOS, END, A, B, C = range(6)


WORDS = ["<pad>", "<eos>", "\n", "a", "b", "c"]


def word_tokenizer(words: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(WORDS, r"[abc\n]")


@pytest.fixture(scope="module")
def policy(words):
    """A policy far from uniform that never samples padding, so padding in `generate` output is real padding."""
    model = build_model(words, seed=3, hidden_size=16, layers=1, heads=2).eval()
    with torch.no_grad():
        model.lm_head.weight *= 12
    never_pads(model)
    return model


def never_pads(model) -> None:
    """Give the LM head a bias that leaves the padding token no probability."""
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[PAD] = -1e4
    model.lm_head = head


class Scripted(Scorer):
    """The reward of a token is a function of the text up to it."""

    max_positions = math.inf
    token_budget = 1

    def __init__(self, tokenizer, value, aggregate="mean"):
        self.tokenizer, self.value = tokenizer, value
        self.settings = RewardSettings(aggregate=aggregate)

    def compute_rewards(self, prompts, completions, options):
        return [
            torch.tensor([self.value([*prompt, *ids[: t + 1]]) for t in range(len(ids))], dtype=torch.float32)
            for prompt, ids in zip(prompts, completions, strict=True)
        ]
