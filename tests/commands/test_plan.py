"""`tracereward plan`, and the options that a training command chooses."""

import re
from dataclasses import replace

import pytest
import yaml
from trl import ModelConfig

from tracereward.commands.plan import make_plan
from tracereward.commands.plan_estimates import Lengths, advice, steps_of
from tracereward.commands.sft import run_sft
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.quickstart.shipped import BASE
from tracereward.reports.plan_text import WIDTH, plan_text
from tracereward.synthetic.arithmetic import generate
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import SupervisedConfig
from tracereward.training.memory import Setup, Shape, memory
from tracereward.training.options import DataArguments


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "experts.jsonl"
    short = generate("multi-skill", 16, seed=0)
    write_jsonl(path, short)
    return path


def test_plan_of_train(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = AdversarialConfig(output_dir=str(tmp_path / "run"), max_completion_length=24, report_to="none")
    plan = make_plan(
        "train",
        DataArguments(task="arithmetic", dataset_name=str(rows)),
        config,
        ModelConfig(str(BASE)),
        argv=["--dataset_name", str(rows)],
    )
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    lengths = [
        len(re.findall(r"\d+|\n|#### | = | [+*-] ", row["completion"])) + 1 for row in generate("multi-skill", 16, 0)
    ]
    assert (plan.demonstrations, plan.dropped) == (sum(n <= 24 for n in lengths), sum(n > 24 for n in lengths))
    assert plan.dropped > 0
    assert plan.run.endswith("--on_long drop")
    assert plan.batch == (8, 8, 1, 8)
    assert plan.steps == 15, "15 passes, each of one batch of 8 prompts"
    assert len(plan.samples) == 8
    assert 0 < plan.memory["process"] < plan.memory["peak"]
    assert set(plan.seconds) == {"start", "warm-up", "rollouts", "rewards", "discriminator", "policy", "report"}
    assert all(seconds > 0 for seconds in plan.seconds.values())
    text = plan_text(plan)
    assert max(len(line) for line in text.splitlines() if not line.startswith("  tracereward")) <= WIDTH
    assert f"{plan.dropped} dropped" in " ".join(text.split())


def test_plan_is_of_train_or_sft():
    with pytest.raises(InputError, match="train or sft"):
        make_plan("grpo", DataArguments(), None, ModelConfig())


def test_lengths():
    assert Lengths.of([*range(1, 101)]) == Lengths(median=51, p95=95, longest=100)


@pytest.mark.parametrize(
    ("options", "prompts", "steps"),
    [
        # 60 prompts are 7 whole batches of 8: an incomplete one is left out
        ({"num_train_epochs": 14}, 60, 98),
        ({"num_train_epochs": 1, "num_iterations": 2}, 16, 4),
        ({"num_train_epochs": 1, "steps_per_generation": 16}, 32, 4),
        ({"max_steps": 5}, 60, 5),
    ],
)
def test_steps(options, prompts, steps):
    config = AdversarialConfig(
        per_device_train_batch_size=8, gradient_accumulation_steps=8, report_to="none", save_strategy="no", **options
    )
    assert steps_of(config, prompts) == steps


def test_advice_makes_it_fit():
    shape = Shape(layers=4, hidden=512, heads=8, kv_heads=8, intermediate=2048, vocabulary=1000, tied=False)
    setup = Setup(shape, "ddp", 1, rank=0, rows=64, accumulation=1)
    assert advice(setup, 0, 10**15) == ([], [])
    smaller = memory(replace(setup, rows=8, accumulation=8, discriminator_budget=2048))["peak"]
    [sentence], options = advice(setup, 0, int(smaller / 0.89))
    assert "smaller micro-batches" in sentence
    assert options[:4] == ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8"]
    [sentence], options = advice(setup, 0, 1000)
    assert "--use_peft" in sentence
    assert not options


def test_chosen_values_are_stored_and_kept(rows, tmp_path):
    """A resumed run has the values of its start, also if its data would now give others."""

    def run(resume=False, **options):
        config = SupervisedConfig(output_dir=str(tmp_path), report_to="none", max_steps=options.pop("steps"), **options)
        data = DataArguments(task="arithmetic", dataset_name=str(rows))
        return run_sft(data, config, ModelConfig(str(BASE)), resume=resume)

    run(steps=1, save_steps=1)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (stored["learning_rate"], stored["per_device_train_batch_size"]) == (3e-4, 8)
    assert "num_train_epochs" not in stored, "max_steps is given"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored | {"learning_rate": 5e-4}))
    run(resume=True, steps=2, save_steps=1)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == 5e-4
