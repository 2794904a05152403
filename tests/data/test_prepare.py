"""Rows as tokens and labels: formats, which tokens carry loss, one BOS, what is dropped or cut, and
bad rows.

Hermetic: a word-level tokenizer made here, files in a temporary folder. Alone: pytest
tests/data/test_prepare.py
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lora_cli.common.errors import LoraError
from lora_cli.data import formats, load, selection, sources
from lora_cli.data.encode import Renderer
from lora_cli.data.offsets import OffsetFinder
from lora_cli.data.prepare import Prepared
from lora_cli.evaluate import generate
from lora_cli.models.tokenizer import IGNORED, TEMPLATES, load_tokenizer, set_chat_template
from lora_cli.recipe import Data
from lora_cli.recipe.load import load_recipe

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' + eos_token "
    "+ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at white space and punctuation, learns words as they come; adds BOS as Llama's
    tokenizer does."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        ":",
        ".",
        "user",
        "assistant",
        "system",
        "ask",
        "answer",
        "more",
        "one",
        "two",
    ]
    words += ["Below", "is", "an", "instruction", "Instruction", "Response", "Input", "###"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TURNS
    return made


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    """`prepare(rows, section, …)` trains on `rows`; sections are given as YAML."""

    def run(rows: list[dict], extra: str = "", training: str = "") -> Prepared:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "r.yaml").write_text(
            f"model: {{name_or_path: x}}\ndata: {{path: {path}, {extra}}}\ntraining: "
            f"{{{training}}}\n"
        )
        return load.load_rows(load_recipe(tmp_path / "r.yaml"), tokenizer)[0]

    return run


def learned(prepared: Prepared, tokenizer: PreTrainedTokenizerFast, row: int = 0) -> list[str]:
    """The tokens that carry loss, as words."""
    labels = prepared.rows[row]["labels"]
    assert [i for i, label in zip(prepared.rows[row]["input_ids"], labels) if label != -100] == [
        label for label in labels if label != -100
    ]
    return tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])


CONVERSATION = {
    "messages": [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "two"},
    ]
}


@pytest.mark.parametrize(
    ("row", "extra"),
    [
        ({"prompt": "ask", "completion": "answer"}, ""),
        ({"instruction": "ask", "input": "", "output": "answer"}, ""),
        (
            {
                "messages": [
                    {"role": "user", "content": "ask"},
                    {"role": "assistant", "content": "answer"},
                ]
            },
            "",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "ask"}],
                "completion": [{"role": "assistant", "content": "answer"}],
            },
            "",
        ),
        ({"question": "ask", "reply": "answer"}, "columns: {prompt: question, completion: reply}"),
        (
            {"prompt": "other", "question": "ask", "completion": "answer"},
            "columns: {prompt: question}",
        ),
    ],
)
def test_each_format_trains_the_answer_and_its_end(
    prepare, tokenizer, row: dict, extra: str
) -> None:
    prepared = prepare([row], extra)
    words = tokenizer.convert_ids_to_tokens(prepared.rows[0]["input_ids"])
    assert words == ["<s>", "user", ":", "ask", "</s>", "assistant", ":", "answer", "</s>"]
    assert learned(prepared, tokenizer) == ["answer", "</s>"]


@pytest.mark.parametrize(
    ("train_on", "words"),
    [
        ("completion", ["two", "</s>"]),
        ("assistant", ["one", "</s>", "two", "</s>"]),
    ],
)
def test_train_on_chooses_the_turns(prepare, tokenizer, train_on: str, words: list[str]) -> None:
    assert learned(prepare([CONVERSATION], f"train_on: {train_on}"), tokenizer) == words


def test_train_on_all_is_every_token(prepare, tokenizer) -> None:
    prepared = prepare([CONVERSATION], "train_on: all")
    assert prepared.rows[0]["labels"] == prepared.rows[0]["input_ids"]


def test_what_is_trained_on_is_what_inference_feeds(prepare, tokenizer) -> None:
    ids = prepare([CONVERSATION]).rows[0]["input_ids"]
    fed = tokenizer.apply_chat_template(CONVERSATION["messages"][:3], add_generation_prompt=True)[
        "input_ids"
    ]
    assert ids[: len(fed)] == fed
    assert ids.count(tokenizer.bos_token_id) == 1


def test_plain_text_gets_one_bos_and_one_eos(prepare, tokenizer) -> None:
    prepared = prepare([{"text": "one two"}, {"text": "<s> one two </s>"}])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in prepared.rows["input_ids"]] == [
        ["<s>", "one", "two", "</s>"]
    ] * 2
    assert learned(prepared, tokenizer)[-2:] == ["two", "</s>"]


def test_long_rows_are_dropped_cut_or_an_error(prepare, tokenizer) -> None:
    rows = [{"prompt": "ask", "completion": "one " * n} for n in (1, 40)]
    dropped = prepare(rows, "on_long_row: drop", "max_length: 12")
    assert (len(dropped.rows), dropped.counts.left_out["dropped: over 12 tokens"]) == (1, 1)
    cut = prepare(rows, "on_long_row: truncate", "max_length: 12")
    assert [len(ids) for ids in cut.rows["input_ids"]] == [9, 12]
    assert cut.counts.left_out["cut at 12 tokens"] == 1
    with pytest.raises(LoraError, match="rows.jsonl:2: 48 tokens, over training.max_length 12"):
        prepare(rows, "on_long_row: error", "max_length: 12")


def test_a_token_alone_teaches_nothing(prepare) -> None:
    """The first token of a row is foretold from none: without another there is no loss to divide,
    which a step of such rows alone ended as not a number."""
    rows = [
        {"text": "one two more one"},
        {"input_ids": [1]},
        {"input_ids": [1, 2], "labels": [1, -100]},
    ]
    assert [
        len(ids)
        for ids in prepare(rows[:1], "on_long_row: split", "max_length: 5").rows["input_ids"]
    ] == [5]
    one = prepare([*rows[1:], {"input_ids": [1, 2]}])
    assert (len(one.rows), one.counts.left_out["dropped: nothing to learn"]) == (1, 2)


def test_a_row_whose_answer_is_cut_off_is_dropped_and_counted(prepare) -> None:
    rows = [{"prompt": "ask", "completion": "one"}, {"prompt": "more " * 20, "completion": "one"}]
    cut = prepare(rows, "on_long_row: truncate", "max_length: 12")
    assert (len(cut.rows), cut.counts.left_out["dropped: the whole answer was cut off"]) == (1, 1)


def test_nothing_left_is_an_error_that_counts(prepare) -> None:
    with pytest.raises(
        LoraError, match=r"no rows are left to train on: 2 read \(2 dropped: over 4 tokens\)"
    ):
        prepare([{"prompt": "ask", "completion": "one"}] * 2, "", "max_length: 4")


@pytest.mark.parametrize(
    ("row", "extra", "said"),
    [
        (
            {"prompt": "ask", "completion": 3},
            "",
            "rows.jsonl:1: completion is a number (3), but must be text",
        ),
        (
            {"prompt": "ask", "completion": None},
            "",
            "rows.jsonl:1: completion is null, but must be text",
        ),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            "",
            "rows.jsonl:1: turn 0: the role 'asistant' is not",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "",
            "rows.jsonl:1: the assistant has no turn",
        ),
        ({"messages": "x"}, "", "rows.jsonl:1: messages is text, but must be a list"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
            "",
            "rows.jsonl:1: the assistant speaks first",
        ),
        ({"foo": "a", "bar": "b"}, "", "data.path: the columns foo, bar match no known format"),
        (
            {"prompt": "a", "completion": "b"},
            "columns: {prompt: promt}",
            "data.columns: there is no column promt",
        ),
        (
            {"prompt": "a", "answer": "b"},
            "format: prompt_completion",
            "there is no column completion",
        ),
    ],
)
def test_bad_rows_are_named(prepare, row: dict, extra: str, said: str) -> None:
    with pytest.raises(LoraError) as caught:
        prepare([row], extra)
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "none.jsonl does not exist"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("rows.xlsx", "x", "rows.xlsx is not one of .json"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, tokenizer, name: str, content: str | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    (tmp_path / "r.yaml").write_text(f"model: {{name_or_path: x}}\ndata: {{path: {path}}}\n")
    with pytest.raises(LoraError) as caught:
        load.load_rows(load_recipe(tmp_path / "r.yaml"), tokenizer)
    assert said in caught.value.message


ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n"
    "### Instruction:\nask\n\n{}### Response:\n"
)


@pytest.mark.parametrize(
    ("more", "prompt"),
    [
        ("", ALPACA.format("", "")),
        (
            "more",
            ALPACA.format(
                ", paired with an input that provides further context", "### Input:\nmore\n\n"
            ),
        ),
    ],
)
def test_the_alpaca_template_is_the_published_prompt(tokenizer, more: str, prompt: str) -> None:
    tokenizer.chat_template = None
    assert set_chat_template(tokenizer, "auto") == "alpaca (the tokenizer has none)"
    row = {"instruction": "ask", "input": more, "output": "answer"}
    conversation = formats.find_converter("alpaca", formats.uses_alpaca(tokenizer.chat_template))(
        row
    )
    [(text, spans)] = Renderer(tokenizer, "assistant").render_conversation(conversation)
    assert text == f"<s>{prompt}answer</s>"
    assert [text[start:end] for start, end in spans] == ["answer</s>"]


def test_every_shipped_template_marks_the_answers(tokenizer) -> None:
    names = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    assert names == ["alpaca", "chatml"]
    for name in names:
        set_chat_template(tokenizer, name)
        [(text, spans)] = Renderer(tokenizer, "assistant").render_conversation(
            formats.find_converter("messages")(CONVERSATION)
        )
        assert [text[start:end] for start, end in spans] == ["one</s>", "two</s>"], name
        assert text.count("<s>") == 1


@pytest.mark.parametrize("between", ["  </s>", " |", "</s>"])
def test_an_answer_ends_with_the_control_token_before_the_next_turn(
    tokenizer, between: str
) -> None:
    """One of them begins with a space itself."""
    tokenizer.add_special_tokens({"extra_special_tokens": [" |"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}BETWEEN{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}BETWEEN{% endif %}"
    ).replace("BETWEEN", between)
    conversation = formats.find_converter("messages")(CONVERSATION)
    [(text, spans)] = Renderer(tokenizer, "assistant").render_conversation(conversation)
    assert [text[start:end] for start, end in spans] == [f"one{between}", "two</s>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer(
    prepare, tokenizer, capfd
) -> None:
    """As Qwen 3's, which takes the thinking out of all answers but the last."""
    last = "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}{{ '.' }}{% endif %}"
    tokenizer.chat_template = TURNS.replace(
        "m['content'] + ' ' + eos_token", "'' }}" + last + "{{ ' ' + eos_token"
    )
    prepared = prepare([CONVERSATION])
    rows = [tokenizer.convert_ids_to_tokens(ids) for ids in prepared.rows["input_ids"]]
    assert [row[-2:] for row in rows] == [["one", "</s>"], ["two", "</s>"]]
    assert (
        rows[1][rows[1].index("assistant") + 2] == "."
    )  # the first answer, as it is once there is another
    assert [learned(prepared, tokenizer, row) for row in (0, 1)] == [
        ["one", "</s>"],
        ["two", "</s>"],
    ]
    assert "1 conversation became one row for each answer" in capfd.readouterr().err
    fed = tokenizer.apply_chat_template(CONVERSATION["messages"][:3], add_generation_prompt=True)[
        "input_ids"
    ]
    assert prepared.rows[1]["input_ids"][: len(fed)] == fed


