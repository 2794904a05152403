"""A signal ends a process in order, wherever it comes: nothing half made, no child, no traceback.

Hermetic: processes of its own. Needs fork: Linux, macOS. Alone: pytest tests/common/test_endings.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_cli.common import LoraError, children

ROOT = Path(__file__).parent.parent.parent
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process of that code, when it has printed a line."""
    preamble = (
        "import os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
        "from lora_cli.common import children, endings, files\n"
        # a job in the background ignores one, and a job of nohup the other
        "for number in (signal.SIGINT, signal.SIGHUP):\n    signal.signal(number, signal.SIG_DFL)\n"
        "endings.listen()\nhere = Path(sys.argv[1])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", preamble + code, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Its exit status after that signal, and what it said."""
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_a_signal_may_come_amid_an_import(tmp_path: Path) -> None:
    """multiprocessing lists its workers before it has what they stand in."""
    code = """
from multiprocessing import process
del process._children
print("in", flush=True)
time.sleep(60)
"""
    assert end(start(code, tmp_path), signal.SIGTERM) == (128 + signal.SIGTERM, "terminated\n")


@pytest.mark.parametrize("number", ENDED)
def test_a_signal_is_not_lost_where_an_exception_would_be(number: int, tmp_path: Path) -> None:
    """In a destructor, and where a library catches everything."""
    code = """
class Leaving:
    def __del__(self):
        print("in", flush=True)
        time.sleep(60)

with files.scratch_folder(here):
    try:
        del (held := [Leaving()])[:]
    except BaseException:
        pass
    print("went on", file=sys.stderr)
"""
    assert end(start(code, tmp_path), number) == (128 + number, f"{ENDED[number]}\n")
    assert not list(tmp_path.iterdir())


def test_a_signal_that_was_ignored_before_stays_ignored(tmp_path: Path) -> None:
    code = "import os\nfrom lora_cli.common import endings\n"
    code += "endings.listen()\nos.kill(os.getpid(), 1)\nprint('went on')"
    for prefix, said in ((["nohup"], "went on\n"), ([], "")):
        command = [*prefix, sys.executable, "-c", code]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0 if prefix else 129, said)


def test_a_signal_waits_for_two_steps_that_belong_together(tmp_path: Path) -> None:
    code = """
(here / "one").touch()
(here / "two").touch()
replace = Path.replace

def slowly(self, target):
    replace(self, target)
    print("moved", flush=True)
    time.sleep(1)

Path.replace = slowly
files.move_together({here / "one": here / "uno", here / "two": here / "due"})
"""
    assert end(start(code, tmp_path), signal.SIGTERM)[0] == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["due", "uno"]


def test_a_forked_child_that_is_ended_leaves_its_parent_s_things_alone(tmp_path: Path) -> None:
    code = """
with files.scratch_folder(here) as folder:
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        os.write(told, b"x")
        time.sleep(60)
    os.read(heard, 1)  # a signal amid the fork itself is lost by Python
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), folder.is_dir(), file=sys.stderr)
    print("ended", flush=True)
    time.sleep(60)
"""
    status, said = end(start(code, tmp_path), signal.SIGINT)
    # what other tests' killed processes left among the temporary files may be told before
    assert (status, said.splitlines()[-2:]) == (130, ["143 True", "interrupted"])
    assert not list(tmp_path.iterdir())


FAMILY = """
grandchild = "import time; print(1, flush=True); time.sleep(60)"
child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(60)"
with files.scratch_folder(here) as folder:
    with children.start([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        print("all there", flush=True)
        time.sleep(60)
"""


def wait_for_end(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of the family that do not end."""
    return psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.parametrize("number", [*ENDED, signal.SIGKILL])
def test_children_and_theirs_end_with_the_process(number: int, tmp_path: Path) -> None:
    process = start(FAMILY, tmp_path)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3  # a keeper, a child, and its own
    status, _ = end(process, number)
    if number == signal.SIGKILL:
        assert wait_for_end(family) == []
    else:
        assert status == 128 + number
        assert wait_for_end(family) == []  # killed, and the kernel may take a moment
        assert not list(tmp_path.iterdir())


def test_what_a_child_leaves_running_ends_with_it() -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL).pid)"
    done = children.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    left = [int(done.stdout)] if psutil.pid_exists(int(done.stdout)) else []
    assert wait_for_end([psutil.Process(pid) for pid in left]) == []


