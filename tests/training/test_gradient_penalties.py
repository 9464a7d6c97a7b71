"""Gradient penalties on the tiny model against float64 finite differences of an independent critic."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.choices import HEADS
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.training.discriminator_batch import Labelled
from tracereward.training.gradient_penalties import gradient_norms, gradient_penalties, interpolate, r1_penalties


def build(folder, tokenizer, head, moved=True, **settings) -> TokenRewardModel:
    """A critic; `moved` perturbs every weight, so that zero initialisation hides no error."""
    torch.manual_seed(0)
    settings = RewardSettings(head=head, **settings)
    model = TokenRewardModel.from_backbone(str(folder), settings, tokenizer, dtype=torch.float32)
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def critics(tiny_model_folder, tokenizer):
    return {head: build(tiny_model_folder, tokenizer, head) for head in HEADS}


def trace(prompt, completion, group, is_expert=True) -> Labelled:
    switch = len(completion) if is_expert else 0
    return Labelled(prompt=prompt, completion=completion, group=group, is_expert=is_expert, starts=[0], switch=switch)


@pytest.fixture(scope="module")
def traces(tokenizer, experts):
    """Five demonstrations with rollouts of unequal lengths; the fourth has none, and the last has a second positive."""
    found = []
    for index, row in enumerate(experts[:5]):
        prompt, expert = encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"])
        found.append(trace(prompt, expert, index))
        if index == 4:
            found.append(trace(prompt, expert[1:], index))
        if index != 3:
            found.append(trace(prompt, [*expert[: 3 + index], 20, 21] + [22] * (12 * (index % 2)), index, False))
            found.append(trace(prompt, [30, 31], index, False))
    return found


@pytest.fixture(scope="module")
def pairs(traces):
    """Each positive with the first negative of its prompt."""
    found = [(traces[0], traces[1]), (traces[3], traces[4]), (traces[6], traces[7])]
    found += [(traces[10], traces[12]), (traces[11], traces[12])]
    assert [e.group for e, _ in found] == [r.group for _, r in found] == [0, 1, 2, 4, 4]
    assert all(e.is_expert and not r.is_expert for e, r in found)
    gaps = [len(e.completion) - len(r.completion) for e, r in found]
    assert min(gaps) < 0 < max(gaps)
    return found


POINTS = [0.3, 0.9, 0.5, 0.1, 0.7, 0.2, 0.4, 0.6, 0.8, 0.35, 0.45, 0.55, 0.65, 0.75]


def norm_at(model, pair, point) -> float:
    """The gradient norm at one point, in a batch of one."""
    return gradient_norms(model, *interpolate(model, [pair], [point])).item()


def in_float64(model, prompt: int, completion: list[int], embeddings: torch.Tensor, supervised: list[int]):
    """s of unpadded embeddings (N, P + T, H) by plain transformers: the mean of f_t over the supervised positions."""
    backbone = copy.deepcopy(model.backbone).double()
    for module in backbone.modules():  # LlamaRMSNorm casts to float32
        if isinstance(module, LlamaRMSNorm):
            epsilon = module.variance_epsilon
            module.forward = lambda x, w=module.weight, e=epsilon: w * x * (x.square().mean(-1, True) + e).rsqrt()
    with torch.no_grad():
        output = backbone(inputs_embeds=embeddings, output_hidden_states=True)
        if model.settings.head in ("token", "airl"):
            return output.logits[:, prompt:, 0][:, supervised].mean(1)
        log_probs = output.logits.log_softmax(-1)
        f = torch.stack([log_probs[:, prompt + t - 1, token] for t, token in enumerate(completion)], 1)
        if model.settings.head == "action":
            head = copy.deepcopy(model.head).double()
            f = head.a * f + head.b + output.hidden_states[-1][:, prompt:] @ head.w
        return f[:, supervised].mean(1)


@pytest.mark.parametrize(("head", "granularity"), [*((head, "dense") for head in HEADS), ("action", "step")])
def test_norms_match_finite_differences(critics, tokenizer, pairs, head, granularity, monkeypatch):
    """Differences along each coordinate of a short completion's embeddings; prompts and padding are excluded."""
    model = critics[head]
    monkeypatch.setattr(model, "settings", RewardSettings(head=head, granularity=granularity))
    newline = tokenizer.convert_tokens_to_ids("\n")
    prompt, long = pairs[1][0].prompt, pairs[1][1].completion
    short = [8, 14, newline, 9, 1]
    batch, points = interpolate(
        model,
        [(trace(prompt, short, 0), trace(prompt, [7, 14, newline, 20], 0)), (trace(prompt * 2, long, 1),) * 2],
        [0.75, 0.5],
    )
    norms = gradient_norms(model, batch, points).detach()
    assert norms.shape == (2,)
    supervised = list(range(5)) if granularity == "dense" else [2, 4]

    left, h = len(prompt), 1e-5
    own = points[0, len(prompt) : 2 * len(prompt) + 5].detach().double()  # without padding
    steps = torch.zeros(5 * 64, *own.shape, dtype=torch.float64)
    for k in range(5 * 64):
        steps[k, left + k // 64, k % 64] = h
    up, down = (in_float64(model, left, short, own + sign * steps, supervised) for sign in (1, -1))
    slopes = (up - down) / (2 * h)
    assert float(norms[0]) == pytest.approx(float(slopes.norm()), rel=1e-5)
    assert float(norms[0]) > 1e-3

    # The slope is at most the norm in any direction, and equals it along the gradient.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(20, 5 * 64, generator=generator, dtype=torch.float64)
    directions = torch.cat([directions, slopes[None]])
    directions /= directions.norm(dim=1, keepdim=True)
    moves = torch.zeros(21, *own.shape, dtype=torch.float64)
    moves[:, left:] = h * directions.view(21, 5, 64)
    up, down = (in_float64(model, left, short, own + sign * moves, supervised) for sign in (1, -1))
    along = (up - down) / (2 * h)
    assert float(along[:20].abs().max()) <= float(norms[0]) * (1 + 1e-4)
    assert float(along[20]) == pytest.approx(float(norms[0]), rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_norms_do_not_depend_on_the_batch(critics, pairs, head):
    model = critics[head]
    together = gradient_norms(model, *interpolate(model, pairs, POINTS[:5]))
    alone = torch.tensor([norm_at(model, pair, point) for pair, point in zip(pairs, POINTS)])
    torch.testing.assert_close(together.detach(), alone, rtol=1e-4, atol=1e-7)


# ---------- points ----------


def test_points_interpolate_between_rollout_and_expert(critics, pairs):
    """1 is the expert, 0 the rollout; past the shorter one's end both are the longer one; prompts are unchanged."""
    model = critics["token"]
    table = model.backbone.get_input_embeddings().weight.detach()
    widest = max(len(e.prompt) for e, _ in pairs)
    for points in ([1.0] * 5, [0.0] * 5, [0.25, 0.5, 0.75, 0.1, 0.9]):
        batch, embeddings = interpolate(model, pairs, points)
        assert embeddings.requires_grad
        assert embeddings.is_leaf
        for row, ((expert, rollout), point) in enumerate(zip(pairs, points)):
            e, r = expert.completion, rollout.completion
            left = widest - len(expert.prompt)
            assert torch.equal(embeddings[row, left:widest], table[expert.prompt])
            length = max(len(e), len(r))
            for t in range(length):
                towards, start = e[t] if t < len(e) else r[t], r[t] if t < len(r) else e[t]
                expected = point * table[towards].double() + (1 - point) * table[start].double()
                torch.testing.assert_close(embeddings[row, widest + t].double(), expected, atol=1e-6, rtol=0)
                nearer = towards if point >= 0.5 else start
                assert int(batch.input_ids[row, widest + t]) == nearer
            assert int(batch.completion_mask[row].sum()) == length
            assert batch.attention_mask[row].tolist() == [
                int(left <= position < widest + length) for position in range(batch.input_ids.size(1))
            ]


# ---------- terms ----------


@pytest.mark.parametrize("head", ["token", "implicit"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_terms_sum_to_the_mean(critics, traces, pairs, head, budget):
    """Over pairs of each positive and its prompt's first negative, for any batches and number of processes."""
    model = critics[head]
    norms = [norm_at(model, pair, point) for pair, point in zip(pairs, POINTS)]
    expected = sum((norm - 1) ** 2 for norm in norms) / 5
    terms = list(gradient_penalties(model, traces, POINTS, budget))
    assert {1: len(terms) == 5, 60: 1 < len(terms) < 5, 10_000: len(terms) == 1}[budget]
    assert sum(terms).item() == pytest.approx(expected, rel=1e-5)
    halves = [list(gradient_penalties(model, traces, POINTS, budget, rank=rank, world=2)) for rank in (0, 1)]
    assert sum(halves[0]).item() == pytest.approx(sum((norms[i] - 1) ** 2 for i in (0, 2, 4)) / 5, rel=1e-5)
    assert (sum(halves[0]) + sum(halves[1])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", ["token", "implicit"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_r1_terms_sum_to_half_the_mean_square_at_the_experts(critics, traces, head, budget):
    """R1 needs no negative: interpolating between a trace and itself gives the trace."""
    model = critics[head]
    positives = [t for t in traces if t.is_expert]
    assert len(positives) == 6
    norms = [norm_at(model, (t, t), 1.0) for t in positives]
    expected = sum(norm**2 for norm in norms) / 12
    terms = list(r1_penalties(model, traces, budget))
    assert {1: len(terms) == 6, 60: 1 < len(terms) < 6, 10_000: len(terms) == 1}[budget]
    assert sum(terms).item() == pytest.approx(expected, rel=1e-5)
    halves = [list(r1_penalties(model, traces, budget, rank=rank, world=2)) for rank in (0, 1)]
    assert sum(halves[0]).item() == pytest.approx(sum(norms[i] ** 2 for i in (0, 2, 4)) / 12, rel=1e-5)
    assert (sum(halves[0]) + sum(halves[1])).item() == pytest.approx(expected, rel=1e-5)


def test_process_without_pairs(critics, traces):
    assert list(gradient_penalties(critics["token"], traces, POINTS, 100, rank=5, world=6)) == []
    assert list(gradient_penalties(critics["token"], traces[9:10], POINTS, 100)) == []  # an expert without a negative
    assert list(r1_penalties(critics["token"], traces[1:2], 100)) == []


# ---------- gradients and training ----------


def penalty(model, traces, kind):
    terms = gradient_penalties(model, traces, POINTS, 10_000) if kind == "wgan" else r1_penalties(model, traces, 10_000)
    return sum(terms)


@pytest.mark.parametrize("kind", ["wgan", "r1"])
@pytest.mark.parametrize("head", HEADS)
def test_penalty_gradient_reaches_the_backbone(tiny_model_folder, tokenizer, traces, head, kind):
    """Second derivatives reach every layer, and match finite differences along their own direction."""
    model = build(tiny_model_folder, tokenizer, head).train()
    penalty(model, traces, kind).backward()
    named = {n: p for n, p in model.backbone.named_parameters() if "embed_tokens" not in n}
    assert len(named) > 15
    for name, parameter in named.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.ne(0).any()), name
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in with_gradient]).norm()
    values = []
    for step in (1, -2):  # to +h, then to -h
        with torch.no_grad():
            for parameter in with_gradient:
                parameter += step * 1e-3 * parameter.grad / norm
        values.append(penalty(model, traces, kind).item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(norm), rel=0.02)


@pytest.mark.parametrize("head", HEADS)
def test_minimising_the_penalty_brings_norms_to_1_or_0(tiny_model_folder, tokenizer, traces, pairs, head):
    for kind, target in (("wgan", 1.0), ("r1", 0.0)):
        model = build(tiny_model_folder, tokenizer, head).train()

        def norms(model=model, kind=kind):
            chosen = pairs if kind == "wgan" else [(e, e) for e, _ in pairs]
            return gradient_norms(model, *interpolate(model, chosen, POINTS[:5])).detach()

        before = (norms() - target).abs()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(15):
            optimizer.zero_grad()
            penalty(model, traces, kind).backward()
            optimizer.step()
        after = (norms() - target).abs()
        assert float(after.mean()) < 0.6 * float(before.mean())
