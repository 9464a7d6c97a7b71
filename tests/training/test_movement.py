"""Whether discriminator and policy moved, on hand-made rows."""

import pytest

from tracereward.training.movement import (
    discriminator_movement,
    fell,
    imitation_movement,
    movement_row,
    policy_movement,
)


def warmup(losses, accuracies=(), pairs=40):
    rows = [{"phase": "warmup", "update": i + 1, "discriminator/loss": loss} for i, loss in enumerate(losses)]
    for row, accuracy in zip(rows, accuracies, strict=False):
        row |= {"discriminator/held_out_accuracy": accuracy, "discriminator/held_out_pairs": pairs}
    return rows


def training(count=10, rate=1e-5, **values):
    return [{"phase": "train", "step": i + 1, "learning_rate": rate, "grad_norm": 0.3, **values} for i in range(count)]


FLAT = [0.69, 0.70, 0.69, 0.70, 0.70, 0.69, 0.70, 0.69]
FALLING = [0.70, 0.69, 0.68, 0.66, 0.50, 0.45, 0.42, 0.41]


@pytest.mark.parametrize(
    ("losses", "accuracies", "pairs", "moved", "part"),
    [
        # 40 pairs: chance reaches to 0.5 + 1.96 sqrt(0.25 / 40) = 0.655
        (FLAT, [0.5, 0.5, 0.52, 0.52], 40, False, "at chance (held-out accuracy 0.52 on 40 pairs): raise"),
        (FLAT, [0.5, 0.5, 0.65, 0.65], 40, False, "at chance"),
        (FLAT, [0.5, 0.5, 0.66, 0.66], 40, True, "moved (held-out accuracy 0.66 on 40 pairs)"),
        # 1,000 pairs: to 0.531
        (FLAT, [0.5, 0.54, 0.54], 1000, True, "moved"),
        # the loss falls, on the discriminator's own demonstrations only
        (FALLING, [0.5, 0.5, 0.5], 40, True, "no others (held-out accuracy 0.50 on 40 pairs): add demonstrations"),
        (FALLING, [0.2, 0.9, 0.9], 40, True, "moved (held-out accuracy 0.90"),
        # nothing is held out
        (FALLING, [], 40, True, "moved (loss 0.7 to 0.41)"),
        (FLAT, [], 40, False, "did not fall clearly (0.69 to 0.69)"),
        # of fewer than four losses nothing can be said
        ([0.7], [], 40, None, "1 update of the discriminator is too few to see whether it moves: raise"),
        ([0.7, 0.3, 0.1], [], 40, None, "3 updates of the discriminator are too few"),
        # of one pair nothing can be said, and a value that is not finite is none
        (FLAT, [1.0, 1.0], 1, False, "on 1 pair)"),
        ([*FLAT, float("nan"), None], [float("nan"), None, 0.9], 40, True, "0.90"),
    ],
)
def test_discriminator(losses, accuracies, pairs, moved, part):
    found = discriminator_movement(warmup(losses, accuracies, pairs))
    assert found.moved is moved
    assert part in found.line


def test_success_of_the_policy_is_no_chance():
    """The accuracy falls back to 0.5 once the policy writes like the experts."""
    back = [
        {
            "step": i,
            "discriminator/loss": 0.69,
            "discriminator/held_out_accuracy": 0.5,
            "discriminator/held_out_pairs": 40,
        }
        for i in range(9)
    ]
    assert discriminator_movement([*warmup(FALLING, [0.6, 0.9, 0.9, 0.9]), *back]).moved
    early = [row | {"discriminator/held_out_accuracy": 0.9} for row in back[:5]]
    assert discriminator_movement([*early, *back]).moved, "without a warm-up"
    assert not discriminator_movement(back).moved


def test_never_updated_is_no_movement():
    assert discriminator_movement([]) is None
    assert discriminator_movement(training()) is None
    assert policy_movement(warmup(FALLING)) is None
    assert movement_row(None, None) == {}


@pytest.mark.parametrize(
    ("rows", "moved", "part"),
    [
        (training(kl=0.03), True, "KL to its start 0.03"),
        (training(**{"monitor/kl": 1e-6}), False, "did not move (KL to its start 1e-06): raise --learning_rate"),
        ([*training(kl=1e-6), *training(1, kl=2e-3)], True, "0.002"),
        (training(grad_norm=0.0, kl=0.0), False, "every gradient is 0"),
        # 10 steps at 1e-5 may change a weight by 1e-4, at 1e-8 by 1e-7
        (training(), True, "sum to 0.0001"),
        (training(rate=1e-8), False, "sum to 1e-07"),
        (training(kl=None), True, "sum to 0.0001"),
    ],
)
def test_policy(rows, moved, part):
    found = policy_movement(rows)
    assert found.moved is moved
    assert part in found.line


def test_rare_logs_count_all_steps():
    """Rows at steps 50 and 100: 50 steps at 1e-7 each, 1e-5 together."""
    rows = [{"phase": "train", "step": step, "learning_rate": 1e-7, "grad_norm": 1.0} for step in (50, 100)]
    assert policy_movement(rows).figures == pytest.approx({"learning_rates": 1e-5})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (FALLING, True),
        (FLAT, False),
        (FALLING[::-1], False),
        ([0.6931, 0.6930, 0.6925, 0.6924, 0.6920, 0.6919], False),  # surely, but by a thousandth
        ([3.0, 1.0, 2.9, 0.9, 3.1, 0.8, 2.8, 1.1], False),  # lower by chance
        ([1.0, 1.0, 0.5, 0.5], True),
        ([1.0, 0.5, 0.4], False),  # too few values
        ([-1.0, -1.1, -1.5, -1.6], True),  # a Wasserstein loss is below 0
        ([], False),
    ],
)
def test_fell(values, expected):
    assert fell(values) is expected


def test_row_holds_both_and_one_line():
    row = movement_row(discriminator_movement(warmup(FALLING, [0.9] * 4)), policy_movement(training(kl=0.03)))
    assert row.pop("line").startswith("The discriminator moved (held-out accuracy 0.90 on 40 pairs); the policy moved")
    assert row == {
        "discriminator_moved": True,
        "policy_moved": True,
        "loss_first": 0.70,
        "loss_last": 0.41,
        "held_out_accuracy": pytest.approx(0.9),
        "held_out_pairs": 40.0,
        "kl_to_start": 0.03,
    }


def test_imitation_moves_if_its_loss_falls():
    def rows(losses):
        return [{"phase": "sft", "step": i, "loss": loss, "learning_rate": 1e-4} for i, loss in enumerate(losses)]

    found = imitation_movement(rows([2.0, 1.8, 1.1, 0.9, 0.5, 0.4, 0.3, 0.2]))
    assert found.moved
    assert found.figures == pytest.approx({"loss_first": 1.45, "loss_last": 0.35})
    flat = imitation_movement(rows([2.0, 2.01, 1.99, 2.0, 2.01, 1.99]))
    assert flat.moved is False
    assert "--learning_rate" in flat.line
    assert imitation_movement(rows([2.0, 0.1])) is None
