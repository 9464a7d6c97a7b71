"""Discriminator batches of random demonstrations, rollouts and settings; perturbed copies by brute force."""

import copy
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracereward.data.perturbations import KINDS, Perturbed, perturb
from tracereward.modeling.steps import LINES, StepRule
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.training import discriminator_batch as module
from tracereward.training.discriminator import held_out_demonstrations
from tracereward.training.discriminator_batch import (
    Expert,
    Labelled,
    ReplayBuffer,
    Rollout,
    draw,
)
from tracereward.training.options import ExampleOptions
from tracereward.training.perturbed_pairs import MONITORED, perturbed_pairs

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=4)  # few, so that rollouts often equal the expert
WHERE = ("rollouts", "both", "none")


def filled(rollouts, size=1000) -> ReplayBuffer:
    replay = ReplayBuffer(size)
    replay.add(rollouts)
    return replay


def examples(prompts, rollouts, replay_share, perturbed, first_difference) -> ExampleOptions:
    return ExampleOptions(
        discriminator_prompts=prompts,
        discriminator_rollouts=rollouts,
        replay_share=replay_share,
        perturbed_per_expert=perturbed,
        first_difference=first_difference,
    )


def labelled(completion, is_expert, starts, switch, is_perturbed=False) -> Labelled:
    return Labelled(
        prompt=[9],
        completion=completion,
        group=0,
        is_expert=is_expert,
        starts=starts,
        switch=switch,
        is_perturbed=is_perturbed,
    )


def leaves_at(completion, expert) -> int:
    """Index of the first token that differs from the expert, by counting equal prefixes."""
    shared = [k for k in range(min(len(completion), len(expert)) + 1) if completion[:k] == expert[:k]]
    return shared[-1]


