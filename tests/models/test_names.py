"""A name that is neither a folder here nor to be had from the hub is named in the error.

Hermetic: nothing is asked for over the network. Alone: pytest tests/models/test_names.py
"""

from __future__ import annotations

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
