"""Answers that are each wanted or not: formats of such rows, what is wrong with them, what is
counted.

Hermetic: the tiny model's tokenizer. Alone: pytest tests/data/test_unpaired_rows.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_cli.common import LoraError
from lora_cli.data import load, prepare, unpaired
from lora_cli.data.formats import convert_unpaired
from lora_cli.models import IGNORED
from lora_cli.recipe import Preference, load_recipe

ASKED = {"role": "user", "content": "Which way?"}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BEFORE = [{"role": "user", "content": "Hello."}, say("Hello!"), ASKED]
ROWS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Which way?", "completion": "Left."},
    "turns": {"prompt": [ASKED], "completion": [say("Left.")]},
    "a conversation": {"messages": [*BEFORE, say("Left.")]},
    "ShareGPT": {"conversations": [
        {"from": "human", "value": "Which way?"}, {"from": "gpt", "value": "Left."}]},
    "Alpaca": {"instruction": "Which way?", "input": "", "output": "Left."},
    "other names": {"question": "Which way?", "answer": "Left."},
}  # fmt: skip


@pytest.fixture
def load_votes(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """`load_votes(rows, *overrides)` prepares rows for kto, with a cache of its own."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(rows: list[dict[str, Any]], *overrides: str, name: str = "rows.jsonl") -> Any:
        if rows:
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = f"objective: kto\nmodel: {{name_or_path: x}}\ndata: {{path: {name}}}\n"
        Path("r.yaml").write_text(text)
        tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
        return load.load_rows(load_recipe(Path("r.yaml"), list(overrides)), tokenizer)[0]

    return run


OTHER = {"prompt": "How far?", "completion": "Not far.", "label": False}


@pytest.mark.parametrize("name", ROWS)
def test_each_format_may_have_a_label(name: str, tiny: Path) -> None:
    made = convert_unpaired({**ROWS[name], "label": True})
    assert made.desirable is True
    assert made.answer.messages[-2:] == [ASKED, say("Left.")]
    assert made.answer.trained == [False] * (len(made.answer.messages) - 1) + [True]


def test_rows_are_read_with_their_labels(load_votes, capsys) -> None:
    rows = [{**ROWS["texts"], "label": True}, OTHER, {**OTHER, "prompt": "How?"}]
    prepared: prepare.Prepared = load_votes(rows)
    assert prepared.rows[unpaired.DESIRABLE] == [[1], [0], [0]]
    said = "1 desirable, 2 undesirable, which count 0.5 times as much together; "
    assert f"{said}--set preference.desirable_weight=2 evens that" in capsys.readouterr().err
    load_votes([], "preference.desirable_weight=2")
    assert "1 desirable, 2 undesirable\n" in capsys.readouterr().err
    again = load_votes([])  # from the cache
    assert again.rows[unpaired.DESIRABLE] == [[1], [0], [0]]


def test_balance_is_by_the_weights_that_are_given(load_votes) -> None:
    rows = load_votes([{**OTHER, "prompt": f"How {n}?", "label": n > 0} for n in range(4)]).rows
    given = Preference(loss="kto", desirable_weight=2.0)
    said = unpaired.describe_balance(rows, given)
    assert said.endswith(
        "6 times as much together; --set preference.undesirable_weight=6 evens that"
    )
    evened = given.model_copy(update={"undesirable_weight": 6.0})
    assert unpaired.describe_balance(rows, evened) == "3 desirable, 1 undesirable"


def test_a_table_writes_labels_out(load_votes) -> None:
    Path("rows.csv").write_text("prompt,completion,label\na,b,True\nc,d,false\n")
    assert load_votes([], name="rows.csv").rows[unpaired.DESIRABLE] == [[1], [0]]


def test_other_names_of_the_label(load_votes, capsys) -> None:
    rows = [{"prompt": "a", "completion": "b", "kto_tag": True}, {**OTHER, "kto_tag": False}]
    del rows[1]["label"]
    assert len(load_votes(rows).rows) == 2
    assert "columns: kto_tag as label" in capsys.readouterr().err
    with pytest.raises(LoraError, match="match no known format") as raised:
        load_votes([{"ask": "a", "say": "b", "good": True}])
    hint = "--set data.columns='{prompt: ask, completion: say, label: good}'"
    assert raised.value.hint == hint


@pytest.mark.parametrize(
    ("row", "objective", "hint"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "kto", "--set objective=dpo"),
        (OTHER, "dpo", "--set objective=kto"),
    ],
)
def test_rows_of_another_objective_are_told(
    row: dict[str, Any], objective: str, hint: str, load_votes
) -> None:
    with pytest.raises(LoraError, match="match no known format") as raised:
        load_votes([row], f"objective={objective}")
    assert raised.value.hint == hint


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_an_unwanted_answer_is_not_learned_in_silence(column: str, load_votes, capsys) -> None:
    rows = [{**row, column: wanted} for row in ROWS.values() for wanted in (True, False, "false")]
    answers = [row for row in rows if "prompt" in row]
    for _ in range(2):  # prepared, and from the cache
        assert load_votes(answers, "objective=sft").counts.unwanted == 4
        said = capsys.readouterr().err
        assert "4 rows say that the answer is not wanted, and it is learned like any" in said
    load_votes([row for row in answers if row[column] is True], "objective=sft")
    assert "not wanted" not in capsys.readouterr().err
    texts = [{"text": "A review.", "label": False}]
    load_votes(texts, "objective=sft")  # no answer is marked
    assert "not wanted" not in capsys.readouterr().err


