"""Byte-level tokenizers with chat templates, and tiny models of them."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCH = CHATML.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif",
)
"""As Qwen3's: with ``enable_thinking`` false the reasoning is opened and closed in the prompt."""
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<stop>")


def byte_tokenizer(
    template: str | None = None, adds: tuple[str, ...] = (), special: tuple[str, ...] = SPECIAL, **names: object
) -> PreTrainedTokenizerFast:
    """One token a byte; `adds` are the tokens added before and behind every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if adds:
        before, after = adds
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{before} $A {after}".strip(),
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in adds if name],
        )
    names = {"pad_token": "<pad>", "eos_token": "<|im_end|>", **names}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def save_chat_model(folder: Path, template: str | None, special: tuple[str, ...] = SPECIAL) -> str:
    """Save a tiny random Llama with a `byte_tokenizer`."""
    tokenizer = byte_tokenizer(template, special=special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
