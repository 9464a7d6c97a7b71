"""Best-of-N over HTTP: OpenAI's client, `tracereward serve`, and a real generating upstream."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
import httpx
from fastapi.testclient import TestClient

from helpers.any_text import any_text  # noqa: F401
from helpers.served import SECONDS, Process, Upstream, sampler, save_reward_model, serving, traces, wait_for
from tracereward.rewards.abstention import METHODS, Abstention
from tracereward.rewards.model import TokenRewardModel
from tracereward.serving import proxy
from tracereward.serving import upstream as upstreams
from tracereward.serving.app import create_app
from tracereward.serving.service import Settings
from tracereward.synthetic.arithmetic import build_model
from tracereward.tasks import answers, symbolic

PROMPT = "1 + 2 = ?\n"
RIGHT, WRONG, SHORT, OTHER = "1 + 2 = 3\n#### 3", "1 + 2 = 4\n#### 4", "#### 4", traces(1)[0][1]
CHOICES = [WRONG, RIGHT, OTHER, SHORT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("proxy") / "rm", tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return TokenRewardModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def reward(model):
    """The offline reward of an answer to `PROMPT`, truncated or finished."""

    def reward(text, finished=False):
        return model.score([PROMPT], [text], [finished])[0].aggregate()

    return reward


# A real upstream


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tokenizer):
    """``transformers serve`` with an untrained Llama: its process, its address, and the model's name there."""
    folder = tmp_path_factory.mktemp("upstream")
    policy = build_model(tokenizer, seed=0)
    policy.generation_config.do_sample = True  # this server takes it from there
    policy.generation_config.suppress_tokens = tokenizer.all_special_ids  # no sample is empty or ends early
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["transformers.cli.transformers", "serve", folder / "policy", "--port", port, "--device", "cpu"]
    process = Process(folder / "log", *words)
    url = f"http://127.0.0.1:{port}"

    def answers():
        assert process.popen.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health", trust_env=False).status_code == 200

    try:
        yield process, f"{url}/v1", str(folder / "policy"), answers
    finally:
        process.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def client(generator, folder, tmp_path_factory):
    """OpenAI's client for ``tracereward serve`` in front of the upstream."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(log, folder, "--upstream", generator[1], "--samples", 3) as server:
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
        )
        wait_for(generator[3], "transformers serve")
        yield client


@pytest.fixture
def ask(client, generator):
    def ask(selection=None, **options):
        extra = {} if selection is None else {"tracereward": selection}
        return client.completions.create(
            **{"model": generator[2], "prompt": PROMPT, "max_tokens": 12, "seed": 3, "temperature": 1.0, **options},
            extra_body=extra,
        )

    return ask


def test_response_is_the_sample_with_the_highest_reward(ask, reward):
    """The scores of all samples are returned; those of the returned texts are recomputed offline."""
    answer = ask({"n": 5, "method": "reward"}, n=2)
    details = answer.tracereward
    assert details["samples"] == len(details["scores"]) == 5
    rewards = [one["reward"] for one in details["scores"]]
    assert rewards == sorted(rewards, reverse=True)
    assert len({round(one, 3) for one in rewards}) > 1  # the samples differ
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, expected in zip(answer.choices, rewards):
        assert reward(choice.text, choice.finish_reason != "length") == pytest.approx(expected, abs=1e-4)


def test_usage_is_the_sum_of_all_samples(ask):
    one = ask({"n": 1, "method": "reward"}).usage
    many = ask({"n": 4, "method": "reward"}).usage
    assert many.prompt_tokens == 4 * one.prompt_tokens > 0
    assert (one.completion_tokens, many.completion_tokens) == (12, 48)
    assert many.total_tokens == many.prompt_tokens + many.completion_tokens


def test_number_of_samples_defaults_to_the_servers(ask):
    assert ask().tracereward["samples"] == 3
    assert ask(n=4).tracereward["samples"] == 4


def test_stream_has_the_selected_text_and_ends(ask, reward, client, generator):
    chunks = list(ask({"n": 3, "method": "reward"}, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    scores = chunks[-1].tracereward["scores"]
    finish = choices[-1].finish_reason
    text = "".join(choice.text for choice in choices)
    assert reward(text, finish != "length") == pytest.approx(max(one["reward"] for one in scores), abs=1e-4)
    assert len(scores) == 3
    [usage] = [chunk.usage for chunk in chunks if chunk.usage]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
    body = {"model": generator[2], "prompt": PROMPT, "max_tokens": 4, "stream": True}
    raw = httpx.post(f"{client.base_url}completions", json=body, timeout=60, trust_env=False)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_invalid_fields_raise_errors_in_openai_client(ask):
    openai = pytest.importorskip("openai")
    for options, field in (
        ({"selection": {"n": 0}}, "tracereward.n"),
        ({"selection": {"method": "luck"}}, "tracereward.method"),
        ({"selection": {"upstream": "http://127.0.0.1:9"}}, "tracereward.upstream"),
        ({"n": 0}, "n"),
        ({"prompt": ["1", "2"]}, "prompt"),
        ({"echo": True}, "echo"),
    ):
        with pytest.raises(openai.UnprocessableEntityError) as error:
            ask(**options)
        assert error.value.body["param"] == field
        assert error.value.body["type"] == "invalid_request_error"
        assert field in error.value.message
    with pytest.raises(openai.APIStatusError) as error:
        ask({"n": 1000})
    assert error.value.status_code == 413


def test_killed_upstream_is_502(ask, client, generator):
    """The last test that uses this upstream."""
    openai = pytest.importorskip("openai")
    assert ask().choices
    assert generator[0].end(signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(openai.InternalServerError) as error:
        ask()
    assert error.value.status_code == 502
    assert error.value.body["code"] == "upstream_unreachable"
    assert str(generator[1]) not in error.value.message
    assert client.models.list().data[0].id == "rm"  # the server itself is well


# Simulated upstreams


@contextlib.contextmanager
def behind(model, reply, **settings):
    """A client of a proxy in front of an `Upstream`, and the upstream."""
    with Upstream(reply) as upstream:
        app = create_app(model, Settings("rm", upstream=upstream.url, **settings))
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client, upstream


def completion(client, selection=None, **fields):
    body = {"model": "policy", "prompt": PROMPT, **fields}
    return client.post("/v1/completions", json=body if selection is None else {**body, "tracereward": selection})


@pytest.mark.parametrize("knows_n", [True, False], ids=["n known", "n ignored"])
def test_samples_are_requested_with_n_or_individually(model, reward, knows_n):
    """The proxy's own fields are not forwarded; all others are, with distinct seeds."""
    best = max(CHOICES, key=lambda text: reward(text, True))
    with behind(model, sampler(CHOICES, knows_n=knows_n), upstream_key="its own") as (client, upstream):
        options = {"seed": 7, "top_p": 0.5, "stop": ["x"], "n": 2, "best_of": 1, "stream": False}
        response = completion(client, {"n": 4, "method": "reward", "temperature": 0.75}, **options)
    answer = response.json()
    requests = [body for _, body in upstream.requests]
    assert {path for path, _ in upstream.requests} == {"/v1/completions"}
    assert Counter(body["seed"] for body in requests) == Counter([7] if knows_n else [7, 8, 9, 10])
    assert [body["n"] for body in requests] == ([4] if knows_n else [4, 1, 1, 1])
    for body in requests:
        passed = {"model": "policy", "prompt": PROMPT, "top_p": 0.5, "stop": ["x"], "temperature": 0.75}
        assert body == {**passed, "n": body["n"], "seed": body["seed"]}
    assert {headers["authorization"] for headers in upstream.headers} == {"Bearer its own"}
    assert answer["choices"][0]["text"] == best
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [one["reward"] for one in answer["tracereward"]["scores"]] == pytest.approx(
        sorted((reward(text, True) for text in CHOICES), reverse=True), abs=1e-4
    )
    calls = len(requests)
    assert answer["usage"] == {"prompt_tokens": 3 * calls, "completion_tokens": 8, "total_tokens": 3 * calls + 8} | {
        "details": {"cached": calls}
    }
    assert (answer["id"], answer["object"], answer["model"]) == ("x-1", "text_completion", "policy")


