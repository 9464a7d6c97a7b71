"""Shared code of the benchmarks: models, rows, trainers, timing, tables and JSON."""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RewardConfig
from tracereward.training.discriminator_batch import Rollout
from tracereward.training.rollout_trainer import RolloutTrainer
from tracereward.training.trainer import AdversarialTrainer

GPU = torch.cuda.is_available()
CPU_TIME = not GPU and torch.get_num_threads() == 1  # see `now`


@dataclass(frozen=True)
class Size:
    """Dimensions of a random Llama with the arithmetic vocabulary and `words` additional unused tokens."""

    hidden: int
    layers: int
    heads: int
    words: int = 0


def parser(doc: str | None, model: bool = True) -> argparse.ArgumentParser:
    """Argument parser with the options shared by all benchmarks."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        made.add_argument("model", nargs="?", help="folder of a causal LM instead of the random one")
    made.add_argument("--json", type=Path, help="file for the result")
    return made


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def save_model(folder: Path, size: Size, seed: int = 0) -> str:
    """Save a random Llama and its tokenizer to `folder`."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(size.words)])
    model = build_model(tokenizer, seed, hidden_size=size.hidden, layers=size.layers, heads=size.heads)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def millions(folder: str) -> float:
    """Parameters of a saved model in millions."""
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()) / 1e6


def expert_rows(count: int, lines: int = 1) -> list[dict[str, Any]]:
    """Demonstrations of the arithmetic world; with `lines` > 1, prefixed with others' first lines (12 tokens each)."""
    rows = generate("misconception", count, seed=1, unique=False)
    rng = random.Random(0)
    for row in rows:
        extra = [rng.choice(rows)["completion"].split("\n")[0] for _ in range(lines - 1)]
        row["completion"] = "\n".join([*extra, row["completion"]])
    return rows


def trainer_options(prompts: int, group: int, tokens: int, output: Path) -> dict[str, Any]:
    """TRL options shared by all trainers: completions of exactly `tokens` tokens, and learning rate 0."""
    hardware: dict[str, Any] = {} if GPU else {"use_cpu": True, "bf16": False}
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": prompts * group,
        "num_generations": group,
        "max_completion_length": tokens,
        "generation_kwargs": {"min_new_tokens": tokens},
        "learning_rate": 0.0,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **hardware,
    }


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def plain_trainer(
    folder: str, rows: list[dict], options: dict[str, Any], *, peft: bool = False, compiled: bool = False
) -> GRPOTrainer:
    """`trl.GRPOTrainer` with the verifier as reward; if `compiled`, with `--compile_rollouts`."""
    task = get_task("arithmetic")

    def correct(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [float(task.verify(text, gold)) for text, gold in zip(completions, answer, strict=True)]

    trainer = (RolloutTrainer if compiled else GRPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=correct,
        args=RewardConfig(**options, compile_rollouts=True) if compiled else GRPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]),
        processing_class=load_tokenizer(folder),
        peft_config=lora() if peft else None,
    )
    return without_bars(trainer)


def adversarial_trainer(
    folder: str,
    rows: list[dict],
    options: dict[str, Any],
    *,
    discriminator: str | None = None,
    peft: bool = False,
    **more: Any,
) -> AdversarialTrainer:
    """`AdversarialTrainer` without a warm-up, with buffers filled as after one.

    Args:
        folder: the policy.
        rows: demonstrations.
        options: TRL options.
        discriminator: folder of the discriminator's backbone; default: the policy's.
        peft: use LoRA for both.
        **more: options of `AdversarialConfig`.
    """
    tokenizer = load_tokenizer(folder)
    more = {"discriminator_warmup_updates": 0, "on_failure": "ignore", **more}
    config = AdversarialConfig(**options, **more)
    settings = RewardSettings(head=config.head, granularity=config.granularity, reward_form=str(config.reward_form))
    policy, policy_peft = AutoModelForCausalLM.from_pretrained(folder), lora() if peft else None
    if more.get("shared_base"):
        policy, policy_peft = get_peft_model(policy, lora()), None
        reward_model = TokenRewardModel.beside_policy(policy, settings, tokenizer, lora())
    else:
        reward_model = TokenRewardModel.from_backbone(discriminator or folder, settings, tokenizer, policy_peft)
    trainer = AdversarialTrainer(
        model=policy,
        reward_model=reward_model,
        demonstrations=rows,
        args=config,
        task=get_task("arithmetic"),
        processing_class=tokenizer,
        peft_config=policy_peft,
    )
    rng = random.Random(0)
    length = options["max_completion_length"]
    for index in range(len(rows)):
        ids = [[rng.randrange(3, 51) for _ in range(length)] for _ in range(8)]
        trainer.discriminator.remember([Rollout(index, row) for row in ids])
    return without_bars(trainer)


