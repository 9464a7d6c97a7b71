"""The parts of TRL that the trainers rely on, checked on short real runs of a tiny model.

Each failure message names what changed in TRL.
"""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import GRPOTrainer

from tracereward.commands.sft import SupervisedTrainer, tokenised
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import generate
from tracereward.tasks.recipes import get_task
from tracereward.training.advantages import EPSILON
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import SupervisedConfig
from tracereward.training.trainer import AdversarialTrainer
from tracereward.training.warmup import WarmUp

# An untrained model's log-probs are near -log 51 = -3.9: this clip touches some of them.
GROUP, BATCH, BETA = 4, 16, 4.0


class Recorded(AdversarialTrainer):
    """Records inputs and outputs of the hook, and recomputes rewards from the batch that TRL returns."""

    def __init__(self, *args, **kwargs):
        self.batches, self.calls, self.first_step = [], [], None
        super().__init__(*args, **kwargs)

    def learned_reward(self, *args, **kwargs):
        assert not args, "TRL now passes reward functions positional arguments"
        self.calls.append(("learned", kwargs))
        return super().learned_reward(**kwargs)

    def correct(self, *args, **kwargs):
        self.calls.append(("correct", kwargs))
        given = super().correct(**kwargs)
        # An untrained policy is never correct. Mark half correct, so a non-zero correctness weight would show.
        return [float(row % 2) for row in range(len(given))]

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        copied = {k: v.clone() if torch.is_tensor(v) else v for k, v in output.items()}
        self.batches.append((inputs, copied, self.rewards_of(copied)))
        return output

    def rewards_of(self, batch) -> list[np.ndarray]:
        """Clipped log-odds of each completion token, from TRL's tensors, one unpadded sequence at a time."""
        model, rewards = self.discriminator.model, []
        for prompt, prompt_mask, ids, mask in zip(
            *(batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
        ):
            real = torch.cat([prompt[prompt_mask.bool()], ids[mask.bool()]])
            count = int(mask.sum())
            with torch.no_grad():
                output = model.backbone(input_ids=real[None], output_hidden_states=True)
            log_probs = output.logits[0, -count - 1 : -1].double().log_softmax(-1)
            logits = model.head.a * log_probs.gather(1, real[-count:, None])[:, 0] + model.head.b
            logits = logits + output.hidden_states[-1][0, -count:].double() @ model.head.w.double()
            rewards.append(logits.detach().numpy().clip(-BETA, BETA))
        return rewards


class AtFirstStep(TrainerCallback):
    """Records the training state at the policy's first step."""

    def __init__(self):
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.first_step = {
                "updates": self.trainer.discriminator.updates,
                "policy": [p.detach().clone() for p in self.trainer.model.parameters()],
                "moments": len(self.trainer.optimizer.state),
                "schedule": self.trainer.lr_scheduler.last_epoch,
            }


@pytest.fixture(scope="module")
def make(tiny_model_folder, tokenizer, experts, tmp_path_factory):
    def build(unlabeled=(), peft=None, **options) -> Recorded:
        options = {
            "output_dir": str(tmp_path_factory.mktemp("run")),
            "per_device_train_batch_size": BATCH,
            "num_generations": GROUP,
            "max_completion_length": 12,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "discriminator_warmup_updates": 2,
            "discriminator_every": 1,
            "discriminator_learning_rate": 1e-3,
            "warmup_rollouts": 4,
            "held_out_fraction": 0.0,
            "reward_form": "logit",
            "perturbed_per_expert": 0,
            "beta_clip": BETA,
            "seed": 3,
            **options,
        }
        config = AdversarialConfig(**options)
        settings = RewardSettings(
            head=config.head,
            granularity=config.granularity,
            beta_clip=config.beta_clip,
            reward_form=config.reward_form,
        )
        at_first_step = AtFirstStep()
        trainer = Recorded(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            reward_model=TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer),
            demonstrations=[dict(row) for row in [*experts, *unlabeled]],
            args=config,
            task=get_task("arithmetic"),
            processing_class=tokenizer,
            peft_config=peft,
            callbacks=[at_first_step],
        )
        at_first_step.trainer = trainer
        return trainer

    return build


