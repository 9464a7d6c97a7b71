"""The discriminator's training: batches of experts and rollouts, replay, own optimiser, exact state.

Plain torch, outside `accelerator.prepare`: the accelerated optimiser's step does nothing while gradients accumulate,
FSDP2 and DeepSpeed refuse a second model, and the reward model must not be sharded with the policy. Across processes
all ranks choose the same batch, take every world-size-th row of it, and add up their gradients in one flat all-reduce.
"""

import math
import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tracereward.batching import token_budget_batches
from tracereward.config import AdversarialConfig
from tracereward.errors import RunFailed
from tracereward.masks import after_first_difference, first_difference
from tracereward.objectives import bce, class_weights
from tracereward.reward_model import TokenRewardModel

LR_WARMUP = 20  # updates until the full learning rate: the first Adam steps have no second moment yet


class Discriminator:
    """Learns to tell expert traces from rollouts of the same prompts; its log-odds are the reward.

    Args:
        model: the reward model to train.
        experts: (prompt ids, completion ids) of each demonstration; its index names it everywhere.
        config: the run's options.
    """

    def __init__(self, model: TokenRewardModel, experts: list[tuple[list[int], list[int]]], config: AdversarialConfig):
        self.model = model
        self.experts = experts
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if dist.is_initialized():  # the same start on every rank, whatever the seed did
            for parameter in self.parameters.values():
                dist.broadcast(parameter.data, 0)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.discriminator_learning_rate, weight_decay=0.01
        )
        self.random = random.Random(config.seed)
        self.updates = 0
        self.batches = 0
        self.replay: list[tuple[int, list[int]]] = []  # (demonstration, completion ids), oldest first

    def remember(self, rollouts: list[tuple[int, list[int]]]) -> None:
        """Add rollouts of demonstrations' prompts to the replay buffer; the oldest leave first."""
        self.replay = [*self.replay, *rollouts][-self.config.replay_size :]

    def learn(self, fresh: list[tuple[int, list[int]]]) -> dict[str, float]:
        """Take in a batch of the policy's rollouts: remember it, and update after every `discriminator_every`-th.

        Returns:
            Metrics of the last update; nothing if there was none.
        """
        self.remember(fresh)
        self.batches += 1
        metrics: dict[str, float] = {}
        if self.batches % self.config.discriminator_every == 0:
            for _ in range(self.config.discriminator_updates):
                metrics = self.update(fresh)
        return metrics

    def update(self, fresh: list[tuple[int, list[int]]]) -> dict[str, float]:
        """One optimiser step on demonstrations, each beside rollouts of its own prompt.

        Args:
            fresh: the policy's newest rollouts as (demonstration, completion ids), already in the replay buffer. Share
                `1 - replay_share` of the demonstrations is chosen among them.

        Returns:
            loss, accuracy_expert and accuracy_policy (at supervised positions), identical_share, grad_norm; nothing
            as long as no demonstration's prompt has a rollout.

        Raises:
            RunFailed: the loss or its gradient is not finite.
        """
        if not fresh and not self.replay:
            return {}
        completions, prompts, is_expert, starts, identical = self._batch(fresh)
        counts = torch.tensor([any(s < len(c) for s in row) for row, c in zip(starts, completions, strict=True)])
        expert_flags = torch.tensor(is_expert)
        weights = class_weights(expert_flags, counts)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [index for index in range(len(completions)) if counts[index]][rank::world]

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.zero_grad()
        self.model.train()
        sums = torch.zeros(5, device=self.model.device)  # loss; right and all, of experts and of rollouts
        lengths = [len(prompts[i]) + len(completions[i]) for i in mine]
        for chosen in token_budget_batches(lengths, self.config.discriminator_token_budget):
            rows = [mine[i] for i in chosen]
            batch = self.model.pack([prompts[i] for i in rows], [completions[i] for i in rows])
            supervised = self.model.supervision(batch).float()
            differing = after_first_difference(
                [len(completions[i]) for i in rows], [starts[i] for i in rows], supervised.size(1)
            ).to(supervised.device)
            expert = expert_flags[rows].to(supervised.device)
            logits = self.model(batch)
            loss = bce(logits, supervised * differing, expert, self.config.label_smoothing)
            loss = (loss * weights[rows].to(loss.device)).sum()
            loss.backward()
            positions = (supervised * differing) > 0
            right = positions & ((logits > 0) == expert[:, None])
            sums += torch.stack(
                [loss.detach()]
                + [(kind[:, None] & which).sum() for kind in (expert, ~expert) for which in (right, positions)]
            )
        self._add_up(sums)
        loss, right_expert, all_expert, right_policy, all_policy = sums.tolist()
        if not math.isfinite(loss):
            raise RunFailed(f"the discriminator's loss is {loss} at its update {self.updates + 1}")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0))
        if not math.isfinite(norm):
            raise RunFailed(f"the norm of the discriminator's gradient is {norm} at its update {self.updates + 1}")
        self.optimizer.step()
        self.updates += 1
        return {
            "loss": loss,
            "accuracy_expert": right_expert / all_expert if all_expert else math.nan,
            "accuracy_policy": right_policy / all_policy if all_policy else math.nan,
            "identical_share": identical,
            "grad_norm": norm,
        }

    @property
    def learning_rate(self) -> float:
        """The next update's learning rate."""
        online = self.config.discriminator_online_learning_rate
        if online is not None and self.updates >= self.config.discriminator_warmup_updates:
            return online
        return self.config.discriminator_learning_rate * min(1.0, (self.updates + 1) / LR_WARMUP)

    def _batch(self, fresh: list[tuple[int, list[int]]]) -> tuple[list, list, list[bool], list[list[int]], float]:
        """Experts first, then their rollouts: completions, prompts, is_expert, first differences, identical share."""
        by_expert: dict[int, list[list[int]]] = {}
        for index, completion in self.replay:
            by_expert.setdefault(index, []).append(completion)
        new: dict[int, list[list[int]]] = {}
        for index, completion in fresh:
            new.setdefault(index, []).append(completion)
        size = min(self.config.discriminator_prompts, len(by_expert.keys() | new.keys()))
        from_fresh = self.random.sample(sorted(new), min(round(size * (1 - self.config.replay_share)), len(new)))
        others = sorted(by_expert.keys() - set(from_fresh))
        from_replay = self.random.sample(others, min(size - len(from_fresh), len(others)))
        pairs = [(index, new[index]) for index in from_fresh] + [(index, by_expert[index]) for index in from_replay]

        rows: list[tuple[list[int], list[int], bool, list[int]]] = []
        rollouts: list[tuple[list[int], list[int], bool, list[int]]] = []
        seen = identical = 0
        for index, candidates in pairs:
            prompt, expert = self.experts[index]
            chosen = self.random.sample(candidates, min(self.config.discriminator_rollouts, len(candidates)))
            different = [completion for completion in chosen if completion != expert]  # would carry both labels
            seen, identical = seen + len(chosen), identical + len(chosen) - len(different)
            starts = [first_difference(completion, expert) for completion in different]
            where = self.config.first_difference
            # Without a rollout that differs there is nothing to tell it from: no start, so that it does not count.
            rows.append((expert, prompt, True, starts if where == "both" else [0][: len(different)]))
            rollouts += [
                (c, prompt, False, [0 if where == "none" else s]) for c, s in zip(different, starts, strict=True)
            ]
        completions, prompts, is_expert, all_starts = map(list, zip(*rows, *rollouts, strict=True))
        return completions, prompts, is_expert, all_starts, identical / max(1, seen)

    def _add_up(self, sums: Tensor) -> None:
        """Sum gradients and `sums` over the processes, in place."""
        if not dist.is_initialized():
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        flat = torch.cat([sums, *(gradient.flatten().float() for gradient in gradients)])
        dist.all_reduce(flat)
        total, *parts = flat.split([len(sums), *(gradient.numel() for gradient in gradients)])
        sums.copy_(total)
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on: tensors, numbers and lists only."""
        return {
            "parameters": {name: p.detach().cpu() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.getstate(),
            "updates": self.updates,
            "batches": self.batches,
            "replay": self.replay,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        version, internal, gauss = state["random"]
        self.random.setstate((version, tuple(internal), gauss))
        self.updates = state["updates"]
        self.batches = state["batches"]
        self.replay = [(index, list(completion)) for index, completion in state["replay"]]