def test_a_generation_prompt_that_no_answer_begins_with_is_refused(prepare, tokenizer) -> None:
    tokenizer.chat_template = TURNS.replace("{{ 'assistant : ' }}", "{{ 'assistant : think' }}")
    with pytest.raises(
        LoraError, match="the chat template's generation prompt is not how it begins an answer"
    ):
        prepare([CONVERSATION])


def test_every_answer_ends_in_a_token_that_stops_generation(prepare, tokenizer, capfd) -> None:
    tokenizer.chat_template = TURNS.replace("+ ' ' + eos_token", "")  # ends an answer with nothing
    prepared = prepare([{"prompt": "ask", "completion": "answer"}] * 3)
    assert learned(prepared, tokenizer) == ["answer", "</s>"]
    assert selection.find_stop_ids(tokenizer, prepared.counts) == [tokenizer.eos_token_id]
    assert "warning" not in capfd.readouterr().err
    prepare([{"prompt": "ask", "completion": "answer"}] * 3, "train_on: all")
    assert "warning" not in capfd.readouterr().err
    ids = tokenizer("ask answer")["input_ids"]
    prepare([{"input_ids": ids}, {"input_ids": [*ids, tokenizer.eos_token_id]}])
    assert "warning: 1 of 2 answers does not end with a stop token" in capfd.readouterr().err


