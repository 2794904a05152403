"""A tokenizer of very many added tokens: refused before it is read where that would take long.

Hermetic: the tiny model's tokenizer. Alone: pytest tests/models/test_tokenizer_budget.py
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lora_cli.common import LoraError, files
from lora_cli.models import tokenizer_budget
from lora_cli.models.tokenizer import load_tokenizer

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "model", tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values})
    )


def write_added(copy: Path, count: int) -> None:
    path = copy / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    more = [{"id": 512 + n, "content": f"<|s_{n}|>", **FLAGS} for n in range(count)]
    change(path, added_tokens=added + more)


def write_decoder(copy: Path, count: int) -> None:
    added = {str(512 + n): {"content": f"<|s_{n}|>", **FLAGS} for n in range(count)}
    change(copy / "tokenizer_config.json", added_tokens_decoder=added)


def write_legacy(copy: Path, count: int) -> None:
    change(copy / "added_tokens.json", **{f"<|s_{n}|>": 512 + n for n in range(count)})


def write_extra(copy: Path, count: int) -> None:
    extra = [f"<|s_{n}|>" for n in range(count)]
    change(copy / "tokenizer_config.json", extra_special_tokens=extra)


def write_named(copy: Path, count: int) -> None:
    change(copy / "tokenizer_config.json", **{f"k{n}_token": f"<|s_{n}|>" for n in range(count)})


def write_map(copy: Path, count: int) -> None:
    tokens = {f"t{n}": f"<|s_{n}|>" for n in range(count)}
    change(copy / "special_tokens_map.json", additional_special_tokens=tokens)


WRITERS = [write_added, write_decoder, write_legacy, write_extra, write_named, write_map]


@pytest.mark.parametrize("write", WRITERS)
def test_too_many_tokens_are_refused_before_they_are_read(copy: Path, write: Any) -> None:
    write(copy, 100_000)
    began = time.process_time()
    with pytest.raises(LoraError, match="added tokens, and names .* at most 8 s is allowed"):
        load_tokenizer(str(copy))
    assert time.process_time() - began < 3  # reading them takes up to 41 s


def test_named_tokens_are_many_sooner_beside_added_ones(copy: Path) -> None:
    """5,000 of each took 18 s, though neither takes long alone."""
    for write in (write_extra, write_added):
        write(copy, 5000)
        load_tokenizer(str(copy))  # the named ones are those that are added
    change(copy / "tokenizer_config.json", extra_special_tokens=[f"<e{n}>" for n in range(5000)])
    with pytest.raises(LoraError, match=r"has 5,\d+ added tokens, and names 5,000 that are not"):
        load_tokenizer(str(copy))


def test_a_voice_model_s_tokens_are_read(copy: Path) -> None:
    write_added(copy, 65_538)
    write_decoder(copy, 65_538)
    assert len(load_tokenizer(str(copy))) == 512 + 65_538


def test_braces_of_a_vocabulary_are_no_tokens(copy: Path) -> None:
    path = copy / "tokenizer.json"
    model = files.read_json(path)["model"]
    model["vocab"] |= {"{" * (n + 2): 512 + n for n in range(500)}
    change(path, model=model)
    assert path.read_bytes().count(b"{") * tokenizer_budget.EACH > tokenizer_budget.SECONDS
    assert len(load_tokenizer(str(copy))) == 1012
