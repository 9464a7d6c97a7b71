"""The reward model against plain transformers: heads, batching, granularities, scoring of text, and files."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from tracereward.errors import InputError
from tracereward.modeling.alignment import step_ends, token_offsets
from tracereward.modeling.tokenization import encode_completion, encode_prompt, same_tokenizer
from tracereward.rewards.first_error_rules import FirstErrorRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, check_reward_model
from tracereward.rewards.supervision import supervision_mask
from tracereward.rewards.token_scores import TokenScores
from tracereward.synthetic.arithmetic import build_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def build(folder, tokenizer, head, peft=None, trained=True, **settings) -> TokenRewardModel:
    """A reward model; `trained` perturbs every trainable weight, so that zero initialisation hides no bug."""
    torch.manual_seed(0)
    settings = RewardSettings(head=head, beta_clip=settings.pop("beta_clip", 1e9), **settings)
    model = TokenRewardModel.from_backbone(str(folder), settings, tokenizer, peft, dtype=torch.float32)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(tokenizer, experts):
    """Token ids of prompts and completions of unequal lengths."""
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in experts]
    completions = [encode_completion(tokenizer, row["completion"]) for row in experts]
    completions[0] = completions[0][:3]
    assert len({len(p) for p in prompts}) > 1
    assert len({len(c) for c in completions}) > 1
    return prompts, completions


def logits_of(model, prompts, completions) -> list[torch.Tensor]:
    batch = model.pack(prompts, completions)
    with torch.no_grad():
        logits = model(batch)
    return [row[: len(completion)] for row, completion in zip(logits, completions, strict=True)]


def reference_forward(model, prompt, completion, **options):
    """One unpadded sequence through a plain transformers model."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*prompt, *completion]]), **options)


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), torch.as_tensor(b).double(), atol=tolerance, rtol=0)


# ---------- heads ----------


def test_action_head_is_initialised_to_the_log_probs_of_the_lm(tiny_model_folder, tokenizer, pairs):
    model = build(tiny_model_folder, tokenizer, "action", trained=False)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    expected = []
    for prompt, completion in zip(*pairs):
        log_probs = reference_forward(lm, prompt, completion).logits[0].double().log_softmax(-1)
        first = len(prompt)
        expected.append([float(log_probs[first + t - 1, token]) for t, token in enumerate(completion)])
    assert_close(logits_of(model, *pairs), expected)


def test_action_head_adds_a_linear_function_of_the_hidden_state(tiny_model_folder, tokenizer, pairs):
    """a * log p(y_t) + b + w . h_t, with h_t from a plain forward pass with all hidden states."""
    model = build(tiny_model_folder, tokenizer, "action", trained=False)
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(64, generator=generator)
    with torch.no_grad():
        model.head.a.fill_(0.5)
        model.head.b.fill_(-0.25)
        model.head.w.copy_(w)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    expected = []
    for prompt, completion in zip(*pairs):
        output = reference_forward(lm, prompt, completion, output_hidden_states=True)
        log_probs, hidden = output.logits[0].log_softmax(-1), output.hidden_states[-1][0]
        positions = range(len(prompt), len(prompt) + len(completion))
        expected.append(
            [0.5 * float(log_probs[p - 1, t]) - 0.25 + float(hidden[p] @ w) for p, t in zip(positions, completion)]
        )
    assert_close(logits_of(model, *pairs), expected)


def test_token_head_is_a_plain_token_classification_checkpoint(tiny_model_folder, tokenizer, pairs, tmp_path):
    """Loaded in plain transformers, its logits are v_t; as a sequence classifier it returns the last token's logit."""
    model = build(tiny_model_folder, tokenizer, "token")
    model.save_pretrained(tmp_path / "rm")
    ours = logits_of(model, *pairs)
    plain, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = [reference_forward(plain.eval(), p, c).logits[0, len(p) :, 0] for p, c in zip(*pairs)]
    assert_close(ours, expected)
    assert plain.config.num_labels == 1
    assert plain.config.classifier_dropout == 0.0

    sequence, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    rows = [[*p, *c] for p, c in zip(*pairs)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        values = sequence.eval()(**batch).logits
    assert_close([values[:, 0]], [[float(row[-1]) for row in ours]])


@pytest.mark.parametrize("head", ["token", "action"])
def test_no_randomness_in_training_mode(tiny_model_folder, tokenizer, pairs, head):
    """Dropout would make the training loss inconsistent with the scores."""
    model = build(tiny_model_folder, tokenizer, head)
    expected = logits_of(model, *pairs)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model.train(), *pairs), expected, strict=True))


