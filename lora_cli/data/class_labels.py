"""Give classes their names where a table of `datasets` keeps numbers: its ClassLabel, whose names
stand beside the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Names = Mapping[str, list[str]]
"""The names of the classes of a column."""
LISTS = ("List", "LargeList", "Sequence")


def read_names(described: str | None) -> Names:
    """Return the names that a table's description has, which `datasets` writes into Parquet and
    Arrow files as JSON; none where it is not what that would be."""
    try:
        features = json.loads(described or "{}")["info"]["features"]
        found = {column: _find_names(feature) for column, feature in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {column: names for column, names in found.items() if names}


def _find_names(feature: Any) -> list[str] | None:
    """Return the names of a feature's classes, or of those in its lists."""
    if isinstance(feature, list) and len(feature) == 1:
        return _find_names(feature[0])
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") in LISTS:
        return _find_names(feature.get("feature"))
    names = feature.get("names")
    if feature.get("_type") != "ClassLabel" or not isinstance(names, list):
        return None
    return names if all(isinstance(each, str) for each in names) else None


def name_classes(row: dict[str, Any], names: Names) -> dict[str, Any]:
    """Return the row with the names of its classes in the place of their numbers; a number that has
    none, such as -1 for an unknown one, stays."""
    if not names:
        return row
    return row | {
        column: _name(row[column], classes) for column, classes in names.items() if column in row
    }


def _name(value: Any, classes: list[str]) -> Any:
    if isinstance(value, list):
        return [_name(each, classes) for each in value]
    known = type(value) is int and 0 <= value < len(classes)
    return classes[value] if known else value
