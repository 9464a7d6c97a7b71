"""The surface probe finds and names planted leaks, and reports none without a leak."""

import math
import random
import re

import numpy as np
import pytest

from tracereward.data.surface_probe import (
    LABELS,
    LEAK_BOUND,
    MIN_TRACES,
    Feature,
    Probe,
    TraceText,
    leak_warning,
    probe_model,
    prompt_folds,
    surface_features,
    surface_probe,
    token_features,
)


def text(rng: random.Random) -> str:
    steps = [f"{rng.randint(1, 99)} + {rng.randint(1, 99)} = {rng.randint(1, 99)}" for _ in range(rng.randint(2, 5))]
    return "\n".join([*steps, f"#### {rng.randint(1, 99)}"])


def worlds(prompts: int, rollouts: int = 4, seed: int = 0) -> tuple[list[TraceText], list[TraceText]]:
    """Experts and rollouts from one distribution."""
    rng = random.Random(seed)
    experts = [TraceText(f"p{i}", text(rng), True) for i in range(prompts)]
    return experts, [TraceText(f"p{i}", text(rng), True) for i in range(prompts) for _ in range(rollouts)]


def test_features_by_hand():
    features = surface_features(" \nAb, <<2*3>>  cé\n\tD. 10!\n ", True)
    assert features == {
        "characters": 23,
        "words": 5,
        "lines": 2,
        "digits": 4,
        "punctuation": 8,
        "capitals": 2,
        "non_ascii": 1,
        "calculator_marks": 1,
        "white_space_share": pytest.approx(6 / 23),
        "double_spaces": 1,
        "leading_white_space": 2,
        "trailing_white_space": 2,
        "ends_with_punctuation": 1.0,
        "finished": 1.0,
    }
    assert list(features) == list(LABELS)


def test_features_of_empty_and_blank_texts():
    empty = surface_features("", False)
    assert set(empty.values()) == {0}
    assert surface_features("  \n", False) == {**empty, "trailing_white_space": 3}
    assert surface_features("a   b    c", False)["double_spaces"] == 2
    assert surface_features("a b", False)["ends_with_punctuation"] == 0


@pytest.mark.parametrize(
    ("leak", "name"),
    [
        (lambda trace: TraceText(trace.prompt, trace.text + "\n", True), "trailing_white_space"),
        (lambda trace: TraceText(trace.prompt, " " + trace.text, True), "leading_white_space"),
        (lambda trace: TraceText(trace.prompt, trace.text.replace("=", "= <<>>", 1), True), "calculator_marks"),
        (lambda trace: TraceText(trace.prompt, trace.text.replace("+", " +", 1), True), "double_spaces"),
        (lambda trace: TraceText(trace.prompt, trace.text + ".", True), "ends_with_punctuation"),
    ],
)
def test_planted_leak_is_found_and_named(leak, name):
    experts, rollouts = worlds(40)
    probe = surface_probe([leak(trace) for trace in experts], rollouts)
    assert probe.auroc > 0.99
    assert probe.features[0].name == name
    assert probe.features[0].auroc == 1.0
    assert probe.features[0].coefficient > 0
    assert probe.n == 200
    assert LABELS[name] in leak_warning(probe)


def test_end_token_on_experts_only_is_found_and_named():
    experts, rollouts = worlds(40)
    probe = surface_probe(experts, [TraceText(trace.prompt, trace.text, False) for trace in rollouts])
    assert probe.auroc > 0.99
    assert [feature.name for feature in probe.features] == ["finished"]
    assert leak_warning(probe) == (
        f"surface features alone distinguish experts from rollouts with AUROC {probe.auroc:.2f} "
        "(in experts: share with an end-of-sequence token higher, AUROC 1.00 alone)"
    )


def test_length_difference_is_found_with_its_direction():
    experts, rollouts = worlds(40)
    long = [TraceText(trace.prompt, f"{trace.text}\n{trace.text}", True) for trace in rollouts]
    probe = surface_probe(experts, long)
    assert probe.auroc > 0.9
    lengths = {"characters", "words", "lines", "digits", "punctuation"}
    assert {feature.name for feature in probe.features} & lengths
    assert all(feature.auroc < 0.5 for feature in probe.features if feature.name in lengths)
    assert " lower, " in leak_warning(probe)


def test_equal_distributions_give_a_half():
    """Within four standard errors: sqrt((m + n + 1) / (12 m n)) for m experts and n rollouts."""
    experts, rollouts = worlds(300, rollouts=4, seed=1)
    probe = surface_probe(experts, rollouts)
    assert probe.auroc == pytest.approx(0.5, abs=4 * math.sqrt(1501 / (12 * 300 * 1200)))
    assert leak_warning(probe) is None


