"""A run does not depend on gradient accumulation, micro-batches or the number of processes.

Real sampling would hide this, since each process has its own RNG state. Here a completion is a function of the
prompt, the batch index, its index within the prompt's group, and the policy, so that an error anywhere propagates to
all later steps. The policy chooses one of three scripted traces with its own probabilities. A trace is a single
choice: of the 400 in a run, one differs between two layouts only if a uniform number falls within the rounding error
of a boundary.
"""

import functools
from typing import Any

import pytest
import torch

from helpers.invariance import (
    LOSSES,
    RUNS,
    STEPS,
    TOLERANCES,
    apart,
    beyond,
    differences,
    folder,  # noqa: F401
    train,
)
from helpers.sharded import launch


@pytest.fixture(scope="module")
def one(folder):
    """Cached runs in this process."""
    return functools.cache(lambda name: train(name, folder))


def launched(folder, *names: str) -> dict[str, list[dict[str, Any]]]:
    """Results of two-process runs, from one launch: imports take longest."""
    output = folder / "output.txt"
    code = launch("ddp", str(folder), *names, output=output)
    assert code == 0, f"{code}\n{output.read_text(errors='replace')[-6000:]}"
    found = {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)] for name in names}
    assert {run["processes"] for runs in found.values() for run in runs} == {2}
    return found


@pytest.fixture(scope="module")
def two(folder):
    """The runs that are compared with those of one process."""
    return launched(folder, "trajectory, two processes", "token, two processes")


@pytest.fixture(scope="module")
def short(folder):
    """Runs of a few steps."""
    return launched(folder, "few steps, two processes", "no all-reduce")


COUNTED = [f"discriminator/{name}" for name in ("accuracy_expert", "accuracy_policy", "accuracy_perturbed", "updates")]


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the results of two processes; both must end with the same weights."""
    first, second = runs
    for model, end in first["end"].items():
        assert torch.equal(end, second["end"][model]), f"the processes' {model} differ"
    return {**first, "batches": [a + b for a, b in zip(first["batches"], second["batches"], strict=True)]}


@pytest.fixture
def assert_same(record_property):
    """The same rollouts, losses, rewards, gradients and final weights."""

    def check(settings: str, run: dict[str, Any], other: dict[str, Any]) -> None:
        assert len(run["log"]) == len(other["log"]) == RUNS[settings][0].get("max_steps", STEPS)
        assert run["batches"] == other["batches"], "other prompts, another order, or other completions"
        found = differences(run, other, LOSSES) | {model: apart(run, other, model) for model in run["end"]}
        record_property("differences", found)
        assert beyond(found, settings) == {}
        counted = differences(run, other, COUNTED)  # a logit at 0 may fall on either side: a position of fifty
        assert {name: value for name, value in counted.items() if not value <= 0.05} == {}

    return check


@pytest.mark.parametrize(
    "layout", ["trajectory, accumulated", pytest.param("token, micro-batches", marks=pytest.mark.long)]
)
def test_accumulation_and_micro_batches_do_not_change_the_run(one, layout, assert_same):
    settings = layout.split(",")[0]
    assert_same(settings, one(settings), one(layout))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["trajectory, two processes", "token, two processes"])
def test_second_process_does_not_change_the_run(one, two, layout, assert_same):
    settings = layout.split(",")[0]
    assert_same(settings, one(settings), joined(two[layout]))


def test_group_spans_both_processes(short):
    first, second = (run["batches"] for run in short["few steps, two processes"])
    for batch, rest in zip(first, second, strict=True):
        prompts = [prompt for prompt, _ in batch + rest]
        assert prompts[4] == prompts[5] == prompts[6] == prompts[7]
        assert len(batch) == len(rest) == 6


def test_gradient_checkpointing_does_not_change_the_run(one):
    """Also with a gradient penalty, whose forward pass is recomputed for second derivatives."""
    run, other = one("trajectory"), one("trajectory, checkpointed")
    assert len(other["log"]) == 5
    assert beyond(differences(run, other, LOSSES), "trajectory") == {}


@pytest.mark.parametrize("name", ["trajectory", "token"])
def test_both_models_are_trained(one, name):
    """By far more than rounding: at a learning rate of 1e-3 the runs above could have diverged."""
    run = one(name)
    for model, end in run["end"].items():
        moved = (end - run["start"][model]).norm() / run["start"][model].norm()
        assert moved > 0.03, model


def test_seed_changes_the_run(one):
    run, other = one("trajectory"), one("trajectory, another seed")
    found = differences(run, other, LOSSES)
    assert all(value > 20 * TOLERANCES["trajectory"][name] for name, value in found.items()), found
    assert min(apart(run, other, model) for model in run["end"]) > 0.5


def test_rollouts_depend_on_the_policy(one):
    """A frozen policy has the same scripted traces, but other choices."""
    run, other = one("trajectory"), one("trajectory, policy at rest")
    pairs = list(zip(run["batches"], other["batches"]))
    assert [[prompt for prompt, _ in batch] for batch, _ in pairs] == [[p for p, _ in batch] for _, batch in pairs]
    assert pairs[0][0] == pairs[0][1]
    assert sum(a != b for batches in pairs for a, b in zip(*batches)) >= 3


def test_discriminators_diverge_without_the_all_reduce(short):
    """The two-process comparison can fail: the policy's gradients are summed here, the discriminator's are not."""
    first, second = short["no all-reduce"]
    assert torch.equal(first["end"]["policy"], second["end"]["policy"])
    assert apart(first, second, "discriminator") > 0.1
    with pytest.raises(AssertionError, match="the processes' discriminator differ"):
        joined(short["no all-reduce"])
