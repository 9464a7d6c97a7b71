"""Options that would be accepted and ignored are refused: one list of rules, checked in one place.

An option counts as given if its value is not the default; `Rule.when` decides from the values of all options whether
it has no effect. The options of TRL that a command does not have at all are in `trl_options`.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from tracereward.data.readers import has_splits
from tracereward.errors import InputError
from tracereward.files import read_json
from tracereward.modeling.steps import NAMED
from tracereward.training.option_types import option_defaults
from tracereward.training.options import NOT_OF
from tracereward.training.trl_options import COMMANDS, FIT, ROLLOUTS, SFT, TRAIN, refusal


class Values(dict[str, Any]):
    """Values of options by attribute; None for one that the command or this version of TRL does not have."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options that have no effect next to the values of others.

    Attributes:
        options: their names.
        when: whether they have no effect.
        why: a sentence with the fix, for the message and the documentation.
        commands: the commands with this rule.
    """

    options: tuple[str, ...]
    when: Callable[[Values], bool]
    why: str
    commands: tuple[str, ...] = COMMANDS


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _recomputes(o: Values) -> bool:
    return bool(o.gradient_checkpointing if o.activation_checkpointing is None else o.activation_checkpointing)


def _tracked(o: Values, tracker: str | None = None) -> bool:
    """Whether the run is reported to `tracker`, or to any."""
    given = [o.report_to] if isinstance(o.report_to, str) else list(o.report_to or ())
    trackers = [name for name in given if name != "none"]
    return bool(trackers) if tracker is None else "all" in trackers or tracker in trackers


def _untrained(o: Values) -> bool:
    return not o.discriminator_updates and not o.discriminator_warmup_updates


CONFIG_RULES: tuple[Rule, ...] = (
    # Length, checkpoints, logs
    Rule(
        options=("num_train_epochs",),
        when=lambda o: o.max_steps > 0,
        why="--max_steps sets the length of the run: remove one of the two",
    ),
    Rule(
        options=("save_steps",),
        when=lambda o: o.save_strategy != "steps",
        why="it needs --save_strategy steps",
    ),
    Rule(
        options=("save_total_limit", "validation_fraction"),
        when=lambda o: o.save_strategy == "no",
        why="--save_strategy no writes no checkpoints: use steps or epoch",
    ),
    Rule(
        options=("logging_steps",),
        when=lambda o: o.logging_strategy != "steps",
        why="it needs --logging_strategy steps",
    ),
    Rule(
        options=("logging_strategy", "on_failure"),
        when=lambda o: o.logging_strategy == "no" and o.on_failure != "ignore",
        why="failures are found in the logs: use --logging_strategy steps, or --on_failure ignore",
        commands=(TRAIN,),
    ),
    Rule(
        options=_names("eval_delay eval_on_start per_device_eval_batch_size"),
        when=lambda o: not o.validation_fraction,
        why="no loss is evaluated without --validation_fraction",
        commands=(SFT,),
    ),
    Rule(
        options=("run_name",),
        when=lambda o: not _tracked(o),
        why="no tracker: set --report_to",
        commands=(*COMMANDS, FIT),
    ),
    Rule(
        options=_names("project trackio_space_id trackio_bucket_id trackio_static_space_id"),
        when=lambda o: not _tracked(o, "trackio"),
        why="it needs --report_to trackio",
    ),
    Rule(
        options=_names("hub_model_id hub_token hub_revision"),
        when=lambda o: not o.push_to_hub,
        why="it needs --push_to_hub true",
        commands=(*COMMANDS, FIT),
    ),
    Rule(
        options=("hub_private_repo",),
        when=lambda o: not o.push_to_hub and not o.log_completions_hub_repo and not _tracked(o, "trackio"),
        why="it needs --push_to_hub true",
        commands=(*COMMANDS, FIT),
    ),
    # Optimiser
    Rule(
        options=("warmup_steps",),
        when=lambda o: o.lr_scheduler_type == "constant",
        why="--lr_scheduler_type constant has no warm-up: use constant_with_warmup",
    ),
    Rule(
        options=("lr_scheduler_kwargs",),
        when=lambda o: o.lr_scheduler_type in ("constant", "constant_with_warmup"),
        why="a constant learning rate has no arguments: set --lr_scheduler_type",
    ),
    Rule(
        options=_names("adam_beta1 adam_beta2 adam_epsilon"),
        when=lambda o: str(getattr(o.optim, "value", o.optim)).startswith(("sgd", "adagrad", "rmsprop", "adafactor")),
        why="the optimiser --optim is no Adam",
    ),
    Rule(
        options=("optim_target_modules",),
        when=lambda o: not any(name in str(getattr(o.optim, "value", o.optim)) for name in ("galore", "apollo")),
        why="it needs --optim galore_adamw or apollo_adamw",
    ),
    # Speed and memory
    Rule(
        options=("gradient_checkpointing",),
        when=lambda o: o.activation_checkpointing is not None,
        why="--activation_checkpointing is its new name: remove one of the two",
    ),
    Rule(
        options=("gradient_checkpointing_kwargs",),
        when=lambda o: o.activation_checkpointing_kwargs is not None,
        why="--activation_checkpointing_kwargs is its new name: remove one of the two",
    ),
    Rule(
        options=_names("gradient_checkpointing_kwargs activation_checkpointing_kwargs"),
        when=lambda o: not _recomputes(o),
        why="it needs --activation_checkpointing true",
    ),
    Rule(
        options=("liger_kernel_config",),
        when=lambda o: not o.use_liger_kernel,
        why="it needs --use_liger_kernel true",
    ),
    Rule(
        options=_names(
            "dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers "
            "dataloader_prefetch_factor"
        ),
        when=lambda o: not o.dataloader_num_workers,
        why="rows are loaded by the process itself: set --dataloader_num_workers",
    ),
    Rule(options=("fsdp_config",), when=lambda o: not o.fsdp, why="it needs --fsdp true"),
    # Rollouts
    Rule(
        options=(
            "cache_implementation",
            "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
        ),
        when=lambda o: o.use_vllm,
        why="vLLM samples the rollouts: remove it or --use_vllm",
        commands=ROLLOUTS,
    ),
    Rule(
        options=("cache_implementation", "compile_rollouts"),
        when=lambda o: o.use_transformers_continuous_batching,
        why="continuous batching has a cache of its own: remove it or --use_transformers_continuous_batching",
        commands=ROLLOUTS,
    ),
    Rule(
        options=("cache_implementation",),
        when=lambda o: o.compile_rollouts and o.cache_implementation != "static",
        why="--compile_rollouts uses a static cache: remove one of the two",
        commands=ROLLOUTS,
    ),
    Rule(
        options=("transformers_continuous_batching_config",),
        when=lambda o: not o.use_transformers_continuous_batching,
        why="it needs --use_transformers_continuous_batching true",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("num_completions_to_print log_unique_prompts log_completions_hub_repo"),
        when=lambda o: not o.log_completions,
        why="it needs --log_completions true",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names(
            "vllm_mode vllm_model_impl vllm_structured_outputs_regex vllm_gpu_memory_utilization "
            "vllm_tensor_parallel_size vllm_max_model_length vllm_enable_sleep_mode vllm_server_base_url "
            "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
            "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
            "vllm_importance_sampling_clip_min"
        ),
        when=lambda o: not o.use_vllm,
        why="it needs --use_vllm true",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port"),
        when=lambda o: o.vllm_mode != "server",
        why="it needs --vllm_mode server",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("vllm_server_host vllm_server_port"),
        when=lambda o: o.vllm_server_base_url is not None,
        why="--vllm_server_base_url has host and port: remove one of the two",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names(
            "vllm_model_impl vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_max_model_length "
            "vllm_enable_sleep_mode"
        ),
        when=lambda o: o.vllm_mode == "server",
        why="the server has its own settings: give it there, or use --vllm_mode colocate",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names(
            "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"
        ),
        when=lambda o: not o.vllm_importance_sampling_correction,
        why="it needs --vllm_importance_sampling_correction true",
        commands=ROLLOUTS,
    ),
    # The policy's loss
    Rule(
        options=_names("use_bias_correction_kl sync_ref_model"),
        when=lambda o: not o.beta,
        why="the loss has no KL: set --beta",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("ref_model_mixup_alpha ref_model_sync_steps"),
        when=lambda o: not o.sync_ref_model,
        why="it needs --sync_ref_model true",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("entropy_target entropy_coef_delta entropy_coef_min entropy_coef_max"),
        when=lambda o: not o.use_adaptive_entropy,
        why="it needs --use_adaptive_entropy true",
        commands=ROLLOUTS,
    ),
    Rule(
        options=("epsilon",),
        when=lambda o: o.loss_type in ("sapo", "vespo") or (o.loss_type == "cispo" and o.epsilon_high is not None),
        why="--loss_type has no such bound (sapo and vespo have none, cispo only --epsilon_high)",
        commands=ROLLOUTS,
    ),
    Rule(
        options=("epsilon_high",),
        when=lambda o: o.loss_type in ("sapo", "vespo"),
        why="--loss_type sapo and vespo do not clip",
        commands=ROLLOUTS,
    ),
    Rule(
        options=("delta",),
        when=lambda o: o.loss_type in ("sapo", "vespo", "cispo"),
        why="--loss_type sapo, vespo and cispo have no two-sided clipping",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("sapo_temperature_neg sapo_temperature_pos"),
        when=lambda o: o.loss_type != "sapo",
        why="it needs --loss_type sapo",
        commands=ROLLOUTS,
    ),
    Rule(
        options=_names("vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos"),
        when=lambda o: o.loss_type != "vespo",
        why="it needs --loss_type vespo",
        commands=ROLLOUTS,
    ),
    # Advantages
    Rule(
        options=("scale_rewards",),
        when=lambda o: o.advantages == "token",
        why="--advantages token normalises over the tokens of a prompt's rollouts",
        commands=(TRAIN,),
    ),
    Rule(
        options=("whiten_rewards",),
        when=lambda o: o.advantages == "token" or o.scale_rewards not in ("none", False),
        why="the advantages are normalised anyway: it needs --scale_rewards none and --advantages trajectory",
        commands=(TRAIN,),
    ),
    Rule(
        options=("gamma",),
        when=lambda o: o.advantages != "token",
        why="it needs --advantages token",
        commands=(TRAIN,),
    ),
    # The discriminator
    Rule(
        options=("interval",),
        when=lambda o: o.granularity != "interval",
        why="it needs --granularity interval",
        commands=(TRAIN, FIT),
    ),
    Rule(
        options=("step_delimiter",),
        when=lambda o: o.steps in NAMED,
        why="--steps already says what ends a step",
        commands=(TRAIN, FIT),
    ),
    Rule(
        options=("label_smoothing",),
        when=lambda o: o.objective != "bce",
        why="it needs --objective bce",
        commands=(TRAIN, FIT),
    ),
    Rule(
        options=("positive_prior",),
        when=lambda o: o.objective != "nnpu",
        why="it needs --objective nnpu",
        commands=(TRAIN, FIT),
    ),
    Rule(
        options=_names("discriminator_every discriminator_online_learning_rate discriminator_gate_high"),
        when=lambda o: not o.discriminator_updates,
        why="--discriminator_updates 0 freezes the discriminator after the warm-up",
        commands=(TRAIN,),
    ),
    Rule(
        options=_names("warmup_model warmup_candidates warmup_prompts warmup_rollouts"),
        when=lambda o: not o.discriminator_warmup_updates,
        why="--discriminator_warmup_updates 0 leaves the warm-up out",
        commands=(TRAIN,),
    ),
    Rule(
        options=_names("warmup_model warmup_prompts warmup_rollouts"),
        when=lambda o: o.warmup_candidates is not None,
        why="--warmup_candidates has the warm-up's rollouts, and nothing is sampled: remove it",
        commands=(TRAIN,),
    ),
    Rule(
        options=("discriminator_learning_rate",),
        when=lambda o: (
            not o.discriminator_warmup_updates
            and (o.discriminator_online_learning_rate is not None or not o.discriminator_updates)
        ),
        why="it is the learning rate of the warm-up, which --discriminator_warmup_updates 0 leaves out",
        commands=(TRAIN,),
    ),
    Rule(
        options=("replay_share",),
        when=lambda o: not o.discriminator_updates,
        why="--discriminator_updates 0: the warm-up always uses the replay buffer, and no other update follows",
        commands=(TRAIN,),
    ),
    Rule(
        options=("replay_size",),
        when=lambda o: not o.discriminator_warmup_updates and (not o.discriminator_updates or not o.replay_share),
        why="nothing reads the replay buffer: set --replay_share or --discriminator_warmup_updates",
        commands=(TRAIN,),
    ),
    Rule(
        options=_names(
            "discriminator_prompts discriminator_rollouts first_difference perturbed_per_expert positives negatives "
            "objective positive_prior balance label_smoothing centre_penalty gradient_penalty r1_penalty spectral_norm "
            "token_dropout expert_nll discriminator_ema"
        ),
        when=_untrained,
        why="--discriminator_updates 0 and --discriminator_warmup_updates 0: the discriminator is never trained",
        commands=(TRAIN,),
    ),
)
"""Rules between the options of a command's config."""

