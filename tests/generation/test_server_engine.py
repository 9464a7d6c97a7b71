"""Sampling from OpenAI-compatible servers: one over HTTP that fails on purpose, and transformers' own."""

import json
import os
import shlex
import signal
import threading
from collections import Counter

import pytest
from transformers.cli.serve import Serve

from helpers.chat_models import CHATML, SPECIAL, byte_tokenizer, save_chat_model
from helpers.command_line import command, refused  # noqa: F401
from helpers.paths import ROOT
from helpers.served import Upstream, wait_for
from helpers.tiny import free_port, rows
from tracereward.files import write_jsonl
from tracereward.generation import server_engine
from tracereward.generation.params import SamplingParams

pytest.importorskip("openai", reason="openai is not installed")

QUESTIONS = [{"prompt": f"{a} + 2 = ?\n", "answer": str(a + 2)} for a in range(12)]
BAD = (500, {"error": {"message": "out of luck"}}, {"x-should-retry": "false"})


class Server:
    """Answers "A + 2 = ?" rightly for even A, and counts; `faults[prompt]` are replies that come before the answer.

    A fault is a reply, or a function of the request's body that returns one, or None for the usual answer.
    """

    def __init__(self):
        self.faults, self.asked, self.bodies, self.paths = {}, Counter(), [], []
        self.running = self.most = 0
        self.expected, self.full, self.free = 0, threading.Event(), threading.Event()
        self.free.set()
        self.models, self.refusal, self.most_choices, self.lock = ["policy"], None, 99, threading.Lock()
        self.log_probs = True

    def __call__(self, path, body):
        if body is None:
            return self.refusal or (200, {"data": [{"id": name} for name in self.models]}, JSON)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        with self.lock:
            self.bodies.append(body)
            self.paths.append(path)
            self.asked[prompt] += 1
            self.running += 1
            self.most = max(self.most, self.running)
            faults = self.faults.get(prompt, [])
            fault = faults.pop(0) if faults else None
            if self.running == self.expected:
                self.full.set()
        try:
            self.free.wait(20)
            if self.expected and self.asked.total() > 1:  # the first question is asked alone
                self.full.wait(20)
            reply = fault(body) if callable(fault) else fault
            return reply or self.refusal or (200, self.answer(body, prompt), JSON)
        finally:
            with self.lock:
                self.running -= 1

    def answer(self, body, prompt):
        choices = []
        for index in range(min(body.get("n", 1), self.most_choices)):
            text = text_of(prompt, body.get("seed", 0) + index)
            said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            choice = {"index": index, **said, "finish_reason": "stop" if index == 0 else "length"}
            values = [-0.5, -1.0, -index]
            if self.log_probs and "prompt" in body and "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": values}
            elif self.log_probs and body.get("logprobs"):
                choice["logprobs"] = {"content": [{"logprob": value} for value in values]}
            choices.append(choice)
        return {"choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": 3 * len(choices)}}


JSON = {"content-type": "application/json"}


def text_of(prompt, seed):
    a = int(prompt.split()[0])
    return f"seed {seed}\n#### {a + 2 + a % 2}"


@pytest.fixture
def server():
    with Upstream(Server()) as upstream:
        yield upstream


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, QUESTIONS)
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No key of the person who runs the tests, no proxy, and hardly any back-off."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)


@pytest.fixture
def sample(command, server, data, tmp_path):
    """`sample(word, ...)` samples from the server into out.jsonl."""

    def run(*more, url=None, model="policy", questions=data):
        words = ["sample", model, "--task", "arithmetic", "--data", questions, "--engine", url or server.url]
        return command(*words, "-o", tmp_path / "out.jsonl", *more)

    return run


def seed_of(question, request=0, seed=0):
    return SamplingParams(seed=seed).seed_of(question, request)


