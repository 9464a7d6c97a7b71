"""Transfer of one backbone's reward to other backbones' policies, as trained and adapted on few demonstrations."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from studies.setup import judging
from studies.setup.arms import adversarial
from studies.setup.frozen import load_frozen, once
from studies.setup.site import TASK, Site
from tracereward.commands.rerank import rerank_rows
from tracereward.files import read_jsonl
from tracereward.metrics import within_prompt_auroc
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.selection import outcomes
from tracereward.tasks.recipes import get_task
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.token_bridge import TokenBridge

OWN = ("policies", "demonstrations", "updates", "head_learning_rate")
"""Options of a cell that are not options of adversarial training."""

Sample = dict[str, Any]


def of_training(options: dict[str, Any]) -> dict[str, Any]:
    """The options of adversarial training."""
    return {name: value for name, value in options.items() if name not in OWN}


def run(
    site: Site, arm: str, others: dict[str, Site], options: dict[str, Any], *, samples: dict[str, list[Sample]]
) -> dict[str, Any]:
    """Rank all backbones' samples by one reward model, as trained and adapted to each policy.

    Args:
        site: site of the reward model's backbone.
        arm: arm of the reward model.
        others: site of each policy's backbone, including the reward model's own.
        options: those of adversarial training, ``demonstrations`` (numbers of demonstrations to adapt with),
            ``updates`` and ``head_learning_rate``.
        samples: samples of each SFT policy for the test questions.

    Returns:
        By policy and number of demonstrations: `choices`, and for 0 (not adapted) also `aurocs`. The reward model's
        own policy has only 0.
    """
    given = of_training(options)
    found: dict[str, Any] = {}
    for name, other in others.items():
        as_it_is = score(load_frozen(site, arm), other, samples[name])
        found[name] = {"0": {**choices(as_it_is), **aurocs(as_it_is)}}
        if other == site:
            continue
        rollouts = judging.draw_samples(other, other.start, other.demonstrations, given["warmup_rollouts"])
        for count in options["demonstrations"]:
            rate = {"discriminator_online_learning_rate": options["head_learning_rate"]}
            model = adapt(
                load_frozen(site, arm), site, {**given, **rate}, rollouts, count=count, updates=options["updates"]
            )
            found[name][str(count)] = choices(score(model, other, samples[name]))
    return found


def adapt(
    model: TokenRewardModel,
    site: Site,
    options: dict[str, Any],
    rollouts: Sequence[Sample],
    *,
    count: int,
    updates: int,
) -> TokenRewardModel:
    """Train the head further: the first `count` demonstrations against another policy's rollouts on their prompts.

    The backbone is frozen: tuning all weights overfits few demonstrations and forgets the others.

    Args:
        model: the reward model; its head is changed.
        site: site of the model's backbone.
        options: its training options, with the head's learning rate as the online one.
        rollouts: rollouts of the other policy, in the order of demonstrations; retokenized from their text.
        count: number of demonstrations.
        updates: number of discriminator updates.
    """
    rows = read_jsonl(site.data(site.demonstrations))[:count]
    experts = [
        Expert(
            encode_prompt(model.tokenizer, row["prompt"]),
            encode_completion(model.tokenizer, row["completion"]),
            row["completion"],
        )
        for row in rows
    ]
    given = {**site.world.grpo, **options, "discriminator_warmup_updates": 0, "discriminator_updates": updates}
    config = adversarial(site, "adapted", given)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    discriminator = Discriminator(model, experts, config, seed=config.seed)
    for row in rollouts:
        if row["question"] < len(experts):
            ids = encode_completion(model.tokenizer, row["completion"], row["finished"])
            discriminator.remember([Rollout(row["question"], ids)])
    for _ in range(updates):
        discriminator.update([])
    return model.eval()


def score(model: TokenRewardModel, other: Site, samples: Sequence[Sample]) -> list[Sample]:
    """A policy's samples with ``reward``, projected to the policy's tokens, and ``unknown``, see `projected`."""
    tokenizer = load_tokenizer(str(other.run("init")))
    assert isinstance(tokenizer.eos_token_id, int)
    bridge = TokenBridge(tokenizer, model, [tokenizer.eos_token_id])
    found = once(samples, lambda rows: projected(model, bridge, rows))
    return [
        {**row, "reward": reward, "unknown": unknown} for row, (reward, unknown) in zip(samples, found, strict=True)
    ]


def choices(scored: Sequence[Sample]) -> dict[str, float]:
    """Accuracy of choosing one sample per question.

    Returns:
        Accuracy of majority vote, of the shortest, of the best by logprob, reward and sum (of the two), and of the
        oracle; and gain: sum minus the better of majority and logprob.
    """
    task = get_task(TASK)
    _, questions = rerank_rows(scored, task, "majority")
    methods = {name: name for name in ("majority", "logprob", "shortest", "oracle", "reward")}
    methods["sum"] = "reward_logprob"
    found = {name: float(np.mean(outcomes(questions, method, task.equal))) for name, method in methods.items()}
    return {**found, "gain": found["sum"] - max(found["majority"], found["logprob"])}


def aurocs(scored: Sequence[Sample]) -> dict[str, float]:
    """Within-prompt AUROC of the reward, of the policy's log-prob and of their sum, omitted where undefined; and the
    share of samples with tokens unknown to the reward model."""
    correct, questions = [bool(row["correct"]) for row in scored], [row["question"] for row in scored]
    scores = {
        "auroc": [row["reward"] for row in scored],
        "auroc_logprob": [row["logprob"] for row in scored],
        "auroc_sum": [row["reward"] + row["logprob"] for row in scored],
    }
    found = {name: within_prompt_auroc(values, correct, questions) for name, values in scores.items()}
    found = {name: value for name, value in found.items() if not math.isnan(value)}
    return {**found, "unknown": float(np.mean([row["unknown"] for row in scored]))}


def projected(model: TokenRewardModel, bridge: TokenBridge, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
    """Mean reward over the policy's tokens of each sample, and whether it has tokens unknown to the reward model."""
    policy_ids = [encode_completion(bridge.tokenizer, row["completion"], row["finished"]) for row in samples]
    reward_ids = [bridge.completion(ids) for ids in policy_ids]
    found = model.token_rewards([bridge.prompt(row["prompt"]) for row in samples], reward_ids)
    triples = zip(policy_ids, reward_ids, found, strict=True)
    unknown = model.tokenizer.unk_token_id
    return [
        (float(bridge.rewards(ids, translated, values).mean()), unknown in translated)
        for ids, translated, values in triples
    ]