# ---------- batches ----------


@pytest.mark.parametrize("head", ["token", "action"])
def test_values_do_not_depend_on_padding_or_batch(tiny_model_folder, tokenizer, pairs, head):
    model = build(tiny_model_folder, tokenizer, head)
    prompts, completions = pairs
    alone = [logits_of(model, [p], [c])[0] for p, c in zip(prompts, completions)]
    assert_close(logits_of(model, prompts, completions), alone)
    long_prompt, long_completion = prompts[0] * 3, completions[1] * 2
    for p, c, expected in zip(prompts, completions, alone):
        assert_close(logits_of(model, [p, long_prompt], [c, long_completion])[:1], [expected])


def test_values_do_not_depend_on_padding_with_absolute_positions(tokenizer, pairs, tmp_path):
    """Rotary positions are invariant to a shift by padding; learned positions, as in GPT-2, are not."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    config.initializer_range = 0.5  # so that positions matter
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = build(tmp_path / "gpt2", tokenizer, "action")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    for p, c, logits in zip(*pairs, logits_of(model, *pairs), strict=True):
        assert_close([logits], logits_of(model, [p], [c]))
    shifted = torch.tensor([[0] * 5 + [*pairs[0][0], *pairs[1][0]]])
    with torch.no_grad():
        assert (lm(shifted).logits[0, 5:] - lm(shifted[:, 5:]).logits[0]).abs().max() > 1e-2


def test_batch_by_hand(tiny_model_folder, tokenizer):
    """Prompts are padded left, completions right; positions count from each row's first token."""
    batch = build(tiny_model_folder, tokenizer, "action", granularity="step").pack([[5, 6, 7], [8]], [[9], [3, 11]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 0], [0, 0, 8, 3, 11]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.completion_mask.tolist() == [[1, 0], [1, 1]]
    assert batch.step_ends.tolist() == [[True, False], [False, True]]  # 3 is a newline, with no text before it
    assert batch.position_ids[0, :4].tolist() == [0, 1, 2, 3]
    assert batch.position_ids[1, 2:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("head", ["token", "action"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_rewards_do_not_depend_on_the_token_budget(tiny_model_folder, tokenizer, pairs, head, budget):
    model = build(tiny_model_folder, tokenizer, head)
    rewards = model.token_rewards(*pairs, token_budget=budget)
    assert_close(rewards, logits_of(model, *pairs))  # in input order, without padding


def test_scoring_restores_the_training_mode(tiny_model_folder, tokenizer, pairs):
    model = build(tiny_model_folder, tokenizer, "action")
    for training in (True, False):
        model.train(training)
        model.token_rewards(*pairs)
        assert model.training == training
        assert model.backbone.training == training


# ---------- granularities ----------


@pytest.mark.parametrize(("granularity", "interval"), [("sparse", 15), ("step", 15), ("interval", 4), ("dense", 15)])
def test_rewards_are_clipped_logits_of_the_next_supervised_token(
    tiny_model_folder, tokenizer, pairs, granularity, interval
):
    beta = 0.7
    settings = {"granularity": granularity, "interval": interval, "beta_clip": beta}
    model = build(tiny_model_folder, tokenizer, "token", **settings)
    logits = logits_of(model, *pairs)
    assert max(float(row.abs().max()) for row in logits) > beta  # so that clipping has an effect
    for reward, values, completion in zip(model.token_rewards(*pairs), logits, pairs[1], strict=True):
        newline = tokenizer.convert_tokens_to_ids("\n")
        last = len(completion) - 1
        supervised = {
            "sparse": [t == last for t in range(last + 1)],
            "step": [t == last or completion[t] == newline for t in range(last + 1)],
            "interval": [t == last or (t + 1) % interval == 0 for t in range(last + 1)],
            "dense": [True] * (last + 1),
        }[granularity]
        for t in range(last + 1):
            following = min(k for k in range(t, last + 1) if supervised[k])
            expected = max(-beta, min(beta, float(values[following])))
            assert float(reward[t]) == pytest.approx(expected, abs=1e-5)


def test_training_and_scoring_supervise_the_same_tokens(tiny_model_folder, tokenizer, pairs):
    """Loss and score use one mask; the interval counts from the first token of the completion, not the prompt."""
    prompts, completions = pairs
    for granularity in ("sparse", "step", "interval", "dense"):
        model = build(tiny_model_folder, tokenizer, "token", granularity=granularity, interval=4)
        batch = model.pack(prompts, completions)
        in_training = model.supervision(batch)
        for row, (completion, reward) in enumerate(zip(completions, model.token_rewards(*pairs), strict=True)):
            scored = model.to_scores(completion, reward)
            assert scored.supervised == in_training[row, : len(completion)].tolist()
            assert not in_training[row, len(completion) :].any()
            text, offsets = token_offsets(tokenizer, completion)
            ends = torch.tensor([step_ends(text, offsets)])
            mask = supervision_mask(torch.ones(1, len(completion)), ends, granularity, 4)
            assert scored.supervised == mask[0].tolist()


def test_reference_log_prob_is_added_before_clipping(tiny_model_folder, tokenizer, pairs):
    """Mode-seeking form: clip(v_t + log pi(y_t)), with log pi from a plain forward in float64."""
    model = build(tiny_model_folder, tokenizer, "token", beta_clip=4.0)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    logits = logits_of(model, *pairs)
    rewards = model.token_rewards(*pairs, token_budget=50, reference=lm)
    for prompt, completion, values, reward in zip(*pairs, logits, rewards, strict=True):
        log_probs = reference_forward(lm, prompt, completion).logits[0].double().log_softmax(-1)
        for t, token in enumerate(completion):
            expected = float(values[t]) + float(log_probs[len(prompt) + t - 1, token])
            assert float(reward[t]) == pytest.approx(max(-4.0, min(4.0, expected)), abs=1e-5)


# ---------- text ----------


@pytest.mark.parametrize("head", ["token", "action"])
def test_text_and_ids_give_the_same_rewards(tiny_model_folder, tokenizer, experts, head):
    model = build(tiny_model_folder, tokenizer, head, granularity="step")
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in experts]
    completions = [encode_completion(tokenizer, row["completion"]) for row in experts]
    scores = model.score([row["prompt"] for row in experts], [row["completion"] for row in experts])
    for score, rewards in zip(scores, model.token_rewards(prompts, completions), strict=True):
        assert score.rewards == rewards.tolist()


def test_scores_by_hand(tiny_model_folder, tokenizer):
    model = build(tiny_model_folder, tokenizer, "token", granularity="step")
    (score,) = model.score(["13 - 5 = ?\n"], ["13 - 5 = 8\n#### 8"])
    assert score.tokens == ["13", " - ", "5", " = ", "8", "\n", "#### ", "8", "<eos>"]
    assert score.offsets[5:] == [(10, 11), (11, 16), (16, 17), (17, 17)]
    assert [t for t, s in enumerate(score.supervised) if s] == [5, 8]
    assert score.step_ends == score.supervised
    assert len(set(score.rewards[:6])) == 1
    assert len(set(score.rewards[6:])) == 1
    assert score.step_rewards() == pytest.approx([score.rewards[0], score.rewards[6]])
    assert score.aggregate("mean") == pytest.approx((6 * score.rewards[0] + 3 * score.rewards[6]) / 9)
    assert score.aggregate("min") == min(score.rewards[0], score.rewards[6])
    assert score.aggregate("last") == score.rewards[6]
    early, late = sum(0.99**t for t in range(6)), sum(0.99**t for t in range(6, 9))
    expected = (early * score.rewards[0] + late * score.rewards[6]) / (early + late)
    assert score.aggregate("discounted") == pytest.approx(expected)
    with pytest.raises(ValueError, match="unknown aggregate 'sum'"):
        score.aggregate("sum")


def test_truncated_trace_gets_no_end_of_sequence(tiny_model_folder, tokenizer):
    """An added end of sequence would mark unfinished traces; the other tokens' rewards do not change."""
    model = build(tiny_model_folder, tokenizer, "action")
    prompt, completion = "13 - 5 = ?\n", "13 - 5 = 8"
    ended, cut = model.score([prompt] * 2, [completion] * 2, finished=[True, False])
    assert ended.tokens == [*cut.tokens, "<eos>"]
    assert ended.rewards[:-1] == pytest.approx(cut.rewards, abs=1e-5)
    ids = tokenizer(completion)["input_ids"]
    (expected,) = model.token_rewards([encode_prompt(tokenizer, prompt)], [ids])
    assert cut.rewards == pytest.approx(expected.tolist(), abs=1e-5)


def test_nothing_is_truncated(tiny_model_folder, tokenizer):
    """128 positions: a trace that fills them is scored completely; one more token raises an error with the row."""
    model = build(tiny_model_folder, tokenizer, "action")
    prompt = "1 + 1 = ?\n"
    room = 128 - len(encode_prompt(tokenizer, prompt)) - 1
    (score,) = model.score([prompt], ["\n" * room])
    assert len(score.rewards) == room + 1
    message = rf"row 1: 7 prompt and {room + 2} completion tokens, the reward model reads 128"
    with pytest.raises(InputError, match=message.replace("7 prompt", r"\d+ prompt")):
        model.score([prompt] * 2, ["\n", "\n" * (room + 1)])


def test_empty_truncated_trace_raises(tiny_model_folder, tokenizer):
    model = build(tiny_model_folder, tokenizer, "action")
    with pytest.raises(InputError, match="row 0: the completion is empty"):
        model.score(["1 + 1 = ?\n"], [""], finished=[False])


# ---------- steps and candidates ----------


@pytest.mark.parametrize("head", ["action", "token"])
@pytest.mark.parametrize("others", [[], ["1 + 1 = "], ["", "1 + 1 = 2 3 4 5 6 7"]])
def test_empty_prompt_raises(tiny_model_folder, tokenizer, head, others):
    """Nothing predicts the first token: alone it was a shape error, next to others padding predicted it."""
    model = build(tiny_model_folder, tokenizer, head)
    completions = ["48 / 2 = 24"] * (len(others) + 1)
    with pytest.raises(InputError, match="row 0: the prompt has no tokens"):
        model.score(["", *others], completions)
    with pytest.raises(InputError, match="row 0: the prompt has no tokens"):
        model.score_ids([[], *([5] for _ in others)], [[6, 7]] * len(completions))
    with pytest.raises(InputError, match="the prompt has no tokens"):
        model.rerank("", completions)
    with pytest.raises(InputError, match="trace 0: the prompt has no tokens"):
        model.first_error("", ["1", "2"], 0.0) or model.score_steps([""], [["1", "2"]])


def test_span_reward_is_the_mean_over_overlapping_tokens():
    """A token that overlaps two spans counts in both; one without characters (end of sequence) in none."""
    offsets = [(0, 3), (3, 5), (5, 9), (9, 9)]
    scores = TokenScores(["abc", "de", "fghi", "<eos>"], offsets, [1.0, 2.0, 4.0, 100.0], [True] * 4, [False] * 4)
    assert scores.step_rewards([(0, 3), (3, 9), (2, 4), (6, 7)]) == [1.0, 3.0, 1.5, 4.0]
    for span in ((9, 12), (3, 3)):
        with pytest.raises(ValueError, match=f"no token between characters {span[0]} and {span[1]}"):
            scores.step_rewards([span])


@pytest.mark.parametrize("head", ["token", "action"])
def test_step_rewards_are_means_over_their_tokens(tiny_model_folder, tokenizer, head):
    """A newline between steps belongs to neither, one inside a step to it; the end of sequence to none."""
    model = build(tiny_model_folder, tokenizer, head)
    prompt, steps = "13 - 5 + 1 = ?\n", ["13 - 5 = 8", "8 + 1 = 9\n9", "#### 9"]
    (score,) = model.score([prompt], ["\n".join(steps)])
    newlines = [t for t, token in enumerate(score.tokens) if token == "\n"]
    assert len(newlines) == 3
    parts = [range(newlines[0]), range(newlines[0] + 1, newlines[2]), range(newlines[2] + 1, len(score.tokens) - 1)]
    expected = [sum(score.rewards[t] for t in part) / len(part) for part in parts]
    found = model.score_steps([prompt, prompt], [steps, steps[:1]])
    assert found[0] == pytest.approx(expected, abs=1e-5)
    (short,) = model.score([prompt], steps[:1])
    assert found[1] == pytest.approx([sum(short.rewards[:-1]) / (len(short.rewards) - 1)], abs=1e-5)


def test_first_error_is_the_first_step_below_the_threshold(tiny_model_folder, tokenizer):
    model = build(tiny_model_folder, tokenizer, "token")
    prompt, steps = "13 - 5 + 1 = ?\n", ["13 - 5 = 8", "8 + 1 = 9", "#### 9"]
    (rewards,) = model.score_steps([prompt], [steps])
    assert len(set(rewards)) == 3
    for threshold in (*rewards, 0.0, min(rewards) - 1, max(rewards) + 1):
        under = [n for n, reward in enumerate(rewards) if reward < threshold - 1e-6]
        assert model.first_error(prompt, steps, threshold - 1e-6) == (under[0] if under else None)
    assert model.first_error(prompt, steps, min(rewards) - 1) is None
    assert model.first_error(prompt, steps, max(rewards) + 1) == 0
    with pytest.raises(InputError, match=r"no rule for the first error: fit one .* or give threshold"):
        model.first_error(prompt, steps)
    [scores] = model.score([prompt], ["\n".join(steps)])
    lowest = np.convolve(scores.rewards, np.ones(8) / 8, mode="valid").min()
    ends = [step[-1] for step in scores.by_step()]
    place = int(np.argmin([0.0, ends[1] - ends[0], ends[2] - min(ends[:2])]))
    for margin, found in ((1e-5, place), (-1e-5, None)):
        rule = FirstErrorRule(threshold=lowest + margin)
        model.settings = dataclasses.replace(model.settings, first_error=rule)
        assert model.first_error(prompt, steps) == found
        assert model.first_error(prompt, steps, max(rewards) + 1) == 0, "a threshold comes before the rule"


def test_rerank_sorts_candidates_from_best_to_worst(tiny_model_folder, tokenizer):
    """By reward; for a vote its winner comes first and the others follow by reward."""
    model = build(tiny_model_folder, tokenizer, "action", task="arithmetic", aggregate="min")
    prompt = "13 - 5 = ?\n"
    texts = ["13 - 5 = 8\n#### 8", "#### 9", "13 - 5 = 8", "#### 8", "13 - 5 = 12\n#### 12", "13 + 5\n#### 8"]
    rewards = [min(score.rewards) for score in model.score([prompt] * 6, texts)]
    ranked = model.rerank(prompt, texts)
    assert [index for index, _ in ranked] == sorted(range(6), key=lambda n: -rewards[n])
    assert [reward for _, reward in ranked] == pytest.approx(sorted(rewards, reverse=True), abs=1e-5)
    voted = [index for index, _ in model.rerank(prompt, texts, "majority")]
    assert voted[0] == 0  # three candidates answer 8 with equal weight; the first represents them
    assert voted[1:] == [index for index, _ in ranked if index != 0]
    log_probs = [-3.0, -2.0, -1.0, -0.5, -4.0, -5.0]
    assert model.rerank(prompt, texts, "logprob", log_probs)[0][0] == 3
    assert model.rerank(prompt, texts, "shortest")[0][0] == 1
    with pytest.raises(ValueError, match="needs log_probs"):
        model.rerank(prompt, texts, "logprob")
    with pytest.raises(ValueError, match="unknown method 'oracle'"):
        model.rerank(prompt, texts, "oracle")


# ---------- files ----------


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("head", ["token", "action"])
def test_save_and_load(tiny_model_folder, tokenizer, pairs, tmp_path, head, peft):
    """Exact without LoRA; merging LoRA rounds. The live weights do not change."""
    settings = {"granularity": "interval", "interval": 4, "aggregate": "min", "task": "gsm8k", "step_delimiter": ". "}
    model = build(tiny_model_folder, tokenizer, head, peft, beta_clip=3.5, base_model="some/base", **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "rm")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    loaded = TokenRewardModel.from_pretrained(str(tmp_path / "rm"))
    assert loaded.settings == model.settings == check_reward_model(str(tmp_path / "rm"))
    assert not loaded.training
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    ours, theirs = logits_of(model, *pairs), logits_of(loaded, *pairs)
    if peft is None:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    else:
        assert_close(theirs, ours, 2e-5)
        untrained = logits_of(build(tiny_model_folder, tokenizer, head, peft, trained=False), *pairs)
        assert max(float((a - b).abs().max()) for a, b in zip(ours, untrained)) > 0.1  # the adapter has an effect
        assert not list((tmp_path / "rm").glob("adapter*"))


def test_saving_again_replaces_the_folder(tiny_model_folder, tokenizer, tmp_path):
    model = build(tiny_model_folder, tokenizer, "action")
    model.save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "stale.txt").write_text("old")
    with torch.no_grad():
        model.head.b.fill_(2.5)
    model.save_pretrained(tmp_path / "rm", notes="Trained in a test.")
    assert float(load_file(tmp_path / "rm" / "head.safetensors")["b"]) == 2.5
    assert not (tmp_path / "rm" / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rm"]
    assert (tmp_path / "rm" / "README.md").read_text().rstrip().endswith("Trained in a test.")


@pytest.mark.parametrize("head", ["token", "action"])
def test_lora_on_all_linear_layers_trains(tiny_model_folder, tokenizer, pairs, head):
    """`all-linear` would also wrap the token head and crash; the head itself is trained in full."""
    model = build(tiny_model_folder, tokenizer, head, LORA)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") or ".score." in name for name in trainable)
    assert any("score" in name or name.startswith("head.") for name in trainable)
    model(model.pack(*pairs)).sum().backward()
    heads = [p for name, p in model.named_parameters() if name in trainable and "lora_" not in name]
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in heads)
    assert LORA.task_type == "CAUSAL_LM"  # the given settings do not change
    assert LORA.exclude_modules is None


@pytest.mark.parametrize(
    ("head", "missing"),
    [
        ("action", "tracereward.json"),
        ("action", "head.safetensors"),
        ("action", "model.safetensors"),
        ("action", "config.json"),
        ("token", "model.safetensors"),
        ("token", "tokenizer.json"),
    ],
)
def test_missing_file_is_named(tiny_model_folder, tokenizer, tmp_path, head, missing):
    build(tiny_model_folder, tokenizer, head).save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / missing).unlink()
    with pytest.raises(InputError, match=missing) as caught:
        TokenRewardModel.from_pretrained(str(tmp_path / "rm"))
    others = {"tracereward.json", "head.safetensors", "model.safetensors", "config.json", "tokenizer.json"} - {missing}
    assert not any(name in str(caught.value) for name in others)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"interval": "many"}', '{"head": "tokne"}'])
