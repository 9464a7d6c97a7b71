"""The discriminator's training: losses, stabilisers, own optimiser, averaged copy, exact state.

Plain torch, outside `accelerator.prepare`: the accelerated optimiser's step does nothing while gradients accumulate,
FSDP2 and DeepSpeed refuse a second model, and the reward model must not be sharded with the policy. All ranks sample
the same batch, process every world-size-th part of it and sum their gradients: in one flat all-reduce, or, with
`shard_discriminator`, in FSDP2's reduce-scatters.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from tracereward.errors import InputError, RunFailed
from tracereward.modeling.batching import Batch, grouped_batches, hide_tokens
from tracereward.modeling.distributed import (
    all_reduce_max,
    broadcast_object,
    broadcast_parameters,
    clip_gradients,
    full_tensor,
    is_distributed,
    shard,
    shard_like,
)
from tracereward.modeling.log_probs import can_share_prompts
from tracereward.rewards.heads import subtracts_policy
from tracereward.rewards.model import TokenRewardModel
from tracereward.training.discriminator_batch import (
    Expert,
    Labelled,
    Perturber,
    ReplayBuffer,
    Rollout,
    TracesByPrompt,
    by_demonstration,
    draw,
    perturber,
    traces_by_prompt,
)
from tracereward.training.first_difference import after_first_difference, labels_from
from tracereward.training.gradient_penalties import gradient_penalties, r1_penalties
from tracereward.training.loss_weights import PAIRED, Weights, passes, weigh
from tracereward.training.losses import (
    bce,
    centre,
    limit_spectral_norm,
    nnpu,
    nnpu_negative,
    pairwise,
    pairwise_tokens,
    sequence_scores,
    wasserstein,
)
from tracereward.training.options import DiscriminatorOptions
from tracereward.training.prior import estimate_prior

LR_WARMUP = 20  # updates until the full learning rate: the first Adam steps have no second moment yet
PRIOR_UPDATES = 20  # with bce before the prior of `nnpu` is estimated: the learning rate is then warm
PRIOR_LIMITS = (0.01, 0.95)  # of an estimated prior: at 0 or 1 the risk does not depend on one of the classes
HELD_OUT_ROLLOUTS = 128  # newest rollouts of held-out prompts: enough for an estimate, cheap to score


def ema_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): the average forgets its initial weights even after few updates."""
    return min(decay, (1 + updates) / (10 + updates))


