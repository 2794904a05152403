"""Messages kept in a file beside their test: `## name`, then the text.

The test's file, run as a program, prints them anew; what changed is read in the difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def render(names: Iterable[str], say: Callable[[str, Path], str]) -> str:
    """What `say` returns for each name, given an empty folder, as the file holds it."""
    parts = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            parts.append(f"## {name}\n{say(name, Path(folder).resolve())}\n")
    return "\n".join(parts)


def list_names(file: Path) -> list[str]:
    """The names in the file, in order."""
    return [line[3:] for line in file.read_text().splitlines() if line.startswith("## ")]


def find(file: Path, name: str) -> str:
    """The text kept under the name."""
    return file.read_text().partition(f"## {name}\n")[2].partition("\n\n## ")[0].rstrip()
