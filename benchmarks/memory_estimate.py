"""Memory and traffic of a training step, computed from the models' shapes.

These are estimates, not measurements: allocators, communication buffers and the CUDA context are not included, at least
a fifth of a card. All sizes are bytes. `docs/scale.md` has the formulae and the tables that this module prints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
FLOAT32, BFLOAT16 = 4, 2
ADAM = 2 * FLOAT32  # first and second moment of a trained weight
LOGITS = 2**23  # logits in memory at a time, see `tracereward.modeling.log_probs`
LOGIT = BFLOAT16 + 3 * FLOAT32  # a logit; its float32 copy, log-softmax and gradient
# Pickled bytes of a rollout's token: its id (5) twice, its reward (9).
PICKLED_TOKEN = 5 + 5 + 9


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama, from its config.json.

    Attributes:
        layers: num_hidden_layers.
        hidden: hidden_size.
        heads: num_attention_heads.
        kv_heads: num_key_value_heads.
        intermediate: intermediate_size.
        vocabulary: vocab_size.
        tied: tie_word_embeddings.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def kv(self) -> int:
        """Width of a token's keys (and of its values) in one layer."""
        return self.kv_heads * self.hidden // self.heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a decoder layer: q, k, v, o, gate, up, down."""
        h, i = self.hidden, self.intermediate
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def layer_weights(self) -> int:
        """Weights of a decoder layer: its linear layers and two norms."""
        return sum(a * b for a, b in self.linears) + 2 * self.hidden

    @property
    def weights(self) -> int:
        """All weights: decoder layers, final norm, embeddings, and the LM head unless it is tied."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_weights + self.hidden + embeddings

    def adapter(self, rank: int) -> int:
        """Weights of LoRA on all linear layers: rank (inputs + outputs) each."""
        return self.layers * rank * sum(a + b for a, b in self.linears)


SHAPES = {
    "Llama-3.2-3B": Shape(
        layers=28, hidden=3072, heads=24, kv_heads=8, intermediate=8192, vocabulary=128256, tied=True
    ),
    "Llama-3.1-8B": Shape(
        layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256, tied=False
    ),
    "Llama-3.1-70B": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28672, vocabulary=128256, tied=False
    ),
}


@dataclass(frozen=True)
class Setup:
    """Configuration of a run: models, trained weights, sharding strategy, and batch sizes.

    Attributes:
        policy: shape of the policy.
        strategy: one of `STRATEGIES`.
        gpus: number of GPUs of the run.
        rank: LoRA rank of the policy; 0 trains all weights.
        discriminator: shape of the discriminator; default: the policy's.
        discriminator_rank: LoRA rank of the discriminator; default: the policy's.
        shared_base: two adapters on one base model; requires LoRA for both, one shape, and DDP.
        shard_discriminator: shard the discriminator and the frozen starting policy with FSDP2, for any strategy.
        frozen_start: reward form `logit_plus_logprob`, which without LoRA needs a frozen copy of the starting policy.
        prompt: tokens per prompt.
        completion: tokens per completion.
        rows: rollouts per micro-batch on one GPU.
        accumulation: micro-batches per optimiser step.
        sync_each_batch: under FSDP2, reduce gradients after each micro-batch instead of once per step.
        discriminator_budget: tokens in one forward pass of the discriminator.
        discriminator_updates: discriminator updates per optimiser step of the policy.
        reads_logits: heads `action` and `implicit`; the others have no logits over the vocabulary.
        checkpointing: gradient checkpointing, in both models.
    """

    policy: Shape
    strategy: str
    gpus: int
    rank: int = 64
    discriminator: Shape | None = None
    discriminator_rank: int | None = None
    shared_base: bool = False
    shard_discriminator: bool = False
    frozen_start: bool = True
    prompt: int = 256
    completion: int = 1024
    rows: int = 4
    accumulation: int = 4
    sync_each_batch: bool = False
    discriminator_budget: int = 4096
    discriminator_updates: int = 1
    reads_logits: bool = True
    checkpointing: bool = True

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.shared_base and not (self.rank and self.critic_rank and self.discriminator is None):
            raise ValueError("a shared base requires LoRA for both models and one shape")
        if self.shared_base and self.shard_discriminator:
            raise ValueError("a shared base is replicated: shard_discriminator is not supported")
        if self.shared_base and self.strategy != "ddp":
            raise ValueError("a shared base is replicated: it requires strategy ddp")

    @property
    def critic(self) -> Shape:
        """The discriminator's shape."""
        return self.discriminator or self.policy

    @property
    def critic_rank(self) -> int:
        """LoRA rank of the discriminator; 0 trains all weights."""
        return self.rank if self.discriminator_rank is None else self.discriminator_rank

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights are sharded."""
        return self.strategy in ("zero3", "fsdp2")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of rollouts."""
        return self.rows * (self.prompt + self.completion)


def trained_weights(shape: Shape, rank: int) -> int:
    """Number of trained weights: the adapter's, or all."""
    return shape.adapter(rank) if rank else shape.weights


