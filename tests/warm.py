"""The command line without its imports: a process that has them, forked for each call.

A call then costs what its verb does, and not the seconds that torch, transformers, PEFT and TRL take
to import. Calls with an environment of their own are no business of this one: libraries read it when
they are imported.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "doctor.oracle", "drafts.write", "evaluate.chat", "evaluate.generate", "evaluate.predict", "evaluate.verify", "gguf.adapter", "gguf.export",
    "merge.combine", "merge.extract", "merge.merge", "plan.check", "plan.show", "train.run",
)  # fmt: skip


class WarmCLI:
    """`python -m lora_cli`, warm: `run` gives what subprocess.run would."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """`environment` is added to this process's."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )

    def run(
        self,
        arguments: list[str],
        cwd: Path | None = None,
        input: str = "",
        program: str | None = None,
        terminal: str | None = None,
        environment: dict[str, str] | None = None,
        merged: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end: of `lora`, or of the Python file `program`; on a `terminal`
        (a device's path), with an `environment` that only its own code reads; `merged`: stderr goes where
        stdout goes, in the order of what is said."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "0").write_text(input, encoding="utf-8")
            call = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "folder": folder}
            call |= {"program": program} if program else {}
            call |= {"terminal": terminal, "environment": environment or {}, "merged": merged}
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, "the warm process died"
            out, err = (
                ""
                if terminal or (merged and name == "2")
                else (Path(folder) / name).read_text(encoding="utf-8")
                for name in "12"
            )
        command = [program or "lora", *arguments]
        return subprocess.CompletedProcess(command, int(answer), out, err)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve() -> None:
    """Fork for each line of stdin, and answer with the child's exit status."""
    for name in IMPORTED:
        importlib.import_module(f"lora_cli.{name}")
    gc.collect()
    gc.freeze()  # or a child's collector copies all that is here
    answers = os.fdopen(os.dup(1), "w")  # 1 is the commands' own
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.detach()
            return run_command(call)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()
    return None


def run_command(call: dict) -> None:
    """In the child: be the command, as a fresh process would."""
    from lora_cli.cli import main

    os.chdir(call["cwd"])
    os.environ.update(call.get("environment", {}))
    if call.get("terminal"):
        os.setsid()  # the first terminal that it opens then is its own
    for number, flags in (
        (0, os.O_RDONLY),
        (1, os.O_WRONLY | os.O_CREAT),
        (2, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(call.get("terminal") or f"{call['folder']}/{number}", flags)
        os.dup2(opened, number)
        os.close(opened)
    if call.get("merged"):
        os.dup2(1, 2)
        sys.stdout.reconfigure(line_buffering=True)
    if call.get("terminal"):
        sys.stdout, sys.stderr = (open(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [call.get("program", "lora"), *call["arguments"]]
    if "program" in call:
        runpy.run_path(call["program"], run_name="__main__")
    else:
        main()


if __name__ == "__main__":
    serve()
