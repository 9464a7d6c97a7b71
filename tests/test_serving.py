"""`tracereward serve` in this process: each endpoint against offline scoring, each refusal, each header."""

import asyncio
import json
import logging
import re
import sys

import pytest

pytest.importorskip("fastapi", reason="the packages of tracereward[serve] are not installed")
from fastapi.testclient import TestClient
from scipy.special import expit

from served import save_reward_model, traces
from tracereward.calibration import Calibration
from tracereward.reward_model import TokenRewardModel
from tracereward.serving.app import create_app
from tracereward.serving.middleware import Guard
from tracereward.serving.service import Settings

TRACES = traces(6)
PROMPT = TRACES[0][0]
CANDIDATES = [completion for _, completion in TRACES]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("serving") / "rm", tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return TokenRewardModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def offline(model):
    """Scores of `CANDIDATES` as answers to `PROMPT`."""
    return model.score([PROMPT] * len(CANDIDATES), CANDIDATES)


@pytest.fixture(scope="module")
def served(model):
    """A client of a server with a name and limits that a test can reach."""
    app = create_app(model, Settings("rm", max_bytes=100_000, max_candidates=8, max_tokens=400))
    with TestClient(app) as client:
        yield client


def client_of(model, **settings):
    return TestClient(create_app(model, Settings("rm", **settings)), raise_server_exceptions=False)


def close(values):
    return pytest.approx(values, abs=1e-4)


def assert_error(response, status, text="", code=None, param=None):
    """OpenAI's error, and nothing else."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.search(text, error["message"])
    assert isinstance(error["type"], str)
    assert (error["code"], error["param"]) == (code, param)


# Scores


@pytest.mark.parametrize("finished", [True, False])
def test_score_of_a_completion(served, model, finished):
    body = {"prompt": PROMPT, "completion": CANDIDATES[1], "finished": finished}
    answer = served.post("/v1/score", json=body).json()
    [scores] = model.score([PROMPT], [CANDIDATES[1]], [finished])
    assert answer.keys() == {"model", "results", "usage"}
    assert answer["model"] == "rm"
    [result] = answer["results"]
    fields = {"index", "reward", "aggregates", "step_rewards", "tokens", "offsets", "token_rewards"}
    assert result.keys() == fields  # and no probability
    assert result["tokens"] == scores.tokens
    assert result["offsets"] == [list(pair) for pair in scores.offsets]
    assert result["token_rewards"] == close(scores.rewards)
    assert result["reward"] == close(sum(scores.rewards) / len(scores.rewards))
    assert result["step_rewards"] == close(scores.step_rewards())
    assert result["aggregates"] == close({how: scores.aggregate(how) for how in ("mean", "min", "last", "discounted")})
    prompt, completion = len(model.tokenizer(PROMPT)["input_ids"]), len(scores.tokens)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def test_scores_of_candidates_come_in_their_order(served, offline):
    answer = served.post("/v1/score", json={"model": "rm", "prompt": PROMPT, "candidates": CANDIDATES}).json()
    assert [result["index"] for result in answer["results"]] == list(range(len(CANDIDATES)))
    for result, scores in zip(answer["results"], offline, strict=True):
        assert result["token_rewards"] == close(scores.rewards)


def test_scores_of_steps(served, model):
    """Each step's reward is that of its own tokens, by hand; steps are joined by the model's delimiter."""
    steps = CANDIDATES[0].split("\n")
    answer = served.post("/v1/score", json={"prompt": PROMPT, "steps": steps}).json()
    [scores] = model.score([PROMPT], ["\n".join(steps)])
    expected, start = [], 0
    for step in steps:
        inside = [
            r for r, (a, b) in zip(scores.rewards, scores.offsets) if a < b and start <= a and b <= start + len(step)
        ]
        expected.append(sum(inside) / len(inside))
        start += len(step) + 1
    assert answer["results"][0]["step_rewards"] == close(expected)


def test_a_step_without_a_token_is_an_error_of_the_request(served):
    """The tokenizer makes one short token of the long word: nothing is left at the second step's characters."""
    response = served.post("/v1/score", json={"prompt": PROMPT, "steps": ["x" * 90, "y"]})
    assert_error(response, 400, "steps: no token between characters 91 and 92", "invalid_input")


