"""Rows held out to evaluate on: equal rows on one side, in a mix and a stream too, and no row moves
when others are added.

Hermetic: a word-level tokenizer made here, files in a temporary folder. Alone: pytest
tests/data/test_holdout.py
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cli.common.errors import LoraError
from lora_cli.data import load
from lora_cli.data.prepare import Prepared
from lora_cli.recipe.load import load_recipe

WORDS = 700


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each number."""
    words = ["</s>", "<unk>", "user", "assistant", *(f"w{n}" for n in range(WORDS))]
    fast = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}",
    )


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"w{number}", "completion": f"w{number + 1}"}


def turns(number: int) -> dict[str, object]:
    """The same row in another format."""
    said = [("user", f"w{number}"), ("assistant", f"w{number + 1}")]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, tokenizer, data: str, *sets: str) -> tuple[Prepared, Prepared | None]:
    (folder / "r.yaml").write_text(f"model: {{name_or_path: x}}\ndata: {data}\n")
    return load.load_rows(load_recipe(folder / "r.yaml", list(sets)), tokenizer)


def texts(prepared: Prepared) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in prepared.rows]


def test_a_share_is_held_out(tmp_path: Path, tokenizer) -> None:
    file = write(tmp_path / "a.jsonl", [pair(n) for n in range(600)])
    train, held = read(tmp_path, tokenizer, f"{{path: {file}, eval_fraction: 0.2}}")
    assert held is not None
    assert len(train.rows) + len(held.rows) == 600
    assert 80 <= len(held.rows) <= 160
    assert not set(texts(train)) & set(texts(held))
    assert train.rows.column_names == held.rows.column_names == ["input_ids", "labels"]
    assert train.counts.tokens == sum(map(len, texts(train)))
    assert held.counts.trained_tokens == 2 * len(held.rows)
    assert f"{len(held.rows)} held out" in train.summarise()
    shown = [tuple(row.input_ids.tolist()) for row in train.first]
    assert shown and set(shown) <= set(texts(train))


def test_rows_stay_on_their_side_when_others_are_added(tmp_path: Path, tokenizer) -> None:
    few = write(tmp_path / "a.jsonl", [pair(n) for n in range(300)])
    many = write(tmp_path / "b.jsonl", [pair(n) for n in reversed(range(600))])
    before = read(tmp_path, tokenizer, f"{{path: {few}, eval_fraction: 0.2}}")
    after = read(tmp_path, tokenizer, f"{{path: {many}, eval_fraction: 0.2}}")
    for old, new in zip(before, after):
        assert set(texts(old)) <= set(texts(new))


def test_equal_rows_of_a_mix_are_on_one_side(tmp_path: Path, tokenizer) -> None:
    """Also where they stand in other formats, and weigh otherwise."""
    one = write(tmp_path / "a.jsonl", [pair(n) for n in range(200)] * 2)
    other = write(tmp_path / "b.jsonl", [turns(n) for n in range(100, 300)])
    mix = f"{{mix: [{{path: {one}, weight: 2}}, {{path: {other}, weight: 0.5}}], eval_rows: 50}}"
    train, held = read(tmp_path, tokenizer, mix)
    assert held is not None
    assert not set(texts(train)) & set(texts(held))
    assert len(set(texts(held))) == 50
    assert len(set(texts(train)) | set(texts(held))) > 250  # a part of the second is not drawn


def test_rows_that_differ_in_what_is_not_read_are_equal(tmp_path: Path, tokenizer) -> None:
    """An id of a turn, a name, tools: this template reads none of them."""
    rows = [turns(n) for n in range(100)]
    for n in range(100):
        named = turns(n) | {"tools": [{"type": "function", "function": {"name": f"f{n}"}}]}
        for message in named["messages"]:
            message |= {"id": n, "name": None if n % 2 else f"u{n}"}
        rows.append(named)
    file = write(tmp_path / "a.jsonl", rows)
    train, held = read(tmp_path, tokenizer, f"{{path: {file}, eval_rows: 30}}")
    assert held is not None
    assert len(held.rows) == 60
    assert not set(texts(train)) & set(texts(held))


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_labels_by_name_and_by_number_say_the_same(task: str, tmp_path: Path, tokenizer) -> None:
    names = ["O", "B-x"]
    files = []
    for file, labels in (("a", names), ("b", range(2))):
        rows = [{"text": f"w{n}", "label": labels[n % 2]} for n in range(60)]
        if task == "token_classification":
            rows = [{"tokens": [row["text"]], "tags": [row["label"]]} for row in rows]
        files.append(write(tmp_path / f"{file}.jsonl", rows))
    mix = f"{{mix: [{{path: {files[0]}}}, {{path: {files[1]}}}], eval_rows: 20}}"
    kind = "model.problem_type=single_label_classification"
    train, held = read(tmp_path, tokenizer, mix, f"task={task}", "model.labels=[O, B-x]", kind)
    assert held is not None and len(held.rows) == 40
    assert not set(texts(train)) & set(texts(held))


