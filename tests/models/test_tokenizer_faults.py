"""Tokenizers that cannot be read: the file, the field, or the package that is missing is named.

Hermetic: the tiny model's tokenizer, spoilt. Alone: pytest tests/models/test_tokenizer_faults.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.common import library_errors
from lora_cli.common.errors import LoraError
from lora_cli.models import tokenizer_faults
from lora_cli.models.tokenizer import load_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
SPOILT: dict[str, tuple[str, object]] = {
    "normalizer": ("tokenizer.json", {"type": "Replace", "pattern": None, "content": "_"}),
    "pre_tokenizer": ("tokenizer.json", {**SPLIT, "pattern": None}),
    "post_processor": ("tokenizer.json", {"type": "OfAnotherVersion"}),
    "decoder": ("tokenizer.json", {"type": "OfAnotherVersion"}),
    "padding": ("tokenizer.json", {"strategy": "longest"}),
    "truncation": ("tokenizer.json", 512),
    "added_tokens": ("tokenizer.json", None),
    "model": ("tokenizer.json", {"type": "OfAnotherVersion"}),
    "eos_token": ("tokenizer_config.json", 7),
}


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "model", tmp_path / "a model"))


@pytest.mark.parametrize("field", SPOILT)
def test_the_field_that_cannot_be_read_is_named(copy: Path, field: str) -> None:
    file, value = SPOILT[field]
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(LoraError) as refused:
        load_tokenizer(str(copy))
    assert refused.value.message.startswith(f"{path}: {field} cannot be read: ")
    command, _, rest = (refused.value.hint or "").partition(" shows it; ")
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(value)
    assert rest.startswith("pip install -U transformers")


UNKNOWN = [{"SpecialToken": {"id": "nope", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
PANICS = {
    "post_processor": {
        "type": "TemplateProcessing",
        "single": UNKNOWN,
        "pair": UNKNOWN,
        "special_tokens": {},
    },
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
}


@pytest.mark.parametrize("field", PANICS)
def test_a_panic_is_an_error_like_others(copy: Path, field: str, capfd) -> None:
    """The first panics when it is used, the second when it is read. Rust's own words are not
    seen."""
    path = copy / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: PANICS[field]}))
    with pytest.raises(LoraError) as refused:
        load_tokenizer(str(copy))
    assert refused.value.message.startswith(f"{path}: {field} cannot be read: ")
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_at_a_text_is_an_error_too() -> None:
    panic = type("PanicException", (BaseException,), {})("index out of bounds")
    assert (
        library_errors.translate(panic).message
        == "the tokenizer cannot be used: index out of bounds"
    )


def test_a_file_that_is_cut_off_is_to_be_copied_again(copy: Path) -> None:
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes()[:300])
    with pytest.raises(LoraError, match="Unterminated string") as refused:
        load_tokenizer(str(copy))
    assert refused.value.hint == tokenizer_faults.COPY


WITHOUT = """
import builtins, importlib.util, sys

module, folder = sys.argv[1:]
find, load = importlib.util.find_spec, builtins.__import__

def refuse(name, *args, **given):
    if name.partition(".")[0] in (module.partition(".")[0], "tiktoken"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return load(name, *args, **given)

builtins.__import__ = refuse
importlib.util.find_spec = lambda name, *rest: None if name == module else find(name, *rest)

from lora_cli.common import LoraError
from lora_cli.models import load_tokenizer

try:
    load_tokenizer(folder)
except LoraError as error:
    print(error.hint)
"""


@pytest.mark.parametrize("module", tokenizer_faults.READERS)
def test_a_package_that_is_missing_is_named(copy: Path, module: str) -> None:
    """transformers falls back on tiktoken, and says that this is missing. In a process of its own,
    since it remembers what it has found."""
    (copy / "tokenizer.json").unlink()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, copy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"pip install {tokenizer_faults.READERS[module]}"