@st.composite
def worlds(draw_):
    """Experts whose prompt is their index, fresh and old rollouts of them, batch settings, a seed."""
    experts = [Expert([100 + i], draw_(IDS)) for i in range(draw_(st.integers(1, 5)))]
    rollout = st.builds(Rollout, st.integers(0, len(experts) - 1), IDS, st.booleans())
    options = examples(
        draw_(st.integers(1, 6)),
        draw_(st.integers(1, 3)),
        draw_(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        draw_(st.integers(0, 2)),
        draw_(st.sampled_from(WHERE)),
    )
    fresh, old = (draw_(st.lists(rollout, max_size=8)) for _ in range(2))
    return experts, fresh, old, options, draw_(st.integers(0, 99))


def marked_copy(expert: Expert, rng: random.Random):
    """A perturbation that encodes its demonstration's index, and sometimes does not apply."""
    if rng.random() < 0.3:
        return None
    switch = rng.randrange(len(expert.completion))
    return [*expert.completion[:switch], expert.prompt[0] + 100], switch


@given(worlds())
def test_traces_are_batched_with_their_own_prompts_expert(world):
    experts, fresh, old, options, seed = world
    before = copy.deepcopy((experts, fresh, old))
    replay = filled(old)
    traces, shares = draw(experts, fresh, replay, options, rng=random.Random(seed), perturbed=marked_copy)
    assert (experts, fresh, replay.rollouts) == before  # inputs are not modified
    assert draw(experts, fresh, replay, options, rng=random.Random(seed), perturbed=marked_copy) == (traces, shares)

    # One block for each demonstration: expert, positive rollouts, other rollouts, perturbed copies.
    blocks: list[list[Labelled]] = []
    for trace in traces:
        if blocks and blocks[-1][0].group == trace.group:
            blocks[-1].append(trace)
        else:
            blocks.append([trace])
    groups = [block[0].group for block in blocks]
    assert len(set(groups)) == len(groups)
    assert len(groups) <= options.discriminator_prompts
    assert set(groups) <= {r.demonstration for r in [*fresh, *old]}
    for expert_trace, *others in blocks:
        group = expert_trace.group
        expert = experts[group]
        assert expert_trace.completion == expert.completion
        assert (expert_trace.is_expert, expert_trace.is_perturbed) == (True, False)
        assert expert_trace.switch == len(expert.completion)
        assert [t.prompt for t in (expert_trace, *others)] == [[100 + group]] * (1 + len(others))
        kinds = [0 if t.is_expert else 1 + t.is_perturbed for t in others]
        assert kinds == sorted(kinds)
        sources = [[(r.ids, r.label) for r in rollouts if r.demonstration == group] for rollouts in (fresh, old)]
        rollouts = [t for t in others if not t.is_perturbed]
        assert len(rollouts) <= options.discriminator_rollouts
        assert any(all((t.completion, t.is_expert) in source for t in rollouts) for source in sources)
        for trace in others:
            if trace.is_perturbed:
                assert not trace.is_expert
                assert trace.completion[-1] == 200 + group
                assert trace.switch == len(trace.completion) - 1
                assert trace.completion[: trace.switch] == expert.completion[: trace.switch]
                assert trace.starts == [0 if options.first_difference == "none" else trace.switch]
            else:
                assert trace.completion != expert.completion
                assert trace.switch == (len(trace.completion) if trace.is_expert else 0)
                late = options.first_difference != "none" and not trace.is_expert
                assert trace.starts == [leaves_at(trace.completion, expert.completion) if late else 0]
        negatives = [t for t in others if not t.is_expert]
        if not negatives:
            assert others == []  # a positive rollout has no negative either
            assert expert_trace.starts == []
            assert not expert_trace.counts
        elif options.first_difference == "both":
            assert expert_trace.starts == [t.starts[0] for t in negatives]
        else:
            assert set(expert_trace.starts) == {0}
    requested = options.perturbed_per_expert * len(blocks)
    assert ("perturbed_missing_share" in shares) == (options.perturbed_per_expert > 0)
    if requested:
        made = sum(t.is_perturbed for t in traces)
        assert shares["perturbed_missing_share"] == pytest.approx((requested - made) / requested)


# ---------- shares ----------


@given(worlds())
def test_shares_count_the_chosen_rollouts(world):
    """All demonstrations and rollouts are chosen, so the shares are those of the lists."""
    experts, fresh, _, options, seed = world
    options = examples(99, 99, 0.0, 0, options.first_difference)
    _, shares = draw(experts, fresh, filled([]), options, rng=random.Random(seed))
    same = [r.ids == experts[r.demonstration].completion for r in fresh]
    assert shares["identical_share"] == pytest.approx(sum(same) / len(fresh) if fresh else 0.0)
    right = sum(r.label and not s for r, s in zip(fresh, same))
    assert ("positive_share" in shares) == (right > 0)
    if right:
        assert shares["positive_share"] == pytest.approx(right / len(fresh))
    assert "perturbed_missing_share" not in shares


def test_batch_by_hand():
    """Two of six are identical; the labelled one is a positive; labels, starts and order."""
    expert = Expert([9], [1, 2, 3, 4])
    rollouts = [[1, 2, 3, 4], [1, 2, 0], [1, 2, 3, 4], [5], [1, 2, 3], [1, 7, 7]]
    fresh = [Rollout(0, ids, ids[-1] == 7) for ids in rollouts]
    for where, starts in (("none", [0, 0, 0]), ("rollouts", [2, 0, 3]), ("both", [2, 0, 3])):
        options = examples(1, 6, 0.0, 1, where)
        traces, shares = draw(
            [expert], fresh, filled([]), options, rng=random.Random(0), perturbed=lambda expert, rng: ([1, 2, 3, 0], 3)
        )
        assert shares == {"identical_share": 2 / 6, "positive_share": 1 / 6, "perturbed_missing_share": 0.0}
        first, positive, *negatives, changed = traces
        assert positive == labelled([1, 7, 7], True, [0], 3)
        assert sorted((t.completion, t.starts, t.switch) for t in negatives) == sorted(
            (ids, [start], 0) for ids, start in zip([[1, 2, 0], [5], [1, 2, 3]], starts)
        )
        start = 0 if where == "none" else 3
        assert changed == labelled([1, 2, 3, 0], False, [start], 3, is_perturbed=True)
        assert sorted(first.starts) == (sorted([*starts, 3]) if where == "both" else [0])
        assert first == labelled([1, 2, 3, 4], True, first.starts, 4)


def test_trace_counts_if_any_token_has_a_weight():
    assert labelled([2, 3], False, [1], 0).counts
    assert not labelled([2, 3], False, [2], 0).counts  # a truncated expert prefix
    assert labelled([2, 3], True, [2, 1], 2).counts
    assert not labelled([2, 3], True, [], 2).counts


def test_positive_rollouts_are_dropped_without_a_negative():
    """They still count in the share, which is of the sampled rollouts."""
    experts = [Expert([8], [1, 2]), Expert([9], [3, 4])]
    fresh = [Rollout(0, [1, 5], True), Rollout(0, [1, 2], True), Rollout(1, [3, 5], True), Rollout(1, [3, 6])]
    traces, shares = draw(experts, fresh, filled([]), examples(2, 2, 0.0, 0, "both"), rng=random.Random(0))
    by_group = {g: [(t.completion, t.is_expert) for t in traces if t.group == g] for g in (0, 1)}
    assert by_group[0] == [([1, 2], True)]
    assert by_group[1] == [([3, 4], True), ([3, 5], True), ([3, 6], False)]
    assert shares == {"identical_share": 0.25, "positive_share": 0.5}


# ---------- replay ----------


@pytest.mark.parametrize(("share", "new"), [(0.0, 8), (0.25, 6), (0.5, 4), (1.0, 0)])
def test_replay_share_is_a_share_of_demonstrations(share, new):
    experts = [Expert([i], [1]) for i in range(12)]
    replay = filled(Rollout(i, [20]) for i in range(12))
    fresh = [Rollout(i, [21]) for i in range(12)]
    chosen = set()
    for seed in range(20):
        traces, _ = draw(experts, fresh, replay, examples(8, 1, share, 0, "none"), rng=random.Random(seed))
        rollouts = [t for t in traces if not t.is_expert]
        assert len({t.group for t in rollouts}) == len(rollouts) == 8
        assert sum(t.completion == [21] for t in rollouts) == new
        chosen |= {t.group for t in rollouts}
    assert chosen == set(range(12))


def test_replay_fills_up_batches_with_few_fresh_rollouts():
    experts = [Expert([i], [1]) for i in range(9)]
    replay = filled(Rollout(i, [20]) for i in range(5))
    fresh = [Rollout(8, [21])]
    traces, _ = draw(experts, fresh, replay, examples(4, 1, 0.1, 0, "none"), rng=random.Random(0))
    chosen = [(t.group, t.completion) for t in traces if not t.is_expert]
    assert len(chosen) == 4
    assert chosen[0] == (8, [21])
    assert all(completion == [20] and group < 5 for group, completion in chosen[1:])
    assert draw(experts, [], filled([]), examples(4, 1, 0.5, 0, "none"), rng=random.Random(0)) == (
        [],
        {"identical_share": 0.0},
    )


def test_zero_replay_share_never_replays_alongside_fresh_rollouts():
    """Where few prompts of a batch have a demonstration, filling up would turn "no replay" into mostly replay."""
    experts = [Expert([i], [1]) for i in range(9)]
    replay = filled(Rollout(i, [20]) for i in range(5))
    fresh = [Rollout(8, [21]), Rollout(3, [21])]
    traces, _ = draw(experts, fresh, replay, examples(4, 1, 0.0, 0, "none"), rng=random.Random(0))
    assert sorted((t.group, t.completion[0]) for t in traces if not t.is_expert) == [(3, 21), (8, 21)]
    warm_up, _ = draw(experts, [], replay, examples(4, 1, 0.0, 0, "none"), rng=random.Random(0))
    assert len({t.group for t in warm_up}) == 4


def test_replay_buffer_keeps_the_newest_and_restores_its_state():
    replay = ReplayBuffer(3)
    replay.add([Rollout(0, [1]), Rollout(1, [2], True)])
    replay.add([Rollout(1, [3]), Rollout(2, [4])])
    assert replay.rollouts == [Rollout(1, [2], True), Rollout(1, [3]), Rollout(2, [4])]
    assert replay.by_demonstration() == {1: [Rollout(1, [2], True), Rollout(1, [3])], 2: [Rollout(2, [4])]}
    state = replay.state()
    assert state == [(1, [2], True, 1.0), (1, [3], False, 1.0), (2, [4], False, 1.0)]
    other = ReplayBuffer(3)
    other.load([(1, [2], True), (1, [3], False), (2, [4], False)])  # as runs before weights saved it
    assert other.rollouts == replay.rollouts
    other.load(state)
    assert other.rollouts == replay.rollouts
    replay.add([Rollout(3, [int("70000"), int("70000")])])
    assert len({id(token) for token in replay.rollouts[-1].ids}) == 1  # equal ids are one object
    replay.load(state)
    other.rollouts[0].ids.append(5)  # a copy
    assert replay.rollouts[0].ids == [2]


# ---------- several demonstrations of a prompt ----------

PROMPT, ONE, OTHER = [1, 2, 3], [10, 11, 12, 9], [10, 13, 14, 9]


def test_rollout_that_equals_any_expert_of_its_prompt_has_no_label():
    """Fresh or replayed, under either demonstration; other prompts' experts do not count."""
    experts = [Expert(PROMPT, ONE), Expert(PROMPT, OTHER), Expert([4], [7, 9])]
    rollouts = [Rollout(i, ids) for i in range(3) for ids in (ONE, OTHER, [7, 9])]
    for fresh, replay in ((rollouts, filled([])), ([], filled(rollouts))):
        share = float(not fresh)
        options = examples(3, 9, share, 0, "rollouts")
        traces, shares = draw(experts, fresh, replay, options, rng=random.Random(0))
        negatives = sorted((t.group, t.completion) for t in traces if not t.is_expert)
        assert negatives == [(0, [7, 9]), (1, [7, 9]), (2, ONE), (2, OTHER)]
        assert shares["identical_share"] == pytest.approx(5 / 9)
    traces, _ = draw(
        experts, [Rollout(0, OTHER, True)], filled([]), examples(1, 1, 0.0, 0, "none"), rng=random.Random(0)
    )
    assert not any(t.counts for t in traces)


@pytest.mark.parametrize("where", WHERE)
def test_tokens_shared_with_any_expert_of_the_prompt_are_shared(where):
    """The rollout follows the other expert for two tokens more; the first expert is left at token 1."""
    experts, rollout = [Expert(PROMPT, ONE), Expert(PROMPT, OTHER)], [10, 13, 14, 15, 9]
    traces, _ = draw(experts, [Rollout(0, rollout)], filled([]), examples(1, 1, 0.0, 0, where), rng=random.Random(0))
    assert [t.completion for t in traces] == [ONE, rollout]
    assert traces[1].starts == [0 if where == "none" else 3]
    assert traces[0].starts == [1 if where == "both" else 0]


def test_perturbed_copy_has_the_experts_label_as_long_as_it_follows_any_expert():
    """It leaves the first expert at token 1 and the other at token 3."""
    experts, copy_ = [Expert(PROMPT, ONE), Expert(PROMPT, OTHER)], [10, 13, 14, 15, 9]
    options = examples(1, 1, 0.0, 1, "both")
    traces, _ = draw(
        experts, [Rollout(0, [8])], filled([]), options, rng=random.Random(0), perturbed=lambda expert, rng: (copy_, 1)
    )
    (found,) = [trace for trace in traces if trace.is_perturbed]
    assert (found.switch, found.starts) == (3, [3])
    assert traces[0].starts == [0, 1]


def test_pairs_of_the_monitor_hold_no_other_expert():
    experts = [Expert(PROMPT, ONE), Expert(PROMPT, OTHER)]
    assert perturbed_pairs(experts, [0], lambda expert, rng: (OTHER, 1), seed=0) == []
    assert perturbed_pairs(experts, [0], lambda expert, rng: ([8], 0), seed=0)[0] == (PROMPT, ONE, [8])


def test_perturbed_copy_that_equals_another_expert_is_no_negative():
    experts = [Expert(PROMPT, ONE), Expert(PROMPT, OTHER)]
    options = examples(1, 1, 0.0, 2, "rollouts")
    traces, shares = draw(
        experts, [Rollout(0, [8])], filled([]), options, rng=random.Random(0), perturbed=lambda *_: (OTHER, 1)
    )
    assert [t.completion for t in traces] == [ONE, [8]]
    assert shares["perturbed_missing_share"] == 1.0


@given(prompts=st.lists(st.integers(0, 4), min_size=1, max_size=12), fraction=st.floats(0, 0.9), seed=st.integers(0, 9))
def test_held_out_demonstrations_share_no_prompt_with_the_others(prompts, fraction, seed):
    experts = [Expert([prompt], [i]) for i, prompt in enumerate(prompts)]
    held = set(held_out_demonstrations(experts, fraction, seed))
    inside, outside = ({prompts[i] for i in range(len(prompts)) if (i in held) is side} for side in (True, False))
    assert outside
    assert not inside & outside
    assert len(inside) == min(round(fraction * len(set(prompts))), len(set(prompts)) - 1)


# ---------- perturbed copies ----------


def test_labels_switch_at_the_first_token_that_the_expert_did_not_write():
    """ "×" is one token, "÷" its two bytes: the first of them has no character of its own."""
    bytes_of = {c: pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in "×÷"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, bytes_of["×"], "<eos>"])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(bytes_of["×"])]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    text = "6 × 2 = 12"
    expert = Expert([1], encode_completion(tokenizer, text), text)
    assert len(expert.completion) == len(text) + 1
    perturbed = module.perturber(tokenizer, LINES, ["operator"])
    for seed in range(20):
        found = perturbed(expert, random.Random(seed))
        assert found is not None
        ids, switch = found
        if "÷" in tokenizer.decode(ids):
            break
    assert tokenizer.convert_ids_to_tokens(ids)[2:4] == list(bytes_of["÷"])
    assert switch == 2