def test_no_prompt_is_in_two_folds_and_each_row_is_held_out_once():
    experts, rollouts = worlds(23, rollouts=3)
    prompts = [trace.prompt for trace in experts + rollouts]
    folds = prompt_folds([True] * 23 + [False] * 69, prompts, 5)
    assert len(folds) == 5
    for train, held_out in folds:
        assert not {prompts[row] for row in train} & {prompts[row] for row in held_out}
        assert sorted([*train, *held_out]) == list(range(92))
    assert sorted(row for _, held_out in folds for row in held_out) == list(range(92))


def test_probe_does_not_recognise_prompts():
    """A prompt has one text, and one class: folds that split it would give it away."""
    aurocs = []
    for seed in range(6):
        rng = random.Random(seed)
        texts = [text(rng) + rng.choice(["", ".", "\n", " A", " é"]) * rng.randint(0, 4) for _ in range(12)]
        experts = [TraceText(f"p{i}", texts[i], True) for i in range(0, 12, 2) for _ in range(10)]
        rollouts = [TraceText(f"p{i}", texts[i], True) for i in range(1, 12, 2) for _ in range(10)]
        aurocs.append(surface_probe(experts, rollouts).auroc)
    assert np.mean(aurocs) < 0.65


def test_probe_is_deterministic():
    experts, rollouts = worlds(20, seed=2)
    assert surface_probe(experts, rollouts) == surface_probe(experts, rollouts)


def test_too_few_traces_are_undefined():
    experts, rollouts = worlds(MIN_TRACES, rollouts=1)
    assert not math.isnan(surface_probe(experts, rollouts).auroc)
    for few in [(experts[1:], rollouts), (experts, rollouts[1:]), ([], rollouts), (experts, []), ([], [])]:
        probe = surface_probe(*few)
        assert math.isnan(probe.auroc)
        assert probe.features == ()
        assert probe.n == len(few[0]) + len(few[1])
        assert leak_warning(probe) is None


def test_one_prompt_cannot_be_split():
    experts, rollouts = worlds(20)
    alone = [TraceText("p", trace.text, True) for trace in experts]
    assert math.isnan(surface_probe(alone, rollouts).auroc)
    assert math.isnan(surface_probe(alone, alone).auroc)


def test_two_prompts_can_be_split():
    experts, rollouts = worlds(20)
    pair = [TraceText(f"p{i % 2}", trace.text, True) for i, trace in enumerate(experts)]
    assert not math.isnan(surface_probe(pair, rollouts).auroc)


def test_fold_without_training_experts_is_undefined(monkeypatch):
    experts, rollouts = worlds(20, rollouts=1)
    rows = np.arange(40)
    monkeypatch.setattr(
        "tracereward.data.surface_probe.prompt_folds", lambda *_: [(rows[20:], rows[:20]), (rows[:20], rows[20:])]
    )
    assert math.isnan(surface_probe(experts, rollouts).auroc)


def test_equal_traces_have_no_feature_to_name():
    same = [TraceText(f"p{i}", "1 + 1 = 2", True) for i in range(20)]
    probe = surface_probe(same, same)
    assert probe == Probe(0.5, (), 40)


def test_warning_only_above_the_bound():
    features = (Feature("digits", -0.5, 0.25), Feature("words", 1.0, 0.6))
    assert LEAK_BOUND == 0.7
    assert leak_warning(Probe(0.7, features, 50)) is None
    assert leak_warning(Probe(0.2, features, 50)) is None
    assert leak_warning(Probe(0.7 + 1e-9, features, 50)) == (
        "surface features alone distinguish experts from rollouts with AUROC 0.70 "
        "(in experts: number of digits lower, AUROC 0.25 alone; number of words higher, AUROC 0.60 alone)"
    )


def test_features_above_a_quarter_of_the_largest_coefficient_are_named_three_at_most(monkeypatch):
    experts, rollouts = worlds(20)
    names = list(LABELS)

    def named(*coefficients: float) -> list[str]:
        padded = np.array([*coefficients, *[0.0] * (len(names) - len(coefficients))])
        fitted = type("Fitted", (), {"coef_": padded[None]})
        model = probe_model()
        monkeypatch.setattr(type(model), "named_steps", {"logisticregression": fitted})
        return [feature.name for feature in surface_probe(experts, rollouts).features]

    assert named(1.0, -4.0, 1.01) == [names[1], names[2]]
    assert named(0.9, 4.0, -0.99) == [names[1]]
    assert named(1.0, -2.0, 3.0, 4.0) == [names[3], names[2], names[1]]
    assert named(3.0, -2.0, 2.5, 4.0, 3.5) == [names[3], names[4], names[0]]  # five are above a quarter


