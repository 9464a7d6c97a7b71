"""Sizes and training options of the generated worlds, shared by the quickstart and the studies."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tracereward.files import write_jsonl
from tracereward.synthetic.arithmetic import MISTAKE_RATES, generate, splits


@dataclass(frozen=True, kw_only=True)
class World:
    """One generated world with a tiny Llama, or with a pretrained model.

    Attributes:
        name: name of the generator, see `tracereward.synthetic.arithmetic`.
        experts: number of demonstrations.
        unlabeled: number of prompts without traces, for rollouts.
        corpus: rows of the pretraining corpus; 0 if SFT starts from an untrained model or from `model`.
        completion: maximum completion length in tokens.
        pretraining, sft, grpo, adversarial: options of the stages, over `COMMON`; `adversarial` over the recipe.
        sft_grid: SFT settings to select from on the validation questions.
        validation, test: numbers of questions.
        model: folder or Hub id of a pretrained causal LM; None: a tiny Llama from scratch.
        lora: rank of LoRA adapters on the upper half of the layers, for GRPO of policy and discriminator; None: all
            weights are trained.
    """

    name: str
    experts: int
    unlabeled: int
    corpus: int
    completion: int
    pretraining: dict[str, Any]
    sft: dict[str, Any]
    sft_grid: list[dict[str, Any]]
    grpo: dict[str, Any]
    adversarial: dict[str, Any] = field(default_factory=dict)
    validation: int = 300
    test: int = 300
    model: str | None = None
    lora: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """Options of adversarial training in this world."""
        return {**UNMARKED.get(self.name, RECIPE), **self.adversarial}


COMMON: dict[str, Any] = {
    "gradient_checkpointing": False,
    "report_to": "none",
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "dataloader_pin_memory": False,
}
FIRST_RECIPE: dict[str, Any] = {
    "reward_form": "logit_plus_logprob",
    "discriminator_learning_rate": 3e-4,
    "discriminator_online_learning_rate": 5e-5,
    "discriminator_prompts": 32,
    "discriminator_rollouts": 2,
    "discriminator_warmup_updates": 40,
    "discriminator_every": 4,
    "warmup_rollouts": 16,
    "perturbed_per_expert": 0,
}
"""First options of adversarial training in the studies."""
R1_RECIPE: dict[str, Any] = {**FIRST_RECIPE, "r1_penalty": 1.0}
"""The options that the studies selected in `misconception`, where mistakes leave no mark."""
STEADY: dict[str, Any] = {**R1_RECIPE, "perturbed_per_expert": 1}
"""The same with perturbed experts."""
UNMARKED = {"misconception": R1_RECIPE, "hops": STEADY}
"""Recipes of worlds where only the wrong value reveals a mistake."""
RECIPE: dict[str, Any] = {
    **FIRST_RECIPE,
    "discriminator_learning_rate": 1e-3,
    "discriminator_online_learning_rate": 2e-4,
    "discriminator_prompts": 50,
    "discriminator_rollouts": 4,
    "perturbed_per_expert": 1,
}
"""The default recipe of all other worlds; `docs/recipe.md` has the reasons."""

_SFT = {"lr_scheduler_type": "cosine", "warmup_steps": 20, "weight_decay": 0.01}
_PRETRAINING = {**_SFT, "max_steps": 900, "learning_rate": 4e-3, "per_device_train_batch_size": 128}
_GRPO = {
    "per_device_train_batch_size": 192,
    "num_generations": 8,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "max_steps": 50,
}
# At 3e-4 a third of the policies on a learned reward collapsed: they stopped too early in long chains.
_SLOW_GRPO = {**_GRPO, "learning_rate": 1e-4, "max_steps": 100}
# No expert is held out: with a tenth of fifty held out, the policy gained less. SFT memorises the demonstrations, so
# its rollouts on their prompts equal them and teach nothing: the warm-up uses rollouts of the pretrained model.
_FEW_EXPERTS = {"held_out_fraction": 0.0, "discriminator_model": "base", "warmup_model": "base"}
_FEW_SFT = {**_SFT, "max_steps": 60, "learning_rate": 5e-4, "per_device_train_batch_size": 25}
_FEW_GRID = [{"learning_rate": rate, "max_steps": steps} for rate in (1e-4, 2e-4, 5e-4) for steps in (30, 120)]
_MANY_GRID = [{"learning_rate": rate} for rate in (2e-3, 4e-3)]

_MISCONCEPTION = World(
    name="misconception",
    experts=50,
    unlabeled=3000,
    corpus=10_000,
    completion=32,
    pretraining=_PRETRAINING,
    sft=_FEW_SFT,
    sft_grid=_FEW_GRID,
    grpo=_GRPO,
    adversarial=_FEW_EXPERTS,
)
_CHECKED = replace(
    _MISCONCEPTION,
    name="checked",
    experts=100,
    completion=46,
    pretraining={**_PRETRAINING, "max_steps": 1200, "per_device_train_batch_size": 64},
    grpo=_SLOW_GRPO,
)
_STYLE = World(
    name="style",
    experts=1500,
    unlabeled=0,
    corpus=0,
    completion=32,
    pretraining={},
    sft={**_SFT, "max_steps": 420, "learning_rate": 4e-3, "per_device_train_batch_size": 96},
    sft_grid=_MANY_GRID,
    grpo=_GRPO,
)
_WORLDS = (
    _MISCONCEPTION,
    _CHECKED,
    replace(
        _CHECKED,
        name="exposure",
        experts=50,
        completion=62,
        pretraining={**_CHECKED.pretraining, "max_steps": 3000},
        grpo={**_SLOW_GRPO, "per_device_train_batch_size": 96},
    ),
    replace(_CHECKED, name="hops", experts=50, corpus=20_000, completion=44, test=500),  # a hundred of each depth
    replace(_CHECKED, name="terse", completion=32),
    _STYLE,
    replace(_STYLE, name="multi-skill", completion=36),
)
WORLDS = {world.name: world for world in _WORLDS}


def write_rows(world: World, seed: int, folder: Path) -> None:
    """Generate the data as ``folder/PART.jsonl``; the corpus has no test or validation question."""
    parts = splits(
        world.name,
        seed,
        n_experts=world.experts,
        n_validation=world.validation,
        n_test=world.test,
        n_unlabeled=world.unlabeled,
    )
    if world.corpus:
        held_out = {row["prompt"] for part in ("test", "validation") for row in parts[part]}
        rate = MISTAKE_RATES[world.name]
        parts["corpus"] = generate(
            world.name, world.corpus, 5000 + seed, mistake_rate=rate, exclude=held_out, unique=False
        )
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_jsonl(folder / f"{part}.jsonl", rows)
