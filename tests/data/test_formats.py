"""What a row says is trained on, handed to the template, or named: nothing is dropped in silence.

Hermetic: rows written here, the tiny model's tokenizer with templates of our own. Alone: pytest
tests/data/test_formats.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_cli.data import formats, load
from lora_cli.data.encode import Renderer
from lora_cli.models import answering
from lora_cli.recipe.load import load_recipe

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RICH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.thinking %}({{ m.thinking }}){% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{# developer #}"
)
ASKED = {"role": "user", "content": "ask"}
ANSWER = {"role": "assistant", "content": "answer"}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny / "model")


def convert(row: dict) -> formats.Conversation:
    ours = formats.rename_columns(row, formats.guess_columns(row))
    found = formats.recognise_format(ours)
    assert found is not None
    made = formats.find_converter(found)(ours)
    assert isinstance(made, formats.Conversation)
    return made


def render(tokenizer: PreTrainedTokenizerBase, template: str, row: dict) -> tuple[str, tuple]:
    """The text of a row, and what of it the template does not read."""
    tokenizer.chat_template = template
    made = Renderer(tokenizer, "all")
    _, (piece,) = made._render_batch([convert(row)])
    return piece.text, piece.unread


def test_keys_of_a_turn_reach_the_template_or_are_counted(tokenizer) -> None:
    row = {"messages": [ASKED, {**ANSWER, "thinking": "hm", "rating": 5, "none": None}]}
    text, unread = render(tokenizer, RICH, row)
    assert "(hm)answer" in text
    assert unread == ("rating",)
    assert render(tokenizer, PLAIN, row)[1] == ("rating", "thinking")


def test_what_is_not_read_is_counted_and_said(tokenizer, tmp_path: Path, capfd) -> None:
    rows = tmp_path / "rows.jsonl"
    told = [{"messages": [ASKED, {**ANSWER, "thinking": "hm"}], "tools": [{"name": "f"}]}] * 3
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in [*told, {"messages": [ASKED, ANSWER]}])
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{name_or_path: x}}\ndata: {{path: {rows}}}\n")
    tokenizer.chat_template = PLAIN
    for _ in range(2):  # prepared, and from the cache
        prepared, _ = load.load_rows(load_recipe(recipe), tokenizer)
        assert prepared.counts.unread == {"thinking": 3, "tools": 3}
        said = capfd.readouterr().err
        assert "3 rows have thinking, which the chat template does not read" in said


def test_a_developer_is_a_system_where_the_template_knows_no_other(tokenizer) -> None:
    row = {"messages": [{"role": "developer", "content": "be brief"}, ASKED, ANSWER]}
    assert render(tokenizer, PLAIN, row)[0].startswith("<system>be brief")
    assert render(tokenizer, RICH, row)[0].startswith("<developer>be brief")
    for template in (PLAIN, RICH):  # what a model is asked is what it was trained to be asked
        whole, tokenizer.chat_template = render(tokenizer, template, row)[0], template
        ids = answering.encode_conversation(tokenizer, row["messages"][:-1])
        assert whole.startswith(tokenizer.decode(ids))


def test_the_older_calls_of_openai_are_the_newer_ones() -> None:
    old = [
        ASKED,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "f", "arguments": '{"a": 1}'},
        },
        {"role": "function", "name": "f", "content": "2"},
        ANSWER,
    ]
    made = convert({"messages": old})
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert made.messages[1] == {"role": "assistant", "tool_calls": [call], "content": ""}
    assert made.messages[2] == {"role": "tool", "content": "2", "name": "f"}


def test_tools_may_be_a_list_of_json_texts() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], [json.dumps(tool)], json.dumps([tool]), json.dumps([json.dumps(tool)])):
        assert convert({"messages": [ASKED, ANSWER], "tools": tools}).tools == [tool]
    with pytest.raises(formats.BadRow, match="a tool is text that is not JSON"):
        convert({"messages": [ASKED, ANSWER], "tools": ["f"]})


def test_the_completion_alone_is_learned() -> None:
    prompt = [{"role": "system", "content": "be brief"}, ASKED, ANSWER, ASKED]
    for completion in ([ANSWER], "answer"):
        made = convert({"prompt": prompt, "completion": completion})
        assert made.trained == [False, False, False, False, True]
        assert made.messages[-1] == ANSWER
    made = convert({"prompt": prompt[1:], "completion": [ANSWER], "system": "be brief"})
    assert made.trained == [False, False, False, False, True]
    with pytest.raises(formats.BadRow, match="neither text nor a list"):
        convert({"prompt": prompt, "completion": 5})


def test_text_parts_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    made = convert({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert made.messages[0]["content"] == "one, two"
    image = [*parts, {"type": "image", "url": "x.png"}]
    with pytest.raises(formats.BadRow, match="turn 0: .* a part of the type 'image'"):
        convert({"messages": [{"role": "user", "content": image}, ANSWER]})


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "ask", "context": "", "response": "answer", "category": "qa"}, "ask"),
        ({"instruction": "ask", "context": "more", "response": "answer"}, "ask\n\nmore"),
        ({"system_prompt": "", "question": "ask", "response": "answer", "id": "1"}, "ask"),
        ({"question": "ask", "answer": "answer"}, "ask"),
        ({"query": "ask", "response": "answer", "type": "x"}, "ask"),
        ({"problem": "ask", "solution": "answer"}, "ask"),
        ({"input": "ask", "output": "answer"}, "ask"),
        ({"instruction": "ask", "input": "more", "response": "answer"}, "ask\n\nmore"),
        ({"conversation": [ASKED, ANSWER]}, "ask"),
    ],
)
def test_well_known_columns_are_read(row: dict, asked: str) -> None:
    made = convert(row)
    assert [message["content"] for message in made.messages] == [asked, "answer"]
    assert made.trained == [False, True]


def test_columns_of_a_format_are_not_renamed() -> None:
    row = {"instruction": "ask", "input": "", "output": "answer", "response": "other"}
    assert formats.guess_columns(row) == {}
    assert convert(row).messages[1]["content"] == "answer"
