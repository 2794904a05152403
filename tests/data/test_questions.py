"""Questions with their texts: what rows may look like, which windows they become, where answers are
in them, and what is refused.

Hermetic: files in a temporary folder, a tokenizer of some twenty words. Alone: pytest
tests/data/test_questions.py
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.data import cache, load, prepare
from lora_cli.data.questions import QuestionEncoder, cut_windows
from lora_cli.plan import task_settings
from lora_cli.recipe import load_recipe
from tests import tasks

CONTEXT = "table house good nice river"
GOOD = {"text": "good nice", "answer_start": 12}


def row(answers: Any = (GOOD,), context: Any = CONTEXT, **more: Any) -> dict[str, Any]:
    kept = list(answers) if isinstance(answers, tuple) else answers
    return {"question": "lovely", "context": context, "answers": kept, **more}


class Loader:
    """Prepares rows as a training does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, tasks.make_tokenizer()

    def write(self, rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        text = "".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in rows)
        path.write_text(text)
        return path

    def settle(self, path: Path, *overrides: str) -> Any:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(
            f"task: question_answering\nmodel: {{name_or_path: m}}\ndata: {{path: {path}}}\n"
        )
        return task_settings.settle_labels(load_recipe(recipe, list(overrides)))[0]

    def __call__(self, rows: Any, *overrides: str) -> prepare.Prepared:
        path = rows if isinstance(rows, Path) else self.write(rows)
        return load.load_rows(self.settle(path, *overrides), self.tokenizer)[0]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    return Loader(tmp_path)


