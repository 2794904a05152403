"""Run a case's commands, each in a process forked from this one, within limits."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.torture.attacks import Attack
from tests.warm import run_command

ROOT = Path(__file__).parent.parent.parent.parent

SECONDS, MEMORY = 10.0, 2**30

IDLE, CLOCK = 8.0, 240.0
"""Seconds without work after which a process hangs; seconds on the clock after which it is ended,
since processor time comes slowly on a busy machine."""

TICKS = os.sysconf("SC_CLK_TCK")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


class Ended(NamedTuple):
    """How a command ended: exit status (a signal's is negative), seconds of processor time, bytes of
    memory beside the imports, and why it was ended by us."""

    status: int
    seconds: float
    memory: int
    stopped: str | None


class Limits(NamedTuple):
    """What a case may take, and what the imports take."""

    seconds: float
    memory: int
    idle: float
    clock: float
    baseline: int
    imports: float
    """Seconds that the imports take a process of its own."""

    def allow_for(self, attack: Attack, stage: Path) -> Limits:
        """The same with the seconds that such a command's processes take to import."""
        path = stage / "seconds.json"
        sound = json.loads(path.read_text()) if path.is_file() else {}
        more = self.imports * (attack.fresh + attack.dequantises)
        more += sound.get("export-gguf", 0.0) if "export-gguf" in attack.arguments else 0.0
        more += sound.get("generate", 0.0) if attack.opens_gguf else 0.0
        return self._replace(seconds=self.seconds + more)


def measure_baseline(imports: float) -> Limits:
    """What a forked child has before it does anything."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    usage = os.wait4(child, 0)[2]
    here = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    baseline = max(usage.ru_maxrss << 10, here)
    return Limits(SECONDS, MEMORY, IDLE, CLOCK, baseline, imports)


def perform(root: Path, attack: Attack, limits: Limits) -> tuple[list[Ended], list[int]]:
    """Run a case's commands; return how each ended, and the processes that they left."""
    left = kill_amid(root, attack) if attack.killed is not None else []
    watched = []
    for number, words in enumerate([attack.arguments, *attack.together]):
        now = time.monotonic()
        watched.append(Watched(start(root, attack, number, words), now, now))
    ended = []
    while len(watched) > 1:  # they are looked at in turn: the first to end is waited for first
        ended.append(watch(watched.pop(0), limits))
    ended.append(watch(watched[0], limits))
    return ended, left + reap()


def kill_amid(root: Path, attack: Attack) -> list[int]:
    """Start the command, kill -9 it, and return the processes that outlive it."""
    assert attack.killed is not None
    process, began = start(root, attack, 9, attack.arguments), time.monotonic()
    while time.monotonic() - began < attack.killed:
        time.sleep(0.005)
        if os.waitpid(process, os.WNOHANG)[0]:
            break
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    left = reap(2.0)
    shutil.rmtree(root / "io9")
    return left


def start(root: Path, attack: Attack, number: int, words: list[str]) -> int:
    """Start a command; return its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        be_command(root, attack, number, words)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        end(status)
    raise AssertionError


def be_command(root: Path, attack: Attack, number: int, words: list[str]) -> None:
    """In the child: become the command."""
    enter(root, attack, number)
    closed = [value for what, value in attack.surroundings if what == "close"]
    folder = root / f"io{number}"
    if attack.fresh:
        for descriptor, flags in (
            (0, os.O_RDONLY),
            (1, os.O_WRONLY | os.O_CREAT),
            (2, os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(folder / str(descriptor), flags), descriptor)
        os.closerange(3, 4096)
        for descriptor in closed:
            os.close(descriptor)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-m", "lora_cli", *words], environment)
    if attack.program is not None:
        (root / "program.py").write_text(attack.program)
    call = {"arguments": words, "cwd": str(root / "work"), "folder": str(folder)}
    call |= {"program": str(root / "program.py")} if attack.program is not None else {}
    run_command(call)


def end(status: int) -> NoReturn:
    """In the child: end as the interpreter does, but for the way back through this program."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            status = status or 120
    os._exit(status & 255)


def enter(root: Path, attack: Attack, number: int) -> None:
    """In the child: its folders, its environment, its limits."""
    os.setsid()
    os.environ |= {
        "HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "LORA_CACHE_DIR": str(root / "cache"),
        "XDG_CACHE_HOME": str(root / "home" / ".cache"),
    }  # fmt: skip
    os.environ |= attack.environment
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(root / "work")
    (root / f"io{number}").mkdir()
    for name in "012":
        (root / f"io{number}" / name).write_bytes(attack.stdin if name == "0" else b"")
    for what, value in attack.surroundings:
        surround(what, value)


def surround(what: str, value: Any) -> None:
    """Put this process into surroundings of another kind."""
    if what == "umask":
        os.umask(value)
    elif what.startswith("limit "):
        kind = getattr(resource, f"RLIMIT_{what.removeprefix('limit ')}")
        resource.setrlimit(kind, (value, value))
    elif what == "unset":
        os.environ.pop(value, None)
    elif what == "powerless":
        drop_capabilities()
    elif what == "clock":
        before = time.time
        start = before()
        time.time = lambda: start - value if before() > start + 0.2 else before()
    elif what != "close":
        raise ValueError(what)


def drop_capabilities() -> None:
    """Let modes hold for root as well: what is closed to its owner is closed to it."""
    version = 0x20080522  # linux/capability.h
    header, none = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


@dataclass
class Watched:
    """A command that runs, and when it last did anything."""

    process: int
    began: float
    busy: float
    seconds: float = 0.0
    most: int = 0
    stopped: str | None = None


def watch(watched: Watched, limits: Limits) -> Ended:
    """Wait for a command's end; end it where it goes on too long, or takes too much."""
    pause = 0.002
    while True:
        process, status, usage = os.wait4(watched.process, os.WNOHANG)
        if process:
            break
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
        stop_excess(watched, limits)
    seconds = usage.ru_utime + usage.ru_stime
    memory = max((usage.ru_maxrss << 10), watched.most) - limits.baseline
    return Ended(os.waitstatus_to_exitcode(status), seconds, memory, watched.stopped)


def stop_excess(watched: Watched, limits: Limits) -> None:
    """End a command that takes too much."""
    now = time.monotonic()
    usages = [read_usage(each) for each in (watched.process, *list_children(watched.process))]
    seconds, memory = sum(each for each, _ in usages), max(memory for _, memory in usages)
    watched.most = max(watched.most, memory)
    if seconds > watched.seconds + 0.015:
        watched.seconds, watched.busy = seconds, now
    if watched.stopped:
        return
    if seconds > limits.seconds + 1:
        watched.stopped = f"takes over {limits.seconds:.0f} s of processor time"
    elif memory > limits.baseline + limits.memory * 1.1:
        watched.stopped = f"takes {(memory - limits.baseline) >> 20} MiB of memory and more"
    elif now - watched.busy > limits.idle:
        watched.stopped = "hangs"
    elif now - watched.began > limits.clock:
        watched.stopped = f"does not end in {limits.clock:.0f} s"
    if watched.stopped:
        kill_session(watched.process, also=True)


def read_usage(process: int) -> tuple[float, int]:
    """Seconds of processor time that a process has taken, with those of its children that have
    ended, and the bytes of memory it has."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0, 0
    return sum(map(int, fields[11:15])) / TICKS, int(fields[21]) * resource.getpagesize()


def list_children(process: int) -> list[int]:
    """The processes below a process, at any depth."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        near = [int(each) for task in tasks for each in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [*near, *(each for child in near for each in list_children(child))]


def kill_session(process: int, also: bool = False) -> list[int]:
    """End what is left of a command's session."""
    left = list_session(process)
    for each in [*left, *([process] if also else [])]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return left


def list_session(process: int) -> list[int]:
    """The processes of a session but the first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != process:
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == process and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def reap(limit: float = 1.0) -> list[int]:
    """The children that commands have left to us; they are given a moment to end."""
    deadline = time.monotonic() + limit
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        left = list_children(os.getpid())
        if not left:
            return []
        if time.monotonic() > deadline:
            for each in left:
                os.kill(each, signal.SIGKILL)
            return left
        time.sleep(0.02)