GOOD = {**ROWS["texts"], "label": True}
BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no label": (
        [GOOD, {"prompt": "a", "completion": "b"}],
        "rows.jsonl:2: there is no label; the",
    ),
    "null": ([{**GOOD, "label": None}], "rows.jsonl:1: label is null, but must be true or false"),
    "a number": ([{**GOOD, "label": 1}], r"label is a number \(1\), but must be true or false"),
    "a text": ([{**GOOD, "label": "yes"}], r'label is text \("yes"\), but must be true or false'),
    "no answer": ([{"prompt": "a", "label": True}], "there is no answer that the label is of"),
    "an empty answer": ([{**GOOD, "completion": ""}], "completion is empty"),
    "no loss": (
        [{"messages": [ASKED, {**say("Left."), "train": False}], "label": True}],
        "no turn of the answer has loss",
    ),
    "all wanted": ([GOOD, {**OTHER, "label": True}], "label is true in all of 2 rows to train on"),
    "none wanted": ([{**GOOD, "label": False}, OTHER], "label is false in all of 2 rows"),
    "one prompt": ([GOOD, {**GOOD, "label": False}], "all of 2 rows to train on have the same"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_used(name: str, load_votes) -> None:
    rows, said = BAD[name]
    with pytest.raises(LoraError, match=said) as raised:
        load_votes(rows)
    assert raised.value.hint


MARGIN = "training.metric_for_best_model=rewards_margin"
OF_UNWANTED = "training.metric_for_best_model=eval_logps_undesirable"
EVALUATED: dict[str, tuple[list[dict[str, Any]], str, str, str]] = {
    "one kind": ([GOOD, {**OTHER, "label": True}], MARGIN, "rewards_margin needs undesirable", "=loss"),
    "no wanted": ([{**GOOD, "label": False}, OTHER], MARGIN, "needs desirable answers, and label is false in all of 2", "=loss"),
    "of one kind": ([GOOD, {**OTHER, "label": True}], OF_UNWANTED, "logps_undesirable needs", "=loss"),
    "one prompt": ([GOOD, {**GOOD, "label": False}], MARGIN, "all of 2 rows to evaluate on have the same", "add rows"),
    "by chance": ([], "data.eval_rows=1", "there is one row to evaluate on: objective", "a larger data.eval_rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATED)
def test_rows_that_cannot_be_evaluated_on(name: str, load_votes, tmp_path: Path) -> None:
    rows, override, said, hint = EVALUATED[name]
    given = [override]
    if rows:
        (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given.append("data.eval_path=other.jsonl")
    votes = [{**OTHER, "prompt": f"How {n}?", "label": n % 2 == 0} for n in range(6)]
    with pytest.raises(LoraError, match=said) as raised:
        load_votes(votes, *given)
    assert hint in str(raised.value.hint)


def test_one_kind_is_evaluated_on_by_what_it_has(load_votes, tmp_path: Path) -> None:
    wanted = [GOOD, {**OTHER, "label": True}]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
    for metric in ("loss", "eval_rewards_desirable"):
        given = (f"training.metric_for_best_model={metric}", "data.eval_path=other.jsonl")
        assert len(load_votes([GOOD, OTHER], *given).rows) == 2


def test_rows_that_are_too_long_are_left_out(load_votes) -> None:
    rows = [GOOD, OTHER, {**OTHER, "completion": "Right, " * 80}]
    prepared = load_votes(rows, "training.max_length=64")
    assert len(prepared.rows) == 2
    assert "1 dropped: over 64 tokens" in prepared.summarise()


def test_the_label_tells_rows_apart_that_are_held_out(load_votes) -> None:
    rows = [{**OTHER, "label": wanted} for wanted in (True, False)]
    rows += [{**GOOD, "prompt": f"Which {n}?", "label": n % 2 == 0} for n in range(8)]
    assert len(load_votes(rows, "data.eval_rows=2").rows) == 8  # and not 7


def test_earlier_answers_carry_no_loss(load_votes) -> None:
    row = {"messages": [*BEFORE, say("Left.")], "label": True}
    labels = load_votes([row, OTHER]).rows[0]["labels"]
    first = next(at for at, label in enumerate(labels) if label != IGNORED)
    assert all(label != IGNORED for label in labels[first:-1])
    assert first > len(labels) / 2
