"""`tracereward serve` as a process with few open files and short timeouts: slow clients, startup and shutdown."""

import contextlib
import signal
import socket
import threading

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
import httpx

from helpers.served import Process, save_reward_model, serving, wait_for
from tracereward.cli.serve import check_upstream, key_of
from tracereward.errors import InputError

FILES = 256
LIMITED = f"""
import resource
from tracereward.cli import main
from tracereward.serving import server
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
server.HEADER_SECONDS = 3.0
main()
"""
HALF = b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("limits") / "rm", tokenizer)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Started in the model's folder as ``tracereward serve .``"""
    log = tmp_path_factory.mktemp("limited") / "log"
    process = Process(log, LIMITED, "serve", ".", "--port", "0", run="-c", folder=folder)
    yield process
    process.end(signal.SIGKILL)


def connect(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def is_closed(client):
    """Whether the server closes the connection, possibly after a response."""
    with contextlib.suppress(ConnectionError):
        while client.recv(4096):
            pass
    return True


def answer_of(server):
    """The response to a valid request; None if no connection can be made."""
    with contextlib.suppress(httpx.TransportError):
        body = {"prompt": "1 + 1 = ?\n", "completion": "2"}
        return httpx.post(f"{server.url}/v1/score", json=body, trust_env=False, timeout=30)
    return None


@pytest.mark.long
def test_more_partial_headers_than_open_files_do_not_block_server(server):
    """All are closed, at once or by the timeout. An open connection is served meanwhile, new ones afterwards; the log
    stays small."""
    with contextlib.ExitStack() as stack:
        friend = stack.enter_context(httpx.Client(base_url=server.url, trust_env=False))
        clients = []
        for index in range(FILES + 50):
            clients.append(stack.enter_context(connect(server)))
            with contextlib.suppress(ConnectionError):
                clients[-1].sendall(HALF)
            if index % 16 == 0:
                assert friend.get("/health").status_code == 200
        assert wait_for(lambda: answer_of(server), "an answer", 30).status_code == 200
        assert all(is_closed(client) for client in clients)
    log = server.log.read_text()
    assert "a connection was refused: 128 are open" in log
    assert "Too many open files" not in log
    assert len(log) < 300 * len(clients)


def test_idle_connection_is_closed(server):
    """Without a first request, and after a response with a partial next header."""
    with connect(server) as silent, connect(server) as second:
        second.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert second.recv(4096).startswith(b"HTTP/1.1 200 ")
        second.sendall(HALF)
        assert is_closed(silent)
        assert is_closed(second)


def test_access_log_omits_query_strings(server):
    httpx.get(f"{server.url}/v1/models?api_key=sesame", trust_env=False)
    server.find(r'"GET /v1/models HTTP/1\.1" 200')
    assert "sesame" not in server.log.read_text()


def test_model_name_is_the_folder_name(server, folder):
    [model] = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
    assert model["id"] == folder.name == "rm"


def test_local_server_without_key_rejects_other_hosts(server):
    answer = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.test"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host")


@pytest.mark.long
def test_requests_cut_off_by_shutdown_get_503(folder, tmp_path):
    """A request waiting for the upstream and one with an incomplete body both get 503; the server exits with 0."""
    upstream = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{upstream.getsockname()[1]}/v1"
    answers = []
    with upstream, serving(tmp_path / "log", folder, "--upstream", address, "--drain-seconds", "1") as server:
        url = f"{server.url}/v1/completions"
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json={"prompt": "1"}, trust_env=False, timeout=60))
        )
        with connect(server) as half:
            half.sendall(HALF + b"content-length: 50\r\n\r\n{")
            ask.start()
            waiting, _ = upstream.accept()
            with waiting:
                assert waiting.recv(4096)
                server.popen.send_signal(signal.SIGTERM)
                ask.join(60)
            assert half.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert server.popen.wait(60) == 0
    [answer] = answers
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert int(answer.headers["retry-after"]) >= 1
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "url", ["http://a b:x", "http://", "https:///v1", "127.0.0.1:8000", "ftp://host/v1", "http://host:x/v1", ""]
)
def test_invalid_upstream_url_is_rejected_at_startup(url):
    with pytest.raises(InputError, match=r"--upstream .*http://127\.0\.0\.1:8000/v1"):
        check_upstream(url, None)


def test_valid_upstream_urls():
    for url in ("http://127.0.0.1:8000/v1", "https://host", "http://[::1]:8000/v1/"):
        check_upstream(url, None)


@pytest.mark.parametrize("key", ["schlüssel", "a b", "a\nb", "\x00"], ids=ascii)
def test_key_not_valid_in_a_header_is_rejected(tmp_path, monkeypatch, key):
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    with pytest.raises(InputError, match=r"key: .* HTTP header"):
        key_of(file, "UNUSED")
    if "\x00" not in key:
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(InputError, match=r"\$SOME_KEY: .* HTTP header"):
            key_of(None, "SOME_KEY")
    file.write_text("sk-0123_aZ.~=\n")
    assert key_of(file, "UNUSED") == "sk-0123_aZ.~="
