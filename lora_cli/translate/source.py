"""Another tool's configuration file as it was written: its keys, their values and their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import UsageError, plain_files, quote
from lora_cli.recipe import strict_yaml

Keys = strict_yaml.Keys
DASHED = re.compile(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)+")
"""A key as its option is spelt on a command line: `learning-rate`."""


class Source(NamedTuple):
    """A file's keys and values, and where each was written."""

    path: Path
    data: dict[str, Any]
    places: dict[Keys, strict_yaml.Place]

    def find_line(self, keys: Keys) -> int:
        """Return the 1-based line of a key, or of what is nearest around it."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys].line

    def show_place(self, keys: Keys) -> str:
        """Return `file:line`."""
        return f"{self.path}:{self.find_line(keys)}"


def read_source(path: Path) -> Source:
    """Parse the file; UsageError for what is no YAML, and for what has no keys."""
    document = strict_yaml.read(path, follow=True)
    if not isinstance(document.data, dict) or not document.data:
        raise UsageError(
            f"{path} has no keys: it configures no training", "name the YAML file of another tool"
        )
    return _spell_keys(Source(path, document.data, document.places))


def _spell_keys(source: Source) -> Source:
    """Return a file's keys with `_` where they have `-`, as on a command line. UsageError where
    that makes two of them one."""
    data, places = dict[str, Any](), dict(source.places)
    for key, value in source.data.items():
        name = key.replace("-", "_") if DASHED.fullmatch(key) else key
        if name in data:
            first, line = places[(name,)].line, source.find_line((key,))
            raise UsageError(
                f"{source.show_place((key,))}: {name} is given twice (first on line {first})",
                f"sed -i {line}d {quote(source.path)} takes this one out"
                if _takes_a_line(source, key, line)
                else "leave one of the two out",
            )
        data[name] = value
        for keys in [each for each in source.places if each[:1] == (key,)]:
            places[(name, *keys[1:])] = source.places[keys]
    return Source(source.path, data, places)


def _takes_a_line(source: Source, key: str, number: int) -> bool:
    """Return whether a key of the file's stands with its whole value, and nothing else, on a line,
    and not in a mapping that is merged from elsewhere."""
    lines = plain_files.read_small(source.path).split("\n")  # as sed counts them
    line = "".join(lines[number - 1 : number])
    if line[:1].isspace() or "&" in line:  # what it names may be meant below
        return False
    try:
        alone = strict_yaml.parse(line, str(source.path), follow=True).data
    except UsageError:
        return False
    return bool(alone == {key: source.data[key]})


def list_leaves(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Yield the path of each value that holds no others: scalars, lists of scalars, empty ones."""
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = list(enumerate(value))
    if not inner:
        yield keys
    for key, item in inner:
        yield from list_leaves(item, (*keys, key))


def spell(keys: Keys) -> str:
    """Return a path of keys as it is shown: `datasets[0].path`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")
