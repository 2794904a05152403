"""Strict YAML: plain data, and the file and line each value came from.

PyYAML reads `1e-4` as a string, `no` as False, and lets a duplicate key win. Here scalars follow
YAML 1.2's core schema; a duplicate key, an alias or a tag is an error; and each value remembers its
line for messages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_cli.common import LoraError, UsageError, files

LARGEST = 2**17
"""Bytes of a recipe: a hundred times what the longest here has, and read in a second."""
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""What an escape (\\0, \\ud800) can put into a text and no file or name can hold."""
Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value was written: a file and its 1-based line, or a command-line option (line 0)."""

    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


class Document(NamedTuple):
    """A parsed file: `data` (dicts, lists, scalars) and the place of every key and list item by its
    path."""

    data: Any
    places: dict[Keys, Place]


class _CoreLoader(yaml.SafeLoader):
    """Only the scalars of the YAML 1.2 core schema are anything but strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        forbidden = (
            "aliases (*name)" if isinstance(event, yaml.AliasEvent) else f"tags ({event.tag})"
        )
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise yaml.composer.ComposerError(
                None, None, f"{forbidden} are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def read(path: Path) -> Document:
    """Parse the file. UsageError with file and line for anything that is not strict YAML."""
    try:
        return parse(files.read_small(path, LARGEST), str(path))
    except UsageError:
        raise
    except LoraError as error:
        raise UsageError(error.message, error.hint) from None


def parse(text: str, name: str, first_line: int = 1) -> Document:
    """Parse `text`; `name` stands for the file in messages; `first_line` 0 makes every place the
    name alone."""
    places: dict[Keys, Place] = {(): Place(name, 1 if first_line else 0)}

    def fail(problem: str, mark: yaml.Mark) -> UsageError:
        return UsageError(
            f"{place(mark)}: {problem}", f"mend line {mark.line + 1}, column {mark.column + 1}"
        )

    def place(mark: yaml.Mark) -> Place:
        return Place(name, mark.line + 1 if first_line else 0)

    def build(node: yaml.Node, path: Keys) -> Any:
        places.setdefault(path, place(node.start_mark))
        if isinstance(node, yaml.MappingNode):
            return mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, index)) for index, child in enumerate(node.value)]
        if odd := UNWRITABLE.search(node.value):
            raise fail(f"\\x{ord(odd[0]):02x} is half a character or none", node.start_mark)
        return _parse_scalar(node)

    def mapping(node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise fail("a key must be plain text", key_node.start_mark)
            key = str(key_node.value)
            if UNWRITABLE.search(key):
                raise fail("a key must be plain text", key_node.start_mark)
            if key in result:
                raise fail(
                    f"{key} is given twice (first on line {places[(*path, key)].line})",
                    key_node.start_mark,
                )
            places[(*path, key)] = place(key_node.start_mark)
            result[key] = build(value_node, (*path, key))
        return result

    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        return Document(build(node, ()) if node is not None else {}, places)
    except yaml.MarkedYAMLError as error:
        assert error.problem_mark is not None, "the scanner, parser and composer always give one"
        raise fail(error.problem or "not valid YAML", error.problem_mark) from None
    except RecursionError:
        raise UsageError(
            f"{name}: nested too deeply", "a recipe has sections of keys, no deeper"
        ) from None
    except yaml.YAMLError as error:  # an unprintable character: no mark
        raise UsageError(f"{name}: {str(error).splitlines()[0]}", "remove the character") from None


def _parse_scalar(node: yaml.Node) -> Any:
    kind = node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    if kind == "int" and len(node.value) > 100:
        return node.value  # text: no field takes it, and the message shows it
    if kind == "int":
        return int(node.value, 0) if node.value[:2] in ("0x", "0o") else int(node.value)
    if kind == "float":
        return float(re.sub(r"\.(?=[inIN])", "", node.value))  # .inf and .nan
    return node.value


def dump(data: Any) -> str:
    """`data` as YAML text that `parse` takes back unchanged."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)


class _CoreDumper(yaml.SafeDumper):
    """Quotes every string that `_CoreLoader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    special = any(
        pattern.match(text)
        for resolvers in _CoreLoader.yaml_implicit_resolvers.values()
        for _, pattern in resolvers
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if special else None)


_CoreDumper.add_representer(str, _represent_str)