def test_damaged_settings_are_named(tiny_model_folder, tokenizer, tmp_path, content):
    build(tiny_model_folder, tokenizer, "token").save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "tracereward.json").write_text(content)
    with pytest.raises(InputError, match=r"tracereward\.json|did you mean 'token'"):
        check_reward_model(str(tmp_path / "rm"))


def test_unknown_settings_fields_are_ignored(tiny_model_folder, tokenizer, tmp_path):
    build(tiny_model_folder, tokenizer, "token").save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm" / "tracereward.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "something_new": 1}))
    assert check_reward_model(str(tmp_path / "rm")).head == "token"


def test_saved_tokenizer_is_complete(tiny_model_folder, tokenizer, tmp_path):
    build(tiny_model_folder, tokenizer, "token").save_pretrained(tmp_path / "rm")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "rm")
    text = "13 - 5 = 8\n#### 8"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "tokne"}, "unknown head 'tokne': did you mean 'token'"),
        ({"granularity": "steps"}, "unknown granularity 'steps': did you mean 'step'"),
        ({"aggregate": "sum"}, "unknown aggregate 'sum'"),
        ({"interval": 0}, "interval must be at least 1, not 0"),
        ({"beta_clip": 0.0}, "beta_clip must be positive"),
        ({"beta_clip": math.nan}, "beta_clip must be positive"),
    ],
)
def test_invalid_settings_raise(wrong, message):
    with pytest.raises(InputError, match=message):
        RewardSettings(**wrong)


def test_different_vocabulary_is_detected(tokenizer):
    """Token ids must have the same text in policy and reward model, or rewards are assigned to wrong tokens."""
    assert same_tokenizer(tokenizer, build_tokenizer())
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    words = stored["model"]["vocab"]
    words["8"], words["9"] = words["9"], words["8"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), pad_token="<pad>", eos_token="<eos>"
    )
    assert not same_tokenizer(tokenizer, other)
