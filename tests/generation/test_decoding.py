"""Guided decoding against loops without a cache, and against enumeration.

The policy is a Llama over four words and an end of sequence; the reward model is a table, so the best trace is known.
"""

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from helpers.scripted_policy import END, EOS, PAD, WORDS, A, B, C, Scripted, never_pads, policy, word_tokenizer, words  # noqa: F401
from tracereward.errors import InputError
from tracereward.generation.continuation import OpenTrace, choose_token, extend, first_step, uniform
from tracereward.generation.decoding import beam, reject, tilt, tilted
from tracereward.generation.guide import Guide, digest
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import generate
from tracereward.generation.self_correction import self_correct
from tracereward.modeling.log_probs import log_probs
from tracereward.modeling.steps import LINES, StepRule
from tracereward.rewards.first_error_rules import LevelRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model

DRAWABLE = [EOS, END, A, B, C]
PROMPTS = ["ab", "c", "bca\n", "ab", "aaaaa"]


def table(context: list[int]) -> float:
    """A pseudo-random reward in [-1, 1], different for every text."""
    return random.Random(str(context)).uniform(-1, 1)


def reward_of(guide: Guide, prompt: list[int], trace: Sequence[int]) -> float:
    values = [guide.scorer.value([*prompt, *trace[: t + 1]]) for t in range(len(trace))]  # pyright: ignore[reportAttributeAccessIssue]
    how = guide.scorer.settings.aggregate
    return {"mean": sum(values) / len(values), "min": min(values), "last": values[-1]}[how]


@pytest.fixture
def counted(policy, monkeypatch):
    """Number of tokens sampled in each call of `generate`: its output without padding."""
    total = []
    original = policy.generate

    def generate(input_ids, **kwargs):
        output = original(input_ids=input_ids, **kwargs)
        total.append(int((output[:, input_ids.size(1) :] != PAD).sum()))
        return output

    monkeypatch.setattr(policy, "generate", generate)
    return total


@torch.no_grad()
def next_log_probs(policy, context: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """log p of each word in float64, from one pass over the full text; the padding token is excluded."""
    logits = policy(input_ids=torch.tensor([context])).logits[0, -1].double().numpy() / temperature
    logits[PAD] = -np.inf
    return logits - np.logaddexp.reduce(logits)


def sample_token(probabilities: np.ndarray, number: float) -> int:
    return int(np.searchsorted(np.cumsum(probabilities), number, side="right"))


def loop(policy, start: OpenTrace, *, temperature=1.0, step=False) -> list[int]:
    """Continue a trace to its limit, or to the end of its step: a newline that follows a word."""
    trace, new = list(start.trace), []
    while len(new) < start.limit:
        log_probs = next_log_probs(policy, [*start.prompt, *trace], temperature or 1.0)
        token = (
            sample_token(np.exp(log_probs), uniform(start.stream, len(trace)))
            if temperature
            else int(log_probs.argmax())
        )
        trace.append(token)
        new.append(token)
        if token == EOS or (step and token == END and set(new) != {END}):
            break
    return trace


def make(policy, words, value=table, aggregate="mean", step_tokens=256, **changed) -> Guide:
    sampling = SamplingParams(**{"max_new_tokens": 6, "seed": 5, **changed})
    return Guide(policy, words, Scripted(words, value, aggregate), sampling, step_tokens=step_tokens)


def ids_of(words, texts: Sequence[str]) -> list[list[int]]:
    return [[WORDS.index(character) for character in text] for text in texts]


# ---------- continuations ----------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("step", [False, True])
def test_continuations_match_a_loop_over_the_full_text(policy, words, temperature, step, counted):
    """Prompts and traces of different lengths in batches of three, each with its own limit."""
    rng = random.Random(1)
    prompts = [rng.choices([END, A, B, C], k=rng.randint(1, 6)) for _ in range(40)]
    traces = [rng.choices([END, A, B, C], k=rng.randint(0, 4)) for _ in range(40)]
    streams = [f"row {row}" for row in range(40)]
    limits = [rng.randint(1, 7) for _ in range(40)]
    rows = list(map(OpenTrace, prompts, traces, streams, limits))
    found = extend(policy, words, rows, rule=LINES if step else None, temperature=temperature, batch_size=3)
    for row, added in enumerate(found):
        expected = loop(policy, rows[row], temperature=temperature, step=step)
        assert [*traces[row], *added.ids] == expected
        assert added.count == len(added.ids)
    assert sum(added.count for added in found) == sum(counted)
    ends = {added.ids[-1] for added in found}
    assert ends >= ({EOS, END} if step else {EOS}) or not temperature


def test_nucleus_sampling_keeps_the_most_probable_words(policy, words):
    found = extend(policy, words, [OpenTrace([A, B], [], str(i), 1) for i in range(60)], top_p=0.6)
    order = sorted(DRAWABLE, key=lambda word: -next_log_probs(policy, [A, B])[word])
    sums = list(itertools.accumulate(math.exp(next_log_probs(policy, [A, B])[word]) for word in order))
    nucleus = order[: 1 + sum(value < 0.6 for value in sums)]
    assert {added.ids[0] for added in found} == set(nucleus)
    assert 1 < len(nucleus) < 5


@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    number=st.floats(0, 1, exclude_max=True, allow_subnormal=False),
)
def test_choose_token_inverts_the_cumulative_distribution(weights, number):
    logits = torch.tensor(weights, dtype=torch.float32).log()
    token = choose_token(logits, number)
    low, high = sum(weights[:token]) / sum(weights), sum(weights[: token + 1]) / sum(weights)
    assert weights[token] > 0
    assert low - 1e-6 <= number <= high + 1e-6


