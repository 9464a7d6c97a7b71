"""What becomes of the options of TRL's `SFTConfig`, `GRPOConfig` and `ModelConfig`: plain data, no imports of TRL.

Each option is in one of three tables: honoured, that is passed on and effective; refused with a sentence if its value
is not the default; or internal, which is refused too and shown nowhere. An option may be refused by one command and
honoured by another. Options that have no effect next to the values of others are in `option_rules`.
"""

from dataclasses import dataclass
from typing import Any

SFT, GRPO, TRAIN, FIT = "sft", "grpo", "train", "fit"
COMMANDS = (SFT, GRPO, TRAIN)
"""The commands that train a policy with TRL; `fit` has none of its options."""
ROLLOUTS = (GRPO, TRAIN)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An option that a command does not have.

    Attributes:
        why: a sentence with the fix, for the message and the documentation.
        commands: the commands that refuse it.
        also: values accepted although they are not the default: those in force anyway.
    """

    why: str
    commands: tuple[str, ...] = COMMANDS
    also: tuple[Any, ...] = ()


HONOURED: dict[str, dict[str, str]] = {
    "Model": {
        "model_name_or_path": "folder or Hub id of the starting policy",
        "model_revision": "its branch, tag or commit on the Hub",
        "dtype": "precision of the loaded weights",
        "attn_implementation": "attention kernel of the policy",
        "use_cache": "`use_cache` of the policy's configuration while it trains",
    },
    "LoRA and quantisation": {
        "use_peft": "train LoRA adapters instead of all weights",
        "lora_r": "rank",
        "lora_alpha": "scale",
        "lora_dropout": "dropout of the adapters",
        "lora_target_modules": "layers with an adapter",
        "lora_target_parameters": "parameters with an adapter",
        "lora_modules_to_save": "layers that are trained in full",
        "use_rslora": "rank-stabilised scale",
        "use_dora": "weight-decomposed adapters",
        "load_in_4bit": "4-bit weights of the base model (QLoRA)",
        "load_in_8bit": "8-bit weights of the base model",
        "bnb_4bit_quant_type": "4-bit number format",
        "bnb_4bit_quant_storage": "storage type of 4-bit weights",
        "use_bnb_nested_quant": "quantise the quantisation constants too",
    },
    "Length of the run and batches": {
        "num_train_epochs": "passes over the rows",
        "max_steps": "optimiser steps, instead of passes",
        "per_device_train_batch_size": "rows (or rollouts) in one forward and backward pass",
        "per_device_eval_batch_size": "rows in one pass of the validation loss",
        "gradient_accumulation_steps": "passes in one optimiser step",
        "auto_find_batch_size": "halve the batch when memory runs out",
        "average_tokens_across_devices": "average the loss over the tokens of all processes",
        "shuffle_dataset": "shuffle the rows",
        "train_sampling_strategy": "order of the rows",
        "seed": "random seed",
        "data_seed": "random seed of the order of the rows",
        "full_determinism": "deterministic kernels",
        "ignore_data_skip": "on `--resume`, start with the first row again",
    },
    "Optimiser and learning rate": {
        "learning_rate": "peak learning rate of the policy",
        "lr_scheduler_type": "schedule of the learning rate",
        "lr_scheduler_kwargs": "arguments of the schedule",
        "warmup_steps": "steps until the peak, or their share",
        "optim": "optimiser of the policy",
        "optim_args": "arguments of the optimiser",
        "optim_target_modules": "layers of GaLore or APOLLO",
        "adam_beta1": "decay of the first moment",
        "adam_beta2": "decay of the second moment",
        "adam_epsilon": "epsilon of Adam",
        "weight_decay": "weight decay",
        "max_grad_norm": "largest norm of the gradient",
        "neftune_noise_alpha": "noise on the embeddings",
    },
    "Loss": {
        "loss_type": "form of the policy's loss",
        "label_smoothing_factor": "label smoothing",
        "router_aux_loss_coef": "weight of the load-balancing loss of a mixture of experts",
        "beta": "weight of the KL to the starting policy",
        "use_bias_correction_kl": "importance weights in the KL",
        "sync_ref_model": "move the reference of the KL towards the policy",
        "ref_model_mixup_alpha": "share of the policy in each move",
        "ref_model_sync_steps": "steps between moves",
        "epsilon": "clip range of the ratio",
        "epsilon_high": "upper clip range",
        "delta": "upper bound of two-sided clipping",
        "num_iterations": "passes over a batch of rollouts",
        "scale_rewards": "normalisation of the rewards: `group`, `batch` or `none`",
        "importance_sampling_level": "ratio per `token` or `sequence`",
        "mask_truncated_completions": "leave unfinished rollouts out of the loss",
        "off_policy_mask_threshold": "leave rollouts out whose policy has moved too far",
        "top_entropy_quantile": "share of the most uncertain tokens in the loss",
        "entropy_coef": "weight of the entropy bonus",
        "use_adaptive_entropy": "adapt that weight to a target",
        "entropy_target": "target entropy in nats",
        "entropy_coef_delta": "step of the weight",
        "entropy_coef_min": "its lower bound",
        "entropy_coef_max": "its upper bound",
        "sapo_temperature_neg": "temperature of negative advantages with `--loss_type sapo`",
        "sapo_temperature_pos": "temperature of positive advantages with `--loss_type sapo`",
        "vespo_k_neg": "power for negative advantages with `--loss_type vespo`",
        "vespo_k_pos": "power for positive advantages with `--loss_type vespo`",
        "vespo_lambda_neg": "decay for negative advantages with `--loss_type vespo`",
        "vespo_lambda_pos": "decay for positive advantages with `--loss_type vespo`",
        "cast_lm_head_to_fp32": "compute log-probs with a float32 output layer",
        "disable_dropout": "switch the policy's dropout off",
    },
    "Rollouts": {
        "max_completion_length": "longest completion in tokens",
        "num_generations": "rollouts per prompt",
        "steps_per_generation": "passes that one batch of rollouts is split into",
        "generation_batch_size": "rollouts sampled together, instead of `--steps_per_generation`",
        "temperature": "sampling temperature",
        "top_p": "nucleus sampling",
        "top_k": "sample from the k most likely tokens",
        "min_p": "smallest probability relative to the most likely token",
        "repetition_penalty": "penalty of repeated tokens",
        "generation_kwargs": "further arguments of the sampler",
        "cache_implementation": "cache of transformers' sampler",
        "chat_template_kwargs": "variables of the chat template as JSON; default: as the model was trained",
        "use_transformers_continuous_batching": "sample with continuous batching",
        "transformers_continuous_batching_config": "its settings",
        "ds3_gather_for_generation": "gather ZeRO-3 weights for sampling",
        "log_completions": "print rollouts and store them as Parquet in `checkpoints/completions`",
        "num_completions_to_print": "how many",
        "log_unique_prompts": "one rollout per prompt",
        "log_completions_hub_repo": "Hub repository for them",
    },
    "vLLM": {
        "use_vllm": "sample with vLLM",
        "vllm_mode": "`colocate` (same GPUs) or `server`",
        "vllm_model_impl": "implementation of the model",
        "vllm_structured_outputs_regex": "regular expression that completions match",
        "vllm_gpu_memory_utilization": "share of the GPU's memory",
        "vllm_tensor_parallel_size": "GPUs per model",
        "vllm_max_model_length": "longest prompt with completion",
        "vllm_enable_sleep_mode": "free vLLM's memory during the optimiser step",
        "vllm_server_base_url": "address of the server",
        "vllm_server_host": "host of the server",
        "vllm_server_port": "port of the server",
        "vllm_server_timeout": "seconds to wait for the server",
        "vllm_group_port": "port for the weights",
        "vllm_importance_sampling_correction": "correct for vLLM's other log-probs",
        "vllm_importance_sampling_mode": "how",
        "vllm_importance_sampling_clip_max": "largest weight",
        "vllm_importance_sampling_clip_min": "smallest weight",
    },
    "Logging, checkpoints and the Hub": {
        "output_dir": "the run folder",
        "logging_strategy": "log by `steps` or `epoch`, or `no`",
        "logging_steps": "steps between logs",
        "logging_first_step": "log the first step too",
        "include_num_input_tokens_seen": "log the tokens seen",
        "save_strategy": "checkpoints by `steps` or `epoch`, or `no`",
        "save_steps": "steps between checkpoints",
        "save_total_limit": "checkpoints kept",
        "eval_delay": "steps or passes before the first validation loss",
        "eval_on_start": "validation loss before the first step too",
        "report_to": "trackers: `wandb`, `tensorboard`, `trackio`, ...",
        "run_name": "the run's name in a tracker",
        "project": "Trackio's project",
        "trackio_space_id": "Trackio's Space",
        "trackio_bucket_id": "Trackio's bucket",
        "trackio_static_space_id": "Trackio's static Space",
        "push_to_hub": "upload the finished policy and reward model to the Hub, checked before the run",
        "hub_model_id": "the policy's repository, `owner/name`; the reward model's is `owner/name-reward` (default: "
        "the run folder's name)",
        "hub_private_repo": "create private repositories",
        "hub_token": "token with write access, if not that of `hf auth login`; never stored",
        "hub_revision": "branch of both, created if it does not exist",
        "disable_tqdm": "no progress bar",
        "log_level": "verbosity of transformers",
        "log_level_replica": "verbosity on other processes",
        "log_on_each_node": "log on each machine",
        "skip_memory_metrics": "false: measure memory (slow)",
        "debug": "transformers' debugging aids",
    },
    "Speed, memory and several processes": {
        "bf16": "bfloat16 autocast",
        "fp16": "float16 autocast",
        "tf32": "TF32 matrix products",
        "use_cpu": "train on the CPU",
        "activation_checkpointing": "recompute activations in the backward pass",
        "activation_checkpointing_kwargs": "its arguments",
        "gradient_checkpointing": "the same, by its earlier name",
        "gradient_checkpointing_kwargs": "its arguments",
        "activation_offloading": "keep activations in the CPU's memory",
        "padding_free": "rows one after the other instead of padded; needs FlashAttention",
        "pad_to_multiple_of": "widths are multiples of this",
        "use_liger_kernel": "Liger's kernels (package `liger-kernel`)",
        "liger_kernel_config": "which of them",
        "torch_compile": "compile the policy's forward pass",
        "torch_compile_backend": "compiler",
        "torch_compile_mode": "mode of the compiler",
        "torch_empty_cache_steps": "steps between emptying the device's cache",
        "dataloader_num_workers": "processes that load rows",
        "dataloader_drop_last": "drop an incomplete last batch",
        "dataloader_in_order": "keep the order of the workers",
        "dataloader_multiprocessing_context": "how workers start",
        "dataloader_persistent_workers": "keep workers between passes",
        "dataloader_pin_memory": "pinned memory, on a GPU",
        "dataloader_prefetch_factor": "batches each worker loads ahead",
        "accelerator_config": "settings of accelerate",
        "deepspeed": "DeepSpeed configuration file",
        "fsdp": "shard the policy with FSDP",
        "fsdp_config": "FSDP's settings",
        "ddp_backend": "communication library",
        "ddp_timeout": "seconds until a collective call fails",
        "ddp_broadcast_buffers": "DDP's `broadcast_buffers`",
        "ddp_bucket_cap_mb": "DDP's `bucket_cap_mb`",
        "ddp_find_unused_parameters": "DDP's `find_unused_parameters`",
        "ddp_static_graph": "DDP's `static_graph`",
    },
}
"""Options passed on, by heading, with what they do; `REFUSED` has exceptions by command."""

_NO_EVALUATION = (
    "no loss is evaluated during this command; --validation_dataset_name measures accuracy at each checkpoint"
)
_VALIDATION = "--validation_fraction evaluates the loss at each checkpoint (--save_strategy, --save_steps)"
_NO_METRICS = "an evaluation computes the loss only"
_WORKER = "rollouts are sampled in an order of their own"
_TOKENS = "demonstrations are tokenised before TRL sees them, exactly as the reward model reads them"
_BEST = "use --validation_dataset_name or, for sft, --validation_fraction, which select the best checkpoint"

REFUSED: dict[str, tuple[Refusal, ...]] = {
    # Lengths and packing
    "max_length": (
        Refusal(
            why="it would cut off the ends of traces: use --max_completion_length and --on_long",
            also=(None,),
            commands=(SFT,),
        ),
    ),
    "truncation_mode": (
        Refusal(why="traces are never truncated: see --max_completion_length and --on_long", commands=(SFT,)),
    ),
    "packing": (
        Refusal(
            why="packing cuts traces at a fixed length; --padding_free true saves padding without that", commands=(SFT,)
        ),
    ),
    "packing_strategy": (Refusal(why="demonstrations are not packed", commands=(SFT,)),),
    "eval_packing": (Refusal(why="demonstrations are not packed", also=(False,), commands=(SFT,)),),
    # Demonstrations
    "completion_only_loss": (
        Refusal(why="only completions are trained on, prompts never", also=(True,), commands=(SFT,)),
    ),
    "assistant_only_loss": (
        Refusal(why="only completions are trained on, which are the assistant's", commands=(SFT,)),
    ),
    "dataset_text_field": (Refusal(why="--task says which fields of a row are read", commands=(SFT,)),),
    "dataset_kwargs": (Refusal(why=_TOKENS, commands=(SFT,)),),
    "dataset_num_proc": (Refusal(why=_TOKENS, commands=(SFT,)),),
    "chat_template_path": (
        Refusal(
            why="--template chat uses the chat template of the model's tokenizer; save another one there",
            commands=(SFT,),
        ),
    ),
    "eos_token": (
        Refusal(
            why="traces end in the end-of-sequence token of the model's tokenizer; change it there", commands=(SFT,)
        ),
    ),
    "pad_token": (Refusal(why="padding is masked, so the token does not matter", commands=(SFT,)),),
    "length_column_name": (Refusal(why="lengths are counted from the tokens"),),
    "remove_unused_columns": (Refusal(why="all columns that the trainer gets are used"),),
    "label_names": (Refusal(why="the labels are the completions' tokens"),),
    # Reward
    "reward_weights": (
        Refusal(
            why="the command has one reward; correctness is logged with weight 0 (see --reward of tracereward grpo)",
            also=([1.0], [1.0, 0.0]),
            commands=ROLLOUTS,
        ),
    ),
    "multi_objective_aggregation": (Refusal(why="the command has one reward; see --scale_rewards", commands=ROLLOUTS),),
    "max_tool_calling_iterations": (Refusal(why="rollouts call no tools", commands=ROLLOUTS),),
    "log_multimodal": (Refusal(why="traces are texts", commands=ROLLOUTS),),
    # Model
    "model_init_kwargs": (
        Refusal(why="the policy is loaded with --dtype, --attn_implementation and --model_revision"),
    ),
    "trust_remote_code": (
        Refusal(why="code from a model's repository is not run; use an architecture that transformers has"),
    ),
    "lora_task_type": (Refusal(why="the policy is a causal LM; the discriminator's task follows from --head"),),
    # Validation and checkpoints
    "eval_strategy": (Refusal(why=_VALIDATION, commands=(SFT,)), Refusal(why=_NO_EVALUATION, commands=ROLLOUTS)),
    "eval_steps": (Refusal(why=_VALIDATION, commands=(SFT,)), Refusal(why=_NO_EVALUATION, commands=ROLLOUTS)),
    "eval_delay": (Refusal(why=_NO_EVALUATION, commands=ROLLOUTS),),
    "eval_on_start": (
        Refusal(why="the starting policy's accuracy is measured with --validation_dataset_name", commands=ROLLOUTS),
    ),
    "per_device_eval_batch_size": (
        Refusal(why="validation questions are answered in batches of --per_device_train_batch_size", commands=ROLLOUTS),
    ),
    "num_generations_eval": (Refusal(why="validation questions are answered once, greedily", commands=ROLLOUTS),),
    "load_best_model_at_end": (Refusal(why=_BEST),),
    "metric_for_best_model": (Refusal(why=_BEST, also=("eval_loss",)),),
    "greater_is_better": (Refusal(why=_BEST, also=(False,)),),
    "eval_accumulation_steps": (Refusal(why=_NO_METRICS),),
    "eval_do_concat_batches": (Refusal(why=_NO_METRICS),),
    "eval_use_gather_object": (Refusal(why=_NO_METRICS),),
    "batch_eval_metrics": (Refusal(why=_NO_METRICS),),
    "include_for_metrics": (Refusal(why=_NO_METRICS),),
    "prediction_loss_only": (Refusal(why=_NO_METRICS, also=(True,)),),
    "bf16_full_eval": (Refusal(why="the loss is evaluated in the precision of training: see --bf16"),),
    "fp16_full_eval": (Refusal(why="the loss is evaluated in the precision of training: see --fp16"),),
    "resume_from_checkpoint": (Refusal(why="--resume continues from the last complete checkpoint of --output_dir"),),
    "restore_callback_states_from_checkpoint": (Refusal(why="--resume restores the whole state of a run"),),
    "save_only_model": (Refusal(why="checkpoints are complete, so that a run can be resumed and its best restored"),),
    "save_on_each_node": (Refusal(why="all machines write to one --output_dir, on a disk that they share"),),
    "enable_jit_checkpoint": (Refusal(why="SIGTERM and Ctrl-C end a run with a checkpoint anyway"),),
    "logging_nan_inf_filter": (Refusal(why="a loss that is not finite stops the run"),),
    "hub_strategy": (Refusal(why="the finished policy and reward model are pushed, no checkpoints", also=("end",)),),
    "hub_always_push": (Refusal(why="the finished policy and reward model are pushed, once"),),
    # Batches of rollouts
    "auto_find_batch_size": (
        Refusal(why="a batch holds full groups of rollouts: lower --per_device_train_batch_size", commands=ROLLOUTS),
    ),
    "average_tokens_across_devices": (Refusal(why="--loss_type says how tokens are averaged", commands=ROLLOUTS),),
    "data_seed": (Refusal(why="the order of the prompts follows from --seed", commands=ROLLOUTS),),
    "dataloader_drop_last": (Refusal(why="batches of rollouts are always full", commands=ROLLOUTS),),
    "train_sampling_strategy": (Refusal(why=f"{_WORKER}: see --shuffle_dataset", commands=ROLLOUTS),),
    "label_smoothing_factor": (
        Refusal(why="the policy's loss has no labels", commands=(GRPO,)),
        Refusal(why="the policy's loss has no labels; --label_smoothing is the discriminator's", commands=(TRAIN,)),
    ),
    "include_num_input_tokens_seen": (
        Refusal(why="TRL logs num_tokens, the tokens of all rollouts", commands=ROLLOUTS, also=(False,)),
    ),
    "parallelism_config": (Refusal(why="context and tensor parallelism are not supported: use FSDP2 or DeepSpeed"),),
    # Renamed
    "use_transformers_paged": (Refusal(why="it is now --use_transformers_continuous_batching", commands=ROLLOUTS),),
    "vllm_importance_sampling_cap": (Refusal(why="it is now --vllm_importance_sampling_clip_max", commands=ROLLOUTS),),
}
"""Options refused if their value is not the default, with the reason."""

SFT_ONLY = ("activation_offloading", "padding_free")
ROLLOUTS_ONLY = (
    *HONOURED["Rollouts"],
    *HONOURED["vLLM"],
    *(name for name in HONOURED["Loss"] if name not in ("loss_type", "label_smoothing_factor", "router_aux_loss_coef")),
)
"""Honoured options that TRL's config of the other commands does not have."""