def test_rows_requests_and_cost(sample, server, tmp_path):
    done = sample("-n", 2, "--temperature", 0.7, "--max-new-tokens", 9)
    assert done.code == 0, done.err
    found = rows(tmp_path / "out.jsonl")
    for place, row in enumerate(found):
        a, index = divmod(place, 2)
        assert row == {
            "question": a,
            "prompt": QUESTIONS[a]["prompt"],
            "completion": text_of(QUESTIONS[a]["prompt"], seed_of(a) + index),
            "answer": str(a + 2),
            "extracted": str(a + 2 + a % 2),
            "correct": a % 2 == 0,
            "finished": index == 0,
            "length": 3,
            "logprob": (-0.5 - 1.0 - index) / 3,
        }
    assert server.reply.bodies[0] == {
        "model": "policy",
        "prompt": QUESTIONS[0]["prompt"],
        "n": 2,
        "seed": seed_of(0),
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 1,
    }
    assert set(server.reply.paths) == {"/v1/completions"}
    assert len({seed_of(a) for a in range(12)}) == 12
    assert f"{server.url}: 12 requests, 60 prompt tokens, 72 completion tokens" in done.err
    assert "12 of 24 samples have the right answer" in done.err


def test_as_many_requests_are_in_flight_as_allowed(sample, server, tmp_path):
    """The server holds requests back until there are five; a sixth would be counted."""
    server.reply.expected = 5
    done = sample("-n", 1, "--concurrency", 5)
    assert done.code == 0, done.err
    assert server.reply.most == 5
    assert [row["question"] for row in rows(tmp_path / "out.jsonl")] == list(range(12))


def test_requests_are_repeated_until_answered(sample, server, tmp_path, monkeypatch):
    """Too many requests, an error, a body cut off, and no answer in time: each question is asked once more."""
    monkeypatch.setattr(server_engine, "SECONDS", 0.5)
    late = threading.Event()
    faults = [
        (429, {"error": {"message": "slow down"}}, {"retry-after-ms": "1"}),
        (500, {"error": {"message": "oops"}}, {}),
        (200, b'{"choices": [', {"content-length": "100", **JSON}),
        lambda body: late.wait(20) and None,
    ]
    for question, fault in enumerate(faults, start=3):
        server.reply.faults[QUESTIONS[question]["prompt"]] = [fault]
    server.reply.faults[QUESTIONS[0]["prompt"]] = [faults[0]]
    done = sample("-n", 1)
    late.set()
    assert done.code == 0, done.err
    assert [server.reply.asked[q["prompt"]] for q in QUESTIONS] == [2, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1, 1]
    assert [row["completion"] for row in rows(tmp_path / "out.jsonl")] == [
        text_of(q["prompt"], seed_of(a)) for a, q in enumerate(QUESTIONS)
    ]


def test_failed_questions_are_named_and_asked_again_by_resume(sample, server, data, tmp_path):
    """One refused for good, one that gets no text, one that fails too often; the others are kept, in order."""
    nothing = {"choices": [{"message": {"tool_calls": [{"id": "1"}]}}]}
    for question, fault in ((2, (413, {"detail": "too long"}, {})), (5, (200, nothing, JSON)), (11, BAD)):
        server.reply.faults[QUESTIONS[question]["prompt"]] = [fault]
    done = sample("-n", 2)
    assert done.code == 1
    for place in (f"{data}:3: status 413: too long", f"{data}:6: it has tool_calls", f"{data}:12: status 500: out of"):
        assert place in done.err
    assert "3 of 12 questions have failed" in done.err
    assert "--resume" in done.err
    part = rows(tmp_path / "out.jsonl.part")
    assert sorted({row["question"] for row in part}) == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    server.reply.asked.clear()
    done = sample("-n", 2, "--resume")
    assert done.code == 0, done.err
    assert server.reply.asked == {QUESTIONS[question]["prompt"]: 1 for question in (2, 5, 11)}
    found = rows(tmp_path / "out.jsonl")
    assert [row["question"] for row in found] == [question for question in range(12) for _ in range(2)]
    assert [row["completion"] for row in found[::2]] == [
        text_of(q["prompt"], seed_of(a)) for a, q in enumerate(QUESTIONS)
    ]


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts also where the shell that started the tests with `&` ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_keeps_rows_and_resume_asks_for_the_rest(sample, server, tmp_path):
    def interrupt(body):
        os.kill(os.getpid(), signal.SIGINT)
        server.reply.free.clear()
        server.reply.free.wait(20)

    server.reply.faults[QUESTIONS[4]["prompt"]] = [interrupt]
    done = sample("-n", 1, "--concurrency", 1)
    server.reply.free.set()
    assert done.code == 130, done.err
    assert [row["question"] for row in rows(tmp_path / "out.jsonl.part")] == [0, 1, 2, 3]
    assert "4 requests, 20 prompt tokens" in done.err
    refused(sample("-n", 1, "--resume", "--api", "chat", "--template", "chat"), "--template (plain, now chat)")
    server.reply.asked.clear()
    assert sample("-n", 1, "--resume").code == 0
    assert server.reply.asked == {q["prompt"]: 1 for q in QUESTIONS[4:]}
    assert [row["question"] for row in rows(tmp_path / "out.jsonl")] == list(range(12))


