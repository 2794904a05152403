"""End in order: what is half made goes and children end, however the process ends but by kill -9.

A signal's handler does that itself and ends the process there. An exception out of it would come
amid anything, also where the interpreter or a library does no more than print it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from lora_cli.common import ui

HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # not on Windows
NUMBERS = tuple(each for each in (signal.SIGINT, signal.SIGTERM, HANG_UP) if each is not None)
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_undoings = dict[object, Callable[[], bool]]()
_last_words = list[Callable[[], None]]()
_owner = os.getpid()
_postponing = 0
_postponed: int | None = None


def _forget() -> None:
    """In a forked child: what is in the making is its parent's."""
    _undoings.clear()
    _last_words.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def undone(undo: Callable[[], bool]) -> Iterator[None]:
    """Call `undo` after the block, or as a signal ends the process in it; again at the process's
    end where it returns False or is interrupted."""
    key = object()
    _undoings[key] = undo
    try:
        yield
    finally:
        if undo():
            _undoings.pop(key, None)  # none in a forked child


def undo_with_process(undo: Callable[[], bool]) -> None:
    """Call `undo` as the process ends."""
    _undoings[object()] = undo


@atexit.register
def undo_all() -> None:
    """Undo what is half made, the newest first."""
    while _undoings:
        _undoings.popitem()[1]()


@contextmanager
def say_at_signal(words: Callable[[], None]) -> Iterator[None]:
    """Call `words` first where a signal ends the process in the block."""
    _last_words.append(words)
    try:
        yield
    finally:
        if words in _last_words:  # not in a forked child
            _last_words.remove(words)


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Let a signal wait for the end of the block, which takes an instant: two steps that belong
    together."""
    global _postponing
    _postponing += 1
    try:
        yield
    finally:
        _postponing -= 1
        if not _postponing and _postponed is not None:
            end(_postponed)


def end(number: int, _frame: FrameType | None = None) -> None:
    """Leave nothing half made, and end with status 128 + `number`."""
    global _postponed
    if os.getpid() != _owner:  # a forked child
        os._exit(128 + number)
    if _postponing:
        _postponed = number
        return
    for each in NUMBERS:
        signal.signal(each, _wait)
    ui.remove_picture()
    for words in reversed(_last_words):
        with suppress(Exception):  # the disk may be full, the terminal gone
            words()
    list_workers = getattr(sys.modules.get("multiprocessing.process"), "active_children", list)
    with suppress(NameError):  # amid that module's import, before it has any
        for worker in list_workers():
            worker.kill()
    undo_all()
    with suppress(OSError, RuntimeError, ValueError):  # or gone, or amid a line
        ui.say(SAID.get(signal.Signals(number), "hung up"))
    os._exit(128 + number)


def _wait(number: int, _frame: FrameType | None) -> None:
    """Let a second signal change nothing until all is undone."""
    if not _undoings:  # the terminal may be stuck
        os._exit(128 + number)


def listen() -> None:
    """Let the signals that end a program end it in order, but for those that it was started to
    ignore (nohup)."""
    global _owner
    _owner = os.getpid()
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def leave(status: int) -> NoReturn:
    """End the process with `status` when its threads have ended and what is left for its end is
    done, a signal's handler being ready until then.

    The interpreter goes on to take everything apart, for some tenths of a second with torch, and
    before that it gives each signal back to the system, which would end the process by it.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # full, closed, or none
            stream.flush()
    os._exit(status)
