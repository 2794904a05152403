"""Compute logits in llama.cpp at any position of a text, by the C functions of xllamacpp's library.

Its server gives the distribution after the last token alone, as JSON. The functions and structures
are those of include/llama.h. The structures may grow between releases: they are passed with room to
spare, and their defaults are compared with what this file knows before anything is computed.
"""

from __future__ import annotations

import codecs
import ctypes
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_uint8,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lora_cli.common import LoraError
from lora_cli.gguf import ggml, opening

F16, F32 = 1, 0
"""ggml's numbers of two types of a KV cache."""
NEVER = 0
"""LLAMA_FLASH_ATTN_TYPE_DISABLED: flash attention would read K and V as float16."""


class ModelParams(Structure):
    """llama_model_params, as far as it is set here; the rest keeps its default."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("room", c_uint8 * 1024),
    )


class ContextParams(Structure):
    """llama_context_params up to what is set here; the rest keeps its default."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32 * 2),
        ("n_threads", c_int32 * 2),
        ("types", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("rope", c_float * 6),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("room", c_uint8 * 1024),
    )


class Batch(Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_get": (None, [c_void_p, c_void_p]),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (ctypes.c_bool, [c_void_p, c_int32]),
    "llama_vocab_is_control": (ctypes.c_bool, [c_void_p, c_int32]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, c_void_p, ctypes.c_size_t, c_void_p]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (c_void_p, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, ctypes.c_bool]),
    "llama_memory_seq_rm": (ctypes.c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_token_to_piece": (
        c_int32,
        [c_void_p, c_int32, c_char_p, c_int32, c_int32, ctypes.c_bool],
    ),
}


@cache
def load_api() -> Any:
    """Load llama.cpp's functions, silenced. Raises LoraError where this xllamacpp hides them, or
    lays out its structures otherwise than this file."""
    lib = ggml.load_library()
    try:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise LoraError(
            f"this xllamacpp does not let others use llama.cpp ({error})",
            "pip install -U xllamacpp",
        ) from error
    params = lib.llama_context_default_params()
    known = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max)
    if (*known, params.flash_attn_type) != (512, 2048, 512, 1, -1) or (
        (params.type_k, params.type_v) != (F16, F16)
    ):
        raise LoraError(
            "this xllamacpp lays out llama.cpp's parameters otherwise than lora knows",
            "pip install 'xllamacpp==2026.10.11549'",
        )
    lib.silent = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *said: None)
    lib.llama_backend_init()
    return lib


def find_lack() -> str | None:
    """Return why llama.cpp's functions cannot be used here; None where they can."""
    try:
        load_api()
    except LoraError as error:
        return error.message
    return None


def compute_logits(
    path: Path, texts: Sequence[Sequence[int]], adapter: Path | None = None
) -> Iterator[torch.Tensor]:
    """Yield the logits at every position of each text, float32 (length, vocabulary), on the CPU.

    `path` is a GGUF, `texts` are token ids, `adapter` a GGUF of a LoRA adapter applied at full
    strength. Keys and values are kept in float32, without flash attention. Raises LoraError where
    llama.cpp cannot load or compute it.
    """
    with open_gguf(path, max(map(len, texts)), adapter) as opened:
        for ids in texts:
            yield opened.compute(ids)


class Step(NamedTuple):
    """A token to compute."""

    token: int
    at: int
    """Its place in its text."""
    text: int
    """The number of its text, of those that are computed side by side."""
    wanted: bool
    """Whether its logits are."""


