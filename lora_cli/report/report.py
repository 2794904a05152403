"""`lora report`: one page of one run or several, and its numbers as JSON beside it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lora_cli.common import LoraError, UsageError, files, plain_files, provenance, quote, ui
from lora_cli.report import facts, history, page

MOST = 30
"""Runs of one page."""
SIGN = '<meta name="generator" content="lora report">'
"""What a page of ours begins with, within its first BEGINNING bytes."""
BEGINNING = 2**10


def write_report(paths: Sequence[Path], output: Path | None) -> Path:
    """Write the report of the runs that paths name, and return its path: by default report.html in
    the run's folder, for several runs in the current one.

    UsageError for paths that name no run, and where what is there is no report; LoraError where it
    cannot be written.
    """
    if output is not None and output.suffix.lower() == ".json":
        raise UsageError(f"{output}: the numbers get that name", "give the page's: -o report.html")
    runs = history.read_runs(paths)
    if len(runs) > MOST:
        raise UsageError(
            f"these are {len(runs)} runs, and a page holds {MOST}", "lora runs lists any number"
        )
    usual = runs[0].folder if len(runs) == 1 else Path()
    return write_page(runs, output or usual / provenance.REPORT)


def write_page(runs: Sequence[history.History], target: Path) -> Path:
    """Write the page of these runs, and its numbers beside it as .json; return the page's path."""
    numbers = target.with_suffix(".json")
    refuse_foreign(target, numbers)
    said = facts.gather(runs)
    text = page.render(runs, said)
    try:
        files.write_json(numbers, said)
        files.write_text(target, text)
    except OSError as error:
        look = "df -h" if error.errno == errno.ENOSPC else "ls -ld"
        hint = f"{look} {quote(target.parent)}"
        raise LoraError(f"{target} cannot be written: {error.strerror}", hint) from error
    return target


def refuse_foreign(target: Path, numbers: Path) -> None:
    """Raise UsageError where what would be replaced is no report of ours, or there is no such
    folder."""
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder", f"mkdir -p {quote(target.parent)}")
    for path, is_ours in ((target, _is_page), (numbers, _is_numbers)):
        if os.path.lexists(path) and not (path.is_file() and is_ours(path)):
            raise UsageError(
                f"{path} is there, and no report of lora's",
                f"-o FILE, or mv {quote(path)} ELSEWHERE",
            )


def _is_page(path: Path) -> bool:
    with open(path, "rb", opener=plain_files.open_plain) as file:
        return SIGN.encode() in file.read(BEGINNING)


def _is_numbers(path: Path) -> bool:
    try:
        found = json.loads(plain_files.read_small(path))
    except (LoraError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("command") == "report"


def write_after(folder: Path, before: int) -> None:
    """Write the report of a run that has just ended, well or not, where its record is another than
    at the stamp `before`; whatever is wrong with the report is a warning, for the run is what
    matters."""
    if history.stamp(folder) in (0, before):
        return
    try:
        made = write_page([history.read_run(folder)], folder / provenance.REPORT)
    except Exception as error:
        said = error.message if isinstance(error, LoraError) else f"{type(error).__name__}: {error}"
        ui.warn(f"no report was written: {said} (lora report {quote(folder)} tries again)")
        return
    ui.say(f"report in {made}")
