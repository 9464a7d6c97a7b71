"""`tracereward fit`: what it learns, leaves behind, resumes and refuses, on generated traces and a tiny model."""

import errno
import json
import random
import signal
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.command_line import command, refused  # noqa: F401
from helpers.hub import hub  # noqa: F401
from helpers.tiny import launcher, options, rows, trap, weights
from helpers.unloadable import unloadable
from tracereward import TokenRewardModel, as_reward_func, fit
from tracereward.errors import InputError, RunFailed
from tracereward.files import write_jsonl
from tracereward.synthetic.arithmetic import generate

READOUT = {"task": "arithmetic"}
TUNED = {**READOUT, "readout": False, "head": "action", "learning_rate": 3e-3, "updates": 20, "save_steps": 8}
FEW = {**TUNED, "updates": 2}


def dropped_borrows(prompt: str) -> str | None:
    """A problem worked with v - k + 10 where v - k needs a borrow; None outside the vocabulary."""
    words = prompt.removesuffix(" = ?\n").split(" ")
    value, lines = int(words[0]), []
    for operator, operand in zip(words[1::2], map(int, words[2::2])):
        borrowed = 10 if operator == "-" and value % 10 < operand else 0
        result = value + operand if operator == "+" else value - operand + borrowed
        if not 0 <= result <= 40:
            return None
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def longer(trace: str) -> str:
    """The same working with one more line, as no expert writes it."""
    working, _, last = trace.rpartition("\n")
    value = last.removeprefix("#### ")
    return f"{working}\n{value} + 0 = {value}\n{last}"