def test_client_key_is_not_sent_to_upstream(model):
    with behind(model, sampler(CHOICES), api_key="clients") as (client, upstream):
        client.headers["authorization"] = "Bearer clients"
        assert completion(client).status_code == 200
    assert [headers["authorization"] for headers in upstream.headers] == [None]


def test_votes_count_answers(model, reward):
    """Two of three samples answer 4: `majority` selects the better of these, `shortest` the shortest text. Samples
    without an answer are selected by reward."""
    texts = [RIGHT, WRONG, SHORT]
    with behind(model, sampler(texts)) as (client, _):
        majority = completion(client, {"n": 3, "method": "majority"}).json()
        shortest = completion(client, {"n": 3, "method": "shortest"}).json()
        default = completion(client, {"n": 3}).json()
    assert majority["choices"][0]["text"] in (WRONG, SHORT)
    assert majority["tracereward"]["scores"][0]["answer"] == "4"
    assert shortest["choices"][0]["text"] == SHORT
    assert default["tracereward"]["method"] == "vote"
    plain = ["1 + 2 = 3", "1 + 2 = 4"]
    with behind(model, sampler(plain)) as (client, _):
        answer = completion(client, {"n": 2}).json()
    assert answer["tracereward"]["method"] == "reward"
    assert answer["choices"][0]["text"] == max(plain, key=lambda text: reward(text, True))


