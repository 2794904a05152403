"""A name that is neither a folder here nor to be had from the hub is named in the error.

Hermetic: nothing is asked for over the network. Alone: pytest tests/models/test_names.py
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_cli.common import LoraError
from lora_cli.models import Base, load_tokenizer, names

FAILED = "^gone is not a folder here, and reading it from the hub failed: "


@pytest.mark.parametrize(
    "ask",
    [lambda: Base("gone").resolve(), lambda: Base("gone").config, lambda: load_tokenizer("gone")],
    ids=["resolve", "config", "tokenizer"],
)
def test_a_mistyped_folder_is_named(ask, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraError, match=FAILED):
        ask()


def write_gguf(file: Path, kind: str = "model", tensors: int = 3, size: int = 100) -> None:
    """The beginning of a GGUF file, by the format's description."""
    key, value = b"general.type", kind.encode()
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, 1)
    said = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    file.write_bytes(head + said + bytes(size))


def suggested(folder: Path) -> str:
    with pytest.raises(LoraError, match="is neither a model nor an adapter") as error:
        names.classify(str(folder))
    return error.value.hint or ""


def test_the_gguf_of_a_folder_that_is_a_model_is_suggested(tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "a.gguf").touch()
    (folder / "b.gguf").write_bytes(b"no GGUF" * 9)
    write_gguf(folder / "c-mmproj.gguf", size=9000)
    write_gguf(folder / "d.gguf", kind="mmproj", size=9000)
    write_gguf(folder / "e.gguf", kind="adapter", size=9000)
    write_gguf(folder / "f.gguf", tensors=0, size=9000)
    assert suggested(folder) == "give a folder with config.json or adapter_config.json"
    for number in (2, 1):
        write_gguf(folder / f"m-0000{number}-of-00002.gguf", size=9000)
    first = f"'{folder}/m-00001-of-00002.gguf'"
    assert suggested(folder) == f"llama-gguf-split --merge {first} whole.gguf joins its parts"
    write_gguf(folder / "m-q4.gguf", size=10)
    assert suggested(folder) == f"did you mean '{folder}/m-q4.gguf'?"
    write_gguf(folder / "m-f16.gguf", size=90)
    (folder / "z.gguf").mkdir()
    assert suggested(folder) == (f"did you mean '{folder}/m-f16.gguf'? There are also m-q4.gguf")


def test_a_hub_that_cannot_be_asked_is_asked_once(monkeypatch, tmp_path: Path) -> None:
    asked = []

    def find(name: str) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names.reach, "refuse_unreachable", lambda name: None)
    monkeypatch.setattr(names, "find_adapter_commit", find)
    with pytest.raises(LoraError, match="^some/one is not a folder here, .*: no route"):
        names.classify("some/one")
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda name, file: f"cache/{name}/{file}")
    assert names.classify("some/one") == "hub"
    assert asked == ["some/one", "some/one"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("run/merged", "did you mean runs/merged?"),
        ("runs/mine", "ls runs"),
        ("gone/merged", "lora runs lists what was trained below this folder; curl"),
        ("gone/adapter", "lora runs lists what was trained below this folder; curl"),
        ("org/model", "curl"),
    ],
)
def test_a_path_that_is_not_here_is_a_path_where_the_hub_is_silent(
    monkeypatch, tmp_path: Path, name: str, hint: str
) -> None:
    def refuse(name: str) -> None:
        raise LoraError(f"{name} is not on this machine", "curl")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names.reach, "refuse_unreachable", refuse)
    Path("runs/merged").mkdir(parents=True)
    with pytest.raises(LoraError, match=f"^{name} is not on this machine$") as error:
        names.classify(name)
    assert error.value.hint == hint


def test_a_failure_of_the_network_is_told_with_the_name(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(LoraError, match=FAILED + "no route"),
        names.explain_hub_failure("gone"),
    ):
        raise ConnectionError("no route")


def test_other_failures_pass(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(ConnectionError), names.explain_hub_failure("here"):
        raise ConnectionError("no route")
    with pytest.raises(ZeroDivisionError), names.explain_hub_failure("gone"):
        raise ZeroDivisionError
