"""Where requests wait: a queue of so many places, and the one thread that owns the model.

Answers are made one after the other. A request whose client goes away, or whose time is over, gives
its place back at once; the answer that is being made ends with its next token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from lora_cli.common import LoraError, library_errors
from lora_cli.evaluate import answerers
from lora_cli.serve.errors import ApiError
from lora_cli.serve.pieces import Drawing, Emit, End, Piece

LONGEST_RETRY = 60
"""Seconds that a client is asked to wait at most."""


class Writer(Protocol):
    """What writes answers, of models by their names."""

    def write(
        self,
        name: str,
        prompt: list[int],
        drawing: Drawing,
        emit: Emit,
        is_wanted: Callable[[], bool],
    ) -> End:
        """Write the answer to a prompt, a piece at a time, while it is wanted."""


class Engine(Writer, Protocol):
    """What makes prompts too, in another thread."""

    def get_template(self, name: str) -> str | None:
        """Return a model's chat template."""

    def reads_tools(self, name: str) -> bool:
        """Return whether a model's chat template shows the tools that may be called."""

    def find_positions(self, name: str) -> int | None:
        """Return how many tokens prompt and answer may have together, None: any."""

    def measure_longest_token(self, name: str) -> int:
        """Return how many characters a token has at most."""

    def count_tokens(self, name: str) -> int:
        """Return how many token ids there are."""

    def render(self, name: str, asked: answerers.Asked) -> list[int]:
        """Return the prompt of a conversation, as token ids."""

    def tokenize(self, name: str, text: str) -> list[int]:
        """Return a text as token ids."""


Event = Piece | End | Exception


class Job:
    """An answer that is waited for."""

    def __init__(self, model: str, prompt: list[int], drawing: Drawing, seconds: float) -> None:
        self.model, self.prompt, self.drawing = model, prompt, drawing
        self.deadline = time.monotonic() + seconds
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.is_gone = False
        self.has_begun = False

    def is_wanted(self) -> bool:
        """Return whether anybody still waits for it."""
        return not self.is_gone and time.monotonic() < self.deadline

    def put(self, event: Event) -> None:
        """Hand an event over to the thread of the server, unless that has ended."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def read(self) -> AsyncIterator[Piece | End]:
        """Yield the pieces as they come, and the end. Raises ApiError."""
        while True:
            try:
                left = self.deadline - time.monotonic()
                event = await asyncio.wait_for(self.events.get(), max(left, 0))
            except TimeoutError:
                raise self._refuse_late() from None
            if isinstance(event, Exception):
                raise event
            if isinstance(event, End) and not time.monotonic() < self.deadline:
                raise self._refuse_late()
            yield event
            if isinstance(event, End):
                return

    def _refuse_late(self) -> ApiError:
        if self.has_begun:
            return ApiError(504, "the answer takes longer than this server allows", "timeout")
        return ApiError(503, "the request waited too long for its turn", "overloaded", None, 1)


class Desk:
    """Takes jobs, and has them done in their order."""

    def __init__(self, engine: Writer, places: int) -> None:
        self.engine, self.places = engine, places
        self.waiting: deque[Job] = deque()
        self.doing: Job | None = None
        self.took = 1.0
        """Seconds that an answer takes, as a running mean."""
        self.is_closed = False
        self.changed = threading.Condition()
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    def take(self, job: Job) -> None:
        """Let a job wait for its turn. Raises ApiError where all places are taken."""
        with self.changed:
            taken = len(self.waiting) + (self.doing is not None and not self.doing.is_gone)
            if self.is_closed:
                raise ApiError(503, "the server is about to end", "shutting_down", None, 5)
            if taken >= self.places:
                wait = min(max(round(self.took * taken / 2), 1), LONGEST_RETRY)
                said = f"{taken} requests wait already; try again"
                raise ApiError(503, said, "overloaded", None, wait)
            self.waiting.append(job)
            self.changed.notify()

    def leave(self, job: Job) -> None:
        """Give a job's place back, whether it is done, being done or waiting."""
        job.is_gone = True
        with self.changed, suppress(ValueError):
            self.waiting.remove(job)

    def close(self) -> None:
        """Take no more, and send away who waits; what is being made goes on."""
        with self.changed:
            self.is_closed = True
            sent_away = [*self.waiting]
            self.waiting.clear()
        for job in sent_away:
            job.put(ApiError(503, "the server is about to end", "shutting_down", None, 5))

    def stop(self) -> None:
        """End the answer that is being made."""
        if job := self.doing:
            job.put(ApiError(503, "the server has ended", "shutting_down", None, 5))
            job.is_gone = True

    def _work(self) -> None:
        while True:
            with self.changed:
                self.doing = None
                while not self.waiting:
                    self.changed.wait()
                job = self.doing = self.waiting.popleft()
                job.has_begun = True
            if not job.is_wanted():
                continue
            begun = time.monotonic()
            try:
                job.put(self._answer(job))
            except Exception as error:  # noqa: BLE001 – it is told to who asked, and said there
                job.put(error)
            self.took += 0.1 * (time.monotonic() - begun - self.took)

    def _answer(self, job: Job) -> End:
        """Make an answer. What a library says of it is said in our words where we know them."""
        try:
            return self.engine.write(job.model, job.prompt, job.drawing, job.put, job.is_wanted)
        except LoraError:
            raise
        except Exception as error:
            known = library_errors.translate(error)
            if known is None:
                raise
            raise known from error