def test_samples_that_are_not_trusted_are_refused(model, reward, monkeypatch):
    """Four calibration questions of which one is wrong: at risk .2 the threshold is its reward."""
    best = max(reward(text, True) for text in CHOICES)
    chat = {"model": "policy", "messages": [{"role": "user", "content": PROMPT}], "tracereward": {"method": "reward"}}
    for least, answered in ((best - 1e-3, True), (best + 1e-3, False)):
        records = tuple(Abstention(method=method, questions=4, wrong=(least,)) for method in METHODS)
        monkeypatch.setattr(model, "settings", replace(model.settings, abstention=records))
        with behind(model, sampler(CHOICES), abstain=0.2) as (client, _):
            text = completion(client, {"n": 4, "method": "reward"}, n=2).json()
            message = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
            other = completion(client, {"method": "majority"})
        assert text["tracereward"]["abstained"] is not answered
        assert [bool(choice["text"]) for choice in text["choices"]] == [answered] * 2
        assert (message["content"] is None) is not answered
        assert answered or message["refusal"].startswith("no candidate is trusted")
        assert other.status_code == 422
        assert other.json()["error"]["param"] == "tracereward.method"


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_truncated_sample_is_scored_without_end_of_sequence(model, reward, finish):
    with behind(model, sampler([RIGHT], finish)) as (client, _):
        answer = completion(client, {"n": 1}).json()
    expected = reward(RIGHT, finish == "stop")
    assert answer["tracereward"]["scores"][0]["reward"] == pytest.approx(expected, abs=1e-4)
    assert answer["choices"][0]["finish_reason"] == finish


def test_empty_samples_are_dropped(model):
    with behind(model, sampler(["", RIGHT, ""])) as (client, _):
        answer = completion(client, {"n": 3}, n=3).json()
        assert [choice["text"] for choice in answer["choices"]] == [RIGHT]
        assert answer["tracereward"]["samples"] == 3
    with behind(model, sampler([""])) as (client, _):
        response = completion(client)
    assert response.status_code == 502
    assert "empty" in response.json()["error"]["message"]


def test_chat(model, reward):
    """Messages with text parts, as a response and as a stream."""
    parts = [{"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": parts}]
    best = max(CHOICES, key=lambda text: reward(text, True))
    body = {"model": "policy", "messages": messages, "tracereward": {"n": 4, "method": "reward"}}
    with behind(model, sampler(CHOICES)) as (client, upstream):
        answer = client.post("/v1/chat/completions", json=body).json()
        stream = client.post("/v1/chat/completions", json={**body, "stream": True, "n": 2}).text
        tools = client.post("/v1/chat/completions", json={**body, "tools": [{"type": "function"}]})
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9"}}]}]
        images = client.post("/v1/chat/completions", json={**body, "messages": image})
        assistant = client.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": None}]})
    assert [path for path, _ in upstream.requests] == ["/v1/chat/completions"] * 2
    assert upstream.requests[0][1]["messages"] == messages
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": best}
    *events, end = stream.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [(one["index"], one["delta"].get("content"), one["finish_reason"]) for one in choices[:2]] == [
        (0, best, None),
        (0, None, "stop"),
    ]
    assert {one["index"] for one in choices} == {0, 1}
    for response, field in ((tools, "tools"), (images, "messages.0.content"), (assistant, "messages.0.content")):
        assert response.status_code == 422
        assert response.json()["error"]["param"] == field


def choices_of(*messages, finish="stop", **fields):
    """An upstream whose chat samples are these messages."""
    choices = [
        {"index": index, "message": {"role": "assistant", **message}, "finish_reason": finish, **fields}
        for index, message in enumerate(messages)
    ]
    return lambda path, body: (200, {"id": "x", "choices": choices[: body["n"]]}, {})


def chat(client, samples, **fields):
    body = {"model": "policy", "messages": [{"role": "user", "content": PROMPT}], **fields}
    return client.post("/v1/chat/completions", json={**body, "tracereward": {"n": samples, "method": "reward"}})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_judged_with_the_content(model, reward, field):
    """Of three samples with the same content, the one with the best reasoning is returned, unchanged."""
    thoughts = ["1 + 2 = 4", "1 + 2 = 3", "2 + 2 = 4 - 1"]
    messages = [{field: thought, "content": "#### 3"} for thought in thoughts]
    with behind(model, choices_of(*messages)) as (client, _):
        answer = chat(client, 3).json()
    rewards = [reward(f"<think>\n{thought}\n</think>\n\n#### 3", True) for thought in thoughts]
    best = max(range(3), key=lambda index: rewards[index])
    assert answer["choices"][0]["message"] == {"role": "assistant", **messages[best]}
    assert [one["reward"] for one in answer["tracereward"]["scores"]] == pytest.approx(
        sorted(rewards, reverse=True), abs=1e-4
    )
    assert len({round(one, 3) for one in rewards}) == 3