def test_what_a_stream_holds_out_never_comes(tmp_path: Path, tokenizer) -> None:
    """Also not when the data are read again, and where it stands beyond the first rows."""
    file = write(tmp_path / "a.jsonl", [pair(n) for n in range(100)])
    data = f"{{path: {file}, eval_rows: 30, streaming: true, shuffle_buffer: 10}}"
    train, held = read(tmp_path, tokenizer, data, "training.max_steps=5")
    assert held is not None and held.stream is None and train.stream is not None
    drawn = [tuple(row["input_ids"]) for row in islice(train.stream, 210)]
    assert not set(drawn) & set(texts(held))
    assert len(set(drawn)) == 70
    assert set(next(iter(train.stream))) == {"input_ids", "labels"}


def test_a_mix_of_streams_holds_out(tmp_path: Path, tokenizer) -> None:
    one = write(tmp_path / "a.jsonl", [pair(n) for n in range(60)])
    other = write(tmp_path / "b.jsonl", [turns(n) for n in range(40, 100)])
    mix = f"{{mix: [{{path: {one}}}, {{path: {other}}}], eval_rows: 20, streaming: true}}"
    train, held = read(tmp_path, tokenizer, mix, "training.max_steps=5")
    assert held is not None and train.stream is not None
    drawn = {tuple(row["input_ids"]) for row in islice(train.stream, 300)}
    assert not drawn & set(texts(held))
    assert len(drawn) > 70


def test_a_stream_of_a_mix_that_is_held_out_whole_is_refused(tmp_path: Path, tokenizer) -> None:
    """Nothing would ever be drawn of it: the run waited for it without end."""
    files = [write(tmp_path / f"{n}.jsonl", [pair(n)]) for n in range(2)]
    mix = f"{{mix: [{{path: {files[0]}}}, {{path: {files[1]}}}], eval_rows: 1, streaming: true}}"
    with pytest.raises(LoraError, match="held out to evaluate on, and nothing is left to draw"):
        read(tmp_path, tokenizer, mix, "training.max_steps=5")


def test_pieces_of_a_row_stay_together(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": " ".join(f"w{100 * n + word}" for word in range(60))} for n in range(6)]
    file = write(tmp_path / "a.jsonl", rows)
    data = f"{{path: {file}, eval_rows: 2, on_long_row: split}}"
    train, held = read(tmp_path, tokenizer, data, "training.max_length=16")
    assert held is not None

    def rows_of(prepared: Prepared) -> set[int]:
        return {(word - 4) // 100 for ids in texts(prepared) for word in ids if word > 3}

    assert len(rows_of(held)) == 2
    assert not rows_of(train) & rows_of(held)


def test_the_share_does_not_prepare_the_rows_anew(tmp_path: Path, tokenizer, capsys) -> None:
    file = write(tmp_path / "a.jsonl", [pair(n) for n in range(200)])
    read(tmp_path, tokenizer, f"{{path: {file}, eval_fraction: 0.2}}")
    capsys.readouterr()
    read(tmp_path, tokenizer, f"{{path: {file}, eval_rows: 7}}")
    assert "prepared before" in capsys.readouterr().err
    read(tmp_path, tokenizer, f"{{path: {file}}}")
    assert "prepared before" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("eval_rows: 5", "5 of 5 different rows would leave none to train on"),
        ("eval_fraction: 0.0001", "holds none out"),
        ("eval_fraction: 0.9999", "holds all of them out"),
        ("eval_fraction: 0.1, eval_rows: 3", "exclude each other"),
        ("eval_fraction: 0.1, eval_split: test", "exclude each other"),
        ("eval_fraction: 1.5", "eval_fraction"),
        (
            "eval_rows: 3}\ntraining: {eval_strategy: no",
            "nobody looks at the rows of data.eval_rows",
        ),
    ],
)
def test_what_cannot_be_held_out_is_refused(
    tmp_path: Path, tokenizer, held: str, message: str
) -> None:
    file = write(tmp_path / "a.jsonl", [pair(n) for n in range(5)] * 3)
    with pytest.raises(LoraError, match=message):
        read(tmp_path, tokenizer, f"{{path: {file}, {held}}}")


@pytest.mark.parametrize("held", ["eval_rows: 1", "eval_fraction: 0.5"])
def test_rows_that_all_say_the_same_ask_for_others(tmp_path: Path, tokenizer, held: str) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1)] * 3)
    with pytest.raises(LoraError, match="all rows say the same") as raised:
        read(tmp_path, tokenizer, f"{{path: {file}, {held}}}")
    assert "--set" not in raised.value.hint
