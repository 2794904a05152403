"""Write answers in llama.cpp, of many conversations side by side: the weights are read once for a
token of each, which is most of the work of a token.

The server does so as well, and there an answer depends on which questions happen to wait at the
same moment. Here it depends on the batch alone: the same batch gets the same answers. Keys and
values are kept as the server keeps them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_cli.common import LoraError
from lora_cli.gguf import engine, llama_api, opening
from lora_cli.gguf.llama_api import Step, count_shared

CELLS = 8192
"""Tokens whose keys and values are kept at once: twice what the server is opened for, 1 GB of
float16 in a model of 8B."""
BLOCK = 256
"""llama.cpp gives a text room for a multiple of so many tokens."""
SIDE_BY_SIDE = 64
"""The most texts of one batch: llama.cpp counts to 256."""


class Answer(NamedTuple):
    """What was written after a prompt."""

    text: str
    ended: bool
    """Whether it ended by itself, and not for want of room."""


class Writer:
    """A GGUF file that writes; it is loaded at its first batch, and held until this is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model: Any = None
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)

    def write_likeliest(
        self, prompts: Sequence[Sequence[int]], rooms: Sequence[int]
    ) -> list[Answer]:
        """Return the answer to each prompt (token ids): the likeliest token each time, up to one
        that ends it or to as many as it has room for.

        Raises LoraError where llama.cpp cannot load or compute the file, or what it computes is not
        finite.
        """
        longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        each = -(-longest // BLOCK) * BLOCK
        size = max(1, min(CELLS // each, SIDE_BY_SIDE, len(prompts)))
        settings = llama_api.load_api().llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = size * each, size
        settings.n_batch = max(*map(len, prompts), size)
        settings.n_ubatch = min(settings.n_batch, settings.n_ubatch)
        if self._model is None:
            opening.refuse_unopenable(self.path, engine.CONTEXT, False)
            self._model = self._held.enter_context(llama_api.load_model(self.path))
        found: list[Answer] = []
        with llama_api.open_context(self._model, settings, size * longest) as opened:
            for start in range(0, len(prompts), size):
                some = slice(start, start + size)
                found += _write_batch(opened, prompts[some], rooms[some])
        return found


def _write_batch(
    opened: llama_api.Opened, prompts: Sequence[Sequence[int]], rooms: Sequence[int]
) -> Iterator[Answer]:
    """Yield the answers to prompts whose answers are written side by side."""
    chosen = _read_prompts(opened, prompts)
    written: list[list[int]] = [[] for _ in prompts]
    ended = set()
    while chosen:
        ended |= {number for number, token in chosen.items() if opened.ends_answer(token)}
        for number, token in chosen.items():
            if number not in ended:
                written[number].append(token)
        steps = [
            Step(token, len(prompts[number]) + len(written[number]) - 1, number, True)
            for number, token in chosen.items()
            if number not in ended and len(written[number]) < rooms[number]
        ]
        texts = [step.text for step in steps]
        chosen = dict(zip(texts, _choose(opened.decode(steps)), strict=True)) if steps else {}
    for number, ids in enumerate(written):
        yield Answer(opened.read(ids), number in ended)


def _read_prompts(opened: llama_api.Opened, prompts: Sequence[Sequence[int]]) -> dict[int, int]:
    """Read each prompt by itself, but for the tokens with which all begin, which are read once;
    return the first token of each answer."""
    opened.forget()
    shared = count_shared(prompts, min(map(len, prompts)) - 1)
    if shared:
        opened.decode([Step(token, at, 0, False) for at, token in enumerate(prompts[0][:shared])])
        for number in range(1, len(prompts)):
            opened.copy_text(0, number)
    chosen = {}
    for number, prompt in enumerate(prompts):
        last = len(prompt) - 1
        steps = [Step(prompt[at], at, number, at == last) for at in range(shared, len(prompt))]
        chosen[number] = _choose(opened.decode(steps))[0]
    return chosen


def _choose(logits: np.ndarray) -> list[int]:
    """Return the likeliest token of each row of logits (rows, vocabulary)."""
    if not np.isfinite(logits.max(axis=1)).all():
        raise LoraError("llama.cpp's logits are not finite", "export it again")
    return logits.argmax(axis=1).tolist()
