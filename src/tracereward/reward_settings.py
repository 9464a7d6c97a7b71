"""What a reward model's folder says of itself: ``tracereward.json``, its check, and the model card."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from tracereward.errors import InputError, check_choice
from tracereward.masks import GRANULARITIES
from tracereward.models import local_folder
from tracereward.scores import AGGREGATES

HEADS = ("token", "action")
SETTINGS_FILE = "tracereward.json"
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class RewardSettings:
    """What training, scoring and serving must agree on; stored as ``tracereward.json``.

    Attributes:
        head: one of `HEADS`.
        granularity: which tokens are supervised, see `masks.supervision_mask`.
        interval: k of granularity ``interval``.
        step_delimiter: what ends a step.
        beta_clip: token rewards are clipped to +-beta_clip, in log-odds.
        aggregate: how a trace's token rewards become one number.
        task: the recipe whose prompts and answers it was trained on.
        template: ``plain`` or ``chat``.
        base_model: the checkpoint that the backbone started from.
    """

    head: str = "action"
    granularity: str = "dense"
    interval: int = 15
    step_delimiter: str = "\n"
    beta_clip: float = 5.0
    aggregate: str = "mean"
    task: str = "generic"
    template: str = "plain"
    base_model: str = ""

    def __post_init__(self):
        check_choice("head", self.head, HEADS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        if self.interval < 1:
            raise InputError(f"interval must be at least 1, not {self.interval}")
        if not self.beta_clip > 0:  # nan is not either
            raise InputError(f"beta_clip must be positive, not {self.beta_clip}")


def check_reward_model(name: str) -> RewardSettings:
    """Settings of a reward model that is whole; reads no weights.

    Raises:
        InputError: there is none, or files are missing.
    """
    return read_settings(local_folder(name))


def read_settings(folder: str | Path) -> RewardSettings:
    """Read and check ``tracereward.json`` and the presence of the files that go with it.

    Raises:
        InputError: a file is missing or damaged, by name.
    """
    folder = Path(folder)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise InputError(f"{folder} is not a reward model: {SETTINGS_FILE} is missing. `tracereward train` writes one.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(RewardSettings)}
        settings = RewardSettings(**{key: value for key, value in stored.items() if key in known})
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    weights = any(folder.glob("*.safetensors"))
    needed = {"config.json": (folder / "config.json").is_file(), "model.safetensors": weights}
    needed["tokenizer.json"] = (folder / "tokenizer.json").is_file()
    if settings.head == "action":
        needed[HEAD_FILE] = (folder / HEAD_FILE).is_file()
        needed["model.safetensors"] = any(path.name != HEAD_FILE for path in folder.glob("*.safetensors"))
    missing = [name for name, present in needed.items() if not present]
    if missing:
        raise InputError(f"{folder} is not a complete reward model: {', '.join(missing)} missing")
    return settings


def model_card(settings: RewardSettings, notes: str) -> str:
    """The artefact's README: what the numbers mean and how to load it."""
    kind = (
        "AutoModelForTokenClassification" if settings.head == "token" else "AutoModelForCausalLM plus head.safetensors"
    )
    return f"""---
library_name: tracereward
tags: [reward-model, tracereward, {settings.head}-head]
base_model: {settings.base_model}
---

# Token-level reward model

Learned from expert traces by adversarial inverse reinforcement learning (arXiv 2510.01857). Each completion token has
a log-odds of being the expert's rather than the policy's: positive is like the expert.

- head: `{settings.head}` ({kind}); supervision: `{settings.granularity}`; rewards clipped to +-{settings.beta_clip:g}
- recipe: `{settings.task}`, template: `{settings.template}`, trace reward: `{settings.aggregate}` of its token rewards

```python
from tracereward import TokenRewardModel

scores = TokenRewardModel.from_pretrained("reward_model").score(prompts, completions)
```

The logit is the reward: a `token-classification` pipeline would apply a softmax to the single label and show 1.0.
{notes}"""
