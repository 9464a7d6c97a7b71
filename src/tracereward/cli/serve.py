"""The command `tracereward serve`. Imports are inside it."""

import logging
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tracereward.cli.reward import Dtype, Engine, Model
from tracereward.cli.rules import CheckedTyper
from tracereward.console import say
from tracereward.errors import InputError, check_number

server = CheckedTyper()
API_KEY, UPSTREAM_KEY = "TRACEREWARD_API_KEY", "TRACEREWARD_UPSTREAM_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def key_of(file: Path | None, variable: str) -> str | None:
    """A key from a file or the environment; never from the command line, which other users can list."""
    if file is None:
        where, key = f"${variable}", os.environ.get(variable) or None
    else:
        where = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: the key cannot be read ({error})") from error
        if not key:
            raise InputError(f"{file}: the file is empty; it must contain the key")
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise InputError(f"{where}: a key goes into an HTTP header: ASCII letters, digits and signs without spaces")
    return key


def check_upstream(url: str, key: str | None) -> None:
    """Check that `url` is the address of a server, and say so if the server does not list its models.

    It may start later, together with this one, so that an upstream that does not answer is no error.

    Raises:
        InputError: it is not an address.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"--upstream {url}: {error}; give e.g. http://127.0.0.1:8000/v1") from error
    names_a_server = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 80) < 65536
    if not names_a_server or parsed.query or parsed.fragment:
        raise InputError(f"--upstream {url}: give the full address, e.g. http://127.0.0.1:8000/v1")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        models = f"{url.rstrip('/')}/models"
        # The status alone is read: a body may have no end.
        with httpx.stream("GET", models, headers=headers, timeout=2.0, trust_env=False) as answer:
            if answer.status_code == 200:
                return
            said = f"status {answer.status_code} for {answer.url}"
    except httpx.HTTPError as error:
        said = type(error).__name__
    say(f"warning: --upstream {url} does not list its models ({said}): is it the address, with /v1, and does it run?")


def check_address(host: str, port: int) -> None:
    """Check that this process can listen at an address, before a model is loaded for minutes.

    Raises:
        InputError: the port is in use or needs privileges, or the host is not one of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"--host {host} --port {port}: the server cannot listen there ({said})") from error


@server.command()
def serve(
    model: Model,
    engine: Engine = "transformers",
    dtype: Dtype = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8019,
    name: Annotated[str | None, typer.Option(help="Model name in answers. Default: the folder's name.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients must send. Default: ${API_KEY}.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1: adds best-of-N."),
    ] = None,
    upstream_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key for the upstream. Default: ${UPSTREAM_KEY}.")
    ] = None,
    upstream_seconds: Annotated[
        float | None, typer.Option(min=1, help="Timeout of a request's samples in seconds. Default: 300.")
    ] = None,
    max_upstream: Annotated[
        int | None, typer.Option(min=1, help="Concurrent requests to the upstream; further ones get 429. Default: 64.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="N of best-of-N, unless the request sets it. Default: 8.")
    ] = None,
    abstain: Annotated[
        float | None,
        typer.Option(
            help="With --upstream: refuse to answer where the best reward is too low. The probability of a wrong "
            "answer is then at most this, for questions like those of `tracereward calibrate`."
        ),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1024, help="Maximum request body in bytes.")] = 4 * 2**20,
    max_candidates: Annotated[int, typer.Option(min=1, help="Maximum traces per request.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per request, prompts included.")] = 65_536,
    max_queue: Annotated[int, typer.Option(min=1, help="Tokens that may wait; further requests get 429.")] = 1_000_000,
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="Padded tokens per forward pass. Default: by device.")
    ] = None,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long an idle model waits for more traces.")] = 0.0,
    drain_seconds: Annotated[
        int, typer.Option(min=1, help="How long requests in flight may take after SIGTERM; then they get 503.")
    ] = 60,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
) -> None:
    """Serve scores, reranking and, with --upstream, best-of-N over HTTP."""
    try:
        from tracereward.serving.app import create_app
        from tracereward.serving.server import run
        from tracereward.serving.service import Settings, log
    except ImportError as error:
        raise InputError(f"serve needs more packages ({error.name}): pip install 'tracereward[serve]'") from error
    from tracereward.modeling.loading import local_folder
    from tracereward.reports.verdicts import read_verdict
    from tracereward.rewards.abstention import METHODS as ABSTAINING
    from tracereward.rewards.abstention import threshold_of
    from tracereward.rewards.engines import check_engine, load_scorer
    from tracereward.rewards.records import EncodedTrace, ForwardOptions

    # uvicorn re-raises SIGTERM after its shutdown. Without a handler, the first process of a container ignores it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    check_engine(model, engine)
    given = {"--upstream-key-file": upstream_key_file, "--upstream-seconds": upstream_seconds}
    given |= {"--max-upstream": max_upstream, "--samples": samples, "--abstain": abstain}
    if upstream is None and (without := [option for option, value in given.items() if value is not None]):
        raise InputError(f"{' and '.join(without)}: only with --upstream, which adds best-of-N")
    check_number("--upstream-seconds", upstream_seconds or 300.0)
    check_number("--max-wait-ms", max_wait_ms)
    if max_queue < max_tokens:
        raise InputError(f"--max-queue {max_queue} must be at least --max-tokens {max_tokens}")
    if upstream is not None and (samples or 8) > max_candidates:
        raise InputError(f"--samples {samples or 8} must be at most --max-candidates {max_candidates}")
    name = os.path.basename(os.path.abspath(model)) if name is None else name  # works for "." too
    if not name or not name.isprintable():  # half of a surrogate pair, from an argument that is not UTF-8, is not
        raise InputError(f"--name {name!r}: give printable text")
    api_key = key_of(api_key_file, API_KEY)
    upstream_key = None if upstream is None else key_of(upstream_key_file, UPSTREAM_KEY)
    check_address(host, port)
    if upstream is not None:
        check_upstream(upstream, upstream_key)
    settings = Settings(
        name=name,
        api_key=api_key,
        local_only=api_key is None and host in LOOPBACK,
        upstream=upstream,
        upstream_key=upstream_key,
        upstream_seconds=upstream_seconds or 300.0,
        max_upstream=max_upstream or 64,
        abstain=abstain,
        samples=samples or 8,
        max_bytes=max_bytes,
        max_candidates=max_candidates,
        max_tokens=max_tokens,
        max_queue=max_queue,
        token_budget=token_budget,
        max_wait=max_wait_ms / 1000,
        log_prompts=log_prompts,
        verdict=read_verdict(local_folder(model)),
    )
    if api_key is None and host not in LOOPBACK:
        say(f"warning: anyone who reaches {host} can use this server: set ${API_KEY} or --api-key-file")
    scorer = load_scorer(model, engine, dtype)
    if abstain is not None:
        for method in ABSTAINING:
            threshold_of(scorer.settings.abstention, method, abstain)
    end: Any = [scorer.tokenizer.eos_token_id]
    first = EncodedTrace(where=f"{model}: a first trace", prompt=end, completion=end)
    scorer.rewards_of([first], ForwardOptions())  # damaged weights stop here, with one line
    app = create_app(scorer, settings)
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    log.setLevel(logging.INFO)
    run(app, host, port, drain_seconds)
