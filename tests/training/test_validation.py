"""Validation questions: greedy accuracy, and the choice of the best checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from tracereward.commands.grpo import run_grpo
from tracereward.commands.sft import run_sft
from tracereward.commands.train import run_train
from tracereward.errors import InputError
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.modeling.rendering import Rendering
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards import first_error_fit
from tracereward.rewards.first_error_rules import FirstErrorRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import read_settings
from tracereward.runs import first_error, report, verdict
from tracereward.synthetic.arithmetic import generate
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RewardConfig, SupervisedConfig
from tracereward.training.options import DataArguments
from tracereward.training.validation import Validation, load_validation

TASK = get_task("arithmetic")
SHORT = {
    "max_completion_length": 24,
    "learning_rate": 1e-3,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 16,
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def greedy_by_hand(model, tokenizer, prompt, limit):
    """The most probable token after each prefix, one prefix at a time, without a cache or padding."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < limit and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_accuracy_is_the_share_of_correct_greedy_traces(tiny_model_folder, tokenizer):
    """Some answers agree with the model's; prompts of different lengths, three to a batch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    rows = generate("exposure", 4, seed=3) + generate("misconception", 4, seed=3)
    texts = [greedy_by_hand(model, tokenizer, row["prompt"], 12) for row in rows]

    class LastToken:
        def verify(self, text, gold):
            return text == gold

    gold = [text if place % 3 else text + " 1" for place, text in enumerate(texts)]
    validation = Validation(
        prompts=[row["prompt"] for row in rows],
        answers=gold,
        completions=[None] * len(rows),
        task=LastToken(),
        tokenizer=tokenizer,
        max_new_tokens=12,
        batch_size=3,
    )
    model.train()
    before = torch.get_rng_state()
    assert validation.accuracy(model) == pytest.approx(5 / 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert len(validation) == 8


def test_no_validation_without_a_dataset(tokenizer):
    assert (
        load_validation(DataArguments(), TASK, tokenizer, [], rendering=Rendering(), max_new_tokens=8, batch_size=8)
        is None
    )


def test_invalid_validation_questions_are_refused(tmp_path, tokenizer):
    rows = generate("misconception", 4, seed=3)
    data = DataArguments(task="arithmetic", validation_dataset_name=write(tmp_path / "v.jsonl", rows))
    trained_on = [{"prompt": rows[2]["prompt"], "source": "experts.jsonl, line 7"}]
    with pytest.raises(InputError, match=r"v\.jsonl.*3.*also trains on this question \(experts\.jsonl, line 7\)"):
        load_validation(data, TASK, tokenizer, trained_on, rendering=Rendering(), max_new_tokens=8, batch_size=8)
    del rows[1]["answer"]
    write(tmp_path / "v.jsonl", [{"prompt": row["prompt"], "answer": row.get("answer")} for row in rows])
    with pytest.raises(InputError, match=r"v\.jsonl.*2.*no answer"):
        load_validation(data, TASK, tokenizer, [], rendering=Rendering(), max_new_tokens=8, batch_size=8)


def test_conflicting_ways_of_validation_are_refused(tmp_path, tiny_model_folder):
    rows = generate("misconception", 40, seed=3)
    experts, questions = write(tmp_path / "e.jsonl", rows[:32]), write(tmp_path / "v.jsonl", rows[32:])
    data = DataArguments(task="arithmetic", dataset_name=experts, validation_dataset_name=questions)
    config = SupervisedConfig(**SHORT, output_dir=str(tmp_path / "run"), validation_fraction=0.2)
    with pytest.raises(InputError, match="validation_fraction"):
        run_sft(data, config, ModelConfig(model_name_or_path=str(tiny_model_folder)))


@pytest.fixture
def run(tmp_path, tiny_model_folder, monkeypatch):
    """A run of one kind whose start and checkpoints have scripted accuracies."""

    def go(kind, accuracies, resume=False, **options):
        rows = generate("misconception", 24, seed=5)
        data = DataArguments(
            task="arithmetic",
            dataset_name=write(tmp_path / "experts.jsonl", rows[:16]),
            validation_dataset_name=write(tmp_path / "validation.jsonl", rows[16:]),
        )
        values = iter(accuracies)
        monkeypatch.setattr(Validation, "accuracy", lambda self, policy: next(values))
        given = {**SHORT, "output_dir": str(tmp_path / "run"), **options}
        model = ModelConfig(model_name_or_path=str(tiny_model_folder))
        if kind == "sft":
            folder = run_sft(data, SupervisedConfig(**given), model, resume)
        elif kind == "grpo":
            folder = run_grpo(data, RewardConfig(**given, num_generations=4, reward="logprob"), model, resume)
        else:
            given |= {"discriminator_warmup_updates": 2, "discriminator_learning_rate": 1e-3, "warmup_rollouts": 2}
            given["reward_form"] = "logit"  # an untrained policy's log-probs would all be clipped
            config = AdversarialConfig(**given, num_generations=4, on_failure="ignore")
            folder = run_train(data, config, model, resume)
        assert next(values, None) is None
        return folder

    return go


def weights(path):
    return load_file(path / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def chosen(folder):
    return [row["chosen"] for row in metrics(folder) if row["phase"] == "choice"]


@pytest.mark.parametrize("kind", ["sft", "grpo", "train"])
def test_run_saves_the_best_checkpoint(run, kind, capsys):
    """The second of three; `save_total_limit` 2 keeps it."""
    folder = run(kind, [0.25, 0.5, 0.75, 0.625])
    checkpoints = folder / "checkpoints"
    final = weights(folder / "policy")
    assert same(final, weights(checkpoints / "checkpoint-2"))
    assert not same(final, weights(checkpoints / "checkpoint-3"))
    message = "Chosen by greedy accuracy on 8 validation questions: checkpoint-2 with 75.0 %; the start has 25.0 %."
    assert message in capsys.readouterr().err
    assert message in (folder / "report.html").read_text()
    rows = metrics(folder)
    assert [row["validation/accuracy"] for row in rows if "validation/accuracy" in row] == [0.5, 0.75, 0.625]
    (choice,) = [row for row in rows if row["phase"] == "choice"]
    assert choice["chosen"] == "checkpoint-2"
    assert (choice["start_accuracy"], choice["accuracy"], choice["questions"]) == (0.25, 0.75, 8)


def test_marks_are_fitted_on_what_was_not_trained_on(run, tiny_model_folder, monkeypatch, capsys):
    """Held-out experts, the verdict's rollouts, and the starting policy's for the other questions.

    Here every rollout of the starting policy counts as right.
    """
    given, rule = [], FirstErrorRule(threshold=-1.5, traces=16, hit_rate=0.625)

    def fit(model, traces, seed):
        given.extend(traces)
        return rule

    monkeypatch.setattr(first_error, "RIGHT_TRACES", 8)
    monkeypatch.setattr(verdict, "QUESTIONS", 5)
    monkeypatch.setattr(report, "SHOWN", 0)
    monkeypatch.setattr(first_error_fit, "fit_first_error", fit)
    monkeypatch.setattr(type(get_task("arithmetic")), "verify", lambda *_: True)
    folder = run("train", [0.25, 0.5, 0.75, 0.625], held_out_fraction=0.25)
    experts = generate("misconception", 24, seed=5)
    found = [(trace.prompt, trace.completion) for trace in given if trace.source == "expert"]
    assert found[4:] == [(row["prompt"], row["completion"]) for row in experts[16:]]
    held_out = dict(found[:4])
    assert held_out.items() <= {row["prompt"]: row["completion"] for row in experts[:16]}.items()
    rollouts = [(trace.prompt, trace.completion) for trace in given if trace.source == "rollout"]
    assert len(rollouts) == 5 * verdict.SAMPLES + 7
    assert all(trace.right for trace in [*given[: len(found)], *given[-7:]])
    judged = [prompt for prompt, _ in rollouts[: -7 : verdict.SAMPLES]]
    others = [prompt for prompt, _ in found if prompt not in judged]
    params = SamplingParams(max_new_tokens=SHORT["max_completion_length"], seed=SHORT.get("seed", 42), batch_size=128)
    sampled = []
    for source, prompts, n in ((folder / "policy", judged, verdict.SAMPLES), (tiny_model_folder, others, 1)):
        policy, tokenizer = AutoModelForCausalLM.from_pretrained(source), load_tokenizer(source)
        chunks = sample(policy, tokenizer, prompts, params, n=n)
        sampled += [(prompts[one.prompt], one.text) for chunk in chunks for one in chunk]
    assert rollouts == sampled
    assert read_settings(folder / "reward_model").first_error == rule
    line = "Suspected first error: in traces with 8 tokens in a row whose mean reward is below -1.5"
    assert line in capsys.readouterr().err
    assert line in (folder / "report.html").read_text()


def test_discriminator_is_saved_from_the_chosen_checkpoint(run):
    folder = run("train", [0.25, 0.75, 0.5, 0.25])
    state = torch.load(folder / "checkpoints" / "checkpoint-1" / "discriminator.pt", weights_only=True)["parameters"]
    kept = dict(TokenRewardModel.from_pretrained(str(folder / "reward_model")).named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", ["grpo", "train"])
def test_run_without_improvement_saves_the_starting_policy(run, kind, tiny_model_folder):
    folder = run(kind, [0.75, 0.5, 0.625, 0.25])
    assert same(weights(tiny_model_folder), weights(folder / "policy"))
    assert chosen(folder) == ["start"]
    if kind == "train":
        state = torch.load(folder / "checkpoints" / "warmup" / "discriminator.pt", weights_only=True)["parameters"]
        kept = dict(TokenRewardModel.from_pretrained(str(folder / "reward_model")).named_parameters())
        assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_ties_choose_the_last_checkpoint(run):
    folder = run("grpo", [0.5, 0.5, 0.5, 0.5])
    assert chosen(folder) == ["checkpoint-3"]


def test_resumed_run_remembers_its_best_checkpoint(run):
    run("grpo", [0.25, 0.75], max_steps=1)
    (folder,) = {run("grpo", [0.25, 0.5, 0.625], resume=True)}
    assert chosen(folder) == ["checkpoint-1"]
    assert same(weights(folder / "policy"), weights(folder / "checkpoints" / "checkpoint-1"))