def test_samples_cut_off_while_reasoning_are_judged_as_unfinished(model, reward):
    """Without content there is no closing mark, and no end of sequence; what the reasoning states is no answer."""
    messages = [{"content": None, "reasoning": "1 + 2 = 4"}, {"content": "", "reasoning": "1 + 2 = 3\n#### 3"}, {}]
    with behind(model, choices_of(*messages, finish="length")) as (client, _):
        answer = chat(client, 3, n=3).json()
    scores = answer["tracereward"]["scores"]
    assert {one["answer"] for one in scores} == {None}
    texts = ("<think>\n1 + 2 = 4", "<think>\n1 + 2 = 3\n#### 3")
    rewards = sorted(reward(text, False) for text in texts)
    assert sorted(one["reward"] for one in scores) == pytest.approx(rewards, abs=1e-4)
    assert [choice["message"]["content"] for choice in answer["choices"]] in ([None, ""], ["", None])
    with behind(model, choices_of({}, {"content": None}, finish="length")) as (client, _):
        response = chat(client, 2)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "bad_upstream")


def test_votes_count_the_answer_of_the_content(model):
    """The reasoning considers other answers, which do not count, also where the content has none."""
    messages = [{"reasoning": "#### 7", "content": "#### 3"}, {"reasoning": "#### 5", "content": "Done."}]
    with behind(model, choices_of(*messages)) as (client, _):
        answer = chat(client, 2).json()
    assert {one["answer"] for one in answer["tracereward"]["scores"]} == {"3", None}


@pytest.mark.parametrize("message", [{"content": "3", "tool_calls": [{"id": "a"}]}, {"content": [{"type": "image"}]}])
def test_samples_with_more_than_text_are_502(model, message):
    with behind(model, choices_of(message)) as (client, _):
        response = chat(client, 1)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "bad_upstream")


@pytest.mark.parametrize(("reason", "finished"), [(None, True), (128009, True), ("\n\n", False)])
def test_sample_that_met_a_stop_string_is_unfinished(model, reward, reason, finished):
    """A number is the id of an end of sequence, a text a stop string."""
    with behind(model, choices_of({"content": RIGHT}, stop_reason=reason)) as (client, _):
        [score] = chat(client, 1, stop=["\n\n"]).json()["tracereward"]["scores"]
    assert score["reward"] == pytest.approx(reward(RIGHT, finished), abs=1e-4)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory, tokenizer):
    """A reward model with a chat template that reads a variable."""
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    other.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ ' * ' if m.role == 'user' else ' - ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ sign or '=' }} {% endif %}"
    )
    folder = save_reward_model(tmp_path_factory.mktemp("chatty") / "rm", other, template="chat")
    return TokenRewardModel.from_pretrained(str(folder))


def test_template_variables_reach_upstream_and_reward_model(chatty):
    with behind(chatty, choices_of({"content": "3"})) as (client, upstream):
        answers = [chat(client, 1, **more).json() for more in ({}, {"chat_template_kwargs": {"sign": "<"}})]
    assert [body.get("chat_template_kwargs") for _, body in upstream.requests] == [None, {"sign": "<"}]
    scores = chatty.score([f"{PROMPT} * = ", f"{PROMPT} * < "], ["3", "3"])
    for answer, one in zip(answers, scores, strict=True):
        assert answer["tracereward"]["scores"][0]["reward"] == pytest.approx(one.aggregate(), abs=1e-4)