def test_coefficients_are_those_of_a_balanced_ridge_regression_on_standardised_features():
    """Newton's method on sum_i w_i log(1 + exp(-y_i f_i)) + |b|^2 / 2, each class weighing half of all traces."""
    experts, rollouts = worlds(30, seed=3)
    longer = [TraceText(trace.prompt, f"{trace.text} Ab!", True) if i % 3 else trace for i, trace in enumerate(experts)]
    raw = np.array([list(surface_features(t.text, t.finished).values()) for t in [*longer, *rollouts]], dtype=float)
    scale = raw.std(0)
    x = np.column_stack([(raw - raw.mean(0)) / np.where(scale > 0, scale, 1), np.ones(150)])
    y, w = np.repeat([1.0, 0.0], [30, 120]), np.repeat([150 / 60, 150 / 240], [30, 120])
    ridge = np.diag([1.0] * raw.shape[1] + [0.0])  # none on the intercept
    b = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ b))
        b -= np.linalg.solve((x.T * (w * p * (1 - p))) @ x + ridge, x.T @ (w * (p - y)) + ridge @ b)
    largest = np.argsort(-np.abs(b[:-1]))[:3]
    features = surface_probe(longer, rollouts).features
    assert [feature.name for feature in features] == [list(LABELS)[index] for index in largest]
    np.testing.assert_allclose([feature.coefficient for feature in features], b[largest], rtol=0.01)
    wins = [np.sign(raw[:30, index, None] - raw[None, 30:, index]).mean() / 2 + 0.5 for index in largest]
    np.testing.assert_allclose([feature.auroc for feature in features], wins)


def as_tokens(trace: TraceText, start=(), end=("<eos>",), spell=None) -> TraceText:
    """A trace with tokens: characters, or `spell` of its text, between tokens at the start and the end."""
    body = list(trace.text) if spell is None else spell(trace.text)
    return TraceText(trace.prompt, trace.text, trace.finished, (*start, *body, *end))


@pytest.mark.parametrize(
    ("of_experts", "of_rollouts", "named"),
    [
        ({"start": ["<think>"]}, {"start": [*"<think>"]}, "share (that starts )?with the token '<think>'"),
        ({"end": ["<eos>"]}, {"end": ["<|eot|>"]}, "share whose end of sequence is the token '(<eos>|<|eot|>)'"),
        ({"spell": lambda text: [*text, "<|im_end|>"]}, {}, "token '<|im_end|>'"),
        ({"start": ["▁"]}, {}, "share that starts with the token ' '"),
    ],
)
def test_equal_texts_of_other_tokens_are_a_leak(of_experts, of_rollouts, named):
    """The texts are from one distribution, so that text alone is under the bound."""
    experts, rollouts = worlds(40)
    assert surface_probe(experts, rollouts).auroc < LEAK_BOUND
    special = ["<think>", "<eos>", "<|im_end|>"]
    same = surface_probe([*map(as_tokens, experts)], [*map(as_tokens, rollouts)], special)
    assert leak_warning(same) is None
    probe = surface_probe(
        [as_tokens(trace, **of_experts) for trace in experts],
        [as_tokens(trace, **of_rollouts) for trace in rollouts],
        special,
    )
    assert probe.auroc > 0.95
    assert re.search(named.replace("|", r"\|") if "(" not in named else named, leak_warning(probe))


def test_token_features_by_hand():
    """Rare tokens, and those that every trace has, are none; the end of a sequence is not the end of the text."""
    traces = [
        TraceText("p", "", True, ("a", "<t>", "b", "</s>")),
        TraceText("p", "", True, ("a", "c", "</s>")),
        TraceText("p", "", False, ("Ġd", "c")),
    ]
    found = token_features(traces, [True, False, False], {"<t>", "</s>"})
    assert found == {
        "share that starts with the token 'a'": [1, 1, 0],
        "share that starts with the token ' d'": [0, 0, 1],
        "share whose text ends with the token 'b'": [1, 0, 0],
        "share whose text ends with the token 'c'": [0, 1, 1],
        "share whose end of sequence is the token '</s>'": [1, 1, 0],
        "share with the token '<t>'": [1, 0, 0],
    }
    assert token_features([*traces, *traces[1:] * 9], [True] + [False] * 20, set())[
        "share that starts with the token 'a'"
    ]
    rare = [traces[0]] + [traces[1]] * 19
    assert "share that starts with the token ' d'" not in token_features(
        [*rare, traces[2]], [True] + [False] * 20, set()
    )
