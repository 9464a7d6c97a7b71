"""Values that are chosen by the size of the model and the data."""

from dataclasses import replace

import pytest

from tracereward.training.chosen import Size, batch, chosen_values, completion_length, epochs, learning_rates

TINY = Size(parameters=113_000, lora=False, prompts=60, longest_prompt=12, longest_completion=40, context=128, group=8)


@pytest.mark.parametrize(
    ("parameters", "lora", "sft", "policy", "discriminator"),
    [
        (113_000, False, 3e-4, 1e-4, 1e-3),
        (113_000, True, 5e-4, 5e-4, 1e-3),  # ten times as much, at most 5e-4, and never less than all weights have
        (500e6, False, 1e-4, 3e-6, 3e-5),
        (500e6, True, 5e-4, 3e-5, 3e-4),
        (8e9, False, 2e-5, 1e-6, 1e-5),
        (8e9, True, 2e-4, 1e-5, 1e-4),
    ],
)
def test_learning_rates(parameters, lora, sft, policy, discriminator):
    assert learning_rates(parameters, lora)[1:] == pytest.approx((sft, policy, discriminator))


@pytest.mark.parametrize(
    ("longest", "prompt", "context", "limit"),
    [
        (40, 12, 128, 64),  # 60, in whole 16s
        (40, 80, 128, 48),  # what the model reads behind the prompt
        (40, 100, 128, 40),  # the demonstration itself, whose own prompt may be shorter
        (900, 12, 10_000, 1024),
        (2000, 12, 10_000, 1024),  # such rows are refused or dropped
    ],
)
def test_completion_length(longest, prompt, context, limit):
    size = Size(parameters=1, lora=False, prompts=1, longest_prompt=prompt, longest_completion=longest, context=context)
    assert completion_length(size) == limit


@pytest.mark.parametrize(
    ("prompts", "processes", "group", "rows_and_passes"),
    [
        (60, 1, 8, (8, 8)),  # 64 rollouts of 8 prompts
        (60, 8, 8, (8, 1)),
        (60, 3, 8, (8, 2)),  # 48 rollouts
        (60, 1, 6, (12, 4)),  # 48 rollouts of 8 prompts, two groups a micro-batch
        (3, 1, 8, (8, 3)),
        (60, 16, 8, (8, 1)),  # 16 prompts: one micro-batch on each process
        (60, 1, 1, (8, 1)),
        (5, 1, 1, (5, 1)),
    ],
)
def test_batch(prompts, processes, group, rows_and_passes):
    size = Size(
        parameters=1,
        lora=False,
        prompts=prompts,
        longest_prompt=1,
        longest_completion=1,
        processes=processes,
        group=group,
    )
    rows, passes = batch(size)
    assert (rows, passes) == rows_and_passes
    assert rows * passes * processes % group == 0


def test_epochs():
    assert epochs(TINY, 8) == 14  # 14 x 60 / 8 = 105 steps
    many = Size(parameters=1, lora=False, prompts=1000, longest_prompt=1, longest_completion=1)
    assert epochs(many, 8) == 3
    few = Size(parameters=1, lora=False, prompts=10, longest_prompt=1, longest_completion=1)
    assert epochs(few, 8) == 15
    assert epochs(replace(few, parameters=500_000_000), 8) == 5
    assert epochs(replace(few, parameters=500_000_000, group=8), 8) == 15  # rollouts are new in each pass


def test_given_values_stay():
    given = {"learning_rate": 1e-5, "per_device_train_batch_size": 32, "discriminator_warmup_updates": 60}
    found = chosen_values("train", TINY, given)
    assert found == {
        "warmup_steps": 0.1,
        "max_completion_length": 64,
        "gradient_accumulation_steps": 1,  # a batch that is given is not changed
        "num_train_epochs": 7,  # 4 prompts a step
        "discriminator_learning_rate": 1e-3,
        "discriminator_online_learning_rate": pytest.approx(2e-4),
    }
    given |= {"discriminator_learning_rate": 1e-2}
    assert "discriminator_online_learning_rate" not in chosen_values("train", TINY, given), "the same as before"
    assert chosen_values("sft", TINY, {})["learning_rate"] == 3e-4