def test_text_prompt_is_read_without_the_chat_template(chatty):
    """The upstream continues the text as it is."""
    with behind(chatty, sampler([RIGHT])) as (client, _):
        answer = completion(client, {"n": 1}).json()
    expected = chatty.score([PROMPT], [RIGHT])[0].aggregate()
    assert answer["tracereward"]["scores"][0]["reward"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("last", "fields", "param"),
    [
        ("assistant", {}, "messages"),
        ("assistant", {"continue_final_message": True}, "messages"),
        ("assistant", {"add_generation_prompt": False}, "messages"),
        ("user", {"continue_final_message": True}, "continue_final_message"),
        ("user", {"add_generation_prompt": False}, "add_generation_prompt"),
        ("user", {"continue_final_message": "yes"}, "continue_final_message"),
        ("user", {"chat_template_kwargs": "yes"}, "chat_template_kwargs"),
        ("user", {"chat_template": "{{ 1 }}"}, "chat_template"),
        ("user", {"tool_choice": "auto"}, "tool_choice"),
        ("user", {"include_reasoning": False}, "include_reasoning"),
        ("user", {"documents": [{"text": "1"}]}, "documents"),
        ("user", {"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_upstream_and_reward_model_read_the_same_conversation(chatty, last, fields, param):
    """Requests under which they could read different ones are rejected before the upstream is called."""
    messages = [{"role": "user", "content": "1"}, {"role": last, "content": "2"}]
    with behind(chatty, choices_of({"content": "3"})) as (client, upstream):
        response = chat(client, 1, messages=messages, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert not upstream.requests


def test_upstream_error_is_forwarded(model):
    own = {"error": {"message": "slow down", "type": "rate_limit_error", "param": None, "code": "busy"}}
    with behind(model, lambda path, body: (429, own, {"retry-after": "7", "set-cookie": "a=b"})) as (client, _):
        response = completion(client)
    assert (response.status_code, response.json()) == (429, own)
    assert response.headers["retry-after"] == "7"
    assert "set-cookie" not in response.headers


BAD = {
    "not json": (200, b"<html>", {}),
    "not utf-8": (200, b'{"choices": "\xff"}', {}),
    "no object": (200, [1], {}),
    "no choices": (200, {"choices": []}, {}),
    "choices of text": (200, {"choices": ["a"]}, {}),
    "not a number": (200, b'{"choices": [{"text": "2", "logprobs": NaN}]}', {}),
    "half a surrogate": (200, b'{"choices": [{"text": "\\ud800"}]}', {}),
    "not gzip": (200, b"abc", {"content-encoding": "gzip"}),
    "elsewhere": (302, b"", {"location": "http://127.0.0.1:9/"}),
    "nested": (200, b"[" * 200_000 + b"]" * 200_000, {}),
    "nested deep in a choice": (200, b'{"choices": [{"text": "2", "x": ' + b"[" * 900 + b"]" * 900 + b"}]}", {}),
    "a nested error": (400, b"[" * 200_000 + b"]" * 200_000, {}),
    "not a number in an error": (400, b'{"error": {"message": "no", "code": NaN}}', {}),
    "half a surrogate in an error": (400, b'{"error": {"message": "\\ud800"}}', {}),
    "no such status": (999, {"error": {"message": "no"}}, {}),
    "shorter than it says": (200, b"{}", {"content-length": "100", "connection": "close"}),
}


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
def test_invalid_upstream_response_is_502(model, reply):
    def answer(path, body):
        return reply

    with behind(model, answer) as (client, _):
        response = completion(client)
        assert response.status_code == 502, response.text
        error = response.json()["error"]
        assert error["message"] == "no" or error["code"] in ("bad_upstream", "upstream_unreachable")
        assert client.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>", ("the upstream responded 503", "upstream_error", None, "bad_upstream")),
        ({"error": {}}, ("the upstream responded 503", "upstream_error", None, "bad_upstream")),
        ({"error": "no such model"}, ("no such model", "upstream_error", None, None)),
        ({"detail": "Not Found"}, ("Not Found", "upstream_error", None, None)),
        ({"detail": [{"loc": ["n"]}]}, ('[{"loc": ["n"]}]', "upstream_error", None, None)),
        (
            {"object": "error", "message": "too large", "type": "BadRequestError", "param": "max_tokens", "code": 400},
            ("too large", "BadRequestError", "max_tokens", "400"),
        ),
    ],
    ids=["page", "empty", "text", "detail", "details", "vLLM's old"],
)
def test_upstream_error_message_is_converted_to_openai_format(model, body, expected):
    """The status is kept; an invalid header is dropped."""
    with behind(model, lambda path, _: (503, body, {"retry-after": "\xff"})) as (client, _):
        response = completion(client)
    assert response.status_code == 503
    assert response.json() == {"error": dict(zip(("message", "type", "param", "code"), expected))}


@pytest.mark.parametrize("usage", [[1], "many", None, {"total_tokens": "3"}, {"total_tokens": {"a": {"b": 1}}}])
def test_malformed_usage_is_dropped(model, usage):
    choice = {"text": RIGHT, "index": 0}
    with behind(model, lambda path, body: (200, {"choices": [choice], "usage": usage}, {})) as (client, _):
        response = completion(client, {"n": 1})
    assert response.status_code == 200, response.text
    assert response.json()["usage"] == {}


def test_usage_details_are_summed(model):
    """Integers too large to serialise are dropped."""
    usages = [
        {"total_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 2}, "x": 10**4299},
        {"total_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 1}, "x": 10**4299},
    ]

    def reply(path, body):
        return 200, {"choices": [{"text": RIGHT, "index": 0}], "usage": usages[body["n"] == 1]}, {}

    with behind(model, reply) as (client, _):
        usage = completion(client, {"n": 2}).json()["usage"]
    assert usage == {
        "total_tokens": 12,
        "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 1},
    }


def test_slow_upstream_is_504(model):
    never = threading.Event()

    def reply(path, body):
        never.wait(60)
        return 200, {}, {}

    with behind(model, reply, upstream_seconds=0.2) as (client, _):
        try:
            response = completion(client)
        finally:
            never.set()
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "upstream_timeout"


def test_trickling_upstream_is_504(model):
    """The timeout applies to the full response even while bytes keep arriving."""
    end = threading.Event()

    def pieces():
        for _ in range(200):
            yield b" "
            if end.wait(0.05):
                break
        yield json.dumps({"choices": [{"text": RIGHT, "index": 0}]}).encode()

    with behind(model, lambda path, body: (200, pieces(), {}), upstream_seconds=0.5) as (client, _):
        try:
            response = completion(client, {"n": 1})
        finally:
            end.set()
    assert response.status_code == 504
    assert "within 0.5 s (--upstream-seconds)" in response.json()["error"]["message"]


def endless(begun, left, end):
    """A stream that runs until the client disconnects; `begun` and `left` signal both events."""
    begun.release()
    try:
        while not end.wait(0.02):
            yield b" "
    finally:
        left.release()


def test_client_disconnect_cancels_its_samples(folder, tmp_path):
    begun, left, end = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    body = json.dumps({"prompt": PROMPT}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"content-length: %d\r\n\r\n" % len(body)
    with (
        Upstream(lambda path, body: (200, endless(begun, left, end), {})) as upstream,
        serving(tmp_path / "log", folder, "--upstream", upstream.url) as server,
    ):
        try:
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
                client.sendall(head + body)
                assert begun.acquire(timeout=SECONDS)
            assert left.acquire(timeout=10)
        finally:
            end.set()


def test_failed_sample_cancels_the_others(model):
    """One request fails once all have begun: the upstream sees the others disconnect."""
    begun, left, end = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def reply(path, body):
        if body["n"] > 1:
            return 200, {"choices": [{"text": RIGHT, "index": 0}]}, {}
        if body["seed"] < 3:
            return 200, endless(begun, left, end), {}
        for _ in range(2):
            begun.acquire(timeout=SECONDS)
        return 500, {"error": "out of memory"}, {}

    with behind(model, reply) as (client, _):
        try:
            response = completion(client, {"n": 4}, seed=0)
            assert all(left.acquire(timeout=10) for _ in range(2))
        finally:
            end.set()
    assert (response.status_code, response.json()["error"]["message"]) == (500, "out of memory")


def test_requests_over_max_upstream_are_429(model):
    """Excess requests are rejected before the upstream is called, and accepted once others finish."""
    go, sampled = threading.Event(), sampler([RIGHT])

    def reply(path, body):
        go.wait(SECONDS)
        return sampled(path, body)

    with behind(model, reply, max_upstream=2) as (client, upstream), ThreadPoolExecutor(3) as pool:
        try:
            calls = [pool.submit(completion, client) for _ in range(2)]
            wait_for(lambda: len(upstream.requests) == 2, "requests with the upstream")
            refused = pool.submit(completion, client).result(timeout=30)
        finally:
            go.set()
        assert [call.result().status_code for call in calls] == [200, 200]
        assert len(upstream.requests) == 2
        assert completion(client).status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "busy"
    assert "--max-upstream" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1


def test_upstream_cookies_are_dropped(model):
    sampled = sampler([RIGHT])

    def reply(path, body):
        status, answer, _ = sampled(path, body)
        return status, answer, {"set-cookie": "user=first; path=/"}

    with behind(model, reply) as (client, upstream):
        answers = [completion(client) for _ in range(2)]
    assert [headers["cookie"] for headers in upstream.headers] == [None, None]
    assert not [answer for answer in answers if "set-cookie" in answer.headers]


@pytest.mark.parametrize("selection", [{"n": 8}, {"n": 8, "temperature": 0}, None])
def test_greedy_request_uses_one_sample(model, selection):
    """At temperature 0, of the request or of `tracereward`; a larger `n` is forwarded to the upstream."""
    temperature = 1.0 if selection and "temperature" in selection else 0
    with behind(model, sampler([RIGHT])) as (client, upstream):
        answer = completion(client, selection, temperature=temperature).json()
        two = completion(client, selection, temperature=temperature, n=2).json()
    assert [(body["n"], body["temperature"]) for _, body in upstream.requests] == [(1, 0), (2, 0)]
    assert (answer["tracereward"]["samples"], two["tracereward"]["samples"]) == (1, 2)
    assert (len(answer["choices"]), len(two["choices"])) == (1, 2)


def test_token_limit_applies_before_and_after_sampling(model):
    """Both cases are 413, also on a server whose queue is no larger than the limit."""
    prompt = len(model.tokenizer(PROMPT)["input_ids"])
    few = 100 // (prompt + 1)
    with behind(model, sampler([RIGHT]), max_tokens=100, max_queue=100) as (client, upstream):
        before = completion(client, {"n": few + 1})
        assert not upstream.requests
        long = completion(client, prompt="1 + " * 100)
        assert not upstream.requests
        after = completion(client, {"n": few})
        assert len(upstream.requests) == 1
        assert completion(client, {"n": 2}).status_code == 200
    for response in (before, long, after):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "too_many_tokens"
        assert " 100 tokens" in response.json()["error"]["message"]
        assert "--max-tokens" in response.json()["error"]["message"]
    assert before.json()["error"]["param"] == "tracereward.n"
    assert long.json()["error"]["param"] == "prompt"


def test_slow_voting_does_not_block_server(tmp_path, tokenizer, monkeypatch, caplog):
    """Comparisons that never finish in math-verify: /health answers meanwhile, the vote ends at its time limit, and no
    sample text is logged."""
    folder = save_reward_model(tmp_path / "rm", tokenizer, task="math")
    monkeypatch.setattr(symbolic, "TIME_LIMIT", 2.0)
    monkeypatch.setattr(proxy, "VOTE_SECONDS", 1.0)
    assert answers.equal_math("y+1", "1+y")  # the worker process is running
    towers = [rf"\Gamma({digit}0^8)" for digit in "897765"]
    texts = ["\\boxed{" + tower + "}" for tower in towers]
    slowest = 0.0
    with behind(TokenRewardModel.from_pretrained(str(folder)), sampler(texts)) as (client, _):
        with ThreadPoolExecutor(1) as pool:
            start = time.monotonic()
            call = pool.submit(completion, client, {"n": 6, "method": "majority"})
            while not call.done():
                asked = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - asked)
        took = time.monotonic() - start
    assert call.result().json()["tracereward"]["scores"][0]["answer"] == towers[2]  # equal texts are one answer
    assert slowest < 1.5
    assert took < 8  # ten pairs of 2 s would be 20 s
    assert "math-verify stopped after 2 s" in caplog.text
    assert "Gamma" not in caplog.text


def test_upstream_models_are_listed(model, monkeypatch):
    """Listed after the reward model; omitted if the upstream does not respond or responds with invalid data."""
    monkeypatch.setattr(upstreams, "MODELS_SECONDS", 0.5)
    never = threading.Event()
    listed = {
        "listed": sampler([RIGHT]),
        "late": lambda path, body: (never.wait(SECONDS) and 200, b"", {}),
        "page": lambda path, body: (200, b"<html>", {}),
        "refused": lambda path, body: (401, {"data": [{"id": "policy"}]}, {}),
        "text": lambda path, body: (200, {"data": "policy"}, {}),
        "nested": lambda path, body: (200, b"[" * 200_000, {}),
    }
    names = {}
    for case, reply in listed.items():
        with behind(model, reply) as (client, _):
            names[case] = [one["id"] for one in client.get("/v1/models").json()["data"]]
        never.set()
    assert names == {case: ["rm", "policy"] if case == "listed" else ["rm"] for case in listed}


def test_upstream_failure_after_first_sample_is_an_error(model):
    """The first sample succeeds and another fails: no response with fewer samples than requested."""
    first = sampler([RIGHT], knows_n=False)

    def reply(path, body):
        return first(path, body) if body["n"] > 1 else (500, b"", {})

    with behind(model, reply) as (client, _):
        response = completion(client, {"n": 3})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "bad_upstream"


def test_unserialisable_request_is_a_client_error(model):
    """Python's parser accepts NaN and lone surrogates; they are never forwarded."""
    with behind(model, sampler([RIGHT])) as (client, upstream):
        for body in (b'{"prompt": "1", "top_p": NaN}', b'{"prompt": "\\ud800"}', b'{"prompt": "1", "\\ud800": 1}'):
            response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400
    assert not upstream.requests


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ('"stream": "false"', "stream", "valid boolean"),
        ('"stream_options": "yes"', "stream_options", "dictionary"),
        ('"temperature": NaN', "temperature", "finite number"),
        ('"temperature": -1', "temperature", "greater than or equal to 0"),
        ('"temperature": "hot"', "temperature", "valid number"),
        ('"seed": "1"', "seed", "valid integer"),
        ('"n": true', "n", "valid integer"),
        ('"top_p": NaN', "top_p", "finite number"),
        ('"best_of": 4', "best_of", "tracereward.n"),
        ('"suffix": "3"', "suffix", "does not read"),
        ('"truncate_prompt_tokens": 4', "truncate_prompt_tokens", "full prompt"),
        ('"skip_special_tokens": false', "skip_special_tokens", "special tokens"),
        ('"stream_options": {"include_usage": true}', "stream_options", "only with stream"),
        (
            '"stream": true, "stream_options": {"continuous_usage_stats": true}',
            "stream_options.continuous_usage_stats",
            "remove",
        ),
        ('"prompt": ["1", "2"]', "prompt", "one text, not 2"),
        ('"prompt": []', "prompt", "one text, not 0"),
        ('"prompt": [1]', "prompt", "valid string"),
        ('"prompt": ""', "prompt", "at least 1 character"),
        ('"n": 3, "tracereward": {"n": 2}', "tracereward.n", "n = 3"),
        ('"tracereward": {"n": 9}', "tracereward.n", "limit is 8"),
        ('"n": 9', "n", "limit is 8"),
        ('"tracereward": []', "tracereward", "dictionary"),
        ('"x": ' + "[" * 900 + "]" * 900, "x", "deeply"),
    ],
)
def test_invalid_fields_are_named(model, fields, param, text):
    with behind(model, sampler([RIGHT]), max_candidates=8) as (client, upstream):
        body = f"{{{fields}}}" if '"prompt"' in fields else f'{{"prompt": "1 + 2", {fields}}}'
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == (413 if "limit" in text else 400 if text in ("finite number", "deeply") else 422)
    assert response.json()["error"]["param"] == param
    assert text in response.json()["error"]["message"]
    assert not upstream.requests


def test_prompt_as_a_list_of_one_text(model, reward):
    with behind(model, sampler([RIGHT])) as (client, upstream):
        answer = completion(client, {"n": 1}, prompt=[PROMPT]).json()
    assert upstream.requests[0][1]["prompt"] == [PROMPT]  # as it came
    assert answer["tracereward"]["scores"][0]["reward"] == pytest.approx(reward(RIGHT, True), abs=1e-4)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_stream_has_all_fields_of_the_choice(model, path):
    """Log-probs, reasoning and other fields are sent once; the finish reason comes last."""
    others = {"index": 0, "logprobs": {"content": [{"token": "3", "logprob": -0.5}]}, "stop_reason": 7}
    message = {"role": "assistant", "content": RIGHT, "reasoning_content": "I count."}
    said = {"message": message} if path.startswith("chat") else {"text": RIGHT}
    choice = {**others, **said, "finish_reason": "stop"}
    with behind(model, lambda *_: (200, {"id": "x", "choices": [choice]}, {})) as (client, _):
        body = {"prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
        text = client.post(f"/v1/{path}", json={**body, "tracereward": {"n": 1}}).text
    first, second = (json.loads(line.removeprefix("data: "))["choices"] for line in text.split("\n\n")[:2])
    piece = {"delta": message} if path.startswith("chat") else {"text": RIGHT}
    assert first == [{**others, **piece, "finish_reason": None}]
    empty = {"delta": {}} if path.startswith("chat") else {"text": ""}
    assert second == [{"index": 0, **empty, "finish_reason": "stop"}]


def test_openapi_describes_proxy_requests_and_responses(model):
    with behind(model, sampler([RIGHT])) as (client, _):
        description = client.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    for path, name, own in (("chat/completions", "Chat", "messages"), ("completions", "Completion", "prompt")):
        operation = description["paths"][f"/v1/{path}"]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = schemas[reference.removeprefix("#/components/schemas/")]
        assert schema["title"] == f"{name}Request"
        assert schema["required"] == [own]
        assert schema["properties"].keys() >= {"n", "stream", "tracereward", "temperature", own}
        assert schema["additionalProperties"] is True
        assert operation["responses"].keys() >= {"200", "413", "422", "429", "502", "504"}
        assert "text/event-stream" in operation["responses"]["200"]["content"]
    assert {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}} in (
        schemas["Message"]["properties"]["content"]["anyOf"]
    )


def test_sample_longer_than_the_reward_models_positions_is_422(model):
    with behind(model, sampler([" + 1" * 100])) as (client, upstream):
        sampled, asked = completion(client), completion(client, prompt="1 + " * 100)
        assert len(upstream.requests) == 1  # a prompt that is too long is rejected before sampling
    for response in (sampled, asked):
        assert response.status_code == 422
        assert "reads 128" in response.json()["error"]["message"]
