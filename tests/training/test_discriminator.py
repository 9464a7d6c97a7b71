"""Discriminator updates against autograd of the formula; batches, replay, processes and exact state."""

import copy
import io
import math
import threading

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tracereward.errors import InputError, RunFailed
from tracereward.modeling import distributed
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.training import discriminator as module
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.discriminator import LR_WARMUP, Discriminator, ema_decay
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.prior import estimate_prior

ALL = {
    "discriminator_prompts": 99,
    "discriminator_rollouts": 99,
    "replay_share": 0.0,
    "perturbed_per_expert": 0,
    "discriminator_every": 1,
}


@pytest.fixture(scope="module")
def pairs(tokenizer, experts):
    return [
        Expert(
            encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"]), row["completion"]
        )
        for row in experts
    ]


@pytest.fixture(scope="module")
def rollouts(tokenizer, pairs):
    """For each demonstration: a trace that differs early, one that differs late, a truncated and an identical one."""
    found = []
    for index, (_, expert, *_) in enumerate(pairs):
        other = tokenizer.convert_tokens_to_ids("7" if expert[-2] != tokenizer.convert_tokens_to_ids("7") else "8")
        found.append(Rollout(index, [other, *expert[1:]]))
        found.append(Rollout(index, [*expert[:-2], other, expert[-1]]))
        if index % 2:
            found.append(Rollout(index, expert[:4] + [other] * 3))
        if index % 3 == 0:
            found.append(Rollout(index, list(expert)))
    return found


@pytest.fixture
def make(tiny_model_folder, tokenizer, pairs, tmp_path):
    def build(head="action", experts=pairs, settings=(), held_out=(), **options) -> Discriminator:
        torch.manual_seed(0)
        settings = RewardSettings(head=head, **dict(settings))
        model = TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer, dtype=torch.float32)
        config = AdversarialConfig(output_dir=str(tmp_path), report_to="none", **{**ALL, **options})
        judged = config.monitor_every
        return Discriminator(model, list(experts), config, seed=config.seed, held_out=held_out, judged_every=judged)

    return build


def parameters_of(discriminator) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in discriminator.parameters.items()}


def gradients_of(discriminator) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in discriminator.parameters.items() if p.grad is not None}


def largest_difference(a, b) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---------- one update ----------


def formula(discriminator, pairs, rollouts, supervised, smoothing, where):
    """The loss of the method, one unpadded sequence at a time.

    The mean of both class means of per-sequence weighted means of -y log sigmoid(f) - (1 - y) log sigmoid(-f).
    """
    model = discriminator.model

    def logits(prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        first, last = len(prompt), len(prompt) + len(completion)
        if model.head is None:
            return model.backbone(input_ids=ids).logits[0, first:, 0]
        output = model.backbone(input_ids=ids, output_hidden_states=True)
        log_probs = output.logits[0].log_softmax(-1)
        chosen = torch.stack([log_probs[p - 1, ids[0, p]] for p in range(first, last)])
        return model.head.a * chosen + model.head.b + output.hidden_states[-1][0, first:] @ model.head.w

    def loss(f, weights, y):
        weights = torch.tensor(weights)
        terms = -y * torch.nn.functional.logsigmoid(f) - (1 - y) * torch.nn.functional.logsigmoid(-f)
        return (weights * terms).sum() / weights.sum()

    expert_losses, rollout_losses = [], []
    for index, (prompt, expert, *_) in enumerate(pairs):
        mine = [c for i, c, *_ in rollouts if i == index and c != expert]
        if not mine:
            continue
        starts = []
        for completion in mine:
            start = 0
            while where != "none" and completion[: start + 1] == expert[: start + 1] and start < len(completion):
                start += 1
            starts.append(start if where == "both" else 0)
            if start == len(completion):  # a prefix of the expert: no token differs
                continue
            weights = [float(t >= start and supervised(completion, t)) for t in range(len(completion))]
            rollout_losses.append(loss(logits(prompt, completion), weights, smoothing))
        left = [sum(s <= t for s in starts) / len(starts) * supervised(expert, t) for t in range(len(expert))]
        expert_losses.append(loss(logits(prompt, expert), left, 1 - smoothing))
    return torch.stack(expert_losses).mean() / 2 + torch.stack(rollout_losses).mean() / 2


def supervisions(newline):
    return {
        "dense": lambda ids, t: True,
        "sparse": lambda ids, t: t == len(ids) - 1,
        "step": lambda ids, t: t == len(ids) - 1 or ids[t] == newline,
        "interval": lambda ids, t: t == len(ids) - 1 or (t + 1) % 4 == 0,
    }


@pytest.mark.parametrize(
    ("head", "granularity", "smoothing", "first"),
    [
        ("action", "dense", 0.1, "both"),
        ("action", "interval", 0.0, "both"),
        ("action", "dense", 0.1, "rollouts"),
        ("token", "step", 0.1, "both"),
        ("token", "sparse", 0.2, "rollouts"),
        ("token", "dense", 0.1, "none"),
    ],
)
def test_update_gradient_matches_formula(make, pairs, rollouts, tokenizer, head, granularity, smoothing, first):
    settings = {"granularity": granularity, "interval": 4}
    options = {"label_smoothing": smoothing, "first_difference": first, "discriminator_token_budget": 90}
    discriminator = make(head, settings=settings, **options)
    rule = supervisions(tokenizer.convert_tokens_to_ids("\n"))[granularity]
    expected = formula(discriminator, pairs, rollouts, rule, smoothing, first)
    wanted = torch.autograd.grad(expected, list(discriminator.parameters.values()), allow_unused=True)
    wanted = {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(discriminator.parameters.items(), wanted, strict=True)
    }
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))

    row = discriminator.update(rollouts)
    assert row["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert row["identical_share"] == pytest.approx(4 / 34)
    clip = min(1.0, 1.0 / (norm + 1e-6))
    for name, parameter in discriminator.parameters.items():
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, clip * wanted[name], atol=1e-6, rtol=0)


