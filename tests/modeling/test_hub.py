"""Models of the Hub: names, revisions, downloads and what is said when one cannot be had."""

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save
from trl import ModelConfig

from helpers.hub import contents, hub  # noqa: F401
from helpers.served import save_reward_model, traces
from tracereward.commands import score_ray
from tracereward.commands.partial_output import Output
from tracereward.commands.score import ScoreOptions
from tracereward.errors import InputError
from tracereward.evaluate.suites import run_calibrate
from tracereward.generation.settings import recommended_options
from tracereward.modeling.hub import looks_local, with_revision
from tracereward.modeling.loading import check_model, load_causal_lm, model_fingerprint, new_classifier
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.engines import check_engine
from tracereward.rewards.model import RewardModel
from tracereward.runs.finish import load_policy


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("hub") / "rm", tokenizer)


def doubled(folder):
    """The files of a model with all weights doubled."""
    weights = {name: 2 * weight for name, weight in load_file(folder / "model.safetensors").items()}
    return contents(folder) | {"model.safetensors": save(weights, metadata={"format": "pt"})}


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "a-1/b.2_c", "a/b@v1", "a/b@refs/pr/3", "a/b@feature/x"):
        assert not looks_local(name)
        (tmp_path / name).mkdir(parents=True)
        assert looks_local(name)  # a folder comes first
    assert all(map(looks_local, ("model", "./a/x", "../x/y", "/a/b", "~/b", "runs/sft/policy", "a/b c")))
    assert with_revision("c/d", "main") == with_revision("c/d", None) == "c/d"
    assert with_revision("c/d", "v1") == with_revision("c/d@v1", "v1") == with_revision("c/d@v1", None) == "c/d@v1"
    with pytest.raises(InputError, match="remove one"):
        with_revision("c/d@v1", "v2")
    with pytest.raises(InputError, match="a folder has no revision"):
        with_revision("a/b", "v1")


def test_policy_by_name_and_revision(hub, tiny_model_folder):
    first = hub.create_from("alice/policy", tiny_model_folder)
    first.tags["v1"] = first.branches["main"]
    hub.commit(first, "main", doubled(tiny_model_folder))
    weights = load_file(tiny_model_folder / "model.safetensors")
    names = "alice/policy", "alice/policy@v1", f"alice/policy@{first.tags['v1']}"
    new, old, by_commit = (load_causal_lm(name).model.norm.weight for name in names)
    assert torch.equal(old, weights["model.norm.weight"])
    assert torch.equal(by_commit, old)
    assert torch.equal(new, 2 * old)
    check_model("alice/policy@v1")
    assert load_tokenizer("alice/policy@v1").get_vocab() == load_tokenizer(str(tiny_model_folder)).get_vocab()
    assert model_fingerprint("alice/policy@v1") == first.tags["v1"]
    options = ModelConfig(model_name_or_path="alice/policy", model_revision="v1")
    assert torch.equal(load_policy(options).model.norm.weight, old)
    assert torch.equal(load_policy(options, "alice/policy").model.norm.weight, 2 * old)
    assert torch.equal(new_classifier("alice/policy", revision="v1").model.norm.weight, old)
    hub.commit(first, "warm", first.files() | {"generation_config.json": b'{"temperature": 0.7}'})
    assert recommended_options("alice/policy@warm", {}) == {"temperature": 0.7, "settings": {}}


