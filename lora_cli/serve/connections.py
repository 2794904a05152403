"""The connections: uvicorn's, which end where a client neither sends nor reads, and the server
around them, which ends in order."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_cli.common import ui
from lora_cli.serve.app import Service
from lora_cli.serve.errors import ApiError

HEADER_SECONDS = 15.0
"""Within which the headers of a request must be here, from a connection's first moment."""
READ_SECONDS = 30.0
"""Within which a client must read what waits for it, 64 KiB or more."""
IDLE_SECONDS = 20
"""For which a connection stays open without a request."""
SPARE = 64
"""Connections beyond the places for requests: those who ask for /health, or are refused."""


class Connection(H11Protocol):
    """uvicorn's connection with limits of time."""

    most = 0
    """How many there may be at a time; set by the server."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.headers_due: asyncio.TimerHandle | None = None
        self.reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request. Raises nothing: one too many is told so and closed."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_write_refusal())
            self._close()
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes; wait for the rest of a request's headers where they are not whole."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        is_between = self.cycle is None or self.cycle.response_complete
        if not is_between or self.conn.their_state is not h11.IDLE:
            self._forget_headers()
        elif self.headers_due is None:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._forget_headers()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a client that does not read a time to do so."""
        super().pause_writing()
        self.reading_due = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        if self.reading_due is not None:
            self.reading_due.cancel()
            self.reading_due = None

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection, also where its client has not read its last reply."""
        super().timeout_keep_alive_handler()
        self._close()

    def _await_headers(self) -> None:
        self.headers_due = self.loop.call_later(HEADER_SECONDS, self._close)

    def _forget_headers(self) -> None:
        if self.headers_due is not None:
            self.headers_due.cancel()
            self.headers_due = None

    def _close(self) -> None:
        """Close, and drop what its client does not read in time."""
        self.transport.close()
        self.loop.call_later(READ_SECONDS, self.transport.abort)


def _write_refusal() -> bytes:
    """Return the reply to a connection too many."""
    error = ApiError(503, "too many connections; try again", "overloaded", None, 1)
    body = json.dumps(error.to_data()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Log(logging.Handler):
    """Says what uvicorn has to say of errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, a line at a time."""
        ui.say(*self.format(record).splitlines())


class Server(uvicorn.Server):
    """uvicorn's server, which lets the answer that is being made be ended in its time of grace."""

    def __init__(self, service: Service) -> None:
        Connection.most = service.limits.places + SPARE
        self.service = service
        grace = service.limits.grace
        config = uvicorn.Config(
            service.make_app(),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(grace) + 3,
        )
        log = logging.getLogger("uvicorn.error")
        log.propagate, log.handlers = False, [_Log(logging.ERROR)]
        log.setLevel(logging.ERROR)
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, wait for the answer that is being made, and end."""
        self.service.desk.close()
        asyncio.get_running_loop().call_later(self.service.limits.grace, self.service.desk.stop)
        await super().shutdown(sockets)
