"""Read what is asked, from the body of a request: checked, and refused where it would be ignored.

The fields are those of OpenAI's API reference, POST /v1/chat/completions and /v1/completions. What
changes an answer and is not done here is a 400; what changes none is taken and left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lora_cli.common import find_nearest
from lora_cli.data import formats
from lora_cli.evaluate import answerers
from lora_cli.serve.errors import refuse
from lora_cli.serve.pieces import Drawing

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
    "web_search_options": (),
}
"""Fields that are taken with the values that change nothing, null among them."""
LEFT_ALONE = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""Fields that change no answer."""
STOPS = 4
PROMPT = "a prompt is a text, or a list of token ids"
Count = Annotated[int, Field(ge=1)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    Field(max_length=STOPS),
]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Fields(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None


class ChatFields(Fields):
    """What a conversation is asked with."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class CompletionFields(Fields):
    """What a text is gone on with."""

    prompt: str | Annotated[list[Any], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Wanted(NamedTuple):
    """What is to be answered, by which model, and how."""

    model: str
    prompt: answerers.Messages | str | list[int]
    tools: list[Any] | None
    drawing: Drawing
    streams: bool
    counts: bool
    """Whether the end of a stream tells how many tokens there were."""

    @property
    def field(self) -> str:
        """The field that its prompt came in."""
        has_turns = isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)
        return "messages" if has_turns else "prompt"


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises ApiError."""
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
        # halves of characters are no text that a tokenizer reads
        json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise refuse("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        said = "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        raise refuse(f"the body is not JSON: {said}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise refuse("the body is not a JSON object", code="invalid_json")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_chat(data: Mapping[str, Any], most: int) -> Wanted:
    """Read a conversation that waits for an answer of `most` tokens at most. Raises ApiError."""
    fields = _read(ChatFields, data)
    assert isinstance(fields, ChatFields)
    limits = {fields.max_tokens, fields.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise refuse("max_tokens and max_completion_tokens differ", "max_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise refuse("top_logprobs needs logprobs: true", "top_logprobs")
    top = (fields.top_logprobs or 0) if fields.logprobs else None
    tools = _choose_tools(fields)
    return _make_wanted(fields, fields.messages, tools, top, min([most, *filter(None, limits)]))


def read_completion(data: Mapping[str, Any], most: int) -> Wanted:
    """Read a text, or token ids, to go on with. Raises ApiError."""
    fields = _read(CompletionFields, data)
    assert isinstance(fields, CompletionFields)
    prompt = fields.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise refuse("one prompt a request", "prompt", "unsupported_value")
        prompt = prompt[0]
    if isinstance(prompt, list) and not all(type(each) is int for each in prompt):
        raise refuse(PROMPT, "prompt")
    if not prompt:
        raise refuse("the prompt is empty", "prompt")
    limit = 16 if fields.max_tokens is None else fields.max_tokens  # as in OpenAI's
    return _make_wanted(fields, prompt, None, fields.logprobs, min(most, limit))


def _read(model: type[Fields], data: Mapping[str, Any]) -> Fields:
    """Return the fields checked. Raises ApiError."""
    for name, value in data.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            given = ", ".join(json.dumps(each) for each in (*NEUTRAL[name], None))
            raise refuse(
                f"{name} is not supported here but for {given}", name, "unsupported_parameter"
            )
    known = model.model_fields.keys() | NEUTRAL.keys() | LEFT_ALONE
    for name in data.keys() - known:
        guess = find_nearest(name, known)
        meant = f"; did you mean {guess}?" if guess else ""
        raise refuse(f"{name[:80]} is not known here{meant}", name[:80], "unknown_parameter")
    try:
        return model.model_validate({key: data[key] for key in model.model_fields if key in data})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"][0] == "prompt" and first["type"] != "missing":
            raise refuse(PROMPT, "prompt") from None  # pydantic tells of one of the two kinds
        place = ".".join(str(each) for each in first["loc"] if not str(each).endswith("]"))
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        raise refuse(f"{place}: {first['msg']}", place, code) from None


def _choose_tools(fields: ChatFields) -> list[Any] | None:
    """Return the tools that the template shows. Raises ApiError for a choice that only the decoding
    could keep to."""
    choice = fields.tool_choice
    if choice not in (None, "auto", "none"):
        raise refuse(
            "tool_choice can be auto or none: no call is forced", "tool_choice", "unsupported_value"
        )
    return fields.tools if fields.tools and choice != "none" else None


def _make_wanted(
    fields: Fields, prompt: Any, tools: list[Any] | None, top: int | None, limit: int
) -> Wanted:
    if fields.stream_options and not fields.stream:
        raise refuse("stream_options needs stream: true", "stream_options")
    drawing = Drawing(
        limit,
        1.0 if fields.temperature is None else fields.temperature,
        1.0 if fields.top_p is None else fields.top_p,
        fields.seed,
        tuple(fields.stop or ()),
        top,
    )
    counts = bool(fields.stream_options and fields.stream_options.include_usage)
    return Wanted(fields.model, prompt, tools, drawing, bool(fields.stream), counts)


def convert_messages(wanted: Wanted) -> answerers.Asked:
    """Return the conversation as training's rows are read: contents as texts, calls' arguments as
    mappings. Raises ApiError."""
    messages = wanted.prompt
    assert isinstance(messages, list), "a conversation"
    turns: list[Any] = [*messages, {"role": "assistant", "content": "?"}]
    if turns[-2].get("role") == "assistant":
        raise refuse("the last message is the assistant's: there is nothing to answer", "messages")
    try:
        row = {"messages": turns, "tools": wanted.tools}
        found = formats.find_converter("messages")(row)
    except formats.BadRow as bad:
        raise refuse(f"messages: {bad.said}", "messages") from None
    return answerers.Asked(found.messages[:-1], found.tools)
