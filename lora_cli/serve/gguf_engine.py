"""Answers of a GGUF file, by llama.cpp's own server inside this process (xllamacpp's).

That server listens on a free port of 127.0.0.1 with a key that nobody else has; ours stands before
it. Its own listener has no limit of a body's size, allows every origin and tells of slots; and its
prompt cache makes a second answer of other sums than the first, so each prompt is computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from lora_cli.evaluate import answerers
from lora_cli.gguf import engine
from lora_cli.models import answering, chat_template
from lora_cli.serve.pieces import Drawing, Emit, End, Likely, Piece, Token


class GGUFEngine:
    """One GGUF file, under one name."""

    def __init__(self, name: str, model: engine.GGUFModel, context: int) -> None:
        self.name, self.model, self.context = name, model, context

    def get_template(self, name: str) -> str | None:
        """Return the template embedded in the file."""
        return self.model.chat_template

    def reads_tools(self, name: str) -> bool:
        """Return whether the template shows tools."""
        return chat_template.reads_tools(self.model.chat_template)

    def find_positions(self, name: str) -> int | None:
        """Return how many tokens prompt and answer may have together."""
        return min(int(self.model.metadata["n_ctx_train"]), self.context)

    def measure_longest_token(self, name: str) -> int:
        """Return more characters than any token has."""
        return 256

    def render(self, name: str, asked: answerers.Asked) -> list[int]:
        """Return the prompt of a conversation, as token ids."""
        return self.model.encode(self.model.render(*asked))

    def tokenize(self, name: str, text: str) -> list[int]:
        """Return a text as token ids, with what the file says comes before it."""
        return self.model.encode(text)

    def count_tokens(self, name: str) -> int:
        """Return how many token ids there are."""
        return int(self.model.metadata["n_vocab"])

    def write(
        self,
        name: str,
        prompt: list[int],
        drawing: Drawing,
        emit: Emit,
        is_wanted: Callable[[], bool],
    ) -> End:
        """Write the answer to a prompt, a piece at a time. Raises TooLongError."""
        room = answering.limit_answer(len(prompt), self.find_positions(name), drawing.max_tokens)
        num_tokens, reason, text = 0, "length", ""
        with closing(self.model.write_pieces(prompt, _make_body(drawing, room))) as pieces:
            for piece in pieces:
                tokens = _read_tokens(piece, drawing.top_logprobs)
                if piece.get("content") or tokens:
                    text += piece.get("content", "")
                    emit(Piece(piece.get("content", ""), tokens))
                if piece.get("stop"):
                    num_tokens = int(piece["tokens_predicted"])
                    reason = "length" if piece["stop_type"] == "limit" else "stop"
                if not is_wanted():
                    break
        return End(reason, num_tokens, text)


def _make_body(drawing: Drawing, room: int) -> dict[str, Any]:
    """Return what llama.cpp is asked; of its samplers temperature and top_p alone."""
    sampling = answerers.Sampling(room, drawing.temperature)
    body: dict[str, Any] = {
        "n_predict": room,
        "temperature": 0.0 if sampling.is_greedy else drawing.temperature,
        "stop": list(drawing.stop),
        "cache_prompt": False,
    }
    if not sampling.is_greedy:
        body |= {"samplers": ["temperature", "top_p"], "top_p": drawing.top_p}
        body |= {"seed": -1 if drawing.seed is None else drawing.seed % (2**32 - 1)}
    if drawing.top_logprobs is not None:
        body["n_probs"] = max(drawing.top_logprobs, 1)
    return body


def _read_tokens(piece: Mapping[str, Any], wanted: int | None) -> list[Token]:
    if wanted is None:
        return []
    return [
        Token(_read_likely(each), [_read_likely(other) for other in each["top_logprobs"][:wanted]])
        for each in piece.get("completion_probabilities", ())
        if each["token"] or each["bytes"]  # the one that ends an answer has neither
    ]


def _read_likely(given: Mapping[str, Any]) -> Likely:
    return Likely(given["token"], float(given["logprob"]), bytes(given["bytes"]))