def test_nothing_more_is_asked_of_a_server_that_has_stopped(sample, server):
    for question in QUESTIONS[3:]:
        server.reply.faults[question["prompt"]] = [BAD]
    done = sample("-n", 1, "--concurrency", 1)
    assert done.code == 1
    assert "8 of 12 questions have failed in a row, so that no more are asked" in done.err


def test_rows_on_stdout_are_in_order(command, server, data):
    slow = threading.Event()
    server.reply.faults[QUESTIONS[1]["prompt"]] = [lambda body: slow.wait(20) and None]
    server.reply.faults[QUESTIONS[11]["prompt"]] = [lambda body: slow.set()]
    done = command("sample", "policy", "--task", "arithmetic", "--data", data, "-n", 1, "--engine", server.url)
    assert done.code == 0, done.err
    assert [json.loads(line)["question"] for line in done.out.splitlines()] == list(range(12))


def says(text, status=400):
    return lambda body: (status, {"error": {"message": text}}, {})


@pytest.mark.parametrize(
    ("refuses", "text", "without"),
    [
        (("top_k", "min_p", "repetition_penalty"), "Unexpected fields: {'top_k', 'min_p'}", ()),
        (("logprobs",), "logprobs is not supported with this model", ("logprob", "length")),
        (("n",), "n must be 1", ()),
        (("seed",), "bad request", ("logprob", "length")),  # not named: parts are left out in order up to it
        (("max_tokens",), "use 'max_completion_tokens' instead", ()),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value else "",
)
def test_what_a_server_refuses_is_left_out_of_further_requests(sample, server, tmp_path, refuses, text, without):
    def refusing(body):
        return says(text)(body) if any(name in body for name in refuses) else None

    server.reply.faults = {q["prompt"]: [refusing] * 9 for q in QUESTIONS}
    done = sample("-n", 2)
    assert done.code == 0, done.err
    accepted = [body for body in server.reply.bodies if not any(name in body for name in refuses)]
    refusals = len(server.reply.bodies) - len(accepted)
    assert refusals == {"seed": 3}.get(refuses[0], 1)
    assert (text in done.err) == (refuses[0] != "max_tokens")
    found = rows(tmp_path / "out.jsonl")
    assert len(found) == 24
    assert all(row.keys().isdisjoint({"logprob"} & {*without}) for row in found)
    if refuses == ("n",):
        assert len(accepted) == 24
        assert [row["completion"] for row in found] == [
            text_of(q["prompt"], seed_of(a, k)) for a, q in enumerate(QUESTIONS) for k in range(2)
        ]
    if refuses == ("max_tokens",):
        assert {body["max_completion_tokens"] for body in accepted} == {512}


def test_server_that_ignores_n_is_asked_again_for_the_missing(sample, server, tmp_path):
    server.reply.most_choices = 1
    server.reply.log_probs = False
    done = sample("-n", 3)
    assert done.code == 0, done.err
    found = rows(tmp_path / "out.jsonl")
    assert [row["completion"] for row in found] == [
        text_of(q["prompt"], seed_of(a, k)) for a, q in enumerate(QUESTIONS) for k in range(3)
    ]
    assert {row["length"] for row in found} == {3}  # as the server counts, without log-probs
    assert not any("logprob" in row for row in found)
    assert "36 requests, 180 prompt tokens, 108 completion tokens" in done.err


def test_servers_that_cannot_be_used(sample, server, data, tmp_path, monkeypatch):
    closed = f"http://127.0.0.1:{free_port()}/v1"
    refused(sample(url=closed), f"--engine {closed}: the connection failed", "does the server run?")
    for url in ("http://", "http://a b:c/v1", "ftp://127.0.0.1/v1"):
        refused(sample(url=url), f"--engine {url}: give the full address")
    refused(sample(url="vlm"), "did you mean 'vllm'?")
    reply = server.reply
    reply.refusal = (401, {"error": {"message": "who are you"}}, {})
    refused(sample(), "asks for a key: set $OPENAI_API_KEY (status 401: who are you)")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    refused(sample(), "refuses the key in $OPENAI_API_KEY")
    assert server.headers == []  # no question was sent
    monkeypatch.setenv("OPENAI_API_KEY", "open sesame")
    assert "open sesame" not in sample().err
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    reply.refusal = None
    reply.models = [f"model-{i}" for i in range(9)]
    reply.faults = {QUESTIONS[0]["prompt"]: [says("no such model", 404)] * 2}
    refused(sample(model="modl-3"), "no model modl-3: did you mean model-3? It lists model-0", "model-7 and 1 more")
    reply.models = []
    refused(sample(), "status 404: no such model", "/v1", "--api")
    reply.faults = {q["prompt"]: [says("too long", 400)] * 99 for q in QUESTIONS}
    refused(sample(), f"no question is answered: {data}:1: status 400: too long; {data}:2: ")
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sesame"}
    assert not any(prompt in reply.asked for prompt in (q["prompt"] for q in QUESTIONS[3:]))
    assert list(tmp_path.glob("out*")) == []


def test_options_without_effect_are_refused(command, data):
    words = ["sample", "policy", "--data", data]
    refused(command(*words, "--concurrency", 3), "--concurrency 3 has no effect", "--engine URL")
    server = ["--engine", "http://127.0.0.1:1/v1"]
    refused(command(*words, *server, "--batch-size", 3), "--batch-size 3 has no effect")
    refused(command(*words, *server, "--use-generation-config"), "has no effect", "--temperature")
    refused(command(*words, *server, "--guide", "beam", "--reward-model", "rm"), "--guide decodes with transformers")
    refused(command(*words, *server, "--api", "chat", "--template", "plain"), "use --template chat, or --api")
    refused(command(*words, *server, "--api", "completions", "--template", "chat"), "is no folder here")
    refused(command(*words, *server, "--api", "chta"), "'chta': did you mean 'chat'?")


def test_messages_go_to_chat(sample, server, tmp_path):
    """Messages in the data choose it; the server's template gets the variables; reasoning is part of the trace."""
    questions = tmp_path / "messages.jsonl"
    system = {"role": "system", "content": "Be brief."}
    asked = [[system, {"role": "user", "content": q["prompt"]}] for q in QUESTIONS]
    write_jsonl(questions, [{"prompt": m, "answer": q["answer"]} for m, q in zip(asked, QUESTIONS, strict=True)])
    message = {"content": "#### 3", "reasoning_content": "1 + 2"}
    choice = {"message": message, "finish_reason": "stop", "logprobs": {"content": [{"logprob": -1.0}]}}
    server.reply.faults[QUESTIONS[1]["prompt"]] = [(200, {"choices": [choice]}, JSON)]
    done = sample("-n", 1, "--chat-template-kwargs", '{"enable_thinking": true}', questions=questions)
    assert done.code == 0, done.err
    assert set(server.reply.paths) == {"/v1/chat/completions"}
    body = server.reply.bodies[0]
    assert (body["messages"], body["chat_template_kwargs"]) == (asked[0], {"enable_thinking": True})
    assert body["logprobs"] is True
    found = rows(tmp_path / "out.jsonl")
    assert (found[1]["completion"], found[1]["length"], found[1]["logprob"]) == (
        "<think>\n1 + 2\n</think>\n\n#### 3",
        1,
        -1.0,
    )
    assert found[0]["prompt"] == asked[0]


def test_texts_go_to_chat_if_asked(sample, server):
    assert sample("-n", 1, "--limit", 2, "--api", "chat").code == 0
    assert [body["messages"] for body in server.reply.bodies] == [
        [{"role": "user", "content": q["prompt"]}] for q in QUESTIONS[:2]
    ]


def test_folder_of_a_chat_model_is_rendered_here(sample, server, tmp_path):
    """The server's tokenizer adds <s>, which the text that is sent must not have again."""
    folder = save_chat_model(tmp_path / "policy", "<s>" + CHATML)
    byte_tokenizer("<s>" + CHATML, ("<s>", ""), SPECIAL, bos_token="<s>").save_pretrained(folder)
    server.reply.models = [folder]
    server.reply.answer = lambda body, prompt: {"choices": [{"text": "#### 2", "finish_reason": "stop"}]}
    done = sample("-n", 1, "--limit", 1, "--template", "chat", "--max-new-tokens", 9, model=folder)
    assert done.code == 0, done.err
    assert server.reply.bodies[0]["prompt"] == "<|im_start|>user\n0 + 2 = ?\n<|im_end|>\n<|im_start|>assistant\n"
    assert "counts no tokens" in done.err


def test_accuracy_of_a_policy_at_a_server(command, server, data, tmp_path):
    words = ["evaluate", "policy", "policy", "--task", "arithmetic", "--data", data, "-n", 4, "--json"]
    done = command(*words, "--engine", server.url, "-o", tmp_path / "evaluation")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["greedy"]["accuracy"], result["sampled"]["accuracy"]) == (0.5, 0.5)
    assert result["sampled"]["traces"] == 48
    assert result["sampled"]["cut_off"] == pytest.approx(0.5 * 3 / 4)  # of the wrong half
    assert [body["temperature"] for body in server.reply.bodies] == [0.0] * 12 + [1.0] * 12
    assert not any("seed" in body for body in server.reply.bodies[:12])