def discriminator_weights(setup: Setup) -> int:
    """Trained weights of the discriminator, including its head: a, b, w of head `action`."""
    return trained_weights(setup.critic, setup.critic_rank) + setup.critic.hidden + 2


def kv_cache(shape: Shape, sequences: int, tokens: int, width: int = BFLOAT16) -> int:
    """Bytes of keys and values: sequences * tokens * layers * 2 * kv * width."""
    return sequences * tokens * shape.layers * 2 * shape.kv * width


def activations(shape: Shape, tokens: int, lora: bool, checkpointing: bool, *, width: int = BFLOAT16) -> int:
    """Bytes that a forward pass saves for the backward pass, with fused attention.

    A layer saves a = width (10 h + 4 kv + 4 i) per token, and 4 (6 h + i) more with LoRA, whose inputs are float32.
    With checkpointing each layer saves its input, width h, and one layer at a time the rest.
    """
    h, i = shape.hidden, shape.intermediate
    layer = width * (10 * h + 4 * shape.kv + 4 * i) + (FLOAT32 * (6 * h + i) if lora else 0)
    return tokens * (shape.layers * h * width + layer if checkpointing else shape.layers * layer)


def policy_state(setup: Setup) -> dict[str, float]:
    """Weights, gradients and AdamW states of the policy on one GPU.

    DDP and FSDP2 keep trained weights in float32; autocast and FSDP2 compute with bfloat16 copies. DeepSpeed keeps
    bfloat16 weights and gradients, and a float32 copy in the optimiser. Frozen weights are bfloat16.
    """
    gpus, strategy = setup.gpus, setup.strategy
    trained = trained_weights(setup.policy, setup.rank)
    frozen = BFLOAT16 * setup.policy.weights if setup.rank else 0
    if strategy == "ddp":
        return {
            "weights": frozen + (FLOAT32 + BFLOAT16) * trained,
            "gradients": FLOAT32 * trained,
            "optimiser": ADAM * trained,
        }
    if strategy == "fsdp2":
        late = setup.accumulation > 1 and not setup.sync_each_batch and gpus > 1
        unsharded = BFLOAT16 * trained if late else 0  # not reduced until the last micro-batch of a step
        return {
            "weights": (frozen + FLOAT32 * trained) / gpus,
            "gradients": FLOAT32 * trained / gpus + unsharded,
            "optimiser": ADAM * trained / gpus,
        }
    return {
        "weights": (frozen + BFLOAT16 * trained) / (gpus if strategy == "zero3" else 1),
        "gradients": BFLOAT16 * trained / gpus,
        "optimiser": (FLOAT32 + ADAM) * trained / gpus,
    }


def gathered(setup: Setup) -> int:
    """Gathered bfloat16 weights on a GPU while a sharded policy computes, see `largest_units`."""
    return BFLOAT16 * largest_units(setup.policy) if setup.sharded and setup.gpus > 1 else 0


def gathered_discriminator(setup: Setup) -> int:
    """The same for a sharded discriminator: float32 weights also have autocast's bfloat16 copies."""
    width = BFLOAT16 if setup.critic_rank and setup.rank else FLOAT32 + BFLOAT16
    return width * largest_units(setup.critic) if setup.shard_discriminator and setup.gpus > 1 else 0


def largest_units(shape: Shape) -> int:
    """Weights gathered at a time under FSDP2 or ZeRO-3: two layers, the LM head and the final norm."""
    return 2 * shape.layer_weights + shape.vocabulary * shape.hidden + shape.hidden


def discriminator_state(setup: Setup) -> dict[str, float]:
    """Weights, gradients and AdamW states of the discriminator on one GPU; replicated unless it is sharded.

    Trained weights are float32, with autocast's bfloat16 copies. With a shared base, the frozen weights are the
    policy's. Otherwise they have the policy's dtype: bfloat16 if the policy has LoRA, float32 if all its weights are
    trained. With several GPUs the gradients are copied into one buffer.
    """
    trained = discriminator_weights(setup)
    own_base = bool(setup.critic_rank) and not setup.shared_base
    width = BFLOAT16 if setup.rank else FLOAT32
    if setup.shard_discriminator:
        frozen = width * setup.critic.weights if own_base else 0
        return {
            "weights": (frozen + FLOAT32 * trained) / setup.gpus,
            "gradients": FLOAT32 * trained / setup.gpus,
            "optimiser": ADAM * trained / setup.gpus,
            "all-reduce buffer": 0,
        }
    return {
        "weights": (FLOAT32 + BFLOAT16) * trained + (width * setup.critic.weights if own_base else 0),
        "gradients": FLOAT32 * trained,
        "optimiser": ADAM * trained,
        "all-reduce buffer": FLOAT32 * trained if setup.gpus > 1 else 0,
    }


def frozen_start(setup: Setup) -> int:
    """Bytes of the frozen starting policy in float32; 0 if it is the policy without its adapter."""
    return FLOAT32 * setup.policy.weights if setup.frozen_start and not setup.rank else 0


def gathered_start(setup: Setup) -> int:
    """Gathered weights of a sharded starting policy during scoring: float32, with autocast's bfloat16 copies."""
    sharded = setup.shard_discriminator and setup.gpus > 1 and frozen_start(setup)
    return (FLOAT32 + BFLOAT16) * largest_units(setup.policy) if sharded else 0


