"""Run a program over what strangers wrote in a process of its own, with limits of processor time
and memory.

Neither a regular expression nor one operation of a template can be interrupted. Their process can:
the system ends it, and this one is free for signals meanwhile.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from lora_cli.common.confined_child import MEMORY

LIMITED = sys.platform == "linux"
TIMED = hasattr(signal, "setitimer")
"""Whether the system itself limits a process's memory, and its time; else it is looked at."""
LOOK = 0.05
"""Seconds between two looks."""


PATIENCE = 5.0
"""Seconds that are waited for a process that was killed."""


class Budget(NamedTuple):
    """What a program may take: processor seconds, for each job or for all of them together, and
    bytes of memory beside its imports and the jobs."""

    seconds: float
    memory: int
    each: bool = True


class Stopped(Exception):
    """A program that was ended amid a job: `why` (`time`, `memory`, or how its process ended), and
    how many answers had come, which are all of the jobs before where the budget is for all."""

    def __init__(self, why: str, done: int) -> None:
        super().__init__(why)
        self.why, self.done = why, done


class Confined:
    """One program: a Python file that imports little and defines `handle(shared, job)`. Its process
    is started at the first job, and again after it was stopped; it ends with this one."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.lock = threading.Lock()
        atexit.register(self.close)

    def run(self, budget: Budget, shared: Any, jobs: Sequence[Any]) -> list[Any]:
        """Return what the program makes of each job. What is given and returned passes through
        JSON, what JSON does not know as text.

        Raises Stopped where it takes more than the budget, or its process ends.
        """
        sent = budget._replace(
            seconds=budget.seconds if TIMED else 0, memory=budget.memory if LIMITED else 0
        )
        message = json.dumps([sent, shared, jobs], ensure_ascii=False, default=str)
        asked = message.encode("utf-8", "surrogatepass")
        answers: list[Any] = []
        with self.lock:
            process = self._start()
            watch = _Watch(process, budget, answers)
            try:
                with watch:
                    _exchange(process, asked, jobs, answers)
                return answers
            except (OSError, EOFError):  # the pipe has no other end
                raise Stopped(watch.why or _say_why(process.wait()), len(answers)) from None
            finally:
                if len(answers) < len(jobs):  # the rest of its answers are none to the next jobs
                    self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.owner != os.getpid():  # a fork's is that of its parent
            pipe, other_end = subprocess.PIPE, Path(__file__).with_name("confined_child.py")
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(other_end), str(self.program)],
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
            )
            self.owner = os.getpid()
        return self.process

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # the system has to take its memory back
                process.wait(PATIENCE)
            for stream in (process.stdin, process.stdout):
                # what was not sent yet cannot be; a signal may have come amid a read
                with suppress(OSError, RuntimeError):
                    assert stream is not None
                    stream.close()


def _exchange(
    process: subprocess.Popen[bytes], asked: bytes, jobs: Sequence[Any], answers: list[Any]
) -> None:
    """Send the jobs, and add the answers as they come."""
    assert process.stdin and process.stdout
    process.stdin.write(len(asked).to_bytes(8, "little"))
    process.stdin.write(asked)
    process.stdin.flush()
    while len(answers) < len(jobs):
        length = int.from_bytes(_read(process.stdout, 8), "little")
        answers += json.loads(_read(process.stdout, length).decode("utf-8", "surrogatepass"))


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _say_why(code: int) -> str:
    """Say why a process has ended with this code."""
    if code == MEMORY:
        return "memory"
    if code < 0:
        return "time" if -code == getattr(signal, "SIGPROF", 0) else f"signal {-code}"
    return f"exit {code}"


class _Watch:
    """While open, ends a process that takes more than its budget where the system would not."""

    def __init__(
        self, process: subprocess.Popen[bytes], budget: Budget, answers: list[Any]
    ) -> None:
        self.process, self.budget, self.answers = process, budget, answers
        self.why: str | None = None
        self.done = threading.Event()
        self.thread = None if LIMITED and TIMED else threading.Thread(target=self._look)

    def __enter__(self) -> None:
        if self.thread:
            self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.thread:
            self.thread.join()

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):  # it has ended by itself
            looked = psutil.Process(self.process.pid)
            before, began, seen = looked.memory_info().rss, 0.0, -1
            while not self.done.wait(LOOK) and self.why is None:
                used = sum(looked.cpu_times()[:2])
                if seen < 0 or (self.budget.each and len(self.answers) > seen):
                    began, seen = used, len(self.answers)
                if used - began > self.budget.seconds:
                    self.why = "time"
                if looked.memory_info().rss - before > self.budget.memory:
                    self.why = "memory"
            if self.why:
                self.process.kill()
