"""What a model's generation_config.json recommends has no part in a call, except its end tokens, unless asked for."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers.scripted_policy import Scripted
from helpers.trainers import build_trainer
from tracereward.cli.app import app
from tracereward.errors import InputError
from tracereward.generation.continuation import OpenTrace, extend
from tracereward.generation.guide import Guide
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import generate, sample
from tracereward.generation.settings import NEUTRAL, recommended, recommended_options
from tracereward.modeling.tokenization import encode_prompt
from tracereward.training.validation import Validation

GREEDY = SamplingParams(max_new_tokens=10, temperature=0.0)
RECOMMENDED = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_p": 0.9,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.02,
    "suppress_tokens": [5, 6, 7, 8, 9],
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.3,
    "min_new_tokens": 8,
    "bad_words_ids": [[8], [9]],
    "forced_eos_token_id": 10,
    "stop_strings": ["1", "2", "3", "="],
    "max_time": 1e-9,
}


@pytest.fixture
def prompts(experts):
    return [row["prompt"] for row in experts[:6]]


@pytest.fixture
def load(tiny_model_folder, tmp_path):
    """The same weights with and without recommendations in generation_config.json."""

    def build(**settings):
        folder = tmp_path / "policy"
        shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)
        own = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**own, "do_sample": True, **settings}))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return build


@torch.no_grad()
def argmax(model, tokenizer, prompt, count):
    ids, found = encode_prompt(tokenizer, prompt), []
    while len(found) < count and tokenizer.eos_token_id not in found:
        found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


@torch.no_grad()
def test_greedy_decoding_is_argmax_and_samples_are_the_policys(load, tokenizer, prompts):
    plain, other = load(), load(**RECOMMENDED)
    assert recommended(other.generation_config) == RECOMMENDED
    expected = [argmax(plain, tokenizer, prompt, 10) for prompt in prompts]
    assert generate(other, tokenizer, prompts, GREEDY) == expected
    rows = [OpenTrace(encode_prompt(tokenizer, prompt), [], "", 10) for prompt in prompts]
    assert [found.ids for found in extend(other, tokenizer, rows, temperature=0.0)] == expected
    rows = [OpenTrace(encode_prompt(tokenizer, prompt), [], prompt, 10) for prompt in prompts]
    assert extend(other, tokenizer, rows) == extend(plain, tokenizer, rows)
    params = SamplingParams(max_new_tokens=10, temperature=1.3, top_p=0.9)
    same = [[s.ids for s in next(sample(model, tokenizer, prompts, params, n=3))] for model in (plain, other)]
    assert same[0] == same[1]
    wrapped = get_peft_model(load(**RECOMMENDED), LoraConfig(r=1, task_type="CAUSAL_LM"))
    assert generate(wrapped, tokenizer, prompts, GREEDY) == expected
    assert recommended(wrapped.get_base_model().generation_config) == RECOMMENDED, "saved with the model as before"


def test_validation_counts_greedy_answers_of_the_policy_itself(load, tokenizer, prompts):
    plain, other = load(), load(**RECOMMENDED)
    seen = []

    class Task:
        def verify(self, text, gold):
            seen.append(text)
            return True

    for model in (plain, other):
        Validation(
            prompts=prompts,
            answers=[""] * 6,
            completions=[None] * 6,
            task=Task(),
            tokenizer=tokenizer,
            max_new_tokens=10,
            batch_size=4,
        ).accuracy(model)
    assert seen[:6] == seen[6:]


def test_end_tokens_of_the_file_still_end_a_trace(load, tokenizer, prompts):
    plain = load()
    first = [argmax(plain, tokenizer, prompt, 10) for prompt in prompts]
    end = first[0][3]
    model = load(eos_token_id=[end])
    for found, expected in zip(generate(model, tokenizer, prompts, GREEDY), first, strict=True):
        assert found == (expected[: expected.index(end) + 1] if end in expected else expected)


def test_rollouts_of_training_do_not_use_the_file(load, tokenizer, experts, tmp_path, tiny_model_folder):
    """TRL sets some options and leaves the others to the file; the warm-up's other model has a file too."""

    def rollouts(name, **settings):
        load(**settings)
        trainer = build_trainer(
            tmp_path / "policy", tokenizer, experts, tmp_path / name, warmup_model=str(tmp_path / "policy")
        )
        trainer.train()
        return [rollout.ids for rollout in trainer.discriminator.replay.rollouts]

    plain = rollouts("plain")
    assert rollouts("other", **RECOMMENDED) == plain
    assert len({tuple(ids) for ids in plain}) > 8


