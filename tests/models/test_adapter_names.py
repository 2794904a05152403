"""Adapters whose tensors other programs named are read as PEFT's own; an adapter one level below is
named; one that changes nothing is said to.

Hermetic: a small random Llama, adapted and saved by PEFT. Alone: pytest
tests/models/test_adapter_names.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_cli.common import LoraError, endings
from lora_cli.merge import merge
from lora_cli.models import names, read_adapter
from lora_cli.models.adapter_names import respell
from tests.cli.test_bad_artefacts import TOKENIZER
from tests.networks import random_model

WEIGHTS = "adapter_model.safetensors"
OTHERS = {
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "torch.compile's": lambda name: name.replace(
        "base_model.model.", "base_model.model._orig_mod."
    ),
    "compiled, no prefix": lambda name: "_orig_mod." + name.removeprefix("base_model.model."),
    "the adapter's name": lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(
        ".lora_B.", ".lora_B.mine."
    ),
    "another module's": lambda name: "model." + name,
    "DDP's": lambda name: "module." + name,
}


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, adapter/ (B not zero), and merged/, by PEFT."""
    folder = tmp_path_factory.mktemp("saved")
    made = random_model("llama", vocab_size=512)
    made.save_pretrained(folder / "base")
    for file in TOKENIZER:
        shutil.copy(tiny / "model" / file, folder / "base" / file)
    adapted = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def renamed(saved: Path, folder: Path, rename) -> Path:
    shutil.copytree(saved / "adapter", folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("others", OTHERS)
def test_other_names_are_read_as_peft_s(
    saved: Path, tmp_path: Path, others: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = renamed(saved, tmp_path / "theirs", OTHERS[others])
    merge.merge(folder, tmp_path / "out")
    given, wanted = (
        load_file(each / "model.safetensors") for each in (tmp_path / "out", saved / "merged")
    )
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(given[name], tensor, rtol=1e-6, atol=1e-7)
    said = capsys.readouterr().err
    assert f"{folder}: its tensors are read under PEFT's names" in said
    assert f"merging {folder} into" in said
    copy = read_adapter(folder).folder
    assert copy != folder
    assert copy.is_dir()
    endings.undo_all()  # as at the process's end
    assert not copy.exists()


@pytest.mark.parametrize("dora", [False, True])
def test_peft_s_own_names_stay(saved: Path, tmp_path: Path, dora: bool) -> None:
    adapted = get_peft_model(
        random_model("llama", vocab_size=512),
        LoraConfig(
            r=4,
            target_modules=["q_proj", "embed_tokens"],
            modules_to_save=["lm_head"],
            use_dora=dora,
            bias="all",
        ),
    )
    adapted.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {respell(name) for name in stored} == stored.keys()
    # those of a state_dict, with the adapter's name in them
    state = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {respell(name) for name in state} <= stored.keys()


def test_an_adapter_below_is_named(saved: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copytree(saved / "adapter", tmp_path / "run" / name)
    for name in ("checkpoint-10", "default", "adapter"):
        if name != "checkpoint-10":
            shutil.copytree(saved / "adapter", tmp_path / "run" / name)
        for ask in (read_adapter, lambda path: names.classify(str(path))):
            with pytest.raises(LoraError) as caught:
                ask(tmp_path / "run")
            assert caught.value.hint == f"did you mean {tmp_path / 'run' / name}?"


def test_an_adapter_that_changes_nothing_is_said_to(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved / "adapter", tmp_path / "zero")
    tensors = load_file(tmp_path / "zero" / WEIGHTS)
    save_file(
        {name: each * ("lora_A" in name) for name, each in tensors.items()},
        tmp_path / "zero" / WEIGHTS,
    )
    for _ in range(2):
        read_adapter(tmp_path / "zero")
    said = f"{tmp_path / 'zero'} changes nothing: every B is zero"
    assert capsys.readouterr().err.count(said) == 1
    read_adapter(saved / "adapter")
    assert "changes nothing" not in capsys.readouterr().err
