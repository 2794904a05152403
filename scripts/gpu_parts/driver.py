"""Run parts one after another, each in a process of its own, within a budget.

An error of CUDA's spoils the process it happens in, a hang takes the time of all that follows: so a
case that dies or outlasts its limit costs its process, and another goes on with the cases that are
left. While a part works, the next one's process imports what takes seconds. The report is written
anew, whole, after each case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_cli.common import write_json

PAUSE = 0.1
KEPT = 4000
"""Characters of what a process said last that the report keeps, where it died."""


class Part(NamedTuple):
    """A part as the driver knows it: it never imports what it runs."""

    name: str
    module: str
    seconds: float
    """Its share of a budget."""
    environment: Mapping[str, str] = MappingProxyType({})
    """What its process has in addition."""


class Process:
    """A process that imports, waits for its work, and does it."""

    def __init__(self, part: Part, log: Path) -> None:
        self.part, self.log = part, log
        # no look at a network that is not there, and no rows left behind
        common = {"HF_HUB_OFFLINE": "1", "LORA_CACHE_DIR": str(log.parent / "cache")}
        with log.open("ab") as file:
            self.place = file.tell()
            self.running = subprocess.Popen(
                [sys.executable, sys.argv[0], "--child"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env={**os.environ, **common, **part.environment},
                start_new_session=True,
            )

    def begin(self, work: dict[str, Any]) -> None:
        """Tell it what to do."""
        assert self.running.stdin is not None
        try:
            self.running.stdin.write(json.dumps(work).encode() + b"\n")
            self.running.stdin.close()
        except BrokenPipeError:  # it is dead, as will be seen
            return

    def kill(self) -> None:
        """End it with all that it has started."""
        if self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()

    def read_last_words(self) -> str:
        """Return the end of what it has said."""
        with self.log.open("rb") as file:
            file.seek(self.place)
            return file.read().decode(errors="replace")[-KEPT:]


class Driver:
    """Runs parts and keeps the report."""

    def __init__(self, report: Path, scratch: Path, given: dict[str, Any], budget: float) -> None:
        self.report, self.scratch, self.given, self.budget = report, scratch, given, budget
        self.began = time.time()
        self.found: dict[str, Any] = {"given": given | {"budget_s": budget}, "parts": {}}

    def run(self, parts: list[Part]) -> dict[str, Any]:
        """Run all parts in turn; return the report."""
        shares, planned = sum(part.seconds for part in parts), 0.0
        spare = Process(parts[0], self._name_log(parts[0]))
        try:
            for part, following in zip(parts, [*parts[1:], None]):
                planned += part.seconds
                process = spare
                if following:
                    spare = Process(following, self._name_log(following))
                self._run_part(part, process, self.began + self.budget * planned / shares)
        finally:
            spare.kill()
        self.found["seconds"] = round(time.time() - self.began, 1)
        self._write()
        return self.found

    def _name_log(self, part: Part) -> Path:
        return self.scratch / f"{part.name}.log"

    def _run_part(self, part: Part, process: Process, until: float) -> None:
        """Run a part's cases until they are done or its time is over."""
        began, cases = time.time(), dict[str, Any]()
        self.found["parts"][part.name] = here = {"cases": cases}
        lines = self.scratch / f"{part.name}.jsonl"
        while True:
            done = [name for name, case in cases.items() if case["state"] != "waiting"]
            work = self.given | {"module": part.module, "done": done, "until": until}
            if part.environment.get("CUDA_VISIBLE_DEVICES") == "":
                work["device"] = "cpu"
            more = {"lines": lines, "scratch": self.scratch, "report": self.report}
            lines.write_text("")
            process.begin(work | {name: str(path) for name, path in more.items()})
            try:
                ended = self._watch(process, lines, here, until)
            finally:
                process.kill()
            now_done = self._blame(process, cases, ended)
            # one that ends before it has begun anything would be started again and again
            if now_done == len(cases) or now_done == len(done) or time.time() > until:
                break
            process = Process(part, self._name_log(part))
        here["seconds"] = round(time.time() - began, 1)
        left = f"{max(0.0, until - time.time()):.0f} s were left"
        for case in cases.values():
            if case["state"] == "waiting":
                case |= {"state": "skipped", "why": left}
        if not cases:
            here["why"] = f"{left}; {process.read_last_words()}"
        self._write()
        states = [case["state"] for case in cases.values()]
        counted = {state: states.count(state) for state in dict.fromkeys(states)}
        said = ", ".join(f"{number} {state}" for state, number in counted.items())
        print(f"{part.name}: {here['seconds']} s; {said or 'nothing was begun'}", flush=True)

    def _watch(
        self, process: Process, lines: Path, here: dict[str, Any], until: float
    ) -> int | None:
        """Take note of each case until the process ends; return its exit status, or None where it
        outlasts a limit."""
        limit, read, cases = until, 0, here["cases"]
        while True:
            status = process.running.poll()
            text = lines.read_text(encoding="utf-8")
            whole = text[read : text.rfind("\n") + 1]
            read += len(whole)
            for line in whole.splitlines():
                said = json.loads(line)
                if "cases" in said:
                    for name in said.pop("cases"):
                        cases.setdefault(name, {"state": "waiting"})
                    here |= said
                if "case" in said:
                    cases[said.pop("case")] = said
                    limit = min(until, time.time() + said.get("limit", until))
                    self._write()
            if status is not None:
                return status
            if time.time() > limit:
                return None
            time.sleep(PAUSE)

    def _blame(self, process: Process, cases: dict[str, Any], ended: int | None) -> int:
        """Write down which case the process died of, if any; return how many are over."""
        for case in cases.values():
            if case["state"] == "begun":
                hung = "its time was over" if ended is None else f"died with status {ended}"
                case |= {"state": "died", "why": hung, "said": process.read_last_words()}
        return sum(case["state"] != "waiting" for case in cases.values())

    def _write(self) -> None:
        """Write the report, whole or not at all."""
        write_json(self.report, self.found)