def test_a_command_s_status_input_and_output_are_its_own() -> None:
    ends = "import os, sys; print(sys.stdin.read()); print('no', file=sys.stderr); sys.stdout.flush()\n"
    for code, status in (
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.kill(os.getpid(), 15)", -15),
    ):
        command = [sys.executable, "-c", ends + code]
        done = children.run(
            command, "given", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, "given\n", "no\n")
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert time.monotonic() - began < 30
    with pytest.raises(LoraError, match="there-is-none cannot be run"):
        children.run(["there-is-none"])


def test_a_signal_amid_the_imports_ends_quietly(tmp_path: Path) -> None:
    """At every tenth of the time that the smallest command takes."""
    command = [sys.executable, "-m", "lora_cli", "recipes"]
    began = time.monotonic()
    subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    length, seen = time.monotonic() - began, 0
    for tenth in range(2, 10):  # before that the interpreter itself starts
        number = list(ENDED)[tenth % 3]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        time.sleep(length * tenth / 10)
        status, said = end(process, number)
        assert status in (0, 128 + number, -number), said
        assert "Traceback" not in said
        seen += status != 0
    assert seen >= 3


AT_THE_END = """
import atexit, builtins, threading
from lora_cli import __main__, cli

class Held:
    def __del__(self):  # as the interpreter takes everything apart
        print("taken apart", flush=True)
        time.sleep(60)

def work():
    endings.listen()
    builtins.held = Held()
    atexit.register(lambda: (here / "done").touch())
    {more}
    print("worked")
    sys.exit({status})

cli.main = work
print("begins", flush=True)
__main__.main()
"""


@pytest.mark.parametrize("status", [0, 3, None])
def test_the_end_is_not_long_and_has_the_work_s_status(tmp_path: Path, status: int | None) -> None:
    """Signals end a process at once while the interpreter takes it apart."""
    process = start(AT_THE_END.format(more="", status=status), tmp_path)
    assert process.stdout is not None
    assert process.stdout.read() == "worked\n"
    assert process.wait(timeout=30) == (status or 0)
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("number", ENDED)
def test_a_thread_that_hangs_at_the_end_is_ended_by_a_signal(number: int, tmp_path: Path) -> None:
    more = "threading.Thread(target=time.sleep, args=[60]).start(); print('hangs', flush=True)"
    process = start(AT_THE_END.format(more=more, status=0), tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    time.sleep(0.3)
    assert end(process, number) == (128 + number, f"{ENDED[number]}\n")


def test_a_signal_amid_what_is_done_at_the_end_waits_for_nothing(tmp_path: Path) -> None:
    more = "atexit.register(lambda: (print('ends', flush=True), time.sleep(60)))"
    process = start(AT_THE_END.format(more=more, status=0), tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() + process.stdout.readline() == "worked\nends\n"
    assert end(process, signal.SIGTERM) == (143, "terminated\n")


def test_nothing_else_starts_programs() -> None:
    starting = re.compile(
        r"subprocess\.(run|Popen|call|check_\w+)\(|os\.(spawn|exec|posix_spawn)\w*\("
    )
    found = {
        path.relative_to(ROOT / "lora_cli").as_posix()
        for path in (ROOT / "lora_cli").rglob("*.py")
        if starting.search(path.read_text())
    }
    # one that starts nothing itself, has no files, and ends with the pipe it is asked by
    confined = "common/confined.py"
    assert found - {confined} == {"common/children.py", "common/keeper.py"}
