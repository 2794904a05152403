"""AGENTS.md, which coding assistants read: its commands run in its order, on its recipe, and say what
it says.

The model of the page is the tiny one; rows have the page's shapes. Hermetic: no network; the managed
copy of llama.cpp's converters. Alone: pytest tests/test_assistants.py
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lora_cli.recipe import load_recipe

PAGE = (Path(__file__).parent.parent / "AGENTS.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [line for kind, text in FENCES if not kind for line in text.splitlines()]
RESULTS = {"merge": "out", "train": "runs/mine/adapter", "report": "runs/mine/report.html"}
"""What the next command needs, on stdout."""


LONG = {"export-gguf", "doctor"}
"""Half a minute of its one and a half."""


def read_fence(kind: str) -> str:
    [text] = [text for each, text in FENCES if each == kind]
    return text


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's recipe and rows, with the tiny model."""
    made = tmp_path_factory.mktemp("page")
    (made / "mine.yaml").write_text(read_fence("yaml").replace(MODEL, str(tiny / "model")))
    words = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    (made / "rows.jsonl").write_text("".join(words[:40]))
    return made


def run_all(commands: list[str], folder: Path, tiny: Path, lora) -> dict[str, str]:
    """Run these commands of the page; the stdout of each, by the command."""
    found = {}
    for command in commands:
        words = shlex.split(command.replace(MODEL, str(tiny / "model")))
        assert words[0] == "lora", command
        done = lora(*words[1:], cwd=folder)
        assert done.returncode == 0, (command, done.stderr)
        found[command] = done.stdout
    return found


@pytest.fixture(scope="module")
def answers(folder: Path, tiny: Path, lora) -> dict[str, str]:
    return run_all([each for each in COMMANDS if each.split()[1] not in LONG], folder, tiny, lora)


def test_the_commands_of_the_page_do_what_they_are_there_for(answers: dict[str, str]) -> None:
    assert len(answers) == len(COMMANDS) - len(LONG) >= 12
    for command, out in answers.items():
        expected = RESULTS.get(command.split()[1])
        assert expected is None or out.strip() == expected, command


@pytest.mark.slow
def test_and_so_do_the_long_ones(answers: dict[str, str], folder: Path, tiny: Path, lora) -> None:
    commands = [each for each in COMMANDS if each.split()[1] in LONG]
    exported, doctor = run_all(commands, folder, tiny, lora).values()
    assert exported == "out/out-q8_0.gguf\n"
    assert json.loads(doctor)


def test_what_the_page_says_lies_there_does(answers: dict[str, str], folder: Path) -> None:
    named = re.findall(r"^\| `(runs/[^`]+)`(?:, `([\w.]+)`)?", PAGE, re.M)
    assert len(named) >= 5
    for path, beside in named:
        assert (folder / path).exists(), path
        assert (folder / path).with_name(beside).exists() if beside else True
    assert json.loads((folder / "runs/mine/record.json").read_text())
    assert len((folder / "runs/mine/metrics.jsonl").read_text().splitlines()) >= 1


@pytest.mark.parametrize("row", read_fence("json").splitlines())
def test_a_row_of_each_shape_is_read(row: str, folder: Path, lora, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row}\n" * 4)
    options = ["--set", f"data.path={rows}", "--set", "data.eval_fraction=null"]
    done = lora("check", "mine.yaml", *options, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_an_error_as_it_is(lora, tmp_path: Path) -> None:
    shown = read_fence("console").splitlines(keepends=True)
    words = shlex.split(shown[0].removeprefix("$ lora "))
    line = int(re.search(r"yaml:(\d+)", shown[1])[1])
    lines = ["model: {name_or_path: x}", "data: {path: y}", "training:", "  learning_rat: 1e-4"]
    assert line == len(lines)
    (tmp_path / words[1]).write_text("\n".join(lines) + "\n")
    done = lora(*words, cwd=tmp_path)
    assert done.stderr == "".join(shown[1:])
    assert done.returncode == 2


def test_the_page_s_recipe_is_one_and_its_sections_are_all(folder: Path) -> None:
    recipe = load_recipe(folder / "mine.yaml", [])
    told = re.search(r"- Sections are (.*?) stand alone\.", PAGE, re.S)
    assert told is not None
    assert {*re.findall(r"`(\w+)`", told[1])} == {*type(recipe).model_fields} | {"extends"}
