"""The model card of a trained policy, and what a run says about itself on the cards of its models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracereward import __version__
from tracereward.console import is_main_process
from tracereward.files import atomic_write_text, read_jsonl
from tracereward.modeling.hub import card_metadata, looks_local
from tracereward.modeling.model_folder import REWARD_MODEL
from tracereward.rewards.model_card import model_card
from tracereward.rewards.settings import RewardSettings
from tracereward.runs.folder import Run
from tracereward.runs.job import FitJob, starting_policy
from tracereward.training.options import DataArguments

SHOWN = {
    "loss": "loss",
    "eval_loss": "validation loss",
    "reward": "reward of the rollouts",
    "rewards/correct/mean": "share of correct rollouts",
    "monitor/within_prompt_auroc": "AUROC of the reward within a prompt",
    "discriminator/loss": "loss of the discriminator",
}
"""Metrics of the last logged step that a card shows."""

PLAIN_CARD = """---
library_name: transformers
tags: [tracereward]
---

Trained with tracereward.
"""
"""The card of a model whose folder has none, as those of earlier versions."""


def about_run(run: Run, demonstrations: int, chosen: str) -> str:
    """The section of a card on the training: data with their number, options and the last metrics.

    Args:
        run: the finished run.
        demonstrations: how many it trained on.
        chosen: how the policy was selected; empty for the last weights.
    """
    job, rows = run.job, read_jsonl(run.metrics.path) if is_main_process() else []
    lines = [*_trained(run), f"- {demonstrations} demonstrations of the task `{job.data.task}` ({_named(job.data)})"]
    lines += [f"- {chosen.strip()}"] if chosen.strip() else []
    lines += [
        f"- stopped at step {row['step']}: {row['failure'].replace('_', ' ')}; restored: {row['restored']}"
        for row in rows
        if row["phase"] == "failure"
    ]
    return "\n".join([*lines, *_last_metrics(run)]) + "\n"


def about_fit(run: Run[FitJob], sentences: Sequence[str]) -> str:
    """The section of a card on a run of `fit`: its label rule, what it learned from, and the last metrics.

    Args:
        run: the finished run.
        sentences: on the data and the label rule.
    """
    lines = [*_trained(run), *(f"- {sentence}" for sentence in sentences)]
    return "\n".join([*lines, *_last_metrics(run)]) + "\n"


def _trained(run: Run) -> list[str]:
    """The heading of the section, and the command with its steps."""
    steps = max((row["step"] for row in _logged(run)), default=0)
    count = f", {steps} optimiser steps" if steps else ""
    return ["", "## Training", "", f"- `tracereward {run.job.kind}` (tracereward {__version__}){count}"]


def _logged(run: Run) -> list[dict[str, Any]]:
    rows = read_jsonl(run.metrics.path) if is_main_process() else []
    return [row for row in rows if row["phase"] == run.job.kind]


def _last_metrics(run: Run) -> list[str]:
    """A table of the metrics in `SHOWN`."""
    last = {key: value for row in _logged(run) for key, value in row.items() if key in SHOWN and value is not None}
    if not last:
        return []
    shown = [f"| {SHOWN[key]} | {last[key]:.4g} |" for key in SHOWN if key in last]
    return ["", "| metric, last logged | value |", "|---|---|", *shown]


def _named(data: DataArguments) -> str:
    source = data.dataset_name
    return "the task's own set" if source is None else source if _is_hub_id(source) else Path(source).name


def write_policy_card(run: Run, about: str) -> None:
    """Write the card of ``policy/``; in the main process only.

    Args:
        run: the finished run.
        about: see `about_run`.
    """
    if not is_main_process():
        return
    kind = {"sft": "fine-tuned on expert traces", "grpo": "trained by GRPO"}.get(
        run.job.kind, "trained on a reward model that was learned from expert traces"
    )
    source = run.job.data.dataset_name
    metadata = card_metadata(
        starting_policy(run.job.model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tracereward", run.job.kind],
        datasets=[source] if source is not None and _is_hub_id(source) else None,
    )
    text = f"""---
{metadata}
---

# Reasoning policy

A causal language model, {kind} with tracereward.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("policy")
tokenizer = AutoTokenizer.from_pretrained("policy")
```
{about}"""
    atomic_write_text(run.folder / "policy" / "README.md", text)


def write_reward_card(run: Run, settings: RewardSettings, notes: str) -> None:
    """Replace the card of ``reward_model/``, with what is known at the end of the run.

    Args:
        run: the finished run.
        settings: the reward model's.
        notes: further sections, see `about_run` and `verdict_markdown`.
    """
    atomic_write_text(run.folder / REWARD_MODEL / "README.md", model_card(settings, notes))


def _is_hub_id(source: str) -> bool:
    return not looks_local(source) and not Path(source).suffix
