"""Byte-level tokenizers with chat templates, and tiny models of them."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tracereward.modeling.tokenization import pad_id

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCH = CHATML.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif",
)
"""As Qwen3's: with ``enable_thinking`` false the reasoning is opened and closed in the prompt."""
_TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
_STRIPPED = "{{ m['content'].split('</think>')[-1].lstrip() if m['role'] == 'assistant' else m['content'] }}"
_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
OPENS = f"{_TURNS}{_STRIPPED}{_END}<think>\n{{% endif %}}"
"""As the distillations of DeepSeek-R1: earlier turns lose their thinking, and the prompt opens the next one."""
LATEST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last "
    "and m['reasoning_content'] %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}"
    f"{_STRIPPED}{_END}{{% if enable_thinking is defined and not enable_thinking %}}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""As Qwen3's: the last turn keeps its thinking, and ``enable_thinking`` false closes it in the prompt."""
CHANNELS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% if m['thinking'] and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m['thinking'] }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|return|>"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""As gpt-oss: thinking and answer are channels."""
FLAGGED = (
    "{% set off = messages[0]['role'] == 'system' and '/no_think' in messages[0]['content'] %}"
    f"{_TURNS}{{{{ m['content'] }}}}{_END}{{% if off %}}<think>\n\n</think>\n\n{{% endif %}}{{% endif %}}"
)
"""As SmolLM3's: a word of the system's message closes the thinking in the prompt."""
DATED = f"<s>{{{{ strftime_now('%d %b %Y') }}}}\n{_TURNS}{{{{ m['content'] }}}}{_END}{{% endif %}}"
"""As Llama 3.2's: the template writes the day."""
MODEL = (
    "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""As Gemma 3's: the assistant's role has another name."""
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
        eos_token_id=tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token)),
        pad_token_id=pad_id(tokenizer),
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
