"""A GGUF file that answers, in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_cli.common import ui
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.gguf import engine, llama_api, llama_writer
from lora_cli.models import answering, chat_template, decoder


class GGUFAnswerer:
    """A GGUF file in llama.cpp, with the chat template embedded in the file."""

    def __init__(self, path: Path) -> None:
        self.model = engine.GGUFModel(path)
        self.writer = llama_writer.Writer(path)

    @property
    def chat_template(self) -> str | None:
        """That embedded in the file."""
        return self.model.chat_template

    @property
    def reads_tools(self) -> bool:
        """By the template embedded in the file."""
        return chat_template.reads_tools(self.chat_template)

    def answer(self, conversations: Sequence[Asked], sampling: Sampling) -> list[str]:
        """All as one batch."""
        return [each.text for each in self.write(conversations, sampling)]

    def write(self, conversations: Sequence[Asked], sampling: Sampling) -> list[decoder.Written]:
        """Side by side where each takes the likeliest token; else one after the other."""
        given = [self._make_prompt(asked, sampling) for asked in conversations]
        likeliest = sampling.is_greedy and self.takes_likeliest
        if len(given) > 1 and likeliest and not llama_api.find_lack():
            prompts, rooms, *_ = zip(*given)
            written = self.writer.write_likeliest(prompts, rooms)
            return [decoder.Written(*each) for each in written]
        return [decoder.Written(*self.model.write(*each)) for each in given]

    def encode(self, asked: Asked) -> list[int]:
        """Return the prompt of a conversation as token ids."""
        return self.model.encode(self.model.render(*asked))

    def read(self, ids: Sequence[int]) -> str:
        """As llama.cpp has it, without the token that ends it."""
        return self.model.detokenize(ids[:-1])

    @property
    def takes_likeliest(self) -> bool:
        """By the settings that the file brings."""
        return self.model.takes_likeliest

    @property
    def positions(self) -> int | None:
        """Those of the model, and of the context that it is opened with."""
        return min(self.model.metadata["n_ctx_train"], engine.CONTEXT)

    def stream(self, conversation: Asked, sampling: Sampling) -> str:
        """One answer, printed as it comes."""
        pieces, shown = [], ui.Answer()
        for piece in self.model.stream(*self._make_prompt(conversation, sampling)):
            shown.add(piece)
            pieces.append(piece)
        shown.end()
        return "".join(pieces)

    def _make_prompt(self, asked: Asked, sampling: Sampling) -> tuple[list[int], int, float, int]:
        """Return the prompt's tokens, how many tokens its answer may have, the temperature, and a
        seed for what is drawn, the next of torch's own, as a transformers model draws."""
        prompt = self.encode(asked)
        room = answering.limit_answer(len(prompt), self.positions, sampling.max_new_tokens)
        if sampling.is_greedy:
            return prompt, room, 0.0, 0
        return prompt, room, sampling.temperature, int(torch.randint(2**31, ()))