@pytest.fixture(scope="module")
def token_run(make):
    trainer = make(advantages="token", gamma=0.9, loss_type="grpo", discriminator_updates=2)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trajectory_run(make):
    trainer = make()
    trainer.train()
    return trainer


# ---------- signatures and keys ----------


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (GRPOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer, "_compute_loss", ["self", "model", "inputs"]),
        (
            GRPOTrainer,
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (Trainer, "_save_checkpoint", ["self", "model", "trial"]),
        (Trainer, "_save_optimizer_and_scheduler", ["self", "output_dir"]),
        (Trainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
    ],
)
def test_signatures_of_wrapped_private_methods(owner, name, parameters):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: AdversarialTrainer or SafeTrainer overrides it"
    found = list(inspect.signature(getattr(owner, name)).parameters)
    assert found == parameters, f"{owner.__name__}.{name} now takes {found}: adapt what overrides or calls it"


def test_private_attributes_exist(trajectory_run):
    for name in ("num_generations", "num_generations_eval", "reward_weights", "_metrics", "accelerator", "_logs"):
        assert hasattr(trajectory_run, name), f"GRPOTrainer has no {name} any more: AdversarialTrainer reads it"
    assert trajectory_run.num_generations == GROUP


def test_rollout_batch_keys(trajectory_run):
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    for _, batch, _ in trajectory_run.batches:
        missing = keys - batch.keys()
        assert not missing, f"_generate_and_score_completions no longer returns {missing}"
        assert batch["completion_mask"].shape == batch["completion_ids"].shape, "completion_mask is no longer (B, T)"


def test_completions_are_right_padded_and_prompts_left_padded(token_run):
    for _, batch, _ in token_run.batches:
        for row in batch["completion_mask"].tolist():
            assert row == sorted(row, reverse=True), "completions no longer start in column 0"
        for row in batch["prompt_mask"].tolist():
            assert row == sorted(row), "prompts are no longer left-padded"


def test_rows_are_grouped_by_prompt(token_run):
    for inputs, batch, _ in token_run.batches:
        assert len(inputs) == len(batch["advantages"]) == BATCH
        for start in range(0, BATCH, GROUP):
            group = {row["prompt"] for row in inputs[start : start + GROUP]}
            assert len(group) == 1, "rows of a prompt are no longer adjacent: group statistics would mix prompts"


def test_prompt_ids_match_encode_prompt(token_run, tokenizer):
    for inputs, batch, _ in token_run.batches:
        for row, ids, mask in zip(inputs, batch["prompt_ids"], batch["prompt_mask"], strict=True):
            found = ids[mask.bool()].tolist()
            assert found == encode_prompt(tokenizer, row["prompt"]), (
                "TRL tokenises prompts differently from encode_prompt"
            )


# ---------- reward functions ----------