@dataclass
class Opened:
    """A GGUF file that llama.cpp has loaded, for texts of some length."""

    lib: Any
    context: Any
    vocabulary: Any
    shared: Sequence[int] = ()
    """The tokens with which texts begin, as far as they are read once for all."""
    holds_shared: bool = False
    """Whether keys and values are those of the shared tokens, and of one text after them."""

    def compute(self, ids: Sequence[int], places: Sequence[int] | None = None) -> torch.Tensor:
        """Return the logits at some places of a text of its own, in their order, by default at all:
        float32 (places, vocabulary), on the CPU. Raises LoraError where it cannot be computed."""
        wanted = frozenset(range(len(ids)) if places is None else places)
        start = self._forget_text(ids, min(wanted, default=0))
        steps = [Step(ids[at], at, 0, at in wanted) for at in range(start, len(ids))]
        return torch.from_numpy(self.decode(steps))

    def decode(self, steps: Sequence[Step]) -> np.ndarray:
        """Compute tokens, each text's after those that it has already; return the logits of those
        that are wanted, float32 (wanted, vocabulary). Raises LoraError where it cannot be done."""
        shape = sum(step.wanted for step in steps), self.lib.llama_vocab_n_tokens(self.vocabulary)
        batch = self.lib.llama_batch_init(len(steps), 0, 1)
        try:
            batch.n_tokens = len(steps)
            for number, step in enumerate(steps):
                batch.token[number], batch.pos[number] = step.token, step.at
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, step.text
                batch.logits[number] = step.wanted
            if self.lib.llama_decode(self.context, batch):
                raise LoraError("llama.cpp could not compute a text's logits", "export it again")
            if not shape[0]:
                return np.empty(shape, np.float32)
            place = ctypes.cast(self.lib.llama_get_logits(self.context), POINTER(c_float))
            return np.ctypeslib.as_array(place, shape).copy()
        finally:
            self.lib.llama_batch_free(batch)

    def _forget_text(self, ids: Sequence[int], first: int) -> int:
        """Make room for a text whose logits are wanted from place `first` on; return how many of
        its tokens need not be read again."""
        memory, length = self.lib.llama_get_memory(self.context), len(self.shared)
        if first < length or list(ids[:length]) != list(self.shared):
            length = 0
        if length and self.holds_shared:
            self.lib.llama_memory_seq_rm(memory, 0, length, -1)
            return length
        self.forget()
        if length:
            self.decode([Step(token, at, 0, False) for at, token in enumerate(self.shared)])
        self.holds_shared = bool(length)
        return length

    def forget(self) -> None:
        """Forget every text."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def copy_text(self, one: int, other: int) -> None:
        """Give a text what another has so far."""
        memory = self.lib.llama_get_memory(self.context)
        self.lib.llama_memory_seq_cp(memory, one, other, -1, -1)

    def share(self, tokens: Sequence[int]) -> None:
        """Read tokens once for all texts that begin with them, unless this model cannot go back to
        their end: one whose state runs on, as Mamba's does, forgets nothing of a text but all."""
        if not tokens:
            return
        self.shared, self.holds_shared = tokens, False
        self.compute([*tokens, tokens[-1]], [len(tokens)])
        memory = self.lib.llama_get_memory(self.context)
        if not self.lib.llama_memory_seq_rm(memory, 0, len(tokens), -1):
            self.shared, self.holds_shared = (), False

    def ends_answer(self, token: int) -> bool:
        """Return whether llama.cpp stops writing at a token."""
        return self.lib.llama_vocab_is_eog(self.vocabulary, token)

    def leaves_out(self, token: int) -> bool:
        """Return whether a token is no part of the text of an answer: the converter makes such ones
        of added tokens that look special, also where the tokenizer takes them for words."""
        return self.lib.llama_vocab_is_control(self.vocabulary, token)

    def read(self, ids: Sequence[int]) -> str:
        """Return the text of an answer as llama.cpp's server gives it: of control tokens nothing,
        and no character that is cut off at the end."""
        text = b"".join(map(self._read_piece, ids))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(text)

    def _read_piece(self, token: int) -> bytes:
        for size in (64, 65536):
            piece = ctypes.create_string_buffer(size)
            length = self.lib.llama_token_to_piece(self.vocabulary, token, piece, size, 0, False)
            if length >= 0:
                return piece.raw[:length]
        raise LoraError(f"llama.cpp has no text for token {token}", "export it again")


def count_shared(texts: Sequence[Sequence[int]], most: int) -> int:
    """Count the tokens with which all texts begin, and no more than `most`."""
    first, last = min(texts, key=list), max(texts, key=list)
    pairs = zip(first[:most], last[:most])
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@contextmanager
def open_gguf(path: Path, longest: int, adapter: Path | None = None) -> Iterator[Opened]:
    """Load a GGUF file for texts of up to `longest` tokens; see `compute_logits`. Inside, llama.cpp
    prints nothing."""
    opening.refuse_unopenable(path, longest, True, adapter)
    lib = load_api()
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = longest
    settings.type_k = settings.type_v = F32
    settings.flash_attn_type = NEVER
    with (
        load_model(path) as model,
        open_context(model, settings, longest, adapter) as opened,
    ):
        yield opened


@contextmanager
def _silence(lib: Any) -> Iterator[None]:
    """Keep llama.cpp from printing; afterwards its log goes where it went before, since the server
    says there why it cannot load a file."""
    callback, data = c_void_p(), c_void_p()
    lib.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    lib.llama_log_set(ctypes.cast(lib.silent, c_void_p), None)
    try:
        yield
    finally:
        lib.llama_log_set(callback, data)


@contextmanager
def load_model(path: Path) -> Iterator[Any]:
    """Load a file that llama.cpp was seen to open; see `open_context`. Raises LoraError."""
    lib = load_api()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    with _silence(lib):
        model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise LoraError(f"llama.cpp cannot load {path}", "export it again")
    try:
        yield model
    finally:
        lib.llama_model_free(model)


@contextmanager
def open_context(
    model: Any, settings: ContextParams, longest: int, adapter: Path | None = None
) -> Iterator[Opened]:
    """Open a loaded model with a context of these settings for texts of up to `longest` tokens
    together. Inside, llama.cpp prints nothing. Raises LoraError."""
    lib = load_api()
    settings.n_threads[:] = [torch.get_num_threads()] * 2
    with _silence(lib):
        context = lib.llama_init_from_model(model, settings)
        try:
            if not context or lib.llama_n_ctx(context) < longest:
                raise LoraError(f"llama.cpp cannot run it on {longest} tokens", "export it again")
            if adapter is not None:
                _lay_over(lib, model, context, adapter)
            yield Opened(lib, context, lib.llama_model_get_vocab(model))
        finally:
            if context:
                lib.llama_free(context)


def _lay_over(lib: Any, model: Any, context: Any, adapter: Path) -> None:
    """Lay a LoRA adapter over the model; it is freed with the model."""
    loaded = lib.llama_adapter_lora_init(model, str(adapter).encode())
    adapters, scales = (c_void_p * 1)(loaded), (c_float * 1)(1.0)
    if not loaded or lib.llama_set_adapters_lora(context, adapters, 1, scales):
        raise LoraError(f"llama.cpp cannot load {adapter}", "export it again")