def without_bars(trainer: Any) -> Any:
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def now() -> float:
    """Wall-clock seconds, after synchronising the GPU; on one CPU thread, the CPU time of this process.

    CPU time equals the wall-clock time on an idle core, and excludes other work on the machine.
    """
    if GPU:
        torch.cuda.synchronize()
    elif CPU_TIME:
        return time.process_time()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Seconds of each step by part, measured by wrapping methods.

    Nested calls count for the outer part, unless that part is a frame: then nested parts are subtracted from it.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.steps: list[dict[str, float]] = []
        self.open: list[tuple[str, bool]] = []
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.mark = now()
        trainer.add_callback(self)
        self.wrap(trainer, "training_step", "policy", frame=True)
        self.wrap(trainer, "_prepare_inputs", "rest", frame=True)
        self.wrap(trainer, "_generate_single_turn", "rollouts")
        self.wrap(trainer, "_get_per_token_logps_and_entropies", "policy")
        self.wrap(trainer.accelerator, "clip_grad_norm_", "policy")
        if isinstance(trainer, AdversarialTrainer):
            self.wrap(trainer.discriminator, "learn", "discriminator: update", frame=True)
            self.wrap(trainer.discriminator, "held_out_accuracy", "discriminator: monitors")
            self.wrap(trainer, "token_rewards", "discriminator: rewards")
            self.wrap(trainer, "_monitor", "discriminator: monitors")

    def wrap(self, owner: Any, name: str, part: str, frame: bool = False) -> None:
        inner: Callable = getattr(owner, name)

        def timed(*args, **kwargs):
            if self.open and not self.open[-1][1]:
                return inner(*args, **kwargs)
            self.enter(part, frame)
            try:
                return inner(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def enter(self, part: str, frame: bool) -> None:
        self._charge()
        self.open.append((part, frame))

    def leave(self) -> None:
        self._charge()
        self.open.pop()

    def _charge(self) -> None:
        at = now()
        self.parts[self.open[-1][0] if self.open else "rest"] += at - self.mark
        self.mark = at

    def on_step_begin(self, args, state, control, **kwargs):
        self._charge()
        self.parts.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.enter("policy", frame=False)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.leave()

    def on_step_end(self, args, state, control, **kwargs):
        self._charge()
        self.steps.append({**self.parts, "step": sum(self.parts.values())})


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def iqr(values: Sequence[float]) -> float:
    """Interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of log y over log x."""
    return line([torch.tensor(x).log().item() for x in xs], [torch.tensor(y).log().item() for y in ys])[0]


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    slope, intercept = statistics.linear_regression(xs, ys)
    return slope, intercept


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Hardware and software versions."""
    packages = ("torch", "transformers", "trl", "peft", "vllm")
    return {
        "device": torch.cuda.get_device_name() if GPU else f"CPU ({platform.machine()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if CPU_TIME else "wall",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := installed(name))},
    }


@dataclass
class Result:
    """Rows of a table, and further fields of the JSON."""

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def print(self) -> None:
        """Print a Markdown table with one column per key and three significant digits."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        print("| " + " | ".join(keys) + " |")
        print("|" + "|".join("---" if isinstance(self.rows[0].get(key), str) else "---:" for key in keys) + "|")
        for row in self.rows:
            print("| " + " | ".join(shown(row.get(key)) for key in keys) + " |")

    def write(self, path: Path | None) -> None:
        """Print the table; write the JSON if a path is given."""
        self.print()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "benchmark": self.name,
                "command": " ".join(["python", f"benchmarks/{self.name}.py", *sys.argv[1:]]),
                "machine": machine(),
                "settings": self.settings,
                "rows": self.rows,
                **self.more,
            }
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="benchmark-")


def token_lengths(folder: str, rows: list[dict]) -> tuple[float, float]:
    """Mean tokens of prompts and of demonstrations."""
    tokenizer = load_tokenizer(folder)
    prompts = [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    completions = [len(encode_completion(tokenizer, row["completion"])) for row in rows]
    return statistics.mean(prompts), statistics.mean(completions)
