"""Listen to signals while training.

SIGINT and SIGTERM end the run after its step and a checkpoint; SIGUSR1 saves a checkpoint and goes
on. Windows has no SIGUSR1: there a run saves as its recipe says, and when it is ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lora_cli.common import ui

SAVE: signal.Signals | None = getattr(signal, "SIGUSR1", None)
LISTENED = tuple(number for number in (signal.SIGINT, signal.SIGTERM, SAVE) if number is not None)


class Signals:
    """What signals have asked for; the trainer looks at it between steps."""

    def __init__(self) -> None:
        self.stopping: signal.Signals | None = None
        self.save = False
        self.process = os.getpid()
        self.before: dict[signal.Signals, Any] = {}
        """What each signal did before `listen`."""

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take note of signals inside the block; in a thread other than the main one do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.before = {number: signal.signal(number, self._note) for number in LISTENED}
        try:
            yield
        finally:
            self._restore(*LISTENED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if os.getpid() != self.process:  # a data loader's worker, which has inherited this
            if kind is signal.SIGTERM:
                # one for the whole group must not end the step; a second one is for this process
                signal.signal(kind, signal.SIG_DFL)
            return
        if kind is SAVE:
            self.save = True
            return
        self.stopping = kind
        self._restore(signal.SIGINT, signal.SIGTERM)  # a second one does what it did before
        ui.say(f"\n{kind.name}: ends after this step and a checkpoint; once more ends at once")

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self.before[number])

    def end(self) -> NoReturn:
        """Leave as the signal would have: with KeyboardInterrupt (130) or exit status 143."""
        assert self.stopping is not None
        if self.stopping is signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self.stopping)