def test_reward_function_arguments(token_run, tokenizer, experts):
    learned = [kwargs for name, kwargs in token_run.calls if name == "learned"]
    assert len(learned) == len(token_run.batches) == 2
    for kwargs, (inputs, batch, _) in zip(learned, token_run.batches, strict=True):
        wanted = {"prompts", "completions", "completion_ids", "log_metric", "demonstration", "answer"}
        assert wanted <= kwargs.keys(), f"reward functions no longer get {wanted - kwargs.keys()}"
        assert kwargs["prompts"] == [row["prompt"] for row in inputs], "prompts have a different order or form"
        real = [ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"])]
        assert [list(ids) for ids in kwargs["completion_ids"]] == real, "completion_ids are padded, cut or reordered"
        texts = tokenizer.batch_decode(real, skip_special_tokens=True)
        assert list(kwargs["completions"]) == texts, "completions are no longer the decoded text without special tokens"
        for index, prompt, answer in zip(kwargs["demonstration"], kwargs["prompts"], kwargs["answer"], strict=True):
            assert experts[index]["prompt"] == prompt, "columns of the data set no longer follow their rows"
            assert experts[index]["answer"] == answer


def test_reward_functions_run_in_order(token_run):
    """`correct` returns what `learned_reward` has just verified."""
    assert [name for name, _ in token_run.calls] == ["learned", "correct"] * 2, "TRL reorders reward functions"


def test_metrics_of_reward_functions_are_logged(token_run):
    row = token_run.state.log_history[0]
    for name in ("discriminator/loss", "discriminator/grad_norm", "monitor/length_reward_r", "rewards/correct/mean"):
        assert name in row, f"{name} is not logged: does log_metric still reach the log?"
    rewards = [values.mean() for values in token_run.batches[0][2]]
    assert row["rewards/learned_reward/mean"] == pytest.approx(np.mean(rewards), abs=1e-5)
    assert row["reward"] == pytest.approx(np.mean(rewards), abs=1e-5), "correctness has a weight in the reward"


def test_finished_rollouts_have_exactly_one_end_of_sequence(token_run, trajectory_run, tokenizer):
    """As experts do: a missing or doubled end on one side would let the discriminator tell them apart."""
    ended = 0
    for name, kwargs in [*token_run.calls, *trajectory_run.calls]:
        for ids in kwargs["completion_ids"] if name == "learned" else ():
            assert tokenizer.eos_token_id not in ids[:-1], "completions continue after the end of sequence"
            ended += ids[-1] == tokenizer.eos_token_id
            assert ids[-1] == tokenizer.eos_token_id or len(ids) == 12, "the end of sequence is cut off"
    assert ended > 3
    assert encode_completion(tokenizer, "#### 8").count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("how", ["mean", "min"])
def test_rewards_and_correctness_of_fixed_traces(trajectory_run, tokenizer, experts, how, monkeypatch):
    """Each trace is verified against its own row's answer; outside training there is no update."""
    monkeypatch.setattr(trajectory_run.config, "reward_aggregate", how)
    trajectory_run.model.eval()
    rows = [experts[i] for i in (0, 1, 2, 3)]
    assert rows[1]["answer"] != rows[0]["answer"]
    texts = [rows[0]["completion"], rows[0]["completion"], rows[2]["completion"], "no answer"]
    ids = [encode_completion(tokenizer, text) for text in texts]
    before = trajectory_run.discriminator.updates
    rewards = trajectory_run.learned_reward(
        prompts=[row["prompt"] for row in rows],
        completions=texts,
        completion_ids=ids,
        demonstration=[0, 1, 2, 3],
        answer=[row["answer"] for row in rows],
        log_metric=lambda *_: None,
    )
    trajectory_run.model.train()
    assert trajectory_run.discriminator.updates == before
    assert AdversarialTrainer.correct(trajectory_run, prompts=[]) == [1.0, 0.0, 1.0, 0.0]
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    of_tokens = trajectory_run.discriminator.model.token_rewards(prompts, ids)
    expected = [float(values.min() if how == "min" else values.mean()) for values in of_tokens]
    assert rewards == pytest.approx(expected, abs=1e-5)


# ---------- advantages ----------


def test_trajectory_advantages_match_trl(trajectory_run):
    """(R - mean) / (std + 1e-4) within the prompt, with the sample standard deviation (n - 1)."""
    for _, batch, rewards in trajectory_run.batches:
        traces = np.array([values.mean() for values in rewards]).reshape(-1, GROUP)
        assert traces.std() > 1e-3
        expected = (traces - traces.mean(1, keepdims=True)) / (traces.std(1, ddof=1, keepdims=True) + 1e-4)
        np.testing.assert_allclose(
            batch["advantages"], expected.flatten(), atol=2e-3, err_msg="TRL standardises rewards differently"
        )


def test_token_advantages_match_numpy(token_run):
    """Return-to-go of rewards standardised over the real tokens of the prompt's group, from TRL's own tensors."""
    for _, batch, rewards in token_run.batches:
        advantages = batch["advantages"].numpy()
        assert advantages.shape == tuple(batch["completion_ids"].shape)
        for row, own in enumerate(rewards):
            first = row // GROUP * GROUP
            tokens = np.concatenate(rewards[first : first + GROUP])
            standardised = (own - tokens.mean()) / (tokens.std() + EPSILON)
            expected = np.zeros(advantages.shape[1])
            for t in range(len(own)):
                expected[t] = sum(0.9 ** (k - t) * standardised[k] for k in range(t, len(own)))
            np.testing.assert_allclose(advantages[row], expected, atol=2e-3)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_accepts_per_token_advantages(token_run, loss_type, monkeypatch):
    """On-policy the ratio is 1: the loss is minus the mean advantage, and its gradient that of -A_t log pi(y_t)."""
    monkeypatch.setattr(token_run, "loss_type", loss_type)
    _, batch, _ = token_run.batches[0]
    batch = {**batch, "num_items_in_batch": batch["completion_mask"].sum()}
    batch.pop("old_per_token_logps", None)
    mask = batch["completion_mask"].double()

    def loss_and_gradient(advantages):
        token_run.model.zero_grad()
        loss = token_run._compute_loss(token_run.model, {**batch, "advantages": advantages})
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in token_run.model.parameters()])

    def weights():
        if loss_type == "grpo":
            return mask / mask.sum(1, keepdim=True) / BATCH
        return mask / {"bnpo": mask.sum(), "dapo": mask.sum(), "dr_grpo": torch.tensor(BATCH * 12.0)}[loss_type]

    per_token = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    value, gradient = loss_and_gradient(per_token)
    assert value == pytest.approx(float(-(weights() * per_token).sum()), abs=1e-5), (
        f"{loss_type}: (B, T) advantages are no longer per token"
    )
    token_run.model.zero_grad()
    total = torch.zeros(())
    for row in range(BATCH):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = batch["completion_ids"][row][mask[row].bool()]
        logits = token_run.model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        total = total - (weights()[row, : len(ids)] * per_token[row, : len(ids)] * log_probs).sum()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in token_run.model.parameters()])
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)

    constant = per_token[:, 0]
    _, of_rows = loss_and_gradient(constant)
    _, of_tokens = loss_and_gradient(constant[:, None].expand(mask.shape))
    torch.testing.assert_close(of_rows, of_tokens, atol=1e-6, rtol=1e-5)
    assert float((gradient - of_rows).abs().max()) > 1e-3, "(B, T) advantages are treated like (B,)"