@pytest.fixture(scope="module")
def demonstrations(tokenizer, experts):
    return [
        Expert(
            encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"]), row["completion"]
        )
        for row in experts
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_switch_at_the_first_token_with_a_changed_character(tokenizer, demonstrations, kind):
    """Found by decoding ever longer prefixes until one is not a prefix of the expert's text."""
    changes = module.perturber(tokenizer, LINES, [kind])
    found = 0
    for index, expert in enumerate(demonstrations):
        for seed in range(6):
            text = perturb(expert.text, random.Random(seed), [kind]).text
            ids, switch = changes(expert, random.Random(seed))
            assert ids == encode_completion(tokenizer, text)
            assert ids != expert.completion
            assert ids[:switch] == expert.completion[:switch]
            assert ids[switch] != expert.completion[switch], (index, text)
            beginnings = [tokenizer.decode(ids[: k + 1], skip_special_tokens=True) for k in range(len(ids))]
            if beginnings[-1] != text:  # a number over 40 is an unknown token: only its position is known
                assert tokenizer.unk_token_id in ids
                continue
            found += 1
            assert switch == next(k for k, text in enumerate(beginnings) if not expert.text.startswith(text))
    assert found > 10


def test_labels_of_a_shortened_text_switch_at_its_end_of_sequence(tokenizer, monkeypatch):
    expert = Expert([1], encode_completion(tokenizer, "1 + 2 = 3\n#### 3"), "1 + 2 = 3\n#### 3")
    monkeypatch.setattr(module, "perturb", lambda *_: Perturbed("1 + 2 = 3", "drop_step", 9))
    ids, switch = module.perturber(tokenizer, LINES)(expert, random.Random(0))
    assert ids == encode_completion(tokenizer, "1 + 2 = 3")
    assert switch == 5 == len(ids) - 1


def test_perturber_forwards_kinds_and_delimiter(tokenizer, demonstrations, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "perturb", lambda *arguments: seen.append(arguments))
    rng = random.Random(0)
    assert module.perturber(tokenizer, StepRule(". "), ["operator"])(demonstrations[0], rng) is None
    assert seen == [(demonstrations[0].text, rng, ["operator"], StepRule(". "))]


@pytest.mark.parametrize("same", [None, "the text", "another text of the same tokens"])
def test_inapplicable_perturbations_are_counted_and_dropped(tokenizer, demonstrations, monkeypatch, same):
    """Two unknown numbers map to one token: texts differ, ids do not."""
    expert = Expert([1], encode_completion(tokenizer, "1 + 55 = 56"), "1 + 55 = 56")
    results = {
        None: None,
        "the text": Perturbed(expert.text, "number", 0),
        "another text of the same tokens": Perturbed("1 + 57 = 56", "number", 4),
    }
    monkeypatch.setattr(module, "perturb", lambda *_: results[same])
    changes = module.perturber(tokenizer, LINES)
    fresh = [Rollout(0, [5])]
    traces, shares = draw(
        [expert], fresh, filled([]), examples(1, 1, 0.0, 3, "both"), rng=random.Random(0), perturbed=changes
    )
    assert shares["perturbed_missing_share"] == 1.0
    assert [t.completion for t in traces] == [expert.completion, [5]]
    # Without rollouts, the expert has no negative.
    traces, _ = draw(
        [expert],
        [Rollout(0, expert.completion)],
        filled([]),
        examples(1, 1, 0.0, 3, "none"),
        rng=random.Random(0),
        perturbed=changes,
    )
    assert not any(t.counts for t in traces)
    assert perturbed_pairs([expert], [], changes, 0) == []


def test_without_perturber_all_copies_are_missing():
    _, shares = draw(
        [Expert([1], [2])], [Rollout(0, [3])], filled([]), examples(1, 1, 0.0, 2, "none"), rng=random.Random(0)
    )
    assert shares["perturbed_missing_share"] == 1.0


def test_perturbed_copies_carry_both_labels(tokenizer, demonstrations):
    fresh = [Rollout(i, [20, 21]) for i in range(len(demonstrations))]
    traces, shares = draw(
        demonstrations,
        fresh,
        filled([]),
        examples(12, 1, 0.0, 2, "rollouts"),
        rng=random.Random(0),
        perturbed=module.perturber(tokenizer, LINES),
    )
    copies = [t for t in traces if t.is_perturbed]
    assert shares["perturbed_missing_share"] == 0.0
    assert len(copies) == 24
    assert len({tuple(t.completion) for t in copies}) > 12  # each copy is sampled anew
    for t in copies:
        expert = demonstrations[t.group].completion
        assert t.prompt == demonstrations[t.group].prompt
        assert t.completion != expert
        assert t.switch == leaves_at(t.completion, expert)
        assert t.starts == [t.switch]
    assert any(t.switch > 0 for t in copies)


# ---------- the monitor's pairs ----------


def numbered(expert: Expert, rng: random.Random):
    return [*expert.completion, rng.randrange(1000)], 0


@pytest.mark.parametrize(
    ("demonstrations_", "each"), [(1, 8), (8, 8), (9, 7), (32, 2), (33, 1), (64, 1), (MONITORED + 36, 1)]
)
def test_pairs_cycle_through_the_demonstrations(demonstrations_, each):
    """At most 64 demonstrations; up to 8 copies each if there are few."""
    experts = [Expert([100 + i], [i]) for i in range(demonstrations_)]
    pairs = perturbed_pairs(experts, [], numbered, seed=3)
    assert len(pairs) == min(demonstrations_, 64) * each
    assert len({tuple(prompt) for prompt, _, _ in pairs}) == min(demonstrations_, 64)
    for prompt, completion, changed in pairs:
        assert completion == [prompt[0] - 100]
        assert changed[:-1] == completion
    assert perturbed_pairs(experts, [], numbered, seed=3) == pairs
    assert perturbed_pairs(experts, [], numbered, seed=4) != pairs


def test_pairs_use_held_out_demonstrations_if_any():
    experts = [Expert([100 + i], [i]) for i in range(20)]
    pairs = perturbed_pairs(experts, [3, 7], numbered, seed=0)
    assert sorted({prompt[0] for prompt, _, _ in pairs}) == [103, 107]
    assert len(pairs) == 16
    everywhere = perturbed_pairs(experts, [], numbered, seed=0)
    assert {prompt[0] for prompt, _, _ in everywhere} == set(range(100, 120))


def test_pairs_skip_inapplicable_perturbations():
    experts = [Expert([100 + i], [i]) for i in range(4)]
    pairs = perturbed_pairs(experts, [], lambda e, rng: None if e.completion == [2] else ([9], 0), seed=0)
    assert len(pairs) == 24
    assert {completion[0] for _, completion, _ in pairs} == {0, 1, 3}


@pytest.mark.parametrize(("paired", "alone", "chosen"), [(8, 0, 0), (8, 2, 1), (8, 8, 4), (8, 20, 4), (2, 1, 1)])
def test_prompts_without_a_demonstration_are_drawn_at_the_rate_of_the_others(paired, alone, chosen):
    """Four demonstrations an update: half of eight, so half of two; never more than four."""
    experts = [Expert([n], [50 + n], "text") for n in range(paired)] + [Expert([20 + n], []) for n in range(alone)]
    replay = filled([Rollout(index, [90]) for index in range(paired + alone)])
    settings = examples(4, 1, 0.5, 1, "both")
    traces, shares = draw(experts, [], replay, settings, rng=random.Random(0), perturbed=lambda expert, rng: ([7], 0))
    groups = [trace.group for trace in traces]
    with_expert = {trace.group for trace in traces if trace.is_expert}
    assert len(with_expert) == min(4, paired)
    assert sorted(groups) == sorted([*with_expert] * 3 + [group for group in set(groups) - with_expert])
    extra = [trace for trace in traces if trace.group not in with_expert]
    assert len(extra) == chosen
    assert all(trace.completion == [90] and trace.starts == [0] and trace.counts for trace in extra)
    assert shares["perturbed_missing_share"] == 0
