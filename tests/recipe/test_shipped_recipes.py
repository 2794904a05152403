"""The recipes in the package: found by name, listed, copied, and equal to their copies in configs/.

Hermetic: temporary folders. Alone: pytest tests/recipe/test_shipped_recipes.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.recipe import schema, shipped_recipes
from lora_cli.recipe.load import load_recipe

CONFIGS = Path(__file__).parent.parent.parent / "configs"
NAMES = [recipe.name for recipe in shipped_recipes.list_recipes()]
IN_A_CHECKOUT_ONLY = {"demo", "smoke"}
"""They train the tiny model that `make` builds."""


def test_configs_holds_the_same_recipes() -> None:
    copies = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert len(NAMES) >= 6
    assert set(copies) == {*NAMES, *IN_A_CHECKOUT_ONLY}
    for name in NAMES:
        assert copies[name].read_bytes() == shipped_recipes.get_file(name).read_bytes(), "make docs"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_recipe(Path(name))
    assert by_name.to_data() == load_recipe(CONFIGS / f"{name}.yaml").to_data()
    assert by_name.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_recipe_wherever_it_lies(
    name: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = shipped_recipes.copy_recipe(name)
    assert str(copy) == f"{name}.yaml"
    assert copy.read_bytes() == shipped_recipes.get_file(name).read_bytes()
    assert load_recipe(copy).to_data() == load_recipe(Path(name)).to_data()
    first = copy.read_text().splitlines()[0]
    assert (copy.parent / first.partition("$schema=")[2]).read_text() == schema.make_json()
    assert "schema.json lets editors" in capsys.readouterr().err


def test_nothing_is_overwritten_by_a_copy(tmp_path: Path, capsys) -> None:
    target, other = tmp_path / "mine.yaml", tmp_path / "schema.json"
    target.write_text("mine")
    with pytest.raises(LoraError, match=r"mine\.yaml already exists"):
        shipped_recipes.copy_recipe("alpaca", target)
    assert target.read_text() == "mine"
    assert not other.exists()
    target.unlink()
    target.symlink_to(tmp_path / "nowhere.yaml")
    with pytest.raises(LoraError, match="already exists"):
        shipped_recipes.copy_recipe("alpaca", target)
    with pytest.raises(LoraError, match="gone is not a folder"):
        shipped_recipes.copy_recipe("alpaca", tmp_path / "gone" / "mine.yaml")
    other.write_text("{}")
    shipped_recipes.copy_recipe("alpaca", tmp_path / "yours.yaml")
    assert other.read_text() == "{}"
    assert "schema.json is not this version's schema" in capsys.readouterr().err


def test_every_recipe_says_in_a_line_what_it_is_for() -> None:
    for recipe in shipped_recipes.list_recipes():
        assert 20 < len(recipe.purpose) < 100, recipe
        assert recipe.purpose[0].isupper(), recipe  # the line for editors begins in lower case


def test_a_file_goes_before_a_shipped_recipe_and_a_folder_does_not(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alpaca").mkdir()
    assert shipped_recipes.find_recipe(Path("alpaca")) == shipped_recipes.get_file("alpaca")
    Path("gsm8k").write_text("model: {name_or_path: mine}\ndata: {path: rows.jsonl}\n")
    assert load_recipe(Path("gsm8k")).model.name_or_path == "mine"
    Path("mine.yaml").write_text("extends: gsm8k\n")
    assert load_recipe(Path("mine.yaml")).model.name_or_path == "mine"


def test_extends_takes_a_shipped_recipe_by_name(tmp_path: Path) -> None:
    recipe = tmp_path / "alpaca.yaml"
    recipe.write_text("extends: alpaca\nlora: {r: 4}\n")
    loaded = load_recipe(recipe)
    assert (loaded.lora.r, loaded.data.path) == (4, "tatsu-lab/alpaca")
    assert loaded.where("data", "path").startswith(f"{shipped_recipes.get_file('alpaca')}:")
    recipe.write_text("lora: {r: 4}\nextends: alpca\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe)
    assert (
        caught.value.message == f"{recipe}:2: extends: alpca is neither a file nor a shipped recipe"
    )
    assert caught.value.hint == "did you mean alpaca? lora recipes lists them"


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        (
            "alpca",
            "alpca is neither a file nor a shipped recipe",
            "did you mean alpaca? lora recipes lists them",
        ),
        ("zzz", "zzz is neither a file nor a shipped recipe", "lora recipes lists them"),
        (
            "configs/gsm8k.yaml",
            "configs/gsm8k.yaml does not exist",
            "did you mean gsm8k, the shipped recipe? lora recipes lists them",
        ),
        ("zzz.yaml", "zzz.yaml does not exist", "ls ."),
        ("sub/alpca.yaml", "sub/alpca.yaml does not exist", "ls ."),
        (
            "sub/alpca",
            "sub/alpca is not here",
            "if it is a model on the hub: lora init ROWS --model sub/alpca writes a recipe",
        ),
    ],
)
def test_a_near_miss_is_named(
    given: str, message: str, hint: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_recipe(Path(given))
    assert (caught.value.message, caught.value.hint) == (message, hint)
