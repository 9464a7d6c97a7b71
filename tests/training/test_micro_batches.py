"""Micro-batches sorted by length: the same rows, less padding, and the same step as TRL."""

import copy

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer

from tracereward.training.config import RewardConfig
from tracereward.training.micro_batches import by_length, may_shift, window
from tracereward.training.rollout_trainer import RolloutTrainer


def test_window():
    assert [window(*case) for case in [(4, 8), (4, 4), (8, 4), (1, 3), (3, 4), (6, 4)]] == [4, 4, 4, 1, 1, 1]


def padded(rows, prompt_width, completion_width):
    """Rows padded as by TRL: (index, prompt length, completion length, supervised completion tokens)."""
    batch = {name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    for number, prompt, completion, counted in rows:
        batch["prompt_ids"].append([0] * (prompt_width - prompt) + [100 * number + i for i in range(1, prompt + 1)])
        batch["prompt_mask"].append([0] * (prompt_width - prompt) + [1] * prompt)
        ids = [-100 * number - i for i in range(1, completion + 1)]
        batch["completion_ids"].append(ids + [0] * (completion_width - completion))
        batch["completion_mask"].append([1] * counted + [0] * (completion_width - counted))
    made = {name: torch.tensor(values) for name, values in batch.items()}
    made["old_per_token_logps"] = made["completion_ids"] * 0.5
    made["advantages"] = torch.tensor([float(number) for number, *_ in rows])
    made["num_items_in_batch"] = torch.tensor(77)
    made["ref_per_token_logps"] = None
    return made


@given(st.data())
def test_rows_are_sorted_by_length_without_padding_columns(data):
    size, windows, count = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = st.tuples(st.integers(1, 5), st.integers(1, 6))
    total = size * windows * count
    rows = [
        (number, prompt, length, data.draw(st.sampled_from([0, length])))
        for number, (prompt, length) in enumerate(data.draw(st.lists(shape, min_size=total, max_size=total)), 1)
    ]
    batch = padded(rows, 6, 6)
    split = [
        {k: v[i : i + count] if v is not None and v.dim() else v for k, v in batch.items()}
        for i in range(0, total, count)
    ]
    shift, multiple = data.draw(st.booleans()), data.draw(st.sampled_from([None, 2, 3]))
    found = by_length(split, size, shift, multiple)
    assert len(found) == len(split)
    for w in range(windows):
        kept, lengths = [], []
        for batch in found[w * size : (w + 1) * size]:
            assert len(batch["prompt_ids"]) == count
            before = int(batch["prompt_mask"].any(0).int().argmax())
            after = int(batch["completion_mask"].flip(1).any(0).int().argmax()) if batch["completion_mask"].any() else 0
            assert before < (multiple or 1) if shift else batch["prompt_mask"].size(1) == 6
            assert after < max(2, multiple or 1)
            for name in ("prompt_ids", "completion_ids"):
                assert batch[name].size(1) % (multiple or 1) == 0
                assert batch[name].shape == batch[name.replace("ids", "mask")].shape
            assert batch["num_items_in_batch"] == 77
            assert batch["ref_per_token_logps"] is None
            assert torch.equal(batch["old_per_token_logps"], batch["completion_ids"] * 0.5)
            for i in range(count):
                number, prompt, _, counted = rows[int(batch["advantages"][i]) - 1]
                real = batch["prompt_mask"][i].bool()
                assert batch["prompt_ids"][i][real].tolist() == [100 * number + n for n in range(1, prompt + 1)]
                assert real.sum() == prompt
                assert batch["completion_mask"][i].sum() == counted
                shown = batch["completion_ids"][i][:counted].tolist()
                assert shown == [-100 * number - n for n in range(1, counted + 1)]
                kept.append(number)
                lengths.append(prompt + counted)
        assert sorted(kept) == list(range(w * size * count + 1, (w + 1) * size * count + 1))
        assert lengths == sorted(lengths)


def test_image_fields_are_unchanged():
    batch = {**padded([(1, 2, 2, 2)], 4, 4), "pixel_values": torch.zeros(1, 3)}
    assert by_length([batch], 1) == [batch]


OPTIONS = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.01},
    "several passes": {"loss_type": "dapo", "num_iterations": 2, "beta": 0.1},
    "truncated": {"loss_type": "dapo", "mask_truncated_completions": True},
    "likeliest forks": {"loss_type": "dapo", "top_entropy_quantile": 0.2},
    "experts": {"loss_type": "dapo", "router_aux_loss_coef": 0.1},
    "learned positions": {"loss_type": "dapo", "beta": 0.1},
}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def policy(name, folder, tokenizer, to):
    """The tiny Llama, a mixture of experts, or a model with learned positions, by name."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    ids["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    if name == "experts":
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, **ids))
    elif name == "learned positions":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "tie_word_embeddings": False}
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**shape, **ids))
        with torch.no_grad():
            model.transformer.wpe.weight *= 10
        assert not may_shift(model.config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert may_shift(model.config)
    with torch.no_grad():  # so that completions have from one to all tokens
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3
    model.save_pretrained(to)
    return AutoModelForCausalLM.from_pretrained(to)


@pytest.mark.parametrize("name", OPTIONS)
def test_step_matches_trl(name, tiny_model_folder, tokenizer, tmp_path):
    """Two optimiser steps of four micro-batches a generation: the weights of TRL, from fewer padded tokens."""
    prompts = ["3 + 4 = ?\n", "1 + 2 + 3 + 4 + 5 + 6 = ?\n", "9 = ?\n", "8 - 3 = ?\n"]
    found = {}
    for kind in (GRPOTrainer, RolloutTrainer):
        config = RewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            steps_per_generation=8,
            num_generations=8,
            max_completion_length=24,
            max_steps=4,
            learning_rate=1e-3,
            adam_epsilon=1e-4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            seed=4,
            **OPTIONS[name],
        )
        trainer = kind(
            model=policy(name, tiny_model_folder, tokenizer, tmp_path / "model"),
            reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
        )
        shapes, compute = [], trainer._compute_loss

        def counted(model, inputs, shapes=shapes, compute=compute):
            shapes.append((inputs["prompt_ids"].size(1) + inputs["completion_ids"].size(1)) * len(inputs["prompt_ids"]))
            return compute(model, inputs)

        trainer._compute_loss = counted
        trainer.train()
        found[kind] = copy.deepcopy(trainer.model.state_dict()), shapes
    (expected, of_trl), (weights, shapes) = found.values()
    assert len(shapes) == len(of_trl) == 16
    assert sum(shapes) < sum(of_trl)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=2e-6, rtol=1e-4, msg=key)
    start = policy(name, tiny_model_folder, tokenizer, tmp_path / "model").state_dict()
    assert max(float((weights[key] - start[key]).abs().max()) for key in start) > 1e-3
