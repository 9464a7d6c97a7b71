"""`tracereward push` and ``--push_to_hub`` against a stub of the Hub: what arrives, and what is refused before."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from trl import ModelConfig

from helpers.command_line import command, refused  # noqa: F401
from helpers.hub import contents, hub  # noqa: F401
from helpers.served import save_reward_model
from helpers.unloadable import unloadable
from tracereward.commands import train
from tracereward.commands.sft import run_sft
from tracereward.errors import InputError, RunFailed
from tracereward.files import write_jsonl
from tracereward.modeling.loading import load_causal_lm
from tracereward.rewards.model import RewardModel
from tracereward.synthetic.arithmetic import generate
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import SupervisedConfig
from tracereward.training.options import DataArguments


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, tiny_model_folder):
    """A finished run folder, with files that must stay here."""
    folder = tmp_path_factory.mktemp("push") / "my-run"
    save_reward_model(folder / "reward_model", tokenizer)
    shutil.copytree(tiny_model_folder, folder / "policy")
    (folder / "policy" / "README.md").write_text('---\nlibrary_name: transformers\n---\nfrom_pretrained("policy")\n')
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/checkpoint-2/optimizer.pt", "policy/optimizer.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays here")
    for name in ("train.jsonl", "trainer_state.json", "training_args.bin", "data.json", "model.safetensors.index.json"):
        (folder / "reward_model" / name).write_text("{}")
    (folder / "reward_model" / "verdict.json").write_text('{"outcome": "better"}')
    return folder


def uploaded(hub, name, revision="main"):
    return {file: content for file, content in hub.repositories[name].files(revision).items() if file[0] != "."}


def test_reward_model_arrives_byte_for_byte(hub, run, command):
    done = command("push", run / "reward_model", "alice/rm", "--private", "--revision", "v1", "--commit_message", "m1")
    assert (done.code, done.out) == (0, f"reward_model {hub.url}/alice/rm/tree/v1\n"), done.err
    repository = hub.repositories["alice/rm"]
    assert repository.private
    assert repository.messages == ["m1"]
    assert uploaded(hub, "alice/rm") == {}
    local, found = contents(run / "reward_model"), uploaded(hub, "alice/rm", "v1")
    assert found.keys() == {
        *("README.md", "config.json", "generation_config.json", "head.safetensors", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "tracereward.json", "verdict.json"),
    }
    card = local.pop("README.md").replace(b'from_pretrained("reward_model")', b'from_pretrained("alice/rm")')
    assert found.pop("README.md") == card
    assert found == {name: local[name] for name in found}
    model = RewardModel.from_pretrained("alice/rm", revision="v1")
    wanted = RewardModel.from_pretrained(run / "reward_model").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_run_folder_has_two_models_and_a_second_upload_replaces_the_weights(hub, run, command):
    old = {f"model-0000{part}-of-00002.safetensors": b"old" for part in (1, 2)} | {
        "model.safetensors.index.json": b"{}",
        "verdict.json": b"of the old weights",
    }
    hub.create("alice/all", old | {"notes.md": b"kept", "extra/model.safetensors": b"kept"})
    done = command("push", run, "all")
    assert done.out == f"policy {hub.url}/alice/all\nreward_model {hub.url}/alice/all-reward\n", done.err
    policy, reward_model = uploaded(hub, "alice/all"), uploaded(hub, "alice/all-reward")
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert policy.keys() == {*names, *tokenizer, "notes.md", "extra/model.safetensors"}
    assert b'from_pretrained("alice/all")' in policy["README.md"]
    assert "head.safetensors" in reward_model
    assert not hub.repositories["alice/all"].private
    weights = load_causal_lm("alice/all").state_dict()
    for name, weight in load_file(run / "policy" / "model.safetensors").items():
        assert torch.equal(weights[name], weight)


@pytest.mark.parametrize(
    ("name", "words", "parts"),
    [
        ("bob/x", [], ["bob/x", "403", "another owner"]),
        ("alice/a--b", [], ["alice/a--b", "not a name"]),
        ("alice/a/b", [], ["not a name"]),
        ("alice/x@v1", [], ["--revision"]),
        ("alice/public", ["--private"], ["public", "another name"]),
    ],
)
def test_repository_that_cannot_take_it_is_refused(hub, run, command, name, words, parts):
    hub.create("alice/public")
    refused(command("push", run / "policy", name, *words), *parts)
    assert not any(request.startswith("PUT") for request in hub.requests)


@pytest.mark.parametrize(
    ("token", "faults", "part"),
    [
        ("", [], "hf auth login"),
        ("hf_wrong", [], "not valid"),
        (None, [("whoami", 500)], "500"),
        (None, [("/commit/", 500)], "my-run/policy alice/x"),
        (None, [("auth-check", 403)], "write access"),
    ],
)
def test_what_is_wrong_with_the_token_or_the_hub_is_said(hub, run, command, monkeypatch, token, faults, part):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults += faults
    done = command("push", run / "policy", "alice/x")
    assert done.code == (1 if "/commit/" in str(faults) else 2)
    assert part in done.err
    assert "Traceback" not in done.err


def test_what_is_no_finished_model_is_refused_before_any_request(hub, run, command, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("policy", "reward_model"))
    cut = tmp_path / "cut"
    shutil.copytree(run / "policy", cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-4])
    bare = tmp_path / "bare"
    shutil.copytree(run / "policy", bare)
    (bare / "tokenizer.json").unlink()
    for folder, part in (
        (unfinished, "--resume"),
        (cut, "cut short"),
        (bare, "tokenizer"),
        (tmp_path / "no", "no such"),
    ):
        refused(command("push", folder, "alice/x"), part)
    assert hub.requests == []


def options(folder, model, **given):
    """Data, and the options of a tiny run that is uploaded."""
    write_jsonl(folder / "experts.jsonl", generate("misconception", 16, seed=5))
    data = DataArguments(task="arithmetic", dataset_name=str(folder / "experts.jsonl"))
    config = {
        "output_dir": str(folder / "my-run"),
        "push_to_hub": True,
        "per_device_train_batch_size": 8,
        "max_completion_length": 24,
        "max_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
    }
    return data, {**config, **given}, ModelConfig(model_name_or_path=str(model))


ADVERSARIAL = {"num_generations": 4, "discriminator_warmup_updates": 1, "warmup_rollouts": 2, "reward_form": "logit"}


def test_run_uploads_both_models_at_its_end(hub, tmp_path, tiny_model_folder):
    base = hub.create_from("lab/base", tiny_model_folder)
    hub.commit(base, "main", base.files() | {"README.md": b"---\nlicense: mit\n---\n"})
    data, given, _ = options(
        tmp_path, "", hub_model_id="lab/solver", hub_private_repo=True, hub_token="hf_of_alice", hub_revision="first"
    )
    config = AdversarialConfig(**given, **ADVERSARIAL)
    folder = train.run_train(data, config, ModelConfig(model_name_or_path="lab/base"))
    for name, kind in (("lab/solver", "policy"), ("lab/solver-reward", "reward_model")):
        found = uploaded(hub, name, "first")
        assert hub.repositories[name].private
        assert found["model.safetensors"] == (folder / kind / "model.safetensors").read_bytes()
        assert not {file for file in found if "optim" in file or "jsonl" in file or "/" in file}
        assert not any(b"hf_of_alice" in content for content in found.values())
        card = ModelCard(found["README.md"].decode())
        assert (card.data.base_model, card.data.license) == ("lab/base", "mit")
        assert "tracereward" in card.data.tags
        assert "16 demonstrations of the task `arithmetic` (experts.jsonl)" in card.text
        assert f'from_pretrained("{name}")' in card.text
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = next(row for row in reversed(rows) if row["phase"] == "train")
        assert f"| reward of the rollouts | {logged['reward']:.4g} |" in card.text
    assert b"hf_of_alice" not in (folder / "config.yaml").read_bytes()
    assert "push_to_hub: true" in (folder / "config.yaml").read_text()
    # A model trained from a folder names the base model of that folder's card.
    data, given, _ = options(tmp_path, "", output_dir=str(tmp_path / "next"), push_to_hub=False)
    after = run_sft(data, SupervisedConfig(**given), ModelConfig(model_name_or_path=str(folder / "policy")))
    assert ModelCard.load(after / "policy" / "README.md").data.base_model == "lab/base"


@pytest.mark.parametrize(
    ("given", "token", "part"),
    [
        ({}, "", "hf auth login"),
        ({"hub_token": "hf_wrong"}, None, "not valid"),
        ({"hub_model_id": "bob/x"}, None, "another owner"),
        ({"hub_model_id": "a b"}, None, "not a name"),
    ],
)
def test_upload_that_cannot_work_is_refused_before_the_model_is_loaded(
    hub, tmp_path, tiny_model_folder, monkeypatch, given, token, part
):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    data, config, model = options(tmp_path, unloadable(tiny_model_folder, tmp_path / "bare"), **given)
    with pytest.raises(InputError, match=f"--push_to_hub: .*{part}"):
        train.run_train(data, AdversarialConfig(**config, **ADVERSARIAL), model)


def test_failed_upload_loses_nothing(hub, tmp_path, tiny_model_folder, command):
    data, config, model = options(tmp_path, tiny_model_folder)
    hub.faults.append(("/commit/", 500))
    with pytest.raises(RunFailed, match="the run is complete") as raised:
        run_sft(data, SupervisedConfig(**config), model)
    assert {path.name for path in (tmp_path / "my-run").iterdir()} >= {"policy", "report.html", "config.yaml"}
    hub.faults.clear()
    words = str(raised.value).partition("tracereward push ")[2].split()
    assert command("push", *words).code == 0
    assert uploaded(hub, "alice/my-run").keys() >= {"model.safetensors", "README.md"}
