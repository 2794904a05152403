"""Read a stranger's GGUF file in processes of its own, within limits that fit its size.

The first looks through all that stands before the weights, with the standard library; the second
lets transformers read what has passed. Both end with this process, however it ends.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import (
    LoraError,
    RejectedError,
    confined,
    endings,
    files,
    library_errors,
    quote,
)
from lora_cli.models.gguf_weights import ALONE, OTHERWISE

LOOKING = confined.Budget(10.0, 2**28)
"""What looking through a header may take: 4 million items take 3 s."""
SECONDS, SECONDS_EACH = 60.0, 1e-6
"""Processor seconds for reading a file, and for each of its numbers besides. SmolLM2-135M takes 22
from Q4_1 and 23 from IQ3_XXS, with a vocabulary of 49,152 tokens and a peak of 1.2 GB."""
MEMORY = 2**30
"""Bytes that reading may take, beside the weights as they are written, twice, …"""
DECODED = 24
"""… for each number of the largest tensor, which is decoded in float32, some times over, …"""
ITEM = 2**10
"""… for each item of the lists beside the weights, which the package gguf makes an array of, …"""
LLAMA_MEMORY = 2**32
"""Bytes of addresses that llama.cpp may take beside the file: its threads set some aside."""
MAPPED = 4
"""… and how many times the file may be mapped."""


class Layout(NamedTuple):
    """What a GGUF file says of itself before its weights, and what its entries bear out."""

    kinds: dict[str, int]
    """How many numbers it keeps in each of ggml's types, the most common first."""
    numbers: int
    largest: int
    """The numbers of its largest tensor."""
    items: int
    """The items of all arrays beside the weights."""
    parts: int
    """Of how many files the model is."""

    @property
    def kind(self) -> str:
        """The type that most numbers are kept in."""
        return next(iter(self.kinds))

    @property
    def dtype(self) -> str:
        """What its numbers are written in, as far as that is known before they are read: float16
        may be bfloat16, which is as large."""
        return {"F32": "float32", "F16": "float16"}.get(self.kind, "bfloat16")

    @property
    def written(self) -> int:
        """Bytes of the weights as they are written."""
        return self.numbers * (4 if self.dtype == "float32" else 2)

    def make_budget(self, size: int) -> confined.Budget:
        """Return what reading a file of so many bytes may take."""
        held = 2 * self.written + DECODED * self.largest + MAPPED * size + ITEM * self.items
        return confined.Budget(SECONDS + SECONDS_EACH * self.numbers, MEMORY + held)

    def make_llama_limits(self) -> tuple[float, int]:
        """Return the processor seconds and bytes that llama.cpp may take for some probes."""
        return SECONDS + SECONDS_EACH * self.numbers, LLAMA_MEMORY + 2 * self.written


def read_layout(path: Path) -> Layout:
    """Look through a GGUF file, as far as its weights. Raises LoraError for one that is damaged,
    cut short, none at all, or only a part of a model."""
    hint = f"fetch the file again: here it has {path.stat().st_size:,} bytes"
    program = confined.Confined(Path(__file__).with_name("gguf_header_program.py"))
    answer = _run(program, LOOKING, str(path), path, hint)
    if "refused" in answer:
        raise LoraError(f"{path} cannot be a base: {answer['refused']}", hint)
    layout = Layout(**answer)
    if layout.parts > 1:
        whole = f"llama-gguf-split --merge {quote(path)} whole.gguf"
        raise LoraError(
            f"{path} is one of {layout.parts} parts of a model",
            f"{whole}, with the first part's name",
        )
    return layout


def write_model(path: Path, layout: Layout, folder: Path) -> tuple[str, str]:
    """Write the model of a GGUF file into a folder, with its tokenizer; return the type that its
    weights were written in, and what was checked, in words.

    Raises LoraError for a file that transformers does not read, RejectedError where what it reads
    is not the model in the file.
    """
    program = confined.Confined(Path(__file__).with_name("gguf_program.py"))
    with files.scratch_folder() as alone:
        (alone / ALONE).symlink_to(path)
        job = [str(path), str(alone), str(folder), layout.numbers]
        budget = layout.make_budget(path.stat().st_size)
        answer = _run(program, budget, job, path, OTHERWISE)
    if "ours" in answer:
        kind, message, hint = answer["ours"]
        raise (RejectedError if kind == "rejected" else LoraError)(message, hint)
    if "theirs" in answer:
        with library_errors.translate_file_errors(
            f"{path} cannot be a base: transformers does not read it", OTHERWISE
        ):
            raise _make_again(*answer["theirs"])
    num = answer["matrices"]
    return answer["dtype"], f"{num} of {num} matrices hold the file's numbers"


def _run(
    program: confined.Confined, budget: confined.Budget, job: Any, path: Path, hint: str
) -> dict[str, Any]:
    """Return what a program answers to one job; its process ends with this. Raises LoraError where
    it takes more than the budget, or ends."""
    try:
        with endings.undone(partial(_close, program)):
            [answer] = program.run(budget, None, [job])
    except confined.Stopped as stopped:
        takes = {
            "time": f"takes over {budget.seconds:,.0f} s of processor time",
            "memory": f"takes over {budget.memory / 1e9:.1f} GB of memory",
        }.get(stopped.why, f"ended the process that reads it ({stopped.why})")
        raise LoraError(f"{path} cannot be a base: reading it {takes}", hint) from None
    return answer


def _close(program: confined.Confined) -> bool:
    program.close()
    return True


def _make_again(kind: str, said: str, number: int | None, file: str | None) -> Exception:
    """Return an exception of a library's as it was in the other process: of its class, by name."""
    if number is not None:
        return OSError(number, os.strerror(number), file)
    if kind in ("ImportError", "ModuleNotFoundError"):
        return ModuleNotFoundError(said, name=file)
    return type(kind, (Exception,), {})(said)