def test_tokens_can_be_left_out(served):
    body = {"prompt": PROMPT, "completion": CANDIDATES[0], "tokens": False}
    [result] = served.post("/v1/score", json=body).json()["results"]
    assert result.keys() == {"index", "reward", "aggregates", "step_rewards"}


def test_messages_under_a_plain_model(served, offline):
    """The user's message is the prompt, whatever the system says; a longer talk has no plain form."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    answer = served.post("/v1/score", json={"prompt": messages, "completion": CANDIDATES[0]}).json()
    assert answer["results"][0]["token_rewards"] == close(offline[0].rewards)
    messages.append({"role": "assistant", "content": "2"})
    response = served.post("/v1/score", json={"prompt": messages, "completion": "3"})
    assert_error(response, 400, "plain prompts", "invalid_input")
    response = served.post("/v1/score", json={"prompt": [{"role": "user", "content": ""}], "completion": "3"})
    assert_error(response, 400, "no token", "invalid_input")


def test_messages_under_a_chat_model(tmp_path, tokenizer):
    """They go through the chat template, as in training."""
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    chatty.chat_template = "{% for m in messages %}{{ m.content }} = {% endfor %}"
    model = TokenRewardModel.from_pretrained(str(save_reward_model(tmp_path / "rm", chatty, template="chat")))
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    [expected] = model.score(["1 = 2 = "], ["3 + 4"])
    with client_of(model) as client:
        answer = client.post("/v1/score", json={"prompt": messages, "completion": "3 + 4"}).json()
    assert answer["results"][0]["token_rewards"] == close(expected.rewards)


def test_a_calibrated_model_gives_probabilities(tmp_path, tokenizer, offline):
    calibration = Calibration("platt", slope=0.5, intercept=0.25, traces=20)
    calibrated = TokenRewardModel.from_pretrained(
        str(save_reward_model(tmp_path / "rm", tokenizer, calibration=calibration))
    )
    expected = [float(expit(0.5 * scores.aggregate() + 0.25)) for scores in offline]
    with client_of(calibrated) as client:
        scores = client.post("/v1/score", json={"prompt": PROMPT, "candidates": CANDIDATES}).json()
        ranked = client.post("/v1/rerank", json={"query": PROMPT, "documents": CANDIDATES}).json()
    assert [result["probability"] for result in scores["results"]] == close(expected)
    assert [result["relevance_score"] for result in ranked["results"]] == close(sorted(expected, reverse=True))


# Other servers' shapes


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_rerank(served, offline, path):
    """Texts and objects, from best to worst; fields of other servers are ignored."""
    documents = [text if index % 2 else {"text": text, "id": index} for index, text in enumerate(CANDIDATES)]
    body = {"model": "rm", "query": PROMPT, "documents": documents, "max_chunks_per_doc": 3}
    answer = served.post(path, json=body).json()
    rewards = [scores.aggregate() for scores in offline]
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    assert [result["index"] for result in answer["results"]] == order
    assert [result["reward"] for result in answer["results"]] == close([rewards[i] for i in order])
    relevance = [float(expit(rewards[i])) for i in order]
    assert [result["relevance_score"] for result in answer["results"]] == close(relevance)
    assert [result["document"] for result in answer["results"]] == [{"text": CANDIDATES[i]} for i in order]
    assert answer["object"] == "list"
    assert answer["id"].startswith("rerank-")
    few = served.post(path, json={**body, "top_n": 2, "return_documents": False}).json()["results"]
    assert [result["index"] for result in few] == order[:2]
    assert few[0].keys() == {"index", "relevance_score", "reward"}


def test_pooling_of_texts(served, model):
    """A row of one number a token, the first 0: by hand, from the ids."""
    texts = [PROMPT + CANDIDATES[0], PROMPT]
    answer = served.post("/pooling", json={"input": texts, "encoding_format": "float"}).json()
    for row, text in zip(answer["data"], texts, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        [expected] = model.token_rewards([ids[:1]], [ids[1:]])
        assert [value for [value] in row["data"]] == close([0.0, *expected.tolist()])
        assert row["object"] == "pooling"
    total = sum(len(model.tokenizer(text)["input_ids"]) for text in texts)
    assert answer["usage"]["total_tokens"] == total
    [alone] = served.post("/pooling", json={"input": texts[1]}).json()["data"]
    assert [value for [value] in alone["data"]] == close([value for [value] in answer["data"][1]["data"]])
    assert_error(served.post("/pooling", json={"input": "7"}), 400, "one token alone", "invalid_input")


def test_pooling_and_classes_of_a_conversation(served, offline):
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": CANDIDATES[0]}]
    answer = served.post("/pooling", json={"messages": messages}).json()
    assert [value for [value] in answer["data"][0]["data"]] == close(offline[0].rewards)
    answer = served.post("/classify", json={"messages": messages}).json()
    expert = float(expit(offline[0].aggregate()))
    assert answer["data"][0]["probs"] == close([1 - expert, expert])
    response = served.post("/classify", json={"messages": messages[::-1]})
    assert_error(response, 422, "last message must be the assistant's")


def test_classes_of_texts(served, model):
    texts = [PROMPT + text for text in CANDIDATES]
    answer = served.post("/classify", json={"input": texts}).json()
    labels = set()
    for one, text in zip(answer["data"], texts, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        reward = float(model.token_rewards([ids[:1]], [ids[1:]])[0].mean())
        assert one["probs"] == close([1 - float(expit(reward)), float(expit(reward))])
        assert one["label"] == ("expert" if reward > 0 else "policy")
        assert one["num_classes"] == 2
        labels.add(one["label"])
    assert labels == {"policy", "expert"}


# Operations


def test_operations(served):
    models = served.get("/v1/models").json()
    assert [(one["id"], one["object"], one["owned_by"]) for one in models["data"]] == [("rm", "model", "tracereward")]
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ready").json() == {"status": "ready"}
    paths = served.get("/openapi.json").json()["paths"]
    assert paths.keys() >= {"/v1/score", "/v1/rerank", "/pooling", "/classify", "/health", "/ready", "/metrics"}
    assert "/v1/completions" not in paths  # there is no upstream
    assert_error(served.post("/v1/completions", json={"prompt": "1"}), 404, "Not Found")
    page = served.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert {served.get(path).status_code for path in re.findall(r'(?:src|href)="([^"]+)"', page.text)} == {200}


def test_not_ready_before_the_first_trace_is_scored(model):
    client = client_of(model)  # its lifespan has not begun
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503


def test_a_model_that_cannot_score_does_not_start(model, monkeypatch):
    def token_rewards(prompts, completions):
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "token_rewards", token_rewards)
    with pytest.raises(Exception, match="RuntimeError: broken"), client_of(model):
        pass


def test_metrics_count(model):
    """Two traces scored beside the one at the start, one refusal, and three paths that do not exist."""

    def value(text, name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)[1])

    with client_of(model) as client:
        usage = client.post("/v1/score", json={"prompt": PROMPT, "candidates": CANDIDATES[:2]}).json()["usage"]
        client.post("/v1/score", json={})
        for index in range(3):
            client.get(f"/scan/{index}")
        text = client.get("/metrics").text
    assert value(text, 'tracereward_requests_total{path="/v1/score",status="200"}') == 1
    assert value(text, 'tracereward_requests_total{path="/v1/score",status="422"}') == 1
    assert value(text, 'tracereward_requests_total{path="other",status="404"}') == 3
    assert value(text, 'tracereward_request_seconds_count{path="/v1/score"}') == 2
    assert value(text, "tracereward_traces_total") == 2
    assert value(text, "tracereward_tokens_total") == usage["total_tokens"]
    assert value(text, "tracereward_batch_traces_sum") == 3
    assert value(text, "tracereward_queued_tokens") == 0
    assert "scan" not in text


# Refusals


def test_a_key_is_asked_for(model):
    with client_of(model, api_key="sesame") as client:
        for given in (None, "Bearer wrong", "sesame", "Bearer ", "bearer sesam", "Bearer sesame2"):
            response = client.get("/v1/models", headers={} if given is None else {"authorization": given})
            assert_error(response, 401, "key", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/openapi.json", "/docs", "/nothing"):
            assert client.get(path).status_code == 401
        for path in ("/", "/page/page.js", "/page/page.css", "/health", "/ready"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/score", "/v1/rerank", "/pooling", "/classify"])
def test_another_model_is_not_here(served, path):
    body = {"model": "other", "prompt": "1", "completion": "2", "query": "1", "documents": ["2"], "input": "1 + 2"}
    fields = {"/v1/score": ("prompt", "completion"), "/v1/rerank": ("query", "documents")}.get(path, ("input",))
    response = served.post(path, json={name: body[name] for name in ("model", *fields)})
    assert_error(response, 404, "'other' is not served here; 'rm' is", "model_not_found")


def test_what_is_too_large(served):
    body = json.dumps({"prompt": PROMPT, "completion": "1" * 100_000}).encode()
    assert_error(served.post("/v1/score", content=body, headers=JSON), 413, "100000 bytes", "body_too_large")
    # In chunks, without a length.
    pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
    response = served.post("/v1/score", content=pieces, headers=JSON)
    assert "content-length" not in response.request.headers
    assert_error(response, 413, "100000 bytes", "body_too_large")
    response = served.post("/v1/score", json={"prompt": PROMPT, "candidates": ["2"] * 9})
    assert_error(response, 413, "9 candidates; the limit is 8", "too_many_candidates")
    response = served.post("/v1/score", json={"prompt": "1 + 1", "candidates": [" + 1" * 40] * 5})
    assert_error(response, 413, "420 tokens; the limit is 400", "too_many_tokens")  # 5 * (3 + 2 * 40 + 1)
    response = served.post("/v1/score", json={"prompt": "1", "completion": " + 1" * 100})
    assert_error(response, 400, "reads 128", "invalid_input")


@pytest.mark.parametrize("pieces", [[], [b'{"prompt": ', b'"1", ']], ids=["nothing", "half"])
def test_a_body_that_does_not_come(pieces):
    """The middleware with a client that stops sending: 408, and the application never sees the request."""
    sent = []

    async def app(scope, receive, send):
        raise AssertionError("a request without its body was handled")

    async def receive():
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    guard = Guard(app, api_key=None, max_bytes=100, body_seconds=0.05)
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
        ("/v1/score", {"prompt": "1", "completion": "2", "extra": 3}, "extra", "not permitted"),
        ("/v1/score", {"prompt": 1, "completion": "2"}, "prompt", "valid string"),
        ("/v1/score", {"prompt": "1"}, None, "one of completion, candidates and steps"),
        ("/v1/score", {"prompt": "1", "completion": "2", "steps": ["2"]}, None, "one of completion"),
        ("/v1/rerank", {"query": "1", "documents": []}, "documents", "at least 1"),
        ("/v1/rerank", {"query": "1", "documents": ["2", 3]}, "documents.1", "valid string"),
        ("/v1/rerank", {"query": "1", "documents": ["2"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ("/pooling", {}, None, "one of input and messages"),
        ("/classify", {"messages": [{"role": "user", "content": "1"}]}, "messages", "at least 2"),
        ("/v1/score", [], None, "dictionary"),
    ],
)
def test_invalid_fields_are_named(served, path, body, param, text):
    response = served.post(path, json=body)
    assert_error(response, 422, text, param=param)
    assert (param or "") in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"prompt": "\xff", "completion": "2"}',
        b'{"prompt": "\\ud800", "completion": "2"}',
        b'{"prompt": "1", "completion": "2", "\\ud800": 1}',
        b'{"prompt": NaN, "completion": "2"}',
        b'{"prompt": ' + b"1" * 10_000 + b"}",
        b"[" * 90_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=["empty", "half", "utf-16", "latin-1", "surrogate", "surrogate name", "nan", "digits", "deep", "nested"],
)
def test_what_is_not_json_is_the_clients_error(served, body):
    response = served.post("/v1/score", content=body, headers=JSON)
    assert response.status_code in (400, 422)
    assert_error(response, response.status_code, param=response.json()["error"]["param"])


def test_a_full_queue_is_429(model):
    """A request that alone is more than the queue holds."""
    with client_of(model, max_queue=20) as client:
        response = client.post("/v1/score", json={"prompt": PROMPT, "candidates": CANDIDATES})
        assert_error(response, 429, "busy", "busy")
        assert int(response.headers["retry-after"]) >= 1
        assert client.post("/v1/score", json={"prompt": "1", "completion": "2"}).status_code == 200


def test_a_trace_that_fails_is_500(model, monkeypatch):
    with client_of(model) as client:
        forward = model.token_rewards
        monkeypatch.setattr(model, "token_rewards", lambda *ids: [rewards * float("nan") for rewards in forward(*ids)])
        response = client.post("/v1/score", json={"prompt": PROMPT, "completion": "2"})
        assert_error(response, 500, "not finite", "scoring_failed")
        monkeypatch.undo()
        assert client.post("/v1/score", json={"prompt": PROMPT, "completion": "2"}).status_code == 200


def test_a_fault_of_the_server_says_nothing_of_its_inside(model, monkeypatch):
    with client_of(model) as client:
        monkeypatch.setattr(client.app.state.service, "render", lambda prompt: 1 / 0)
        response = client.post("/v1/score", json={"prompt": PROMPT, "completion": "2"})
        assert_error(response, 500, "server failed")
        assert "division" not in response.text
        assert response.headers["x-content-type-options"] == "nosniff"


# Headers, logs, reach


def test_every_answer_has_the_security_headers(model):
    origin = {"origin": "http://evil.test", "access-control-request-method": "POST"}
    with client_of(model, api_key="sesame") as client:
        key = {"authorization": "Bearer sesame"}
        paths = ("/", "/page/page.js", "/health", "/metrics", "/nothing", "/v1/score", "/docs", "/openapi.json")
        answers = [client.get(path, headers={**key, **origin}) for path in paths]
        answers += [client.get("/v1/models"), client.options("/v1/score", headers={**key, **origin})]
        answers += [client.post("/v1/score", json={"prompt": "1", "completion": "2"}, headers={**key, **origin})]
        answers += [client.post("/v1/score", json={}, headers=key)]
    assert {answer.status_code for answer in answers} == {200, 401, 404, 405, 422}
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        if answer.request.url.path != "/docs":
            assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_on_request(model, caplog, log_prompts):
    caplog.set_level(logging.DEBUG)
    secret = "19 + 19 = ?\n"
    with client_of(model, log_prompts=log_prompts) as client:
        client.post("/v1/score", json={"prompt": secret, "completion": "38"})
        client.post("/v1/rerank", json={"query": secret, "documents": ["38"]})
        client.post("/v1/score", json={"prompt": secret, "completion": ""})
        client.post("/v1/score", json={"prompt": secret, "completion": "1" * 9000})
        client.post("/classify", json={"input": secret})
    assert ("19 + 19" in caplog.text) == log_prompts
    assert not [message for message in caplog.messages if "\n" in message]  # no line of a client's making


def test_nothing_in_a_request_is_opened(model):
    """Paths and addresses are text to be scored or refused; the process opens no file and no connection for them."""
    opened = []
    watching = [False]

    def hook(event, args):
        if watching[0] and event in ("open", "socket.connect"):
            opened.append(str(args[:2]))

    sys.addaudithook(hook)
    address = "http://127.0.0.1:9/secret"
    with client_of(model) as client:
        client.get("/health")
        watching[0] = True
        for given in ("/etc/hostname", "file:///etc/hostname", address):
            text = {"prompt": given, "completion": given}
            assert client.post("/v1/score", json=text).status_code == 200
            assert_error(client.post("/v1/score", json={**text, "model": given}), 404, code="model_not_found")
            assert_error(client.post("/v1/score", json={**text, "upstream": given}), 422, param="upstream")
            ranked = client.post("/v1/rerank", json={"query": given, "documents": [given], "upstream": given})
            assert ranked.status_code == 200
            assert client.get("/page/" + given.replace("/", "%2F")).status_code == 404
            assert client.get("/page/../" * 3 + given).status_code == 404
        watching[0] = False
    assert not [args for args in opened if "hostname" in args or "127.0.0.1" in args]