# ---------- the run ----------


def test_policy_is_frozen_during_warm_up(token_run, tiny_model_folder):
    """No optimiser step, moments or scheduler step while the discriminator warms up."""
    start = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    first = token_run.first_step
    assert first["updates"] == 2
    assert first["moments"] == 0
    assert first["schedule"] == 0
    assert all(torch.equal(a, b) for a, b in zip(first["policy"], start.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(token_run.model.parameters(), start.parameters(), strict=True))


def test_updates_per_batch_of_rollouts(token_run, trajectory_run):
    """Two for the warm-up, then two (or one) for each of two batches: k a batch, not one every k batches."""
    assert token_run.discriminator.updates == 2 + 2 * 2
    assert trajectory_run.discriminator.updates == 2 + 2


def test_training_does_not_change_the_data(token_run, experts):
    rows = [{"prompt": r["prompt"], "answer": r["answer"], "demonstration": i} for i, r in enumerate(experts)]
    assert token_run.train_dataset.to_list() == rows


def test_replay_stores_rollouts_under_their_demonstration(token_run):
    """A rollout stored under an index was sampled from that demonstration's prompt."""
    sampled = {}
    for name, kwargs in token_run.calls:
        if name == "learned":
            for index, ids in zip(kwargs["demonstration"], kwargs["completion_ids"], strict=True):
                sampled.setdefault(index, []).append(list(ids))
    recent = token_run.discriminator.replay.rollouts[-2 * BATCH :]
    assert all(ids in sampled[index] for index, ids, *_ in recent)


def test_prompts_without_demonstration_train_only_the_policy(make):
    unlabeled = [{**row, "completion": None} for row in generate("misconception", 24, seed=77)]
    trainer = make(unlabeled, expert_prompt_share=0.5, max_steps=3)
    trainer.train()
    seen = [i for name, kwargs in trainer.calls if name == "learned" for i in kwargs["demonstration"]]
    assert -1 in seen
    assert max(seen) >= 0
    assert all(0 <= index < 12 for index, *_ in trainer.discriminator.replay.rollouts)
    assert len(trainer.discriminator.replay.rollouts) == 12 * 4 + sum(index >= 0 for index in seen)


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_mode_seeking_reward_adds_reference_log_prob(make, tiny_model_folder, peft):
    """The reference stays fixed: in the second batch the reward still adds the starting policy's log-prob."""
    beta = 8.0  # of about -7.8
    trainer = make(reward_form="logit_plus_logprob", learning_rate=1e-2, beta_clip=beta, peft=peft)
    trainer.train()
    assert all(module.training for module in trainer.model.modules())
    start = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model = trainer.discriminator.model
    _, batch, _ = trainer.batches[-1]
    with torch.no_grad():
        moved = trainer.model(batch["completion_ids"]).logits - start(batch["completion_ids"]).logits
    assert moved.abs().max() > 1e-3
    assert 0.01 < float((torch.cat(trainer._rewards) == -beta).float().mean()) < 0.9
    for row, given in enumerate(trainer._rewards):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        with torch.no_grad():
            log_probs = start(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            logits = model(model.pack([prompt], [ids]))[0]
        added = [float(log_probs[len(prompt) + t - 1, token]) for t, token in enumerate(ids)]
        expected = (logits + torch.tensor(added)).clamp(-beta, beta)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


# ---------- supervised fine-tuning ----------


def test_sft_trains_on_the_completion_and_one_end_of_sequence(tiny_model_folder, tokenizer, experts, tmp_path):
    """TRL uses input_ids and completion_mask unchanged: labels on the completion only, nothing added or truncated."""
    config = SupervisedConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SupervisedTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        args=config,
        train_dataset=tokenised(experts, tokenizer),
        processing_class=tokenizer,
    )
    wanted = {}
    for row in experts:
        prompt, completion = encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"])
        wanted[(*prompt, *completion)] = [-100] * len(prompt) + completion
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        real = tuple(ids[mask.bool()].tolist())
        assert real in wanted, "SFTTrainer changes input_ids: an end of sequence added, or a row cut"
        assert labels[mask.bool()].tolist() == wanted[real], "SFTTrainer no longer reads completion_mask"
        assert labels[~mask.bool()].eq(-100).all(), "padding has labels"
        assert real.count(tokenizer.eos_token_id) == 1
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    total = count = 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        real = ids[mask.bool()]
        with torch.no_grad():
            log_probs = trainer.model(input_ids=real[None]).logits[0].double().log_softmax(-1)
        for t, label in enumerate(wanted[tuple(real.tolist())]):
            if label != -100:
                total, count = total - float(log_probs[t - 1, label]), count + 1
    assert loss.item() == pytest.approx(total / count, abs=1e-5), "the loss is not the mean over completion tokens"
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize(("prompts", "rollouts", "batch"), [(6, 3, 48), (5, 2, 8), (4, 4, 16)])
def test_warm_up_rows_fill_complete_batches(prompts, rollouts, batch):
    """Each demonstration at least `rollouts` times, adjacent; the last batch is filled however small the data is."""
    rows = [{"demonstration": index} for index in range(prompts)]
    config = SimpleNamespace(warmup_prompts=99, warmup_rollouts=rollouts, generation_batch_size=batch, seed=0)
    discriminator = SimpleNamespace(held_out=frozenset({0}))
    warm_up = WarmUp(SimpleNamespace(config=config, demonstration_rows=rows, discriminator=discriminator))
    indices = [row["demonstration"] for row in warm_up._rows()]
    assert len(indices) % batch == 0
    assert len(indices) - prompts * rollouts in range(batch)
    assert sorted(indices[: prompts * rollouts]) == sorted(list(range(prompts)) * rollouts)
    assert all(len(set(indices[i : i + rollouts])) == 1 for i in range(0, prompts * rollouts, rollouts))


@pytest.mark.parametrize("seed", range(8))
def test_warm_up_on_few_prompts_includes_a_training_prompt(seed):
    """Nine of ten demonstrations are held out: on their prompts alone the warm-up would never update nor end."""
    rows = [{"demonstration": index} for index in range(10)]
    config = SimpleNamespace(warmup_prompts=2, warmup_rollouts=4, generation_batch_size=8, seed=seed)
    discriminator = SimpleNamespace(held_out=frozenset(range(10)) - {4})
    warm_up = WarmUp(SimpleNamespace(config=config, demonstration_rows=rows, discriminator=discriminator))
    indices = [row["demonstration"] for row in warm_up._rows()]
    assert indices.count(4) == 4
    assert len(indices) == 8
