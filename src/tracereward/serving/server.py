"""The application under uvicorn: how many connections, how slow ones, what is logged, and how it ends."""

import asyncio
import logging
import resource

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tracereward.serving.service import log

HEADER_SECONDS = 10.0  # from a connection's start, or its last answer, to the end of the next request's header


def most_connections() -> int:
    """Half of the files that the process may open: others are the model's, the upstream's, and of newcomers."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 8192) // 2


class Connection(H11Protocol):
    """uvicorn's connection, closed where there are too many and where a request's header does not come in time.

    uvicorn itself waits forever for a header that has begun, and files run out by clients who never end theirs.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        full = len(self.connections) >= most_connections()
        super().connection_made(transport)
        if full:
            log.warning("a connection was refused: %d are open (half of `ulimit -n`)", most_connections())
            transport.abort()
        else:
            self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Its request is answered."""
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
    """A filter of uvicorn's access log: a query may hold a key or a text."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True


def run(app: FastAPI, host: str, port: int, drain_seconds: int) -> None:
    """Serve until a signal comes, then answer what is in flight.

    Args:
        app: the application.
        host: address to listen on.
        port: 0 for a free one.
        drain_seconds: that requests in flight may take after the signal; then they get 503.
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
        backlog=most_connections() // 4,  # asyncio accepts as many at once, before they can be counted
    )