def test_rollouts_follow_what_the_run_asks_for(tiny_model_folder, tokenizer, experts, tmp_path):
    """Also those of the warm-up's other model: top_k 1 leaves one rollout a prompt."""
    trainer = build_trainer(
        tiny_model_folder, tokenizer, experts, tmp_path, warmup_model=str(tiny_model_folder), top_k=1, max_steps=1
    )
    trainer.train()
    found = {}
    for rollout in trainer.discriminator.replay.rollouts:
        found.setdefault(rollout.demonstration, set()).add(tuple(rollout.ids))
    assert {len(group) for group in found.values()} == {1}


def test_recommendations_are_used_when_asked_for(load, tokenizer, prompts, tmp_path, capsys):
    model = load(repetition_penalty=1.5, top_k=1, temperature=0.3)
    options = recommended_options(str(tmp_path / "policy"), {})
    assert options == {"temperature": 0.3, "settings": {"repetition_penalty": 1.5, "top_k": 1}}
    assert "repetition_penalty 1.5" in capsys.readouterr().err
    params = SamplingParams(max_new_tokens=10, **options)
    config = GenerationConfig(
        do_sample=False, repetition_penalty=1.5, max_new_tokens=10, eos_token_id=1, pad_token_id=0
    )
    assert recommended_options(str(tmp_path / "policy"), {"temperature": 0})["settings"] == {"repetition_penalty": 1.5}
    for prompt, found in zip(prompts, generate(model, tokenizer, prompts, params), strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        expected = load().generate(ids, generation_config=config)[0, ids.size(1) :].tolist()
        assert found == expected[: len(found)]
    load(temperature=0.3, top_p=0.5, repetition_penalty=1.5)
    given = {"temperature": 0.7}  # which wins
    expected = {"top_p": 0.5, "settings": {"repetition_penalty": 1.5}}
    assert recommended_options(str(tmp_path / "policy"), given) == expected
    for name, value in {"num_beams": 4, "stop_strings": ["#"], "max_time": 2.0}.items():
        load(**{name: value})
        with pytest.raises(InputError, match=f"asks for {name}"):
            recommended_options(str(tmp_path / "policy"), {})
    (tmp_path / "policy" / "generation_config.json").unlink()
    with pytest.raises(InputError, match="no generation_config"):
        recommended_options(str(tmp_path / "policy"), {})


def test_neutral_settings_recommend_nothing():
    assert recommended(GenerationConfig(**NEUTRAL, eos_token_id=3, max_length=20)) == {}


def test_guided_decoding_refuses_settings_that_it_does_not_apply(load, tokenizer):
    with pytest.raises(InputError, match="top_k"):
        Guide(load(), tokenizer, Scripted(tokenizer, lambda _: 0.0), SamplingParams(settings={"top_k": 5}))


def test_every_setting_of_generate_is_sorted():
    """A setting of a newer transformers must be put into a table, or what it changes would not be said."""
    ours = {"eos_token_id", "pad_token_id", "do_sample", "max_new_tokens", "max_length", "num_return_sequences"}
    only_with_beams = {"num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "low_memory"}
    same_tokens = {
        name
        for name in GenerationConfig().to_dict()
        if name.startswith(
            ("assistant_", "num_assistant", "output_", "cache_", "max_cache", "_", "return_", "prompt_l")
        )
    } | {
        "bos_token_id",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "is_assistant",
        "max_matching_ngram_size",
        "prefill_chunk_size",
        "remove_invalid_values",
        "renormalize_logits",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    }
    assert GenerationConfig().to_dict().keys() <= {*NEUTRAL, *ours, *only_with_beams, *same_tokens}


@pytest.mark.parametrize("asked", [False, True])
def test_command_says_what_it_ignores_or_uses(load, experts, tmp_path, capsys, asked):
    load(top_k=1, repetition_penalty=1.01)
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"prompt": experts[0]["prompt"]}) + "\n")
    words = ["sample", str(tmp_path / "policy"), "--data", str(data), "-o", str(tmp_path / "out.jsonl")]
    words += ["--max-new-tokens", "64"]
    app([*words, *["--use-generation-config"] * asked], standalone_mode=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "top_k 1" in line]
    assert "repetition_penalty 1.01" in line
    texts = {json.loads(line)["completion"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}
    assert (len(texts) == 1) is asked
