"""Operation of `tracereward serve`: health, metrics, headers, logs, and isolation from files and the network."""

import logging
import re
import sys

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
from helpers.any_text import any_text  # noqa: F401
from helpers.served import assert_error, client_of, save_reward_model, traces
from tracereward.rewards.model import TokenRewardModel
from tracereward.verdict import Comparison, Verdict

TRACES = traces(6)
PROMPT = TRACES[0][0]
CANDIDATES = [completion for _, completion in TRACES]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = save_reward_model(tmp_path_factory.mktemp("serving") / "rm", tokenizer)
    return TokenRewardModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def served(model):
    with client_of(model) as client:
        yield client


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


def test_page_shows_the_stored_verdict(model, served):
    assert "Verdict: none stored" in served.get("/").text
    comparison = Comparison(baseline="majority", difference=0.1, low=0.02, high=0.18)
    verdict = Verdict(method="vote", questions=40, outcome="better", comparisons=(comparison,), aurocs={})
    page = client_of(model, verdict=verdict).get("/").text
    assert f"Verdict: {verdict.line}" in page
    assert "style=" not in page, "the page's policy allows no inline style"


def test_page_of_the_api_description_works_offline(served):
    """Each URL of the page is the server's own and has what the browser expects; the policy allows no other host."""
    page = served.get("/docs")
    urls = re.findall(r"""(?:src|href|url)["']?\s*[=:]\s*["']([^"']+)["']""", page.text)
    kinds = {url: served.get(url).headers["content-type"].partition(";")[0] for url in urls}
    assert set(kinds.values()) == {"text/css", "image/png", "text/javascript", "application/json"}
    assert {served.get(url).status_code for url in urls} == {200}
    assert not re.search("(?i)(https?:)?//[a-z]", page.text + page.headers["content-security-policy"])
    assert not re.search(r"url\(['\"]?(https?:)?//|@import", served.get("/docs/files/swagger-ui.css").text)
    assert served.get("/redoc").status_code == 404


def test_health_checks_accept_head_requests(served):
    for path in ("/health", "/ready"):
        answer = served.head(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


def test_not_ready_before_the_first_trace_is_scored(model):
    client = client_of(model)  # its lifespan has not begun
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503


def test_a_model_that_cannot_score_does_not_start(model, monkeypatch):
    def token_rewards(prompts, completions, token_budget):
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "token_rewards", token_rewards)
    with pytest.raises(Exception, match="RuntimeError: broken"), client_of(model):
        pass


def test_metrics_count(model):
    """Two scored traces plus the one at startup, one rejected request, and three unknown paths."""

    def value(text, name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)[1])

    with client_of(model) as client:
        found = client.post("/v1/score", json={"prompt": PROMPT, "candidates": [CANDIDATES[0], "1 + 2 = 3"]}).json()
        usage, rewards = found["usage"], [one["reward"] for one in found["results"]]
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
    assert value(text, "tracereward_trace_reward_count") == 2  # with bounds under 0 there is no sum
    assert value(text, 'tracereward_trace_reward_bucket{le="0.0"}') == sum(reward <= 0 for reward in rewards)
    assert value(text, "tracereward_trace_tokens_sum") == usage["completion_tokens"]
    assert value(text, "tracereward_trace_tokens_count") == 2
    assert value(text, "tracereward_unanswered_traces_total") == 1  # the second, which has no ####
    assert value(text, "tracereward_queued_tokens") == 0
    assert "scan" not in text


def test_every_response_has_security_headers(model):
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
    texts = ["18 + 18", "17 + 17", "16 + 16"]
    with client_of(model, log_prompts=log_prompts) as client:
        client.post("/v1/score", json={"prompt": secret, "completion": "38"})
        client.post("/v1/rerank", json={"query": secret, "documents": ["38"]})
        client.post("/v1/score", json={"prompt": secret, "completion": ""})
        client.post("/v1/score", json={"prompt": secret, "completion": "1" * 9000})
        client.post("/classify", json={"input": texts[0]})
        client.post("/pooling", json={"input": texts[1:]})
    assert [("prompt" in line, text in line) for text in texts for line in caplog.messages if text in line] == [
        (True, True)
    ] * (3 * log_prompts)
    assert ("19 + 19" in caplog.text) == log_prompts
    assert not [message for message in caplog.messages if "\n" in message]  # no log injection


def test_nothing_in_a_request_is_opened(model):
    """Paths and URLs in requests are only text: the process opens no file and no connection for them."""
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
            assert_error(client.post("/v1/score", json={**text, "model": given}), 404, "", "model_not_found", "model")
            assert_error(client.post("/v1/score", json={**text, "upstream": given}), 422, param="upstream")
            ranked = client.post("/v1/rerank", json={"query": given, "documents": [{"text": given, "url": given}]})
            assert ranked.status_code == 200
            assert client.get("/page/" + given.replace("/", "%2F")).status_code == 404
            assert client.get("/page/../" * 3 + given).status_code == 404
        watching[0] = False
    assert not [args for args in opened if "hostname" in args or "127.0.0.1" in args]
