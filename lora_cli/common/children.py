"""Start other programs, so that neither they nor what they start outlive this process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.common import endings, files
from lora_cli.common.errors import LoraError
from lora_cli.common.shown import quote_words

KEEPER = Path(__file__).with_name("keeper.py")
PATIENCE = 5.0
"""Seconds that are waited for a group that was killed: the system has to take its memory back."""


@contextmanager
def start(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a group of its own, all of which has ended when the block has, however
    that or this process ends.

    `options` are Popen's. Raises LoraError where there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise LoraError(
            f"{command[0]} cannot be run: no such program", f"try it: {quote_words(command)}"
        )
    if not hasattr(os, "killpg"):  # Windows
        with (
            subprocess.Popen(command, **options) as process,
            endings.undone(partial(_kill, process)),
        ):
            yield process
        return
    with files.scratch_folder() as temporary, _start_kept(command, temporary, options) as process:
        yield process


@contextmanager
def _start_kept(
    command: Sequence[str], temporary: Path, options: dict[str, Any]
) -> Iterator[subprocess.Popen[str]]:
    """Start a command under a keeper, which ends it at the end of a socket; what it puts among the
    temporary files goes with it."""
    options["env"] = {**(options.get("env") or os.environ), "TMPDIR": str(temporary)}
    ours, theirs = socket.socketpair()
    kept = [sys.executable, "-I", "-S", str(KEEPER), str(theirs.fileno()), *command]
    with ours, endings.undone(partial(_end_group, ours)):
        with theirs:
            process = subprocess.Popen(
                kept, pass_fds=[theirs.fileno()], start_new_session=True, **options
            )
        with process:
            try:
                yield process
            finally:
                _end_group(ours)


def run(
    command: Sequence[str], input: str | None = None, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Run a command as subprocess.run does, but as `start` does."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with start(command, stdin=stdin, **options) as process:
        out, err = process.communicate(input, timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end_group(lifeline: socket.socket) -> bool:
    """Let the keeper kill its group, and wait until it has; return True, as nothing is left to
    undo."""
    with suppress(OSError):  # it has ended already
        lifeline.settimeout(PATIENCE)
        lifeline.shutdown(socket.SHUT_WR)
        lifeline.recv(1)
    return True


def _kill(process: subprocess.Popen[str]) -> bool:
    process.kill()
    return True
