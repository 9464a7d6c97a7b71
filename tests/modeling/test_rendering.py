"""The seam of prompt and completion: texts and token ids derived by hand, with byte-level tokenizers."""

import pytest
from tokenizers import processors
from transformers import GenerationConfig

from helpers.chat_models import CHATML, SPECIAL, SWITCH, byte_tokenizer
from tracereward.errors import InputError
from tracereward.messages import message_text
from tracereward.modeling.rendering import (
    Rendering,
    check_reasoning,
    check_rendering,
    render,
    render_prompt,
    think_marks,
    turn_end,
)
from tracereward.modeling.seam import continued, without_end_marks
from tracereward.modeling.tokenization import encode_trace, keep_tags, load_tokenizer, policy_tokenizer
from tracereward.rewards.records import Trace

THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
REASONS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHAT = Rendering(template="chat")
ASK = [{"role": "user", "content": "Why?"}]
HEAD = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def tokens(tokenizer, prompt, completion, **options):
    """Token texts of prompt and completion."""
    return tuple(map(tokenizer.convert_ids_to_tokens, encode_trace(tokenizer, prompt, completion, **options)))


def rendered(completion, tokenizer, prompt=ASK, rendering=CHAT):
    """The completion of a rendered row."""
    [row] = render([{"prompt": prompt, "completion": completion, "source": "f:1"}], tokenizer, rendering)
    return row["completion"]


@pytest.mark.parametrize("adds", [(), ("<s>", ""), ("<s>", "</s>"), ("", "</s>")])
@pytest.mark.parametrize("text", ["ab", "<s>ab", "<s><s>ab"])
def test_bos_once_and_no_end_behind_a_prompt(adds, text):
    """Whoever writes it, the tokenizer or the text; a completion has neither, and one end."""
    tokenizer = byte_tokenizer(adds=adds, bos_token="<s>", eos_token="</s>")
    begins = "<s>" in adds or text.startswith("<s>")
    assert tokens(tokenizer, text, "c") == (["<s>"] * begins + ["a", "b"], ["c", "</s>"])
    assert tokens(tokenizer, text, "c", finished=False)[1] == ["c"]


def test_other_tokens_before_every_text_stand_once_too():
    """Some tokenizers add two, none of them called the beginning of a sequence, and their templates write them."""
    tokenizer = byte_tokenizer(special=(*SPECIAL, "[gMASK]", "<sop>"))
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[gMASK]", "<sop>")]
    added = processors.TemplateProcessing("[gMASK] <sop> $A", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = added
    for text in ("ab", "[gMASK]<sop>ab"):
        assert tokens(tokenizer, text, "c")[0] == ["[gMASK]", "<sop>", "a", "b"]


@pytest.mark.parametrize(
    "mark",
    ["<|im_end|>", "</s>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<stop>", "</s><pad><pad>", "<|im_end|>\n"],
)
def test_end_marks_are_the_end(mark):
    """``<stop>`` is known from the tokenizer alone."""
    tokenizer = byte_tokenizer()
    assert tokens(tokenizer, "p", f"42{mark}", finished=False)[1] == ["4", "2", "<|im_end|>"]


def test_other_marks_are_text():
    """In the middle, padding without an end, and what a text itself opened."""
    tokenizer = byte_tokenizer()
    for text in ("a<|im_start|>b", "a<|im_end|> b", "a<pad>", "strike <s>out</s>"):
        assert "".join(tokens(tokenizer, "p", text, finished=False)[1]).replace("Ġ", " ") == text
    assert without_end_marks("4</s>\n<|im_end|> ") == ("4", True)
    assert without_end_marks("4 ") == ("4 ", False)


@pytest.mark.parametrize(
    ("prompt", "completion", "rest"),
    [
        ("?<think>\n", "<think>\n6 * 7", "6 * 7"),
        ("?<think>\n", "<think>6 * 7", "6 * 7"),
        ("?<think>", "<think>\n6 * 7", "\n6 * 7"),
        ("?<think>\n", "6 * 7</think>", "6 * 7</think>"),
        ("?[THINK]", "[THINK]a", "a"),
        ("?<think>\n\n</think>\n\n", "<think>\n\n</think>\n\na", "a"),
        ("?<think>\n\n</think>\n\n", "<think>a", "<think>a"),
        ("?", "<think>a", "<think>a"),
        ("<b>?", "<b>?", "<b>?"),
        (HEAD, "<|im_start|>assistant\n42", "42"),
        (f"{HEAD}<think>\n", "<|im_start|>assistant\n<think>\n42", "42"),
        (
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n4",
            "4",
        ),
        ("<start_of_turn>model\n", "42<start_of_turn>model\n", "42<start_of_turn>model\n"),
    ],
)
def test_what_the_prompt_opened_is_not_opened_again(prompt, completion, rest):
    assert continued(prompt, completion) == rest
    assert Trace(where="f:1", prompt=prompt, completion=completion).completion == rest


def test_steps_move_with_the_text():
    trace = Trace(where="f:1", prompt="<think>\n", completion="<think>\nab\ncd</s>", spans=[(0, 10), (11, 17)])
    assert (trace.completion, trace.spans, trace.finished) == ("ab\ncd", [(0, 2), (3, 5)], True)
    with pytest.raises(InputError, match="f:1: a step is only what its prompt already opened"):
        Trace(where="f:1", prompt="<think>\n", completion="<think>\nab", spans=[(0, 7), (8, 10)])


def test_an_assistant_message_at_the_end_is_continued():
    tokenizer, begun = byte_tokenizer(CHATML), {"role": "assistant", "content": "6 * 7 ="}
    assert render_prompt(tokenizer, ASK, CHAT, "f:1") == HEAD
    assert render_prompt(tokenizer, [*ASK, begun], CHAT, "f:1") == f"{HEAD}6 * 7 ="
    ended = {**begun, "content": "6 * 7 =<|im_end|>\n"}
    closed = f"{HEAD}6 * 7 =<|im_end|>\n"
    assert render_prompt(tokenizer, [*ASK, ended, *ASK], CHAT, "f:1") == closed + HEAD
    assert render_prompt(tokenizer, [*ASK, begun, *ASK], CHAT, "f:1") == closed + HEAD


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<think>\n6 * 7\n</think>\n\n42"),
        (THINKS, "6 * 7\n</think>\n\n42"),
        (REASONS, "<think>6 * 7</think>42"),
    ],
)
def test_reasoning_is_a_part_of_the_trace(template, expected, name):
    """Between the marks that the template itself writes, the first of which the prompt may have."""
    message = {"role": "assistant", "content": "42", name: "6 * 7"}
    assert rendered([message], byte_tokenizer(template)) == expected


