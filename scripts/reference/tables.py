"""Tables of Markdown, as the generated pages have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_cell(text: str) -> str:
    """Return text as a table's cell can hold it: on one line, with `|` escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, a row a line."""
    lines = [header, ["---"] * len(header), *([format_cell(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
