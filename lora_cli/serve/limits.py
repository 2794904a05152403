"""What a request may take, and the body of one read within it."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from starlette.requests import Request

from lora_cli.serve.errors import ApiError

BODY_SECONDS = 30.0
"""Within which a body must be here whole."""
DRAINED, DRAIN_SECONDS = 2**26, 5.0
"""Bytes of a refused body that are read and forgotten: a client that still sends would not see the
reply."""
BODIES = 8
"""Bodies of the longest kind that are held at a time, all requests together."""


class Limits(NamedTuple):
    """What the command line allows."""

    max_body: int
    """Bytes of a body."""
    max_tokens: int
    """Tokens of an answer."""
    seconds: float
    """From a request's coming to the end of its answer."""
    places: int
    """Requests that wait or are answered."""
    grace: float
    """Seconds for the answer that is being made when the server ends."""


class Bodies:
    """The bodies that are held now, by how many bytes they have."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """Return a request's body, which counts as held until `release`. Raises ApiError: 413 for
        too long a one, 408 for half of one, 503 where too many are held."""
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.limits.max_body:
            raise await self._refuse_long(request)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    self.held += len(part)
                    self._refuse_full()
                    if size > self.limits.max_body:
                        raise await self._refuse_long(request)
                    parts.append(part)
        except TimeoutError:
            self.held -= size
            said = f"the body was not here within {BODY_SECONDS:g} s"
            raise ApiError(408, said, "request_timeout") from None
        except BaseException:
            self.held -= size
            raise
        return b"".join(parts)

    def release(self, body: bytes) -> None:
        """Count a body as gone."""
        self.held -= len(body)

    def _refuse_full(self) -> None:
        if self.held > BODIES * self.limits.max_body:
            raise ApiError(503, "too many long requests at a time", "overloaded", None, 1)

    async def _refuse_long(self, request: Request) -> ApiError:
        await drain(request)
        most = self.limits.max_body
        return ApiError(413, f"the body has over {most:,} bytes", "request_too_large")


async def drain(request: Request) -> None:
    """Read what is left of a body that is refused, for a while, and forget it."""
    if "expect" in request.headers:  # it waits to be asked for it
        return
    left = DRAINED
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return
