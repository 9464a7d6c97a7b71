"""Trackers get every row of a run, its name and its options; one that is not installed is refused at once."""

import importlib.machinery
import sys
import types

import pytest
import trl.extras.profiling
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import ModelConfig
from trl.trainer import base_trainer, grpo_trainer

from tracereward.commands import train
from tracereward.errors import InputError
from tracereward.files import read_jsonl, write_jsonl
from tracereward.synthetic.arithmetic import generate
from tracereward.training import callbacks
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import SupervisedConfig
from tracereward.training.failures import Failure
from tracereward.training.options import DataArguments


@pytest.fixture
def run(tmp_path, tiny_model_folder):
    """Two steps of `train` with a validation set, reported to a tracker; returns the run folder."""

    def go(tracker, **options):
        rows = generate("misconception", 24, seed=5)
        write_jsonl(tmp_path / "experts.jsonl", rows[:16])
        write_jsonl(tmp_path / "validation.jsonl", rows[16:])
        data = DataArguments(
            task="arithmetic",
            dataset_name=str(tmp_path / "experts.jsonl"),
            validation_dataset_name=str(tmp_path / "validation.jsonl"),
        )
        given = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 24,
            "max_steps": 2,
            "save_steps": 1,
            "discriminator_warmup_updates": 3,
            "warmup_rollouts": 2,
            "reward_form": "logit",
            "disable_tqdm": True,
            "output_dir": str(tmp_path / "my-run"),
        }
        config = AdversarialConfig(report_to=tracker, **given | options)
        return train.run_train(data, config, ModelConfig(model_name_or_path=str(tiny_model_folder)))

    return go


class FakeRun(types.SimpleNamespace):
    """What a tracker was told, for wandb's and trackio's interface."""

    def __init__(self):
        super().__init__(inits=[], rows=[], settings={}, ended=0, summary={}, id="1", url="")

    def init(self, **options):
        assert self.ended == 0, "started again after its end"
        self.inits.append(options)
        return self

    def log(self, row, step=None):
        assert self.ended == 0, "logged after its end"
        self.rows.append(row)

    def finish(self):
        self.ended += 1


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def fake(monkeypatch):
    """Installs a module that records what it is told."""

    def install(name):
        told = FakeRun()
        modules = {name: types.ModuleType(name)}
        if name == "wandb":
            for inner in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
                modules[inner] = types.ModuleType(inner)
            modules["wandb.sdk.lib.config_util"].ConfigError = ValueError
        for inner, module in modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(inner, None)
            monkeypatch.setitem(sys.modules, inner, module)
        module = modules[name]
        for user in (
            trl.extras.profiling,
            base_trainer,
            grpo_trainer,
        ):  # import it when they are imported, if it is installed
            monkeypatch.setattr(user, name, module, raising=False)
        module.config = told.settings = Config()
        module.run, module.init, module.log, module.finish = None, told.init, told.log, told.finish
        module.__version__ = "9"
        if name == "wandb":

            def init(**options):
                module.run = told.init(**options)

            module.init = init
            told._label = lambda **_: None
            module.define_metric = lambda *_, **__: None
        else:
            nothing = types.SimpleNamespace(get=lambda: None)
            module.context_vars = types.SimpleNamespace(
                current_space_id=nothing, current_project=nothing, current_run=nothing
            )
        return told

    return install


def test_tensorboard(run):
    folder = run("tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = read_jsonl(folder / "metrics.jsonl")

    def scalars(name):
        return [(event.step, event.value) for event in events.Scalars(name)]

    warm = [row for row in rows if row["phase"] == "warmup"]
    assert len(warm) == 3
    assert scalars("train/warmup/discriminator/loss") == [
        (row["update"], pytest.approx(row["discriminator/loss"])) for row in warm
    ]
    assert [step for step, _ in scalars("train/loss")] == [1, 2]
    choice = next(row for row in rows if row["phase"] == "choice")
    assert scalars("train/choice/accuracy") == [(2, pytest.approx(choice["accuracy"]))]
    text = {name: events.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}
    assert text["train/choice/chosen/text_summary"] == choice["chosen"]
    options = text["args/text_summary"]
    for part in ('"task": "arithmetic"', '"head": "action"', '"run_name": "my-run"', '"warmup_rollouts": 2'):
        assert part in options


@pytest.mark.parametrize("tracker", [pytest.param("wandb", marks=pytest.mark.long), "trackio"])
def test_failure_and_choice_reach_a_tracker_before_it_ends(run, fake, monkeypatch, tracker):
    told = fake(tracker)
    failure = Failure("entropy_collapse", 1, "made up")
    monkeypatch.setattr(callbacks, "detect", lambda history: failure)
    run(tracker)
    assert len(told.inits) == 1
    assert told.inits[0]["name"] == "my-run"
    assert told.settings["task"] == "arithmetic"
    assert told.settings["discriminator_warmup_updates"] == 3
    assert told.settings["template"] == "plain"
    values = {name: value for row in told.rows for name, value in row.items()}
    assert values["train/failure/failure"] == "entropy_collapse"
    assert values["train/failure/reason"] == "made up"
    assert "train/choice/accuracy" in values
    assert "train/reward" in values
    warm = [row["train/global_step"] for row in told.rows if "train/warmup/discriminator/loss" in row]
    assert warm == [1, 2, 3]
    assert told.ended == (tracker == "trackio")  # transformers leaves a wandb run open


def test_tracker_that_fails_does_not_end_the_run_unless_it_cannot_start(run, fake, tmp_path, monkeypatch, capsys):
    def refuse(row=None, **_):
        if not str(row).startswith("{'profiling/"):  # which TRL logs past its callbacks
            raise RuntimeError("no API key configured")

    told = fake("trackio")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["trackio"], "log", refuse)
        patch.setattr(sys.modules["trackio"], "finish", refuse)
        folder = run("trackio", run_name="another")
    assert (folder / "report.html").is_file()
    assert told.inits[0]["name"] == "another"
    assert "tracker failed (no API key configured)" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    with pytest.raises(InputError, match=r"trackio.*no API key"):
        run("trackio", output_dir=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("wandb", "pip install wandb"),
        (["tensorboard", "mlflow"], "pip install mlflow"),
        ("tensorbord", "did you mean 'tensorboard'"),
    ],
)
def test_missing_tracker_is_refused_before_anything_is_loaded(tmp_path, tracker, message):
    with pytest.raises(InputError, match=message):
        SupervisedConfig(output_dir=str(tmp_path), report_to=tracker)


def test_all_needs_one(tmp_path, monkeypatch):
    assert "tensorboard" in SupervisedConfig(output_dir=str(tmp_path), report_to="all").report_to
    monkeypatch.setattr("tracereward.training.trackers.PACKAGES", {"wandb": (lambda: False, "")})
    with pytest.raises(InputError, match="no tracker is installed"):
        SupervisedConfig(output_dir=str(tmp_path), report_to="all")