def test_rows_are_asked_in_generate_as_they_were_trained(tokenizer, tmp_path: Path) -> None:
    set_chat_template(tokenizer, "alpaca")
    row = {"instruction": "ask", "input": "more", "output": "answer"}
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n")
    question = generate.read_questions([], file)[0]
    asked = tokenizer.apply_chat_template(
        question.asked(tokenizer.chat_template).messages, tokenize=False, add_generation_prompt=True
    )
    [(text, spans)] = Renderer(tokenizer, "assistant").render_conversation(
        formats.find_converter("alpaca", True)(row)
    )
    assert asked == text[: spans[0][0]]
    assert question.expected == "answer"


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE with some merges, as GPT-2's and Llama 3's are."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    fast.train_from_iterator(
        ["the three theses — höher, größer, 你好世界 😀😀 naïve"] * 20, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def pieces(tiny: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(tiny / "model"))


@pytest.fixture(scope="module")
def gaps(byte_level: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a number left out, as in vocabularies that were trimmed."""
    described = json.loads(byte_level.backend_tokenizer.to_str())
    words = described["model"]["vocab"]
    words[max(words, key=words.__getitem__)] += 1
    made = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def word_pieces() -> PreTrainedTokenizerFast:
    """Letters and letters within words (##e), as BERT's: blanks between words are no token's."""
    letters = [f"{mark}{letter}" for mark in ("", "##") for letter in "aethéöß"]
    words = {word: number for number, word in enumerate(["<s>", "</s>", "[UNK]", *letters])}
    fast = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )


@pytest.mark.parametrize("kind", ["byte_level", "pieces", "normalised", "gaps", "word_pieces"])
@settings(max_examples=150, deadline=None)
@example(text="ae a a", cut=6)  # as many marks as blanks: ## twice over, two spaces
@given(
    text=st.text(
        st.sampled_from("aet h\n▁éöß你好😀\u0301ﬁ\u00a0") | st.characters(codec="utf-8"),
        max_size=40,
    ),
    cut=st.integers(0, 40),
)
def test_where_tokens_stand_is_what_the_tokenizer_says(
    request, kind: str, text: str, cut: int
) -> None:
    made = request.getfixturevalue("byte_level" if kind == "normalised" else kind)
    backend = Tokenizer.from_str(made.backend_tokenizer.to_str())
    if kind == "normalised":
        backend.normalizer = normalizers.NFKC()  # which changes lengths
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=made.bos_token, eos_token=made.eos_token
    )
    text = f"{text[:cut]}{made.eos_token}{text[cut:]}"
    encoding = backend.encode(text, add_special_tokens=False)
    starts, ends = OffsetFinder(tokenizer).find(text, np.array(encoding.ids))
    assert list(zip(starts.tolist(), ends.tolist())) == encoding.offsets


