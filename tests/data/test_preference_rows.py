"""Rows with two answers: which columns and turns they are read from, what is refused, what carries
loss.

Compared with the ids that the Renderer of single answers makes of each conversation. Hermetic: the
tiny model's tokenizer. Alone: pytest tests/data/test_preference_rows.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_cli.common import LoraError
from lora_cli.data import load, preferences, prepare
from lora_cli.data.encode import Renderer
from lora_cli.data.formats import (
    BadRow,
    convert_preference,
    convert_unpaired,
    find_converter,
    guess_columns,
    recognise_format,
    rename_columns,
)
from lora_cli.drafts import kinds
from lora_cli.evaluate.generate import make_question
from lora_cli.models import IGNORED
from lora_cli.recipe import load_recipe

ASKED = {"role": "user", "content": "Which way?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BEFORE = [ASKED, say("Where to?"), {"role": "user", "content": "To the sea."}]
ROWS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Which way?", "chosen": "Left.", "rejected": "Right, I guess."},
    "turns after turns": {"prompt": [ASKED], "chosen": [say("Left.")], "rejected": [say("No.")]},
    "texts after turns": {"prompt": [SYSTEM, ASKED], "chosen": "Left.", "rejected": "No."},
    "turns after a text": {
        "prompt": "Which way?", "chosen": [say("Left.")], "rejected": [say("No.")],
    },
    "conversations": {"chosen": [*BEFORE, say("Left.")], "rejected": [*BEFORE, say("Right.")]},
    "a prompt that is repeated": {
        "prompt": "Which way?", "chosen": [ASKED, say("Left.")], "rejected": [ASKED, say("No.")],
    },
    "repeated after a system message": {
        "prompt": "Which way?", "chosen": [SYSTEM, ASKED, say("Left.")],
        "rejected": [SYSTEM, ASKED, say("No.")],
    },
    "repeated without its system message": {
        "prompt": [SYSTEM, ASKED], "chosen": [ASKED, say("Left.")],
        "rejected": [ASKED, say("No.")],
    },
    "repeated but for blanks": {
        "prompt": "Which way? ", "chosen": [ASKED, say("Left.")], "rejected": [ASKED, say("No.")],
    },
    "several turns": {
        "prompt": [ASKED],
        "chosen": [say("Why?"), {"role": "user", "content": "To swim."}, say("Left.")],
        "rejected": [say("Left.")],
    },
    "a turn after turns": {"prompt": [ASKED], "chosen": say("Left."), "rejected": say("No.")},
    "ShareGPT's turn after turns": {
        "prompt": [{"from": "human", "value": "Which way?"}],
        "chosen": {"from": "gpt", "value": "Left."}, "rejected": {"from": "gpt", "value": "No."},
    },
    "ShareGPT's conversations": {
        name: [{"from": "human", "value": "Which way?"}, {"from": "gpt", "value": answer}]
        for name, answer in (("chosen", "Left."), ("rejected", "No."))
    },
    "a column of the system's": {
        "system": "Be brief.", "prompt": "Which way?", "chosen": "Left.", "rejected": "No.",
    },
}  # fmt: skip


@pytest.fixture
def load_pairs(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """`load_pairs(rows, *overrides)` prepares rows for dpo, with a cache of its own."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(rows: list[dict[str, Any]], *overrides: str) -> prepare.Prepared:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = "objective: dpo\nmodel: {name_or_path: x}\ndata: {path: rows.jsonl}\n"
        Path("r.yaml").write_text(text)
        tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
        return load.load_rows(load_recipe(Path("r.yaml"), list(overrides)), tokenizer)[0]

    return run


