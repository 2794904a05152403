"""How OpenMP's threads wait for each other, and how much of the processors other work takes.

Torch's products are spread over threads that wait at the end of each for the last of them. They
spin: libgomp some 300,000 times, which is milliseconds, libomp for 200 ms. Where other work runs,
a spinning thread holds the processor that the last thread waits for, and training can become tens
of times slower.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which a user says how threads wait."""
SPINS = {"quiet": "10000", "busy": "100"}
"""How often a thread of libgomp looks before it sleeps, on a machine that has nothing else to do
and on one that has. Measured by scripts/bench_threads.py: see docs/explanation/benchmarks.md."""
BLOCK_TIME = "1"
"""Milliseconds that a thread of libomp spins."""


def bound_spinning() -> None:
    """Let waiting threads sleep soon, unless the user has said how they wait. To be called before
    torch is loaded."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS["busy" if is_busy() else "quiet"]
        os.environ["KMP_BLOCKTIME"] = BLOCK_TIME


def is_busy() -> bool:
    """Return whether other work keeps half of the processors busy: now, or over the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    with suppress(OSError):  # nor has macOS the number of threads that run now
        load = max(load, int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)
    return load >= 0.5 * (os.cpu_count() or 1)


def describe_waiting() -> str:
    """Return in words how threads wait, as the environment says."""
    said = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return ", ".join(said) or "by OpenMP's default"


class Moment(NamedTuple):
    """Seconds: of the clock, of this process on processors, of all work on them, and of all the
    time they had."""

    clock: float
    ours: float
    busy: float
    possible: float


def look() -> Moment:
    """Return the machine's and this process's processor time up to now."""
    import psutil

    times = psutil.cpu_times()
    possible = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    busy = possible - times.idle - getattr(times, "iowait", 0.0)
    return Moment(time.monotonic(), time.process_time(), busy, possible)


def explain_slowness(before: Moment, after: Moment, num_threads: int) -> str | None:
    """Return in words how much other work took of the processors, where that kept `num_threads`
    threads from them; else None."""
    clock, ours = after.clock - before.clock, after.ours - before.ours
    possible = after.possible - before.possible
    if clock < 5 or possible <= 0:
        return None
    others = (after.busy - before.busy - ours) / possible
    if others < 0.2 or ours > 0.7 * clock * num_threads:
        return None
    return (
        f"other work took {others:.0%} of this machine's processors: this run had {ours:.0f} s of "
        f"theirs in {clock:.0f} s, with {num_threads} threads"
    )
