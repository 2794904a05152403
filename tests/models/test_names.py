"""A name that is neither a folder here nor to be had from the hub is named in the error.

Hermetic: nothing is asked for over the network. Alone: pytest tests/models/test_names.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

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
