"""The command `tracereward serve`. Imports are inside it."""

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tracereward.cli.reward import Engine, Model
from tracereward.cli.rules import CheckedTyper
from tracereward.console import say
from tracereward.errors import InputError

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


def check_upstream(url: str) -> None:
    """Check that `url` is the address of a server.

    Raises:
        InputError: it is not.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"--upstream {url}: {error}; give e.g. http://127.0.0.1:8000/v1") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"--upstream {url}: give the full address, e.g. http://127.0.0.1:8000/v1")


@server.command()
def serve(
    model: Model,
    engine: Engine = "transformers",
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
    upstream_seconds: Annotated[float, typer.Option(min=1, help="Timeout of a request's samples in seconds.")] = 300.0,
    max_upstream: Annotated[
        int, typer.Option(min=1, help="Concurrent requests to the upstream; further ones get 429.")
    ] = 64,
    samples: Annotated[int, typer.Option(min=1, help="N of best-of-N, unless the request sets it.")] = 8,
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
    from tracereward.rewards.engines import check_engine, load_scorer

    # uvicorn re-raises SIGTERM after its shutdown. Without a handler, the first process of a container ignores it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    check_engine(model, engine)
    if upstream is not None:
        check_upstream(upstream)
    if max_queue < max_tokens:
        raise InputError(f"--max-queue {max_queue} must be at least --max-tokens {max_tokens}")
    api_key = key_of(api_key_file, API_KEY)
    settings = Settings(
        name=name or os.path.basename(os.path.abspath(model)),  # works for "." too
        api_key=api_key,
        local_only=api_key is None and host in LOOPBACK,
        upstream=upstream,
        upstream_key=key_of(upstream_key_file, UPSTREAM_KEY),
        upstream_seconds=upstream_seconds,
        max_upstream=max_upstream,
        samples=samples,
        max_bytes=max_bytes,
        max_candidates=max_candidates,
        max_tokens=max_tokens,
        max_queue=max_queue,
        token_budget=token_budget,
        max_wait=max_wait_ms / 1000,
        log_prompts=log_prompts,
    )
    if api_key is None and host not in LOOPBACK:
        say(f"warning: anyone who reaches {host} can use this server: set ${API_KEY} or --api-key-file")
    app = create_app(load_scorer(model, engine), settings)
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    log.setLevel(logging.INFO)
    run(app, host, port, drain_seconds)
