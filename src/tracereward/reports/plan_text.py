"""A plan as text of 80 columns."""

import textwrap
from typing import Any

WIDTH = 80
_LABEL = 16
MARK = "\u23ce"
"""Stands for a line break."""


def plan_text(plan: Any) -> str:
    """A plan for a terminal.

    Args:
        plan: a `commands.plan.Plan`.
    """
    rows, passes, processes, group = plan.batch
    traces = rows * passes * processes
    step = f"{traces} demonstrations" if group == 1 else f"{traces // group} prompts x {group} rollouts"
    step += f" in {passes} micro-batch{'es' * (passes > 1)} of {rows}" + f" on {processes} processes" * (processes > 1)
    lines = [f"Plan of tracereward {plan.command}; nothing is trained or kept", ""]
    lines += _entry("demonstrations", f"{plan.demonstrations} of {plan.source}{_dropped(plan)}")
    for name, lengths in (("prompts", plan.prompts), ("completions", plan.completions)):
        lines += _entry(
            f"  {name}", f"{lengths.median} tokens in the median, 95 % up to {lengths.p95}, longest {lengths.longest}"
        )
    lines += _entry("length limit", f"{plan.limit} tokens of a completion")
    lines += _entry("policy", f"{plan.policy}, {plan.parameters / 1e6:,.3g} M parameters")
    lines += _entry("runs on", plan.device)
    chosen = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in plan.values.items()
    )
    lines += _entry("chosen", chosen or "nothing: all values are given")
    lines += _entry("a step", step)
    lines += _entry("steps", f"{plan.steps}")
    measured = "" if plan.measured is None else f"; {size(plan.measured)} at two measured micro-steps"
    lines += _entry("memory", f"about {size(plan.memory['peak'])} of {size(plan.available)}{measured}")
    parts = {name: held for name, held in plan.memory.items() if name != "peak" and held >= 0.02 * plan.memory["peak"]}
    for name, held in parts.items():
        lines += _entry("", f"{size(held):>8}  {name}")
    if plan.seconds:
        lines += _entry("time", f"about {duration(sum(plan.seconds.values()))}, without checkpoints")
        for name, seconds in plan.seconds.items():
            lines += _entry("", f"{duration(seconds):>8}  {name}") if seconds >= 0.5 else []
    else:
        lines += _entry("time", "not measured: by the estimate it does not fit")
    if plan.leak:
        lines += _entry("surface leaks", plan.leak)
    if plan.sampled:
        lines += _entry("samples", plan.sampled)
    for prompt, text in plan.samples:
        lines += [f"  {_one_line(prompt, 30)} {_one_line(text, WIDTH - 33)}"]
    for sentence in plan.advice:
        lines += _entry("change", sentence)
    return "\n".join([*lines, "", "Run it:", f"  {plan.run}"])


def _dropped(plan: Any) -> str:
    if not plan.dropped:
        return ", none dropped"
    return f"; {plan.dropped} dropped, longer than {plan.limit} tokens"


def _entry(label: str, text: str) -> list[str]:
    """Lines of one entry; continuation lines are indented."""
    if not label:
        return [" " * _LABEL + text]
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _one_line(text: str, width: int) -> str:
    line = f" {MARK} ".join(text.strip().splitlines())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