def logged(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> tuple[list[dict], list[dict]]:
    """Demonstrations, and four candidates each of two models, of which one is right more often."""
    rng = random.Random(seed)
    problems = [
        (row, wrong)
        for row in generate("misconception", 4 * count, seed, exclude=exclude)
        if (wrong := dropped_borrows(row["prompt"])) not in (None, row["completion"])
    ][:count]
    assert len(problems) == count
    candidates = []
    for row, wrong in problems:
        for model, share in (("strong", 0.7), ("strong", 0.7), ("weak", 0.3), ("weak", 0.3)):
            text = longer(row["completion"] if rng.random() < share else wrong)
            candidates.append({"prompt": row["prompt"], "completion": text, "model": model, "logprob": -rng.random()})
    demonstrations = [{"prompt": row["prompt"], "completion": row["completion"]} for row, _ in problems]
    return demonstrations, candidates


DEMONSTRATIONS, CANDIDATES = logged(100, seed=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The rows in files; and a model that cannot be loaded."""
    folder = tmp_path_factory.mktemp("logs")
    write_jsonl(folder / "experts.jsonl", DEMONSTRATIONS)
    write_jsonl(folder / "logged.jsonl", CANDIDATES)
    return folder


@pytest.fixture(scope="module")
def given(files, tiny_model_folder):
    """Options that every run needs."""
    return {
        "demonstrations": files / "experts.jsonl",
        "candidates": files / "logged.jsonl",
        "model": tiny_model_folder,
    }


@pytest.fixture(scope="module")
def done(files, given):
    """A finished read-out."""
    result = launcher()("fit", *options(**given, **READOUT, output_dir=files / "run"))
    assert result.code == 0, result.err
    return files / "run", result


@pytest.fixture(scope="module")
def tuned(files, given):
    """A finished fine-tuning."""
    result = launcher()("fit", *options(**given, **TUNED, output_dir=files / "tuned"))
    assert result.code == 0, result.err
    return files / "tuned"


def auroc_within(model: TokenRewardModel, demonstrations: list[dict]) -> float:
    """Share of problems whose right working, with the extra line, gets a higher mean reward than the wrong one."""
    prompts = [row["prompt"] for row in demonstrations for _ in range(2)]
    texts = [
        longer(text) for row in demonstrations for text in (row["completion"], str(dropped_borrows(row["prompt"])))
    ]
    values = [sum(scores.rewards) / len(scores.rewards) for scores in model.score(prompts, texts)]
    return sum(right > wrong for right, wrong in zip(values[::2], values[1::2], strict=True)) / len(demonstrations)


NEW, _ = logged(60, seed=6, exclude=frozenset(row["prompt"] for row in DEMONSTRATIONS))


def test_readout_learns_what_is_right_on_new_problems(done):
    folder, _ = done
    model = TokenRewardModel.from_pretrained(folder / "reward_model")
    assert auroc_within(model, NEW) > 0.85
    stored = json.loads((folder / "verdict.json").read_text())
    assert stored["aurocs"]["reward"]["within_prompt"] > 0.9
    assert stored["questions"] == 20
    prompts, texts = [row["prompt"] for row in NEW], [row["completion"] for row in NEW]
    means = [sum(scores.rewards) / len(scores.rewards) for scores in model.score(prompts, texts)]
    assert as_reward_func(model)(prompts=prompts, completions=texts) == pytest.approx(means)


def test_run_folder_names_the_rule_and_the_verdict(done):
    folder, result = done
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["task"] == "arithmetic"
    assert config.keys().isdisjoint({"updates", "lora_r", "head"})  # without effect
    settings = json.loads((folder / "reward_model" / "tracereward.json").read_text())
    assert settings["label_rule"] == "agreeing/disagreeing"
    assert settings["calibration"]["traces"] == 80
    line = json.loads((folder / "verdict.json").read_text())["line"]
    card = (folder / "reward_model" / "README.md").read_text()
    report = (folder / "report.html").read_text()
    for text in (card, report, result.err):
        assert "agreeing/disagreeing" in text
        assert line in text.replace("&#43;", "+")
        assert "by agreement with the answer that the demonstration states (80)" in text
    assert "<h2>Training</h2>" not in report  # one point is no curve
    (row,) = [row for row in rows(folder / "metrics.jsonl") if row["phase"] == "fit"]
    assert row["readout/cross_validated_auroc"] > 0.9
    assert row["discriminator/held_out_accuracy"] > 0.5
    assert 0 <= row["monitor/perturbation_auroc"] <= 1
    assert row["surface/auroc"] > 0.7  # the additional line
    assert (
        result.err.count("surface features alone distinguish")
        == report.count("surface features alone distinguish")
        == 1
    )


@pytest.mark.long
def test_learning_curve_is_written_and_shown(given, done, files):
    folder = files / "curve"
    states = done[0] / "checkpoints" / "states"
    words = options(**given, **READOUT, learning_curve="true", states=states, output_dir=folder)
    result = launcher()("fit", *words)
    assert result.code == 0, result.err
    assert not (folder / "checkpoints" / "states").exists()
    curve = json.loads((folder / "learning_curve.json").read_text())
    assert [point["questions"] for point in curve["measured"]] == [8, 16, 32, 56, 80]
    assert [point["questions"] for point in curve["extrapolated"]] == [160, 320]
    # All questions, measured by the states' scores, is the read-out itself.
    verdict = json.loads((folder / "verdict.json").read_text())
    assert curve["measured"][-1]["value"] == pytest.approx(verdict["aurocs"]["reward"]["within_prompt"], abs=0.02)
    last = curve["verdicts"][-1]["comparisons"]
    assert last[0] == verdict["comparisons"][0]
    assert [one["baseline"] for one in last] == [one["baseline"] for one in verdict["comparisons"]]
    assert curve["line"] in result.err
    assert "Learning curve" in (folder / "report.html").read_text()
    assert "first error" in result.err  # its rule, or why there is none


def test_fine_tuning_learns_and_logs_each_update(tuned):
    assert auroc_within(TokenRewardModel.from_pretrained(tuned / "reward_model"), NEW) > 0.8
    metrics = [row for row in rows(tuned / "metrics.jsonl") if row["phase"] == "fit"]
    assert [row["step"] for row in metrics] == list(range(1, 21))
    assert "surface/auroc" in metrics[0]
    assert metrics[-1]["discriminator/loss"] < metrics[0]["discriminator/loss"]
    assert metrics[9]["discriminator/held_out_accuracy"] > 0.5
    assert "monitor/perturbation_auroc" in metrics[9]


def test_fine_tuning_starts_from_the_readout(done, tiny_model_folder):
    """With a learning rate that moves nothing, the rewards are the read-out's."""
    options = {"readout": False, "updates": 1, "learning_rate": 1e-12}
    fitted = fit(DEMONSTRATIONS, CANDIDATES, model=str(tiny_model_folder), **READOUT, **options)
    model = TokenRewardModel.from_pretrained(done[0] / "reward_model")
    prompts, texts = [row["prompt"] for row in NEW[:8]], [row["completion"] for row in NEW[:8]]
    pairs = zip(model.score(prompts, texts), fitted.reward_model.score(prompts, texts), strict=True)
    for before, after in pairs:
        assert after.rewards == pytest.approx(before.rewards, abs=1e-4)


def test_the_artefact_reranks_and_is_inspected(done, files, command, tmp_path):
    folder, _ = done
    write_jsonl(tmp_path / "few.jsonl", [{**row, "answer": "1"} for row in CANDIDATES[:8]])
    ranked = command("rerank", folder / "reward_model", tmp_path / "few.jsonl", "-o", tmp_path / "chosen.jsonl")
    assert ranked.code == 0, ranked.err
    page = command("inspect", tmp_path / "few.jsonl", "--model", folder / "reward_model", "-o", tmp_path / "page.html")
    assert page.code == 0, page.err


@pytest.mark.parametrize(
    ("name", "trapped", "code"),
    [
        ("killed", trap("open", "metrics.jsonl", 14), -signal.SIGKILL),
        pytest.param("stopped", trap("open", "metrics.jsonl", 5, number=signal.SIGINT), 130, marks=pytest.mark.long),
        pytest.param(
            "unmarked", trap("rename", "checkpoint-16/complete.json"), -signal.SIGKILL, marks=pytest.mark.long
        ),
    ],
)
def test_resumed_fine_tuning_equals_an_uninterrupted_one(name, trapped, code, tuned, given, files):
    folder = files / name
    words = ["fit", *options(**given, **TUNED, output_dir=folder)]
    first = launcher()(*words, trap=trapped)
    assert first.code == code, first.err
    again = launcher()("fit", "--output_dir", folder, "--resume")
    assert again.code == 0, again.err
    assert_same(tuned, folder)


def test_resumed_readout_equals_an_uninterrupted_one(done, given, files):
    """Killed when it would write the reward model; the states are read from the disk then."""
    folder = files / "readout"
    words = ["fit", *options(**given, **READOUT, output_dir=folder)]
    assert launcher()(*words, trap=trap("rename", "/reward_model")).code == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints" / "states").iterdir()}
    again = launcher()("fit", "--output_dir", folder, "--resume")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints" / "states").iterdir()} == written
    assert_same(done[0], folder)


@pytest.mark.long
def test_interrupted_readout_keeps_the_states_it_has(done, given, files):
    """Ctrl-C when the first file of states is complete."""
    folder = files / "interrupted"
    stop = trap("rename", ".safetensors", number=signal.SIGINT)
    first = launcher()("fit", *options(**given, **READOUT, output_dir=folder), trap=stop)
    assert first.code == 130, first.err
    assert "--resume" in first.err
    assert not (folder / "reward_model").exists()
    assert len(list((folder / "checkpoints" / "states").iterdir())) == 1
    again = launcher()("fit", "--output_dir", folder, "--resume")
    assert again.code == 0, again.err
    assert_same(done[0], folder)


def assert_same(one, other):
    """The same weights, metrics and verdict."""
    expected, found = weights(one / "reward_model"), weights(other / "reward_model")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[tensor], found[tensor]) for tensor in expected)
    assert rows(other / "metrics.jsonl") == rows(one / "metrics.jsonl")
    assert (other / "verdict.json").read_text() == (one / "verdict.json").read_text()


