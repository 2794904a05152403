"""A GGUF file is known by its name, in any case, or by its first four bytes: everywhere.

Hermetic: files of a few bytes. Alone: pytest tests/common/test_gguf_names.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lora_cli.card import read_facts
from lora_cli.common import LoraError, UsageError, plain_files
from lora_cli.gguf import imatrix
from lora_cli.models import names
from lora_cli.publish import show
from lora_cli.publish.outgoing import Outgoing
from lora_cli.publish.private import refuse_private
from lora_cli.recipe import load_recipe
from lora_cli.report import history
from tests.report import written

PACKAGE = Path(__file__).parent.parent.parent / "lora_cli"
NAMES = ("x.gguf", "x.GGUF", "x.Gguf", "sha256-0123", "model.bin")


@pytest.fixture(params=NAMES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A GGUF file under one of the names that such files have."""
    path = tmp_path / request.param
    path.write_bytes(b"GGUF" + bytes(60))
    return path


def test_it_is_one_everywhere(file: Path) -> None:
    assert plain_files.is_gguf(file)
    assert names.classify(str(file)) == "gguf"
    assert imatrix.is_imatrix(str(file))
    written.write_gguf(file)
    file.write_bytes(b"GGUF" + bytes(60))
    assert read_facts(file).kind == "gguf"
    made = history.read_made(file)
    assert made is not None
    assert made.kind == "gguf"
    assert show.add_files(read_facts(file), [file]).ggufs[-1].name == file.name
    refuse_private([Outgoing(file.name, file)], [])
    with pytest.raises(UsageError, match="is a model's file, not a recipe") as said:
        load_recipe(file, [])
    assert said.value.hint is not None
    assert f"--model {file} " in said.value.hint


def test_secrets_in_one_are_found_as_in_weights(file: Path) -> None:
    file.write_bytes(b"GGUF" + b"\xff" * 9 + b" /home/someone/models/x " + bytes(60))
    with pytest.raises(LoraError, match=f"^{re.escape(file.name)} holds a folder of this machine"):
        refuse_private([Outgoing(file.name, file)], ["/home/someone"])


def test_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "other").write_bytes(b"PK\x03\x04")
    (tmp_path / "short").write_bytes(b"GGU")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder.gguf", "other", "short", "pipe", "absent"):
        assert not plain_files.is_gguf(tmp_path / name), name
    assert plain_files.is_gguf("absent.GGUF")


def test_a_run_finds_one_of_any_case_beside_it(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    for name in ("a.gguf", "b.GGUF"):
        written.write_gguf(tmp_path / "run" / name)
    assert {made.path.name for made in history.read_run(run).made} == {"a.gguf", "b.GGUF"}


def test_no_other_file_tells_one_by_itself() -> None:
    own = r"suffix[^\n]*\.gguf|endswith\([^\n]*gguf|glob\([^\n]*gguf|b\"GGUF\""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(own, path.read_text())
    }
    assert found == {
        "card/usage.py",  # transformers asks for that very ending
        "common/plain_files.py",
        "gguf/header.py",  # reads and writes headers
        "gguf/quantize.py",  # of the two forms of an importance matrix
        "gguf/tools.py",  # whether a converter has made a whole one
        "models/gguf_files.py",  # whether what begins as one has tensors
        "models/gguf_header_program.py",
    }
