"""The table of the shipped recipes: its page is what `lora recipes` makes now, its figures are what
its script finds now, and each recipe is in it.

Hermetic: published configurations, no weights. Alone: pytest tests/plan/test_recipe_table.py
All figures: pytest -m slow tests/plan/test_recipe_table.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.plan import hardware
from lora_cli.recipe import load_recipe, recipe_table, shipped_recipes
from scripts import make_recipe_table
from tests import shapes

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference" / "recipes.md"
NAMES = [recipe.name for recipe in shipped_recipes.list_recipes()]
SAMPLE = {"lora-1b-8gb", "classify"}


def test_the_page_is_made_of_the_recipes_as_they_are() -> None:
    assert PAGE.read_text() == recipe_table.make_markdown(), "make docs"


def test_every_recipe_has_its_line(lora) -> None:
    done = lora("recipes")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == list(recipe_table.HEADER)
    assert [line.split()[0] for line in lines] == NAMES
    assert len(NAMES) >= 20
    for name, line in zip(NAMES, lines):
        base = load_recipe(Path(name)).model.name_or_path
        assert f"  {base}  " in line
        assert " GiB " in line
    assert "assumed, not measured" in done.stderr
    assert lora("recipes", "--markdown").stdout == PAGE.read_text()


def test_what_a_recipe_is_said_to_need_fits_its_card() -> None:
    plans = recipe_table.read_plans()
    assert plans.keys() == {*NAMES}, "python -m scripts.make_recipe_table"
    for name, plan in plans.items():
        card = hardware.parse_gpu(str(plan["card"]))
        assert 1 < float(str(plan["gib"])) < card.memory / hardware.GIB, name
    # a base of 8B in 4 bits: half a byte a weight, and the rest of a step beside it
    weights = 8.2e9 * 0.55 / 2**30
    assert weights < float(str(plans["qlora-8b"]["gib"])) < 3 * weights


@pytest.mark.parametrize(
    "name",
    [each if each in SAMPLE else pytest.param(each, marks=pytest.mark.slow) for each in NAMES],
)
def test_a_figure_is_what_the_script_finds_now(name: str, tiny: Path) -> None:
    assert recipe_table.read_plans()[name] == make_recipe_table.foresee(name), (
        "python -m scripts.make_recipe_table"
    )


def test_the_bases_are_those_of_the_recipes() -> None:
    bases = {load_recipe(Path(name)).model.name_or_path.rpartition("/")[2] for name in NAMES}
    assert bases <= shapes.SHAPES.keys()


def test_counting_up_from_few_layers_is_the_whole_base(tiny: Path) -> None:
    """As the memory of each layer is the same; on a base that is quick to rehearse whole."""
    layers = shapes.SHAPES["OLMo-2-0425-1B"]["num_hidden_layers"]
    counted = sum(make_recipe_table.count_items("lora-1b-8gb", layers, True).values())
    assert counted == pytest.approx(
        sum(make_recipe_table.rehearse("lora-1b-8gb", None, True).values()), rel=1e-3
    )
