"""Pairs of a source and a target: which columns they are read from, how they are encoded, cut,
counted and put together to batches.

Compared with the tokenizer's own calls and with transformers' DataCollatorForSeq2Seq. Hermetic: a
tokenizer of twenty words, random models of one layer. Alone: pytest tests/data/test_pairs.py
"""

from __future__ import annotations

import json
import shlex
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_cli.common import LoraError
from lora_cli.data import cache, load, prepare
from lora_cli.data.collate import PairCollator
from lora_cli.data.pairs import find_pair
from lora_cli.models import decoder, languages
from lora_cli.recipe import Recipe, load_recipe
from tests import tasks

LETTERS = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [
    (letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"
]
GERMAN_TO_ROMANIAN = ("data.source_language=de_DE", "data.target_language=ro_RO")


@pytest.fixture
def load_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`load_pairs(rows, *overrides)` prepares rows by a recipe for pairs, with a cache of its
    own."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(rows: list[dict[str, Any]], *overrides: str) -> prepare.Prepared:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load.load_rows(make_recipe(*overrides), tasks.make_tokenizer())[0]

    return run


def make_recipe(*overrides: str) -> Recipe:
    Path("r.yaml").write_text(
        "task: seq2seq_lm\nmodel: {name_or_path: x}\ndata: {path: rows.jsonl}\n"
    )
    return load_recipe(Path("r.yaml"), list(overrides))


def decode(ids: list[int]) -> str:
    return str(tasks.make_tokenizer().decode(ids, skip_special_tokens=True))


A, B = "glass house", "tree"
COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "source and target": ({"source": A, "target": B}, ""),
    "news": ({"article": A, "highlights": B, "id": "1"}, "article as source, highlights as target"),
    "documents": ({"document": A, "summary": B}, "document as source, summary as target"),
    "texts": ({"text": A, "summary": B}, "text as source, summary as target"),
    "prompts": ({"prompt": A, "completion": B}, "prompt as source, completion as target"),
    "questions": ({"question": A, "answer": B}, "question as source, answer as target"),
    "inputs": ({"input": A, "output": B}, "input as source, output as target"),
    "languages": (
        {"id": 1, "translation": {"de": A, "en": B}},
        "translation.de as source, translation.en as target",
    ),
}


@pytest.mark.parametrize(("row", "said"), COLUMNS.values(), ids=COLUMNS)
def test_columns_that_people_use(load_pairs, capfd, row: dict[str, Any], said: str) -> None:
    [kept] = load_pairs([row]).first
    assert (decode(kept.input_ids), decode(kept.labels)) == (A, B)
    assert (f"columns: {said}\n" in capfd.readouterr().err) == bool(said)


def test_an_instruction_and_its_input_are_one_source(load_pairs) -> None:
    [kept] = load_pairs([{"instruction": "tree", "input": "paper", "output": "stone"}]).first
    assert (decode(kept.input_ids), decode(kept.labels)) == ("tree paper", "stone")


def test_a_dot_leads_into_a_column_of_mappings(load_pairs) -> None:
    row = {"translation": {"de": A, "en": B, "fr": "paper"}}
    columns = "data.columns={source: translation.fr, target: translation.de}"
    [kept] = load_pairs([row], columns).first
    assert (decode(kept.input_ids), decode(kept.labels)) == ("paper", A)


def test_of_three_languages_two_have_to_be_named(load_pairs) -> None:
    row = {"translation": {"de": A, "en": B, "fr": "paper"}}
    with pytest.raises(LoraError, match=r"translation\.fr match no known format") as raised:
        load_pairs([row])
    name, option = shlex.split(str(raised.value.hint))
    assert name == "--set"
    [kept] = load_pairs([row], option).first
    assert (decode(kept.input_ids), decode(kept.labels)) == (A, "paper")


def test_rows_of_parquet_have_their_languages(load_pairs, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"translation": {"de": A, "en": B}}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = load_pairs([], f"data.path={tmp_path / 'rows.parquet'}")
    assert [decode(row.labels) for row in found.first] == [B] * 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"document": A, "summary": B}, (A, B)),
        ({"translation": {"de": A, "en": B}}, (A, B)),
        ({"text": A}, None),
        ({"messages": []}, None),
        ({"instruction": A, "output": B}, None),
    ],
)
def test_a_row_alone_is_known_as_a_pair(row: dict[str, Any], expected: Any) -> None:
    assert find_pair(row) == expected