def trained(tiny_model_folder, demonstrations, candidates, **more):
    """Weights of a short run from rows in memory."""
    fitted = fit(demonstrations, candidates, model=str(tiny_model_folder), **{**FEW, **more})
    return {name: value.clone() for name, value in fitted.reward_model.state_dict().items()}, fitted


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_lists_tables_and_data_sets_give_the_same_model(tiny_model_folder, tmp_path):
    listed, fitted = trained(tiny_model_folder, DEMONSTRATIONS, CANDIDATES)
    assert fitted.folder is None
    assert fitted.label_rule == "agreeing/disagreeing"
    assert fitted.verdict.questions == 20
    table, _ = trained(tiny_model_folder, pd.DataFrame(DEMONSTRATIONS), Dataset.from_list(CANDIDATES))
    assert same(listed, table)
    _, fitted = trained(tiny_model_folder, DEMONSTRATIONS, CANDIDATES, output_dir=tmp_path / "run")
    assert fitted.folder == tmp_path / "run"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert rows(tmp_path / "run" / "candidates.jsonl") == CANDIDATES
    assert config["candidates"] == str(tmp_path / "run" / "candidates.jsonl")


def test_nothing_is_learned_from_held_out_questions(tiny_model_folder):
    """Other traces of the held-out questions change the verdict and no weight."""
    before, fitted = trained(tiny_model_folder, DEMONSTRATIONS, CANDIDATES)
    chosen = random.Random("held out 42").sample(range(100), 20)
    held_out = {DEMONSTRATIONS[index]["prompt"] for index in chosen}
    swapped = [
        {**row, "completion": longer(str(dropped_borrows(row["prompt"])))} if row["prompt"] in held_out else row
        for row in CANDIDATES
    ]
    after, changed = trained(tiny_model_folder, DEMONSTRATIONS, swapped)
    assert same(before, after)
    assert changed.verdict.comparisons != fitted.verdict.comparisons
    others = [
        row if row["prompt"] in held_out else {**row, "completion": longer(row["completion"])} for row in CANDIDATES
    ]
    assert not same(before, trained(tiny_model_folder, DEMONSTRATIONS, others)[0])


