"""What a newcomer's first lines get where something is missing: no recipe, no verb of that name, no
model, no network, no permission, another Python. Each answer ends in the line to type.

Messages that are the same everywhere are compared with bad_firsts.txt. Hermetic: no network but closed
ports of the loopback interface. Alone: pytest tests/cli/test_first_failures.py
After a change of a message: python -m tests.cli.test_first_failures > tests/cli/bad_firsts.txt
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_cli.cli import usage
from lora_cli.data import readers
from lora_cli.recipe import not_recipes
from tests import snapshots
from tests.cli.test_bad_artefacts import adapter, base
from tests.cli.test_bad_inputs import ROWS, Case, recipe, said, typed, written

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "bad_firsts.txt"
DEAD = "http://127.0.0.1:9"
"""An address at which nothing answers: the discard service, which nobody runs."""


CONTENTS = {
    ".jsonl": ROWS,
    ".csv": ROWS,
    ".yaml": "model: {name_or_path: x}\n",
    ".yml": "site_name: x\n",
    ".safetensors": "weights",
}


def holding(*files: str, type: tuple[str, ...]) -> Case:
    """These words, typed in a folder that holds these files."""

    def make(d: Path):
        for file in files:
            written(d / file, CONTENTS.get(Path(file).suffix, "GGUF"))
        return list(type)

    return make


def beside_recipe(*words: str) -> Case:
    return typed(*words, make=recipe)


PROXY = {"HTTPS_PROXY": DEAD, "NO_PROXY": "", "HF_HUB_OFFLINE": "0"}


def behind_dead_proxy(*words: str) -> Case:
    """These words, beside a recipe on a base, where HTTPS_PROXY is set to a proxy that does not
    run."""
    return lambda d: ([base(d), recipe(d), list(words)][2], PROXY)


FIRSTS: dict[str, Case] = {
    "no recipe, in an empty folder": typed("train"),
    "no recipe, beside one": beside_recipe("check"),
    "no recipe, beside rows": holding("rows.jsonl", type=("plan",)),
    "no recipe, beside YAML of another program": holding("mkdocs.yml", type=("check",)),
    "a verb misspelt": beside_recipe("trian", "r.yaml", "--set", "data.path=my rows.jsonl"),
    "a verb of other programs": typed("finetune", "r.yaml"),
    "help as a verb": typed("help"),
    "version as a verb": typed("version"),
    "a verb that nothing is like": typed("frobnicate"),
    "rows as a recipe": holding("rows.jsonl", type=("check", "rows.jsonl")),
    "a table as a recipe": holding("my rows.csv", type=("plan", "my rows.csv")),
    "a GGUF as a recipe": holding("m.gguf", type=("check", "m.gguf")),
    "weights as a recipe": holding("m/model.safetensors", type=("check", "m/model.safetensors")),
    "a model as a recipe": lambda d: [base(d), ["check", "base"]][1],
    "a model of the hub as a recipe": typed("check", "org/model-1B"),
    "an adapter as a recipe": lambda d: [adapter(base(d)), ["check", "adapter"]][1],
    "a run as a recipe": holding("runs/r/record.json", "runs/r/recipe.yaml", type=("check", "runs/r")),
    "a folder with a recipe": holding("mine/r.yaml", type=("check", "mine")),
    "a folder of rows": holding("rows/a.jsonl", type=("check", "rows")),
    "a folder of nothing": holding("empty/.keep", type=("check", "empty")),
    "a recipe without its ending": beside_recipe("check", "r"),
    "a recipe of another ending": beside_recipe("check", "r.yml"),
    "a recipe of a like name": lambda d: [recipe(d).rename(d / "mine.yaml"), ["check", "mien.yaml"]][1],
    "a recipe in a folder that is not there": typed("check", "recipes/mine.yaml"),
    "rows of a like name": beside_recipe("check", "r.yaml", "--set", "data.path=row.jsonl"),
    "an adapter in a folder of a like name": lambda d: [
        adapter(base(d)).rename(d / "adaptor"), ["merge", "adapter", "out"]][1],
    "a GGUF of a like name": holding("out-q8_0.gguf", type=("generate", "out-q8.gguf", "-p", "x")),
    "train: a dead proxy": behind_dead_proxy("train", "r.yaml", "--set", "model.name_or_path=org/model"),
    "check: a dead proxy": behind_dead_proxy("check", "r.yaml", "--set", "model.name_or_path=org/model"),
    "generate: a dead proxy": behind_dead_proxy("generate", "org/model", "-p", "x"),
    "merge: a dead proxy": behind_dead_proxy("merge", "org/adapter", "out"),
    "train: rows behind a dead proxy": behind_dead_proxy("train", "r.yaml", "--set", "data.path=org/rows"),
    "chat: nothing in a folder that is there, and a dead proxy": lambda d: [
        (d / "runs").mkdir(), (["chat", "runs/adapter"], PROXY)][1],
}  # fmt: skip


def test_the_snapshot_covers_every_case() -> None:
    assert len(FIRSTS) >= 32
    assert snapshots.list_names(SNAPSHOT) == list(FIRSTS)


@pytest.mark.parametrize("name", FIRSTS)
def test_what_a_newcomer_is_told(name: str, tiny: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    found = said(name, tmp_path, FIRSTS)
    assert found == snapshots.find(SNAPSHOT, name)
    assert time.monotonic() - begun < 20  # the hub was asked six times in half a minute
    lines = found.splitlines()
    assert lines[1].startswith("error: ")
    assert lines[-2].startswith("hint: ")
    assert lines[-1] in ("(exit 1)", "(exit 2)")
    assert len(lines) == 4


def test_rows_are_known_by_the_endings_that_readers_know() -> None:
    """But for those that a recipe may have, too: .json is YAML, .txt anything."""
    assert {*readers.TABLES, ".gz"} - not_recipes.ROWS == {".json", ".txt"}


def test_every_verb_that_is_meant_is_one() -> None:
    from lora_cli.cli import app

    command = pytest.importorskip("typer").main.get_command(app)
    verbs = {*command.commands, "--help", "--version"}
    assert {*usage.MEANT.values()} <= verbs
    assert not {*usage.MEANT} & verbs


@pytest.mark.parametrize(
    ("file", "begin"), [(None, "lora recipes"), ("a b.yaml", "lora train 'a b.yaml'"),
                        ("rows.csv", "lora init rows.csv")]
)  # fmt: skip
def test_lora_alone_says_what_to_begin_with(file: str | None, begin: str, lora, tmp_path) -> None:
    if file:
        written(tmp_path / file, CONTENTS[Path(file).suffix])
    done = lora(cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: lora" in done.stdout
    assert done.stderr.splitlines()[-1] == f"Begin with: {begin}"


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"], ["recipes", "copy", "-h"]])
def test_help_is_given_by_its_short_option(words: list[str], lora, tmp_path: Path) -> None:
    done = lora(*words, cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage: lora" in done.stdout


MAIN = ROOT / "lora_cli" / "__main__.py"


def test_another_python_is_told_which_it_is() -> None:
    """The file is read by that Python before it can say anything: nothing in it is newer."""
    ast.parse(MAIN.read_text(), feature_version=(3, 6))
    code = "import sys; sys.version_info = (3, 10, 13, 'final', 0)\nfrom lora_cli.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    error, _, hint = done.stderr.splitlines()
    assert error == f"error: lora needs Python 3.11 or newer, and this is 3.10.13: {sys.executable}"
    assert hint.startswith("hint: python3.12 -m venv ")


def test_a_package_that_is_not_there_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom lora_cli.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the package typer, which lora needs, is not installed\n\n"
        f"hint: {sys.executable} -m pip install lora-cli\n"
    )


def test_make_says_so_too(tmp_path: Path) -> None:
    python = tmp_path / "python3.10"
    old = "import sys; sys.version_info = (3, 10, 13); exec(sys.argv.pop(1))"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{old}" "$2"\n')
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", f"VENV={tmp_path}/venv", "lint"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    error, _, hint, *_ = done.stderr.splitlines()
    assert error == f"error: lora needs Python 3.11 or newer, and {python} is 3.10"
    assert hint == "hint: make PYTHON=python3.12 (any from 3.11 on)"
    assert not (tmp_path / "venv").exists()


DROPPED = "-dac_override,-dac_read_search"
"""What lets root read and write everything."""


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch):
    """`as_user(words, folder)` runs the command line as one whom permissions hold; its error."""
    before = []
    if os.name != "posix":
        pytest.skip("permissions are POSIX's")
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root passes every permission, and there is no setpriv")
        before = ["setpriv", f"--bounding-set={DROPPED}", f"--inh-caps={DROPPED}"]

    def run(words: list[str], folder: Path) -> list[str]:
        command = [*before, sys.executable, "-m", "lora_cli", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode in (1, 2), done.stderr
        return done.stderr.splitlines()[-3:]

    return run


def test_a_recipe_that_may_not_be_read(as_user, tmp_path: Path) -> None:
    recipe(tmp_path).chmod(0)
    said = ["error: r.yaml may not be read", "", "hint: ls -ld r.yaml"]
    assert as_user(["check", "r.yaml"], tmp_path) == said


def test_a_folder_in_which_nothing_may_be_made(as_user, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    error, _, hint = as_user(["recipes", "copy", "alpaca"], folder)
    assert error.startswith("error: alpaca.yaml cannot be written: ")
    assert "Permission denied" in error
    assert hint == f"hint: ls -la {folder}"


if __name__ == "__main__":
    sys.stdout.write(snapshots.render(FIRSTS, lambda name, folder: said(name, folder, FIRSTS)))
