"""Turn a row into a conversation, a text or tokens; its format is told by its columns, whatever
file it came from."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.common import escape, find_nearest, quote
from lora_cli.data.json_text import RepeatedKey, parse
from lora_cli.recipe import strict_yaml

# The columns each format needs, most specific first. Further ones: alpaca `input`; `system`;
# `tools`; `labels`.
FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
Formats = Mapping[str, tuple[str, ...]]
ColumnSets = Sequence[dict[str, str]]
# Columns under other names: ours -> theirs. The first set that is there whole is taken.
COLUMN_SETS: ColumnSets = (
    {"instruction": "instruction", "input": "context", "output": "response"},  # Dolly
    {"system": "system_prompt", "prompt": "question", "completion": "response"},  # OpenOrca
    {"instruction": "instruction", "input": "input", "output": "response"},
    {"instruction": "instruction", "output": "response"},
    {"instruction": "instruction", "output": "completion"},
    {"instruction": "instruction", "output": "answer"},
    {"prompt": "question", "completion": "answer"},  # GSM8K
    {"prompt": "question", "completion": "response"},
    {"prompt": "query", "completion": "response"},  # MetaMathQA
    {"prompt": "query", "completion": "answer"},
    {"prompt": "problem", "completion": "solution"},  # MATH, NuminaMath
    {"prompt": "prompt", "completion": "response"},
    {"prompt": "prompt", "completion": "answer"},
    {"prompt": "input", "completion": "output"},
    {"messages": "conversation"},
    {"messages": "dialogue"},
)
ROLES = ("system", "developer", "user", "assistant", "tool")
FIRST = ("system", "developer")
"""Roles of a message that comes before the conversation."""
# ShareGPT's names of the speakers, as its data sets spell them
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "function": "tool",
}
OURS = {"role", "content", "train", "weight", "tool_calls", "function_call"}
"""Keys of a message that are made into something else, or have their own checks."""
SKIP = "--set data.on_bad_row=skip"
MEND = f"mend or remove the row, or {SKIP}"


class BadRow(Exception):
    """A row that cannot be used: `kind` is what such rows are counted by, `said` what is wrong with
    this one."""

    def __init__(self, kind: str, said: str | None = None, hint: str = MEND) -> None:
        super().__init__(said or kind)
        self.kind, self.said, self.hint = kind, said or kind, hint


def refuse_repeated(repeated: RepeatedKey) -> BadRow:
    """Return a row whose JSON gives a key two values, of which one would be lost, as a bad one."""
    said = f"{escape(repeated.key)} is given twice, with two values"
    return BadRow("a key is given twice", said, f"leave one of the two out, or {SKIP}")


def parse_json(text: str) -> Any:
    """Return the value of a text inside a row that is JSON. Raises BadRow for a key with two
    values, ValueError or RecursionError for what is no JSON."""
    try:
        return parse(text)
    except RepeatedKey as repeated:
        raise refuse_repeated(repeated) from None


class Conversation(NamedTuple):
    """Turns as chat templates take them, the tools they may call, and whether each turn may carry
    loss."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    trained: list[bool]


class Preference(NamedTuple):
    """Two conversations that end differently, of which the first is the better one; only answers
    after what they have in common carry loss."""

    chosen: Conversation
    rejected: Conversation


class Unpaired(NamedTuple):
    """A conversation whose last answer carries loss, and whether that answer is wanted."""

    answer: Conversation
    desirable: bool


class Tokens(NamedTuple):
    """A row that is tokenised already; `labels` are -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


Converter = Callable[[Mapping[str, Any]], Any]
"""Makes a row, its columns under our names, what an encoder takes; raises BadRow."""


def recognise_format(columns: Iterable[str], known: Formats = FORMATS) -> str | None:
    """Return the first of the `known` formats whose columns are all there, or None."""
    there = set(columns)
    return next((style for style, needed in known.items() if there.issuperset(needed)), None)


def guess_columns(
    columns: Iterable[str], known: Formats = FORMATS, sets: ColumnSets = COLUMN_SETS
) -> dict[str, str]:
    """Return which columns hold what a known format needs, as `ours: theirs`; empty where the
    columns are a format's own, or none of the known `sets`."""
    there = list(columns)
    if recognise_format(there, known):
        return {}
    found = (_match_set(names, there) for names in sets)
    return next(filter(None, found), {})


