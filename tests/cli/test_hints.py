"""Hints hold: a command in one is one that lora has, and what one says to write mends what it is said
of.

Every hint of the three files of messages. Commands and options are parsed by the command line
itself, without being run; what can be written into the recipe, or stands after --set, is, and the
same error must not come again. Alone: pytest tests/cli/test_hints.py
"""

from __future__ import annotations

import difflib
import re
import shlex
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement

from lora_cli import cli
from tests import snapshots
from tests.cli import (
    test_bad_artefacts,
    test_bad_inputs,
    test_bad_predictions,
    test_first_failures,
)
from tests.data import test_bad_data

FILES = (
    test_bad_inputs.SNAPSHOT,
    test_bad_artefacts.SNAPSHOT,
    test_bad_data.SNAPSHOT,
    test_bad_predictions.SNAPSHOT,
    test_first_failures.SNAPSHOT,
)
VERBS = {
    "merge",
    "combine",
    "extract",
    "convert",
    "export-gguf",
    "export-onnx",
    "verify",
    "generate",
    "chat",
    "predict",
    "check",
    "launch",
}
BEGINS = re.compile(
    r"^(?:if [^:]*: |merge it instead: |leave out \S+ and install it: )?(?=lora |--|-\w )"
)


def walk_hints():
    """Yield the file, the case, its message and its hint."""
    for file in FILES:
        for name in snapshots.list_names(file):
            text = snapshots.find(file, name)
            message, found, hint = text.partition("\nhint: ")
            if found:
                yield file, name, message, hint.partition("\n(exit")[0]


def split(hint: str) -> list[str]:
    """The parts of a hint between which one may choose, or that follow one another."""
    parts = re.findall(r"(?:(?<==)'[^']*'|[^,;])+", hint)
    return [
        each.strip().removeprefix("or ").removeprefix("then ")
        for part in parts
        for each in re.split(r" or (?=-|lora )", part)
    ]


def find_commands(name: str, message: str, hint: str) -> list[list[str]]:
    """The command lines in a hint, without `lora`; options alone are those of the case's verb."""
    called = re.match(r"\$ (?:\w+=\S+ )*lora (\S+)", message)
    named = [called[1]] if called else re.findall(r"[\w-]+", name)
    kinds = [{"export": "export-gguf"}.get(word, word) for word in named]
    verb = next((kind for kind in kinds if kind in VERBS), "train")
    made = []
    for part in split(hint):
        begins = BEGINS.match(part)
        words = shlex.split(part[begins.end() :]) if begins else []
        if words[:1] == ["lora"]:
            made.append(words[1:])
        elif words:
            made.append([verb, *words])
    return made


def explain_wrong(words: list[str]) -> str | None:
    """What is wrong with a command line that prose may follow, or None; nothing is run."""
    command = typer.main.get_command(cli.app)
    context, rest = command.make_context("lora", ["--", *words], resilient_parsing=True), words
    while hasattr(command, "get_command") and rest and not rest[0].startswith("-"):
        inner = command.get_command(context, rest[0])
        if inner is None and command.name == "recipes":  # it is a command without another, too
            break
        if inner is None:
            return f"there is no {rest[0]}"
        command, rest = inner, rest[1:]
    known = {each for part in command.params for each in (*part.opts, *part.secondary_opts)}
    known.add("--help")
    for word in rest:
        if word.startswith("-") and word.partition("=")[0] not in known:
            return f"{command.name} has no {word}"
    needed = [
        part for part in command.params if part.required and part.param_type_name == "argument"
    ]
    if words is not rest and "--help" not in rest and len(rest) < len(needed):
        return f"{command.name} needs {len(needed)} arguments"
    return None


HINTS = list(walk_hints())