def test_data_sets_are_mixed_by_weight(tmp_path: Path, tokenizer, capfd) -> None:
    for name, row, count in (
        ("a", {"prompt": "ask", "completion": "one"}, 10),
        ("b", {"q": "more", "a": "two"}, 8),
    ):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * count)
    text = (
        f"model: {{name_or_path: x}}\ndata:\n  mix:\n    - "
        f"{{path: {tmp_path / 'a.jsonl'}, weight: 2}}\n"
        f"    - {{path: {tmp_path / 'b.jsonl'}, weight: 1.5, columns: {{prompt: q, completion: a}}}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    mixed = load.load_rows(recipe, tokenizer)[0]
    words = [tokenizer.convert_ids_to_tokens(ids)[-2] for ids in mixed.rows["input_ids"]]
    assert (words.count("one"), words.count("two")) == (20, 12)
    assert mixed.counts.read == 18
    assert mixed.summarise().startswith("32 rows by weight from 18, ")
    assert mixed.counts.tokens == sum(map(len, mixed.rows["input_ids"]))
    assert mixed.counts.trained_tokens == 2 * 32
    assert [row.place.rpartition("/")[2] for row in mixed.first[:3]] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "a.jsonl:2",
    ]
    assert "b.jsonl x 1.5: 8 of 8 rows" in capfd.readouterr().err
    again = load.load_rows(recipe, tokenizer)[0]
    assert (again.fingerprint, again.rows["input_ids"]) == (
        mixed.fingerprint,
        mixed.rows["input_ids"],
    )


