"""Settings of a reward model: ``tracereward.json``, and checks of a reward model's folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from tracereward.errors import InputError, check_choice, first_line
from tracereward.files import atomic_write_json, read_json
from tracereward.modeling.loading import (
    CAUSAL_LM,
    CLASSIFIER,
    BackboneClass,
    called,
    check_weights,
    local_folder,
    read_config,
)
from tracereward.modeling.model_folder import REWARD_MODEL, SETTINGS_FILE, check_folder
from tracereward.modeling.precision import DTYPES
from tracereward.modeling.rendering import TEMPLATES, Rendering
from tracereward.modeling.steps import StepRule
from tracereward.rewards.abstention import Abstention, threshold_of, why_abstained
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.choices import GRANULARITIES, HEADS, REWARD_FORMS
from tracereward.rewards.first_error_rules import FirstErrorRule, LevelRule, MarksSteps
from tracereward.rewards.heads import ActionHead, default_reward_form, reads_log_probs, subtracts_policy
from tracereward.rewards.token_scores import AGGREGATES
from tracereward.thinking import MARKS, Thinking

HEAD_FILE = "head.safetensors"
HOW_TO_FIT = "fit one on labelled traces with `tracereward calibrate`"


@dataclass(frozen=True)
class RewardSettings:
    """Settings that training, scoring and serving share; stored as ``tracereward.json``.

    Attributes:
        head: one of `choices.HEADS`.
        layers: that head ``token`` reads, increasing and from 1, the last one the backbone's last; empty if only that.
        granularity: which tokens are supervised, see `supervision.supervision_mask`.
        interval: k of granularity ``interval``.
        step_delimiter: text that ends a step, if `steps` is "".
        steps: how a trace is cut into steps, see `modeling.steps.StepRule`.
        beta_clip: token rewards are clipped to +-beta_clip, in log-odds.
        temperature: log-odds are divided by it before the clip.
        think: the texts that open and close the thinking of a completion; none for those of well-known models.
        think_opened: whether prompts end within the thinking, so that completions start in it.
        thinking_weight: what the thinking weighs in the trace reward, in [0, 1], and the answer the rest; a part that
            weighs nothing is not supervised. None: the trace is one text.
        reward_form: reward used in training, one of `choices.REWARD_FORMS`; "" is the head's default. `score` computes
            it if given the models whose log-probs it needs, otherwise f.
        reference_model: the model whose log-prob ``logit_plus_logprob`` adds.
        label_rule: which traces were positives and which negatives, such as ``agreeing/disagreeing`` (see
            `training.label_rules`); "" in reward models of earlier versions.
        uses_gold_answers: whether training used rollouts with a verified answer as expert traces.
        aggregate: how token rewards are reduced to a trace reward.
        task: name of the task whose prompts and answers it was trained on.
        template: ``plain`` or ``chat``.
        chat_template_kwargs: variables of the chat template, see `Rendering`.
        date: the day that a chat template which reads the clock wrote in training, see `Rendering`.
        base_model: checkpoint from which the backbone was initialised.
        calibration: map from trace reward to the probability of being correct; None before `tracereward calibrate`.
        abstention: what is known of wrong answers of calibration questions, for abstaining; empty before
            `tracereward calibrate`.
        first_error: where a trace's suspected first error is; None if no rule was found that can be trusted.
        dtype: the precision in which these two were fitted, and in which it scores; "" is its checkpoint's.
    """

    head: str = "action"
    layers: tuple[int, ...] = ()
    granularity: str = "dense"
    interval: int = 15
    step_delimiter: str = "\n"
    steps: str = ""
    beta_clip: float = 5.0
    temperature: float = 1.0
    think: tuple[str, ...] = ()
    think_opened: bool = False
    thinking_weight: float | None = None
    reward_form: str = ""
    reference_model: str = ""
    label_rule: str = ""
    uses_gold_answers: bool = False
    aggregate: str = "mean"
    task: str = "generic"
    template: str = "plain"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    base_model: str = ""
    calibration: Calibration | None = None
    abstention: tuple[Abstention, ...] = ()
    first_error: FirstErrorRule | None = None
    dtype: str = ""

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        object.__setattr__(self, "layers", _checked_layers(self.layers, self.head))
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("template", self.template, TEMPLATES)
        if not isinstance(self.interval, int) or self.interval < 1:
            raise InputError(f"interval must be at least 1, not {self.interval!r}")
        _ = self.step_rule  # refuses what is no rule
        object.__setattr__(self, "think", tuple(self.think))  # JSON has lists
        _ = self.thinking
        weight = self.thinking_weight
        if weight is not None and (not isinstance(weight, (int, float)) or not 0 <= weight <= 1):
            raise InputError(f"thinking_weight must be between 0 and 1, not {weight!r}")
        for name in ("beta_clip", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:  # also rejects NaN
                raise InputError(f"{name} must be positive, not {value!r}")
        if self.dtype:
            check_choice("dtype", self.dtype, DTYPES)
        check_choice("reward_form", self.form, REWARD_FORMS)
        if self.form == "f" and not subtracts_policy(self.head):
            raise InputError(f"reward_form f is for the heads airl and implicit; with head {self.head} use logit")

    @property
    def rendering(self) -> Rendering:
        """How prompts become text."""
        return Rendering(template=self.template, chat_template_kwargs=self.chat_template_kwargs, date=self.date)

    @property
    def step_rule(self) -> StepRule:
        """Where steps end."""
        return StepRule(delimiter=self.step_delimiter, steps=self.steps)

    @property
    def thinking(self) -> Thinking:
        """How completions are split into thinking and answer."""
        return Thinking(marks=(self.think,) if self.think else MARKS, opened=self.think_opened)  # type: ignore[arg-type]

    @property
    def form(self) -> str:
        """The reward form, with the head's default filled in."""
        return self.reward_form or default_reward_form(self.head)

    def first_error_rule(self, threshold: float | None, option: str) -> MarksSteps:
        """The rule for a trace's first error: the first step with a mean reward under `threshold`, or the stored rule.

        Raises:
            InputError: neither is there; names the `option` that gives a threshold.
        """
        if threshold is not None:
            return LevelRule(threshold)
        if self.first_error is None:
            raise InputError(f"the reward model has no rule for the first error: {HOW_TO_FIT}, or give {option}")
        return self.first_error

    def why_not(self, method: str, reward: float, risk: float | None) -> str | None:
        """Why a question is not answered with its chosen candidate; None if it is.

        Args:
            method: that chose the candidate.
            reward: of the candidate.
            risk: see `rewards.abstention`; None answers every question.

        Raises:
            InputError: see `threshold_of`.
        """
        if risk is None or reward > (threshold := threshold_of(self.abstention, method, risk)):
            return None
        if self.calibration is None:
            return why_abstained(None, reward, threshold, None)
        probability, least = self.calibration.probabilities([reward, threshold]).tolist()
        return why_abstained(probability, reward, threshold, least)

    @property
    def is_classifier(self) -> bool:
        """Whether f is the only logit of a token classifier, so that other programs can compute it."""
        return not (reads_log_probs(self.head) or self.layers)

    @property
    def adds_reference(self) -> bool:
        """Whether the reward adds the log-prob of a reference model."""
        return self.form == "logit_plus_logprob"

    @property
    def subtracts_policy(self) -> bool:
        """Whether the reward subtracts the log-prob of the policy."""
        return self.form != "f" and subtracts_policy(self.head)