def test_ids_are_those_of_the_tokenizer(load_pairs) -> None:
    rows = [{"source": text, "target": B} for text, _ in tasks.make_texts(40)]
    found = load_pairs(rows, "data.source_prefix=paper , ")
    tokenizer = tasks.make_tokenizer()
    for row, kept in zip(rows, found.rows):
        assert kept["input_ids"] == tokenizer("paper , " + row["source"])["input_ids"]
        assert kept["labels"] == tokenizer(text_target=row["target"])["input_ids"]
    counts = found.counts
    assert counts.trained_tokens == 3 * 40
    assert counts.tokens == sum(len(kept["input_ids"]) + 3 for kept in found.rows)


LONG = [
    {"source": "tree " * 8, "target": "paper " * 2},
    {"source": "tree " * 2, "target": "paper " * 8},
    {"source": "tree " * 8, "target": "paper " * 8},
    {"source": "tree " * 2, "target": "paper " * 2},
]
SHORT = ("training.max_length=6", "data.max_target_length=5")


def test_long_sources_and_long_targets_are_counted_apart(load_pairs) -> None:
    dropped = load_pairs(LONG, *SHORT)
    assert len(dropped.rows) == 1
    assert dict(+dropped.counts.left_out) == {
        "dropped: source over 6 tokens": 2,
        "dropped: target over 5 tokens": 1,
    }
    assert dropped.counts.target_lengths == {4: 2, 10: 2}
    cut = load_pairs(LONG, *SHORT, "data.on_long_row=truncate")
    assert len(cut.rows) == 4
    assert dict(+cut.counts.left_out) == {
        "sources cut at 6 tokens": 2,
        "targets cut at 5 tokens": 2,
    }
    first, last = tasks.CLS, tasks.SEP
    for row in cut.rows:
        for name, longest in (("input_ids", 6), ("labels", 5)):
            assert row[name][0] == first  # what begins and ends a text stays
            assert row[name][-1] == last
            assert len(row[name]) <= longest


def test_targets_are_as_long_as_sources_unless_they_have_a_limit(load_pairs) -> None:
    found = load_pairs(LONG, "training.max_length=6")
    assert found.counts.left_out["dropped: target over 6 tokens"] == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (LONG[0], r"rows.jsonl:1: the source has 10 tokens, over training.max_length 6"),
        (LONG[1], r"rows.jsonl:1: the target has 10 tokens, over data.max_target_length 5"),
        ({"source": "tree", "target": " "}, "rows.jsonl:1: target is empty"),
        ({"source": None, "target": "tree"}, "rows.jsonl:1: source is null, but must be text"),
        ({"source": "\ud800", "target": "tree"}, r"its text has \\ud800, which is half a char"),
        (
            {"translation": {"de": "a"}, "source": "b"},
            "columns translation.de, source match no known format",
        ),
    ],
)
def test_what_cannot_be_trained_on(load_pairs, row: dict[str, Any], said: str) -> None:
    with pytest.raises(LoraError, match=said):
        load_pairs([row], *SHORT, "data.on_long_row=error")


def test_only_long_targets_are_told_by_their_key(load_pairs) -> None:
    with pytest.raises(LoraError, match="no rows are left") as raised:
        load_pairs(LONG[1:2], *SHORT)
    assert raised.value.hint == "--set data.max_target_length=10"


@pytest.mark.parametrize(
    "override",
    ["data.source_prefix=tree", "data.max_target_length=7", "training.max_length=7"],
)
def test_what_decides_pairs_makes_another_entry(load_pairs, override: str) -> None:
    load_pairs(LONG)
    load_pairs(LONG, override)
    assert len(list(cache.find_folder().iterdir())) == 2


def test_languages_make_another_entry(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer, day = tasks.make_tokenizer(), date(2026, 1, 1)
    recipes = make_recipe(), make_recipe(*GERMAN_TO_ROMANIAN)
    keys = {cache.make_key("x", ["y"], recipe, tokenizer, day) for recipe in recipes}
    assert len(keys) == 2


def rows_of(*lengths: tuple[int, int]) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(0)
    return [
        {
            name: torch.randint(5, 20, (length,), generator=drawn).tolist()
            for name, length in zip(("input_ids", "labels"), pair)
        }
        for pair in lengths
    ]


SIDES: dict[str, Any] = {
    f"{side}_{what}": 1
    for side in ("encoder", "decoder")
    for what in ("layers", "attention_heads", "ffn_dim")
}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=24, d_model=4, d_kv=4, d_ff=4, num_layers=1, num_heads=1,
                 decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(vocab_size=24, d_model=4, **SIDES, decoder_start_token_id=3, **tasks.ROLES)
    ),
    "mbart": lambda: MBartForConditionalGeneration(
        MBartConfig(vocab_size=24, d_model=4, **SIDES, **tasks.ROLES)
    ),
}  # fmt: skip


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_batches_are_those_of_transformers_collator(name: str, multiple: int | None) -> None:
    network, tokenizer = MODELS[name](), tasks.make_tokenizer()
    rows = rows_of((5, 3), (9, 2), (2, 7))
    ours = PairCollator(tokenizer, partial(decoder.shift_labels, network), multiple)(rows)
    theirs = DataCollatorForSeq2Seq(tokenizer, network, pad_to_multiple_of=multiple)(rows)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert (ours["labels"] == -100).any()
    assert not (ours["decoder_input_ids"] == -100).any()


