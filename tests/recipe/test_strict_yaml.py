"""Strict YAML: scalars as YAML 1.2 has them, every value's line, and what is refused.

Hermetic: text only. Alone: pytest tests/recipe/test_strict_yaml.py
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.common.errors import UsageError
from lora_cli.recipe import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # PyYAML: a string
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("no", "no"),  # PyYAML: False
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("010", 10),  # PyYAML: octal
        ("0x10", 16),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("'1'", "1"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    parsed = strict_yaml.parse(f"key: {text}\n", "x.yaml").data["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(strict_yaml.parse("key: .nan", "x.yaml").data["key"])


def test_every_value_knows_its_line() -> None:
    document = strict_yaml.parse("a:\n  b: 1\n  c:\n    - x\n    - y\n", "x.yaml")
    assert {keys: place.line for keys, place in document.places.items()} == {
        (): 1,
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a is given twice (first on line 1)"),
        ("a: &n 1\nb: *n\n", "x.yaml:2: aliases (*name) are not allowed"),
        ("a: !!int 1\n", "x.yaml:1: tags (tag:yaml.org,2002:int) are not allowed"),
        ("!!python/object/apply:os.system [ls]", "x.yaml:1: tags"),
        ("? [1]\n: 2\n", "x.yaml:1: a key must be plain text"),
        ("a: [1\n", "x.yaml:2: expected ',' or ']'"),
        ("a: 1\n b: 2\n", "x.yaml:2: "),
        ("a: \x00", "x.yaml: unacceptable character"),
    ],
)
def test_what_is_not_strict_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        strict_yaml.parse(text, "x.yaml")
    assert caught.value.message.startswith(message)
    assert caught.value.hint


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="ascii", exclude_characters="\0"))
)


@given(
    st.recursive(
        scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner)
    )
)
def test_what_is_dumped_parses_to_the_same(data: object) -> None:
    assert strict_yaml.parse(strict_yaml.dump({"key": data}), "x.yaml").data == {"key": data}
