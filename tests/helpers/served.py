"""Test helpers for the server: a small reward model, servers as real processes, and test upstreams."""

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, generate

SECONDS = 120  # deadline for a hung test; passing tests never wait that long
JSON = {"content-type": "application/json"}
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("TRACEREWARD_")} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1",
}


def save_reward_model(folder: Path, tokenizer: Any, shape: dict[str, int] | None = None, **settings: Any) -> Path:
    """Save an untrained reward model with random weights, so that the rewards of traces differ clearly."""
    backbone = folder.with_name(folder.name + "-backbone")
    build_model(tokenizer, seed=0, **shape or {}).save_pretrained(backbone)
    given = RewardSettings(**{"head": "action", "beta_clip": 100.0, "task": "arithmetic", **settings})
    model = TokenRewardModel.from_backbone(str(backbone), given, tokenizer, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if model.head is not None:
            model.head.b += 5.5  # rewards on both sides of 0
    model.save_pretrained(folder)
    return folder


def traces(count: int) -> list[tuple[str, str]]:
    """Prompts and traces with one or more lines."""
    return [(row["prompt"], row["completion"]) for row in generate("misconception", count, seed=5, mistake_rate=0.5)]


def client_of(model: Any, **settings: Any) -> Any:
    """A client of an in-process server; as a context manager it also starts and stops the server."""
    from fastapi.testclient import TestClient

    from tracereward.serving.app import create_app
    from tracereward.serving.service import Settings

    return TestClient(create_app(model, Settings("rm", **settings)), raise_server_exceptions=False)


def close(values: Any) -> Any:
    """Equal up to rounding of rewards."""
    return pytest.approx(values, abs=1e-4)


def assert_error(response: Any, status: int, text: str = "", code: str | None = None, param: str | None = None) -> None:
    """Check that a response is exactly an error in OpenAI's format."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.search(text, error["message"]), error["message"]
    assert isinstance(error["type"], str)
    assert (error["code"], error["param"]) == (code, param)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Poll `condition` until it is true and return its value; after the deadline, fail with `what`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
        time.sleep(0.02)
    return value


class Process:
    """A subprocess running ``python -m ARGV`` (or another `run` flag) with its output in a log file."""

    def __init__(self, log: Path, *argv: object, run: str = "-m", folder: Path | None = None):
        self.log = log
        words = [sys.executable, run, *map(str, argv)]
        with log.open("wb") as file:
            self.popen = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=folder)

    def find(self, pattern: str) -> re.Match[str]:
        """Wait for the first match in the output."""

        def found() -> re.Match[str] | None:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            match = re.search(pattern, text)
            assert match or self.popen.poll() is None, f"the process ended:\n{text[-4000:]}"
            return match

        return wait_for(found, f"{pattern!r} in {self.log}")

    @property
    def url(self) -> str:
        """uvicorn's address, once it listens."""
        return self.find(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")[1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(SECONDS)


@contextlib.contextmanager
def serving(log: Path, model: Path, *argv: object) -> Iterator[Process]:
    """``tracereward serve MODEL`` on a free port."""
    process = Process(log, "tracereward", "serve", model, "--port", "0", *argv)
    try:
        yield process
    finally:
        process.end(signal.SIGKILL)


class Upstream(http.server.ThreadingHTTPServer):
    """Responds to each request with `reply(path, body)`: (status, body, headers). Bytes are sent unchanged.

    An iterator of bytes is streamed until the client disconnects. The body of a GET is None.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        self.reply, self.requests, self.headers = reply, [], []
        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Upstream

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, body))
        self.server.headers.append(self.headers)
        self.answer(body)

    def do_GET(self):
        self.answer(None)

    def answer(self, body):
        status, content, headers = self.server.reply(self.path, body)
        if not isinstance(content, bytes | Iterator):
            content = json.dumps(content).encode()
        known = {"content-length": str(len(content))} if isinstance(content, bytes) else {"connection": "close"}
        with contextlib.suppress(OSError):  # the client disconnected
            self.send_response(status)
            for name, value in {**known, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in [content] if isinstance(content, bytes) else content:
                self.wfile.write(piece)

    def log_message(self, format, *args):
        pass


def sampler(texts, finish="stop", knows_n=True):
    """An upstream that cycles through `texts` and returns `n` of them, or one if it ignores ``n``."""
    lock, given = threading.Lock(), [0]

    def reply(path, body):
        if body is None:
            return 200, {"object": "list", "data": [{"id": "policy", "object": "model"}]}, {}
        choices = []
        with lock:
            for index in range(body.get("n", 1) if knows_n else 1):
                text = texts[given[0] % len(texts)]
                given[0] += 1
                said = {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
                choices.append({"index": index, **said, "finish_reason": finish, "logprobs": None})
        count = {"prompt_tokens": 3, "completion_tokens": 2 * len(choices), "total_tokens": 3 + 2 * len(choices)}
        usage = {**count, "details": {"cached": 1}}
        kind = "chat.completion" if "chat" in path else "text_completion"
        return 200, {"id": "x-1", "object": kind, "model": body.get("model"), "choices": choices, "usage": usage}, {}

    return reply