def test_accuracies_count_supervised_tokens_after_the_first_difference(make, tokenizer, pairs):
    """With b = 100 every token is classified as expert: accuracy 1 on the expert, 0 on the rollout's one token."""
    discriminator = make()
    with torch.no_grad():
        discriminator.model.head.b.fill_(100.0)
    row = discriminator.update([Rollout(0, [*pairs[0][1][:-1], tokenizer.pad_token_id])])
    assert (row["accuracy_expert"], row["accuracy_policy"]) == (1.0, 0.0)
    assert row["loss"] == pytest.approx((0.1 * 100 + 0.9 * 100) / 2, rel=0.1)
    with torch.no_grad():
        discriminator.model.head.b.fill_(-100.0)
    row = discriminator.update([Rollout(0, [7, 7, 7])])
    assert (row["accuracy_expert"], row["accuracy_policy"]) == (0.0, 1.0)


def test_micro_batches_do_not_change_the_update(make, rollouts):
    gradients, losses = [], []
    for budget in (1, 60, 100_000):
        discriminator = make(discriminator_token_budget=budget)
        losses.append(discriminator.update(rollouts)["loss"])
        gradients.append(gradients_of(discriminator))
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-6)
    assert largest_difference(gradients[0], gradients[2]) < 1e-6
    assert largest_difference(gradients[1], gradients[2]) < 1e-6
    assert largest_difference({n: 0 * g for n, g in gradients[2].items()}, gradients[2]) > 1e-2


def test_first_step_is_adamw(make, rollouts):
    """p - lr/20 * (0.01 p + g / (|g| + eps)): decoupled decay, bias-corrected moments, warmed-up rate."""
    discriminator = make(discriminator_learning_rate=1e-2)
    before = parameters_of(discriminator)
    discriminator.update(rollouts)
    rate = 1e-2 / LR_WARMUP
    for name, parameter in discriminator.parameters.items():
        gradient = parameter.grad
        expected = before[name] * (1 - rate * 0.01) - rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)
    for _ in range(LR_WARMUP):
        discriminator.update(rollouts[:2])
    assert discriminator.optimizer.param_groups[0]["lr"] == 1e-2
    assert discriminator.updates == LR_WARMUP + 1


def test_identical_rollouts_are_excluded(make, pairs):
    """They would carry both labels. With no others there is no loss and no step."""
    discriminator = make()
    before = parameters_of(discriminator)
    row = discriminator.update([Rollout(i, list(expert)) for i, (_, expert, *_) in enumerate(pairs)])
    assert row["identical_share"] == 1.0
    assert row["loss"] == 0.0
    assert math.isnan(row["accuracy_expert"])
    assert largest_difference(before, parameters_of(discriminator)) == 0.0


