"""Write answers as OpenAI's API does: one object, or a stream of them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from lora_cli.serve.pieces import End, Likely, Piece, Token


class Reply:
    """How one conversation's answer is written."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, num_prompt: int, tells_logprobs: bool) -> None:
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self.num_prompt, self.tells_logprobs = num_prompt, tells_logprobs

    def count(self, end: End) -> dict[str, int]:
        """Return how many tokens were read and written."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": end.num_tokens,
            "total_tokens": self.num_prompt + end.num_tokens,
        }

    def write_whole(self, tokens: Sequence[Token], end: End) -> dict[str, Any]:
        """Return the answer as one object."""
        choice = {
            "index": 0,
            **self._fill(end.text),
            "logprobs": self._tell(Piece(end.text, list(tokens))),
            "finish_reason": end.reason,
        }
        return {**self.head, "object": self.whole, "choices": [choice], "usage": self.count(end)}

    def write_part(self, content: dict[str, Any], piece: Piece | None, reason: str | None) -> bytes:
        """Return a chunk of the stream."""
        logprobs = None if piece is None else self._tell(piece)
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}
        return write_event({**self.head, "object": self.part, "choices": [choice]})

    def write_first(self) -> bytes:
        """Return what a stream begins with."""
        return self.write_part({"delta": {"role": "assistant", "content": ""}}, None, None)

    def write_piece(self, piece: Piece) -> bytes:
        """Return the chunk of a piece."""
        return self.write_part({"delta": {"content": piece.text}}, piece, None)

    def write_last(self, end: End, counts: bool) -> bytes:
        """Return what a stream ends with; `counts`: with how many tokens there were."""
        last = self.write_part(self._fill_last(), None, end.reason)
        if counts:
            usage = {"choices": [], "usage": self.count(end)}
            last += write_event({**self.head, "object": self.part, **usage})
        return last + b"data: [DONE]\n\n"

    def _fill(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _fill_last(self) -> dict[str, Any]:
        return {"delta": {}}

    def _tell(self, piece: Piece) -> dict[str, Any] | None:
        """Return the log-probabilities of a piece's tokens."""
        if not self.tells_logprobs:
            return None
        told = [
            {**_spell(token.chosen), "top_logprobs": [_spell(each) for each in token.top]}
            for token in piece.tokens
        ]
        return {"content": told, "refusal": None}


class TextReply(Reply):
    """How what a text goes on with is written."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, num_prompt: int, tells_logprobs: bool) -> None:
        super().__init__(model, num_prompt, tells_logprobs)
        self.offset = 0

    def write_first(self) -> bytes:
        """Return nothing: a text has no role."""
        return b""

    def write_piece(self, piece: Piece) -> bytes:
        """Return the chunk of a piece."""
        return self.write_part({"text": piece.text}, piece, None)

    def _fill(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _fill_last(self) -> dict[str, Any]:
        return {"text": ""}

    def _tell(self, piece: Piece) -> dict[str, Any] | None:
        if not self.tells_logprobs:
            return None
        offsets = []
        for token in piece.tokens:
            offsets.append(self.offset)
            self.offset += len(token.chosen.text)
        return {
            "tokens": [token.chosen.text for token in piece.tokens],
            "token_logprobs": [token.chosen.logprob for token in piece.tokens],
            "top_logprobs": [
                {each.text: each.logprob for each in token.top} for token in piece.tokens
            ],
            "text_offset": offsets,
        }


def _spell(token: Likely) -> dict[str, Any]:
    data = None if token.data is None else list(token.data)
    return {"token": token.text, "logprob": token.logprob, "bytes": data}


def write_event(data: Any) -> bytes:
    """Return an event of a stream (text/event-stream)."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
