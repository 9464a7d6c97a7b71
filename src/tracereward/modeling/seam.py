"""The seam of prompt and completion, as text: end marks, and what stands on both sides of it.

A completion that came from another tool may carry the mark that ended it (``<|im_end|>``, ``</s>``), or repeat what the
prompt already opened (``<think>``). Rollouts have neither: the end is a token, and the policy goes on from the prompt.
"""

import re

END_MARKS = (
    "</s>",
    "<eos>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_text>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eos|>",
    "<|EOT|>",
    "<|end|>",
    "<|return|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<|END_OF_TURN_TOKEN|>",
    "<|role_end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
"""Texts of the tokens by which well-known models end a turn or a text."""
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")
"""Texts of padding tokens, which other tools leave behind an end mark."""
_TURN = r"(?:<\|[^<>|\s]{1,40}\|>|<start_of_turn>)\w+(?:<\|[^<>|\s]{1,40}\|>)?"
"""The header of a turn, as chat templates write it: ``<|im_start|>assistant``."""
_TAG = r"(?:<[^<>\s]{1,40}>|\[/?[A-Z][A-Z_]{1,20}\]|◁/?[a-z]{1,20}▷)"


def without_end_marks(text: str, *marks: str) -> tuple[str, bool]:
    """A completion without the end marks at its end, and whether it had any.

    All that stand together at the end are taken off, with the white space and the padding behind them. A mark elsewhere
    is ordinary text, as is a ``</s>`` that closes a ``<s>`` of the text.

    Args:
        text: the completion.
        *marks: further marks than `END_MARKS`, such as the tokenizer's end-of-sequence token.
    """
    had = False
    while True:
        bare = text.rstrip()
        while pad := next((pad for pad in PADS if bare.endswith(pad)), None):
            bare = bare.removesuffix(pad).rstrip()
        mark = next((mark for mark in (*END_MARKS, *marks) if mark and bare.endswith(mark)), None)
        closes = mark == "</s>" and bare.find("<s>") > 0 and bare.count("<s>") == bare.count("</s>")
        if mark is None or closes:
            return text, had
        text, had = bare.removesuffix(mark), True


def continued(prompt: str, completion: str) -> str:
    """A completion as the text that follows its prompt: tags that the prompt ends with are not written again.

    The header of the assistant's turn (``<|im_start|>assistant``) is left out if the prompt ends with it.

    If the prompt ends with a tag, such as the ``<think>`` of a chat template that opens the reasoning, and the
    completion starts with the same, it goes on behind it. White space after the tag that the prompt has too is also
    left out. Several tags (``<think>\\n\\n</think>``, closed at once) are compared as a sequence.

    Args:
        prompt: rendered.
        completion: the text.
    """
    turn = re.search(rf"({_TURN})\s*(?:{_TAG}\s*)*\Z", prompt)
    if turn is not None and completion.lstrip().startswith(turn[1]):
        completion = completion.lstrip().removeprefix(turn[1]).lstrip()
    run = re.search(rf"(?:{_TAG}\s*)+\Z", prompt)
    if run is None:
        return completion
    ahead = re.findall(_TAG, run[0])
    for count in range(len(ahead), 0, -1):
        same = re.match(r"\s*" + r"\s*".join(map(re.escape, ahead[-count:])), completion)
        if same is not None:
            space = prompt[len(prompt.rstrip()) :]
            rest = completion[same.end() :]
            if rest.startswith(space):
                return rest[len(space) :]
            return rest.lstrip() if space else rest
    return completion
