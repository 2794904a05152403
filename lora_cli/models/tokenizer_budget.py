"""Refuse, before a library reads it, a tokenizer of so many added tokens that it would take long.

transformers looks for each named special token in a list of all added tokens, and compares one that
is not there with each of them once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.hub import cached_file

from lora_cli.common import LoraError, files

SECONDS = 8.0
"""What the tokens of a tokenizer may take a command. Voice models add 65,538: 6.9 s."""
EACH = 105e-6
"""Seconds for `train`, the slowest command, to read, write and look at an added token."""
FOUND, MISSED, AGAIN = 8e-9, 0.7e-6, 0.1e-6
"""Seconds for a named token beside an added one, where it is one of them and where it is not, and
for two named ones that are not."""
LISTS = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")


class Count(NamedTuple):
    """How many tokens a tokenizer's files add to its vocabulary, name as special, and name although
    they do not add them."""

    added: int
    named: int
    new: int

    @property
    def seconds(self) -> float:
        """What they take."""
        each = EACH + FOUND * self.named + MISSED * self.new
        return self.added * each + AGAIN * self.new * self.new


def refuse_excess(name: str, revision: str | None, settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise LoraError where the tokens of `name` take more than SECONDS. `settings`: what its
    `settings.TOKENIZER_SETTINGS` hold."""
    *named, legacy = settings
    given = {content for each in named for content in _walk_named(each)}
    added = {*_walk_contents(settings[0].get("added_tokens_decoder")), *legacy}
    path = cached_file(
        name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    text = b"" if path is None else Path(path).read_bytes()
    # a token is a mapping; a vocabulary's own tokens have few braces
    most = len(added) + text.count(b"{")
    if Count(most, len(given), len(given)).seconds <= SECONDS:
        return
    whole = files.parse_json(text, path) if path else {}
    added |= set(_walk_contents(whole.get("added_tokens") if isinstance(whole, dict) else None))
    count = Count(len(added), len(given), len(given - added))
    if count.seconds > SECONDS:
        raise LoraError(
            f"the tokenizer of {name} has {count.added:,} added tokens, and names {count.new:,} "
            f"that are not among them: they would take {count.seconds:.0f} s, and at most "
            f"{SECONDS:.0f} s is allowed",
            "copy it again: known models have at most 66,000, and name none but these",
        )


def _walk_named(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the contents of the tokens that settings name as special."""
    yield from _walk_contents([value for key, value in given.items() if key.endswith("_token")])
    for key in LISTS:
        yield from _walk_contents(given.get(key))


def _walk_contents(tokens: Any) -> Iterator[str]:
    """Yield the contents of a list or mapping of tokens."""
    each: Iterable[Any] = tokens.values() if isinstance(tokens, dict) else tokens
    for token in each if isinstance(tokens, (dict, list)) else ():
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content