@pytest.mark.parametrize(
    ("more", "used"),
    [
        ({"objective": "nnpu", "positive_prior": 0.5, **FEW}, True),
        pytest.param(
            {"objective": "bce", "positives": "expert", "negatives": "all", **READOUT}, True, marks=pytest.mark.long
        ),
        pytest.param(FEW, False, marks=pytest.mark.long),
    ],
    ids=["nnpu", "bce", "agreeing"],
)
def test_candidates_of_questions_without_a_demonstration(more, used, tiny_model_folder, capsys):
    """They change the weights where the rule lets them, and never what is held out."""
    _, further = logged(30, seed=7, exclude=frozenset(row["prompt"] for row in DEMONSTRATIONS))
    states, verdicts = [], []
    for candidates in (CANDIDATES, CANDIDATES + further):
        fitted = fit(DEMONSTRATIONS, candidates, model=str(tiny_model_folder), **more)
        states.append(dict(fitted.reward_model.state_dict()))
        verdicts.append(fitted.verdict)
    assert same(*states) is not used
    assert verdicts[0].questions == verdicts[1].questions == 20
    assert verdicts[0].aurocs["logprob"] == verdicts[1].aurocs["logprob"]  # of the rows: the same held-out ones
    assert f"{'120 of 120' if used else '120'} candidates of questions without" in capsys.readouterr().err


