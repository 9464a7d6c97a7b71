"""Options of `tracereward serve`: mistakes are refused in one line, before the model is loaded."""

import socket

import pytest
import typer

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
from helpers.served import Upstream, sampler, save_reward_model
from tracereward.cli.serve import server
from tracereward.errors import InputError, RunFailed
from tracereward.rewards import engines
from tracereward.rewards.model import TokenRewardModel
from tracereward.serving import server as uvicorn_server


class Loaded(Exception):
    """The checks are over: the model would be loaded now."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("command") / "rm", tokenizer)


@pytest.fixture
def serve(folder, monkeypatch):
    def load(*_):
        raise Loaded

    monkeypatch.setattr(engines, "load_scorer", load)
    monkeypatch.delenv("TRACEREWARD_API_KEY", raising=False)
    command = typer.main.get_command(server)
    return lambda *words: command.main([str(folder), "--port", "0", *map(str, words)], standalone_mode=False)


def test_options_without_effect_are_refused(serve, tmp_path):
    (tmp_path / "key").write_text("sesame")
    for words in (
        ["--samples", 8],
        ["--max-upstream", 64],
        ["--upstream-seconds", 300],
        ["--upstream-key-file", tmp_path / "key"],
    ):
        with pytest.raises(InputError, match=f"^{words[0]} .*needs --upstream"):
            serve(*words)
        with pytest.raises(Loaded):
            serve(*words, "--upstream", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="--samples 8 must be at most --max-candidates 4"):
        serve("--upstream", "http://127.0.0.1:9/v1", "--max-candidates", 4)
    with pytest.raises(Loaded):
        serve("--max-candidates", 4)


@pytest.mark.parametrize("name", ["", "a\udcff", "a\nb"])
def test_name_must_be_printable(serve, name):
    with pytest.raises(InputError, match="--name"):
        serve("--name", name)


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://a:99999/v1", "ftp://a/v1", "http://a/v1?b=1"])
def test_upstream_must_be_an_address(serve, url):
    with pytest.raises(InputError, match="--upstream"):
        serve("--upstream", url)


@pytest.mark.parametrize(("path", "warns"), [("/v1", False), ("", True), (None, True)])
def test_upstream_that_does_not_list_models_is_reported(serve, capfd, path, warns):
    """It may start later, so that the server starts anyway."""
    listed = sampler(["1"])
    with Upstream(lambda path, body: listed(path, body) if path == "/v1/models" else (404, b"", {})) as upstream:
        url = "http://127.0.0.1:9/v1" if path is None else upstream.url.removesuffix("/v1") + path
        with pytest.raises(Loaded):
            serve("--upstream", url)
    assert ("does not list its models" in capfd.readouterr().err) == warns


def test_damaged_verdict_does_not_stop_the_server(serve, folder, capfd):
    (folder / "verdict.json").write_text('{"outcome": "bet')
    with pytest.raises(Loaded):
        serve()
    (folder / "verdict.json").unlink()
    assert "verdict.json cannot be read" in capfd.readouterr().err


def test_address_in_use_is_refused(serve):
    in_use = pytest.raises(InputError, match=r"--host 127.0.0.1 --port \d+: .*in use")
    with socket.create_server(("127.0.0.1", 0)) as other, in_use:
        serve("--port", other.getsockname()[1])
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1"):  # reserved for documentation: no machine has it
        serve("--host", "192.0.2.1")


def test_damaged_weights_stop_before_the_server_starts(serve, folder, monkeypatch):
    model = TokenRewardModel.from_pretrained(str(folder))
    model.head.b.data.fill_(float("nan"))
    monkeypatch.setattr(engines, "load_scorer", lambda *_: model)
    monkeypatch.setattr(uvicorn_server, "run", lambda *_: pytest.fail("the server started"))
    with pytest.raises(RunFailed, match="not finite"):
        serve()