def test_half_of_the_rows_is_drawn_by_the_seed(tmp_path: Path, tokenizer) -> None:
    rows = [{"input_ids": [number] * 3} for number in range(18)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: x}}\ndata: "
        f"{{mix: [{{path: {tmp_path / 'a.jsonl'}, weight: 0.5}}]}}\n"
    )
    drawn = {
        seed: [
            ids[0]
            for ids in load.load_rows(
                load_recipe(tmp_path / "r.yaml", [f"training.seed={seed}"]), tokenizer
            )[0].rows["input_ids"]
        ]
        for seed in (0, 1)
    }
    assert len(drawn[0]) == len(set(drawn[0])) == 9
    assert drawn[0] != drawn[1]


def test_a_control_token_that_swallows_the_space_after_it_carries_loss(prepare, tokenizer) -> None:
    """As Phi 3's, whose marks take the line break after them."""
    tokenizer.add_tokens(
        [AddedToken("<|end|>", special=True, rstrip=True, normalized=False)], special_tokens=True
    )
    tokenizer.chat_template = TURNS.replace("' ' + eos_token + ' '", "' <|end|>\\n'")
    prepared = prepare([CONVERSATION])
    assert learned(prepared, tokenizer) == ["one", "<|end|>", "two", "<|end|>"]
    assert selection.find_stop_ids(tokenizer, prepared.counts) == [
        tokenizer.convert_tokens_to_ids("<|end|>")
    ]


def test_the_token_that_ends_a_turn_may_stand_on_the_next_line(prepare, tokenizer) -> None:
    tokenizer.chat_template = TURNS.replace("' ' + eos_token + ' '", "'\\n' + eos_token + ' '")
    assert learned(prepare([CONVERSATION]), tokenizer) == ["one", "</s>", "two", "</s>"]