def test_rollout_that_is_an_expert_prefix_has_no_supervised_token(make, pairs):
    """It was truncated before it differs: only the expert's later tokens are supervised."""
    discriminator = make()
    row = discriminator.update([Rollout(0, pairs[0][1][:3])])
    assert math.isnan(row["accuracy_policy"])
    assert not math.isnan(row["accuracy_expert"])
    assert math.isfinite(row["loss"])


def test_no_update_without_rollouts(make):
    discriminator = make()
    before = parameters_of(discriminator)
    assert discriminator.update([]) == {}
    assert discriminator.updates == 0
    assert largest_difference(before, parameters_of(discriminator)) == 0.0


def test_training_raises_expert_scores_above_rollouts(make, pairs, rollouts):
    """Label polarity: expert is high."""
    discriminator = make(head="token", discriminator_learning_rate=3e-3)
    policy = [(i, c) for i, c, *_ in rollouts if c != pairs[i][1]]

    def gap() -> float:
        right = discriminator.model.token_rewards([p for p, *_ in pairs], [c for _, c, *_ in pairs])
        wrong = discriminator.model.token_rewards([pairs[i][0] for i, _ in policy], [c for _, c in policy])
        return float(torch.cat(right).mean() - torch.cat(wrong).mean())

    before = gap()
    for _ in range(25):
        row = discriminator.update(rollouts)
    assert gap() > before + 0.3
    assert gap() > 0
    assert row["accuracy_expert"] > 0.5


def test_non_finite_loss_stops_the_run(make, rollouts):
    discriminator = make()
    with torch.no_grad():
        discriminator.model.head.b.fill_(math.nan)
    before = parameters_of(discriminator)
    with pytest.raises(RunFailed, match="the discriminator's loss is nan at its update 1"):
        discriminator.update(rollouts)
    after = parameters_of(discriminator)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


# ---------- batches and replay ----------


def record(discriminator) -> list[list[tuple[list[int], list[int]]]]:
    """The model's inputs: one list of (prompt, completion) for each call of pack."""
    seen, pack = [], discriminator.model.pack

    def spy(prompts, completions):
        seen.append([(list(p), list(c)) for p, c in zip(prompts, completions, strict=True)])
        return pack(prompts, completions)

    discriminator.model.pack = spy
    return seen


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rollouts_are_batched_with_their_own_prompts_expert(make, pairs, share):
    """Two tokens of each rollout encode its demonstration's index and its age."""
    discriminator = make(replay_share=share, discriminator_prompts=4, discriminator_rollouts=2, replay_size=30)
    seen = record(discriminator)
    expert_of = {tuple(prompt): expert for prompt, expert, *_ in pairs}
    assert len(expert_of) == len(pairs)

    def tagged(index, age, n):
        return Rollout(index, [10 + index, 30 + age, 40 + n])

    counts = {0: 0, 1: 0}
    for step in range(12):
        fresh = [tagged((3 * step + k) % 12, 1, n) for k in range(3) for n in range(3)]
        discriminator.remember([tagged(i, 0, step % 5) for i in range(12)])
        seen.clear()
        discriminator.update(fresh)
        (batch,) = seen
        experts = [prompt for prompt, completion in batch if completion == expert_of[tuple(prompt)]]
        # Three fresh prompts do not fill a batch of four: replay does, unless its share is 0.
        assert len(experts) == len({tuple(p) for p in experts}) == (4 if share else 3)
        for prompt, completion in batch:
            if completion == expert_of[tuple(prompt)]:
                continue
            index = completion[0] - 10
            assert pairs[index][0] == prompt
            assert prompt in experts
            counts[completion[1] - 30] += 1
    assert (counts[1] > 0) == (share < 1)
    assert (counts[0] > 0) == (share > 0)


def test_replay_share_is_a_share_of_prompts(make, pairs):
    discriminator = make(replay_share=0.75, discriminator_prompts=8, discriminator_rollouts=1)
    discriminator.remember([Rollout(i, [20]) for i in range(12)])
    seen = record(discriminator)
    discriminator.update([Rollout(i, [21]) for i in range(12)])
    (batch,) = seen
    assert sorted(c[0] for _, c in batch if len(c) == 1) == [20] * 6 + [21] * 2