def memory(setup: Setup) -> dict[str, float]:
    """Bytes of each part on one GPU, and the peak: all resident parts plus the largest transient one.

    The generation engine is not included: vLLM takes its configured share of the card.
    """
    policy, discriminator = policy_state(setup), discriminator_state(setup)
    share = setup.completion / (setup.prompt + setup.completion)
    budget, critic = setup.discriminator_budget, setup.critic
    logits = LOGIT * min(LOGITS, budget * share * critic.vocabulary) if setup.reads_logits else 0
    parts = {
        "policy: weights": policy["weights"],
        "policy: gradients, optimiser": policy["gradients"] + policy["optimiser"],
        "policy: gathered layers": gathered(setup),
        "frozen starting policy": frozen_start(setup) / (setup.gpus if setup.shard_discriminator else 1),
        "discriminator: weights": discriminator["weights"],
        "discriminator: rest of its state": sum(discriminator.values()) - discriminator["weights"],
    }
    resident = sum(parts.values())
    updates = {
        "policy: update": activations(setup.policy, setup.tokens, bool(setup.rank), setup.checkpointing),
        "discriminator: update": activations(critic, budget, bool(setup.critic_rank), setup.checkpointing)
        + logits
        + gathered_discriminator(setup),
        "frozen starting policy: gathered layers": gathered_start(setup),
    }
    return {**parts, **updates, "peak": resident + max(updates.values())}


def all_reduce(size: float, gpus: int) -> float:
    """Bytes that each of `gpus` sends (and receives) in a ring all-reduce of `size` bytes: 2 (N - 1) / N size."""
    return 2 * all_gather(size, gpus)


def all_gather(size: float, gpus: int) -> float:
    """The same for an all-gather to `size` bytes on each GPU, or a reduce-scatter of `size` bytes: (N - 1) / N size."""
    return (gpus - 1) / gpus * size


def traffic(setup: Setup) -> dict[str, float]:
    """Bytes that one GPU sends in an optimiser step with new rollouts, by part, and their sum.

    Weights are gathered, and gradients reduced, in bfloat16, except float32 gradients in DDP; the discriminator's are
    float32. A sharded policy is gathered in each forward and each backward pass of a micro-batch, in each pass without
    its adapter that `logit_plus_logprob` adds, and once to send the weights to a colocated vLLM. A sharded
    discriminator is gathered twice in an update of one micro-batch per GPU, and in each pass that scores rollouts; its
    frozen weights are bfloat16, its trained ones float32.
    """
    gpus, strategy = setup.gpus, setup.strategy
    trained, gather = trained_weights(setup.policy, setup.rank), all_gather(BFLOAT16 * setup.policy.weights, gpus)
    if strategy == "ddp":
        gradients = all_reduce(FLOAT32 * trained, gpus)
    else:
        late = strategy == "fsdp2" and not setup.sync_each_batch
        gradients = (1 if late else setup.accumulation) * all_gather(BFLOAT16 * trained, gpus)
    weights = 0.0
    if setup.sharded:
        weights = 2 * setup.accumulation * gather
    elif strategy == "zero2":
        weights = all_gather(BFLOAT16 * trained, gpus)  # each GPU has updated its shard
    scored = math.ceil(setup.accumulation * setup.tokens / setup.discriminator_budget)
    learned, updates = FLOAT32 * discriminator_weights(setup), setup.discriminator_updates
    frozen = BFLOAT16 * setup.critic.weights if setup.critic_rank else 0
    parts = {
        "policy: gradients": gradients,
        "policy: weights": weights,
        "policy: weights, to score": scored * gather if setup.sharded and setup.rank and setup.frozen_start else 0.0,
        "frozen starting policy": scored * all_gather(frozen_start(setup), gpus) if setup.shard_discriminator else 0.0,
        "policy: weights, for vLLM": gather if setup.sharded else 0.0,
        "discriminator: gradients": updates * (all_gather if setup.shard_discriminator else all_reduce)(learned, gpus),
        "discriminator: weights": (2 * updates + scored) * all_gather(frozen + learned, gpus)
        if setup.shard_discriminator
        else 0.0,
        "rollouts": all_gather(rollouts(setup), gpus),
    }
    return {**parts, "sum": sum(parts.values())}


def rollouts(setup: Setup) -> int:
    """Pickled bytes of all GPUs' rollouts of a step, which each process gathers."""
    return setup.gpus * setup.rows * setup.accumulation * setup.completion * PICKLED_TOKEN


def table(columns: Mapping[str, Mapping[str, float]], corner: str, unit: float = 1e9) -> str:
    """A Markdown table with one column per mapping and one row per key, sizes in `unit` bytes."""
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for key in dict.fromkeys(chain.from_iterable(columns.values())):
        sizes = [column[key] / unit for column in columns.values()]
        shown = (f"{size:,.0f}" if size >= 99.95 else f"{size:.1f}" for size in sizes)
        lines.append(f"| {key} | {' | '.join(shown)} |")
    return "\n".join(lines)
