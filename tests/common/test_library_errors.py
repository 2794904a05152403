"""The table of other libraries' exceptions: every row means a class that exists, is reached, and
says something short.

Hermetic: exceptions are made, not provoked; those that mistakes cause are in
tests/cli/test_bad_inputs.py. Alone: pytest tests/common/test_library_errors.py
"""

from __future__ import annotations

import builtins
import errno
import importlib
import pickle
import re
import socket
import ssl
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.common import library_errors, ui
from lora_cli.common.errors import LoraError

# Where the classes live; none of them is imported by foreign.py
LIBRARIES = (
    "huggingface_hub.errors", "httpx", "httpx2", "requests.exceptions", "datasets.exceptions", "datasets.data_files",
    "safetensors",
    "jinja2", "torch", "yaml", "pyarrow", "huggingface_hub.dataclasses",
)  # fmt: skip
HTTP = ("httpx", "httpx2", "requests.exceptions")
"""Of these, what is installed depends on the versions of huggingface_hub and datasets; one is."""
# A text that each row with words is for, as the library puts it
TEXTS = {
    "Symlink loop from": "Symlink loop from '/x'",
    "failed to map segment|cannot allocate memory": "libx.so: failed to map segment from object",
    r"\b401\b|\b403\b": "403 Client Error: Forbidden for url",
    r"\b429\b": "429 Client Error: Too Many Requests for url",
    r"^Unknown split": "Unknown split \"tset\". Should be one of ['train'].",
    r"^BuilderConfig": "BuilderConfig 'x' not found. Available: ['main']",
    r"^Config name is missing": "Config name is missing.",
    r"contains custom code|references custom code": "The repository x contains custom code which "
    "must be executed",
    r"requires .*?packages that were not found": "It requires some packages that were not found: "
    "einops",
    r"^Unrecognized model in|Should have a `model_type` key": "Unrecognized model in x. Should "
    "have a `model_type` key",
    r"model type `(.+?)` but": "has model type `lama` but Transformers does not recognize this "
    "architecture",
    r"Unrecognized configuration class": "Unrecognized configuration class <class 'a.b.T5Config'> "
    "for this kind",
    r"Couldn't instantiate": "Couldn't instantiate the backend tokenizer from one of:",
    r"^Tokenizer class": "Tokenizer class X does not exist",
    r"out of memory|can't allocate": "DefaultCPUAllocator: can't allocate memory",
    r"Found no NVIDIA driver": "Found no NVIDIA driver on your system.",
    r"no kernel image": "CUDA error: no kernel image is available for execution on the device",
    r"^CUDA error": "CUDA error: device-side assert triggered",
    r"PytorchStreamReader": "PytorchStreamReader failed reading zip archive",
    r"CUDA Setup failed": "CUDA Setup failed despite GPU being available.",
    r"bitsandbytes": "Using `bitsandbytes` 4-bit quantization requires bitsandbytes",
}


def kinds(name: str) -> list[type[BaseException]]:
    """The classes of this name in the libraries and in Python."""
    if name == "PanicException":  # pyo3's, which is in no module that can be imported
        return [type(name, (BaseException,), {})]
    places = [builtins, socket, ssl, pickle]
    for library in LIBRARIES:
        try:
            places.append(importlib.import_module(library))
        except ImportError:
            assert library in HTTP
    return [
        getattr(place, name) for place in places if isinstance(getattr(place, name, None), type)
    ]


def made(known: library_errors.Known) -> BaseException:
    """An exception that the row is for, without what its class wants at its making."""
    text = next(
        (text for words, text in TEXTS.items() if words and words in known.words), "what was wrong"
    )
    return type(known.kind, (Exception,), {})(text)


@pytest.mark.parametrize(
    "known", library_errors.TABLE, ids=lambda known: f"{known.kind} {known.words[:20]}".strip()
)
def test_every_row_is_reached_and_short(known: library_errors.Known) -> None:
    assert kinds(known.kind), f"no library has {known.kind}"
    error = made(known)
    assert re.search(known.words, str(error)), "TEXTS has a text for every row"
    said = library_errors.translate(error)
    assert said is not None
    expected = known.hint.partition("{")[0]
    assert said.hint is not None
    assert said.hint.startswith(expected)
    assert "{" not in said.message + said.hint
    assert len(ui.list_lines(said)) <= 6


def test_no_row_hides_another() -> None:
    """A row without words stands after those of its class with words."""
    seen: set[str] = set()
    for known in library_errors.TABLE:
        assert known.kind not in seen
        if not known.words:
            seen.add(known.kind)


@pytest.mark.parametrize("number", library_errors.SYSTEM)
def test_the_system_s_errors_name_the_file(number: int) -> None:
    said = library_errors.translate(OSError(number, "words", "folder/file"))
    assert said is not None
    assert said.hint
    assert library_errors.SYSTEM[number] in said.message or number == errno.ENOSPC
    if number not in library_errors.ROOM and number != errno.ENOENT:
        assert "folder/file" in said.message


def test_causes_are_looked_at_too() -> None:
    try:
        try:
            raise type("SafetensorError", (Exception,), {})("header too large")
        except Exception as cause:
            raise RuntimeError("loading failed") from cause
    except RuntimeError as error:
        said = library_errors.translate(error)
    assert said is not None
    assert said.message == "the weights cannot be read: header too large"


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("of ours"), AssertionError(), RuntimeError("x")]
)
def test_what_is_not_in_the_table_is_a_bug(error: Exception) -> None:
    assert library_errors.translate(error) is None


def test_long_words_are_cut() -> None:
    said = library_errors.translate(type("TemplateError", (Exception,), {})("x" * 5000))
    assert said is not None
    assert len(said.message) < 500


def test_what_a_library_raises_while_it_reads_is_its_refusal() -> None:
    with (
        pytest.raises(LoraError, match="it cannot be read: KeyError: 'a'") as caught,
        library_errors.translate_file_errors("it cannot be read", "h"),
    ):
        raise KeyError("a")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(MemoryError), library_errors.translate_file_errors("it cannot be read", "h"):
        raise MemoryError  # in the table: it keeps its own words
    with (
        pytest.raises(LoraError, match="^ours$"),
        library_errors.translate_file_errors("it cannot be read", "h"),
    ):
        raise LoraError("ours")


def library(source: str) -> dict[str, Any]:
    """A module of another program."""
    made: dict[str, Any] = {"__name__": "elsewhere.part"}
    exec(compile(source, "elsewhere.py", "exec"), made)
    return made


@pytest.mark.parametrize(
    ("source", "blamed"),
    [
        (
            "def run(args):\n    raise ValueError('save_strategy is odd')",
            "training.save_strategy was",
        ),
        (
            "def run(args):\n    if args.optim_args:\n        raise KeyError('x')",
            "training.optim_args was",
        ),
        (
            "def run(args):\n    raise ValueError('num_workers is 0, no persistent_workers')",
            "training.dataloader_persistent_workers was",
        ),
        (
            "def run(args):\n    raise ValueError('a file has no header')",
            "elsewhere rejected this recipe",
        ),
    ],
)
def test_a_value_is_blamed_by_what_the_error_says_or_read(source: str, blamed: str) -> None:
    passed_on = [
        f"training.{name}"
        for name in ("save_strategy", "optim_args", "dataloader_persistent_workers")
    ]
    run, args = library(source)["run"], SimpleNamespace(optim_args="x")
    for given in (passed_on, [key for key in passed_on if key in blamed] or passed_on[:1]):
        with pytest.raises(LoraError) as caught, library_errors.translate_refusals(given):
            run(args)
        assert caught.value.message.startswith(blamed)