FIT_RULES: tuple[Rule, ...] = (
    Rule(
        options=_names(
            "head use_peft lora_r lora_alpha lora_target_modules positive_prior label_smoothing first_difference "
            "perturbed_per_expert updates learning_rate update_prompts update_candidates token_budget save_steps "
            "bf16"
        ),
        when=lambda o: o.readout,
        why="a read-out leaves the model as it is: set --readout false to fine-tune it",
        commands=(FIT,),
    ),
    Rule(
        options=("balance",),
        when=lambda o: o.readout and o.objective == "pairwise" and o.balance == "question",
        why="in a read-out with --objective pairwise every question weighs the same already",
        commands=(FIT,),
    ),
    Rule(
        options=("learning_curve",),
        when=lambda o: not o.readout,
        why="it is of read-outs: remove --readout false",
        commands=(FIT,),
    ),
    Rule(
        options=("states",),
        when=lambda o: o.head == "action",
        why="head action starts untrained, and not from a read-out",
        commands=(FIT,),
    ),
)
"""Rules of `fit` alone; they come before the others."""

JOB_RULES: tuple[Rule, ...] = (
    Rule(
        options=_names(
            "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
            "use_rslora use_dora"
        ),
        when=lambda o: not o.use_peft,
        why="it needs --use_peft true",
        commands=(*COMMANDS, FIT),
    ),
    Rule(
        options=_names("bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant"),
        when=lambda o: not o.load_in_4bit,
        why="it needs --load_in_4bit true",
    ),
    Rule(
        options=("padding_free",),
        when=lambda o: not str(o.attn_implementation).startswith(("flash", "kernels-community")),
        why="without --attn_implementation flash_attention_2 the rows would attend to each other",
        commands=(SFT,),
    ),
    Rule(
        options=("sync_ref_model",),
        when=lambda o: o.use_peft,
        why="with --use_peft the reference is the policy without its adapter, which does not move",
        commands=ROLLOUTS,
    ),
    Rule(
        options=NOT_OF[SFT],
        when=lambda o: True,
        why="sft trains on demonstrations only: remove it",
        commands=(SFT,),
    ),
    Rule(
        options=("expert_prompt_share",),
        when=lambda o: o.unlabeled_dataset_name is None,
        why="all prompts have a demonstration: it needs --unlabeled_dataset_name",
        commands=(TRAIN,),
    ),
    Rule(
        options=("dataset_train_split", "dataset_config"),
        when=lambda o: not has_splits(o.dataset_name),
        why="--dataset_name has no splits and configurations: it is a file, or a folder of files without them",
    ),
    Rule(
        options=("validation_dataset_split",),
        when=lambda o: o.validation_dataset_name is None or not has_splits(o.validation_dataset_name),
        why="it is the split of a Hub dataset in --validation_dataset_name",
    ),
    Rule(
        options=("chat_template_kwargs",),
        when=lambda o: o.template == "plain",
        why="it needs --template chat",
        commands=(*COMMANDS, FIT),
    ),
)
"""Rules that involve options of the data or the model."""
ALL_RULES = (*FIT_RULES, *CONFIG_RULES, *JOB_RULES)


