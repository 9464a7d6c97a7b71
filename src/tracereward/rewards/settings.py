"""What a reward model's folder says of itself: ``tracereward.json``, its check, and the model card."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tracereward.errors import InputError, check_choice
from tracereward.files import atomic_write_json, read_json
from tracereward.modeling.loading import local_folder
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.choices import GRANULARITIES, HEADS, REWARD_FORMS
from tracereward.rewards.heads import default_reward_form, reads_log_probs, subtracts_policy
from tracereward.rewards.token_scores import AGGREGATES

SETTINGS_FILE = "tracereward.json"
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class RewardSettings:
    """What training, scoring and serving must agree on; stored as ``tracereward.json``.

    Attributes:
        head: one of `choices.HEADS`.
        granularity: which tokens are supervised, see `masks.supervision_mask`.
        interval: k of granularity ``interval``.
        step_delimiter: what ends a step.
        beta_clip: token rewards are clipped to +-beta_clip, in log-odds.
        temperature: log-odds are divided by it before the clip.
        reward_form: what training rewarded, one of `choices.REWARD_FORMS`; "" is the head's default. `score` gives it
            when it is handed the models whose log-probs it needs, else f alone.
        reference_model: the model whose log-prob ``logit_plus_logprob`` adds.
        uses_gold_answers: whether verified rollouts were trained on as if they were experts'.
        aggregate: how a trace's token rewards become one number.
        task: the recipe whose prompts and answers it was trained on.
        template: ``plain`` or ``chat``.
        base_model: the checkpoint that the backbone started from.
        calibration: from a trace's reward to the probability that it is correct; None before `tracereward calibrate`.
    """

    head: str = "action"
    granularity: str = "dense"
    interval: int = 15
    step_delimiter: str = "\n"
    beta_clip: float = 5.0
    temperature: float = 1.0
    reward_form: str = ""
    reference_model: str = ""
    uses_gold_answers: bool = False
    aggregate: str = "mean"
    task: str = "generic"
    template: str = "plain"
    base_model: str = ""
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        if self.interval < 1:
            raise InputError(f"interval must be at least 1, not {self.interval}")
        if not self.beta_clip > 0:  # nan is not either
            raise InputError(f"beta_clip must be positive, not {self.beta_clip}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, not {self.temperature}")
        check_choice("reward_form", self.form, REWARD_FORMS)
        if self.form == "f" and not subtracts_policy(self.head):
            raise InputError(f"reward_form f is for the heads airl and implicit; with head {self.head} use logit")

    @property
    def form(self) -> str:
        """The reward form, the head's default filled in."""
        return self.reward_form or default_reward_form(self.head)

    @property
    def adds_reference(self) -> bool:
        """Whether the reward has the log-prob of a reference model in it."""
        return self.form == "logit_plus_logprob"

    @property
    def subtracts_policy(self) -> bool:
        """Whether the reward has minus the log-prob of the policy in it."""
        return self.form != "f" and subtracts_policy(self.head)


def check_reward_model(name: str) -> RewardSettings:
    """Settings of a reward model that is whole; reads no weights.

    Raises:
        InputError: there is none, or files are missing.
    """
    return read_settings(local_folder(name))


def check_policy(settings: RewardSettings, policy: str | None) -> None:
    """Refuse a policy beside a reward model whose logit has no log-prob of the policy's in it.

    Raises:
        InputError: names the head.
    """
    if policy is not None and not subtracts_policy(settings.head):
        raise InputError(f"--policy is for the heads airl and implicit; this reward model has head {settings.head}")


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
        stored = read_json(path)
        known = {field.name for field in fields(RewardSettings)}
        if stored.get("calibration") is not None:
            stored["calibration"] = Calibration(**stored["calibration"])
        settings = RewardSettings(**{key: value for key, value in stored.items() if key in known})
    except InputError:
        raise
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    weights = any(folder.glob("*.safetensors"))
    needed = {"config.json": (folder / "config.json").is_file(), "model.safetensors": weights}
    needed["tokenizer.json"] = (folder / "tokenizer.json").is_file()
    if settings.head == "action":  # the only head with weights beside the backbone's
        needed[HEAD_FILE] = (folder / HEAD_FILE).is_file()
        needed["model.safetensors"] = any(path.name != HEAD_FILE for path in folder.glob("*.safetensors"))
    missing = [name for name, present in needed.items() if not present]
    if missing:
        raise InputError(f"{folder} is not a complete reward model: {', '.join(missing)} missing")
    return settings


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Put a calibration into a reward model's ``tracereward.json``; all else in it stays as it is."""
    path = Path(folder) / SETTINGS_FILE
    stored = read_json(path)
    atomic_write_json(path, {**stored, "calibration": asdict(calibration)})


def model_card(settings: RewardSettings, notes: str) -> str:
    """The artefact's README: what the numbers mean and how to load it."""
    kind = "AutoModelForCausalLM" if reads_log_probs(settings.head) else "AutoModelForTokenClassification"
    kind += " plus head.safetensors" if settings.head == "action" else ""
    meaning = (
        "a reward f: what the experts do more than the policy that they were told from, with its log-prob taken out"
        if subtracts_policy(settings.head)
        else "a log-odds of being the expert's rather than the policy's"
    )
    form = {
        "logit": "the log-odds",
        "logit_plus_logprob": f"the log-odds plus the log-prob under `{settings.reference_model or 'the reference'}`",
        "f": "f",
    }[settings.form]
    gold = "\n- **uses gold answers**: rollouts that a verifier found right were trained on as experts' traces"
    gold = gold if settings.uses_gold_answers else ""
    return f"""---
library_name: tracereward
tags: [reward-model, tracereward, {settings.head}-head]
base_model: {settings.base_model}
---

# Token-level reward model

Learned from expert traces by adversarial inverse reinforcement learning (arXiv 2510.01857). Each completion token has
{meaning}. High is like the expert.

- head: `{settings.head}` ({kind}); supervision: `{settings.granularity}`; rewards divided by {settings.temperature:g}
  and clipped to +-{settings.beta_clip:g}
- training rewarded {form}
- recipe: `{settings.task}`, template: `{settings.template}`
- trace reward: `{settings.aggregate}` of its token rewards{gold}

```python
from tracereward import TokenRewardModel

scores = TokenRewardModel.from_pretrained("reward_model").score(prompts, completions)
```

The logit is the reward: a `token-classification` pipeline would apply a softmax to the single label and show 1.0.
{notes}"""
