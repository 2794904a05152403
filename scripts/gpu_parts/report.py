"""The report as tables for docs/explanation/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


class Column(NamedTuple):
    """A column of a part's table: the figure `key`, times `scale`, to `digits` places."""

    heading: str
    key: str
    digits: int = 0
    scale: float = 1.0
    unit: str = ""


def make_text(found: dict[str, Any]) -> str:
    """Return the tables of a report in Markdown."""
    given = found["given"]
    lines = []
    if given["device"] == "cpu":
        lines += ["A dry run on a processor: none of these figures says anything of a GPU.", ""]
    for name, part in found["parts"].items():
        lines += [*format_part(name, part), ""]
    return "\n".join(lines)


def format_part(name: str, part: dict[str, Any]) -> Iterator[str]:
    """Yield a part's title, its table, and what went wrong or was left out."""
    columns = [Column(*given) for given in part.get("columns", [])]
    yield f"### {part.get('title', name)}"
    yield ""
    done = {key: case["figures"] for key, case in part["cases"].items() if case["state"] == "done"}
    shown = {key: value for key, value in done.items() if _has_any(value, columns)}
    if shown:
        yield f"| | {' | '.join(column.heading for column in columns)} |"
        yield f"|---|{'---|' * len(columns)}"
        for key, figures in shown.items():
            cells = [format_cell(figures.get(column.key), column) for column in columns]
            yield f"| {key} | {' | '.join(cells)} |"
        yield ""
    for field, heading in part.get("listed", {}).items():
        having = {key: figures[field] for key, figures in shown.items() if figures.get(field)}
        yield from (f"- {key}, {heading}: {describe(found)}" for key, found in having.items())
    yield from (f"- {key}: {describe(done[key])}" for key in done if key not in shown)
    yield from _list_others(name, part)


def _list_others(name: str, part: dict[str, Any]) -> Iterator[str]:
    """Yield what did not end well, by its reason."""
    others: dict[str, list[str]] = {}
    for key, case in part["cases"].items():
        if case["state"] != "done":
            others.setdefault(f"**{case['state']}**: {case.get('why', '')}", []).append(key)
    yield from (f"- {'; '.join(keys)}: {why}" for why, keys in others.items())
    if "why" in part:
        yield f"- {name}: **nothing was begun**: {' '.join(part['why'].split())[:500]}"


def _has_any(figures: dict[str, Any], columns: list[Column]) -> bool:
    return any(figures.get(column.key) is not None for column in columns)


def format_cell(value: Any, column: Column) -> str:
    """Return a figure as the column shows it; nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, (int, float)):
        scaled = value * column.scale
        small = 0 < abs(scaled) < 10**-column.digits
        return (
            f"{scaled:.1e}{column.unit}" if small else f"{scaled:,.{column.digits}f}{column.unit}"
        )
    return str(value).replace("|", "\\|")


def describe(figures: dict[str, Any]) -> str:
    """Return figures on one line."""
    return ", ".join(f"{key} {_shorten(value)}" for key, value in figures.items())


def _shorten(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shorten(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shorten, value)) + "]"
    return str(value)


def write_section(report: Path, document: Path) -> None:
    """Put the tables of a report into a document, between the two marks that it has for them. A dry
    run's are refused."""
    found = json.loads(report.read_text(encoding="utf-8"))
    if found["given"]["device"] != "cuda":
        raise SystemExit("error: that report is of a dry run, and says nothing of a GPU")
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"error: {document} has no {BEGIN} … {END}")
    document.write_text(f"{before}{BEGIN}\n{make_text(found)}{END}{after}", encoding="utf-8")
    print(f"written into {document}")