def test_nothing_in_a_message_is_dropped():
    tokenizer = byte_tokenizer(CHATML)
    said = {"role": "assistant", "content": "4", "reasoning": "a"}
    for change, problem in (
        ({"thinking": "b"}, "reasoning and thinking differ"),
        ({"reasoning": 3}, "reasoning is int, not text"),
        ({"tool_calls": [{"id": "x"}]}, "tool_calls of a message is not read"),
        ({"content": [{"type": "image"}]}, "part of type 'image'"),
    ):
        with pytest.raises(InputError, match=f"f:1: .*{problem}"):
            rendered([{**said, **change}], tokenizer)
    with pytest.raises(InputError, match="f:1: reasoning of a message is not read by the chat template"):
        rendered("42", tokenizer, [*ASK, said, *ASK])
    assert "<think>a</think>4" in render_prompt(byte_tokenizer(REASONS), [*ASK, said, *ASK], CHAT, "f:1")
    of_parts = byte_tokenizer(
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="f:1: the chat template leaves out the user's message"):
        render_prompt(of_parts, ASK, CHAT, "f:1")
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    assert rendered([{"role": "assistant", "content": parts}], tokenizer) == "42"
    assert message_text({"content": None, "reasoning": "cut off"}) == "<think>\ncut off"


def test_a_rendered_prompt_is_not_rendered_again():
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(InputError, match=r"f:1: the prompt is rendered already, .*: give the question alone"):
        render_prompt(tokenizer, HEAD, CHAT, "f:1")
    assert render_prompt(tokenizer, HEAD, Rendering(), "f:1") == HEAD
    for header in ("<|start_header_id|>assistant<|end_header_id|>", "<start_of_turn>model", "[/INST]", "<|assistant|>"):
        with pytest.raises(InputError, match=r"f:1: the prompt is rendered already, it ends with"):
            render_prompt(tokenizer, f"<s>2 + 2{header}\n", CHAT, "f:1")
    assert "What does [/INST] mean?" in render_prompt(tokenizer, "What does [/INST] mean?", CHAT, "f:1")


