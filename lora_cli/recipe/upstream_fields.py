"""Read the fields of PEFT's and TRL's configuration classes from their installed source, without
importing them.

A recipe reaches every field of `LoraConfig` and of `SFTConfig`/`TrainingArguments` under its own
name. Importing those classes costs seconds and pulls in torch. Parsing the files that define them
costs milliseconds, gives the same names, types, defaults and help texts, and follows whichever
versions are installed.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_cli.common import LoraError

# Where each class lives; a class comes after its bases, so that a field it redeclares wins.
LORA_CONFIG = (("peft", "tuners/lora/config.py", "LoraConfig"),)
TRAINING_ARGUMENTS = (("transformers", "training_args.py", "TrainingArguments"),)
SFT_CONFIG = (
    *TRAINING_ARGUMENTS,
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)


class UpstreamField(NamedTuple):
    """One dataclass field: its annotation as a type (`Any` for parts that only the library knows),
    default and help."""

    name: str
    annotation: Any
    default: Any
    help: str


@cache
def read_fields(classes: tuple[tuple[str, str, str], ...]) -> dict[str, UpstreamField]:
    """Return all fields of `classes`, each (package, file inside it, class name), by field name.

    Raise LoraError when a package is not installed or its file no longer defines the class.
    """
    fields: dict[str, UpstreamField] = {}
    for package, file, class_name in classes:
        fields.update(
            (field.name, field)
            for field in _read_fields_of(_find_source(package, file), class_name)
        )
    return fields


def _find_source(package: str, file: str) -> Path:
    """Return the path of a file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LoraError(f"the package {package} is not installed", "pip install lora-cli")
    return Path(spec.submodule_search_locations[0]) / file


def _read_fields_of(source: Path, class_name: str) -> Iterator[UpstreamField]:
    """Yield the dataclass fields that the class declares itself."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name
    ]
    if not classes:
        raise LoraError(
            f"{source} does not define {class_name}: this version is not supported",
            "pip install lora-cli",
        )
    for node in classes[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default, metadata = _read_default_and_metadata(node.value)
            annotation = _parse_type(ast.unparse(node.annotation))
            choices = metadata.get("choices")
            if annotation is str and choices:
                annotation = Literal[tuple(choices)]
            help_text = " ".join(str(metadata.get("help", "")).replace("%%", "%").split())
            yield UpstreamField(node.target.id, annotation, default, help_text)


def _read_default_and_metadata(value: ast.expr | None) -> tuple[Any, dict[str, Any]]:
    """Return the literal default (None when computed) and the literal parts of a `field(…,
    metadata={…})` call."""
    if not isinstance(value, ast.Call):
        return _read_literal(value), {}
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    given = arguments.get("metadata")
    metadata = {}
    if isinstance(given, ast.Dict):
        metadata = {
            _read_literal(key): _read_literal(item) for key, item in zip(given.keys, given.values)
        }
    return _read_literal(arguments.get("default")), {
        key: item for key, item in metadata.items() if item is not None
    }


def _read_literal(node: ast.expr | None) -> Any:
    """Return the value of a literal expression, or None for anything that would have to be run."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


class _TypingNames(dict[str, Any]):
    """The names an annotation may use; a class that only the library defines (an enum, a config)
    becomes Any."""

    def __missing__(self, name: str) -> Any:
        return Any


class _Tuple:
    """Stands for tuple: YAML has only lists, and upstream accepts them."""

    def __class_getitem__(cls, items: Any) -> Any:
        return list[Any]


_NAMES = _TypingNames(
    {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")},
    **{t.__name__: t for t in (bool, int, float, str, list, dict, set)},
    tuple=_Tuple,
)


def _parse_type(annotation: str) -> Any:
    """Return the type that an annotation's text stands for."""
    return eval(annotation, {"__builtins__": {}}, _NAMES)  # noqa: S307 – text of an installed library, not of a user
