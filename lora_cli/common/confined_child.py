"""The other end of `confined.py`: `python confined_child.py PROGRAM`. Standard library only, and
nothing of this package, which takes long to import.

A message is its length in 8 bytes, and as many bytes of JSON: `[budget, shared, jobs]` comes in,
lists of some answers go out.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import sys
import threading
from typing import IO

MEMORY = 77
"""The exit status of a program that was out of memory."""

PIECE = 2**16
"""Characters of answers that are sent at a time."""


def main() -> None:
    """Answer jobs until the pipe is closed."""
    for name in ("SIGINT", "SIGTERM"):  # theirs is to end the parent, and the pipe tells us
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    threading.Thread(target=_end_with_parent, args=[asked.fileno()], daemon=True).start()
    # for a program of more than the standard library; pathlib takes long
    sys.path.append(os.path.abspath(f"{__file__}/../../.."))  # noqa: PTH100
    handle = runpy.run_path(sys.argv[1])["handle"]
    while length := int.from_bytes(asked.read(8), "little"):
        _limit_memory(0)
        message = asked.read(length).decode("utf-8", "surrogatepass")
        (seconds, memory, each), shared, jobs = json.loads(message)
        _limit_memory(memory)
        kept, size = list[str](), 0
        for number, job in enumerate(jobs):
            if each or number == 0:
                _limit_time(seconds)
            try:
                kept.append(json.dumps(handle(shared, job), ensure_ascii=False))
                size += len(kept[-1])
                if size > PIECE or number + 1 == len(jobs) or not each:
                    _send(answers, f"[{','.join(kept)}]".encode("utf-8", "surrogatepass"))
                    kept, size = [], 0
            except MemoryError:
                os._exit(MEMORY)
        _limit_time(0)


def _end_with_parent(pipe: int) -> None:
    """End this process, amid a job too, where the pipe has no other end any more: after kill -9 of
    the parent no job runs on."""
    if hasattr(select, "poll"):  # not on Windows
        watched = select.poll()
        watched.register(pipe, 0)
        while not any(happened & select.POLLHUP for _, happened in watched.poll()):
            pass
        os._exit(0)


def _send(answers: IO[bytes], message: bytes) -> None:
    answers.write(len(message).to_bytes(8, "little") + message)
    answers.flush()


def _limit_time(seconds: float) -> None:
    """Let the system end this process after so much more processor time; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(more: int) -> None:
    """Let this process take so many more bytes, where the system is Linux; 0: any number."""
    if sys.platform != "linux":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if more:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 – pathlib takes long
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit if most < 0 else min(limit, most), most))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