def test_answers_that_begin_inside_a_token_are_not_trained_on(tmp_path: Path) -> None:
    """Inference, which does not know the answer, feeds another token there."""
    pieces = [*"askwer:\n\u0120\u010a", "\u010a\u010a", "</s>"]  # two line breaks are one token
    fast = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [("\u010a", "\u010a")])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    other.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ':\\n' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    rows = [{"prompt": "ask", "completion": word} for word in ("swer", "\nswer", "raw")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: x}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n"
    )
    made = load.load_rows(load_recipe(tmp_path / "r.yaml"), other)[0]
    assert (len(made.rows), made.counts.left_out[selection.BEGINS_INSIDE]) == (2, 1)
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(
        LoraError, match="generation prompt ends in the middle of a token in 1 of 1 row"
    ):
        load.load_rows(load_recipe(tmp_path / "r.yaml"), other)


def test_turns_without_loss_have_none_when_all_is_trained_on(prepare, tokenizer) -> None:
    turns = [dict(turn) for turn in CONVERSATION["messages"]]
    turns[1]["train"] = False
    words = learned(prepare([{"messages": turns}], "train_on: all"), tokenizer)
    assert "one" not in words
    assert words[:5] == ["<s>", "user", ":", "ask", "</s>"]
    assert words[-2:] == ["two", "</s>"]


def test_masks_of_tokenised_rows_are_kept_to(prepare) -> None:
    made = prepare(
        [
            {"input_ids": [1, 5, 6, 2, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]},
            {"input_ids": [1, 5, 6, 2], "completion_mask": [0, 0, 1, 1]},
            {
                "input_ids": [0, 1, 5, 6],
                "assistant_masks": [0, 0, 0, 1],
                "attention_mask": [0, 1, 1, 1],
            },
            {"input_ids": "[5, 6]", "labels": "[-100, 6]"},  # as a table has them
            {"input_ids": "[5, 6]", "labels": ""},
        ]
    ).rows
    assert made["input_ids"] == [[1, 5, 6, 2], [1, 5, 6, 2], [1, 5, 6], [5, 6], [5, 6]]
    assert made["labels"] == [
        *([1, 5, 6, 2], [-100, -100, 6, 2], [-100, -100, 6]),
        *([-100, 6], [5, 6]),
    ]


def test_brackets_in_a_folder_s_name_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "my [data]"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "one"}\n')
    data = Data(path=str(folder))
    with pytest.raises(LoraError, match="takes its brackets for a pattern") as refused:
        sources.find_source(data, "path", str(folder), "train")
    assert shlex.split(str(refused.value.hint)) == ["--set", f"data.path={folder}/rows.jsonl"]
    with pytest.raises(LoraError, match="no file matches"):
        sources.find_source(data, "path", f"{tmp_path}/*", "train")  # a folder is all there is


def test_tables_do_not_invent_arguments(tmp_path: Path) -> None:
    """Arrow gives every mapping of a column the keys of all."""
    calls = [
        {"function": {"name": name, "arguments": given}}
        for name, given in (("f", {"c": "x"}), ("g", {"n": 3}))
    ]
    rows = [
        {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "tool_calls": [c]}]}
        for c in calls
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "r.yaml").write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    recipe = load_recipe(tmp_path / "r.yaml").data
    for name in ("rows.parquet", "saved"):
        read = [
            row
            for _, row in sources.find_source(
                recipe, "path", str(tmp_path / name), "train"
            ).read_rows()
        ]
        found = [
            formats.find_converter("messages")(row).messages[1]["tool_calls"][0]["function"]
            for row in read
        ]
        assert [call["arguments"] for call in found] == [{"c": "x"}, {"n": 3}], name


