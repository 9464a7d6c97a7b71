"""The four heads: f_t against plain transformers, in memory and from disk, and the options of each head."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tracereward.errors import InputError
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.choices import GRANULARITIES, HEADS
from tracereward.rewards.heads import ActionHead, default_reward_form, reads_log_probs, subtracts_policy
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.model_card import model_card
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model
from tracereward.training.adversarial_config import AdversarialConfig

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def build(folder, tokenizer, head, peft=None, **settings) -> TokenRewardModel:
    """A reward model with all trainable weights perturbed, so that zero initialisation hides no bug."""
    torch.manual_seed(0)
    settings = RewardSettings(head=head, **{"beta_clip": 1e9, **settings})
    model = TokenRewardModel.from_backbone(str(folder), settings, tokenizer, peft, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(tokenizer, experts):
    """Token ids of prompts and completions of unequal lengths."""
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in experts[:6]]
    completions = [encode_completion(tokenizer, row["completion"]) for row in experts[:6]]
    assert len({len(p) for p in prompts}) > 1
    assert len({len(c) for c in completions}) > 1
    return prompts, completions


@pytest.fixture(scope="module")
def lms(tokenizer):
    """Two more causal LMs: a reference and a policy."""
    return [build_model(tokenizer, seed=seed).eval() for seed in (5, 6)]


def f_of(model, prompts, completions) -> list[torch.Tensor]:
    with torch.no_grad():
        values = model(model.pack(prompts, completions))
    return [row[: len(completion)] for row, completion in zip(values, completions, strict=True)]


def log_probs_of(lm, prompt, completion) -> torch.Tensor:
    """log p(y_t) from a plain forward pass of the unpadded sequence, normalised in float64."""
    with torch.no_grad():
        log_probs = lm(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return torch.stack([log_probs[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=tolerance, rtol=0)


# ---------- f ----------


def test_properties_of_heads():
    assert {h: (reads_log_probs(h), subtracts_policy(h), default_reward_form(h)) for h in HEADS} == {
        "token": (False, False, "logit"),
        "action": (True, False, "logit"),
        "airl": (False, True, "f"),
        "implicit": (True, True, "f"),
    }


@pytest.mark.parametrize("head", HEADS)
def test_f_matches_its_definition(tiny_model_folder, tokenizer, pairs, head, tmp_path):
    """From the saved folder in plain transformers, one unpadded sequence at a time, in float64."""
    model = build(tiny_model_folder, tokenizer, head)
    model.backbone.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if head in ("action", "implicit") else AutoModelForTokenClassification
    plain = auto.from_pretrained(tmp_path).eval()
    expected = []
    for prompt, completion in zip(*pairs):
        with torch.no_grad():
            output = plain(torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0, len(prompt) :].double()  # after each token of the completion
        if head in ("token", "airl"):
            expected.append(hidden @ plain.score.weight[0].detach().double())
            continue
        log_p = log_probs_of(plain, prompt, completion)
        if head == "action":
            a, b, w = (getattr(model.head, name).detach().double() for name in "abw")
            assert 0 < abs(float(a) - 1) < 1
            log_p = a * log_p + b + hidden @ w
        expected.append(log_p)
    assert_close(f_of(model, *pairs), expected)


@pytest.mark.parametrize("head", HEADS)
def test_values_and_log_probs(tiny_model_folder, tokenizer, pairs, head):
    model = build(tiny_model_folder, tokenizer, head)
    batch = model.pack(*pairs)
    with torch.no_grad():
        values, log_probs = model.values_and_log_probs(batch)
        embeddings = model.backbone.get_input_embeddings()(batch.input_ids)
        of_embeddings, _ = model.values_and_log_probs(batch, embeddings)
        other, _ = model.values_and_log_probs(batch, 2 * embeddings)
    assert values.dtype == torch.float32
    assert torch.equal(values, of_embeddings)
    assert not torch.allclose(values, other, atol=1e-3)
    if head in ("token", "airl"):
        assert log_probs is None
        return
    own = [row[: len(c)] for row, c in zip(log_probs, pairs[1])]
    assert_close(own, [log_probs_of(model.backbone, p, c) for p, c in zip(*pairs)])


def test_action_head_is_initialised_to_the_log_prob():
    head = ActionHead(3)
    log_probs, hidden = torch.tensor([[-1.0, -2.5]]), torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(log_probs, hidden), log_probs)
    with torch.no_grad():
        head.a.fill_(2.0)
        head.b.fill_(0.5)
        head.w.copy_(torch.tensor([1.0, 0.0, -1.0]))
    expected = 2 * log_probs + 0.5 + hidden[..., 0] - hidden[..., 2]
    torch.testing.assert_close(head(log_probs, hidden.to(torch.bfloat16)), expected, atol=0.05, rtol=0)
    torch.testing.assert_close(head(log_probs, hidden), expected)


# ---------- w ----------


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("head", HEADS)
def test_f_is_linear_in_the_head_weight(tiny_model_folder, tokenizer, pairs, head, peft):
    """w is trainable, and f - f(w = 0) is linear in it; the head `implicit` has none."""
    model = build(tiny_model_folder, tokenizer, head, peft)
    weight = model.head_weight
    if head == "implicit":
        assert weight is None
        return
    assert any(weight is p for p in model.parameters())
    assert weight.requires_grad
    assert weight.numel() == 64
    full = torch.cat(f_of(model, *pairs))
    with torch.no_grad():
        kept = weight.clone()
        weight.zero_()
        without = torch.cat(f_of(model, *pairs))
        weight.copy_(2 * kept)
    assert (full - without).abs().max() > 0.1
    torch.testing.assert_close(torch.cat(f_of(model, *pairs)) - without, 2 * (full - without), atol=1e-4, rtol=1e-4)
    if head in ("token", "airl"):
        assert torch.equal(without, torch.zeros_like(without))


# ---------- files ----------


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(tiny_model_folder, tokenizer, pairs, tmp_path, head, peft):
    """The loaded model has the same f; the folder is a plain checkpoint without missing or unexpected keys."""
    model = build(tiny_model_folder, tokenizer, head, peft, base_model="some/base")
    model.save_pretrained(tmp_path / "rm")
    ours = f_of(model, *pairs)
    loaded = TokenRewardModel.from_pretrained(str(tmp_path / "rm"))
    assert loaded.settings == model.settings
    assert not loaded.training
    assert_close(f_of(loaded, *pairs), ours)
    untrained = TokenRewardModel.from_backbone(str(tiny_model_folder), model.settings, tokenizer, dtype=torch.float32)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, f_of(untrained.eval(), *pairs))) > 0.1

    files = {path.name for path in (tmp_path / "rm").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tracereward.json", "README.md"} <= files
    assert ("head.safetensors" in files) == (head == "action")
    assert not any(name.startswith("adapter") for name in files)
    auto = AutoModelForCausalLM if head in ("action", "implicit") else AutoModelForTokenClassification
    plain, info = auto.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if head == "implicit":
        assert_close([log_probs_of(plain.eval(), p, c) for p, c in zip(*pairs)], ours)
    if head in ("token", "airl"):
        with torch.no_grad():
            logits = [plain.eval()(torch.tensor([[*p, *c]])).logits[0, len(p) :, 0] for p, c in zip(*pairs)]
        assert_close(logits, ours)


# ---------- parity ----------


@pytest.fixture(scope="module")
def saved(tiny_model_folder, tokenizer, tmp_path_factory):
    """A reward model and its folder for each head and granularity."""
    found = {}
    for head in HEADS:
        model = build(tiny_model_folder, tokenizer, head)
        for granularity in GRANULARITIES:
            model.settings = RewardSettings(head=head, granularity=granularity, interval=4, beta_clip=10.0)
            folder = tmp_path_factory.mktemp("saved") / "rm"
            model.save_pretrained(folder)
            found[head, granularity] = copy.copy(model.settings), folder
        found[head] = model
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("head", HEADS)
def test_ids_text_and_the_reloaded_checkpoint_agree(saved, experts, tokenizer, pairs, lms, head, granularity):
    """One at a time, and in batches with padded prompts and completions; also with a reference and a policy. Each
    reward is clip(f + log p_reference - log p_policy) of the next supervised token.
    """
    model = saved[head]
    model.settings, folder = saved[head, granularity]
    loaded = TokenRewardModel.from_pretrained(str(folder))
    assert loaded.settings == model.settings
    prompts, completions = pairs
    texts = [row["prompt"] for row in experts[:6]], [row["completion"] for row in experts[:6]]
    long = [prompts[0] * 2, prompts[1]], [completions[0], completions[1] * 2]
    newline = tokenizer.convert_tokens_to_ids("\n")
    for reference, policy in ((None, None), (lms[0], None), (None, lms[1]), tuple(lms)):
        models = {"reference": reference, "policy": policy}
        alone = [model.token_rewards([p], [c], **models)[0] for p, c in zip(prompts, completions)]
        assert_close(model.token_rewards(prompts, completions, **models), alone)
        assert_close(model.token_rewards(prompts, completions, token_budget=70, **models), alone)
        batched = model.token_rewards([*long[0], prompts[2]], [*long[1], completions[2]], **models)
        assert_close(batched[2:], alone[2:3])
        assert_close(loaded.token_rewards(prompts, completions, **models), alone)
        for scorer in (model, loaded):
            assert_close([score.rewards for score in scorer.score(*texts, **models)], alone)

        for prompt, completion, f, rewards in zip(prompts, completions, f_of(model, prompts, completions), alone):
            values = f.double()
            values = values + log_probs_of(reference, prompt, completion) if reference is not None else values
            values = values - log_probs_of(policy, prompt, completion) if policy is not None else values
            last = len(completion) - 1
            supervised = {
                "sparse": [last],
                "step": [t for t, token in enumerate(completion) if token == newline or t == last],
                "interval": [t for t in range(last + 1) if t % 4 == 3 or t == last],
                "dense": list(range(last + 1)),
            }[granularity]
            following = [min(k for k in supervised if k >= t) for t in range(last + 1)]
            assert granularity != "dense" or bool((rewards.abs() < 10).any())  # not everything is clipped
            assert_close([rewards], [[max(-10.0, min(10.0, float(values[k]))) for k in following]])


def test_rewards_are_divided_by_the_temperature_before_the_clip(saved, pairs):
    model = saved["token"]
    values = torch.cat(f_of(model, *pairs))
    beta = float((values / 4).abs().median())  # half of the rewards are clipped
    model.settings = RewardSettings(head="token", beta_clip=beta, temperature=4.0)
    expected = [(f.double() / 4).clamp(-beta, beta) for f in f_of(model, *pairs)]
    assert_close(model.token_rewards(*pairs), expected)


# ---------- settings and card ----------


@pytest.mark.parametrize("head", HEADS)
def test_reward_forms_and_required_models(head):
    default = RewardSettings(head=head)
    assert default.form == default_reward_form(head)
    assert not default.adds_reference
    assert not default.subtracts_policy  # no default reward needs the policy
    both = RewardSettings(head=head, reward_form="logit_plus_logprob")
    assert both.adds_reference
    assert both.subtracts_policy == RewardSettings(head=head, reward_form="logit").subtracts_policy
    assert both.subtracts_policy == (head in ("airl", "implicit"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "token", "reward_form": "f"}, "reward_form f is for the heads airl and implicit; with head token"),
        ({"head": "action", "reward_form": "f"}, "with head action use logit"),
        ({"reward_form": "logits"}, "unknown reward_form 'logits': did you mean 'logit'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_invalid_settings_raise(wrong, message):
    with pytest.raises(InputError, match=message):
        RewardSettings(**wrong)


@pytest.mark.parametrize("gold", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_card_reports_use_of_gold_answers(tiny_model_folder, tokenizer, tmp_path, head, gold):
    build(tiny_model_folder, tokenizer, head, uses_gold_answers=gold).save_pretrained(tmp_path / "rm", "A note.")
    card = (tmp_path / "rm" / "README.md").read_text()
    assert ("gold answers" in card) == gold
    assert ("- **uses gold answers**" in card) == gold
    assert TokenRewardModel.from_pretrained(str(tmp_path / "rm")).settings.uses_gold_answers == gold
    assert f"`{head}`" in card
    assert ("AutoModelForCausalLM" in card) == (head in ("action", "implicit"))
    assert ("head.safetensors" in card) == (head == "action")
    assert ("log-prob taken out" in card) == (head in ("airl", "implicit"))
    assert card.rstrip().endswith("A note.")


def test_card_names_the_reward_form():
    for form, text in (("logit", "rewarded the log-odds\n"), ("f", "rewarded f\n")):
        assert text in model_card(RewardSettings(head="airl", reward_form=form), "")
    settings = RewardSettings(reward_form="logit_plus_logprob", reference_model="some/policy")
    assert "rewarded the log-odds plus the log-prob under `some/policy`\n" in model_card(settings, "")


# ---------- options of a run ----------


@pytest.fixture
def configure(tmp_path):
    return lambda **options: AdversarialConfig(output_dir=str(tmp_path), report_to="none", **options)


@pytest.mark.parametrize(
    ("head", "form"), [("token", "logit"), ("action", "logit_plus_logprob"), ("airl", "f"), ("implicit", "f")]
)
def test_default_reward_form_of_each_head(configure, head, form):
    assert configure(head=head).reward_form == form
    assert configure(head=head, reward_form="logit").reward_form == "logit"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"objective": "wgan"}, ["objective wgan", "--gradient_penalty 10", "--spectral_norm true"]),
        ({"objective": "wgan", "r1_penalty": 1.0}, ["objective wgan", "--gradient_penalty 10"]),
        ({"spectral_norm": True, "head": "implicit"}, ["spectral_norm", "head implicit has none"]),
        ({"expert_nll": 0.1, "head": "token"}, ["expert_nll", "action or implicit, not token"]),
        ({"expert_nll": 0.1, "head": "airl"}, ["expert_nll", "action or implicit, not airl"]),
        ({"reward_form": "f", "head": "action"}, ["reward_form f", "with head action use logit"]),
        ({"reward_form": "f", "head": "token"}, ["reward_form f", "with head token use logit"]),
        (
            {"discriminator_gate_high": 0.9, "held_out_fraction": 0.0},
            ["discriminator_gate_high", "--held_out_fraction 0.1"],
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "num_generations": 8, "warmup_rollouts": 12},
            ["warmup_rollouts 12", "multiple"],
        ),
        ({"objective": "nnpu"}, ["objective nnpu", "--perturbed_per_expert 0"]),
        (
            {"objective": "nnpu", "perturbed_per_expert": 0, "negatives": "disagreeing"},
            ["objective nnpu", "--negatives all"],
        ),
        (
            {"objective": "nnpu", "perturbed_per_expert": 0, "held_out_fraction": 0.0},
            ["objective nnpu", "--positive_prior"],
        ),
        ({"balance": "model"}, ["balance model", "--balance question"]),
        ({"positive_prior": 0.4}, ["--positive_prior 0.4", "--objective nnpu"]),
        ({"head": "implict"}, ["unknown head", "did you mean 'implicit'"]),
        ({"objective": "pairwis"}, ["unknown objective", "did you mean 'pairwise'"]),
        ({"reward_form": "logits"}, ["unknown reward_form", "did you mean 'logit'"]),
        ({"gradient_penalty": -1.0}, ["gradient_penalty must be at least 0, not -1"]),
        ({"r1_penalty": float("nan")}, ["r1_penalty must be at least 0, not nan"]),
        ({"token_dropout": 0.95}, ["token_dropout must be between 0 and 0.9, not 0.95"]),
        ({"label_smoothing": 0.5}, ["label_smoothing must be between 0 and 0.499, not 0.5"]),
        ({"interval": 0}, ["interval must be at least 1, not 0"]),
    ],
)
def test_invalid_option_combinations_raise_with_the_fix(configure, options, parts):
    with pytest.raises(InputError) as caught:
        configure(**options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "wgan", "gradient_penalty": 10.0},
        {"objective": "wgan", "spectral_norm": True},
        {"spectral_norm": True, "head": "airl"},
        {"expert_nll": 0.1, "head": "implicit"},
        {"expert_nll": 0.1, "head": "action"},
        {"reward_form": "f", "head": "implicit"},
        {"discriminator_gate_high": 0.8, "held_out_fraction": 0.1},
        {"held_out_fraction": 0.0},
    ],
)
def test_valid_option_combinations_are_accepted(configure, options):
    config = configure(**options)
    assert all(getattr(config, name) == value for name, value in options.items())