def test_replay_buffer_evicts_the_oldest_rollouts(make):
    discriminator = make(replay_size=3)
    discriminator.remember([Rollout(0, [1]), Rollout(1, [2])])
    discriminator.remember([Rollout(2, [3]), Rollout(3, [4])])
    assert discriminator.replay.rollouts == [Rollout(1, [2]), Rollout(2, [3]), Rollout(3, [4])]


def test_updates_do_not_modify_the_demonstrations(make, pairs, rollouts):
    before = copy.deepcopy(pairs), copy.deepcopy(rollouts)
    discriminator = make(experts=pairs)
    discriminator.remember(rollouts)
    discriminator.update(rollouts)
    assert (pairs, rollouts) == before


# ---------- state ----------


def test_restored_state_continues_bit_for_bit(make, rollouts):
    """Parameters, moments, RNG state and replay survive a file without pickled code (`weights_only`)."""
    options = {"replay_share": 0.5, "discriminator_prompts": 5, "discriminator_rollouts": 1, "seed": 7}
    one = make(discriminator_learning_rate=1e-3, **options)
    one.remember(rollouts)
    for _ in range(3):
        one.update(rollouts[:6])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    rows = [one.update(rollouts[6:12]) for _ in range(3)]

    two = make(discriminator_learning_rate=1e-3, **options)
    with torch.no_grad():
        for parameter in two.parameters.values():
            parameter.add_(1.0)
    two.random.random()
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert [two.update(rollouts[6:12]) for _ in range(3)] == rows
    assert two.updates == one.updates == 6
    assert two.replay.rollouts == one.replay.rollouts
    assert largest_difference(parameters_of(one), parameters_of(two)) == 0.0
    file.seek(0)  # the comparison can fail: without the optimiser's moments the result differs
    three = make(discriminator_learning_rate=1e-3, **options)
    three.load_state_dict({**torch.load(file, weights_only=True), "optimizer": three.optimizer.state_dict()})
    for _ in range(3):
        three.update(rollouts[6:12])
    assert largest_difference(parameters_of(one), parameters_of(three)) > 1e-6


# ---------- processes ----------


class Processes:
    """The part of `torch.distributed` that the discriminator uses, with threads as processes."""

    def __init__(self, world: int):
        self.world = world
        self.here = threading.local()
        self.barrier = threading.Barrier(world, timeout=60)
        self.buffers: dict[int, torch.Tensor] = {}

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.here.rank

    def get_world_size(self):
        return self.world

    def _exchange(self, tensor) -> list[torch.Tensor]:
        self.buffers[self.here.rank] = tensor.detach().clone()
        self.barrier.wait()
        buffers = [self.buffers[rank] for rank in range(self.world)]
        self.barrier.wait()
        return buffers

    def all_reduce(self, tensor):
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def broadcast(self, tensor, source):
        tensor.copy_(self._exchange(tensor)[source])

    def run(self, work) -> list:
        results: dict[int, object] = {}

        def main(rank):
            self.here.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in range(self.world)]


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_make_the_update_of_one(make, rollouts, monkeypatch, world):
    """Rank r takes rows r, r + world, ...; gradients are summed, so unequal shares are exact and weights stay equal."""
    alone = make(discriminator_token_budget=70)
    expected = alone.update(rollouts)
    shares = [make(discriminator_token_budget=70) for _ in range(world)]
    processes = Processes(world)
    monkeypatch.setattr(module, "dist", processes)
    rows = processes.run(lambda rank: shares[rank].update(rollouts))
    for row in rows:
        assert row == rows[0]
        assert row == pytest.approx(expected, abs=1e-5)
    for share in shares:
        assert largest_difference(gradients_of(share), gradients_of(alone)) < 1e-6
        assert largest_difference(parameters_of(share), parameters_of(shares[0])) == 0.0


# ---------- pairs and unlabelled traces ----------


def unpadded_logits(discriminator, prompt, completion) -> torch.Tensor:
    return discriminator.model(discriminator.model.pack([prompt], [completion]))[0]


def of_rollouts(pairs, rollouts) -> list[tuple[int, list[int]]]:
    return [(i, completion) for i, completion, *_ in rollouts if completion != pairs[i].completion]


