"""Run the application under uvicorn: connection limit, header timeout, access log and graceful shutdown."""

import asyncio
import logging
import resource

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tracereward.serving.service import log

HEADER_SECONDS = 10.0  # from a connection's start or last response to the end of the next request's header


def most_connections() -> int:
    """Limit of connections: half of the open-file limit; the model, the upstream and new connections need the rest."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 8192) // 2


class Connection(H11Protocol):
    """A uvicorn connection that is closed above the connection limit or after a header timeout.

    uvicorn has no timeout for a partial header, so clients that never complete theirs would exhaust the open files.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the header timeout, or abort above the connection limit."""
        full = len(self.connections) >= most_connections()
        super().connection_made(transport)
        if full:
            log.warning("a connection was refused: %d are open (half of `ulimit -n`)", most_connections())
            transport.abort()
        else:
            self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the header timeout."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the header timeout for the next request."""
        self._wait_for_header()
        super().on_response_complete()

    def _wait_for_header(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()


def without_query(record: logging.LogRecord) -> bool:
    """Log filter that strips query strings from uvicorn's access log, as they may hold a key or a text."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True


def run(app: FastAPI, host: str, port: int, drain_seconds: int) -> None:
    """Serve until a signal arrives, then finish the requests in flight.

    Args:
        app: the application.
        host: address to listen on.
        port: 0 for a free one.
        drain_seconds: time limit for requests in flight after the signal; later ones get 503.
    """
    logging.getLogger("uvicorn.access").addFilter(without_query)
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
        backlog=most_connections() // 4,  # asyncio accepts up to this many at once, before they can be counted
    )
