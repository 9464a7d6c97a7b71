"""What the discriminator costs: steps of `AdversarialTrainer` against plain `trl.GRPOTrainer`, in turn, in one process.

    python benchmarks/training_step.py [MODEL_FOLDER]

Without an argument: the tiny Llama of the quickstart, 24 prompts x 8 completions. Prints the median step of each and
the ratio.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from tracereward.adversarial_config import AdversarialConfig
from tracereward.callbacks import Progress
from tracereward.models import load_tokenizer
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import RewardSettings
from tracereward.tasks import get_task
from tracereward.tasks.arithmetic import build_model, build_tokenizer, generate
from tracereward.trainer import AdversarialTrainer

STEPS = 12
SHARED = {
    "per_device_train_batch_size": 192,
    "num_generations": 8,
    "max_completion_length": 32,
    "max_steps": STEPS,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "seed": 0,
}


class Times(TrainerCallback):
    """Wall-clock seconds of each step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def main(folder: str, scratch: Path) -> None:
    tokenizer = load_tokenizer(folder)
    rows = generate("misconception", 200, seed=1)
    task = get_task("arithmetic")
    hardware = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}

    def correct(completions, answer, **_):
        return [float(task.verify(text, gold)) for text, gold in zip(completions, answer, strict=True)]

    plain_times, adversarial_times = Times(), Times()
    plain = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=correct,
        args=GRPOConfig(output_dir=str(scratch / "plain"), **SHARED, **hardware),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]),
        processing_class=tokenizer,
        callbacks=[plain_times],
    )
    adversarial = AdversarialTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_model=TokenRewardModel.from_backbone(folder, RewardSettings(), tokenizer),
        demonstrations=rows,
        args=AdversarialConfig(output_dir=str(scratch / "adversarial"), discriminator_warmup_updates=0, **SHARED),
        task=task,
        processing_class=tokenizer,
        callbacks=[adversarial_times],
    )
    for trainer in (plain, adversarial):
        Progress.replace_default(trainer, "steps")
        trainer.train()
    a, b = (statistics.median(t.seconds[2:]) for t in (plain_times, adversarial_times))
    print(f"plain GRPO {a:.3f} s a step, adversarial {b:.3f} s: ratio {b / a:.2f} ({STEPS - 2} steps each, medians)")


if __name__ == "__main__":
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        if len(sys.argv) == 1:
            tiny = build_tokenizer()
            build_model(tiny, seed=0).save_pretrained(path / "tiny")
            tiny.save_pretrained(path / "tiny")
        main(sys.argv[1] if len(sys.argv) > 1 else str(path / "tiny"), path)
