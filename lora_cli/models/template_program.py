"""Compile a chat template and render conversations by it: the program that `chat_template.py` runs
in a process of its own. jinja2 and the standard library only.

The environment is that of transformers' `_compile_jinja_template`, to the letter of what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHARACTERS = 2**22
"""Longest text that a template may make of one conversation."""
SAID = 1000
"""How much of an error's text is passed on, in characters."""


class TooLong(Exception):
    """A text of more than CHARACTERS."""


def handle(shared: dict[str, Any], job: list[Any]) -> dict[str, Any]:
    """Render one conversation: `{"texts": […]}`, each a text, the length of a beginning of the
    first, or `[exception, its words]`; `{"compile": …}` where the template is none; `{"long": 1}`
    where it makes too much.

    `shared` has the `templates`, the `variables` that they know and the `day`, or None for today. A
    job names a template, and has the messages, the tools, and of each text the number of messages
    in it and whether an answer is asked for.
    """
    name, messages, tools, wanted = job
    try:
        template = compile_template(shared["templates"][name])
    except MemoryError:
        raise
    except Exception as error:  # a template is somebody's program
        return {"compile": _describe(error)}
    variables = {**template.globals, **shared["variables"], "tools": tools, "documents": None}
    if shared["day"] is not None:
        variables["strftime_now"] = date.fromisoformat(shared["day"]).strftime
    texts: list[Any] = []
    room = CHARACTERS
    for number, ask in wanted:
        given = {"messages": messages[:number], "add_generation_prompt": ask}
        try:
            made = _render(template, variables | given, room)
        except TooLong:
            return {"long": 1}
        if texts and isinstance(made, str) and isinstance(texts[0], str):
            made = len(made) if texts[0].startswith(made) else made
        room -= len(made) if isinstance(made, str) else 0
        texts.append(made)
    return {"texts": texts}


def _render(template: jinja2.Template, variables: dict[str, Any], room: int) -> Any:
    """Return a text of at most `room` characters, or `[exception, its words]`."""
    try:
        # what template.render does, but for merging its globals into the variables each time
        context = template.new_context(variables, shared=True)
        return _join(template.root_render_func(context), room)
    except (MemoryError, TooLong):
        raise
    except Exception as error:
        return _describe(error)


def _join(pieces: Iterator[str], room: int) -> str:
    kept, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > room:
            raise TooLong
        kept.append(piece)
    return "".join(kept)


def _describe(error: Exception) -> list[str]:
    try:
        said = str(error)[:SAID]
    except MemoryError:
        raise
    except Exception:  # words that a template made
        said = ""
    if isinstance(error, RecursionError):
        said = "it recurses without end"
    return [type(error).__name__, said]


@lru_cache(16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template."""
    return make_environment().from_string(source)


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which changes nothing of the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Make a call that returns what stands inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_return_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _return_body(self, caller: Any) -> str:
        return str(caller())


class TemplateDict:
    """`dict` for templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            TemplateNamespace._check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a namespace takes no attribute that begins with an underscore, such as {name!r}"
            )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """Make the environment that templates are compiled in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment
