"""Others' text in Markdown, where it must stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_cli.common import escape


def fence(language: str, text: str) -> str:
    """Return a block of code, between more backticks than the text has in a row."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def code(value: object) -> str:
    """Return a value as code amid text: one line, without backticks, also in a table."""
    text = escape(str(value)).replace("`", "'").replace("|", "\\|").strip()
    return f"`{text}`" if text else ""


def plain(value: object) -> str:
    """Return a value as text of one line, in which nothing is markup, a link or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", escape(str(value)))


def listed(values: Iterable[object]) -> str:
    """Return values as text, one after another."""
    return ", ".join(plain(value) for value in values)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