def test_splits_of_saved_sets_are_kept_to(tmp_path: Path) -> None:
    saved = Dataset.from_list([{"text": str(number)} for number in range(10)])
    saved.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=saved, test=saved.select(range(2))).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "r.yaml").write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    recipe = load_recipe(tmp_path / "r.yaml").data

    def read(name: str, split: str) -> list[str]:
        return [
            row["text"]
            for _, row in sources.find_source(
                recipe, "path", str(tmp_path / name), split
            ).read_rows()
        ]

    assert read("one", "train[2:4]") == ["2", "3"]
    assert read("two", "test+train[90%:]") == ["0", "1", "9"]
    with pytest.raises(LoraError, match="has no split 'test'; it has train"):
        read("one", "test")


def test_a_folder_s_files_are_read_anew_whatever_their_times(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: x}}\ndata: {{path: {tmp_path / 'set'}}}\n"
    )
    for word in ("one", "two"):
        file = tmp_path / "set" / "a.jsonl"
        file.write_text(json.dumps({"prompt": "ask", "completion": word}) + "\n")
        os.utime(file, (1e9, 1e9))
        made = load.load_rows(load_recipe(tmp_path / "r.yaml"), tokenizer)[0]
        assert learned(made, tokenizer) == [word, "</s>"]


def test_what_is_counted_and_said(prepare, tokenizer, capfd) -> None:
    call = {"function": {"name": "f", "arguments": {"a": "</s>"}}}
    tokenizer.chat_template = TURNS.replace(
        "m['content']", "(m['content'] or m['tool_calls']|string)"
    )
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "tool_calls": [call]}]
    prepare([{"messages": turns}])
    assert "1 row has control tokens in their text" in capfd.readouterr().err
    tokenizer.chat_template = TURNS.replace("{{ bos_token }}", "")
    prepare([CONVERSATION])
    assert "rows do not begin with <s>: the tokenizer would add it" in capfd.readouterr().err


def test_evaluation_rows_that_are_trained_on_are_counted(prepare, capfd) -> None:
    rows = [{"prompt": "ask", "completion": word} for word in ("one", "two", "answer", "more")]
    prepare(rows, "'eval_split': 'train[50%:]'")
    assert "2 of 2 evaluation rows are trained on as well" in capfd.readouterr().err
    prepare(rows, "'split': 'train[:50%]', 'eval_split': 'train[50%:]'")
    assert "trained on as well" not in capfd.readouterr().err


def test_a_mix_of_no_rows_is_refused(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "ask", "completion": "one"}\n')
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: x}}\ndata: "
        f"{{mix: [{{path: {tmp_path / 'a.jsonl'}, weight: 0.01}}]}}\n"
    )
    with pytest.raises(LoraError, match="the weights of data.mix leave no rows"):
        load.load_rows(load_recipe(tmp_path / "r.yaml"), tokenizer)


def test_unreadable_rows_at_the_start_do_not_hide_the_columns(prepare, tmp_path: Path) -> None:
    prepare([{"prompt": "ask", "completion": "one"}] * 3)
    path = tmp_path / "rows.jsonl"
    path.write_text("oops\n" * 150 + path.read_text())
    recipe = load_recipe(tmp_path / "r.yaml", ["data.on_bad_row=skip"])
    made = load.load_rows(
        recipe,
        PreTrainedTokenizerFast(tokenizer_object=_words(), eos_token="</s>", chat_template=TURNS),
    )
    assert (len(made[0].rows), made[0].counts.bad["invalid JSON"]) == (3, 150)


def _words() -> Tokenizer:
    fast = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(["</s>", "<unk>", "one"])}, unk_token="<unk>")
    )
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast


def test_tools_are_asked_with_as_they_were_trained(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for row in (
        {"messages": CONVERSATION["messages"], "tools": [tool]},
        {"prompt": "ask", "completion": "one", "tools": [tool]},
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        asked = generate.read_questions([], tmp_path / "rows.jsonl")[0].asked(TURNS)
        assert asked.tools == [tool]
        style = "messages" if "messages" in row else "prompt_completion"
        assert formats.find_converter(style)(row).tools == [tool]