def test_commands_of_the_page_run(command, server, tmp_path, monkeypatch):
    """Those that ask a server ask this one, in the page's order and one folder."""
    write_jsonl(tmp_path / "test.jsonl", QUESTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("tracereward ")]
    asking = [words for words in commands if words[words.index("--engine") + 1].startswith("http")]
    assert len(asking) == 4
    for words in asking:
        words[words.index("--engine") + 1] = server.url
        done = command(*words)
        assert done.code == 0, f"{words}: {done.err}"
    assert len(rows(tmp_path / "served.jsonl")) == 12 * 16
    assert len(rows(tmp_path / "hosted.jsonl")) == 12 * 4
    assert (tmp_path / "evaluation" / "policy.json").is_file()
    assert set(server.reply.paths[-12:]) == {"/v1/chat/completions"}


@pytest.fixture(scope="module")
def transformers_server(tiny_model_folder):
    """transformers' own server with the tiny model, in this process; its URL."""
    port = free_port()
    serve = Serve(force_model=str(tiny_model_folder), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    wait_for(lambda: serve.server.started, "the server")
    yield f"http://127.0.0.1:{port}/v1"
    serve.kill_server()


def test_real_server_gives_the_completions_of_generate(command, transformers_server, tiny_model_folder, data, tmp_path):
    """It refuses options that it does not know, ignores `n`, and has neither log-probs nor a list of this model."""
    words = ["sample", tiny_model_folder, "--task", "arithmetic", "--data", data, "--max-new-tokens", 8, "-n", 1]
    words += ["--temperature", 0]
    own = command(*words)
    assert own.code == 0, own.err
    done = command(*words, "--engine", transformers_server, "--concurrency", 4)
    assert done.code == 0, done.err
    expected = [json.loads(line) for line in own.out.splitlines()]
    found = [json.loads(line) for line in done.out.splitlines()]
    assert found == [{name: value for name, value in row.items() if name != "logprob"} for row in expected]
    assert any(row["finished"] for row in found) or len({row["completion"] for row in found}) > 1
    written = sum(row["length"] for row in expected)
    assert f"{written} completion tokens" in done.err
