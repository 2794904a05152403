"""A run's folder has one owner: who is refused is told which, and no lock outlives its process.

Hermetic: processes of its own. Needs fork: Linux, macOS. Alone: pytest tests/common/test_lock.py
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from lora_cli.common.errors import LoraError
from lora_cli.common.lock import FILE, find_holders, hold_folder, hold_in_turn

ROOT = Path(__file__).parent.parent.parent
OWNER = """
import sys
from pathlib import Path
from lora_cli.common.lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    {inside}
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(folder: Path, inside: str = "", code: str = OWNER) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, until the block ends at the latest."""
    code = code.replace("{inside}", inside or "pass")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def refuse(folder: Path) -> str:
    """What is said to this process, which must not get the folder."""
    with pytest.raises(LoraError) as caught, hold_folder(folder):
        pass
    return caught.value.message


def test_the_owner_is_named_however_long_an_earlier_one_s_name_was(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("\0a-host-with-a-very-long-name 4194304\n")
    with owner(tmp_path) as other:
        expected = f"{tmp_path} is in use by process {other.pid} on {socket.gethostname()}"
        assert refuse(tmp_path) == expected
        assert refuse(tmp_path) == expected  # the first refusal has left the file as it was
        line = f"{socket.gethostname()} {other.pid}\n".encode()
        assert (
            (tmp_path / FILE).read_bytes()[1:].startswith(line)
        )  # Windows lets nobody read the first byte


def test_the_folder_is_free_after_the_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_folder(tmp_path):
            assert "is in use by process" in refuse(tmp_path)
            raise ZeroDivisionError


def test_a_killed_owner_s_lock_is_gone_and_stops_nobody(tmp_path: Path) -> None:
    with owner(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert str(other.pid) in (tmp_path / FILE).read_text()
        with hold_folder(tmp_path):
            assert str(os.getpid()) in (tmp_path / FILE).read_text()


def test_who_only_looks_whether_there_is_a_holder_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f".lora-{'0' * 16}.lock"
    path.write_text("\0host 4194304\n")  # who was killed
    with filelock.FileLock(path) as looking:
        assert find_holders(tmp_path) == ["process 4194304 on host"]
        monkeypatch.setattr(time, "sleep", lambda _: looking.release())
        assert find_holders(tmp_path) == []


def test_a_worker_that_outlives_its_killed_owner_holds_nothing(tmp_path: Path) -> None:
    forks = """
    import os, time
    heard, told = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(heard, 1)  # until the worker has come to run code of ours
    Path(sys.argv[1], "worker").write_text(str(worker))
    """
    with owner(tmp_path, forks.strip()) as other:
        worker = int((tmp_path / "worker").read_text())
        other.send_signal(signal.SIGKILL)
        other.wait()
        try:
            with hold_folder(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)  # which was alive until now


class LeavesBlockError(Exception):
    """Raised in a forked child only."""


def test_a_worker_that_leaves_the_block_does_not_end_its_owner_s_hold(tmp_path: Path) -> None:
    try:
        with hold_folder(tmp_path):
            worker = os.fork()
            if not worker:
                raise LeavesBlockError
            os.waitpid(worker, 0)
            assert "is in use by process" in refuse(tmp_path)
    except LeavesBlockError:
        os._exit(0)


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / FILE).symlink_to(precious)
    with pytest.raises(LoraError, match=re.escape(FILE)), hold_folder(tmp_path):
        pass
    assert precious.read_text() == "mine"


def test_who_waits_says_for_whom_and_goes_on_when_that_one_has_died(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = OWNER.replace("hold_folder", "hold_in_turn").replace(
        "(Path(sys.argv[1]))", "(Path(sys.argv[1]) / 'made', 'makes it')"
    )
    with owner(tmp_path, code=code) as other:
        ending = threading.Timer(0.5, other.kill)
        ending.start()
        began = time.monotonic()
        with hold_in_turn(tmp_path / "made", "makes it"):
            assert time.monotonic() - began > 0.4
        ending.join()
    said = f"waiting for process {other.pid} on {socket.gethostname()}, which makes it"
    assert capfd.readouterr().err.count(said) == 1
    assert list(tmp_path.iterdir()) == []
