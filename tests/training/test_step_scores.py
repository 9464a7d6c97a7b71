"""Scores of steps: features against each step read by itself, changed steps, and no leak between questions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tracereward.errors import InputError
from tracereward.modeling.hidden_states import step_states, trace_states
from tracereward.modeling.loading import load_causal_lm
from tracereward.modeling.steps import LINES
from tracereward.synthetic.arithmetic import generate
from tracereward.tasks.recipes import get_task
from tracereward.training import readout, step_scores
from tracereward.training.audit_orders import ORDERS, suspicion
from tracereward.training.step_scores import StepOptions, changed_steps, score_steps, step_texts, stepped_traces

TASK = get_task("arithmetic")
ROWS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in generate("misconception", 24, seed=5)]


@pytest.fixture
def options(tiny_model_folder, tmp_path):
    return StepOptions(model=str(tiny_model_folder), cache=tmp_path / "states", dtype=torch.float32, rule=LINES)


def test_steps_have_the_features_of_a_completion_behind_what_comes_before(tokenizer, tiny_model_folder):
    model = load_causal_lm(str(tiny_model_folder), torch.float32, torch.device("cpu"))
    traces = stepped_traces(ROWS[:5], tokenizer, LINES)
    prompts, completions = [trace.prompt for trace in traces], [trace.completion for trace in traces]
    found = dict(step_states(model, prompts, completions, 0, steps=[trace.steps for trace in traces], token_budget=70))
    assert len(found) == 5
    for number, trace in enumerate(traces):
        assert [text.strip() for text in step_texts(trace, tokenizer)] == ROWS[number]["completion"].split("\n")
        for place, step in enumerate(trace.examples):
            [(_, alone)] = trace_states(model, [step.prompt], [step.completion], 0)
            torch.testing.assert_close(found[number].states[place], alone.states[0], rtol=0.02, atol=0.02)
            torch.testing.assert_close(found[number].log_probs[place], alone.log_probs[0])


def test_changed_steps_follow_what_the_expert_wrote(tokenizer, options):
    for trace, row in zip(stepped_traces(ROWS, tokenizer, LINES), ROWS, strict=True):
        own = {(tuple(step.prompt), tuple(step.completion)) for step in trace.examples}
        changed = changed_steps(trace, row, TASK, tokenizer, options=options)
        assert changed
        for step in changed:
            before = len(step.prompt) - len(trace.prompt)
            assert step.prompt == trace.prompt + trace.completion[:before]
            assert before in {start for start, _ in trace.steps}
            assert (tuple(step.prompt), tuple(step.completion)) not in own
            assert not step.label


def test_no_step_is_judged_by_a_head_that_has_seen_its_question(tokenizer, options, monkeypatch):
    """If the labels of one question turn, only the scores of the other questions change."""
    rows = [*ROWS, {**ROWS[0], "completion": ROWS[0]["completion"].replace("####", "so ####")}, dict(ROWS[1])]
    traces = stepped_traces(rows, tokenizer, LINES)
    assert traces[24].question == traces[0].question != traces[1].question == traces[25].question
    first = score_steps(traces, rows, TASK, tokenizer, options=options)
    assert [len(values) for values in first.rewards] == [len(trace.steps) for trace in traces]
    last = changed_steps(traces[3], rows[3], TASK, tokenizer, options=options)
    scores = dict(zip([(*s.prompt, -1, *s.completion) for t in traces for s in t.examples], first.readout.scores))
    count = sum(len(changed_steps(t, r, TASK, tokenizer, options=options)) for t, r in zip(traces[:3], rows[:3]))
    changed = first.readout.scores[sum(len(trace.steps) for trace in traces) + count :]
    places = {len(step.prompt): scores[(*step.prompt, -1, *step.completion)] for step in traces[3].examples}
    assert first.contrasts[3] == pytest.approx([places[len(s.prompt)] - v for s, v in zip(last, changed)])

    def turned(of_traces):
        found = real(of_traces)
        return type(found)(
            labels=found.labels ^ (found.questions == 0), questions=found.questions, weights=found.weights
        )

    real = step_scores.examples_of
    monkeypatch.setattr(step_scores, "examples_of", turned)

    def fixed(states, layers, examples, *args, **kwargs):  # the choice of layers sees all labels
        tried = readout.cross_fit(states, layers, examples, *args, **kwargs)
        chosen = [one for one in tried if (one.layers, one.penalty) == (first.readout.layers, first.readout.penalty)]
        return readout.best_readout(chosen, states, layers, examples)

    monkeypatch.setattr(step_scores, "fit_readout", fixed)
    second = score_steps(traces, rows, TASK, tokenizer, options=options)
    shift = second.readout.bias - first.readout.bias
    same = [np.allclose(a, b - shift, atol=1e-6) for a, b in zip(first.rewards, second.rewards, strict=True)]
    assert [n for n, equal in enumerate(same) if equal and traces[n].question == 0] == [0, 24]
    assert not all(same)


def test_orders_by_hand():
    contrasts = [np.array([1.0, 3.0]), np.array([]), np.array([2.5])]
    rewards = [np.array([1.0, -2.0]), np.array([0.5]), np.array([3.0, 0.0, 0.0])]
    log_probs = [np.array([-1.0, -3.0]), np.array([-4.0]), np.array([-1.0, -1.0, -2.5])]
    sizes = [np.array([3, 1]), np.array([5]), np.array([1, 1, 2])]
    scores: Any = SimpleNamespace(rewards=rewards, log_probs=log_probs, sizes=sizes, contrasts=contrasts)
    found = {order: suspicion(order, scores) for order in ORDERS}
    assert found["contrast"] == pytest.approx([2.0, 2.5, 2.5])
    assert found["reward"] == pytest.approx([-0.5, 0.5, 1.0])
    assert found["lowest_reward"] == pytest.approx([-2.0, 0.5, 0.0])
    assert found["logprob"] == pytest.approx([-1.5, -4.0, -1.75])
    assert found["lowest_logprob"] == pytest.approx([-3.0, -4.0, -2.5])
    low, lowest = np.array([2.0, 2.5, 2.5]), np.array([-3.0, -4.0, -2.5])
    assert found["sum"] == pytest.approx(low / low.std() + lowest / lowest.std())
    with pytest.raises(InputError, match="length"):
        suspicion("length", scores)
