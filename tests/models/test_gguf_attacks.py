"""GGUF files of a stranger's: each is one plain error before a library sees it, or one after that.

The files are those of tests/torture/attacks/gguf_bases.py, which tests/test_attacks.py also gives
to commands. Hermetic. Alone: pytest tests/models/test_gguf_attacks.py
"""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from lora_cli.common import LoraError, confined
from lora_cli.models import gguf_header_program, gguf_reading
from tests.torture.attacks import Place, gguf_bases

EACH = 6
"""Cases of each attack."""
BEFORE = ("cut", "counts", "shape", "offset", "array", "encoding", "twice")
"""Attacks of which every case is refused before a library is asked."""


@pytest.mark.parametrize("number", range(len(gguf_bases.ATTACKS)))
def test_an_attack_is_refused_before_a_library_sees_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, files = gguf_bases.ATTACKS[number], list[Path]()
    monkeypatch.setattr(Place, "recipe", lambda self, base, **_: files.append(base) or base)
    for case in range(EACH):
        root = tmp_path / str(case)
        (root / "work").mkdir(parents=True)
        attack(Place(root, root), random.Random(f"{attack.__name__}-{case}"))
        began = time.process_time()
        found = gguf_header_program.handle(None, str(files[-1]))
        assert time.process_time() - began < 2
        if attack.__name__ in BEFORE:
            assert "refused" in found, case
    assert len(files) == EACH


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("split.count", gguf_bases.value(gguf_bases.TEXT, "two"), "split.count is 'two'"),
        ("split.count", gguf_bases.value(gguf_bases.FLOAT32, 2.5), "split.count is 2.5"),
        ("split.count", gguf_bases.value(gguf_bases.INT32, -2), "it has no tensors"),
        (
            gguf_header_program.TOKENS,
            gguf_bases.value(gguf_bases.TEXT, "a"),
            "tokenizer.ggml.tokens is 'a'",
        ),
    ],
)
def test_what_is_no_number_or_list_is_told(
    key: str, given: bytes, said: str, tmp_path: Path
) -> None:
    raw = gguf_bases.sound()
    raw.put(key, given)
    raw.tensors = []
    with pytest.raises(LoraError, match=re.escape(f"x.gguf cannot be a base: {said}")):
        gguf_reading.read_layout(raw.write(tmp_path / "x.gguf"))


def test_a_sound_file_passes(tmp_path: Path) -> None:
    path = gguf_bases.sound().write(tmp_path / "x.gguf")
    layout = gguf_reading.read_layout(path)
    assert layout.kind == "Q8_0"
    assert layout.numbers == 32 * (len(gguf_bases.TOKENS) + 7 * 32 + 3)
    assert layout.parts == 1


def test_the_limits_grow_with_the_file() -> None:
    small, large = (
        gguf_reading.Layout({"Q4_K": numbers}, numbers, numbers // 10, 400_000, 1)
        for numbers in (10**6, 8 * 10**9)
    )
    assert small.make_budget(10**6).memory < 2**31
    assert small.make_budget(10**6).seconds < 100
    assert large.make_budget(4 * 10**9).memory > 2 * large.written
    assert large.make_budget(4 * 10**9).seconds > 3600


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (confined.Budget(0.05, 2**28), "reading it takes over 0 s of processor time"),
        pytest.param(
            confined.Budget(10, 2**22),
            "reading it takes over 0.0 GB of memory",
            marks=pytest.mark.skipif(not confined.LIMITED, reason="Linux limits memory"),
        ),
    ],
)
def test_what_takes_more_is_stopped(
    budget: confined.Budget, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = gguf_bases.sound()
    raw.put("x.y", gguf_bases.texts(["é" * 50] * 200_000))
    raw.put("general.description", gguf_bases.value(gguf_bases.TEXT, "é" * 2**23))
    path = raw.write(tmp_path / "x.gguf")
    monkeypatch.setattr(gguf_reading, "LOOKING", budget)
    with pytest.raises(LoraError, match=said) as stopped:
        gguf_reading.read_layout(path)
    assert stopped.value.hint is not None
    assert stopped.value.hint.startswith("fetch the file again")