def _match_set(names: Mapping[str, str], there: Sequence[str]) -> dict[str, str]:
    """Return a set of columns as it is there, or nothing. `translation.*` is what is next in a
    column of mappings, if these have no more than the set asks for."""
    found = dict(names)
    for inside in {name for name in names.values() if name.endswith(".*")}:
        asking = [ours for ours, theirs in names.items() if theirs == inside]
        nested = [name for name in there if name.startswith(inside[:-1])]
        if len(nested) == len(asking):
            found.update(zip(asking, nested))
    return found if set(there).issuperset(found.values()) else {}


TRANSLATION = "translation"
"""The column in which data sets of translations have a text by each language."""


def list_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the columns of rows, in order; in the place of translations each language, such as
    `translation.de`."""
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            inside = value if name == TRANSLATION and isinstance(value, Mapping) else ()
            names |= dict.fromkeys([f"{name}.{each}" for each in inside] or [name])
    return list(names)


def is_column(name: str, columns: Sequence[str]) -> bool:
    """Return whether a name is one of the columns, or leads into one by a dot."""
    return name in columns or ("." in name and name.partition(".")[0] in columns)


def name_columns(columns: Sequence[str], names: Mapping[Any, str]) -> list[str]:
    """Return what columns are called once they are renamed by `names` (ours: theirs), which may
    lead into them."""
    renamed = {name.partition(".")[0] for name in names.values()} | {*names, *names.values()}
    return [*(name for name in columns if name not in renamed), *names]


def _read_inside(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return `{"": value}` of a column, or of the place in it that a name with dots leads to;
    nothing where the row has none."""
    if name in row:
        return {"": row[name]}
    first, _, inside = name.partition(".")
    return _read_inside(row[first], inside) if isinstance(row.get(first), Mapping) else {}


