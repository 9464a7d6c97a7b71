"""Requests that `tracereward serve` rejects, and its error responses."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
from helpers.served import JSON, assert_error, client_of, save_reward_model, traces
from tracereward.rewards.model import TokenRewardModel
from tracereward.serving.middleware import Guard

TRACES = traces(6)
PROMPT = TRACES[0][0]
CANDIDATES = [completion for _, completion in TRACES]
USER, ANSWER = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = save_reward_model(tmp_path_factory.mktemp("serving") / "rm", tokenizer)
    return TokenRewardModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def served(model):
    with client_of(model, max_bytes=100_000, max_candidates=8, max_tokens=400) as client:
        yield client


def test_api_key_is_required(model):
    with client_of(model, api_key="sesame") as client:
        for given in (None, "Bearer wrong", "sesame", "Bearer ", "bearer sesam", "Bearer sesame2", "Basic sesame"):
            response = client.get("/v1/models", headers={} if given is None else {"authorization": given})
            assert_error(response, 401, "key", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/nothing", "/page/nothing", "/metrics/nothing", "/docs/nothing", "/docs/filesx"):
            assert client.get(path).status_code == 401
        for path in ("/v1/score", "/v1/rerank", "/v2/rerank", "/rerank", "/pooling", "/classify"):
            assert client.post(path, json={}).status_code == 401
        operations = ("/health", "/ready", "/metrics", "/docs", "/docs/files/swagger-ui.css", "/openapi.json")
        for path in ("/", "/page/page.js", "/page/page.css", *operations):
            assert client.get(path).status_code == 200
        for scheme in ("Bearer", "bearer", "BEARER"):  # RFC 9110: the scheme's case does not matter
            assert client.get("/v1/models", headers={"authorization": f"{scheme} sesame"}).status_code == 200


def test_local_server_without_key_accepts_only_loopback_hosts(model):
    """DNS rebinding: requests for evil.test, resolved to 127.0.0.1, are rejected on every path."""
    with client_of(model, local_only=True) as client:
        for host in ("localhost", "127.0.0.1", "LOCALHOST:8019", "[::1]", "[::1]:8019"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.test", "localhost.evil.test", "127.0.0.1.evil.test:8019", "evil.test:127.0.0.1", ""):
            for path in ("/v1/models", "/", "/metrics"):
                response = client.get(path, headers={"host": host})
                assert_error(response, 421, "--api-key-file", "wrong_host")
    with client_of(model) as client:
        assert client.get("/v1/models", headers={"host": "proxy.test"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/score", "/v1/rerank", "/pooling", "/classify"])
def test_unknown_model_is_404(served, path):
    body = {"model": "other", "prompt": "1", "completion": "2", "query": "1", "documents": ["2"], "input": "1 + 2"}
    fields = {"/v1/score": ("prompt", "completion"), "/v1/rerank": ("query", "documents")}.get(path, ("input",))
    response = served.post(path, json={name: body[name] for name in ("model", *fields)})
    assert_error(response, 404, "'other'.*'rm'", "model_not_found", "model")


def test_requests_over_the_limits_are_rejected(served):
    body = json.dumps({"prompt": PROMPT, "completion": "1" * 100_000}).encode()
    assert_error(served.post("/v1/score", content=body, headers=JSON), 413, "100000 bytes", "body_too_large")
    # Chunked, without a content length.
    pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
    response = served.post("/v1/score", content=pieces, headers=JSON)
    assert "content-length" not in response.request.headers
    assert_error(response, 413, "100000 bytes", "body_too_large")
    text = "1 + 1" + " + 1" * 40  # 83 tokens, 84 with the end of sequence: five exceed 400
    requests = [
        ("/v1/score", "candidates", {"prompt": "1 + 1"}, [" + 1" * 40] * 5),
        ("/v1/rerank", "documents", {"query": "1 + 1"}, [" + 1" * 40] * 5),
        ("/pooling", "input", {}, [text] * 5),
        ("/classify", "input", {}, [text] * 5),
    ]
    for path, field, more, given in requests:
        response = served.post(path, json={**more, field: ["2 + 3"] * 9})
        assert_error(response, 413, "9 candidates; the limit is 8", "too_many_candidates", field)
        response = served.post(path, json={**more, field: given})
        assert_error(response, 413, f"{field}: the request has more than 400 tokens", "too_many_tokens", field)
        response = served.post(path, json={**more, field: ["2 + 3", " + 1" * 100]})
        assert_error(response, 422, rf"{field.rstrip('s')}s? 1: .*reads 128", "context_length_exceeded")


@pytest.mark.parametrize("pieces", [[], [b'{"prompt": ', b'"1", ']], ids=["no body", "partial body"])
def test_incomplete_body_is_408(pieces):
    """A client that stops sending gets 408, and the application never sees the request."""
    sent = []

    async def app(scope, receive, send):
        raise AssertionError("a request with an incomplete body was handled")

    async def receive():
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    guard = Guard(app, api_key=None, local_only=False, max_bytes=100, body_seconds=0.05)
    asyncio.run(guard({"type": "http", "path": "/v1/score", "headers": []}, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "timeout"
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize(
    ("path", "body", "param", "text"),
    [
        ("/v1/score", {"completion": "2"}, "prompt", "Field required"),
        ("/v1/score", {"prompt": "1", "completion": 2}, "completion", "valid string"),
        ("/v1/score", {"prompt": "1", "candidates": ["2", ""]}, "candidates.1", "at least 1 character"),
        ("/v1/score", {"prompt": "1", "completion": "2", "extra": 3}, "extra", "remove it"),
        ("/v1/score", {"prompt": "1", "completion": "2", "max-tokens": 3}, "max-tokens", "remove it"),
        ("/v1/score", {"prompt": [{"role": "user"}], "completion": "2"}, "prompt.0.content", "required"),
        ("/v1/score", {"prompt": 1, "completion": "2"}, "prompt", "valid string"),
        ("/v1/score", {"prompt": "1"}, None, "one of completion, candidates and steps"),
        ("/v1/score", {"prompt": "1", "completion": "2", "steps": ["2"]}, None, "one of completion"),
        ("/v1/rerank", {"query": "1", "documents": []}, "documents", "at least 1"),
        ("/v1/rerank", {"query": "1", "documents": ["2", 3]}, "documents.1", "valid string"),
        ("/v1/rerank", {"query": "1", "documents": [{"text": ""}]}, "documents.0.text", "at least 1 character"),
        ("/v1/rerank", {"query": "1", "documents": ["2", {"txt": ""}]}, "documents.1.text", "required"),
        ("/v1/rerank", {"query": "1", "documents": ["2"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ("/pooling", {"input": [[3, -1]]}, "input.0.1", "greater than or equal to 0"),
        ("/pooling", {"input": [3, -1]}, "input.1", "greater than or equal to 0"),
        ("/pooling", {"input": []}, "input", "at least 1"),
        ("/pooling", {"input": "1 + 2", "encoding_format": "bytes"}, "encoding_format", "'float' or 'base64'"),
        ("/pooling", {}, None, "one of input and messages"),
        ("/classify", {"messages": [{"role": "user", "content": "1"}]}, "messages", "at least 2"),
        ("/v1/score", [], None, "dictionary"),
        ("/v1/rerank", {"query": "1", "documents": ["2"], "max_tokens_per_doc": 5}, "max_tokens_per_doc", "remove it"),
        ("/v1/rerank", {"query": "1", "documents": ["2"], "rank_fields": ["a"]}, "rank_fields", "remove it"),
        ("/pooling", {"input": "1 + 2", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens", "remove it"),
        ("/pooling", {"input": "1 + 2", "add_special_tokens": False}, "add_special_tokens", "remove it"),
        ("/classify", {"messages": [USER, ANSWER], "continue_final_message": True}, "continue_final_message", "remove"),
        ("/classify", {"messages": [{**USER, "tool_calls": [1]}, ANSWER]}, "messages.0.tool_calls", "remove it"),
        ("/classify", {"messages": [{**USER, "reasoning": "1"}, ANSWER]}, "messages.0", "only the assistant"),
        (
            "/v1/score",
            {"prompt": [{"role": "user", "content": [IMAGE]}], "completion": "2"},
            "prompt.0.content",
            "image_url",
        ),
        ("/v1/rerank", {"query": [{"role": "user", "content": [1]}], "documents": ["2"]}, "query.0.content", "'int'"),
        ("/pooling", {"messages": [USER, {**ANSWER, "thinking": "1", "reasoning": "2"}]}, "messages.1", "one of"),
    ],
)
def test_invalid_fields_are_named(served, path, body, param, text):
    response = served.post(path, json=body)
    assert_error(response, 422, text, param=param)
    assert (param or "") in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (b"{bad", JSON, "^the body is not JSON: .*, at character 1$"),
        (b'{"prompt": "1",}', JSON, "^the body is not JSON: .*, at character 1[45]$"),
        (b"", JSON, "^the body is empty"),
        (b'{"prompt": "1", "completion": "2"}', {}, "header Content-Type: application/json"),
        (b'{"prompt": "1", "completion": "2"}', {"content-type": "text/plain"}, "header Content-Type: application"),
    ],
)
def test_invalid_body_error_names_the_cause(served, body, headers, text):
    assert_error(served.post("/v1/score", content=body, headers=headers), 422, text)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "\xff", "completion": "2"}', None),
        (b'{"prompt": "\\ud800", "completion": "2"}', "prompt"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "2"}', "prompt"),
        (b'{"prompt": "1", "candidates": ["2", "\\udc00 3"]}', "candidates.1"),
        (b'{"prompt": "1", "completion": "2", "\\ud800": 1}', "\\ud800"),
        (b'{"prompt": [{"role": "user", "content": "\\ud83d"}], "completion": "2"}', "prompt.0.content"),
        (b'{"prompt": NaN, "completion": "2"}', "prompt"),
        (b'{"prompt": "1", "completion": "2", "finished": -Infinity}', "finished"),
        (b'{"prompt": "1", "completion": "2", "finished": 1e999}', "finished"),
        (b'{"prompt": "1", "completion": "2", "prompt": "3"}', "prompt"),
        (b'{"prompt": [{"role": "user", "content": "1", "role": "system"}], "completion": "2"}', "role"),
        (b'{"prompt": ' + b"1" * 10_000 + b"}", None),
        (b"[" * 90_000, None),
        (b'{"prompt": ' + b"[" * 950 + b"]" * 950 + b"}", "prompt"),
        (b'{"prompt": ' + b'{"a":' * 950 + b"1" + b"}" * 951, "prompt"),
    ],
)
def test_json_that_python_alone_accepts_is_400(served, body, param):
    """Repeated names, of which Python keeps the last, and values that could not be written again; the field is named,
    a repeated one without its path."""
    response = served.post("/v1/score", content=body, headers=JSON)
    assert_error(response, 400, param=param, code="invalid_json")


def test_fields_that_change_nothing_are_accepted(served):
    """Null, empty, what happens anyway, and fields about the request; the scores are the same."""
    message = {**ANSWER, "tool_calls": [], "refusal": None, "audio": None, "annotations": []}
    plain = served.post("/classify", json={"messages": [USER, ANSWER]}).json()["data"]
    more = {"user": "me", "priority": 3, "truncate_prompt_tokens": None, "add_generation_prompt": False}
    assert served.post("/classify", json={"messages": [USER, message], **more}).json()["data"] == plain
    unjoined = {**ANSWER, "content": [{"type": "text", "text": "2"}, {"text": ""}]}
    assert served.post("/classify", json={"messages": [USER, unjoined]}).json()["data"] == plain


def test_full_queue_is_429(model):
    """A single request larger than the queue."""
    with client_of(model, max_queue=20) as client:
        response = client.post("/v1/score", json={"prompt": PROMPT, "candidates": CANDIDATES})
        assert_error(response, 429, "busy", "busy")
        assert int(response.headers["retry-after"]) >= 1
        assert client.post("/v1/score", json={"prompt": "1", "completion": "2"}).status_code == 200


def test_failed_trace_is_500(model, monkeypatch):
    with client_of(model) as client:
        forward = model.token_rewards
        monkeypatch.setattr(
            model, "token_rewards", lambda *ids, **given: [rewards * float("nan") for rewards in forward(*ids, **given)]
        )
        response = client.post("/v1/score", json={"prompt": PROMPT, "completion": "2"})
        assert_error(response, 500, "not finite", "scoring_failed")
        monkeypatch.undo()
        assert client.post("/v1/score", json={"prompt": PROMPT, "completion": "2"}).status_code == 200


def test_internal_error_does_not_leak_details(model, monkeypatch):
    with client_of(model) as client:
        monkeypatch.setattr(client.app.state.service, "render", lambda *_: 1 / 0)
        response = client.post("/v1/score", json={"prompt": PROMPT, "completion": "2"})
        assert_error(response, 500, "server's log")
        assert "division" not in response.text
        assert response.headers["x-content-type-options"] == "nosniff"
