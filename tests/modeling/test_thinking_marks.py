"""Chat templates of thinking models: the same text in training, sampling, scoring and serving, and where it is cut."""

import pytest

from helpers.chat_models import CHANNELS, CHATML, DATED, FLAGGED, LATEST, MODEL, OPENS, byte_tokenizer
from tracereward.errors import InputError
from tracereward.modeling.rendering import Rendering, completion_text, render, render_prompt
from tracereward.modeling.thinking_marks import check_thinking, thinking_of, thinking_of_template
from tracereward.modeling.tokenization import encode_trace
from tracereward.rewards.parts import stored
from tracereward.rewards.settings import RewardSettings
from tracereward.thinking import MARKS

EARLIER = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nhard\n</think>\n\n2"},
    {"role": "user", "content": "2 + 1?"},
]
ANSWER = [{"role": "assistant", "content": "#### 3", "reasoning_content": "#### 4?"}]
OFF = {"enable_thinking": False}
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
CHANNEL_MARKS = ("<|channel|>analysis<|message|>", FINAL)


@pytest.mark.parametrize(
    ("template", "kwargs", "opened", "marks", "said"),
    [
        (OPENS, {}, True, MARKS, "#### 4?\n</think>\n\n#### 3"),
        (LATEST, {}, False, MARKS, "<think>\n#### 4?\n</think>\n\n#### 3"),
        (CHANNELS, {}, False, (CHANNEL_MARKS,), f"{CHANNEL_MARKS[0]}#### 4?{FINAL}#### 3"),
        (FLAGGED, {}, False, MARKS, "<think>\n#### 4?\n</think>\n\n#### 3"),
        (DATED, {}, False, MARKS, "<think>\n#### 4?\n</think>\n\n#### 3"),
        (MODEL, {}, False, MARKS, "<think>\n#### 4?\n</think>\n\n#### 3"),
        (CHATML, {}, False, MARKS, "<think>\n#### 4?\n</think>\n\n#### 3"),
    ],
    ids=["r1", "qwen", "channels", "smollm", "llama", "gemma", "chatml"],
)
def test_one_text_and_one_cut_for_each_template(template, kwargs, opened, marks, said):
    """What the policy reads and writes in sampling is what a demonstration and a scored trace become."""
    tokenizer, how = byte_tokenizer(template), Rendering(template="chat", chat_template_kwargs=kwargs)
    row = {"prompt": EARLIER, "completion": ANSWER, "source": "f:1"}
    [demonstration] = render([row], tokenizer, how)
    sampled_from = render_prompt(tokenizer, EARLIER, how, "f:1")
    assert demonstration["prompt"] == sampled_from
    assert demonstration["completion"] == said
    scored = encode_trace(tokenizer, sampled_from, completion_text(tokenizer, ANSWER, how, "f:1"))
    assert scored == encode_trace(tokenizer, sampled_from, said)  # what the prompt opened is not opened again

    found = thinking_of(tokenizer, how, [demonstration])
    assert (found.opened, found.marks) == (opened, marks)
    assert thinking_of_template(tokenizer, how) == found
    assert found.answer(said) == "#### 3"
    assert found.answer(said.partition("#### 3")[0].partition("</think>")[0].partition("<|end|>")[0]) is None
    assert RewardSettings(**stored(found)).thinking == found
    check_thinking([demonstration], found, [EARLIER], 0.5)


def test_thinking_that_the_template_closes_in_the_prompt():
    tokenizer, off = byte_tokenizer(LATEST), Rendering(template="chat", chat_template_kwargs=OFF)
    prompt = render_prompt(tokenizer, EARLIER, off, "f:1")
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert "hard" not in prompt  # earlier turns have lost their thinking
    found = thinking_of(tokenizer, off, [{"prompt": prompt}])
    assert not found.opened
    assert found.answer("#### 3") == "#### 3"


def test_prompts_that_open_the_thinking_are_all_or_none():
    tokenizer, rows = (
        byte_tokenizer(None),
        [
            {"prompt": "a<think>\n", "completion": "b</think>c", "source": "f:1"},
            {"prompt": "a", "completion": "<think>b</think>c", "source": "f:2"},
        ],
    )
    found = thinking_of(tokenizer, Rendering(), rows)
    with pytest.raises(InputError, match="f:1: prompt: it ends within the thinking, and that of f:2 does not"):
        check_thinking(rows, found, ["", ""], 0.5)
    check_thinking(rows, found, ["", ""], None)
    with pytest.raises(InputError, match="none of 1 demonstrations has thinking"):
        check_thinking([{**rows[1], "completion": "c"}], found, [""], 0.5)
    with pytest.raises(InputError, match="think_marks must be two texts"):
        thinking_of(tokenizer, Rendering(), rows, ["<a>"])
