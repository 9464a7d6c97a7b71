"""`tracereward serve` as a process: many clients, clients that die, stall or send too much, and shutdown."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
import httpx
import psutil

from helpers.served import ENVIRONMENT, Upstream, sampler, save_reward_model, serving, traces, wait_for
from tracereward.rewards.model import TokenRewardModel

TRACES = traces(64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("process") / "rm", tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return TokenRewardModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server") / "log", folder) as server:
        yield server


def address(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def is_well(server):
    """Whether the server answers a request."""
    prompt, completion = TRACES[0]
    response = httpx.post(
        f"{server.url}/v1/score", json={"prompt": prompt, "completion": completion}, trust_env=False, timeout=30
    )
    return response.status_code == 200


def number(server, name):
    """A value from /metrics."""
    lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), 0.0)


@pytest.mark.long
def test_64_concurrent_clients_get_offline_scores(server, model):
    """Each client has its own connection and trace; the engine takes fewer turns than there are traces."""
    expected = model.score(*zip(*TRACES))
    turns = number(server, "tracereward_batch_traces_count")

    async def one(prompt, completion):
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            body = {"prompt": prompt, "completion": completion}
            return (await client.post(f"{server.url}/v1/score", json=body)).raise_for_status().json()

    async def everyone():
        return await asyncio.gather(*(one(*pair) for pair in TRACES))

    answers = asyncio.run(everyone())
    for answer, scores in zip(answers, expected, strict=True):
        [result] = answer["results"]
        assert result["tokens"] == scores.tokens
        assert result["token_rewards"] == pytest.approx(scores.rewards, abs=1e-4)
    assert number(server, "tracereward_batch_traces_count") - turns < 64


CLIENT = """
import http.client, json, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
body = json.dumps({"prompt": "1 + 2 = ?\\n", "candidates": ["1 + 2 = 3" + " + 1" * 50] * 64})
while True:
    connection.request("POST", "/v1/score", body, {"content-type": "application/json"})
    print("sent", flush=True)
    connection.getresponse().read()
"""


def test_killed_client_does_not_affect_server(server):
    """Five processes that send requests continuously, killed with requests in flight."""
    words = [sys.executable, "-c", CLIENT, str(address(server)[1])]
    clients = [subprocess.Popen(words, stdout=subprocess.PIPE, env=ENVIRONMENT) for _ in range(5)]
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"sent\n"
    finally:
        for client in clients:
            client.kill()
            client.wait()
            client.stdout.close()
    assert is_well(server)
    left = 'tracereward_requests_total{path="/v1/score",status="499"}'
    wait_for(lambda: number(server, left) > 0, "a cancelled request")
    wait_for(lambda: number(server, "tracereward_queued_tokens") == 0, "an empty queue")
    assert "Traceback" not in server.log.read_text()


def test_partial_header_does_not_block_server(server):
    """Fifty sockets with a partial header and twenty with a partial body."""
    with contextlib.ExitStack() as stack:
        for index in range(70):
            client = stack.enter_context(socket.create_connection(address(server)))
            head = b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\n"
            client.sendall(head if index < 50 else head + b"content-length: 50\r\n\r\n{")
        for _ in range(5):
            assert is_well(server)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_100_megabyte_body_is_rejected_unread(server, chunked):
    process = psutil.Process(server.popen.pid)
    before = process.memory_info().rss
    piece, total, sent = b" " * 2**20, 100, 0
    with socket.create_connection(address(server), timeout=60) as client:
        size = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (total * len(piece))
        client.sendall(
            b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n%s\r\n\r\n" % size
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(total):
                client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                sent += 1
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                answer += data
    assert answer.startswith(b"HTTP/1.1 413 "), (answer[:100], sent)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"
    assert sent < total
    assert process.memory_info().rss - before < 50 * 2**20
    assert is_well(server)


@pytest.mark.long
def test_sigterm_completes_requests_in_flight(folder, model, tmp_path):
    """All requests read before the signal are answered, and the server exits with 0."""
    with serving(tmp_path / "log", folder, "--max-wait-ms", "2000", "--log-prompts") as server:

        async def run():
            async with httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits()) as client:
                url = f"{server.url}/v1/score"
                bodies = [{"prompt": prompt, "completion": completion} for prompt, completion in TRACES[:8]]
                calls = [asyncio.create_task(client.post(url, json=body)) for body in bodies]
                while server.log.read_text().count("prompt '") < 8:  # all have come in, and wait for others
                    await asyncio.sleep(0.01)
                assert not any(call.done() for call in calls)
                server.popen.send_signal(signal.SIGTERM)
                return await asyncio.gather(*calls)

        answers = asyncio.run(run())
        assert server.popen.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            is_well(server)
    for answer, scores in zip(answers, model.score(*zip(*TRACES[:8])), strict=True):
        assert answer.status_code == 200
        assert answer.json()["results"][0]["token_rewards"] == pytest.approx(scores.rewards, abs=1e-4)
    assert "Traceback" not in server.log.read_text()


# Fuzzing from the server's OpenAPI description


def fuzz(server, cases, paths=".*"):
    """Send `cases` valid and `cases` invalid requests to each operation at `paths`; returns responses per status.

    Each response must match the description: status, content type and schema.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    import requests
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    wanted.append(checks.response_schema_conformance)
    counts: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").include(path_regex=paths)
    session = requests.Session()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:

            @settings(max_examples=cases, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case):
                response = case.call_and_validate(checks=wanted, session=session)
                counts[response.status_code] += 1

            with contextlib.suppress(Unsatisfiable):  # a path without parameters has no invalid requests
                one()
    return counts


@pytest.mark.long
def test_fuzzed_requests_get_documented_responses(server):
    counts = fuzz(server, 50)
    assert counts[200] > 0
    assert counts[400] > 0, "most texts are not in the vocabulary"
    assert counts[422] > 25
    assert is_well(server)


@pytest.mark.parametrize(
    "cases", [pytest.param(15, marks=pytest.mark.long), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_fuzzed_proxy_requests_get_documented_responses(folder, tmp_path, cases):
    with (
        Upstream(sampler(["1 + 2 = 3\n#### 3", "#### 4"])) as upstream,
        serving(tmp_path / "log", folder, "--upstream", upstream.url) as server,
    ):
        counts = fuzz(server, cases, "^/v1/(chat/completions|completions|models)$")
        assert upstream.requests
        assert counts[422] > cases
        assert is_well(server)


@pytest.mark.slow
def test_thousands_of_fuzzed_requests_get_documented_responses(server):
    counts = fuzz(server, 1000)
    assert sum(counts.values()) > 5000
    assert is_well(server)
