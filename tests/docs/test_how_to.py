"""What the how-to and explanation pages say to type: every `lora` command parses, with its options
and their values, and every piece of a recipe loads.

Nothing is run: the pages' commands name files of the reader's. Those of the tutorials are run by
test_pages.py. Hermetic: reads the repository. Alone: pytest tests/docs/test_how_to.py
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from lora_cli import cli
from lora_cli.recipe import load_recipe

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = sorted([*DOCS.glob("how-to/*.md"), *DOCS.glob("explanation/*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.S | re.M)
TYPED = re.compile(r"\$ |(?:[A-Z_]+=\S+ )*(?:lora|pip|for|export|kubectl|tensorboard|make|python) ")
"""How a fence begins that is typed, and no output."""
PROGRAM = re.compile(r"\s*(?:\$ )?(?:[A-Z_]+=\S* )*lora (.*)")
LEAST = {"model": {"name_or_path": "base"}, "data": {"path": "rows.jsonl"}}
"""What a recipe cannot do without."""


class Fence(NamedTuple):
    """A fenced piece of a page."""

    place: str
    kind: str
    text: str


def walk_fences() -> Iterator[Fence]:
    """Yield every fence of the pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Fence(f"{page.parent.name}/{page.name}:{line}", found[1], found[2])


def list_commands(text: str) -> list[list[str]]:
    """Return the words after `lora` of each command in a fence; none of output."""
    if not TYPED.match(text):
        return []
    prompted = text.startswith("$ ")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [PROGRAM.match(line) for line in lines if not prompted or line.startswith("$ ")]
    return [shlex.split(each[1], comments=True) for each in found if each]


COMMANDS = [
    pytest.param(words, id=f"{fence.place} {' '.join(words)}"[:90])
    for fence in walk_fences()
    for words in list_commands(fence.text)
]
RECIPES = [pytest.param(f.text, id=f.place) for f in walk_fences() if f.kind == "yaml"]


def parse(words: Sequence[str]) -> None:
    """Parse a command line down to its verb's options and arguments, and run nothing. Raise
    USAGE_ERROR for what is wrong with it."""
    command, rest = typer.main.get_command(cli.app), list(words)
    context = command.make_context("lora", ["--"], resilient_parsing=True)
    while hasattr(command, "get_command") and rest:
        inner = command.get_command(context, rest[0])
        if inner is None and command.name == "recipes":  # it is a command without another, too
            break
        if inner is None:
            raise typer.BadParameter(f"there is no {rest[0]}")
        command, rest = inner, rest[1:]
        is_group = hasattr(command, "get_command")
        given = [] if is_group else rest
        context = command.make_context(
            command.name, given, parent=context, resilient_parsing=is_group
        )


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_parses(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(
    "words",
    [["trian", "my.yaml"], ["train", "my.yaml", "--rseume"], ["merge", "--stream=3", "a", "b"]],
)
def test_a_wrong_command_does_not(words: list[str]) -> None:
    with pytest.raises(cli.USAGE_ERROR):
        parse(words)


@pytest.mark.parametrize("text", RECIPES)
def test_a_piece_of_a_recipe_loads(text: str, tmp_path: Path) -> None:
    given = yaml.safe_load(text)
    whole = {} if "extends" in given else LEAST
    for section, least in whole.items():
        found = given.setdefault(section, {})
        taken_over = {"adapter", "mix"} & found.keys()
        for key, value in least.items():
            if not taken_over:
                found.setdefault(key, value)
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(given))
    load_recipe(path)


def test_the_pages_were_read() -> None:
    assert len(PAGES) >= 30
    assert len(COMMANDS) >= 70
    assert len(RECIPES) >= 12