def test_reward_model_by_name_and_revision(hub, reward_model):
    repository = hub.create_from("alice/rm", reward_model, private=True)
    commit = repository.branches["v1"] = repository.branches["main"]
    hub.commit(repository, "main", doubled(reward_model))
    prompts, completions = zip(*traces(2), strict=True)
    ids = [[5, 6, 7]], [[8, 9, 1]]
    wanted = RewardModel.from_pretrained(reward_model)
    for options in ({"revision": "v1"}, {"revision": commit}):
        found = RewardModel.from_pretrained("alice/rm", **options)
        assert torch.equal(found.token_rewards(*ids)[0], wanted.token_rewards(*ids)[0])
        assert found.score(prompts, completions)[1].aggregate() == wanted.score(prompts, completions)[1].aggregate()
    newest = RewardModel.from_pretrained("alice/rm")
    assert not torch.equal(newest.token_rewards(*ids)[0], wanted.token_rewards(*ids)[0])
    assert check_engine("alice/rm@v1", "transformers").task == "arithmetic"
    with pytest.raises(InputError, match="a folder has no revision"):
        RewardModel.from_pretrained(reward_model, revision="v1")
    with pytest.raises(InputError, match="hf download alice/rm"):
        run_calibrate("alice/rm@v1", "rows.jsonl", questions=None, task=None, method="platt")


def test_workers_get_the_commit(hub, reward_model):
    """They may start after the branch has moved."""
    commit = hub.create_from("alice/rm", reward_model).branches["main"]
    options = ScoreOptions(model="alice/rm", policy="alice/rm@main", data="", output=Output(path=None))
    found = score_ray._for_workers(options)
    assert found.model == found.policy == f"alice/rm@{commit}"


def test_only_what_is_needed_is_downloaded(hub, tiny_model_folder):
    files = contents(tiny_model_folder)
    more = ("optimizer.pt", "model.gguf", "consolidated.safetensors", "onnx/model.onnx", "original/model.safetensors")
    hub.create("alice/policy", files | dict.fromkeys(more, b"large"))
    load_causal_lm("alice/policy")
    fetched = {line.rsplit("/", 1)[-1] for line in hub.requests if line.startswith("GET") and "/resolve/" in line}
    assert fetched == files.keys()
    torch_weights = dict(files)
    torch_weights["pytorch_model.bin"] = torch_weights.pop("model.safetensors")
    hub.create("alice/old", torch_weights)
    with pytest.raises(InputError, match="alice/old"):  # found, and no such file
        load_causal_lm("alice/old")
    assert any(line.endswith("/pytorch_model.bin") for line in hub.requests)


def test_cached_model_is_used_offline(hub, tiny_model_folder, monkeypatch):
    hub.create_from("alice/policy", tiny_model_folder)
    check_model("alice/policy")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_causal_lm("alice/policy")
    with pytest.raises(InputError, match=r"alice/other: .*HF_HUB_OFFLINE"):
        check_model("alice/other")


@pytest.mark.parametrize(
    ("name", "status", "parts"),
    [
        ("alice/none", None, ["neither a local folder", "hf auth login"]),
        ("bob/private", None, ["neither a local folder", "hf auth login"]),
        ("bob/gated", None, ["ask for access", "/bob/gated"]),
        ("bob/model@v3", None, ["no revision 'v3'", "main, v1"]),
        ("bob/model", 500, ["500", "try again"]),
        ("bob/model", 403, ["refuses", "hf auth login"]),
        ("bob/model", 401, ["hf auth login"]),
        ("bob/adapter", None, ["LoRA adapter of some/base"]),
        ("bob/model@a b", None, ["no revision 'a b'"]),
        ("bob/-x", None, ["not a name"]),
    ],
)
def test_what_is_wrong_is_said(hub, tiny_model_folder, name, status, parts):
    hub.create_from("bob/model", tiny_model_folder).branches["v1"] = "0" * 40
    hub.create_from("bob/private", tiny_model_folder, private=True)
    hub.create_from("bob/gated", tiny_model_folder)
    hub.gated.add("bob/gated")
    hub.create("bob/adapter", {"adapter_config.json": b'{"base_model_name_or_path": "some/base"}'})
    if status is not None:
        hub.faults.append(("/api/models/bob/model", status))
    for check in (check_model, RewardModel.from_pretrained):
        if (name, check) == ("bob/adapter", RewardModel.from_pretrained):
            continue
        with pytest.raises(InputError) as raised:
            check(name)
        assert name.split("@")[0] in str(raised.value)
        for part in parts:
            assert part in str(raised.value)


def test_unreachable_hub(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot be reached at http://127.0.0.1:9"):
        check_model("alice/none")
