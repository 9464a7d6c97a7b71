"""Single parts of `AdversarialTrainer`: the KL monitor, what the warm-up leaves, ends of traces, the report."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from trl import ModelConfig

from helpers.trainers import build_trainer
from tracereward.errors import InputError, RunFailed
from tracereward.modeling.log_probs import completion_log_probs, log_probs
from tracereward.runs import report
from tracereward.synthetic.arithmetic import build_model
from tracereward.training import trainer as module


def test_kl_of_real_tokens(tiny_model_folder, tokenizer, experts, tmp_path, monkeypatch):
    """E[exp(d) - d - 1] with d = log pi_start - log pi; padding holds gaps whose exp is infinite."""
    trainer = build_trainer(
        tiny_model_folder, tokenizer, experts, tmp_path, reward_form="logit_plus_logprob", discriminator_every=1
    )
    start = [[-0.5, -1.0, -2.0], [-0.1, 500.0, 900.0]]
    now = [[-1.0, -0.25, -2.0], [-3.0, -500.0, 0.0]]
    known = {id(trainer._starting_policy): start, id(trainer.model): now}
    monkeypatch.setattr(
        module, "completion_log_probs", lambda model, batch: (torch.tensor(known[id(model)]), torch.empty(0))
    )
    prompts = [experts[0]["prompt"], experts[1]["prompt"]]
    d = np.array([0.5, -0.75, 0.0, 2.9])
    assert trainer._kl(prompts, [[5, 6, 7], [8]])["kl"] == pytest.approx((np.exp(d) - d - 1).mean())


def test_warm_up_leaves_its_model_and_random_state_behind(tiny_model_folder, tokenizer, experts, tmp_path):
    """pi is the model that sampled the rollouts: `warmup_model`, and from the first step on the policy."""
    build_model(tokenizer, seed=7).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    trainer = build_trainer(
        tiny_model_folder,
        tokenizer,
        experts,
        tmp_path / "run",
        head="implicit",
        warmup_model=str(tmp_path / "other"),
        max_steps=1,
    )
    discriminator, run = trainer.discriminator, trainer.warm_up.run
    expert = discriminator.experts[0]
    batch = discriminator.model.pack([expert.prompt], [expert.completion])
    other = build_model(tokenizer, seed=7).eval()
    update, during, after = discriminator.update, [], []

    def recorded(fresh):
        during.append(trainer._policy_log_probs(batch))
        return update(fresh)

    def checked():
        run()
        after.append((trainer._policy_log_probs(batch), torch.rand(4), np.random.rand()))
        with trainer._evaluated() as policy, torch.no_grad():
            after.append(completion_log_probs(policy, batch)[0])

    discriminator.update, trainer.warm_up.run = recorded, checked
    trainer.train()
    (found, numbers, number), policy = after
    torch.testing.assert_close(during[0], completion_log_probs(other, batch)[0].detach())
    torch.testing.assert_close(found, policy)
    assert float((found - during[0]).abs().max()) > 0.1
    set_seed(trainer.args.seed + 1, device_specific=True)
    assert torch.equal(numbers, torch.rand(4))
    assert number == np.random.rand()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize(("head", "form", "sign"), [("action", "logit_plus_logprob", 1), ("implicit", "logit", -1)])
def test_report_shows_the_rewards_of_training(tiny_model_folder, tokenizer, experts, tmp_path, head, form, sign):
    """The logit plus the log-prob under the starting policy, or f minus the log-prob under the final one."""
    other = build_model(tokenizer, seed=7).eval()
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    trainer = build_trainer(
        tiny_model_folder, tokenizer, experts, tmp_path, head=head, reward_form=form, beta_clip=1e3, granularity="dense"
    )
    trainer.form = dataclasses.replace(trainer.form, reference_model=str(tiny_model_folder))
    model = trainer.discriminator.model
    seen, score_ids = [], model.score_ids

    def recorded(prompts, completions, **options):
        seen.append((prompts, completions))
        return score_ids(prompts, completions, **options)

    model.score_ids = recorded
    gold = {row["prompt"]: row["answer"] for row in experts[:2]}
    traces = report.fresh_traces(trainer, ModelConfig(model_name_or_path=str(tmp_path / "other")), model, gold)
    ((prompts, completions),) = seen
    assert len(traces) == 8
    added = log_probs(trainer.model if sign > 0 else other, prompts, completions, 0)
    for trace, values, extra in zip(traces, model.token_rewards(prompts, completions), added, strict=True):
        expected = values + sign * extra
        assert trace.scores.rewards == pytest.approx(expected.tolist(), abs=1e-4)
        assert trace.scores.rewards != pytest.approx(values.tolist(), abs=1e-2)
        if sign < 0:  # what is subtracted is the final policy's
            assert trace.logprob == pytest.approx(float(extra.mean()), abs=1e-4)


def test_ends_of_a_policy_that_has_several_are_one_to_the_discriminator(
    tiny_model_folder, tokenizer, experts, tmp_path
):
    """Experts are encoded with the tokenizer's: the other one would tell a trace of the policy by itself."""
    trainer = build_trainer(tiny_model_folder, tokenizer, experts, tmp_path)
    expert = trainer.discriminator.experts[0]
    eos, other = tokenizer.eos_token_id, 9
    assert expert.completion[-1] == eos
    trainer.bridge.ends = frozenset({eos, other})
    written = [*expert.completion[:-1], other]
    (rollout,) = trainer.as_rollouts([0], ["#### 9"], [written], [0.0])
    assert rollout.ids == expert.completion
    assert trainer.bridge.finished(written)
    assert trainer.bridge.completion([other, 7]) == [other, 7]


def test_traces_longer_than_the_reward_model_reads(tiny_model_folder, tokenizer, experts, tmp_path):
    """A demonstration is refused at once; a rollout, whose length is not known before, stops the run."""
    trainer = build_trainer(tiny_model_folder, tokenizer, experts, tmp_path / "a", max_steps=1)
    text = trainer.discriminator.model.backbone.config
    longest = max(len(expert.prompt) for expert in trainer.discriminator.experts)
    text.max_position_embeddings = longest
    with pytest.raises(RunFailed, match=f"reads {longest}: lower --max_completion_length"):
        trainer.train()
    assert trainer.discriminator.updates == 0
    trainer.warm_up.run = lambda: None
    with pytest.raises(RunFailed, match="at step 1 have"):
        trainer.train()
    short = tmp_path / "short"
    build_model(tokenizer, seed=0).save_pretrained(short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    with pytest.raises(InputError, match="the reward model reads 12"):
        build_trainer(short, tokenizer, experts, tmp_path / "b")
