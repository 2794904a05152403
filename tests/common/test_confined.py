"""A program in a process with limits: what it answers, how it is stopped, and that signals reach
this process meanwhile.

Hermetic: starts Python. Alone: pytest tests/common/test_confined.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lora_cli.common import confined
from lora_cli.common.confined import Budget, Confined, Stopped

PROGRAM = """
import os, time
def handle(shared, job):
    if job == "loop":
        while True:
            pass
    if job == "large":
        return len(bytearray(10**9))
    if job == "die":
        os.abort()
    if job == "sleep":
        time.sleep(0.5)
    if job == "wait":
        time.sleep(600)
    if isinstance(job, int):
        sum(range(job))
    return [shared, job]
"""
SMALL = Budget(0.3, 2**28)


@pytest.fixture
def program(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    made = Confined(tmp_path / "program.py")
    yield made
    made.close()


def test_jobs_are_answered_in_their_order_by_one_process(program: Confined) -> None:
    jobs = ["a", "b\ud800", "é" * 10**6, "c"]
    assert program.run(SMALL, 5, jobs) == [[5, job] for job in jobs]
    first = program.process
    assert program.run(SMALL, 6, ["d"]) == [[6, "d"]] and program.process is first
    assert program.run(SMALL, 6, []) == []


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize(
    ("job", "why"), [("loop", "time"), ("large", "memory"), ("die", f"signal {signal.SIGABRT}")]
)
def test_what_takes_too_much_is_stopped_and_the_next_is_answered(
    program: Confined, job: str, why: str, limited: bool, monkeypatch
) -> None:
    """`limited`: by the system, else by looking, as where the system cannot."""
    monkeypatch.setattr(confined, "LIMITED", limited)
    monkeypatch.setattr(confined, "TIMED", limited)
    monkeypatch.setattr(confined, "LOOK", 0.002)
    for _ in range(2):
        with pytest.raises(Stopped) as caught:
            program.run(SMALL, None, ["a", job, "b"])
        assert caught.value.why == why
        assert program.run(SMALL, None, ["b"]) == [[None, "b"]]


def test_processor_time_counts_and_sleep_takes_none(program: Confined) -> None:
    assert program.run(SMALL, None, ["sleep"]) == [[None, "sleep"]]


def test_a_budget_is_for_each_job_or_for_all(program: Confined) -> None:
    start = time.process_time()
    sum(range(number := 3_000_000))
    seconds = 4 * (time.process_time() - start)
    assert len(program.run(Budget(seconds, 2**28), None, [number] * 12)) == 12
    with pytest.raises(Stopped) as caught:
        program.run(Budget(seconds, 2**28, each=False), None, [number] * 12)
    assert 0 < caught.value.done < 12


def test_a_signal_is_heard_while_a_program_runs(program: Confined) -> None:
    class Heard(Exception):
        pass

    def raise_heard(*_: object) -> None:
        raise Heard

    before = signal.signal(signal.SIGTERM, raise_heard)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(Heard):
            program.run(Budget(60, 2**28), None, ["wait"])
        assert time.monotonic() - start < 5
    finally:
        signal.signal(signal.SIGTERM, before)
    assert program.run(SMALL, None, ["b"]) == [[None, "b"]]


def test_other_threads_may_run_it(program: Confined) -> None:
    made: list[object] = []
    threads = [
        threading.Thread(target=lambda: made.extend(program.run(SMALL, None, ["a"] * 9)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [[None, "a"]] * 36


def test_a_fork_has_a_process_of_its_own(program: Confined) -> None:
    program.run(SMALL, None, ["a"])
    child = os.fork()
    if child == 0:
        fine = program.run(SMALL, None, ["b"]) == [[None, "b"]]
        program.close()
        os._exit(not fine)
    assert os.waitpid(child, 0)[1] == 0
    assert program.run(SMALL, None, ["c"]) == [[None, "c"]]


@pytest.mark.parametrize("job", ["a", "loop"])
def test_it_ends_with_the_process_that_started_it(tmp_path: Path, job: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    code = f"""
import os, threading, time
from pathlib import Path
from lora_cli.common.confined import *
made = Confined(Path({str(tmp_path / "program.py")!r}))
threading.Thread(target=lambda: made.run(Budget(1, 2**28), None, [{job!r}]), daemon=True).start()
while made.process is None:
    time.sleep(0.01)
time.sleep(0.5)
print(made.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    root = Path(confined.__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    number = int(done.stdout)
    for _ in range(100):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie":
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_it_ends_amid_a_job_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """What reads a large file would run on for hours."""
    (tmp_path / "program.py").write_text(PROGRAM)
    code = (
        "from pathlib import Path; import sys; from lora_cli.common.confined import *\n"
        "made = Confined(Path(sys.argv[1])); print(made._start().pid, flush=True)\n"
        "made.run(Budget(600, 2**28), None, [sys.argv[2]])"
    )
    for job in ("wait", "loop"):
        command = [sys.executable, "-c", code, str(tmp_path / "program.py"), job]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            time.sleep(1)
            assert child.is_running()
            parent.kill()
        assert psutil.wait_procs([child], timeout=20)[0] == [child], job
