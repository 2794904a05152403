"""The Dockerfile, without building it: a linter accepts it, what it copies is there and enough to make
the wheel, what it installs has a tested version, and what it starts is the command line.

Hermetic: hadolint comes as a wheel; no daemon, no network. Alone: pytest tests/test_dockerfile.py
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "Dockerfile"
TEXT = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
STEPS = [line.split(None, 1) for line in TEXT.splitlines() if line and line[0] != "#"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==")
    for line in (ROOT / "lora_cli" / "constraints.txt").read_text().splitlines()
    if "==" in line
)


def find(kind: str) -> list[str]:
    """What follows each instruction of this kind, in order."""
    return [rest for name, rest in STEPS if name == kind]


def list_copied() -> list[tuple[list[str], str]]:
    """What is copied out of the repository, and whereto."""
    found = [rest.split() for rest in find("COPY") if "--from=" not in rest]
    return [(words[:-1], words[-1]) for words in found]


def list_installed() -> list[list[str]]:
    """The words of each `pip install`."""
    parts = [part for rest in find("RUN") for part in rest.split(" && ")]
    return [words[2:] for part in parts if (words := shlex.split(part))[:2] == ["pip", "install"]]


def test_a_linter_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint's wheel is for Linux alone")
    done = subprocess.run([program, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert DOCKERFILE.read_text().count("hadolint ignore") == 1


def test_what_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    sources = [source for copied, _ in list_copied() for source in copied]
    assert len(sources) >= 5
    assert not [source for source in sources if not (ROOT / source).exists()]
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert rules[0] == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert {source.split("/")[0] for source in sources} == sent


def test_what_is_copied_makes_the_wheel_by_the_command_that_stands_there(tmp_path: Path) -> None:
    for sources, target in list_copied():
        for source in sources:
            if target.startswith("/"):
                continue
            kept = tmp_path / "source" / target / ("" if target != "./" else source)
            kept.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, kept)
    [command] = [rest for rest in find("RUN") if rest.startswith("pip wheel")]
    words = command.replace("/wheels", str(tmp_path / "wheels")).split()
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=tmp_path / "source"
    )
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "wheels").iterdir()
    assert fnmatch.fnmatch(f"/wheels/{wheel.name}", "/wheels/*.whl")


def test_each_package_has_a_tested_version() -> None:
    installed = list_installed()
    assert len(installed) == 4
    extras = set()
    for words in installed:
        assert words[words.index("-c") + 1] == "/constraints.txt"
        options = {words.index("-c") + 1} | {
            place + 1 for place, word in enumerate(words) if word == "--index-url"
        }
        for place, word in enumerate(words):
            if word.startswith("$1["):
                extras |= {*word[3:-1].split(",")}
            elif not word.startswith("-") and place not in options:
                assert word in PINNED
    assert extras == {"gguf", "serve"}
    asked = [
        *PROJECT["dependencies"],
        *(each for extra in extras for each in PROJECT["optional-dependencies"][extra]),
    ]
    for each in map(Requirement, asked):
        assert each.specifier.contains(PINNED[canonicalize_name(each.name)]), each


def test_what_is_started_is_the_command_line_and_nobody_is_root() -> None:
    [entry], [default] = find("ENTRYPOINT"), find("CMD")
    assert json.loads(entry)[0] in PROJECT["scripts"]
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", *json.loads(default)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "Usage: lora" in done.stdout
    stages = [rest.split(" AS ")[1] for rest in find("FROM")]
    assert stages == ["wheel", "base", "cpu", "cuda"]
    assert [int(user) for user in find("USER")] == [1000, 1000]


def test_its_python_is_one_that_the_package_is_for() -> None:
    versions = {tag for rest in find("FROM") for tag in re.findall(r"python:(3\.\d+)-", rest)}
    [version] = versions
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_targets_and_commands_of_its_comment_are_its_own() -> None:
    shown = re.findall(r"^#   (docker \w+) (.*)", DOCKERFILE.read_text(), re.M)
    targets = {found for _, words in shown for found in re.findall(r"--target (\w+)", words)}
    assert targets == {"cpu", "cuda"}
    assert [verb for verb, _ in shown] == ["docker build", "docker build", "docker run"]
    mounted = set(re.findall(r":(/\w+)", shown[2][1]))
    made = {word for rest in find("RUN") for word in re.findall(r"/(?:work|cache)\b", rest)}
    assert mounted == made