def values_of(*options: Any) -> Values:
    """The given values of dataclasses of options; a config's are those before TRL derives others from them."""
    values = Values()
    for one in options:
        names = {field.name for field in dataclasses.fields(one)}
        values |= {name: value for name, value in vars(one).items() if name in names}
        given = vars(one).get("given")
        values |= {} if given is None else {name: value for name, value in given.items() if name in names}
    return values


def without_effect(command: str, values: Values, rules: Iterable[Rule] = ALL_RULES) -> dict[str, str]:
    """The options that have no effect next to the values of others, each with the reason."""
    found: dict[str, str] = {}
    for rule in rules:
        if command in rule.commands and rule.when(values):
            found |= {name: rule.why for name in rule.options if name in values and name not in found}
    return found


def effective(command: str, stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that had an effect: earlier versions accepted and stored others too.

    Args:
        command: the run's command.
        stored: the run's ``config.yaml``.
        defaults: of all options.
    """
    idle = without_effect(command, Values({**defaults, **stored}))
    return {name: value for name, value in stored.items() if name not in idle and refusal(command, name) is None}


def check_refused(command: str, options: Any) -> None:
    """Refuse TRL's options that the command does not have.

    Raises:
        InputError: names the option and the reason.
    """
    defaults = option_defaults(type(options))
    for name, default in defaults.items():
        refused, value = refusal(command, name), getattr(options, name)
        if refused is not None and value != default and value not in refused.also:
            raise InputError(f"--{name} is not available in tracereward {command}: {refused.why}")


def check_effects(command: str, values: Values, defaults: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Refuse options that were given and have no effect.

    Raises:
        InputError: names the option, its value and the reason.
    """
    for name, why in without_effect(command, values, rules).items():
        if values[name] != defaults[name]:
            raise InputError(f"--{name} {_word(values[name])} has no effect: {why}")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def check_config(command: str, config: Any) -> None:
    """Check a config before TRL derives values from it: `check_refused`, `check_effects`, packages and files."""
    check_refused(command, config)
    check_effects(command, values_of(config), option_defaults(type(config)), CONFIG_RULES)
    _check_installed(config)


def check_job(command: str, data: Any, config: Any, model: Any) -> None:
    """Check the options of data, training and model against each other."""
    check_refused(command, model)
    defaults = option_defaults(type(data), type(config), type(model))
    check_effects(command, values_of(data, model, config), defaults, JOB_RULES)


def check_fit(options: Any) -> None:
    """Check the options of `fit` against each other.

    Raises:
        InputError: names an option that would have no effect.
    """
    check_effects(FIT, values_of(options), option_defaults(type(options)), ALL_RULES)


def _check_json(option: str, value: Any, *, file: bool) -> None:
    """Refuse a text that is not the JSON object, or the file of one, that it has to be."""
    if not isinstance(value, str) or not (file or value.startswith("{")):
        return
    path = Path(value).expanduser()
    if not value.startswith("{") and not path.is_file():
        raise InputError(f"{option} {value}: no such file")
    try:
        json.loads(value) if value.startswith("{") else read_json(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{option} {value}: not valid JSON: {error}") from error


def _check_installed(config: Any) -> None:
    """Refuse options whose package or file is missing or not JSON, before anything is loaded."""
    o = values_of(config)
    for name, value in vars(config).items():
        _check_json(f"--{name}", value, file=name in ("deepspeed", "fsdp_config", "accelerator_config"))
    more = getattr(o, "generation_kwargs", None) or {}
    if isinstance(more, str) and more.startswith("{"):
        more = json.loads(more)
    if not isinstance(more, dict):
        raise InputError(f"--generation_kwargs {more}: must be a JSON object")
    if not o.use_vllm and (unknown := [name for name in more if not hasattr(GenerationConfig(), name)]):
        raise InputError(
            f"--generation_kwargs: {', '.join(map(repr, unknown))} is no option of transformers' generation: remove it"
        )
    if o.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise InputError("--fsdp shards over several processes: start them with `accelerate launch`, or remove it")
    optimiser = str(getattr(o.optim, "value", o.optim))
    needed = {
        "--use_liger_kernel": (o.use_liger_kernel, "liger_kernel", "liger-kernel"),
        "--deepspeed": (o.deepspeed, "deepspeed", "tracereward[deepspeed]"),
        "--use_vllm": (o.use_vllm, "vllm", "tracereward[vllm]"),
        f"--optim {optimiser}": ("bnb" in optimiser or "8bit" in optimiser, "bitsandbytes", "bitsandbytes"),
    }
    for option, (used, module, package) in needed.items():
        if used and importlib.util.find_spec(module) is None:
            raise InputError(f"{option} needs a package that is not installed: pip install '{package}'")