class Discriminator:
    """Trains a reward model to distinguish experts from rollouts of the same prompts; its log-odds are the reward.

    Args:
        model: the reward model to train.
        experts: the demonstrations; everywhere else they are referred to by index.
        options: options of the training.
        seed: seed of the sampling of demonstrations and rollouts.
        held_out: indices of demonstrations that are not trained on, used for the held-out accuracy.
        judged_every: batches of rollouts between two held-out accuracies.
        device: device of this process's shard with `shard_discriminator`; default: the model's.
        policy_log_probs: returns log pi(y_t) of a batch, (B, T), which the heads ``airl`` and ``implicit`` subtract.
    """

    def __init__(
        self,
        model: TokenRewardModel,
        experts: Sequence[Expert],
        options: DiscriminatorOptions,
        *,
        seed: int,
        held_out: Sequence[int] = (),
        judged_every: int = 1,
        device: torch.device | None = None,
        policy_log_probs: Callable[[Batch], Tensor] | None = None,
    ):
        self.model = model
        self.experts: list[Expert] = list(experts)
        self.known: TracesByPrompt = traces_by_prompt(experts)
        self.options: DiscriminatorOptions = options
        self.seed: int = seed
        self.judged_every: int = judged_every
        self.held_out: frozenset[int] = frozenset(held_out)
        self.policy_log_probs = policy_log_probs
        self.sharded: bool = options.shard_discriminator and is_distributed()
        device = device if device is not None and self.sharded else model.device
        if dist.is_initialized():  # identical initial weights on all ranks
            broadcast_parameters(self._trained().values(), device)
        if self.sharded:
            shard(model.backbone, device)
            model.to(device)  # its head
        self.parameters: dict[str, nn.Parameter] = self._trained()
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(
            self.parameters.values(), lr=options.warmup_rate, weight_decay=0.01
        )
        self.average: dict[str, Tensor] = (
            {n: p.detach().clone() for n, p in self.parameters.items()} if options.discriminator_ema else {}
        )
        self.random: random.Random = random.Random(seed)
        self.updates: int = 0
        self.batches: int = 0
        self.prior: float | None = options.positive_prior
        self.replay: ReplayBuffer = ReplayBuffer(options.replay_size)
        self.held_out_rollouts: ReplayBuffer = ReplayBuffer(HELD_OUT_ROLLOUTS)
        if options.objective == "nnpu" and self.prior is None and not held_out:
            raise InputError(
                "objective nnpu estimates the prior on held-out demonstrations, and there are none: give more "
                "demonstrations or --positive_prior"
            )
        self.perturbed: Perturber = perturber(model.tokenizer, model.settings.step_rule)

    def _trained(self) -> dict[str, nn.Parameter]:
        with self.model.active():
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def remember(self, rollouts: Sequence[Rollout]) -> None:
        """Add rollouts to the replay buffer; rollouts of held-out demonstrations go to a buffer of their own.

        Those without a label are left out.
        """
        rollouts = [rollout for rollout in rollouts if rollout.label is not None]
        self.replay.add(r for r in rollouts if r.weight and r.demonstration not in self.held_out)
        held_out = by_demonstration(r for r in rollouts if r.demonstration in self.held_out)
        # The newest are kept: the last of each demonstration come last, so that they are of as many as possible.
        place = {index: len(of_prompt) for index, of_prompt in held_out.items()}
        ranked = [(rank - place[i], r) for i, rs in held_out.items() for rank, r in enumerate(rs)]
        self.held_out_rollouts.add(r for _, r in sorted(ranked, key=lambda pair: pair[0]))

    def learn(self, fresh: Sequence[Rollout]) -> dict[str, float]:
        """Store a batch of rollouts, and update the discriminator after every `discriminator_every`-th batch.

        Returns:
            Metrics of the last update with the number of `updates`, and `held_out_accuracy` with the number of its
            `held_out_pairs` every `judged_every` batches or if a gate needs it; `left_out_share` of the batch if some
            have no label; empty if the batch was only stored.
        """
        options = self.options
        self.remember(fresh)
        self.batches += 1
        if self.batches % options.discriminator_every:
            return {}
        gate = options.discriminator_gate_high
        judged = bool(self.held_out) and (gate is not None or self.batches % self.judged_every == 0)
        # All processes must use the same number: if only some updated, their collective calls would hang.
        accuracy = broadcast_object(self.held_out_accuracy()) if judged else math.nan
        count = 0 if gate is not None and accuracy > gate else options.discriminator_updates
        stale = not options.replay_share and all(r.demonstration in self.held_out or r.label is None for r in fresh)
        if stale:
            count = 0  # nothing fresh to learn from, and the buffer is for the warm-up only
        metrics: dict[str, float] = {}
        for _ in range(count):
            metrics = self.update(fresh)
        if judged:
            metrics |= {"held_out_accuracy": accuracy, "held_out_pairs": float(self.held_out_pairs)}
        if count or gate is not None or stale:
            metrics["updates"] = float(count)
        if left_out := sum(rollout.label is None for rollout in fresh):
            metrics["left_out_share"] = left_out / len(fresh)
        return metrics

    def update(self, fresh: Sequence[Rollout]) -> dict[str, float]:
        """One optimiser step on demonstrations and rollouts of the same prompts.

        Args:
            fresh: the policy's newest rollouts, already in the replay buffer. `1 - replay_share` of the demonstrations
                are sampled from those that have one.

        Returns:
            loss (with penalties), accuracy_expert, accuracy_policy and accuracy_perturbed (at supervised positions),
            grad_norm, with the objective ``nnpu`` the prior in use, positive_prior, and the shares of
            `discriminator_batch.draw`; empty if no demonstration has a rollout.

        Raises:
            RunFailed: the loss or its gradient is not finite.
        """
        traces, shares = self._draw(fresh)
        if not traces:
            return {}
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.options.objective == "nnpu" and self.prior is None and self.updates >= PRIOR_UPDATES:
            self.prior = broadcast_object(self._estimated_prior())  # all processes must use the same number
        self.optimizer.zero_grad()
        self.model.train()
        with self.model.active():
            sums = self._accumulate(traces)
        self._add_up(sums)
        loss, *counts = sums.tolist()
        if not math.isfinite(loss):
            raise RunFailed(f"the discriminator's loss is {loss} at its update {self.updates + 1}")
        norm = clip_gradients(self.parameters.values(), 1.0)
        if not math.isfinite(norm):
            raise RunFailed(f"the norm of the discriminator's gradient is {norm} at its update {self.updates + 1}")
        self.optimizer.step()
        if self.options.spectral_norm:
            assert self.model.head_weight is not None
            limit_spectral_norm(self.model.head_weight)
        self._weights_changed()
        self.updates += 1
        decay = ema_decay(self.options.discriminator_ema, self.updates)
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - decay)
        right = dict(zip(("expert", "policy", "perturbed"), zip(counts[::2], counts[1::2], strict=True), strict=True))
        if not self.options.perturbed_per_expert:
            del right["perturbed"]
        accuracies = {f"accuracy_{kind}": n / total if total else math.nan for kind, (n, total) in right.items()}
        prior = {} if self.prior is None else {"positive_prior": self.prior}
        return {"loss": loss, **accuracies, **shares, **prior, "grad_norm": norm}

    @property
    def objective(self) -> str:
        """The objective of the next update: ``bce`` until the prior of ``nnpu`` is known."""
        return "bce" if self.options.objective == "nnpu" and self.prior is None else self.options.objective

    def _estimated_prior(self) -> float:
        """The share of held-out rollouts that are as good as held-out experts, within `PRIOR_LIMITS`."""
        self.model.eval()
        experts = [self.experts[index] for index in sorted(self.held_out)]
        rollouts = [rollout for rollout in self.held_out_rollouts.rollouts if rollout.label is False]
        if not rollouts:
            raise RunFailed(
                "objective nnpu: no held-out demonstration has a rollout to estimate the prior from: give "
                "--positive_prior, or raise --held_out_fraction"
            )
        with torch.no_grad():
            of_experts = self._sequence_scores([e.prompt for e in experts], [e.completion for e in experts])
            of_rollouts = self._sequence_scores(
                [self.experts[rollout.demonstration].prompt for rollout in rollouts], [r.ids for r in rollouts]
            )
        low, high = PRIOR_LIMITS
        return min(high, max(low, estimate_prior(of_experts.numpy(), of_rollouts.numpy()).value))

    def _draw(self, fresh: Sequence[Rollout]) -> tuple[list[Labelled], dict[str, float]]:
        rollouts = [r for r in fresh if r.demonstration not in self.held_out and r.label is not None]
        return draw(
            self.experts,
            rollouts,
            self.replay,
            self.options,
            rng=self.random,
            perturbed=self.perturbed,
            known=self.known,
        )

    def _accumulate(self, traces: list[Labelled]) -> Tensor:
        """Accumulate the gradients of this process's share of the loss.

        Returns:
            The loss, then the numbers of correct and of all supervised positions: of experts, of rollouts, and of
            perturbed experts.
        """
        options = self.options
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        budget = options.discriminator_token_budget
        weights = weigh(traces, self.objective, options.balance)
        paired = self.objective in PAIRED or options.centre_penalty > 0
        todo = [(rows, 1.0) for rows in passes(traces, paired, budget, rank=rank, world=world)]
        if self.sharded or subtracts_policy(options.head):  # equally many passes on all processes, see `distributed`
            first = passes(traces, paired, budget)[:1]
            todo += [(rows, 0.0) for rows in first] * (all_reduce_max(len(todo)) - len(todo))
        sums = torch.zeros(7, device=self.model.device)
        below = self.objective == "nnpu" and self._negative_risk(traces, todo, weights) < 0
        for rows, share in todo:
            loss, counted = self._loss(
                [traces[index] for index in rows], rows, weights.of(rows, self.model.device), below=below
            )
            (share * loss).backward()
            sums += share * torch.stack([loss.detach(), *counted])
        counting = [trace for trace in traces if trace.counts]
        if options.gradient_penalty:
            points = [self.random.random() for _ in traces]  # the same on all ranks
            terms = gradient_penalties(self.model, counting, points, budget, rank=rank, world=world)
            sums[0] += self._backward(terms, options.gradient_penalty)
        if options.r1_penalty:
            terms = r1_penalties(self.model, counting, budget, rank=rank, world=world)
            sums[0] += self._backward(terms, options.r1_penalty)
        return sums

    @torch.no_grad()
    def _negative_risk(self, traces: list[Labelled], todo: list[tuple[list[int], float]], weights: Weights) -> float:
        """N of `nnpu` over the complete update and all processes: its sign decides each pass's gradient.

        A forward pass more, instead of a second set of gradients.
        """
        assert self.prior is not None
        total = torch.zeros(1, device=self.model.device)
        for rows, share in todo:
            of = weights.of(rows, self.model.device)
            batch, _, own_positions = self._positions([traces[index] for index in rows], of.is_expert)
            scores = sequence_scores(self._logits(batch, rows)[0], own_positions)
            total += share * (nnpu_negative(scores, of.is_expert, self.prior) * of.in_loss).sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total)

    def _positions(self, traces: Sequence[Labelled], expert: Tensor) -> tuple[Batch, tuple[Tensor, Tensor], Tensor]:
        """A pass's batch, the weights and the labels of its positions, and the weights where label and class agree."""
        batch = self.model.pack([trace.prompt for trace in traces], [trace.completion for trace in traces])
        device, width = batch.input_ids.device, batch.completion_mask.size(1)
        lengths = [len(trace.completion) for trace in traces]
        differing = after_first_difference(lengths, [trace.starts for trace in traces], width).to(device)
        labels = labels_from([trace.switch for trace in traces], width).to(device).bool()
        weights = self.model.position_weights(batch) * differing
        return batch, (weights, labels), weights * (labels == expert[:, None])  # not the part before a perturbation

    def _loss(
        self, traces: Sequence[Labelled], rows: Sequence[int], weights: Weights, *, below: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of one pass, and its position counts in the order of `_accumulate`.

        Args:
            traces: the traces of the pass.
            rows: their indices in the update.
            weights: their loss weights.
            below: see `nnpu`.
        """
        options, expert = self.options, weights.is_expert
        batch, (position_weights, labels), own_positions = self._positions(traces, expert)
        logits, log_probs = self._logits(batch, rows)
        scores = sequence_scores(logits, own_positions)
        if self.objective == "bce":
            smoothing = options.label_smoothing if options.objective == "bce" else 0.0
            losses = bce(logits, position_weights, labels, smoothing)
        elif self.objective == "pairwise":
            losses = pairwise(scores, expert, weights.groups, shares=weights.shares)
        elif self.objective == "pairwise_tokens":
            losses = pairwise_tokens(logits, own_positions, expert, weights.groups, shares=weights.shares)
        elif self.objective == "nnpu":
            assert self.prior is not None
            losses = nnpu(scores, expert, self.prior, below=below)
        else:
            losses = wasserstein(scores, expert)
        loss = (losses * weights.in_loss).sum()
        if options.centre_penalty:
            centred = centre(scores, expert, weights.groups, shares=weights.shares)
            loss = loss + options.centre_penalty * (centred * weights.in_pairs).sum()
        if options.expert_nll:
            assert log_probs is not None
            nll = -sequence_scores(log_probs, batch.completion_mask.float())
            loss = loss + options.expert_nll * (nll * weights.of_experts).sum()
        positions = own_positions > 0
        right = positions & ((logits > 0) == expert[:, None])
        perturbed = torch.tensor([trace.is_perturbed for trace in traces], device=expert.device)
        kinds = (expert, ~expert & ~perturbed, perturbed)
        return loss, [(kind[:, None] & some).sum() for kind in kinds for some in (right, positions)]

    def _logits(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The discriminator's logits, and log p_phi if the head uses it."""
        shown = batch
        if self.options.token_dropout:
            seeds = [hash((self.seed, self.updates, row)) % 2**31 for row in rows]
            shown = hide_tokens(batch, self.options.token_dropout, seeds)
        values, log_probs = self.model.values_and_log_probs(shown)
        if subtracts_policy(self.model.settings.head):
            assert self.policy_log_probs is not None
            values = values - self.policy_log_probs(batch)
        return values, log_probs

    def _backward(self, terms: Iterator[Tensor], weight: float) -> Tensor:
        """Accumulate the gradients of `weight` times the sum of `terms`; returns the value."""
        total = torch.zeros((), device=self.model.device)
        for term in terms:
            with sdpa_kernel(SDPBackend.MATH):  # gradient checkpointing repeats the penalty's forward pass here
                (weight * term).backward()
            total += weight * term.detach()
        return total

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        online = self.options.discriminator_online_learning_rate
        warmed = (
            self.batches > 0 or self.updates >= self.options.discriminator_warmup_updates
        )  # the warm-up may end early
        if online is not None and warmed:
            return online
        return self.options.warmup_rate * min(1.0, (self.updates + 1) / LR_WARMUP)

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """Share of (held-out expert, rollout of its prompt) pairs in which the expert's mean logit is higher.

        Ties count half; rollouts equal to an expert trace of their prompt are skipped, and those that are
        positives. Unlike the share of tokens on the correct side of 0, it is comparable across objectives. nan if there
        is no such pair.
        """
        self.model.eval()
        groups = self._held_out_groups()
        scores = self._sequence_scores(
            [prompt for prompt, traces in groups for _ in traces], [ids for _, traces in groups for ids in traces]
        )
        wins = total = 0.0
        for of_prompt in scores.split([len(traces) for _, traces in groups]):
            gaps = of_prompt[0] - of_prompt[1:]
            wins += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
            total += len(gaps)
        return wins / total if total else math.nan

    @property
    def held_out_pairs(self) -> int:
        """How many pairs `held_out_accuracy` is a share of."""
        return sum(len(traces) - 1 for _, traces in self._held_out_groups())

    def _held_out_groups(self) -> list[tuple[list[int], list[list[int]]]]:
        """For each held-out demonstration with rollouts to compare: its prompt, then itself and those rollouts."""
        groups = []
        for index, rollouts in self.held_out_rollouts.by_demonstration().items():
            expert = self.experts[index]
            own = self.known[tuple(expert.prompt)]
            different = [rollout.ids for rollout in rollouts if rollout.label is False and rollout.ids not in own]
            if different:
                groups.append((expert.prompt, [expert.completion, *different]))
        return groups

    def _sequence_scores(self, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
        """Each completion's mean logit over its supervised positions."""
        scores = torch.zeros(len(prompts))
        subtracts = subtracts_policy(self.model.settings.head)
        share = not subtracts and can_share_prompts(self.model.backbone)
        for rows, sizes in grouped_batches(prompts, completions, self.options.discriminator_token_budget, share):
            batch = self.model.pack([prompts[i] for i in rows], [completions[i] for i in rows])
            values = self.model(batch, sizes if len(sizes) < len(rows) else None)
            if subtracts:
                assert self.policy_log_probs is not None
                values = values - self.policy_log_probs(batch)
            scores[rows] = sequence_scores(values, self.model.position_weights(batch)).cpu()
        return scores

    @contextlib.contextmanager
    def averaged(self) -> Iterator[TokenRewardModel]:
        """The reward model with the averaged weights instead of the current ones, if there is an average."""
        live = {name: self.parameters[name].detach().clone() for name in self.average}
        self._copy(self.average)
        try:
            yield self.model
        finally:
            self._copy(live)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(shard_like(value, self.parameters[name]))
        self._weights_changed()

    def _weights_changed(self) -> None:
        """Forget autocast's casts of the old weights: it keeps them until its outermost context ends."""
        torch.clear_autocast_cache()

    def _add_up(self, sums: Tensor) -> None:
        """Sum gradients and `sums` over processes, in place; FSDP2 has already summed those of sharded weights."""
        if not dist.is_initialized():
            return
        parameters = [p for p in self.parameters.values() if not isinstance(p, DTensor)]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([sums, *(gradient.flatten().float() for gradient in gradients)])
        dist.all_reduce(flat)
        total, *parts = flat.split([len(sums), *(gradient.numel() for gradient in gradients)])
        sums.copy_(total)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def weights(self) -> dict[str, Tensor]:
        """All trained weights, unsharded, on the CPU. With sharding a collective call; only rank 0 gets the values."""
        return {name: self._whole(p.detach()) for name, p in self.parameters.items()}

    def _whole(self, tensor: Tensor) -> Tensor:
        tensor = full_tensor(tensor)
        # One copy per machine: the full weights of all processes might not fit in its memory.
        return tensor.cpu() if not self.sharded or dist.get_rank() == 0 else tensor.new_empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on: full tensors (see `weights`), numbers and lists only."""
        return {
            "parameters": self.weights(),
            "average": {name: self._whole(p) for name, p in self.average.items()},
            "optimizer": tree_map_only(Tensor, self._whole, self.optimizer.state_dict()),
            "random": self.random.getstate(),
            "updates": self.updates,
            "batches": self.batches,
            "prior": self.prior,
            "replay": self.replay.state(),
            "held_out_rollouts": self.held_out_rollouts.state(),
        }

    def load(self, path: Path) -> None:
        """Load a `state_dict` from a file; with sharding each process reads only its shard."""
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=self.sharded))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore exactly the state of `state_dict`."""
        self._copy(state["parameters"])
        for name, average in self.average.items():
            average.copy_(shard_like(state["average"][name], average))
        moments = {
            place: {name: shard_like(value, parameter) for name, value in state["optimizer"]["state"][place].items()}
            for place, parameter in enumerate(self.parameters.values())
            if place in state["optimizer"]["state"]
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        version, internal, gauss = state["random"]
        self.random.setstate((version, tuple(internal), gauss))
        self.updates = state["updates"]
        self.batches = state["batches"]
        if self.options.positive_prior is None:  # an earlier version's state has none
            self.prior = state.get("prior")
        self.replay.load(state["replay"])
        self.held_out_rollouts.load(state["held_out_rollouts"])


def held_out_demonstrations(experts: Sequence[Expert], fraction: float, seed: int) -> list[int]:
    """Indices of the held-out demonstrations, sampled with `seed`.

    All demonstrations of a prompt are on the same side: `fraction` is a share of the prompts, of which at least one is
    left to train on.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, expert in enumerate(experts):
        by_prompt.setdefault(tuple(expert.prompt), []).append(index)
    groups = list(by_prompt.values())
    held = min(len(groups) - 1, round(fraction * len(groups)))
    chosen = random.Random(f"held out {seed}").sample(groups, held)
    return sorted(index for group in chosen for index in group)
