"""Find where each token begins and ends in a text, from the tokens' lengths where that works."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

NDArray = np.ndarray[Any, Any]
FAR = 2**40
"""The length of what stands for any text, so that no sum of lengths is a text's."""


class OffsetFinder:
    """Finds the offsets of one tokenizer's tokens.

    The tokenizer can give them itself, but then takes half again as long. Where it leaves the text
    as it is, the tokens' own lengths in bytes add up to the text, and so give the offsets: not of
    WordPiece, whose words may by chance have as many marks (##) as there are blanks between them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.lengths = _measure_tokens(tokenizer)

    def find(self, text: str, ids: NDArray) -> tuple[NDArray, NDArray]:
        """Return where each token of `ids` begins and ends in `text`, in characters."""
        normalizer = self.backend.normalizer
        if normalizer is None or normalizer.normalize_str(text) == text:
            ends = self.lengths[ids].cumsum()
            size = int(ends[-1]) if len(ends) else 0
            if size and text.isascii() and size == len(text):
                return ends - self.lengths[ids], ends
            if size and not text.isascii() and size == len(raw := text.encode()):
                return _convert_to_characters(raw, ends)
        encoding = self.backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return offsets[:, 0], offsets[:, 1]


def _convert_to_characters(raw: bytes, ends: NDArray) -> tuple[NDArray, NDArray]:
    """Return where tokens that end at these bytes of UTF-8 begin and end, in characters.

    As the tokenizer counts, a token that ends inside a character ends with that character, and one
    that begins inside a character begins with it.
    """
    first_bytes = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80  # others continue a character
    characters = np.concatenate([[0], np.cumsum(first_bytes)])  # begun within so many bytes
    starts = np.concatenate([[0], characters[ends[:-1] + 1] - 1])
    return starts, characters[ends]


def _measure_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray:
    """Return how many bytes of text each token stands for; 0 where no sum of them tells.

    A token of a byte-level vocabulary has one letter for each byte. One of SentencePiece's is the
    text itself with ▁ for spaces, or a single byte (`<0x0A>`).
    """
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    lengths = np.zeros(count_ids(tokenizer), np.int64)
    if "WordPiece" in str(tokenizer.backend_tokenizer.decoder):
        return lengths
    for token, number in tokenizer.get_vocab().items():
        if byte_level:
            lengths[number] = len(token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("▁", " ").encode())
    for number, added in tokenizer.added_tokens_decoder.items():
        lengths[number] = len(added.content.encode())
    if not byte_level and tokenizer.unk_token_id is not None:
        lengths[tokenizer.unk_token_id] = FAR
    return lengths


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number over all ids of a tokenizer: more than it has tokens where its numbers have
    gaps, as in vocabularies that were trimmed."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