def encode_alone(tiny: Path, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation whose last answer alone carries loss."""
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny / "model"), "completion")
    row = find_converter("messages")({"messages": messages})
    [(_, [made])] = renderer.encode([[("here", row)]])
    assert not isinstance(made, BadRow)
    return made[0].input_ids.tolist(), made[0].labels.tolist()


@pytest.mark.parametrize("name", ROWS)
def test_each_shape_is_two_conversations(name: str, load_pairs, tiny: Path) -> None:
    row = ROWS[name]
    made = convert_preference(row)
    prepared = load_pairs([row])
    assert prepared.counts.left_out.total() == 0
    (found,) = prepared.rows
    cut, rest = found["documents"]
    assert cut + rest == len(found["input_ids"])
    for part, conversation in zip((slice(cut), slice(cut, None)), made):
        ids, labels = found["input_ids"][part], found["labels"][part]
        wanted, last = encode_alone(tiny, conversation.messages)
        assert ids == wanted
        if name != "several turns":
            assert labels == last
        else:  # each answer after the prompt, and no turn of the user
            assert sum(label != IGNORED for label in labels) >= sum(
                each != IGNORED for each in last
            )
            assert labels[0] == IGNORED


def test_earlier_answers_carry_no_loss(load_pairs) -> None:
    made = convert_preference(ROWS["conversations"])
    assert [each.trained for each in made] == [[False, False, False, True]] * 2


def test_what_the_system_says_is_kept_where_the_rest_is_repeated() -> None:
    made = convert_preference(ROWS["repeated without its system message"])
    assert made == convert_preference(ROWS["texts after turns"])


def test_a_prompt_that_is_repeated_but_for_blanks_is_asked_once() -> None:
    made = convert_preference(ROWS["repeated but for blanks"])
    assert made == convert_preference(ROWS["a prompt that is repeated"])


def test_who_speaks_is_told_by_the_turn_as_lists_of_turns_tell_it() -> None:
    """LLaMA-Factory's own pairs, and axolotl's for chat_template.default, have a turn each."""
    wanted = convert_preference(ROWS["turns after turns"])
    for name in ("a turn after turns", "ShareGPT's turn after turns", "ShareGPT's conversations"):
        assert convert_preference(ROWS[name]) == wanted, name


def test_the_conversation_before_two_turns_is_their_prompt() -> None:
    row = {**ROWS["ShareGPT's turn after turns"]}
    row["conversations"] = row.pop("prompt")
    kind = kinds.tell_kind([row], None)
    assert (kind.compares, kind.columns) == (True, {"prompt": "conversations"})
    with pytest.raises(BadRow, match="turns without a prompt") as caught:
        convert_preference(row)
    assert caught.value.hint == "--set data.columns='{prompt: conversations}'"


def rename(row: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in row.items()}


OTHERS = {
    "the conversation before two turns": rename(
        ROWS["ShareGPT's turn after turns"], prompt="conversations"
    ),
    "a turn after a text": {**ROWS["texts"], "chosen": say("Left."), "rejected": say("No.")},
    "columns that are guessed": rename(
        ROWS["turns after turns"], chosen="chosen_response", rejected="rejected_response"
    ),
    "conversations in columns that are guessed": rename(
        ROWS["ShareGPT's conversations"], chosen="chosen_response", rejected="rejected_response"
    )
    | {"prompt": "Which way?"},
    "a prompt of several turns that is repeated": {
        "prompt": BEFORE, "chosen": [SYSTEM, *BEFORE, say("Left.")],
        "rejected": [SYSTEM, *BEFORE, say("No.")],
    },
}  # fmt: skip


@pytest.mark.parametrize("row", [*ROWS.values(), *OTHERS.values()], ids=[*ROWS, *OTHERS])
def test_the_better_answer_alone_is_what_the_pair_has(row: dict[str, Any]) -> None:
    """For `lora init --set objective=sft`, for answers with a label, and for a question to ask."""
    columns = preferences.PreferenceEncoder.row_formats, preferences.PreferenceEncoder.column_sets
    told = kinds.tell_kind([row], None).columns
    pair = convert_preference(rename_columns(row, told or guess_columns(row, *columns)))
    names = kinds.find_better(row, told)
    ours = rename_columns(row, names)
    style = recognise_format(ours)
    assert style is not None
    alone = find_converter(style)(ours)
    assert alone.messages == pair.chosen.messages
    if "prompt" in names:
        assert alone.trained == pair.chosen.trained
        assert convert_unpaired({**ours, "label": True}).answer == pair.chosen
    question = make_question("", ours)
    assert question.expected == "Left." and question.asked(None).messages == alone.messages[:-1]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another question than the prompt's": (
        {"prompt": "How?", "chosen": [ASKED, say("Left.")], "rejected": [ASKED, say("No.")]},
        "the prompt ends with a turn of the user, and what follows begins with another one",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "texts without a prompt"),
    "no prompt, but a question": (
        {"question": "q", "chosen": "a", "rejected": "b"}, "texts without a prompt",
    ),
    "other questions": (
        {"chosen": [ASKED, say("a")], "rejected": [{"role": "user", "content": "?"}, say("a")]},
        "turn 0 of chosen is the user's",
    ),
    "one ends with a question": (
        {"chosen": [ASKED, say("a"), ASKED], "rejected": [ASKED, say("a")]},
        "chosen and rejected differ before|turn 1|differ",
    ),
    "an empty answer": ({"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen is empty"),
    "a number": ({"prompt": "q", "chosen": "a", "rejected": 3}, "rejected is a number"),
    "an empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    "a prompt that is a number": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "neither text"),
    "untrained": (
        {"prompt": "q", "chosen": "a", "rejected": [{**say("b"), "train": False}]},
        "no turn of the answer has loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_no_pairs(name: str, load_pairs) -> None:
    row, said = BAD[name]
    if name == "one ends with a question":
        prepared = load_pairs([row])  # the rejected one ends where the chosen one asks again
        assert len(prepared.rows) == 1
        return
    with pytest.raises(LoraError, match=said) as raised:
        load_pairs([row])
    if "question" in name and "but" in name:
        assert raised.value.hint == "--set data.columns='{prompt: question}'"


GOOD = ROWS["texts"]


def test_pairs_that_are_the_same_teach_nothing(load_pairs) -> None:
    same = {**GOOD, "rejected": GOOD["chosen"]}
    prepared = load_pairs([GOOD, same])
    assert len(prepared.rows) == 1
    assert "1 dropped: chosen and rejected are the same" in prepared.summarise()
    with pytest.raises(LoraError, match="no rows are left to train on"):
        load_pairs([same])


def test_no_answer_is_cut(load_pairs) -> None:
    long = {**GOOD, "rejected": "Right, " * 80}
    prepared = load_pairs([GOOD, long], "training.max_length=64")
    assert len(prepared.rows) == 1
    assert "1 dropped: an answer over 64 tokens" in prepared.summarise()
    limited = ("training.max_length=64", "data.on_long_row=error")
    with pytest.raises(LoraError, match=r"rows.jsonl:2: an answer with its prompt has \d+ tokens"):
        load_pairs([GOOD, long], *limited)
    whole = load_pairs([GOOD])
    most = max(whole.rows[0]["documents"])
    assert len(load_pairs([GOOD], f"training.max_length={most}").rows) == 1


def test_held_out_pairs_are_whole(load_pairs) -> None:
    rows = [{**GOOD, "chosen": f"Left, {number} times."} for number in range(6)]
    assert len(load_pairs(rows, "data.eval_rows=2").rows) == 4


def test_other_names_of_columns(load_pairs, capsys) -> None:
    renamed = {"prompt": "Which way?", "chosen_response": "Left.", "rejected_response": "No."}
    assert len(load_pairs([renamed]).rows) == 1
    assert "chosen_response as chosen" in capsys.readouterr().err
    other = {"question": "Which way?", "better": "Left.", "worse": "No."}
    with pytest.raises(LoraError, match="match no known format") as raised:
        load_pairs([other])
    hint = "--set data.columns='{prompt: question, chosen: better, rejected: worse}'"
    assert raised.value.hint == hint
    columns = "data.columns={prompt: question, chosen: better, rejected: worse}"
    assert len(load_pairs([other], columns).rows) == 1
