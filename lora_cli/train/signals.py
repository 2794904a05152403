"""Listen to signals while training.

SIGINT, SIGTERM and SIGHUP end the run after its step and a checkpoint; SIGUSR1 saves a checkpoint
and goes on. Windows has neither SIGHUP nor SIGUSR1: there a run saves as its recipe says, and when
it is ended. A signal that the process was started to ignore (nohup) is left alone.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lora_cli.common import ui
from lora_cli.distributed import ranks

SAVE: signal.Signals | None = getattr(signal, "SIGUSR1", None)
HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)
ENDING = tuple(each for each in (signal.SIGINT, signal.SIGTERM, HANG_UP) if each is not None)
LISTENED = (*ENDING, *([SAVE] if SAVE else []))
ECHO = 5.0
"""Seconds in which one of several processes hears the same signal from its launcher again: srun may
signal all that it has started, and the launcher passes on what it hears, at once."""


class Signals:
    """What signals have asked for; the trainer looks at it between steps."""

    def __init__(self) -> None:
        self.stopping: signal.Signals | None = None
        self.save = False
        self.heard: dict[str, int] = {"stop": 0, "save": 0}
        """What this process has heard, of which `agree` makes what all do."""
        self.stop_heard = -math.inf
        """When, by the clock that nobody sets."""
        self.process = os.getpid()
        self.before: dict[signal.Signals, Any] = {}
        """What each signal did before `listen`."""

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take note of signals inside the block; in a thread other than the main one do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.before = {
            number: signal.signal(number, self._note)
            for number in LISTENED
            if signal.getsignal(number) != signal.SIG_IGN
        }
        ranks.note_listening()
        try:
            yield
        finally:
            self._restore(*LISTENED)

    def agree(self) -> None:
        """Let all processes that train together do what one of them has heard, at one step."""
        stop, save = ranks.find_largest([self.heard["stop"], self.heard["save"]])
        self.stopping = signal.Signals(stop) if stop else None
        self.save = bool(save)
        self.heard["save"] = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if os.getpid() != self.process:  # a data loader's worker, which has inherited this
            if kind is signal.SIGTERM:
                # one for the whole group must not end the step; a second one is for this process
                signal.signal(kind, signal.SIG_DFL)
            return
        if kind is SAVE:
            self.heard["save"] = 1
            return
        if self.heard["stop"]:
            if kind != self.heard["stop"] or time.monotonic() - self.stop_heard > ECHO:
                self._restore(*ENDING)
                signal.raise_signal(kind)
            return
        self.heard["stop"], self.stop_heard = kind, time.monotonic()
        if ranks.count() == 1:
            self._restore(*ENDING)  # a second one does what it did before
        ui.say("", f"{kind.name}: ends after this step and a checkpoint; once more ends at once")

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self.before:
                signal.signal(number, self.before[number])

    def end(self) -> NoReturn:
        """Leave as the signal would have: by KeyboardInterrupt (130), or exit status 143 or 129."""
        assert self.stopping is not None
        if self.stopping is signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self.stopping)
