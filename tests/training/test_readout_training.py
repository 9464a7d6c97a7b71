"""Read-outs end to end: the artefact's trace reward is the head's score, cached states are not computed again."""

import random

import numpy as np
import pytest
import torch

from tracereward.data.perturbations import KINDS, perturb
from tracereward.errors import Interrupted
from tracereward.modeling import hidden_states
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.shaping import backfill
from tracereward.rewards.supervision import reward_shares
from tracereward.synthetic.arithmetic import generate
from tracereward.training import readout, readout_training
from tracereward.training.readout_training import LabelledTrace, ReadoutOptions, states_of, train_readout


def labelled(tokenizer, count: int) -> list[LabelledTrace]:
    """Right traces, and copies with another number or operator."""
    rng, traces = random.Random(4), []
    for question, row in enumerate(generate("misconception", count, seed=5)):
        prompt = encode_prompt(tokenizer, row["prompt"])
        traces.append(
            LabelledTrace(
                prompt=prompt, completion=encode_completion(tokenizer, row["completion"]), label=True, question=question
            )
        )
        changed = perturb(row["completion"], rng, KINDS)
        if changed is not None:
            ids = encode_completion(tokenizer, changed.text)
            traces.append(LabelledTrace(prompt=prompt, completion=ids, label=False, question=question))
    return traces


@pytest.mark.parametrize(
    ("granularity", "count"), [("dense", 1), ("sparse", 1), ("step", 1), ("interval", 1), ("dense", 2), ("step", 2)]
)
def test_trace_reward_is_the_score(granularity, count, tokenizer, tiny_model_folder, tmp_path, monkeypatch):
    """Of a read-out of one layer, and of the mean of both."""

    def fit(states, layers, examples, *args, **kwargs):
        tried = readout.cross_fit(states, layers, examples, *args, **kwargs)
        return readout.best_readout([one for one in tried if len(one.layers) == count], states, layers, examples)

    monkeypatch.setattr(readout_training, "fit_readout", fit)
    settings = RewardSettings(head="token", granularity=granularity, interval=3)
    traces = labelled(tokenizer, 24)
    options = ReadoutOptions(objective="pairwise", cache=tmp_path / "states", dtype=torch.float32)
    model, fitted = train_readout(str(tiny_model_folder), settings, tokenizer, traces, options=options)
    found, layers = states_of(str(tiny_model_folder), settings, tokenizer, traces, options=options)
    assert len(fitted.layers) == count
    model.save_pretrained(tmp_path / "reward_model")
    loaded = TokenRewardModel.from_pretrained(tmp_path / "reward_model")
    scored = loaded.score_ids([trace.prompt for trace in traces], [trace.completion for trace in traces])
    rewards = np.array([one.aggregate("mean") for one in scored])
    expected = fitted.score(found.states, layers)
    assert rewards == pytest.approx(expected, abs=0.02 * np.abs(rewards).max())  # the states are kept in bfloat16
    labels = [trace.label for trace in traces]
    assert rewards[labels].mean() == pytest.approx(-rewards[~np.array(labels)].mean(), abs=0.05)

    def never(*args, **kwargs):
        raise AssertionError("the states are on the disk")

    monkeypatch.setattr(readout_training, "trace_states", never)
    again, _ = train_readout(str(tiny_model_folder), settings, tokenizer, traces, options=options)
    assert torch.equal(again.head_weight, model.head_weight)


def test_shares_give_the_mean_of_backfilled_values():
    rng = torch.Generator().manual_seed(0)
    supervised = torch.rand(40, 12, generator=rng) < 0.4
    lengths = torch.randint(1, 13, (40,), generator=rng)
    real = torch.arange(12)[None] < lengths[:, None]
    supervised &= real
    supervised[torch.arange(40), lengths - 1] = True
    values = torch.randn(40, 12, generator=rng)
    expected = (backfill(values, supervised) * real).sum(1) / lengths
    torch.testing.assert_close((reward_shares(supervised) * values).sum(1), expected)


def test_an_interruption_keeps_what_was_read(tokenizer, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readout_training, "CHUNK", 10)
    traces = labelled(tokenizer, 15)
    settings = RewardSettings(head="token")
    asked = []

    def stop_at_the_third() -> bool:
        asked.append(True)
        return len(asked) == 3

    options = ReadoutOptions(objective="pairwise", cache=tmp_path / "states", dtype=torch.float32)
    with pytest.raises(Interrupted):
        train_readout(str(tiny_model_folder), settings, tokenizer, traces, options=options, stopped=stop_at_the_third)
    read = []
    original = hidden_states.trace_states

    def counted(model, prompts, *args, **kwargs):
        read.extend(prompts)
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(readout_training, "trace_states", counted)
    train_readout(str(tiny_model_folder), settings, tokenizer, traces, options=options)
    assert len(read) == len(traces) - 20