def test_every_command_in_a_hint_is_one() -> None:
    commands = [
        (name, hint, words)
        for _, name, message, hint in HINTS
        for words in find_commands(name, message, hint)
    ]
    wrong = [(*given, said) for given in commands if (said := explain_wrong(given[2]))]
    assert not [each for each in wrong if "needs" not in each[-1] or each[1].startswith("lora")]
    assert len(commands) >= 100


def test_every_package_to_install_is_one() -> None:
    parts = [part for _, _, _, hint in HINTS for part in split(hint) if part.startswith("pip ")]
    for part in parts:
        index = r"(?: --index-url https://download\.pytorch\.org/whl/(?:cu\d+|cpu))?"
        given = re.fullmatch(rf"pip install (?:-U |--force-reinstall )?(\S+){index}", part)
        assert given, part
        assert given[1].startswith("git+https://") or str(Requirement(given[1]))
    assert len(parts) >= 3


KEY = re.compile(r"^(?:add |write |set )?((?:[a-z]\w*\.)*[a-z]\w*): (\S.*)$")


def find_changes(name: str, hint: str) -> list[str]:
    """The values of the recipe that a hint gives, as --set takes them."""
    made = []
    for part in split(hint):
        if found := re.match(r"--set (\S+=(?:'[^']*'|\S+))$", part):
            made.append(shlex.split(found[1])[0])
    whole = KEY.match(hint)
    if whole and "." in whole[1] and "," not in whole[2].split("]")[0].replace("[", ""):
        made.append(f"{whole[1]}={whole[2]}")
    return [each for each in made if "…" not in each and "NAME" not in each and "FILE" not in each]


def respell(folder: Path, words: list[str], guess: str) -> list[str]:
    """The words, or the recipe, with what is nearest to `guess` replaced by it."""
    guess = guess.rpartition(".")[2] if guess.count(".") == 1 else guess
    path = folder / "r.yaml"
    text = path.read_text() if path.exists() else ""
    near = difflib.get_close_matches(guess, set(re.findall(r"[\w<>-]+", text)) - {guess}, 1)
    if near:
        path.write_text(text.replace(near[0], guess))
        return words
    parts = [part for word in words for part in re.split(r"[.=]", word)]
    (wrong,) = difflib.get_close_matches(guess, set(parts) - {guess}, 1)
    return [word.replace(wrong, guess) for word in words]


APPLIED = {
    name: (message, hint)
    for file, name, message, hint in HINTS
    if file == test_bad_inputs.SNAPSHOT
    # the last: what torch is told to be there cannot train
    and not name.startswith(("command", "recipes", "recipe: a shipped", "gpu: too old for 4"))
    and (find_changes(name, hint) or re.fullmatch(r"did you mean \S+\?(?: lora recipes.*)?", hint))
}


@pytest.mark.parametrize("name", APPLIED)
def test_what_a_hint_says_to_write_mends_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, hint = APPLIED[name]

    def mended(folder: Path):
        given = test_bad_inputs.BAD[name](folder)
        words, *beside = given if isinstance(given, tuple) else (given, {})
        words = list(map(str, words))
        if guess := re.match(r"did you mean (\S+?)\?", hint):
            return respell(folder, words, guess[1]), *beside
        for change in find_changes(name, hint)[:1]:
            words = words[:-2] if words[-2] == "--set" else words
            words += ["--set", change]
        return words, *beside

    monkeypatch.setitem(test_bad_inputs.BAD, "mended", mended)
    found = test_bad_inputs.said("mended", tmp_path)
    was = message.partition("error: ")[2]
    key = re.search(r"(?:model|data|lora|quantization|training)\.\w+", was)
    said = "\n".join(line for line in found.splitlines() if not line.startswith(("$", "hint: ")))
    assert was not in said
    # what is spelt as it should be may not be installed
    assert key is None or key[0] not in said or "\nhint: pip install " in found
    assert "is not a known key" not in found
    assert "Traceback" not in found


def test_enough_hints_are_applied() -> None:
    assert len(APPLIED) >= 20