def test_first_step_boundaries():
    """In "x. x" the space is part of the next word's token, so only that token shows the end of the step."""
    dots = word_tokenizer(["<pad>", "<eos>", "x", ".", " x", "5"], r" x|[x.5]")
    x, dot, space_x, five = 2, 3, 4, 5
    assert first_step(dots, [x, dot], StepRule(". ")) is None
    assert first_step(dots, [x, dot, space_x], StepRule(". ")) == 2
    assert first_step(dots, [x, dot, five, dot, space_x, dot, space_x], StepRule(". ")) == 4
    assert first_step(dots, [dot, space_x, dot, space_x], StepRule(". ")) == 3  # steps are never blank
    lines = word_tokenizer(WORDS, r"[abc\n]")
    assert first_step(lines, [A, B], StepRule("\n")) is None
    assert first_step(lines, [A, END, B, END], StepRule("\n")) == 2
    assert first_step(lines, [END, END, A, END], StepRule("\n")) == 4
    assert first_step(lines, [END, END], StepRule("\n")) is None
    assert first_step(lines, [A, EOS], StepRule("\n")) is None


def test_token_after_the_step_is_counted_but_not_kept():
    dots = word_tokenizer(["<pad>", "<eos>", "x", ".", " x", "5"], r" x|[x.5]")
    model = build_model(dots, seed=1, hidden_size=16, layers=1, heads=2).eval()
    never_pads(model)
    rows = [OpenTrace([2], [], str(i), 9) for i in range(99)]
    found, complete = extend(model, dots, rows, rule=StepRule(". ")), extend(model, dots, rows)
    short = 0
    for part, trace in zip(found, complete, strict=True):
        ids, end = trace.ids, len(trace.ids)
        ends = [
            i for i in range(end - 1) if ids[i : i + 2] == [3, 4] and set(ids[:i]) - {3}
        ]  # "." then " x", not blank
        kept = ends[0] + 1 if ends else end
        short += kept < end
        assert (part.ids, part.count) == (ids[:kept], kept + 1 if ends else end)
    assert short > 5


# ---------- all methods ----------

