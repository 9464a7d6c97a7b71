"""Memory of a training step, computed from the models' shapes.

These are estimates, not measurements: allocators, communication buffers and the CUDA context are not included, at least
a fifth of a card. All sizes are bytes. `docs/scale.md` has the formulae.
"""

from dataclasses import dataclass
from typing import Any

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
FLOAT32, BFLOAT16 = 4, 2
ADAM = 2 * FLOAT32  # first and second moment of a trained weight
LOGITS = 2**23  # logits in memory at a time, see `tracereward.modeling.log_probs`
LOGIT = BFLOAT16 + 3 * FLOAT32  # a logit; its float32 copy, log-softmax and gradient


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

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a model by its configuration; of another architecture than Llama's that of a similar Llama.

        Args:
            config: of transformers.
        """
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

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
        autocast: whether float32 weights are computed with in bfloat16; False computes in float32.
        frozen_width: bytes of a frozen weight under LoRA.
        sampled: rollouts that transformers samples at once on one GPU; 0: vLLM, which takes memory of its own.
        half_copy: whether a bfloat16 copy of the policy samples them, as on a CPU under autocast.
        adversarial: whether there is a discriminator; False: SFT, whose loss reads logits.
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
    autocast: bool = True
    frozen_width: int = BFLOAT16
    sampled: int = 0
    half_copy: bool = False
    adversarial: bool = True

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
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return BFLOAT16 if self.autocast else FLOAT32

    @property
    def copies(self) -> int:
        """Bytes of autocast's copy of a float32 weight."""
        return BFLOAT16 if self.autocast else 0

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
    frozen = setup.frozen_width * setup.policy.weights if setup.rank else 0
    if strategy == "ddp":
        return {
            "weights": frozen + (FLOAT32 + setup.copies) * trained,
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
    width = setup.frozen_width if setup.rank else FLOAT32
    if setup.shard_discriminator:
        frozen = width * setup.critic.weights if own_base else 0
        return {
            "weights": (frozen + FLOAT32 * trained) / setup.gpus,
            "gradients": FLOAT32 * trained / setup.gpus,
            "optimiser": ADAM * trained / setup.gpus,
            "all-reduce buffer": 0,
        }
    return {
        "weights": (FLOAT32 + setup.copies) * trained + (width * setup.critic.weights if own_base else 0),
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

    vLLM is not included: it takes its configured share of the card.
    """
    policy = policy_state(setup)
    parts = {
        "policy: weights": policy["weights"],
        "policy: gradients, optimiser": policy["gradients"] + policy["optimiser"],
        "policy: gathered layers": gathered(setup),
    }
    updates = {
        "policy: update": activations(
            setup.policy, setup.tokens, bool(setup.rank), setup.checkpointing, width=setup.width
        )
    }
    if not setup.adversarial:
        updates["policy: update"] += LOGIT * setup.rows * setup.completion * setup.policy.vocabulary
        return {**parts, **updates, "peak": sum(parts.values()) + max(updates.values())}
    discriminator = discriminator_state(setup)
    share = setup.completion / (setup.prompt + setup.completion)
    budget, critic = setup.discriminator_budget, setup.critic
    logits = LOGIT * min(LOGITS, budget * share * critic.vocabulary) if setup.reads_logits else 0
    parts |= {
        "frozen starting policy": frozen_start(setup) / (setup.gpus if setup.shard_discriminator else 1),
        "discriminator: weights": discriminator["weights"],
        "discriminator: rest of its state": sum(discriminator.values()) - discriminator["weights"],
    }
    parts |= {"bfloat16 copy that samples": BFLOAT16 * setup.policy.weights} if setup.half_copy else {}
    updates |= {
        "discriminator: update": activations(
            critic, budget, bool(setup.critic_rank), setup.checkpointing, width=setup.width
        )
        + logits
        + gathered_discriminator(setup),
        "frozen starting policy: gathered layers": gathered_start(setup),
    }
    if setup.sampled:
        cache = kv_cache(setup.policy, setup.sampled, setup.prompt + setup.completion, setup.width)
        updates["rollouts: keys and values"] = cache + LOGIT * setup.sampled * setup.policy.vocabulary
    return {**parts, **updates, "peak": sum(parts.values()) + max(updates.values())}
