"""Compute logits in llama.cpp at every position of a text, by the C functions of xllamacpp's
library.

Its server gives the distribution after the last token alone, as JSON. The functions and structures
are those of include/llama.h. The structures may grow between releases: they are passed with room to
spare, and their defaults are compared with what this file knows before anything is computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Container, Iterator, Sequence
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


class Opened(NamedTuple):
    """A GGUF file that llama.cpp has loaded, for texts of some length."""

    lib: Any
    context: Any
    vocabulary: Any

    def compute(self, ids: Sequence[int], places: Sequence[int] | None = None) -> torch.Tensor:
        """Return the logits at some places of a text of its own, in their order, by default at all:
        float32 (places, vocabulary), on the CPU. Raises LoraError where it cannot be computed."""
        wanted = range(len(ids)) if places is None else places
        shape = len(wanted), self.lib.llama_vocab_n_tokens(self.vocabulary)
        return _decode(self.lib, self.context, ids, frozenset(wanted), shape)

    def ends_answer(self, token: int) -> bool:
        """Return whether llama.cpp stops writing at a token."""
        return self.lib.llama_vocab_is_eog(self.vocabulary, token)

    def leaves_out(self, token: int) -> bool:
        """Return whether a token is no part of the text of an answer: the converter makes such ones
        of added tokens that look special, also where the tokenizer takes them for words."""
        return self.lib.llama_vocab_is_control(self.vocabulary, token)


@contextmanager
def open_gguf(path: Path, longest: int, adapter: Path | None = None) -> Iterator[Opened]:
    """Load a GGUF file for texts of up to `longest` tokens; see `compute_logits`. Inside, llama.cpp
    prints nothing."""
    opening.refuse_unopenable(path, longest, True, adapter)
    lib = load_api()
    with _silence(lib), _open_context(lib, path, longest, adapter) as (context, vocabulary):
        yield Opened(lib, context, vocabulary)


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
def _open_context(
    lib: Any, path: Path, longest: int, adapter: Path | None
) -> Iterator[tuple[Any, Any]]:
    """Load the model; yield a context for texts of up to `longest` tokens, and the vocabulary."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise LoraError(f"llama.cpp cannot load {path}", "export it again")
    context = None
    try:
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = longest
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = NEVER
        settings.n_threads[:] = [torch.get_num_threads()] * 2
        context = lib.llama_init_from_model(model, settings)
        if not context or lib.llama_n_ctx(context) < longest:
            raise LoraError(f"llama.cpp cannot run {path} on {longest} tokens", "export it again")
        if adapter is not None:
            _lay_over(lib, model, context, adapter)
        yield context, lib.llama_model_get_vocab(model)
    finally:
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)


def _lay_over(lib: Any, model: Any, context: Any, adapter: Path) -> None:
    """Lay a LoRA adapter over the model; it is freed with the model."""
    loaded = lib.llama_adapter_lora_init(model, str(adapter).encode())
    adapters, scales = (c_void_p * 1)(loaded), (c_float * 1)(1.0)
    if not loaded or lib.llama_set_adapters_lora(context, adapters, 1, scales):
        raise LoraError(f"llama.cpp cannot load {adapter}", "export it again")


def _decode(
    lib: Any, context: Any, ids: Sequence[int], wanted: Container[int], shape: tuple[int, int]
) -> torch.Tensor:
    """Return the logits at the wanted places of `ids`, which begin a text of their own."""
    batch = lib.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for at, number in enumerate(ids):
            batch.token[at], batch.pos[at] = number, at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = at in wanted
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        if lib.llama_decode(context, batch):
            raise LoraError("llama.cpp could not compute a text's logits", "export it again")
        place = ctypes.cast(lib.llama_get_logits(context), POINTER(c_float))
        return torch.from_numpy(np.ctypeslib.as_array(place, shape).copy())
    finally:
        lib.llama_batch_free(batch)
