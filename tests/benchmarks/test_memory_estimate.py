"""The formulae of `memory_estimate`, checked against models on the meta device, a real optimiser, cache and hook."""

import contextlib
import io
import pickle
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.memory_estimate import SHAPES, all_gather, all_reduce, rollouts, table, traffic
from helpers.paths import ROOT
from tracereward.modeling import log_probs
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.training import discriminator_batch, rollout_metrics
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert
from tracereward.training.memory import (
    LOGITS,
    STRATEGIES,
    Setup,
    Shape,
    activations,
    discriminator_state,
    discriminator_weights,
    gathered,
    kv_cache,
    memory,
    policy_state,
)
from tracereward.training.options import DiscriminatorOptions

PUBLISHED = {  # number of weights
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}
TINY = Shape(layers=3, hidden=64, heads=4, kv_heads=2, intermediate=160, vocabulary=50, tied=False)
L8 = SHAPES["Llama-3.1-8B"]


def config(shape: Shape, **options) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        **options,
    )


def on_meta(shape: Shape) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config(shape)).to(torch.bfloat16)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", SHAPES)
def test_weights(name):
    shape, model = SHAPES[name], on_meta(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == shape.weights == PUBLISHED[name]
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == shape.layer_weights
    # Gathered by FSDP2 and ZeRO-3: two layers, and the head with the final norm.
    whole = [*model.model.layers[:2].parameters(), *model.lm_head.parameters(), *model.model.norm.parameters()]
    assert gathered(Setup(shape, "fsdp2", 8)) == size(whole)
    assert gathered(Setup(shape, "fsdp2", 1)) == gathered(Setup(shape, "ddp", 8)) == 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rank", [8, 64])
def test_adapter(name, rank):
    """Counts equal those of PEFT, whose adapters are float32 on a bfloat16 base."""
    with torch.device("meta"):
        model = get_peft_model(on_meta(SHAPES[name]), LoraConfig(r=rank, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in trained) == SHAPES[name].adapter(rank)
    assert {p.dtype for p in trained} == {torch.float32}
    state = policy_state(Setup(SHAPES[name], "ddp", 1, rank))
    assert state["weights"] == size(frozen) + size(trained) * 3 / 2  # including autocast copies in bfloat16
    assert policy_state(Setup(SHAPES[name], "fsdp2", 1, rank))["weights"] == size(frozen) + size(trained)


def test_optimiser_states_match_adamw():
    model = LlamaForCausalLM(config(TINY))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    gradients = [p.grad for p in model.parameters()]
    for strategy in ("ddp", "fsdp2"):
        state = policy_state(Setup(TINY, strategy, 1, rank=0))
        assert (state["optimiser"], state["gradients"]) == (size(moments), size(gradients))
    assert policy_state(Setup(TINY, "fsdp2", 1, rank=0))["weights"] == size(model.parameters())


@pytest.mark.parametrize("rank", [0, 64])
def test_bytes_per_weight_of_each_strategy(rank):
    """Bytes per weight as in the ZeRO paper (arXiv 1910.02054, figure 1): 16, 2 + 14 / N, 16 / N."""
    for gpus in (1, 8, 1000):
        states = {s: policy_state(Setup(L8, s, gpus, rank, sync_each_batch=True)) for s in STRATEGIES}
        trained = L8.adapter(rank) if rank else L8.weights
        frozen = 2 * L8.weights if rank else 0
        total = {s: sum(state.values()) for s, state in states.items()}
        assert total["ddp"] == frozen + 18 * trained  # including autocast copies
        assert total["zero2"] == pytest.approx(frozen + (2 + 14 / gpus) * trained)
        assert total["zero3"] == pytest.approx((frozen + 16 * trained) / gpus)
        assert total["fsdp2"] == pytest.approx(total["zero3"])


def test_fsdp2_keeps_unsharded_gradients_between_micro_batches():
    setup = Setup(L8, "fsdp2", 64, rank=0)
    waiting = policy_state(setup)["gradients"] - policy_state(replace(setup, sync_each_batch=True))["gradients"]
    assert waiting == 2 * L8.weights
    assert policy_state(replace(setup, accumulation=1)) == policy_state(replace(setup, sync_each_batch=True))
    sent = traffic(setup)["policy: gradients"]
    assert traffic(replace(setup, sync_each_batch=True))["policy: gradients"] == setup.accumulation * sent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kv_cache(dtype):
    model, cache = LlamaForCausalLM(config(TINY)).to(dtype), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(5, 17, dtype=torch.long), past_key_values=cache)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert kv_cache(TINY, 5, 17, dtype.itemsize) == size(held)


def kept(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd saves for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # keep a reference, so that the address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=torch.randn(*ids.shape, model.config.hidden_size, dtype=model.dtype), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


def test_activations():
    """Per layer, equal to the tensors that autograd saves; the difference of two depths drops embeddings and head."""
    shape = Shape(layers=1, hidden=256, heads=8, kv_heads=4, intermediate=768, vocabulary=10, tied=False)
    ids = torch.zeros(4, 64, dtype=torch.long)
    of = {}
    for layers in (1, 2):
        model = LlamaForCausalLM(config(replace(shape, layers=layers))).to(torch.bfloat16).model.train()
        of[layers] = kept(model, ids)
    assert activations(shape, ids.numel(), lora=False, checkpointing=False) == pytest.approx(of[2] - of[1], rel=0.1)
    three = replace(shape, layers=3)
    layer = activations(shape, 1, False, False)
    assert activations(three, 10, False, checkpointing=True) == 10 * (3 * 2 * shape.hidden + layer)
    assert activations(three, 10, False, checkpointing=False) == 10 * 3 * layer
    assert activations(shape, 1, True, False) > layer


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["all", "lora"])
def test_all_reduce_of_the_discriminator(peft, tiny_model_folder, tokenizer, experts, monkeypatch, tmp_path):
    """`Discriminator` reduces float32 gradients and seven sums."""
    model = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(head="action"), tokenizer, peft)
    traces = [
        Expert(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in experts
    ]
    discriminator = Discriminator(model, traces, DiscriminatorOptions(head="action"), seed=0)
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", sent.append)
    sums = torch.zeros(7)
    discriminator._add_up(sums)
    llama = model.backbone.config
    shape = Shape.of(llama)
    setup = Setup(shape, "ddp", 2, rank=4 if peft else 0)
    assert size(sent) == 4 * discriminator_weights(setup) + size([sums])
    assert discriminator_state(setup)["all-reduce buffer"] == size(sent) - size([sums])
    assert traffic(setup)["discriminator: gradients"] == all_reduce(size(sent) - size([sums]), 2)


def test_rollouts_are_pickled():
    """Size of the objects gathered for the discriminator and the metrics, with ids of more than two bytes."""
    setup = Setup(L8, "ddp", gpus=2, rows=4, accumulation=2)
    ids = [list(range(100_000, 100_000 + setup.completion)) for _ in range(setup.rows * setup.accumulation)]
    for_discriminator = [discriminator_batch.Rollout(index, row) for index, row in enumerate(ids)]
    for_metrics = [
        rollout_metrics.RewardedRollout(
            prompt="?", ids=row, finished=True, rewards=[token / 7 for token in row], reward=0.5, correct=1.0
        )
        for row in ids
    ]
    packed = len(pickle.dumps(for_discriminator)) + len(pickle.dumps(for_metrics))
    assert rollouts(setup) == pytest.approx(setup.gpus * packed, rel=0.02)


@pytest.mark.parametrize("gpus", [1, 2, 5])
def test_ring_collectives(gpus):
    """Each GPU sends N - 1 times an N-th of the data in an all-gather, and twice that in an all-reduce."""
    size, gathers, reduces = 60.0, 0.0, 0.0
    for _ in range(gpus - 1):
        gathers += size / gpus
        reduces += size / gpus
    assert all_gather(size, gpus) == pytest.approx(gathers)
    assert all_reduce(size, gpus) == pytest.approx(gathers + reduces)


def test_traffic_of_each_strategy():
    gpus, times = 8, 4
    share = (gpus - 1) / gpus
    sent = {s: traffic(Setup(L8, s, gpus, rank=0, accumulation=times)) for s in STRATEGIES}
    assert sent["ddp"]["policy: gradients"] == pytest.approx(2 * share * 4 * L8.weights)
    assert sent["ddp"]["policy: weights"] == sent["ddp"]["policy: weights, for vLLM"] == 0
    assert sent["zero2"]["policy: gradients"] == pytest.approx(times * share * 2 * L8.weights)
    assert sent["zero2"]["policy: weights"] == pytest.approx(share * 2 * L8.weights)
    for strategy in ("zero3", "fsdp2"):
        assert sent[strategy]["policy: weights"] == pytest.approx(2 * times * share * 2 * L8.weights)
        assert sent[strategy]["policy: weights, for vLLM"] == pytest.approx(share * 2 * L8.weights)
    setup = Setup(L8, "fsdp2", gpus, rank=64, rows=4, prompt=24, completion=1000, discriminator_budget=4096)
    adapter = traffic(setup)
    assert adapter["policy: weights"] == sent["fsdp2"]["policy: weights"]  # frozen weights are gathered too
    assert adapter["policy: weights, to score"] == pytest.approx(4 * share * 2 * L8.weights)
    for parts in (*sent.values(), adapter):
        *single, total = parts.values()
        assert total == pytest.approx(sum(single))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_sends_nothing(strategy):
    assert set(traffic(Setup(L8, strategy, 1)).values()) == {0}


def test_peak_and_shared_base():
    own, shared = (memory(Setup(L8, "ddp", 8, shared_base=shared)) for shared in (False, True))
    assert own["peak"] - shared["peak"] == pytest.approx(2 * L8.weights)  # only the second base, in bfloat16
    *resident, policy, discriminator, start = list(own.values())[:-1]
    assert own["peak"] == sum(resident) + max(policy, discriminator)
    assert start == 0
    assert memory(Setup(L8, "ddp", 8, rank=0))["frozen starting policy"] == 4 * L8.weights
    assert memory(Setup(L8, "ddp", 8, rank=0, frozen_start=False))["frozen starting policy"] == 0
    assert memory(Setup(L8, "ddp", 8, reads_logits=False))["discriminator: update"] < own["discriminator: update"]
    with pytest.raises(ValueError, match="shard_discriminator is not supported"):
        Setup(L8, "ddp", 8, shared_base=True, shard_discriminator=True)
    with pytest.raises(ValueError, match="shared base requires LoRA"):
        Setup(L8, "ddp", 8, rank=0, shared_base=True)
    with pytest.raises(ValueError, match="requires strategy ddp"):
        Setup(L8, "fsdp2", 8, shared_base=True)
    assert LOGITS == log_probs.LOGITS
    with pytest.raises(ValueError, match="not one of ddp"):
        Setup(L8, "fsdp", 8)


@pytest.mark.parametrize("rank", [0, 64])
def test_sharded_discriminator(rank):
    """As FSDP2 shards a policy: 16 bytes per trained weight and 2 per frozen one, divided by the number of GPUs."""
    gpus = 8
    share = (gpus - 1) / gpus
    replicated = Setup(
        L8, "ddp", gpus, rank, discriminator_updates=3, accumulation=2, rows=4, prompt=24, completion=1000
    )
    sharded = replace(replicated, shard_discriminator=True)
    trained, frozen = (L8.adapter(rank) + L8.hidden + 2, L8.weights) if rank else (L8.weights + L8.hidden + 2, 0)
    assert sum(discriminator_state(sharded).values()) == pytest.approx((2 * frozen + 16 * trained) / gpus)
    assert policy_state(sharded) == policy_state(replicated)
    start = 0 if rank else 4 * L8.weights
    assert memory(sharded)["frozen starting policy"] == pytest.approx(start / gpus)
    assert memory(replicated)["frozen starting policy"] == start
    assert traffic(sharded)["frozen starting policy"] == pytest.approx(2 * share * start)
    assert traffic(replicated)["frozen starting policy"] == 0
    layers = 2 * L8.layer_weights + L8.vocabulary * L8.hidden + L8.hidden
    updates = [memory(setup)["discriminator: update"] for setup in (sharded, replicated)]
    assert updates[0] - updates[1] == (2 if rank else 6) * layers
    sent, before = traffic(sharded), traffic(replicated)
    assert sent["discriminator: gradients"] == pytest.approx(before["discriminator: gradients"] / 2)
    # Eight rollouts of 1,024 tokens are two passes of 4,096; an update gathers in the forward and the backward pass.
    assert sent["discriminator: weights"] == pytest.approx((3 * 2 + 2) * share * (2 * frozen + 4 * trained))
    assert before["discriminator: weights"] == 0
    assert memory(replace(sharded, gpus=1))["peak"] < memory(replace(replicated, gpus=1))["peak"] + 1


def test_scale_page_shows_printed_tables():
    """The numeric tables in docs/scale.md are exactly those that its code prints."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
            exec(compile(block, "scale.md", "exec"), names)
    shown = re.findall(r"^\|.*\|\n\|---\|--:.*\n(?:\|.*\n)+", page, flags=re.MULTILINE)
    assert len(shown) == 4
    lines = [line for found in shown for line in found.splitlines()]
    heading = "| model | layers |"  # the code prints only the rows of the first table
    assert [line for line in lines[:2] if not line.startswith((heading, "|---"))] == []
    assert lines[2:] == printed.getvalue().splitlines()


def test_table():
    assert table({"a": {"x": 5e8, "y": 99.9e9}, "b": {"x": 0, "y": 1234.5e9}}, "GB").splitlines() == [
        "| GB | a | b |",
        "|---|--:|--:|",
        "| x | 0.5 | 0.0 |",
        "| y | 99.9 | 1,234 |",
    ]