def test_rows_are_filled_at_their_ends_whatever_the_tokenizer_does() -> None:
    tokenizer = tasks.make_tokenizer()
    tokenizer.padding_side = "left"
    rows = rows_of((5, 3), (2, 7))
    made = PairCollator(tokenizer, partial(decoder.shift_labels, MODELS["bart"]()))(rows)
    for at, row in enumerate(rows):
        for name in ("input_ids", "labels"):
            assert made[name][at, : len(row[name])].tolist() == row[name]


def test_rows_of_a_stream_are_arrays() -> None:
    rows = [{name: np.array(ids, np.int32) for name, ids in row.items()} for row in rows_of((3, 2))]
    shift = partial(decoder.shift_labels, MODELS["t5"]())
    assert PairCollator(tasks.make_tokenizer(), shift)(rows)["labels"].shape == (1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_a_row_takes_part(name: str) -> None:
    empty = [{"input_ids": [0, 0], "labels": [-100, -100]}]
    shift = partial(decoder.shift_labels, MODELS[name]())
    made = PairCollator(tasks.make_tokenizer(), shift)(empty)
    assert made["decoder_input_ids"].tolist() == [[0, 0]]


# Languages ----------------------------------------------------------------------------------------


def with_languages(kind: type[PreTrainedTokenizerBase], *overrides: str) -> PreTrainedTokenizerBase:
    tokenizer = kind(vocab=list(LETTERS))
    languages.set_languages(make_recipe(*overrides), tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        (MBart50Tokenizer, "de_DE ▁ a b </s>", "ro_RO ▁ b </s>"),
        (MBartTokenizer, "▁ a b </s> de_DE", "▁ b </s> ro_RO"),
    ],
)
def test_texts_are_marked_by_their_languages(
    kind: type[PreTrainedTokenizerBase], source: str, target: str, tmp_path: Path, monkeypatch
) -> None:
    """Also of the tokenizer that is saved with the adapter."""
    monkeypatch.chdir(tmp_path)
    tokenizer = with_languages(kind, *GERMAN_TO_ROMANIAN)
    tokenizer.save_pretrained("saved")
    for each in (tokenizer, kind.from_pretrained("saved")):
        assert each.convert_ids_to_tokens(each("ab")["input_ids"]) == source.split()
        assert each.convert_ids_to_tokens(each(text_target="b")["input_ids"]) == target.split()


def test_answers_begin_as_targets_do(tmp_path: Path, monkeypatch) -> None:
    """mBART-50 is fed what ends a text and writes the language first; mBART is fed the language."""
    monkeypatch.chdir(tmp_path)
    fifty = with_languages(MBart50Tokenizer, *GERMAN_TO_ROMANIAN)
    older = with_languages(MBartTokenizer, *GERMAN_TO_ROMANIAN)
    for tokenizer, forced in ((fifty, True), (older, False)):
        network = MBartForConditionalGeneration(
            MBartConfig(vocab_size=len(tokenizer), d_model=4, **SIDES, pad_token_id=1)
        )
        romanian = tokenizer.convert_tokens_to_ids("ro_RO")
        first = decoder.find_first(network, tokenizer)
        assert first.start == (tokenizer.eos_token_id if forced else romanian)
        assert first.forced == (romanian if forced else None)


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ((), "marks languages, and left to itself marks every text as en_XX", "source_language"),
        (("data.source_language=de", "data.target_language=ro_RO"), "no language de", "de_DE"),
        (
            ("data.source_language=de_DE", "data.target_language=ro_ROU"),
            "no language ro_ROU",
            "ro_RO",
        ),
    ],
)
def test_languages_are_named_and_known(
    options: tuple[str, ...], said: str, hint: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraError, match=said) as raised:
        with_languages(MBart50Tokenizer, *options)
    assert hint in str(raised.value.hint)


def test_a_saved_tokenizer_keeps_its_languages(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = with_languages(MBart50Tokenizer, *GERMAN_TO_ROMANIAN)
    languages.set_languages(make_recipe(), tokenizer)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("de_DE", "ro_RO")


def test_other_tokenizers_have_no_languages(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraError, match="marks no languages"):
        languages.set_languages(make_recipe(*GERMAN_TO_ROMANIAN), tasks.make_tokenizer())
