"""`lora chat`: a conversation with one model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from lora_cli.common import LoraError, UsageError, quote, ui
from lora_cli.evaluate.answerers import Answerer, Asked, Messages, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.models import answering

COMMAND = re.compile(r"/\w+|/\?")
"""A line that is meant for the program, and not for the model."""


def chat(
    path: str, system: str | None, max_new_tokens: int, temperature: float, base: str | None
) -> None:
    """Read lines from stdin, stream answers to stdout; the conversation so far is given back each
    time. Raises LoraError for a model that holds none."""
    answerer = open_models([path], base)[path]
    if answerer.chat_template is None:
        raise LoraError(
            f"{path} has no chat template: it cannot hold a conversation",
            f"lora generate {quote(path)} --prompt TEXT",
        )
    opening = [{"role": "system", "content": system}] if system else []
    messages: Messages = list(opening)
    ui.say(f"{path}: /reset starts over, /quit leaves")
    for line in _read_lines():
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
        elif COMMAND.fullmatch(line):
            ui.say(f"  {line} is no command, and was not sent: /reset starts over, /quit leaves")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            sampling = Sampling(max_new_tokens, temperature)
            messages = _answer(answerer, asked, len(opening), sampling) or messages


def _answer(
    answerer: Answerer, messages: Messages, first: int, sampling: Sampling
) -> Messages | None:
    """Stream the answer to the conversation, whose turns begin at `first`, and return it with that
    answer. Where it is longer than the model reads, its oldest question and answer are taken out of
    it, which is said; where the last message alone is longer, that is said to a person, who gets
    None and goes on, and else raised as TooLongError."""
    while True:
        try:
            answer = answerer.stream(Asked(messages), sampling)
        except answering.TooLongError as error:
            if len(messages) < first + 3:
                if not sys.stdin.isatty():
                    raise
                ui.warn(f"it was not sent, and what was left out is there again: {error.message}")
                return None
            messages = [*messages[:first], *messages[first + 2 :]]
            ui.warn(f"the oldest question and answer are left out: {error.message}")
        else:
            return [*messages, {"role": "assistant", "content": answer}]


def _read_lines() -> Iterator[str]:
    """Yield the lines of stdin, with a prompt on stderr where a person types them."""
    if sys.stdin is None:
        raise UsageError("there is no input to read", "lora generate PATH --prompt TEXT")
    asking = sys.stdin.isatty()
    while True:
        if asking:
            ui.ask()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
