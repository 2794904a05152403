"""Compile chat templates, and render them within limits of time, output and memory.

jinja's sandbox keeps them from running code of their own; it does not keep them from running for
ever.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import psutil
from jinja2 import Template
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lora_cli.common import LoraError

SECONDS = 2.0
"""Processor time that the conversations of one row may take to render."""
CHARACTERS = 2**25
"""Longest text that a template may make of one conversation, and longest that it may multiply a
text or list to."""
MEMORY = 2**30
"""Bytes that the process may grow by while one row is rendered."""
LOOK = 0.1
"""Seconds between two looks at time and memory."""


class TemplateLimit(LoraError):
    """A chat template that runs too long, or makes too much."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template {what}: it was stopped",
            "mend it, or --set model.chat_template=chatml for another",
        )


@lru_cache(16)
def compile_template(source: str) -> Template:
    """Compile the template in transformers' own environment, with a limit on the size of
    products."""
    environment = _compile_jinja_template("").environment.overlay()
    environment.intercepted_binops = frozenset(["*", "**"])
    environment.call_binop = _limit_product
    return environment.from_string(source)


def _limit_product(context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "**":
        if (
            isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > CHARACTERS
        ):
            raise TemplateLimit("takes a power of thousands of digits")
        return left**right
    for many, times in ((left, right), (right, left)):
        if (
            isinstance(many, (str, list, tuple))
            and isinstance(times, int)
            and len(many) * times > CHARACTERS
        ):
            raise TemplateLimit(f"multiplies a text to over {CHARACTERS:,} characters")
    return left * right


def find_template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> str | None:
    """Return the template that a conversation is rendered by: of several the one called `default`,
    or with tools `tool_use` where there is one. None where there is no such template."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return templates
    if tools is not None and "tool_use" in templates:
        return str(templates["tool_use"])
    return templates.get("default")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    source: str | None = None,
) -> str:
    """Render as `apply_chat_template(tokenize=False)` does, within the limits; `source` stands for
    the tokenizer's own template."""
    source = source or find_template(tokenizer, tools)
    assert source is not None, "whoever renders has looked for a template"
    template = compile_template(source)
    given = {
        **template.globals,
        **tokenizer.special_tokens_map,
        "messages": messages,
        "tools": tools,
    }
    given |= {"documents": None, "add_generation_prompt": add_generation_prompt}
    with Limits() as limits:
        limits.begin()
        return join_output(template.root_render_func(template.new_context(given, shared=True)))


def join_output(pieces: Iterator[str]) -> str:
    """Join the pieces that a template yields. Raises TemplateLimit where they exceed CHARACTERS."""
    kept, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > CHARACTERS:
            raise TemplateLimit(f"makes over {CHARACTERS:,} characters of one conversation")
        kept.append(piece)
    return "".join(kept)


class Limits:
    """While open, what happens after each `begin` is stopped with TemplateLimit once it takes too
    much time or memory.

    Python looks at signals in its main thread alone: in others, and on systems without timers,
    nothing is stopped.
    """

    def __enter__(self) -> Limits:
        self.works = (
            hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        )
        if self.works:
            self.before = signal.signal(signal.SIGALRM, self._look)
        return self

    def begin(self) -> None:
        """Start counting time and memory."""
        if self.works:
            self.began, self.memory = time.thread_time(), 0
            signal.setitimer(signal.ITIMER_REAL, LOOK)

    def __exit__(self, *_: object) -> None:
        if self.works:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            finally:
                signal.signal(signal.SIGALRM, self.before)

    def _look(self, *_: object) -> None:
        """Check this thread's processor time (not the clock: the machine may have been asleep or
        busy) and memory."""
        now = psutil.Process().memory_info().rss
        self.memory = self.memory or now
        if time.thread_time() - self.began > SECONDS:
            raise TemplateLimit(f"takes over {SECONDS:g} s for one conversation")
        if now - self.memory > MEMORY:
            raise TemplateLimit(f"takes over {MEMORY >> 20} MiB for one conversation")
        signal.setitimer(signal.ITIMER_REAL, LOOK)  # last: nothing may come after what was raised