INTERNAL: dict[str, str] = {
    "do_train": "the command says what is done",
    "do_eval": "the command says what is done",
    "do_predict": "the command says what is done",
    "local_rank": "launchers set it in the environment",
}
"""Fields of transformers for programs, not for people; refused like `REFUSED`, and shown nowhere."""

OTHER_NAMES: dict[str, str] = {
    "torch_dtype": "dtype",
    "batch_size": "per_device_train_batch_size",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "demonstrations": "dataset_name",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "validation_fraction",
    "group_size": "num_generations",
    "learning_rates": "learning_rate",
    "limit": "max_demonstrations",
    "lora": "use_peft",
    "lr": "learning_rate",
    "max_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_seq_length": "max_completion_length",
    "model": "model_name_or_path",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "output": "output_dir",
    "quantization": "load_in_4bit",
    "revision": "model_revision",
    "split": "dataset_train_split",
}
"""Names of other tools and commands, with ours, for messages about unknown options."""


def refusal(command: str, name: str) -> Refusal | None:
    """The reason for which a command does not have an option; None if it has."""
    if name in INTERNAL:
        return Refusal(why=INTERNAL[name])
    return next((one for one in REFUSED.get(name, ()) if command in one.commands), None)


def honoured() -> dict[str, str]:
    """What each honoured option does, by name."""
    return {name: text for group in HONOURED.values() for name, text in group.items()}


def commands_with(name: str) -> tuple[str, ...]:
    """The commands that honour an option."""
    commands = (SFT,) if name in SFT_ONLY else ROLLOUTS if name in ROLLOUTS_ONLY else COMMANDS
    return tuple(command for command in commands if refusal(command, name) is None)


def unsorted(names: set[str]) -> set[str]:
    """Those of `names` that are in no table: fields of a newer TRL, which pass without a check."""
    return names - honoured().keys() - REFUSED.keys() - INTERNAL.keys()
