"""Parse strict YAML into plain data, with the file and line each value came from.

PyYAML reads `1e-4` as a string and `no` as False, and lets the last of two equal keys win. Here
scalars follow YAML 1.2's core schema; a duplicate key, an alias or a tag is an error; and each
value remembers its line for messages.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_cli.common import LoraError, UsageError, plain_files, quote

LARGEST = 2**17
"""The most bytes of a recipe: a hundred times the longest one here, and still read in a second."""
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that an escape (\\0, \\ud800) can put into a text but that no file or name can
hold."""
Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value was written: a file and its 1-based line, or a command-line option (line 0)."""

    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


class Document(NamedTuple):
    """A parsed file: `data` (dicts, lists, scalars), and the place of every key and list item by
    its path."""

    data: Any
    places: dict[Keys, Place]


class _CoreLoader(yaml.SafeLoader):
    """A loader that reads every scalar as a string but for those of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases and tags; compose any other node as usual."""
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


class _LooseLoader(_CoreLoader):
    """A loader that follows aliases, as other tools' files have them."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse tags; compose any other node as usual."""
        if self.check_event(yaml.AliasEvent):
            return yaml.SafeLoader.compose_node(self, parent, index)
        return super().compose_node(parent, index)


MOST = 20_000
"""Values of a file with aliases, each of which may stand for many others; and mappings that are
merged, with their keys."""
DEEPEST = 20
"""Merges inside of each other; one in itself has no end."""
MERGE = "<<"
"""The key whose mapping, or list of such, gives the keys that are not there."""


def read(path: Path, follow: bool = False) -> Document:
    """Parse the file, whose aliases and merge keys are followed where that is asked for; raise
    UsageError with file and line for anything that is not strict YAML."""
    try:
        return parse(plain_files.read_small(path, LARGEST), str(path), follow=follow)
    except UsageError:
        raise
    except LoraError as error:
        raise UsageError(error.message, error.hint) from None


def parse(text: str, name: str, first_line: int = 1, follow: bool = False) -> Document:
    """Parse `text`; `name` stands for the file in messages.

    `first_line` 0 makes every place the name alone. `follow` aliases, which are refused else.
    """
    builder = _Builder(name, first_line, follow)
    try:
        node = yaml.compose(text, Loader=_LooseLoader if follow else _CoreLoader)
        data = builder.build(node, ()) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        assert error.problem_mark is not None, "the scanner, parser and composer always give one"
        if error.problem == "but found another document":
            raise _refuse_second(name, error.problem_mark.line + 1) from None
        raise builder.fail(error.problem or "not valid YAML", error.problem_mark) from None
    except RecursionError:
        raise UsageError(
            f"{name}: nested too deeply", "a recipe has sections of keys, no deeper"
        ) from None
    except yaml.YAMLError as error:  # an unprintable character: no mark
        raise UsageError(f"{name}: {str(error).splitlines()[0]}", "remove the character") from None
    return Document(data, builder.places)


def _refuse_second(name: str, line: int) -> UsageError:
    """Return the error for a file of several documents, of which the second begins on a line."""
    first, length = f"{Path(name).stem}-1.yaml", line - 1
    return UsageError(
        f"{name}:{line}: a second document begins here, and a file has one",
        f"head -n {length} {quote(name)} > {quote(first)}; then name {quote(first)}",
    )


class _Builder:
    """Turns YAML's nodes into plain data, and remembers the place of each."""

    def __init__(self, name: str, first_line: int, follow: bool = False) -> None:
        self.name = name
        self.follow = follow
        self.count = 0
        self.first_line = first_line
        self.places: dict[Keys, Place] = {(): Place(name, 1 if first_line else 0)}

    def fail(self, problem: str, mark: yaml.Mark) -> UsageError:
        """Return the error for a problem at `mark`."""
        return UsageError(
            f"{self._locate(mark)}: {problem}",
            f"mend line {mark.line + 1}, column {mark.column + 1}",
        )

    def build(self, node: yaml.Node, path: Keys) -> Any:
        """Return the data of a node, which stands at `path` in the document."""
        self.places.setdefault(path, self._locate(node.start_mark))
        self._count(1, node)
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        if odd := UNWRITABLE.search(node.value):
            raise self.fail(f"\\x{ord(odd[0]):02x} is not a whole character", node.start_mark)
        return _parse_scalar(node)

    def _count(self, number: int, node: yaml.Node) -> None:
        """Refuse a file whose aliases stand for more than so much."""
        self.count += number
        if self.follow and self.count > MOST:
            raise self.fail(f"aliases that stand for over {MOST:,} values", node.start_mark)

    def _build_mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        """Return a mapping's data; its keys are texts, each given once."""
        result: dict[str, Any] = {}
        for key_node, value_node in self._merge(node) if self.follow else node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode) or UNWRITABLE.search(str(key_node.value)):
                raise self.fail("a key must be plain text", mark)
            key = str(key_node.value)
            here = (*path, key)
            if key in result:
                first = self.places[here].line
                raise self.fail(f"{key} is given twice (first on line {first})", mark)
            self.places[here] = self._locate(mark)
            result[key] = self.build(value_node, here)
        return result

    def _merge(self, node: yaml.MappingNode, depth: int = 0) -> list[tuple[Any, yaml.Node]]:
        """Return a mapping's keys with their nodes, and those of the mappings that it merges which
        neither it nor an earlier one has."""
        own = [pair for pair in node.value if pair[0].value != MERGE]
        known = {str(key.value) for key, _ in own}
        for key, value in node.value:
            if key.value != MERGE:
                continue
            given = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if depth > DEEPEST or not all(isinstance(each, yaml.MappingNode) for each in given):
                raise self.fail("<< merges a mapping, or a list of mappings", key.start_mark)
            for each in given:
                merged = self._merge(each, depth + 1)
                self._count(1 + len(merged), each)
                for pair in merged:
                    if str(pair[0].value) not in known:
                        known.add(str(pair[0].value))
                        own.append(pair)
        return own

    def _locate(self, mark: yaml.Mark) -> Place:
        return Place(self.name, mark.line + 1 if self.first_line else 0)


def _parse_scalar(node: yaml.Node) -> Any:
    """Return the value of a scalar of the core schema."""
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
    """Return `data` as YAML text that `parse` reads back unchanged."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)


def spell(value: Any) -> str:
    """Return a value as YAML on one line that `parse` reads back unchanged: mappings in braces,
    lists in brackets."""
    text = yaml.dump(
        [value],
        Dumper=_CoreDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=2**20,
    )
    one_line = text.strip()[1:-1]
    return json.dumps(value, ensure_ascii=False) if "\n" in one_line else one_line


class _CoreDumper(yaml.SafeDumper):
    """A dumper that quotes every string that `_CoreLoader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal objects out in full, since `parse` refuses aliases."""
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote a string that a resolver of `_CoreLoader` would match."""
    special = any(
        pattern.match(text)
        for resolvers in _CoreLoader.yaml_implicit_resolvers.values()
        for _, pattern in resolvers
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if special else None)


_CoreDumper.add_representer(str, _represent_str)