def show(found: prepare.Prepared, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The words of each row, and those between its labels."""
    shown = []
    for each in found.rows:
        first, last = each["labels"]
        words = tokenizer.convert_ids_to_tokens(each["input_ids"])
        shown.append((" ".join(words), " ".join(words[first : last + 1])))
    return shown


WHOLE = "[CLS] lovely [SEP] table house good nice river [SEP]"


@pytest.mark.parametrize(
    "answers",
    [
        [GOOD],
        {"text": ["good nice"], "answer_start": [12]},
        {"text": "good nice", "answer_start": 12},
        json.dumps([GOOD]),
        json.dumps({"text": ["good nice"], "answer_start": [12]}),
        [{"text": " good nice ", "answer_start": 11}],
    ],
)
def test_answers_are_given_in_several_ways(loaded: Loader, answers: Any) -> None:
    found = loaded([row(answers)])
    assert show(found, loaded.tokenizer) == [(WHOLE, "good nice")]
    assert not found.counts.list_reasons()


@pytest.mark.parametrize("answers", [[], {"text": [], "answer_start": []}, "[]"])
def test_no_answer_is_the_first_token(loaded: Loader, answers: Any) -> None:
    found = loaded([row(answers), row(answers, is_impossible=True)])
    assert show(found, loaded.tokenizer) == [(WHOLE, "[CLS]")] * 2
    assert found.counts.list_reasons() == "2 without an answer"
    assert found.summarise() == "2 of 2 rows, 18 tokens (2 without an answer)"


def test_squad_s_own_files_give_the_same_rows(loaded: Loader) -> None:
    flat = loaded([row(), row([])])
    asked = [{"question": "lovely", "answers": [GOOD], "id": "1"}]
    asked += [{"question": "lovely", "answers": [], "is_impossible": True}]
    nested = {"version": "v2.0", "data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]}
    path = loaded.folder / "squad.json"
    path.write_text(json.dumps(nested))
    found = loaded(path)
    assert found.rows[:] == flat.rows[:]
    assert [each.place for each in found.first] == [
        f"{path}, question 1",
        f"{path}, data.0.paragraphs.0.qas.1",
    ]


def test_columns_of_other_names_are_known_or_named(loaded: Loader) -> None:
    renamed = {"question": "lovely", "passage": CONTEXT, "answers": [GOOD]}
    assert show(loaded([renamed]), loaded.tokenizer)[0][1] == "good nice"
    strange = {"ask": "lovely", "where": CONTEXT, "said": [GOOD]}
    with pytest.raises(
        LoraError, match=r"ask, where, said \(lists\) match no known format"
    ) as error:
        loaded([strange])
    assert error.value.hint == (
        "--set data.columns='{question: ask, context: where, answers: said}'"
    )
    columns = "data.columns={question: ask, context: where, answers: said}"
    assert show(loaded([strange], columns), loaded.tokenizer)[0][1] == "good nice"


# Windows ------------------------------------------------------------------------------------------


def test_windows_are_those_of_the_tokenizer() -> None:
    """Against truncation="only_second" with overflow, for texts, questions and strides at random."""
    tokenizer, chosen, several = tasks.make_tokenizer(), random.Random(0), 0
    for _ in range(1000):
        question = " ".join(chosen.choices(tasks.OTHER, k=chosen.randint(1, 6)))
        context = " ".join(chosen.choices(tasks.GOOD, k=chosen.randint(1, 60)))
        limit = chosen.randint(24, 40)
        begin = 2 + len(question.split())
        room = limit - begin - 1
        stride = chosen.randint(0, room // 2)
        cut = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=limit,
            stride=stride,
            return_overflowing_tokens=True,
        )
        ids = tokenizer(question, context)["input_ids"]
        windows = list(cut_windows(begin, len(ids) - 1, room, stride))
        assert [ids[:begin] + ids[a:b] + ids[-1:] for a, b in windows] == cut["input_ids"]
        several += len(windows) > 1
    assert several > 400


def test_a_stride_is_half_of_a_window_at_most() -> None:
    assert list(cut_windows(0, 10, 4, 99)) == list(cut_windows(0, 10, 4, 2))
    assert list(cut_windows(0, 10, 4, 2)) == [(0, 4), (2, 6), (4, 8), (6, 10)]


def test_each_window_knows_whether_it_has_the_answer(loaded: Loader) -> None:
    """Texts of up to 40 words in windows of 24 tokens: the words between labels are an answer, and
    windows that have none of them whole say that there is none."""
    path = tasks.write_questions(loaded.folder / "q.jsonl", 200)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    overrides = ("training.max_length=24", "data.stride=6")
    found = loaded(path, *overrides)
    answers = [[each["text"] for each in row["answers"]] for row in rows]
    with_answer, windows_of = set(), dict.fromkeys(range(200), 0)
    assert len(found.rows) > 250
    for each, (words, marked) in zip(found.rows, show(found, loaded.tokenizer)):
        [number] = each["question"]
        windows_of[number] += 1
        text = words.split("[SEP]")[1].strip()
        assert text in rows[number]["context"] and len(each["input_ids"]) <= 24
        held = [answer for answer in answers[number] if f" {answer} " in f" {text} "]
        assert marked == (held[0] if held else "[CLS]")
        with_answer |= {number} if held else set()
    assert with_answer == {number for number, given in enumerate(answers) if given}
    several = sum(count > 1 for count in windows_of.values())
    none = sum(not given for given in answers)
    assert found.counts.left_out["read in windows of 24 tokens"] == several > 50
    assert found.counts.left_out["without an answer"] == none > 20
    assert found.counts.windows == len(found.rows) - 200
    assert found.summarise().startswith(f"{len(found.rows)} windows of 200 rows, ")


def test_what_an_evaluation_needs_lies_beside_each_row(loaded: Loader) -> None:
    """Places are those in the whole text; cut out of the window's own they give its words again."""
    path = tasks.write_questions(loaded.folder / "q.jsonl", 40, seed=1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for each in loaded(path, "training.max_length=24").rows:
        whole = rows[each["question"][0]]
        assert json.loads(bytes(each["answers"])) == [one["text"] for one in whole["answers"]]
        spans = [pair for pair in zip(each["starts"], each["ends"]) if pair != (-1, -1)]
        assert len(each["starts"]) == len(each["input_ids"]) > len(spans)
        words = [whole["context"][start:end] for start, end in spans]
        assert " ".join(words) == bytes(each["context"]).decode()


def test_the_first_answer_that_a_window_has_is_taken(loaded: Loader) -> None:
    context = f"good {'table ' * 20}nice"
    answers = [{"text": "nice", "answer_start": len(context) - 4}, {**GOOD, "answer_start": 0}]
    answers[1]["text"] = "good"
    found = loaded([row(answers, context)], "training.max_length=21")
    assert [marked for _, marked in show(found, loaded.tokenizer)] == ["good", "nice"]


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_a_long_text_may_be_left_out_or_an_error(loaded: Loader, policy: str) -> None:
    rows = [row(), row([], "table " * 60)]
    overrides = ("training.max_length=24", f"data.on_long_row={policy}")
    if policy == "error":
        with pytest.raises(LoraError, match=r"rows.jsonl:2: 64 tokens, over training.max_length"):
            loaded(rows, *overrides)
        return
    found = loaded(rows, *overrides)
    assert len(found.rows) == 1 and not found.counts.windows
    assert "1 dropped: over 24 tokens" in found.summarise()


def test_an_answer_longer_than_a_window_is_left_out_and_counted(loaded: Loader) -> None:
    text = "good " * 30 + "river"
    answer = {"text": text[:-6], "answer_start": 0}
    found = loaded([row(), row([answer], text)], "training.max_length=24")
    assert len(found.rows) == 1
    reason = "dropped: with an answer longer than a window of 24 tokens"
    assert found.counts.left_out[reason] == 1
    with pytest.raises(LoraError, match="no rows are left to train on") as error:
        loaded([row([answer], text)], "training.max_length=24")
    assert error.value.hint == "--set training.max_length=35"
    assert len(loaded([row([answer], text)], "training.max_length=35").rows) == 1


def test_long_answers_are_counted_that_no_evaluation_looks_for(loaded: Loader) -> None:
    text = "good " * 31
    said = "1 with an answer of over 30 tokens"
    assert said in loaded([row([{"text": text, "answer_start": 0}], text)]).summarise()
    longer = "data.longest_answer=31"
    assert said not in loaded([row([{"text": text, "answer_start": 0}], text)], longer).summarise()


@pytest.mark.parametrize(("start", "text"), [(13, "ood nice"), (12, "good nic")])
def test_an_answer_within_a_token_is_widened_and_counted(
    loaded: Loader, start: int, text: str
) -> None:
    found = loaded([row([{"text": text, "answer_start": start}]), row()])
    assert [marked for _, marked in show(found, loaded.tokenizer)] == ["good nice"] * 2
    assert found.counts.list_reasons() == "1 with an answer widened to whole tokens"


def test_blanks_that_a_token_begins_with_widen_no_answer(loaded: Loader) -> None:
    """Tokens of bytes begin with the blank before their word, and offsets count it."""
    words = ["good", "nice", "table", "house", "river", "lovely"]
    vocabulary = ["<pad>", "Ġ", *map(chr, range(97, 123)), *words, *(f"Ġ{word}" for word in words)]
    unigram = models.Unigram(
        [(token, -float(len(vocabulary) - len(token))) for token in vocabulary]
    )
    bytes_of = Tokenizer(unigram)
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    loaded.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of, pad_token="<pad>")
    given = loaded.tokenizer("lovely", CONTEXT, return_offsets_mapping=True)
    assert (11, 16) in given["offset_mapping"]  # the blank is counted
    found = loaded([row()])
    assert [marked for _, marked in show(found, loaded.tokenizer)] == ["Ġgood Ġnice"]
    assert not found.counts.list_reasons()


# Refused ------------------------------------------------------------------------------------------

MEND = "mend or remove the row, or --set data.on_bad_row=skip"
EMPTY = "a question without an answer has an empty list: answers: []"
BAD = {
    "misplaced": (
        row([{"text": "good", "answer_start": 6}]),
        "the answer 'good' is not at answer_start 6, where 'hous' stands: it stands at 12",
        MEND,
    ),
    "counted from one": (
        row([{"text": "good", "answer_start": 13}]),
        "the answer 'good' is not at answer_start 13, where 'ood ' stands: it stands at 12",
        "answer_start counts characters from 0",
    ),
    "counted in bytes": (
        row([{"text": "good", "answer_start": 11}], "tüß ää good nice"),
        "the answer 'good' is not at answer_start 11, where ' nic' stands: it stands at 7",
        "answer_start counts characters, and not bytes",
    ),
    "nearest": (
        row([{"text": "a", "answer_start": 5}], "a b c d a b"),
        "the answer 'a' is not at answer_start 5, where ' ' stands: it stands at 8",
        MEND,
    ),
    "nowhere": (
        row([{"text": "Paris", "answer_start": 3}]),
        "the answer 'Paris' is not at answer_start 3, where 'le ho' stands: it is nowhere in the "
        "context",
        MEND,
    ),
    "behind the end": (
        row([{"text": "good", "answer_start": 99}]),
        "the answer 'good' is not at answer_start 99: it stands at 12",
        MEND,
    ),
    "before the beginning": (
        row([{"text": "good", "answer_start": -1}]),
        "the answer 'good' is not at answer_start -1: it stands at 12",
        MEND,
    ),
    "empty": (row([{"text": " ", "answer_start": 5}]), "an answer is empty", EMPTY),
    "null": (
        row(None),
        "answers are None, but must be a list of {text, answer_start}",
        EMPTY,
    ),
    "a name": (
        row("good nice"),
        "answers are text, but must be a list of {text, answer_start}",
        EMPTY,
    ),
    "texts alone": (
        row(["good"]),
        "an answer is \"good\", not {text, answer_start}",
        MEND,
    ),
    "a place that is text": (
        row([{"text": "good", "answer_start": "12"}]),
        'an answer is {"text": "good", "answer_start": "12"}, not {text, answer_start}',
        MEND,
    ),
    "fewer places": (
        row({"text": ["good", "nice"], "answer_start": [12]}),
        "there are 2 texts of answers and 1 answer_start",
        MEND,
    ),
    "impossible": (
        row(is_impossible=True),
        "is_impossible is true, and there is the answer 'good nice'",
        MEND,
    ),
    "possible": (
        row([], is_impossible=False),
        "is_impossible is false, and there is no answer",
        MEND,
    ),
    "perhaps": (row(is_impossible="perhaps"), 'is_impossible is "perhaps"', MEND),
    "no question": (row() | {"question": " "}, "question is empty", MEND),
    "no text": (row(context=7), "context is a number (7), but must be text", MEND),
    "half a character": (
        '{"question": "good", "context": "nice \\ud800", "answers": []}\n',
        "its text has \\ud800, which is half a character",
        MEND,
    ),
    "no tokens": (row([], "\u200b"), "the context has no tokens", MEND),
    "an answer without tokens": (
        row([{"text": "\u200b", "answer_start": 5}], "good \u200b nice"),
        "the answer '\\u200b' has no tokens",
        MEND,
    ),
    "no room": (
        row([], "table " * 30) | {"question": "lovely " * 9},
        "the question has 12 tokens with those around it, which leaves room for 12 of its text "
        "within 24 tokens",
        "--set training.max_length=28, or more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_named_with_its_line(loaded: Loader, name: str) -> None:
    given, said, hint = BAD[name]
    if name in ("no tokens", "an answer without tokens"):  # a tokenizer that leaves marks out
        left_out = [pre_tokenizers.Split(mark, "removed") for mark in (" ", "\u200b")]
        loaded.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(left_out)
    rows = [row(), given]
    with pytest.raises(LoraError) as error:
        loaded(rows, "training.max_length=24")
    assert error.value.message == f"{loaded.folder}/rows.jsonl:2: {said}"
    assert error.value.hint == hint
    kept = loaded(rows, "training.max_length=24", "data.on_bad_row=skip")
    assert len(kept.rows) == 1 and kept.counts.left_out["dropped: bad"] == 1


def test_a_question_that_fills_a_row_leaves_room_for_a_short_text(loaded: Loader) -> None:
    """The whole text fits, however short it is."""
    found = loaded([row([], "table") | {"question": "lovely " * 20}], "training.max_length=24")
    assert len(found.rows) == 1
    with pytest.raises(LoraError, match="leaves room for 0 of its text"):
        loaded([row([], "table") | {"question": "lovely " * 21}], "training.max_length=24")


def test_control_tokens_that_people_wrote_are_said(loaded: Loader, capfd) -> None:
    loaded([row([], "table [SEP] house"), row([], "table [UNK] house")])
    assert "1 row has control tokens in their text" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (
            "data: {path: x.jsonl, on_long_row: truncate}\ntask: question_answering\n",
            "data.on_long_row: truncate has no meaning for rows of task: question_answering",
            "on_long_row: split, or drop or error",
        ),
        (
            "data: {path: x.jsonl, on_long_row: split}\ntask: token_classification\n",
            "data.on_long_row: split has no meaning for rows of task: token_classification",
            "on_long_row: drop, or truncate or error",
        ),
        (
            "data: {path: x.jsonl, stride: 64}\n",
            "data.stride has no effect with task: causal_lm",
            "leave it out",
        ),
        (
            "data: {path: x.jsonl, longest_answer: 64}\ntask: sequence_classification\n",
            "data.longest_answer has no effect with task: sequence_classification",
            "leave it out",
        ),
    ],
)
def test_what_has_no_meaning_is_a_contradiction(tmp_path: Path, text, said, hint) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{name_or_path: m}}\n{text}")
    with pytest.raises(UsageError) as error:
        load_recipe(recipe)
    assert re.fullmatch(r".*r.yaml:\d+: (.*)", error.value.message)[1] == said
    assert error.value.hint == hint