def rename_columns(row: Mapping[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    """Return the row under our column names (`columns` is ours: theirs).

    A column of theirs that already has one of our names is left out.
    """
    theirs = set(columns.values())
    kept = {
        name: value for name, value in row.items() if name not in theirs and name not in columns
    }
    found = {ours: _read_inside(row, name) for ours, name in columns.items()}
    return kept | {ours: value[""] for ours, value in found.items() if value}


def suggest_columns(**columns: str) -> str:
    """Return the option that names columns of theirs by our names."""
    named = ", ".join(f"{ours}: {_spell(theirs)}" for ours, theirs in columns.items())
    return f"--set data.columns={quote(f'{{{named}}}')}"


def _spell(name: str) -> str:
    """Return a name as it is written in YAML: `null`, for one, in quotation marks."""
    plain = re.fullmatch(r"[A-Za-z_]\w*", name) and strict_yaml.spell(name) == name
    return name if plain else json.dumps(name, ensure_ascii=False)


def find_converter(style: str, alpaca_prompt: bool = False) -> Converter:
    """Return the function that makes a row of format `style` a Conversation, Tokens or text; it
    raises BadRow.

    `alpaca_prompt` says that the chat template has Alpaca's own place for a row's `input`.
    """
    converters: dict[str, Converter] = {
        "tokens": _convert_tokens,
        "messages": lambda row: _make_conversation(get_list(row, "messages"), row),
        "sharegpt": lambda row: _make_conversation(
            [_convert_sharegpt_turn(turn) for turn in get_list(row, "conversations")], row
        ),
        "alpaca": lambda row: _convert_alpaca(row, alpaca_prompt),
        "prompt_completion": _convert_prompt_completion,
        "text": lambda row: get_filled_text(row, "text"),
        "preference": convert_preference,
        "unpaired": lambda row: convert_unpaired(row, alpaca_prompt),
    }

    def convert(row: Mapping[str, Any]) -> Any:
        _refuse_media(row)
        return converters[style](row)

    return convert


MEDIA = ("image", "video", "audio")
"""Columns, also in the plural, of what texts with a mark such as `<image>` speak of: LLaVA's and
LLaMA-Factory's."""


def _refuse_media(row: Mapping[str, Any]) -> None:
    """Raise BadRow for a row of more than texts, whose texts alone would be learnt."""
    for name in MEDIA:
        many, one = row.get(f"{name}s"), row.get(name)
        others = (str(value) for key, value in row.items() if key != name)
        is_shown = isinstance(many, list) and any(many)
        if is_shown or (one and any(f"<{name}>" in text for text in others)):
            said = f"the row has {name}s beside its text, and only text is trained on"
            raise BadRow(f"a row has {name}s", said)


def uses_alpaca(template: str | None) -> bool:
    """Return whether the chat template has Alpaca's own place for a row's `input`."""
    return "### Input:" in (template or "")


# Values -------------------------------------------------------------------------------------------

_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


def get_value(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value; raise BadRow where the row does not have the column."""
    if column not in row:
        guess = find_nearest(column, row)
        there = ", ".join(row) or "none"
        named = quote(f"data.columns={{{column}: {_spell(guess or '')}}}")
        hint = f"did you mean {guess}? --set {named}" if guess else MEND
        raise BadRow(
            f"there is no {column}", f"there is no {column}; the columns are {there}", hint
        )
    return row[column]


def get_text(row: Mapping[str, Any], column: str, name: str | None = None) -> str:
    """Return a column's text; raise BadRow, calling it `name`, where it is not text."""
    value, name = get_value(row, column), name or column
    if not isinstance(value, str):
        kind = _NAMES.get(type(value), type(value).__name__)
        shown = (
            ""
            if value is None or isinstance(value, bool)
            else f" ({json.dumps(value, default=str)[:40]})"
        )
        raise BadRow(f"{name} is {kind}", f"{name} is {kind}{shown}, but must be text")
    return value


def get_filled_text(row: Mapping[str, Any], column: str, name: str | None = None) -> str:
    """Return a column's text; raise BadRow where it is empty as well."""
    text = get_text(row, column, name)
    if not text.strip():
        raise BadRow(f"{name or column} is empty")
    return text


def get_list(row: Mapping[str, Any], column: str) -> list[Any]:
    """Return a column's list, which may be written as JSON; raise BadRow where it is not a list or
    is empty."""
    value = get_value(row, column)
    if isinstance(value, str):  # some data sets keep their lists as JSON
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{column} is text", f"{column} is text, but must be a list") from None
    if not isinstance(value, list):
        kind = _NAMES.get(type(value), type(value).__name__)
        raise BadRow(f"{column} is {kind}", f"{column} is {kind}, but must be a list")
    if not value:
        raise BadRow(f"{column} is empty")
    return value


# Formats ------------------------------------------------------------------------------------------


def _convert_alpaca(row: Mapping[str, Any], alpaca_prompt: bool) -> Conversation:
    """Return an instruction with its output as a conversation of two turns."""
    question = get_filled_text(row, "instruction")
    if row.get("input"):
        question += ("\n\n### Input:\n" if alpaca_prompt else "\n\n") + get_text(row, "input")
    return _make_two_turns(question, get_filled_text(row, "output"), row)


def _convert_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """Return a prompt and completion, texts or turns, as a conversation whose completion alone
    carries loss."""
    prompt, completion = get_value(row, "prompt"), get_value(row, "completion")
    is_told = isinstance(completion, list) or _is_turn(completion)
    if not (is_told or isinstance(prompt, list)):
        asked = get_filled_text(row, "prompt")
        return _make_two_turns(asked, get_filled_text(row, "completion"), row)
    if not (is_told or isinstance(completion, str)):
        raise BadRow("prompt is a list, and completion is neither text nor a list")
    turns, asked_turns = _join_prompt(row, _list_turns(row, "completion"))
    made = _make_conversation(turns, row)
    earlier = len(made.messages) - len(turns) + asked_turns
    return made._replace(trained=[False] * earlier + made.trained[earlier:])


def _make_two_turns(question: str, answer: str, row: Mapping[str, Any]) -> Conversation:
    """Return a question and its answer as a conversation, after the row's system message."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    system = _get_system(row)
    return Conversation([*system, *messages], _get_tools(row), [False] * (len(system) + 1) + [True])


ANSWERS = ("chosen", "rejected")
PROMPTS = ("question", "instruction", "input", "query", "problem", "conversations")
"""Other names of the column prompt, beside chosen and rejected."""


def convert_preference(row: Mapping[str, Any]) -> Preference:
    """Return a row with the columns chosen and rejected as two conversations.

    With a prompt, a text or a list of turns, they are what follows it, a text, a turn or a list of
    turns; else, or where they repeat it, whole conversations that have their beginning in common.
    """
    prompt, answers = row.get("prompt"), [get_value(row, name) for name in ANSWERS]
    if prompt is None and any(isinstance(answer, str) or _is_turn(answer) for answer in answers):
        known = next((name for name in PROMPTS if row.get(name)), None)
        hint = suggest_columns(prompt=known) if known else MEND
        are = "texts" if isinstance(answers[0], str) else "turns"
        raise BadRow("there is no prompt", f"chosen and rejected are {are} without a prompt", hint)
    told = [_list_turns(row, name) for name in ANSWERS]
    told = told if prompt is None else [_join_prompt(row, turns)[0] for turns in told]
    made = [_make_conversation(turns, row) for turns in told]
    alike = zip(*(each.messages for each in made))
    shared = next((at for at, (one, other) in enumerate(alike) if one != other), None)
    if shared is None:  # one ends within the other, or they are the same
        shared = min(len(each.messages) for each in made) - 1
    for name, each in zip(ANSWERS, made):
        if each.messages[shared]["role"] != "assistant":
            said = f"turn {shared} of {name} is the {each.messages[shared]['role']}'s"
            raise BadRow(
                "chosen and rejected differ before the assistant's turn",
                f"{said}: chosen and rejected have to be answers to the same",
            )
    return Preference(*(_train_from(each, shared) for each in made))


def _join_prompt(row: Mapping[str, Any], after: list[Any]) -> tuple[list[Any], int]:
    """Return the turns of a row's prompt and those after it, which may repeat it, and how many of
    them the prompt has."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": get_filled_text(row, "prompt")}]
    if not isinstance(prompt, list):
        raise BadRow("prompt is neither text nor a list")
    prompt = [_convert_sharegpt_turn(turn) for turn in prompt]
    if after[: len(prompt)] == prompt:
        return after, len(prompt)
    if _find_asked(after) == _find_asked(prompt) != []:
        if _get_role(after[0]) not in FIRST:  # what the system says is not repeated
            after = [*itertools.takewhile(lambda turn: _get_role(turn) in FIRST, prompt), *after]
        asked = [at for at, turn in enumerate(after, 1) if _get_role(turn) == "user"]
        return after, asked[: sum(_get_role(turn) == "user" for turn in prompt)][-1]
    follows = next((role for role in map(_get_role, after) if role not in FIRST), None)
    if _get_role(prompt[-1]) == follows == "user":
        raise BadRow(
            "the answer begins with another question than the prompt's",
            "the prompt ends with a turn of the user, and what follows begins with another one",
            f"let it repeat the prompt word for word or not at all, or {SKIP}",
        )
    return [*prompt, *after], len(prompt)


def _list_turns(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return an answer as turns: it is a text, one turn, or several."""
    answer = row[name]
    if isinstance(answer, str):
        return [{"role": "assistant", "content": get_filled_text(row, name)}]
    turns = [answer] if _is_turn(answer) else get_list(row, name)
    return [_convert_sharegpt_turn(turn) for turn in turns]


def _is_turn(answer: Any) -> bool:
    return isinstance(answer, Mapping) and ("role" in answer or "from" in answer)


def _find_asked(turns: Sequence[Any]) -> list[Any]:
    """Return the texts of the turns before the first that is not the system's or the user's, but
    for the system's, without the blanks around them."""
    before = itertools.takewhile(lambda turn: _get_role(turn) in (*FIRST, "user"), turns)
    asked = [turn.get("content") for turn in before if _get_role(turn) == "user"]
    return [text.strip() if isinstance(text, str) else text for text in asked]


def _get_role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


LABELLED = {name: columns for name, columns in FORMATS.items() if name not in ("tokens", "text")}
"""The formats that an answer with a label may have."""


def recognise_labelled(columns: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Return the format of the answer that a label beside these columns is of, or None, and what
    its columns are called, as `ours: theirs`."""
    there = list(columns)
    names = guess_columns(there, LABELLED)
    return recognise_format(name_columns(there, names), LABELLED), names


def read_switch(value: Any) -> bool | None:
    """Return a value that is true or false, also written out, as a table has it; else None."""
    written = {"true": True, "false": False}
    if isinstance(value, str):
        return written.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def convert_unpaired(row: Mapping[str, Any], alpaca_prompt: bool = False) -> Unpaired:
    """Return a row with the column label, and an answer in any format that has one, as the
    conversation and whether its last answer is wanted."""
    label = get_value(row, "label")
    desirable = read_switch(label)
    if desirable is None:
        kind = _NAMES.get(type(label), "text" if isinstance(label, str) else type(label).__name__)
        shown = "" if label is None else f" ({json.dumps(label, default=str)[:40]})"
        raise BadRow(f"label is {kind}", f"label is {kind}{shown}, but must be true or false")
    beside = {name: value for name, value in row.items() if name != "label"}
    style, names = recognise_labelled(beside)
    if style is None:
        raise BadRow(
            "there is no answer",
            f"there is no answer that the label is of; the columns are {', '.join(row)}",
            "data.columns: {prompt: THEIRS, completion: THEIRS} names them",
        )
    made = find_converter(style, alpaca_prompt)(rename_columns(beside, names))
    if style == "prompt_completion":
        return Unpaired(_train_from(made, 0), desirable)
    asked = [at for at, turn in enumerate(made.messages) if turn["role"] == "user"]
    return Unpaired(_train_from(made, max(asked, default=0)), desirable)


def _train_from(made: Conversation, turn: int) -> Conversation:
    """Return a conversation with loss from a turn on only."""
    if not any(made.trained[turn:]):
        raise BadRow("no turn of the answer has loss", hint="leave out `train: false`")
    return made._replace(trained=[False] * turn + made.trained[turn:])


def _get_system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the row's system message, in a list that is empty where it does not have one."""
    return [{"role": "system", "content": get_text(row, "system")}] if row.get("system") else []


def _make_conversation(turns: list[Any], row: Mapping[str, Any]) -> Conversation:
    """Return turns as a conversation.

    Raise BadRow unless their roles are known, each has content, the user speaks before the
    assistant, and there is an answer to learn.
    """
    messages, trained = [], []
    if not turns:
        raise BadRow("the conversation is empty")
    for number, turn in enumerate(turns):
        message, learned = _make_turn(turn, number)
        messages.append(message)
        trained.append(learned)
    if messages[0]["role"] not in FIRST:
        messages, trained = _get_system(row) + messages, [False] * len(_get_system(row)) + trained
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRow("the assistant has no turn")
    if next(role for role in roles if role not in FIRST) == "assistant":
        raise BadRow("the assistant speaks first", hint="begin with a turn of the user")
    return Conversation(messages, _get_tools(row), trained)


def _make_turn(turn: Any, number: int) -> tuple[dict[str, Any], bool]:
    """Return one message as templates take it, with all that its author gave it for the template to
    read, and whether it may carry loss (not with `train: false` or `weight: 0`)."""
    if not isinstance(turn, dict):
        raise BadRow(
            "a turn is not a mapping",
            f"turn {number} is {json.dumps(turn, default=str)[:40]}, not {{role, content}}",
        )
    role = "tool" if turn.get("role") == "function" else turn.get("role")
    if role not in ROLES:
        guess = find_nearest(str(role), ROLES)
        hint = f"did you mean {guess}?" if guess else f"roles are {', '.join(ROLES)}"
        raise BadRow(
            f"the role {role!r} is not known",
            f"turn {number}: the role {role!r} is not known",
            hint,
        )
    train, weight = turn.get("train"), turn.get("weight")
    if not (train is None or isinstance(train, bool)) or weight not in (None, 0, 1):
        raise BadRow(
            "train is not true or false",
            f"turn {number}: train must be true or false, weight 0 or 1",
        )
    message = {"role": role}
    old = turn.get("function_call")  # OpenAI's, before there were several in a turn
    calls = turn.get("tool_calls") or ([old] if old else None)
    if calls:
        message["tool_calls"] = _convert_calls(calls, number)
    message["content"] = _get_content(turn, role, number, bool(calls))
    others = {key: turn[key] for key in turn.keys() - OURS if turn[key] is not None}
    message |= dict(sorted(others.items()))
    return message, role == "assistant" and train is not False and weight != 0


def _get_content(turn: dict[str, Any], role: str, number: int, may_be_empty: bool) -> str:
    """Return a turn's text; a list of text parts is joined. Raise BadRow for parts of other
    kinds."""
    name, content = f"the {role}'s content", turn.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else "text"
            text = part.get("text") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(text, str):
                raise BadRow(
                    f"{name} has parts that are not text",
                    f"turn {number}: {name} has a part of the type {kind!r}, and only text is "
                    "trained on",
                )
            texts.append(text)
        turn = {**turn, "content": "".join(texts)}
    if may_be_empty and not turn.get("content"):
        return ""
    if role in ("assistant", "user"):
        return get_filled_text(turn, "content", name)
    return get_text(turn, "content", name)


def _convert_calls(calls: Any, number: int) -> list[Any]:
    """Return tool calls with their arguments as mappings, as templates print them; OpenAI's files
    hold them as JSON text."""
    made = []
    for call in calls if isinstance(calls, list) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                "tool_calls are not calls",
                f"turn {number}: tool_calls must be a list of {{function: {{name, arguments}}}}",
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except (ValueError, RecursionError):
                raise BadRow(
                    "a tool call's arguments are not JSON",
                    f"turn {number}: the arguments of {function['name']} are not JSON",
                ) from None
        named = {"id": call["id"]} if call.get("id") else {}
        made.append(
            {
                **named,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return made


def _get_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools that the row's turns may call, or None."""
    if not row.get("tools"):
        return None
    tools = []
    for tool in get_list(row, "tools"):
        if isinstance(tool, str):  # data sets of one type for a column keep each as JSON
            try:
                tool = parse_json(tool)
            except (ValueError, RecursionError):
                raise BadRow("a tool is text that is not JSON") from None
        tools.append(tool)
    return tools


def _convert_sharegpt_turn(turn: Any) -> Any:
    """Return a turn `{from, value}` as `{role, content}`, and any other unchanged."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker, value = turn["from"], turn.get("value")
    others = {key: given for key, given in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        try:
            calls = parse_json(str(value))
        except (ValueError, RecursionError):
            raise BadRow("a function_call is not JSON") from None
        return {
            "role": "assistant",
            "tool_calls": calls if isinstance(calls, list) else [calls],
            **others,
        }
    return {"role": SHAREGPT_ROLES.get(str(speaker), speaker), "content": value, **others}


MASKS = ("attention_mask", "completion_mask", "assistant_masks")
"""Columns beside `input_ids` in which a 0 marks padding, or a token without loss."""


def _convert_tokens(row: Mapping[str, Any]) -> Tokens:
    """Return the ids and labels of a row that is tokenised already, with its masks applied."""
    ids = get_list(row, "input_ids")
    labels = list(ids) if row.get("labels") in (None, "") else get_list(row, "labels")
    if len(labels) != len(ids):
        raise BadRow("labels and input_ids differ in length")
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not all(type(value) is int for value in values):
            raise BadRow(f"{name} are not whole numbers")
    for name in MASKS:
        if row.get(name) is not None:
            mask = get_list(row, name)
            if len(mask) != len(ids) or any(value not in (0, 1) for value in mask):
                raise BadRow(f"{name} is not a 0 or 1 for each of input_ids")
            if name == "attention_mask":
                ids = [number for number, kept in zip(ids, mask) if kept]
                labels = [label for label, kept in zip(labels, mask) if kept]
                row = {
                    key: _mask_labels(row[key], mask) if key in MASKS[1:] else row[key]
                    for key in row
                }
            else:
                labels = [label if kept else -100 for label, kept in zip(labels, mask)]
    return Tokens(ids, labels)


def _mask_labels(values: Any, mask: list[int]) -> Any:
    """Return the values that a mask keeps, if there are as many as it has."""
    same = isinstance(values, list) and len(values) == len(mask)
    return [value for value, kept in zip(values, mask) if kept] if same else values
