"""Signals while training: SIGINT and SIGTERM end the run after its step and a checkpoint, SIGUSR1
saves and goes on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lora_cli.common import ui

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """What was asked for by signal; looked at by the trainer between steps."""

    def __init__(self) -> None:
        self.stopping: signal.Signals | None = None
        self.save = False
        self.process = os.getpid()
        self.before: dict[signal.Signals, object] = {}

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take note of signals inside the block. In a thread that gets none, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.before = {number: signal.signal(number, self._note) for number in HEARD}
        try:
            yield
        finally:
            self._as_before(*HEARD)

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if os.getpid() != self.process:  # a data loader's worker, which has inherited this
            if (
                kind is signal.SIGTERM
            ):  # sent to the whole group it must not end the step; sent again, it is meant
                signal.signal(kind, signal.SIG_DFL)
            return
        if kind is signal.SIGUSR1:
            self.save = True
            return
        self.stopping = kind
        self._as_before(signal.SIGINT, signal.SIGTERM)  # a second one does what it did before
        ui.say(f"\n{kind.name}: ends after this step and a checkpoint; once more ends at once")

    def _as_before(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self.before[number])  # type: ignore[arg-type]

    def end(self) -> NoReturn:
        """Leave as the signal that asked for it would have: KeyboardInterrupt (130) or exit status
        143."""
        assert self.stopping is not None
        if self.stopping is signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self.stopping)
