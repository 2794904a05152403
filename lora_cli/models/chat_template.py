"""Render chat templates within limits of time, output and memory.

jinja's sandbox keeps them from running code of their own; it does not keep them from running for
ever. So they are compiled and rendered in a process of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, confined
from lora_cli.models.template_program import CHARACTERS

SECONDS = 2.0
"""Processor time that the conversations of one row may take to render."""
MEMORY = 2**29
"""Bytes that the process may grow by while one row is rendered."""
LONGEST = 2**20
"""Characters of a template; the longest of those that come with TRL has 18,000."""
_renderer = confined.Confined(Path(__file__).with_name("template_program.py"))


class TemplateLimit(LoraError):
    """A chat template that runs too long, or makes too much."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template {what}: it was stopped",
            "mend it, or --set model.chat_template=chatml for another",
        )


class Ask(NamedTuple):
    """A conversation, the name of the template that renders it, and what of it is wanted: so many
    of its first messages, and whether an answer is asked for."""

    template: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    wanted: list[tuple[int, bool]]


def find_template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> str | None:
    """Return the template that a conversation is rendered by: of several the one called `default`,
    or with tools `tool_use` where there is one. None where there is no such template."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return templates
    if tools is not None and "tool_use" in templates:
        return str(templates["tool_use"])
    return templates.get("default")


def reads_tools(source: str | None) -> bool:
    """Return whether a template shows the tools that may be called."""
    return "tools" in list_words(source or "")


@lru_cache(16)
def list_words(source: str) -> frozenset[str]:
    """Return the words of a template: a field or a role that is none of them it does not read."""
    return frozenset(re.findall(r"\w+", source))


def fit_roles(source: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with `system` for `developer` where a template has no such role."""
    if "developer" in list_words(source):
        return messages
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in messages
    ]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    source: str | None = None,
) -> str:
    """Render as `apply_chat_template(tokenize=False)` does, within the limits; `source` stands for
    the tokenizer's own template. Raises jinja's TemplateError where the template fails."""
    source = source or find_template(tokenizer, tools)
    assert source is not None, "whoever renders has looked for a template"
    ask = Ask("", messages, tools, [(len(messages), add_generation_prompt)])
    [[text]] = render_all({"": source}, tokenizer.special_tokens_map, [ask])
    if isinstance(text, TemplateError):
        raise text
    return text


def render_all(
    templates: Mapping[str, str],
    variables: Mapping[str, Any],
    asked: Sequence[Ask],
    day: date | None = None,
) -> list[list[str | TemplateError]]:
    """Return the texts that are wanted of each conversation, or how the template refuses one.

    `templates` by their names, `variables` that they know beside the conversation, and the `day`
    for those that write the date (default: now). Raises TemplateLimit, and TemplateError for a
    template that cannot be compiled.
    """
    for source in templates.values():
        if len(source) > LONGEST:
            raise TemplateLimit(f"has {len(source):,} characters, of at most {LONGEST:,}")
    shared = {"templates": dict(templates), "variables": dict(variables), "day": day and str(day)}
    try:
        answers = _renderer.run(confined.Budget(SECONDS, MEMORY), shared, asked)
    except confined.Stopped as stopped:
        most = {"time": f"over {SECONDS:g} s", "memory": f"over {MEMORY >> 20} MiB"}
        if stopped.why in most:
            raise TemplateLimit(f"takes {most[stopped.why]} for one conversation") from None
        raise TemplateLimit(f"ends the process that renders it ({stopped.why})") from None
    return [_read_answer(answer) for answer in answers]


def _read_answer(answer: dict[str, Any]) -> list[str | TemplateError]:
    """Return the texts of one conversation, from what `template_program.handle` says of them."""
    if "long" in answer:
        raise TemplateLimit(f"makes over {CHARACTERS:,} characters of one conversation")
    if "compile" in answer:
        raise _make_error(*answer["compile"])
    texts = answer["texts"]
    return [
        _make_error(*text)
        if isinstance(text, list)
        else texts[0][:text]
        if isinstance(text, int)
        else text
        for text in texts
    ]


def _make_error(kind: str, said: str) -> TemplateError:
    return TemplateError(said or kind)