def gradients_of_formula(discriminator, loss) -> dict[str, torch.Tensor]:
    """Clipped to norm 1."""
    found = torch.autograd.grad(loss, list(discriminator.parameters.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(discriminator.parameters.items(), found, strict=True)
    }
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))
    return {name: g * min(1.0, 1 / (norm + 1e-6)) for name, g in found.items()}


def assert_gradients(discriminator, expected):
    for name, parameter in discriminator.parameters.items():
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, expected[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("balance", ["none", "question"])
def test_pairwise_tokens_update_matches_the_formula(make, pairs, rollouts, balance):
    """By question a prompt with one rollout weighs what one with three does."""
    options = {"first_difference": "none", "discriminator_token_budget": 90, "balance": balance}
    discriminator = make("token", objective="pairwise_tokens", **options)
    softplus = torch.nn.functional.softplus
    by_prompt: dict[int, list[torch.Tensor]] = {}
    for i, completion in of_rollouts(pairs, rollouts):
        expert = unpadded_logits(discriminator, pairs[i].prompt, pairs[i].completion)
        other = unpadded_logits(discriminator, pairs[i].prompt, completion)
        halves = softplus(other - expert.mean()).mean() + softplus(other.mean() - expert).mean()
        by_prompt.setdefault(i, []).append(halves / 2)
    means = [torch.stack(losses).mean() for losses in by_prompt.values()]
    assert len({len(losses) for losses in by_prompt.values()}) > 1
    every = torch.cat([torch.stack(losses) for losses in by_prompt.values()])
    expected = torch.stack(means).mean() if balance == "question" else every.mean()
    gradients = gradients_of_formula(discriminator, expected)
    assert discriminator.update(rollouts)["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert_gradients(discriminator, gradients)


@pytest.mark.parametrize(("prior", "below"), [(0.3, False), (0.99, True)])
@pytest.mark.parametrize(("budget", "world"), [(100_000, 1), (90, 2)])
def test_nnpu_update_matches_the_formula(make, pairs, rollouts, monkeypatch, prior, below, budget, world):
    """Below 0 the gradient is that of -N, whatever N is in single passes and processes."""
    options = {"objective": "nnpu", "positive_prior": prior, "first_difference": "none"}
    state = make("token", objective="bce", discriminator_learning_rate=3e-3)
    for _ in range(10):
        state.update(rollouts)
    discriminators = [make("token", discriminator_token_budget=budget, **options) for _ in range(world)]
    for one in discriminators:
        one.load_state_dict(state.state_dict())
        one.model.train()

    first, wrong = discriminators[0], of_rollouts(pairs, rollouts)
    used = sorted({i for i, _ in wrong})
    experts = torch.stack([unpadded_logits(first, pairs[i].prompt, pairs[i].completion).mean() for i in used])
    others = torch.stack([unpadded_logits(first, pairs[i].prompt, completion).mean() for i, completion in wrong])
    positive = prior * torch.sigmoid(-experts).mean()
    negative = torch.sigmoid(others).mean() - prior * torch.sigmoid(experts).mean()
    assert (negative.item() < 0) == below
    gradients = gradients_of_formula(first, -negative if below else positive + negative)

    if world > 1:
        processes = Processes(world)
        monkeypatch.setattr(module, "dist", processes)
        rows = processes.run(lambda rank: discriminators[rank].update(rollouts))
    else:
        rows = [first.update(rollouts)]
    for row, one in zip(rows, discriminators, strict=True):
        assert row["loss"] == pytest.approx(positive.item() + max(0.0, negative.item()), abs=1e-6)
        assert row["positive_prior"] == prior
        assert_gradients(one, gradients)


def test_prior_is_estimated_once_from_held_out_scores_after_updates_with_bce(make, pairs, rollouts):
    held_out, options = (0, 1, 2), {"head": "token", "first_difference": "none", "discriminator_learning_rate": 3e-3}
    discriminator = make(objective="nnpu", held_out=held_out, **options)
    plain = make(objective="bce", held_out=held_out, label_smoothing=0.0, **options)
    for one in (discriminator, plain):
        one.remember(rollouts)
    for _ in range(module.PRIOR_UPDATES):
        row = discriminator.update(rollouts)
        assert row == plain.update(rollouts)
        assert "positive_prior" not in row
    scores: dict[str, list[float]] = {"experts": [], "rollouts": []}
    with torch.no_grad():
        discriminator.model.eval()
        for i in held_out:
            scores["experts"].append(float(unpadded_logits(discriminator, *pairs[i][:2]).mean()))
        for i, completion, *_ in rollouts:
            if i in held_out:
                value = float(unpadded_logits(discriminator, pairs[i].prompt, completion).mean())
                scores["rollouts"].append(value)
    expected = min(0.95, max(0.01, estimate_prior(scores["experts"], scores["rollouts"]).value))
    assert discriminator.update(rollouts)["positive_prior"] == pytest.approx(expected)
    assert discriminator.update(rollouts)["positive_prior"] == pytest.approx(expected)
    resumed = make(objective="nnpu", held_out=held_out, **options)
    resumed.load_state_dict(discriminator.state_dict())
    assert resumed.update(rollouts) == discriminator.update(rollouts)


def test_kept_held_out_rollouts_are_of_many_demonstrations(make, monkeypatch):
    """Five of a batch of two, one and four: at most the last two of each. Demonstration 3 is not held out."""
    monkeypatch.setattr(module, "HELD_OUT_ROLLOUTS", 5)
    discriminator = make(held_out=(0, 1, 2))
    batch = [(0, 1), (0, 2), (1, 3), (3, 4), (2, 5), (2, 6), (2, 7), (2, 8)]
    discriminator.remember([Rollout(index, [token]) for index, token in batch])
    kept = {(rollout.demonstration, *rollout.ids) for rollout in discriminator.held_out_rollouts.rollouts}
    assert kept == {(0, 1), (0, 2), (1, 3), (2, 7), (2, 8)}


def test_prior_cannot_be_estimated_without_held_out_demonstrations(make, rollouts):
    with pytest.raises(InputError, match="positive_prior"):
        make(objective="nnpu")
    discriminator = make(objective="nnpu", held_out=(0,))
    discriminator.updates = module.PRIOR_UPDATES
    with pytest.raises(RunFailed, match="positive_prior"):
        discriminator.update([rollout for rollout in rollouts if rollout.demonstration])


def test_rollouts_of_weight_0_are_not_trained_on(make, rollouts):
    """And weights within a class are relative: 2 for all changes nothing."""
    half = [rollout._replace(weight=0.0 if place % 2 else 2.0) for place, rollout in enumerate(rollouts)]
    results = []
    for given in (half, rollouts[::2]):
        discriminator = make()
        discriminator.remember(given)
        results.append((discriminator.update([])["loss"], gradients_of(discriminator)))
    (one, of_one), (two, of_two) = results
    assert one == pytest.approx(two, abs=1e-6)
    assert largest_difference(of_one, of_two) < 1e-6


def test_processes_start_from_the_same_weights(make, monkeypatch):
    """Head and LoRA start at random, possibly from a different seed on each process."""
    built = [make("token").model for _ in range(2)]
    with torch.no_grad():
        next(built[1].parameters()).add_(1.0)
    options, experts = make().options, make().experts
    processes = Processes(2)
    for owner in (module, distributed):
        monkeypatch.setattr(owner, "dist", processes)
    one, two = processes.run(lambda rank: Discriminator(built[rank], experts, options, seed=0))
    assert largest_difference(parameters_of(one), parameters_of(two)) == 0.0


# ---------- backbone ----------


def test_discriminator_updates_do_not_train_the_policy(make, rollouts, tiny_model_folder):
    """The discriminator is a copy: its updates do not change the model folder's weights."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = [p.clone() for p in policy.parameters()]
    discriminator = make(discriminator_learning_rate=1e-2)
    discriminator.update(rollouts)
    again = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


# ---------- schedule ----------


def updates_after(discriminator, rollouts, batches: int) -> list[int]:
    counts = []
    for _ in range(batches):
        discriminator.learn(rollouts[:2])
        counts.append(discriminator.updates)
    return counts


def test_updates_per_batch(make, rollouts):
    """`discriminator_updates` a batch, or one update every `discriminator_every` batches: the two are not confused."""
    assert updates_after(make(discriminator_updates=3), rollouts, 4) == [3, 6, 9, 12]
    assert updates_after(make(discriminator_every=2), rollouts, 4) == [0, 1, 1, 2]
    frozen = make(discriminator_updates=0, discriminator_every=4, replay_share=0.5)
    assert updates_after(frozen, rollouts, 5) == [0] * 5


def test_count_of_skipped_batches_is_restored(make, rollouts):
    discriminator = make(discriminator_every=3)
    assert discriminator.learn(rollouts[:2]) == {}
    assert discriminator.replay.rollouts == rollouts[:2]
    assert discriminator.learn(rollouts[2:3]) == {}
    assert discriminator.learn(rollouts[3:4])["loss"] > 0
    assert discriminator.replay.rollouts == rollouts[:4]


def test_learning_rate_after_warm_up(make, rollouts):
    discriminator = make(
        discriminator_learning_rate=1e-2, discriminator_online_learning_rate=1e-4, discriminator_warmup_updates=3
    )
    rates = []
    for _ in range(5):
        discriminator.update(rollouts[:2])
        rates.append(discriminator.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2 / 20, 2e-2 / 20, 3e-2 / 20, 1e-4, 1e-4])


def test_online_learning_rate_after_an_early_end_of_warm_up(make, rollouts):
    rates = {"discriminator_learning_rate": 1e-2, "discriminator_online_learning_rate": 1e-4}
    discriminator = make(**rates, discriminator_warmup_updates=30)
    discriminator.update(rollouts[:2])
    assert discriminator.optimizer.param_groups[0]["lr"] == 1e-2 / 20
    discriminator.learn(rollouts[:2])
    assert discriminator.optimizer.param_groups[0]["lr"] == 1e-4


# ---------- gate, averages, held-out demonstrations ----------


def test_gate_uses_held_out_pairs(make, pairs, rollouts, monkeypatch):
    """Held-out demonstrations are never in a batch; the accuracy is over pairs."""
    discriminator = make(discriminator_gate_high=0.0, discriminator_learning_rate=1e-2)
    discriminator.held_out = frozenset({0, 1})
    seen = record(discriminator)
    discriminator.remember(rollouts)
    discriminator.update(rollouts)
    prompts = {tuple(prompt) for batch in seen for prompt, _ in batch}
    assert tuple(pairs[0].prompt) not in prompts
    assert tuple(pairs[2].prompt) in prompts
    wins, total = 0.0, 0
    for index in (0, 1):
        (expert,) = discriminator.model.token_rewards([pairs[index].prompt], [pairs[index].completion])
        for i, completion, *_ in rollouts:
            if i == index and completion != pairs[i].completion:
                (other,) = discriminator.model.token_rewards([pairs[i].prompt], [completion])
                wins, total = wins + float(expert.mean() > other.mean()), total + 1
    assert discriminator.held_out_accuracy() == pytest.approx(wins / total)
    assert total == discriminator.held_out_pairs == 5
    before = discriminator.updates
    monkeypatch.setattr(discriminator, "held_out_accuracy", lambda: 0.5)
    twice = 2.0 * total  # the same rollouts again
    assert discriminator.learn(rollouts) == {"held_out_accuracy": 0.5, "held_out_pairs": twice, "updates": 0.0}
    assert discriminator.updates == before


def test_verified_rollouts_and_other_experts_are_no_traces_to_beat(make, pairs):
    """Of one held-out prompt with two demonstrations: nothing is left to compare the expert with."""
    prompt, expert, *_ = pairs[0]
    other = [*expert[:2], 7, *expert[2:]]
    discriminator = make(experts=[pairs[0], Expert(prompt, other), pairs[1]])
    discriminator.held_out = frozenset({0, 1})
    discriminator.remember([Rollout(0, other), Rollout(1, expert), Rollout(0, [7, 7], True)])
    assert math.isnan(discriminator.held_out_accuracy())
    discriminator.remember([Rollout(0, [7, 7])])
    assert discriminator.held_out_accuracy() in (0.0, 1.0)


@pytest.mark.parametrize("head", ["airl", "implicit"])
def test_held_out_accuracy_compares_logits_not_rewards(make, pairs, head):
    """The logit of these heads is f - log pi: a pi that hates the rollouts' tokens reverses every comparison."""
    rollout = [7, 7, 7]

    def accuracy(of_rollouts, of_experts):
        discriminator = make(head)
        discriminator.held_out = frozenset({0})
        discriminator.remember([Rollout(0, rollout)])
        width = {len(rollout): of_rollouts, len(pairs[0].completion): of_experts}

        def log_probs(batch):
            lengths = batch.completion_mask.sum(1).tolist()
            return torch.tensor([[width[length]] * batch.completion_mask.size(1) for length in lengths])

        discriminator.policy_log_probs = log_probs
        return discriminator.held_out_accuracy()

    assert accuracy(of_rollouts=-1e3, of_experts=0.0) == 0.0
    assert accuracy(of_rollouts=0.0, of_experts=-1e3) == 1.0


@pytest.mark.parametrize(("share", "expected"), [(0.0, [1, 1, 1, 2]), (0.5, [1, 2, 3, 4])])
def test_without_replay_a_batch_without_usable_rollouts_is_not_learned_from(make, rollouts, share, expected):
    """Of prompts without a demonstration, or of held-out ones: the buffer would be all that is left."""
    discriminator = make(replay_share=share, discriminator_prompts=4)
    discriminator.held_out = frozenset({0})
    held_out = [rollout for rollout in rollouts if rollout.demonstration == 0]
    updates = []
    for batch in (rollouts, [], held_out, rollouts):
        logged = discriminator.learn(batch)
        updates.append(discriminator.updates)
        assert logged["updates"] == updates[-1] - ([0, *updates][-2])
    assert updates == expected


@pytest.mark.parametrize(("gate", "judged"), [(None, [3, 6]), (1.0, [1, 2, 3, 4, 5, 6])])
def test_accuracy_is_computed_only_for_a_monitor_or_gate(make, rollouts, monkeypatch, gate, judged):
    discriminator = make(monitor_every=3, discriminator_gate_high=gate)
    discriminator.held_out = frozenset({0, 1})
    monkeypatch.setattr(discriminator, "held_out_accuracy", lambda: 0.5)
    logged = [discriminator.learn(rollouts) for _ in range(6)]
    assert [batch for batch, metrics in enumerate(logged, 1) if "held_out_accuracy" in metrics] == judged
    assert discriminator.updates == 6


def test_weight_average(make, rollouts):
    """p <- d p + (1 - d) q with d = min(decay, (1 + n) / (10 + n)); the live weights are restored."""
    discriminator = make(discriminator_ema=0.3, discriminator_learning_rate=1e-2)
    expected = parameters_of(discriminator)
    for n in range(1, 8):
        discriminator.update(rollouts)
        decay = min(0.3, (1 + n) / (10 + n))
        live = parameters_of(discriminator)
        expected = {name: decay * value + (1 - decay) * live[name] for name, value in expected.items()}
    with discriminator.averaged() as model:
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert largest_difference(inside, expected) < 1e-6
    assert largest_difference(parameters_of(discriminator), live) == 0.0
    assert largest_difference(expected, live) > 1e-4
    assert ema_decay(0.99, 1) == 2 / 11
    assert ema_decay(0.99, 10_000) == 0.99


def test_head_weight_norm_is_bounded(make, rollouts):
    discriminator = make(head="token", spectral_norm=True, discriminator_learning_rate=0.1)
    with torch.no_grad():
        discriminator.model.head_weight.mul_(100)
    discriminator.update(rollouts)
    assert float(discriminator.model.head_weight.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("head", ["action", "token"])
@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_gradient_checkpointing_changes_only_memory(make, tiny_model_folder, tokenizer, pairs, rollouts, head, peft):
    results = []
    for checkpointing in (False, True):
        discriminator = make(head)
        torch.manual_seed(0)
        model = TokenRewardModel.from_backbone(
            str(tiny_model_folder), RewardSettings(head=head), tokenizer, peft, dtype=torch.float32
        )
        forwards = []
        layer = next(m for name, m in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
        layer.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        if checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        discriminator = Discriminator(model, list(pairs), discriminator.options, seed=discriminator.seed)
        discriminator.update(rollouts)
        results.append((gradients_of(discriminator), len(forwards)))
    (plain, once), (checkpointed, twice) = results
    assert twice >= 2 * once  # the layers are recomputed in the backward pass
    assert largest_difference(plain, checkpointed) < 1e-6
