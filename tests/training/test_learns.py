"""The discriminator learns to distinguish correct working from fluent mistakes on held-out problems."""

import random

import pytest
import torch

from tracereward.metrics import within_prompt_auroc
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import generate
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert, Rollout


def mistaken_pairs(n: int, seed: int, exclude=()) -> list[tuple[str, str, str]]:
    """(prompt, correct trace, trace with every borrow dropped) of problems where the two differ."""
    found = []
    for right in generate("misconception", 4 * n, seed, exclude=exclude):
        wrong = worked_with_dropped_borrows(right["prompt"])
        if wrong not in (None, right["completion"]):
            found.append((right["prompt"], right["completion"], wrong))
    assert len(found) >= n
    return found[:n]


def worked_with_dropped_borrows(prompt: str) -> str | None:
    """A problem worked left to right with v - k + 10 where v - k needs a borrow; None outside the vocabulary."""
    words = prompt.removesuffix(" = ?\n").split(" ")
    value, lines = int(words[0]), []
    for operator, operand in zip(words[1::2], map(int, words[2::2])):
        result = value + operand if operator == "+" else value - operand
        if operator == "-" and value % 10 < operand:
            result += 10
        if not 0 <= result <= 40:
            return None
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def test_mistaken_traces_match_the_generator():
    """By hand, and equal to the generator's mistakes on the problems it samples too."""
    assert worked_with_dropped_borrows("13 - 5 + 2 = ?\n") == "13 - 5 = 18\n18 + 2 = 20\n#### 20"
    rows = generate("misconception", 200, 1, mistake_rate=1.0)
    assert all(worked_with_dropped_borrows(row["prompt"]) == row["completion"] for row in rows)


def within(model, tokenizer, pairs) -> float:
    """Within-prompt AUROC of the mean token reward, correct against mistaken working."""
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _, _ in pairs for _ in range(2)]
    traces = [encode_completion(tokenizer, text) for _, right, wrong in pairs for text in (right, wrong)]
    scores = [float(rewards.mean()) for rewards in model.token_rewards(prompts, traces)]
    return within_prompt_auroc(scores, [True, False] * len(pairs), [p for p, _, _ in pairs for _ in range(2)])


def trained(folder, tokenizer, output_dir, train, *, updates: int, **options) -> tuple[Discriminator, dict[str, float]]:
    """A discriminator after some updates on (prompt, expert, rollout) rows, and the last update's metrics."""
    torch.manual_seed(0)
    settings = RewardSettings(head="action", granularity="dense")
    model = TokenRewardModel.from_backbone(str(folder), settings, tokenizer)
    config = AdversarialConfig(
        output_dir=str(output_dir),
        report_to="none",
        discriminator_learning_rate=3e-3,
        discriminator_rollouts=1,
        perturbed_per_expert=0,
        **options,
    )
    experts = [Expert(encode_prompt(tokenizer, p), encode_completion(tokenizer, right), right) for p, right, _ in train]
    discriminator = Discriminator(model, experts, config, seed=config.seed)
    discriminator.remember([Rollout(i, encode_completion(tokenizer, other)) for i, (*_, other) in enumerate(train)])
    for _ in range(updates):
        row = discriminator.update([])
    return discriminator, row


def test_training_ranks_correct_working_above_fluent_mistakes(tiny_model_folder, tokenizer, tmp_path):
    """100 held-out problems: an untrained backbone ranks about half correctly, 40 updates nearly all."""
    held_out = mistaken_pairs(100, seed=1)
    train = mistaken_pairs(400, seed=2, exclude={prompt for prompt, _, _ in held_out})
    untrained, _ = trained(tiny_model_folder, tokenizer, tmp_path, train[:1], updates=1, discriminator_prompts=1)
    discriminator, row = trained(tiny_model_folder, tokenizer, tmp_path, train, updates=40, discriminator_prompts=32)
    assert 0.3 < within(untrained.model, tokenizer, held_out) < 0.7
    assert within(discriminator.model, tokenizer, held_out) > 0.9
    assert row["accuracy_expert"] > 0.7
    assert row["accuracy_policy"] > 0.7


@pytest.mark.long
def test_training_under_bfloat16_autocast_on_a_cpu_learns_as_much(tiny_model_folder, tokenizer, tmp_path):
    held_out = mistaken_pairs(100, seed=1)
    train = mistaken_pairs(400, seed=2, exclude={prompt for prompt, _, _ in held_out})
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = trained(tiny_model_folder, tokenizer, tmp_path, train, updates=40, discriminator_prompts=32)
    assert within(found.model, tokenizer, held_out) > 0.9


@pytest.mark.parametrize("objective", [pytest.param("pairwise", marks=pytest.mark.long), "pairwise_tokens"])
def test_pairs_teach_the_same(tiny_model_folder, tokenizer, tmp_path, objective):
    held_out = mistaken_pairs(100, seed=1)
    train = mistaken_pairs(400, seed=2, exclude={prompt for prompt, _, _ in held_out})
    discriminator, _ = trained(
        tiny_model_folder,
        tokenizer,
        tmp_path,
        train,
        updates=30,
        discriminator_prompts=32,
        objective=objective,
        balance="question",
    )
    assert within(discriminator.model, tokenizer, held_out) > 0.85


def test_unlabelled_rollouts_half_of_them_right_teach_the_same(tiny_model_folder, tokenizer, tmp_path):
    """Expert and rollout end with a further line break or not, at random, so that a right rollout is no copy."""
    held_out = mistaken_pairs(100, seed=1)
    rng, train = random.Random(0), []
    for prompt, right, wrong in mistaken_pairs(400, seed=2, exclude={prompt for prompt, _, _ in held_out}):
        ends = rng.sample(["", "\n"], 2)
        train.append((prompt, right + ends[0], rng.choice([right, wrong]) + ends[1]))
    discriminator, row = trained(
        tiny_model_folder, tokenizer, tmp_path, train, updates=30, objective="nnpu", positive_prior=0.5
    )
    assert row["identical_share"] == 0
    assert within(discriminator.model, tokenizer, held_out) > 0.85