def check_reward_model(name: str) -> RewardSettings:
    """Settings of a reward model, after a check that its folder is complete; loads no weights of the backbone.

    Raises:
        InputError: it is not a reward model, or files or weights are missing or damaged.
    """
    folder = local_folder(name)
    with called(name, folder):
        settings = read_settings(folder)
        check_weights(folder, backbone_class(settings))
        if settings.head == "action":
            load_head(ActionHead(read_config(folder).get_text_config().hidden_size), folder)
    return settings


def backbone_class(settings: RewardSettings) -> BackboneClass:
    """The class of transformers that loads a reward model's backbone."""
    return CAUSAL_LM if reads_log_probs(settings.head) else CLASSIFIER


def load_head(head: ActionHead, folder: str | Path) -> None:
    """Load the weights of a head from a reward model's folder.

    Raises:
        InputError: the file is damaged, or belongs to another head.
    """
    path = Path(folder) / HEAD_FILE
    try:
        head.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split()) if isinstance(error, RuntimeError) else first_line(error)
        raise InputError(f"{path}: is damaged or belongs to another model: {why}") from error


def check_policy(settings: RewardSettings, policy: str | None) -> None:
    """Reject a policy for a reward model whose logit does not contain the policy's log-prob.

    Raises:
        InputError: names the head.
    """
    if policy is not None and not subtracts_policy(settings.head):
        raise InputError(f"--policy is for the heads airl and implicit; this reward model has head {settings.head}")