def test_template_variables():
    """They reach the template; one that it does not read, and those that are not its variables, are refused."""
    tokenizer, off = byte_tokenizer(SWITCH), {"enable_thinking": False}
    quiet = Rendering(template="chat", chat_template_kwargs=off)
    assert render_prompt(tokenizer, ASK, quiet, "f:1") == f"{HEAD}<think>\n\n</think>\n\n"
    assert render_prompt(tokenizer, ASK, CHAT, "f:1") == HEAD
    with pytest.raises(InputError, match="does not read enable_thinking; remove it"):
        check_rendering(byte_tokenizer(CHATML), quiet)
    for kwargs, problem in (
        ({"tokenize": True}, "tokenize is no variable"),
        ({"strftime_now": "x"}, "strftime_now is no variable"),
        ({"a": {1, 2}}, "must be values of JSON"),
        ("text", "must map names to values"),
    ):
        with pytest.raises(InputError, match=problem):
            Rendering(template="chat", chat_template_kwargs=kwargs)
    with pytest.raises(InputError, match="need --template chat"):
        Rendering(chat_template_kwargs=off)
    rows = [{"prompt": f"{HEAD}<think>\n\n</think>\n\n", "completion": "<think>\na", "source": "f:1"}]
    with pytest.raises(InputError, match=r"f:1: the completion opens the reasoning .* has closed"):
        check_reasoning(rows, tokenizer, quiet)


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("%d %b %Y", "26 Jul 2024"),
        ("%Y-%m-%d %H:%M:%S", "2024-07-26 00:00:00"),
        ("%-d. %B, %A 100%%", "26. July, Friday 100%"),
    ],
)
def test_the_clock_of_a_template_stands_still(form, written):
    tokenizer = byte_tokenizer(f"{{{{ strftime_now('{form}') }}}}|{CHATML}")
    assert render_prompt(tokenizer, ASK, CHAT, "f:1") == f"{written}|{HEAD}"
    later = render_prompt(tokenizer, ASK, Rendering(template="chat", date="2031-05-09"), "f:1")
    assert later != f"{written}|{HEAD}"
    assert later.endswith(HEAD)


def test_reasoning_tags_are_tokens_of_the_trace(tmp_path):
    """As special tokens they were spelled out in experts and dropped from the text of rollouts."""
    special = (*SPECIAL, "<think>", "</think>", "[THINK]", "<fim>")
    tokenizer = byte_tokenizer(CHATML, special=special, extra_special_tokens=["<think>"])
    assert len(tokens(tokenizer, "p", "<think>a</think>b")[1]) == len("<think>a</think>b") + 1
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path))
    trace = ["<think>", "a", "</think>", "b", "<|im_end|>"]
    assert tokens(found, "p", "<think>a</think>b")[1] == trace
    assert found.decode(found.convert_tokens_to_ids(trace), skip_special_tokens=True) == "<think>a</think>b"
    assert tokens(found, "p", "[THINK]<fim>b", finished=False)[1] == ["[THINK]", *"<fim>b"]
    assert found.get_vocab() == tokenizer.get_vocab()


def test_marks_of_the_template_are_tokens_of_the_trace():
    """What the template writes around the reasoning, whatever it is called."""
    template = REASONS.replace("<think>", "<|channel|>").replace("</think>", "<|message|>")
    tokenizer = byte_tokenizer(template, special=(*SPECIAL, "<|channel|>", "<|message|>"))
    assert think_marks(tokenizer, CHAT) == ("<|channel|>", "<|message|>")
    keep_tags(tokenizer)
    message = {"role": "assistant", "content": "b", "reasoning": "a"}
    assert tokens(tokenizer, HEAD, rendered([message], tokenizer))[1] == [
        *["<|channel|>", "a", "<|message|>", "b", "<|im_end|>"]
    ]


def test_experts_end_as_the_policy_does(tmp_path):
    """A tokenizer may name another end than the one that its chat template and generation config have."""
    tokenizer = byte_tokenizer(GEMMA, eos_token="</s>", bos_token="<s>")
    assert turn_end(tokenizer, CHAT) == "<end_of_turn>"
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<end_of_turn>"])
    tokenizer.save_pretrained(tmp_path)
    for declared, template, expected in (
        (ends, "chat", "<end_of_turn>"),
        (ends, "plain", "</s>"),
        (ends[0], "chat", "</s>"),
    ):
        GenerationConfig(eos_token_id=declared).save_pretrained(tmp_path)
        found = policy_tokenizer(str(tmp_path), Rendering(template=template))
        assert tokens(found, "p", "a")[1] == ["a", expected]
