"""What Windows does not have is not asked for: the package imports, and light commands run,
without.

Two nets: the names that only POSIX has are taken away from a process before it imports every
module; and the source is searched for them, since most would be met inside functions only. Nothing
here has run on Windows itself.

Hermetic: starts Python. Alone: pytest tests/test_portable.py
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = ["fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"]
NAMES = {
    "os": """
        chown fchmod fork getegid geteuid getgid getloadavg getpgid getpgrp getuid killpg mkfifo nice
        posix_fallocate pread pwrite register_at_fork sched_getaffinity setsid statvfs tcgetpgrp uname wait4
        O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG
    """.split(),
    "signal": """
        ITIMER_PROF ITIMER_REAL ITIMER_VIRTUAL SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGUSR1
        SIGUSR2 SIGVTALRM alarm pause pthread_sigmask setitimer siginterrupt
    """.split(),
}
GUARDED = {
    "common/confined_child.py": {"resource", "signal.ITIMER_PROF", "signal.setitimer"},
    "common/endings.py": {"os.register_at_fork"},
    "common/keeper.py": {"os.killpg", "signal.SIGKILL"},  # started where there is os.killpg
    "common/lock.py": {"os.register_at_fork"},
    "common/threads.py": {"os.getloadavg"},
    "data/cache.py": {"os.getuid"},
    "data/remote.py": {"os.getuid"},
    "gguf/opening.py": {"signal.ITIMER_PROF", "signal.setitimer"},
    "models/llama_program.py": {"resource"},  # ImportError is caught
    "train/reference.py": {"os.getuid"},  # hasattr is asked
    "common/terminal.py": {"os.getpgrp", "os.tcgetpgrp"},  # AttributeError is caught
    "plan/hardware.py": {"resource"},  # after the branch for Windows
}
"""Where such a name stands in the source all the same, and what keeps it from Windows."""


def find_posix_names(path: Path) -> set[str]:
    """Names in the file that Windows does not have: imported modules, and attributes of `os` and
    `signal`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in (*MODULES, *NAMES):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= (
                {f"{node.value.id}.{node.attr}"}
                if node.attr in NAMES.get(node.value.id, [])
                else set()
            )
    return found


def test_no_file_names_what_windows_lacks_but_behind_a_guard() -> None:
    assert len(FILES) > 100
    found = {path.relative_to(PACKAGE).as_posix(): find_posix_names(path) for path in FILES}
    assert {name: names for name, names in found.items() if names} == GUARDED


def test_the_names_searched_for_are_those_of_this_system() -> None:
    known = {"os": os, "signal": signal}
    assert [
        name
        for module, names in NAMES.items()
        for name in names
        if not hasattr(known[module], name)
    ] == []
    assert find_posix_names(Path(__file__)) == set()


WITHOUT_POSIX = f"""
import os, signal, sys
for module in {MODULES!r}:
    sys.modules[module] = None
for name in {NAMES["os"]!r}:
    delattr(os, name)
for name in {NAMES["signal"]!r}:
    delattr(signal, name)
"""
LIBRARIES = "import accelerate, bitsandbytes, datasets, filelock, peft, torch, transformers, trl, trl.trainer.sft_trainer\n"


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_every_module_is_imported_without_what_windows_lacks(tmp_path: Path) -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    code = (
        LIBRARIES
        + WITHOUT_POSIX
        + f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    done = run(code + "print(sum(name.startswith('lora_cli') for name in sys.modules))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= len(modules) > 100


@pytest.mark.parametrize(
    "arguments", ["--help", "train --help", "schema", "recipes", "recipes copy gsm8k"]
)
def test_light_commands_run_without_what_windows_lacks(arguments: str, tmp_path: Path) -> None:
    code = f"import typer, pydantic\n{WITHOUT_POSIX}sys.argv = ['lora', *{arguments.split()!r}]\n"
    done = run(code + "from lora_cli.cli import main\nmain()", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_rows_are_checked_without_what_windows_lacks(tiny: Path, tmp_path: Path) -> None:
    settings = [
        f"model.name_or_path={tiny / 'model'}",
        f"data.path={tiny / 'train.jsonl'}",
        "data.max_rows=8",
    ]
    settings += ["data.columns.prompt=prompt", "data.columns.completion=completion"]
    arguments = [
        "lora",
        "check",
        "own-data",
        *(word for text in settings for word in ("--set", text)),
    ]
    code = (
        f"{LIBRARIES}{WITHOUT_POSIX}sys.argv = {arguments!r}\nfrom lora_cli.cli import main\nmain()"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 rows" in done.stdout


def test_signals_are_those_that_there_are(tmp_path: Path) -> None:
    code = "from lora_cli.train import signals\nprint([number.name for number in signals.LISTENED])"
    assert run(f"{LIBRARIES}{WITHOUT_POSIX}{code}", tmp_path).stdout == "['SIGINT', 'SIGTERM']\n"
    assert run(code, tmp_path).stdout == "['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1']\n"