def read_settings(folder: str | Path) -> RewardSettings:
    """Read and check ``tracereward.json``, and check that the other files of the reward model are present and readable.

    Raises:
        InputError: names the file that is missing or damaged.
    """
    folder = Path(folder)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise InputError(_not_a_reward_model(folder, f"{SETTINGS_FILE} is missing"))
    try:
        stored = read_json(path)
        kind = stored.get("kind", REWARD_MODEL)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if kind != REWARD_MODEL:
        raise InputError(_not_a_reward_model(folder, f"it is a {kind}"))
    try:
        known = {one.name for one in fields(RewardSettings)}
        if stored.get("calibration") is not None:
            stored["calibration"] = Calibration(**stored["calibration"])
        stored["abstention"] = tuple(Abstention(**record) for record in stored.get("abstention") or ())
        rule = stored.get("first_error")
        if isinstance(rule, dict) and "signal" in rule:  # of an earlier version: as if there were none
            rule = None
        stored["first_error"] = None if rule is None else FirstErrorRule(**rule)
        settings = RewardSettings(**{key: value for key, value in stored.items() if key in known})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    needed = ["config.json", "tokenizer.json", *([HEAD_FILE] if settings.head == "action" else [])]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is not a complete reward model: {', '.join(missing)} missing")
    check_folder(folder, REWARD_MODEL)
    _check_labels(settings, folder)
    return settings


def _checked_layers(layers: Any, head: str) -> tuple[int, ...]:
    """The layers that a head reads, as JSON or Python gives them."""
    found = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
    if not found:
        return ()
    numbers = all(type(layer) is int and layer > 0 for layer in found)
    if len(found) == 1 or not numbers or list(found) != sorted(set(found)):
        raise InputError(f"layers must be two or more increasing numbers from 1, or none, not {layers!r:.80}")
    if head != "token":
        raise InputError(f"layers are for head token; with head {head} leave them out")
    return found


def _check_labels(settings: RewardSettings, folder: Path) -> None:
    """Refuse a token classifier whose labels are not those of the settings: its rewards would be others, unnoticed."""
    if backbone_class(settings) is not CLASSIFIER:
        return
    config = read_config(folder)
    last, labels = config.get_text_config().num_hidden_layers, config.num_labels
    layers = settings.layers or (last,)
    if (layers[-1], len(layers)) != (last, labels):
        read = ", ".join(map(str, layers))
        raise InputError(
            f"{folder}: by {SETTINGS_FILE} its head reads the states of layers {read}, and config.json has {last} "
            f"layers and {labels} labels: the two files are of two models; copy both from one"
        )


def _not_a_reward_model(folder: Path, why: str) -> str:
    """That a folder is no reward model, and where there is one."""
    inside, beside = folder / REWARD_MODEL, folder.parent / REWARD_MODEL
    near = next((path for path in (inside, beside) if (path / SETTINGS_FILE).is_file()), None)
    fix = f"Give {near}." if near else "`tracereward train` writes one."
    return f"{folder} is not a reward model: {why}. {fix}"


def write_fitted(
    folder: str | Path, **fitted: Calibration | tuple[Abstention, ...] | FirstErrorRule | str | None
) -> None:
    """Store a `calibration`, records for `abstention`, a rule for the `first_error` or their `dtype`.

    They are in a reward model's ``tracereward.json``.

    None removes what is stored; the other fields do not change.
    """
    path = Path(folder) / SETTINGS_FILE
    values = {
        name: [asdict(one) for one in value]
        if isinstance(value, tuple)
        else asdict(value)
        if is_dataclass(value)
        else value
        for name, value in fitted.items()
    }
    atomic_write_json(path, {**read_json(path), **values})
