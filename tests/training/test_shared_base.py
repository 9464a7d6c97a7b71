"""Policy and discriminator as two adapters on one base model match two separate models."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import PrinterCallback

from helpers.invariance import LONGEST, LOSSES, SHARDED, Scripted, differences
from helpers.tiny import launcher, trap
from tracereward.errors import InputError
from tracereward.modeling.adapters import DISCRIMINATOR, POLICY, AdapterView
from tracereward.modeling.batching import pack
from tracereward.modeling.log_probs import completion_log_probs
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, generate
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig

BATCH = pack([[5, 6], [7]], [[8, 9, 10], [11, 12]], 0)


def adapters():
    """LoRA settings with dropout, so that a wrong train or eval mode shows."""
    return LoraConfig(r=4, lora_alpha=16, lora_dropout=0.3, target_modules="all-linear")


def randomise(parameters, seed):
    """Fill parameters, LoRA's B included, with values that depend only on their order and the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("shared") / "model"
    build_model(tokenizer, seed=0, layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def shared(base):
    """A base model with two random adapters, and a separate model with the second adapter's weights."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapters())
    model.add_adapter(DISCRIMINATOR, adapters())
    for seed, name in enumerate((POLICY, DISCRIMINATOR)):
        randomise(AdapterView(model, name).adapter_weights, seed)
    alone = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapters())
    randomise((p for p in alone.parameters() if p.requires_grad), 1)
    return model, alone


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_view_activates_its_adapter_only_temporarily(shared, base):
    model, alone = shared
    model.train()
    before = trainable(model)
    assert before
    assert not any(DISCRIMINATOR in name for name in before)
    with torch.no_grad():
        found = completion_log_probs(AdapterView(model, DISCRIMINATOR).eval(), BATCH)[0]
        expected = completion_log_probs(alone.eval(), BATCH)[0]
        start = completion_log_probs(AdapterView(model, None).eval(), BATCH)[0]
        untouched = completion_log_probs(AutoModelForCausalLM.from_pretrained(base).eval(), BATCH)[0]
    assert torch.equal(found, expected)
    assert torch.equal(start, untouched)
    assert not torch.allclose(found, start, atol=1e-3)
    assert model.training
    assert model.active_adapter == POLICY
    assert trainable(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_match_a_separate_model(shared, checkpointing):
    """The other adapter runs between the forward and backward pass, as it does for the policy's log-probs."""
    model, alone = shared
    if checkpointing:
        for one in shared:
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    view = AdapterView(model, DISCRIMINATOR).eval()
    with view.active():
        loss = completion_log_probs(view, BATCH)[0].sum()
        with torch.no_grad():
            completion_log_probs(AdapterView(model, POLICY).eval(), BATCH)
            completion_log_probs(AdapterView(model, None).eval(), BATCH)
        loss.backward()
    completion_log_probs(alone.eval(), BATCH)[0].sum().backward()
    expected = [parameter.grad for parameter in alone.parameters() if parameter.requires_grad]
    assert len(expected) == len(view.adapter_weights)
    for parameter, gradient in zip(view.adapter_weights, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    of_the_policy = AdapterView(model, POLICY).adapter_weights
    assert all(parameter.grad is None for parameter in of_the_policy)


def run(base, folder, shares, head):
    """Ten steps with the settings of the invariance tests; both layouts start from the same adapters."""
    config = AdversarialConfig(
        output_dir=str(folder),
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=LONGEST,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-5,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        discriminator_warmup_updates=3,
        discriminator_every=1,
        discriminator_learning_rate=1e-3,
        discriminator_rollouts=2,
        replay_size=64,
        warmup_rollouts=4,
        on_failure="ignore",
        seed=3,
        shared_base=shares,
        **{**SHARDED, "head": head, "gradient_penalty": 0.1},
    )
    tokenizer = load_tokenizer(base)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    settings = RewardSettings(head=head, reward_form=str(config.reward_form), beta_clip=100.0)
    policy = AutoModelForCausalLM.from_pretrained(base)
    if shares:
        policy = get_peft_model(policy, lora)
        reward_model = TokenRewardModel.beside_policy(policy, settings, tokenizer, lora)
    else:
        reward_model = TokenRewardModel.from_backbone(base, settings, tokenizer, lora)
    trainer = Scripted(
        model=policy,
        reward_model=reward_model,
        demonstrations=[
            *generate("misconception", 12, seed=11),
            *({**row, "completion": None} for row in generate("misconception", 8, seed=77)),
        ],
        args=config,
        task=get_task("arithmetic"),
        processing_class=tokenizer,
        peft_config=None if shares else lora,
    )
    trainer.remove_callback(PrinterCallback)
    randomise([p for n, p in trainer.policy.named_parameters() if f"lora_A.{POLICY}" in n], 5)
    learned = trainer.discriminator.parameters
    randomise([p for p in learned.values() if p.dim() == 2 and bool(p.any())], 6)
    trainer.discriminator.average = {name: p.detach().clone() for name, p in learned.items()}
    trainer.train()
    return trainer


@pytest.mark.parametrize("head", ["action", pytest.param("implicit", marks=pytest.mark.long)])
def test_training_matches_two_models(base, tmp_path, head):
    """Same rollouts, losses, rewards and final reward model; the saved one contains the discriminator's adapter."""
    two, one = (run(base, tmp_path / str(shares), shares, head) for shares in (False, True))
    assert one.batches == two.batches
    logs = [{"log": [row for row in trainer.state.log_history if "loss" in row]} for trainer in (two, one)]
    assert len(logs[0]["log"]) == 10
    found = differences(*logs, LOSSES)
    centred = {"loss": 1e-3, "reward": 1e-3}  # means of centred values: small compared with the values
    assert all(value < centred.get(name, 1e-4) for name, value in found.items()), found
    assert all(row["grad_norm"] > 1e-3 for row in logs[0]["log"])
    assert len(one.discriminator.parameters) == len(two.discriminator.parameters)
    for ours, theirs in zip(one.discriminator.parameters.values(), two.discriminator.parameters.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    trained = {n for group in one.optimizer.param_groups for n in map(id, group["params"])}
    assert trained.isdisjoint(map(id, one.discriminator.parameters.values()))
    one.discriminator.model.save_pretrained(tmp_path / "rm")
    prompts, completions = [[5, 6, 7]], [[8, 9, 10, 1]]
    saved = TokenRewardModel.from_pretrained(str(tmp_path / "rm")).token_rewards(prompts, completions)
    torch.testing.assert_close(saved, one.discriminator.model.token_rewards(prompts, completions))


def options(folder, base, rows, **more):
    given = {
        "task": "arithmetic",
        "dataset_name": rows,
        "model_name_or_path": base,
        "output_dir": folder,
        "use_peft": "true",
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "shared_base": "true",
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 24,
        "learning_rate": 1e-3,
        "beta_clip": 100,
        "max_steps": 4,
        "save_steps": 2,
        "discriminator_warmup_updates": 3,
        "discriminator_every": 1,
        "warmup_prompts": 8,
        "warmup_rollouts": 4,
        **more,
    }
    return ["train", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


@pytest.mark.long
def test_killed_run_resumes_to_the_same_weights(base, tmp_path):
    """The checkpoint holds both adapters; the saved policy and reward model are merged, without LoRA."""
    rows = tmp_path / "experts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate("misconception", 16, seed=1)))
    full = launcher()(*options(tmp_path / "full", base, rows))
    assert full.code == 0, full.err
    first = launcher()(*options(tmp_path / "cut", base, rows), trap=trap("open", "cut/metrics.jsonl", 3 + 3))
    assert first.code == -9
    second = launcher()(*options(tmp_path / "cut", base, rows), "--resume")
    assert second.code == 0, second.err
    for part in ("policy", "reward_model"):
        a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / run / part).state_dict() for run in ("full", "cut"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), part
        start = AutoModelForCausalLM.from_pretrained(base).state_dict()
        assert any(not torch.equal(a[name], start[name]) for name in a), part


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_peft": "false"}, "--use_peft true"),
        ({"head": "token"}, "action or implicit"),
    ],
)
def test_options_incompatible_with_shared_base(base, tmp_path, more, message):
    rows = tmp_path / "experts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate("misconception", 16, seed=1)))
    done = launcher()(*options(tmp_path / "run", base, rows, **more))
    assert done.code != 0
    assert message in done.err


def test_input_error_is_ours():
    with pytest.raises(InputError, match="--discriminator_model"):
        AdversarialConfig(output_dir="x", shared_base=True, discriminator_model="other", report_to="none")