def test_a_stride_of_most_of_a_window_is_refused(loaded: Loader) -> None:
    said = "data.stride: windows of up to 384 tokens share half of them at most"
    with pytest.raises(UsageError, match=said) as error:
        loaded([row()], "training.max_length=384", "data.stride=193")
    assert error.value.hint == "--set data.stride=192, or less"
    assert loaded([row()], "training.max_length=384", "data.stride=192").rows
    assert loaded([row()], "training.max_length=24").rows  # half is taken of the default


def test_a_settled_recipe_says_what_becomes_of_long_rows(loaded: Loader) -> None:
    """And loads as it is: no default of another task's stands in it."""
    path = loaded.write([row()])
    settled = loaded.settle(path)
    assert settled.data.on_long_row == "split"
    assert loaded.settle(path, "data.on_long_row=drop").data.on_long_row == "drop"
    written = loaded.folder / "settled.yaml"
    written.write_text(json.dumps(settled.to_data()))
    again = task_settings.settle_labels(load_recipe(written, ["training.max_length=24"]))[0]
    assert again.data.on_long_row == "split"
    assert load.load_rows(again, loaded.tokenizer)[0].rows


def test_kept_rows_are_read_again_and_labels_looked_at(loaded: Loader, capfd) -> None:
    rows = [row(), row([])]
    once = loaded(rows)
    again = loaded(rows)
    assert again.rows[:] == once.rows[:] and again.counts == once.counts
    assert "prepared before" in capfd.readouterr().err
    [entry] = cache.find_folder().iterdir()
    recipe = loaded.settle(loaded.folder / "rows.jsonl")
    encoder = load.make_encoder(recipe, loaded.tokenizer)
    assert isinstance(encoder, QuestionEncoder)
    assert cache.read(entry, encoder, recipe.data) is not None
    lengths = np.array([9, 9])
    ids = np.zeros(18, np.int32)
    good = np.array([5, 6, 0, 0])
    assert encoder.are_labels(ids, good, lengths)
    for wrong in ([5, 9, 0, 0], [6, 5, 0, 0], [-1, 0, 0, 0], [5, 6]):
        assert not encoder.are_labels(ids, np.array(wrong), lengths)


@pytest.mark.parametrize("override", ["data.stride=4", "data.longest_answer=9"])
def test_its_own_options_make_another_entry(loaded: Loader, override: str) -> None:
    loaded([row()])
    loaded([row()], override)
    assert len(list(cache.find_folder().iterdir())) == 2


def test_a_row_is_shown_with_its_answer(loaded: Loader, tmp_path: Path) -> None:
    found = loaded([row(), row([])])
    encoder = load.make_encoder(loaded.settle(tmp_path / "rows.jsonl"), loaded.tokenizer)
    shown: Callable[[int], Any] = lambda at: encoder.split_by_loss(found.first[at])  # noqa: E731
    assert shown(0) == [
        (False, "[CLS] lovely [SEP] table house"),
        (True, "good nice"),
        (False, "river [SEP]"),
    ]
    assert shown(1) == [
        (True, "[CLS]"),
        (False, "lovely [SEP] table house good nice river [SEP]"),
    ]