METHODS = {
    "beam": lambda guide, prompts: beam(guide, prompts, width=2, expansions=2, lookahead=1),
    "reject": lambda guide, prompts: reject(guide, prompts, n=5, keep=2),
    "tilt": lambda guide, prompts: tilt(guide, prompts, n=2, alpha=2.0, top_k=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_batch(policy, words, method, counted):
    run = METHODS[method]
    together = run(make(policy, words), PROMPTS)
    assert sum(counted) == sum(found[0].sampled_tokens for found in together)
    for index, prompt in enumerate(PROMPTS):
        alone = run(make(policy, words, batch_size=2), [prompt])[0]
        assert [trace.ids for trace in alone] == [trace.ids for trace in together[index]]
        assert [trace.sampled_tokens for trace in alone] == [trace.sampled_tokens for trace in together[index]]
        assert [trace.reward for trace in alone] == pytest.approx([trace.reward for trace in together[index]])
    assert [trace.ids for trace in together[0]] == [trace.ids for trace in together[3]]
    other = run(make(policy, words, seed=6), PROMPTS)
    assert [[trace.ids for trace in found] for found in other] != [[t.ids for t in found] for found in together]


@pytest.mark.parametrize("method", METHODS)
def test_records_describe_the_samples(policy, words, method):
    guide = make(policy, words)
    for index, found in enumerate(METHODS[method](guide, PROMPTS)):
        (prompt,) = ids_of(words, [PROMPTS[index]])
        assert [trace.reward for trace in found] == sorted((trace.reward for trace in found), reverse=True)
        for trace in found:
            assert trace.prompt == index
            assert trace.text == "".join(WORDS[token] for token in trace.ids if token != EOS)
            assert trace.finished == (trace.ids[-1] == EOS)
            assert trace.finished or len(trace.ids) == 6
            assert trace.reward == pytest.approx(reward_of(guide, prompt, trace.ids), abs=1e-6)


def test_different_tokenizers_are_refused(policy, words, tokenizer):
    with pytest.raises(InputError, match="another tokenizer than the reward model"):
        Guide(policy, words, Scripted(tokenizer, table))


def test_prompt_that_exceeds_the_reward_model_is_refused(policy, words):
    guide = make(policy, words)
    guide.scorer.max_positions = 8  # pyright: ignore[reportAttributeAccessIssue]
    beam(guide, ["ab"], width=1, expansions=1)
    with pytest.raises(InputError, match="prompt 1: 3 prompt tokens and 6 new ones; the reward model reads 8"):
        beam(guide, ["ab", "abc"], width=1, expansions=1)


# ---------- beam ----------


def test_beam_of_one_is_plain_sampling(policy, words):
    guide = make(policy, words, max_new_tokens=12)
    prompts = ["ab", "c", "a\n", "cc", "bb"]
    for prompt, text, found in zip(
        ids_of(words, prompts), prompts, beam(guide, prompts, width=1, expansions=1), strict=True
    ):
        trace, step = [], 0
        while len(trace) < 12 and trace[-1:] != [EOS]:
            trace = loop(policy, OpenTrace(prompt, trace, f"5 {digest(prompt)} {step} 0", 12 - len(trace)), step=True)
            step += 1
        assert [record.ids for record in found] == [trace], text
        assert found[0].sampled_tokens == len(trace)


def all_traces(length: int) -> list[tuple[int, ...]]:
    """All traces that end by themselves, or at `length`."""
    found = [trace for n in range(length) for trace in itertools.product(DRAWABLE[1:], repeat=n)]
    ended = [(*trace, EOS) for trace in found]
    return ended + list(itertools.product(DRAWABLE[1:], repeat=length))


@pytest.mark.parametrize("aggregate", ["mean", "min", "last"])
def test_wide_beam_finds_the_best_trace(words, aggregate):
    """Steps of one token; 50 samples from a near-uniform policy miss a word with probability 5 * 0.8^50."""
    near_uniform = build_model(words, seed=0, hidden_size=16, layers=1, heads=2)
    never_pads(near_uniform)
    guide = make(near_uniform, words, aggregate=aggregate, max_new_tokens=3, step_tokens=1, batch_size=4000)
    (found,) = beam(guide, ["ab"], width=25, expansions=50)
    order = sorted(all_traces(3), key=lambda trace: -reward_of(guide, [A, B], trace))
    assert tuple(found[0].ids) == order[0]


@pytest.mark.parametrize("lookahead", [0, 2])
def test_narrow_beam_keeps_the_best_prefixes(words, lookahead):
    """The two best extensions of the kept prefixes, by their reward after greedy lookahead, if any."""
    policy = build_model(words, seed=0, hidden_size=16, layers=1, heads=2)
    never_pads(policy)
    guide = make(policy, words, max_new_tokens=4, step_tokens=1, batch_size=4000)
    for text in ("ab", "c"):
        (prompt,) = ids_of(words, [text])

        def ahead(trace, prompt=prompt):
            for _ in range(lookahead):
                if trace[-1] != EOS:
                    trace = loop(policy, OpenTrace(prompt, trace, "", min(1, 4 - len(trace))), temperature=0.0)
            return reward_of(guide, prompt, trace)

        kept = [[]]
        while any(len(trace) < 4 and trace[-1:] != [EOS] for trace in kept):
            children = []
            for trace in kept:
                ended = trace[-1:] == [EOS] or len(trace) == 4
                children += [trace] if ended else [[*trace, word] for word in DRAWABLE]
            kept = sorted(children, key=lambda trace: -ahead(trace))[:2]
        (found,) = beam(guide, [text], width=2, expansions=60, lookahead=lookahead)
        assert sorted(trace.ids for trace in found) == sorted(kept)


def test_distinct_beam_drops_repeated_texts(policy, words):
    greedy = make(policy, words, temperature=0.0)
    (same,) = beam(greedy, ["ab"], width=3, expansions=2, distinct=False)
    (different,) = beam(greedy, ["ab"], width=3, expansions=2)
    expected = loop(policy, OpenTrace([A, B], [], "", 6), temperature=0.0)
    assert [trace.ids for trace in same] == [expected] * 3
    assert [trace.ids for trace in different] == [expected]
    (found,) = beam(make(policy, words), ["ab"], width=4, expansions=8)
    assert len({tuple(trace.ids) for trace in found}) == 4


# ---------- early rejection ----------


def steps_of(trace: Sequence[int]) -> list[list[int]]:
    """Steps of a trace; they end with a newline after a word."""
    steps, step = [], []
    for token in trace:
        step.append(token)
        if token == END and set(step) != {END}:
            steps.append(step)
            step = []
    return [*steps, step] if step else steps


@pytest.mark.parametrize(("n", "keep", "every"), [(8, 1, 1), (5, 2, 1), (6, 1, 2), (3, 3, 1), (1, 1, 1)])
def test_survivors_match_brute_force(policy, words, n, keep, every):
    guide = make(policy, words, max_new_tokens=10)
    prompts = ["ab", "c", "bb\n"]
    found = reject(guide, prompts, n=n, keep=keep, every=every)
    for prompt, survivors in zip(ids_of(words, prompts), found, strict=True):
        full = [loop(policy, OpenTrace(prompt, [], f"5 {digest(prompt)} {i}", 10)) for i in range(n)]
        alive, step, tokens = list(range(n)), 0, 0
        while True:
            tokens += sum(len(steps_of(full[i])[step]) for i in alive if step < len(steps_of(full[i])))
            step += 1
            so_far = {i: list(itertools.chain(*steps_of(full[i])[:step])) for i in alive}
            if step % every == 0:
                alive = sorted(alive, key=lambda i: -reward_of(guide, prompt, so_far[i]))[
                    : max(keep, math.ceil(len(alive) / 2))
                ]
                alive.sort()
            if all(so_far[i] == full[i] for i in alive):
                break
        best = sorted(alive, key=lambda i: -reward_of(guide, prompt, full[i]))[:keep]
        assert [trace.ids for trace in survivors] == [full[i] for i in best]
        assert {trace.sampled_tokens for trace in survivors} == {tokens}


# ---------- tilted sampling ----------


@given(seed=st.integers(0, 10**6), alpha=st.floats(-3, 3), top_k=st.integers(1, 7))
@example_settings(max_examples=60)
def test_tilted_distribution_by_hand(policy, words, seed, alpha, top_k):
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)) * 2
    contexts = [[A, B], [seed % 6]]
    guide = make(policy, words)
    found = tilted(guide, contexts, logits, weight=alpha, top_k=top_k).double().softmax(1).numpy()
    for row, context in enumerate(contexts):
        p = np.exp(logits[row].double().numpy())
        p /= p.sum()
        top = sorted(range(6), key=lambda y: -p[y])[:top_k]
        q = np.array([p[y] * math.exp(alpha * table([*context, y])) if y in top else 0.0 for y in range(6)])
        assert found[row] == pytest.approx(q / q.sum(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tilting_with_zero_weight_is_plain_sampling(policy, words, temperature):
    guide = make(policy, words, temperature=temperature)
    found = tilt(guide, ["ab", "c"], n=5, alpha=0.0, top_k=6)
    for prompt, traces in zip(ids_of(words, ["ab", "c"]), found, strict=True):
        plain = [
            loop(policy, OpenTrace(prompt, [], f"5 {digest(prompt)} {i}", 6), temperature=temperature) for i in range(5)
        ]
        assert sorted(trace.ids for trace in traces) == sorted(plain)
        assert {trace.sampled_tokens for trace in traces} == {sum(map(len, plain))}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_tilted_traces_match_a_loop(policy, words, temperature):
    """q(y) ~ p(y) exp(alpha r(y)) over the three most probable words, p at the temperature; at 0 the argmax."""
    guide = make(policy, words, temperature=temperature)
    n = 40 if temperature else 1
    (found,) = tilt(guide, ["ab"], n=n, alpha=1.5, top_k=3)
    expected = []
    for i in range(n):
        trace: list[int] = []
        while len(trace) < 6 and trace[-1:] != [EOS]:
            log_probs = next_log_probs(policy, [A, B, *trace], temperature or 1.0)
            top = sorted(DRAWABLE, key=lambda y: -log_probs[y])[:3]
            score = np.full(6, -np.inf)
            for y in top:
                score[y] = log_probs[y] + 1.5 * table([A, B, *trace, y])
            q = np.exp(score - np.logaddexp.reduce(score))
            trace.append(
                sample_token(q, uniform(f"5 {digest([A, B])} {i}", len(trace))) if temperature else int(q.argmax())
            )
        expected.append(trace)
    assert sorted(trace.ids for trace in found) == sorted(expected)


@pytest.mark.parametrize("head", ["token", "action", "airl", "implicit"])
@pytest.mark.parametrize("granularity", ["sparse", "step", "interval", "dense"])
def test_next_token_reward_is_that_of_the_trace_ending_with_it(tiny_model_folder, tokenizer, head, granularity):
    settings = RewardSettings(head=head, granularity=granularity, interval=3)
    model = TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer).eval()
    with torch.no_grad():
        if model.head_weight is not None:
            model.head_weight.copy_(torch.linspace(-1, 1, model.head_weight.numel()).view_as(model.head_weight))
    prompt, trace = tokenizer("3 + 4 - 2 = ?\n")["input_ids"], tokenizer("3 + 4 = 7\n7 - 2")["input_ids"]
    logits = torch.zeros(1, len(tokenizer))
    logits[0, [7, 3, 20, 1]] = 1.0
    lm = build_model(tokenizer, seed=9).eval()
    for reference in (None, lm):
        guide = Guide(lm, tokenizer, model, reference=reference)
        found = tilted(guide, [[*prompt, *trace]], logits, weight=1.0, top_k=4)[0] - logits[0]
        for token in (7, 3, 20, 1):
            rewards = model.token_rewards([prompt], [[*trace, token]], reference=reference)[0]
            assert found[token].item() == pytest.approx(rewards[-1].item(), abs=1e-5)
            assert guide.rewards([prompt], [[*trace, token]]) == pytest.approx([rewards.mean().item()], abs=1e-5)
        assert torch.isinf(found).sum() == len(tokenizer) - 4


# ---------- self-correction ----------


def no_b(context: list[int]) -> float:
    return -1.0 if context[-1] == B else 1.0


def test_cuts_before_the_first_suspected_step(policy, words):
    """Step means by hand: "aa\\n" 1, "bab\\n" 0, "bb\\n" -1/3; the first below 0.5 starts at token 3."""
    guide = make(policy, words, no_b, max_new_tokens=14)
    trace = ids_of(words, ["aa\nbab\nbb\n"])[0]
    (found,) = self_correct(guide, [[C]], [trace], rounds=1, k=3, rule=LevelRule(0.5))
    assert found.cuts == [3]
    assert found.ids[:3] == trace[:3]
    stream = f"5 {digest([C])} {digest(trace)} 0"
    sampled = [loop(policy, OpenTrace([C], trace[:3], f"{stream} {i}", 11)) for i in range(3)]
    best = max(sampled, key=lambda ids: reward_of(guide, [C], ids))
    assert found.reward_before == pytest.approx(reward_of(guide, [C], trace))
    assert found.ids == (best if reward_of(guide, [C], best) > found.reward_before else trace)
    assert found.sampled_tokens == sum(len(ids) - 3 for ids in sampled)
    (found,) = self_correct(guide, [[C]], [trace], rounds=1, k=1, rule=LevelRule(-0.1))
    assert found.cuts == [7]


def test_trace_without_a_suspected_step_is_unchanged(policy, words, counted):
    guide = make(policy, words, no_b)
    right = [A, A, END, C, EOS]
    (found,) = self_correct(guide, [[C]], [right], rule=LevelRule(0.0))
    assert (found.ids, found.cuts, found.sampled_tokens, found.finished) == (right, [], 0, True)
    assert found.reward == found.reward_before == 1.0
    assert counted == []


def test_correction_stops_when_no_step_is_suspected(policy, words, counted):
    """Traces without b have reward 1 and are done; the others use all rounds."""
    guide = make(policy, words, no_b, max_new_tokens=8)
    traces = [[B, B, END, B, EOS], [A, END, B, END, B], [B] * 8]
    found = self_correct(guide, [[C]] * 3, traces, rounds=6, k=4, rule=LevelRule(0.99))
    for result in found:
        assert (result.reward == 1.0) or len(result.cuts) == 6
    assert any(result.reward == 1.0 and len(result.cuts) < 6 for result in found)
    assert sum(result.sampled_tokens for result in found) == sum(counted)


def test_cut_at_the_length_limit_samples_nothing(policy, words, counted):
    guide = make(policy, words, no_b, max_new_tokens=3)
    (found,) = self_correct(guide, [[C]], [[A, A, END, B, EOS]], rule=LevelRule(0.0))
    assert (found.ids, found.cuts) == ([A, A, END, B, EOS], [])
    assert counted == []


def test_corrections_match_a_loop_over_rounds(policy, words, counted):
    """60 traces: the best of two continuations replaces the trace only if its reward is higher."""
    guide = make(policy, words, max_new_tokens=8)
    rng = random.Random(4)
    traces = [[*rng.choices([END, A, B, C], k=rng.randint(1, 6)), EOS] for _ in range(60)]
    found = self_correct(guide, [[A, B]] * 60, traces, rounds=3, k=2, rule=LevelRule(0.2))
    assert sum(result.sampled_tokens for result in found) == sum(counted)
    refused = 0
    for given_trace, result in zip(traces, found, strict=True):
        trace, cuts, tokens = given_trace, [], 0
        for number in range(3):
            scores = guide.score([[A, B]], [trace])[0]
            starts = [0, *(token + 1 for token, ends in enumerate(scores.step_ends) if ends)]
            cut = next((start for start, mean in zip(starts, scores.step_rewards()) if mean < 0.2), None)
            if cut is None:
                break
            stream = f"5 {digest([A, B])} {digest(given_trace)} {number}"
            sampled = [loop(policy, OpenTrace([A, B], trace[:cut], f"{stream} {i}", 8 - cut)) for i in range(2)]
            cuts.append(cut)
            tokens += sum(len(ids) - cut for ids in sampled)
            best = max(sampled, key=lambda ids: reward_of(guide, [A, B], ids))
            if reward_of(guide, [A, B], best) > reward_of(guide, [A, B], trace):
                trace = best
            else:
                refused += 1
        assert (result.ids, result.cuts, result.sampled_tokens) == (trace, cuts, tokens)
    assert refused > 10


@given(
    traces=st.lists(st.lists(st.sampled_from([END, A, B, C]), min_size=1, max_size=6), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    threshold=st.sampled_from([-0.3, 0.0, 0.3]),
)
@example_settings(max_examples=25)
def test_self_correction_never_lowers_the_reward(policy, words, traces, seed, threshold):
    guide = make(policy, words, seed=seed, max_new_tokens=8)
    traces = [[*trace, EOS] for trace in traces]
    prompts = [[A, B]] * len(traces)
    found = self_correct(guide, prompts, traces, rounds=2, k=2, rule=LevelRule(threshold))
    for prompt, trace, result in zip(prompts, traces, found, strict=True):
        assert result.reward_before == pytest.approx(reward_of(guide, prompt, trace), abs=1e-6)
        assert result.reward == pytest.approx(reward_of(guide, prompt, result.ids), abs=1e-6)
        assert result.reward >= result.reward_before
        assert (result.ids == trace) == (result.reward == result.reward_before)
        assert result.ids[: min(result.cuts, default=0)] == trace[: min(result.cuts, default=0)]
        assert self_correct(guide, [prompt], [trace], rounds=2, k=2, rule=LevelRule(threshold)) == [result]


def test_reward_model_reads_every_end_as_its_own(policy, words, monkeypatch):
    """A policy with two ends: traces keep the one they have, their rewards and tilts are those of the tokenizer's."""
    guide = Guide(policy, words, Scripted(words, table), SamplingParams(max_new_tokens=4))
    monkeypatch.setattr(policy.generation_config, "eos_token_id", [EOS, C])
    assert guide.finished([A, C])
    expected = (table([A, B]) + table([A, B, EOS])) / 2
    assert guide.rewards([[A]], [[B, C]]) == [pytest.approx(expected)]
    assert guide.results([[A]], [[[B, C]]], [2])[0][0].ids == [B, C]
    logits = torch.zeros(1, len(WORDS))
    changed = tilted(guide, [[A, B]], logits, weight=2.0, top_k=len(WORDS))[0]
    assert changed[C] == pytest.approx(2 * table([A, B, EOS]))
    assert changed[EOS] == changed[C]


def test_prompt_without_tokens_is_refused(policy, words):
    guide = Guide(policy, words, Scripted(words, table), SamplingParams(max_new_tokens=4))
    with pytest.raises(InputError, match="prompt 1: no tokens"):
        beam(guide, ["a", ""])
    with pytest.raises(InputError, match="no tokens"):
        generate(policy, words, ["a", ""], SamplingParams(max_new_tokens=2))
    with pytest.raises(InputError, match="row 1: the prompt has no tokens"):
        log_probs(policy, [[A], []], [[B], [B]], PAD)