def test_a_run_is_uploaded_and_tracked(hub, tiny_model_folder, tmp_path):
    folder, few = tmp_path / "mine", {"model": str(tiny_model_folder), **READOUT}
    more = {"push_to_hub": True, "report_to": ["tensorboard"], "output_dir": folder}
    fit(DEMONSTRATIONS[:20], CANDIDATES[:80], **few, **more)
    stored = hub.repositories["alice/mine"].files()
    assert {"model.safetensors", "tracereward.json", "verdict.json", "tokenizer.json"} <= stored.keys()
    assert b'from_pretrained("alice/mine")' in stored["README.md"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    (row,) = [row for row in rows(folder / "metrics.jsonl") if row["phase"] == "fit"]
    numbers = {
        f"train/fit/{name}": value for name, value in row.items() if isinstance(value, int | float) and name != "step"
    }
    tried = [name for name in numbers if name.startswith("train/fit/readout/auroc/")]
    assert len(tried) == len(set(tried)) >= 3
    assert max(numbers[name] for name in tried) == row["readout/cross_validated_auroc"]
    for name, value in numbers.items():
        assert events.Scalars(name)[0].value == pytest.approx(value), name
    assert "train/verdict/questions" in events.Tags()["scalars"]
    hub.faults.append(("POST /api/repos/create", 403))
    with pytest.raises(InputError, match="--push_to_hub"):
        fit(DEMONSTRATIONS[:20], CANDIDATES[:80], **few, push_to_hub=True, output_dir=tmp_path / "other")
    assert not (tmp_path / "other" / "reward_model").exists()


def test_own_labels_come_before_agreement(tiny_model_folder):
    """Labels that contradict the answers turn the AUROC round."""
    _, fitted = trained(tiny_model_folder, DEMONSTRATIONS, CANDIDATES)
    right = {row["prompt"]: row["completion"].rpartition("\n")[2] for row in DEMONSTRATIONS}
    labelled = [{**row, "correct": row["completion"].rpartition("\n")[2] != right[row["prompt"]]} for row in CANDIDATES]
    _, turned = trained(tiny_model_folder, DEMONSTRATIONS, labelled)
    value = fitted.verdict.aurocs["reward"]["within_prompt"]
    assert turned.verdict.aurocs["reward"]["within_prompt"] == pytest.approx(1 - value)


def test_lora_on_the_readout_trains_with_weights_by_model(tiny_model_folder):
    more = {"head": "token", "use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"], "objective": "bce"}
    more |= {"balance": "model", "dtype": "float32"}
    state, fitted = trained(tiny_model_folder, DEMONSTRATIONS, CANDIDATES, **more)
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in state.items())
    assert fitted.reward_model.settings.head == "token"


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"candidates": None}, ["--candidates"]),
        ({"model": None}, ["--model"]),
        ({"lora_r": 4}, ["--lora_r 4", "--use_peft true"]),
        ({"label_smoothing": 0.2}, ["--label_smoothing 0.2", "--objective bce"]),
        ({"use_peft": True, "lora_target_modules": "q_prj"}, ["--lora_target_modules q_prj", "did you mean 'q_proj'"]),
        ({"learning_curve": True}, ["--learning_curve true", "--readout false"]),
        ({"readout": True, "head": "token"}, ["--updates 20", "--readout false"]),
        ({"objective": "nnpu", "positives": "agreeing"}, ["nnpu", "--positives expert"]),
        ({"positives": "expret"}, ["positives", "expert"]),
        ({"dataset_name": "x.jsonl"}, ["demonstrations"]),
        ({"max_completion_length": 6}, ["traces are over 6 tokens", "--on_long drop"]),
        ({"template": "chat"}, ["chat template"]),
        ({"held_out_fraction": 1}, ["held_out_fraction"]),
        ({"hub_model_id": "me/rm"}, ["--hub_model_id me/rm", "--push_to_hub true"]),
        ({"run_name": "first"}, ["--run_name first", "--report_to"]),
        ({"report_to": "tensorbord"}, ["--report_to tensorbord", "did you mean 'tensorboard'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_a_model_is_loaded(changed, parts, given, command, tmp_path):
    bare = unloadable(given["model"], tmp_path / "bare")
    words = {**given, **TUNED, "model": bare, "output_dir": tmp_path / "run", **changed}
    words = {name: value for name, value in words.items() if value is not None}
    refused(command("fit", *options(**words)), *parts)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_rows_that_cannot_be_compared_are_refused(tiny_model_folder, monkeypatch):
    model = {"model": str(tiny_model_folder), **FEW}
    elsewhere = [{**row, "prompt": f"9 + {row['prompt']}"} for row in CANDIDATES]
    with pytest.raises(InputError, match="no candidate has the prompt of a demonstration"):
        fit(DEMONSTRATIONS, elsewhere, **model)
    right = {row["prompt"]: row["completion"] for row in DEMONSTRATIONS}
    agreeing = [{"prompt": prompt, "completion": longer(text)} for prompt, text in right.items()]
    with pytest.raises(InputError, match="one class only"):
        fit(DEMONSTRATIONS, agreeing, **model)
    with pytest.raises(InputError, match=r"candidates\[1\]"):
        fit(DEMONSTRATIONS, [CANDIDATES[0], {"prompt": "1 + 1 = ?\n"}], **model)
    with pytest.raises(InputError, match="no candidate has the field model"):
        fit(DEMONSTRATIONS, [{**row, "model": None} for row in CANDIDATES], **model, balance="model")
    with pytest.raises(InputError, match=r"1 of 1 questions .* give more questions"):
        fit(DEMONSTRATIONS[:1], CANDIDATES[:4], **model)
    with pytest.raises(InputError, match="did you mean 'learning_rate'"):
        fit(DEMONSTRATIONS, CANDIDATES, **model, learning_rat=1)
    for wrong, named in (
        ({"use_peft": "no"}, "use_peft must be True or False, not 'no'"),
        ({"use_peft": True, "lora_target_modules": "q_proj"}, "lora_target_modules must be a list"),
        ({"model": 3}, "model must be a text, not 3"),
        ({"chat_template_kwargs": "{}"}, "chat_template_kwargs must be a dict"),
    ):
        with pytest.raises(InputError, match=named):
            fit(DEMONSTRATIONS, CANDIDATES, **{**model, **wrong})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        fit(DEMONSTRATIONS, CANDIDATES, **model)


def test_a_disk_without_room_for_states_is_named(tiny_model_folder, tmp_path, monkeypatch):
    """Before anything is read if they cannot fit; with what is kept if the disk gets full on the way."""
    few = {"model": str(tiny_model_folder), "states": str(tmp_path / "states"), **READOUT}

    def full(cache, keys, found):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tracereward.modeling.hidden_states.StateCache.write", full)
        with pytest.raises(RunFailed, match=r"the disk of .*states is full .* states that were read are kept"):
            fit(DEMONSTRATIONS[:8], CANDIDATES[:32], **few)
    free = {tmp_path: 100}
    monkeypatch.setattr(
        "tracereward.files.shutil.disk_usage", lambda path: SimpleNamespace(free=free.get(path, 10**12))
    )
    with pytest.raises(InputError, match=r"states: .* needed for the model's states on 30 traces.* --states"):
        fit(DEMONSTRATIONS[:8], CANDIDATES[:32], **few)


def test_numbers_that_are_not_finite_end_the_run(tiny_model_folder, tmp_path):
    options = {**FEW, "updates": 9, "learning_rate": 1e30, "output_dir": tmp_path / "run"}
    with pytest.raises(RunFailed, match=r"stopped after step \d of 9: the .*discriminator's .* A lower learning rate"):
        fit(DEMONSTRATIONS, CANDIDATES, model=str(tiny_model_folder), **options)
    assert not (tmp_path / "run" / "reward_model").exists()


def test_a_finished_run_is_not_overwritten(done, given):
    folder, _ = done
    again = launcher()("fit", *options(**given, **TUNED, output_dir=folder))
    assert again.code == 2
    assert "already has a run" in again.err
    other = launcher()("train", "--output_dir", folder, "--resume")
    assert other.code == 2
    assert "tracereward fit" in other.err
