"""`lora init`: what rows are is found, the recipe that is written loads and trains as it says, and
nothing is asked where nobody can answer.

Hermetic: the tiny model, small ones of other families, and rows made here. Alone:
pytest tests/drafts/test_init.py
"""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from lora_cli.data import classify, column_kinds
from lora_cli.data import preferences as preferences_of
from lora_cli.recipe import load_recipe
from tests import tasks
from tests.terminals import Terminal

WORDS = "red green blue cat dog house tree river stone bird".split()


def say(count: int, drawn: random.Random) -> str:
    """So many words."""
    return " ".join(drawn.choice(WORDS) for _ in range(count))


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_table(file: Path, names: tuple[str, str], count: int = 120) -> Path:
    """A CSV file of two columns of words."""
    drawn = random.Random(count)
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(names)
        table.writerows((say(6, drawn), say(3, drawn)) for _ in range(count))
    return file


@pytest.fixture
def init(lora, tiny: Path, tmp_path: Path):
    """`init(words)` runs `lora init` in a folder of its own, on the tiny model unless they name
    another."""

    def run(*words: object, model: object = tiny / "model"):
        return lora("init", *words, *(["--model", model] if model else []), cwd=tmp_path)

    return run


@pytest.fixture
def bare(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model without its chat template."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny / "model", folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_what_is_written_is_what_trains(init, lora, tmp_path: Path) -> None:
    write_table(tmp_path / "mine.csv", ("question", "answer"))
    done = init("mine.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine.yaml\n"
    assert "120 rows; prompt_completion (question as prompt, answer as completion)" in done.stderr
    assert "wrote mine.yaml\nnext: lora train mine.yaml\n" in done.stderr
    text = (tmp_path / "mine.yaml").read_text()
    assert 15 <= len(text.splitlines()) <= 30
    said = re.search(r"passes: ([\d,]+) steps, about (\S+) here; one took ([\d.]+) s", text)
    assert said is not None, text
    assert 0 < float(said[3]) < 60
    assert load_recipe(tmp_path / "mine.yaml").output_dir == "runs/mine"
    checked = lora("check", "mine.yaml", "--json", cwd=tmp_path)
    found = json.loads(checked.stdout)
    assert found["plan"]["steps"] == int(said[1])
    longest = max(map(int, found["train"]["lengths"]))
    assert f"all {longest}" in done.stderr
    assert f"the longest row has {longest}" in text
    assert not found["train"]["left_out"].keys() - {"held out to evaluate", "dropped: bad"}
    trained = lora("train", "mine.yaml", "--set", "training.max_steps=3", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()


def chat(turns: int) -> Callable[[Path], object]:
    """Conversations of so many questions and answers, as OpenAI's files have them."""

    def write(folder: Path) -> object:
        drawn = random.Random(turns)
        rows = [
            {
                "messages": [
                    {"role": role, "content": say(3, drawn)}
                    for _ in range(turns)
                    for role in ("user", "assistant")
                ]
            }
            for _ in range(30)
        ]
        return write_lines(folder / "rows.jsonl", rows)

    return write


def alpaca(folder: Path) -> object:
    drawn = random.Random(1)
    names = ("instruction", "input", "output")
    table = {name: [say(3, drawn) for _ in range(30)] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
    return folder / "rows.parquet"


def texts(folder: Path) -> object:
    drawn = random.Random(2)
    (folder / "rows.txt").write_text("".join(f"{say(20, drawn)}\n" for _ in range(40)))
    return folder / "rows.txt"


def preferences(folder: Path) -> object:
    drawn = random.Random(3)
    rows = [
        {"question": say(4, drawn), "chosen": say(2, drawn), "rejected": say(2, drawn)}
        for _ in range(30)
    ]
    return write_lines(folder / "rows.jsonl", rows)


KINDS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "a list of JSON": (
        lambda folder: (folder / "rows.json").write_text(
            json.dumps(
                [{"prompt": say(3, random.Random(at)), "completion": "a"} for at in range(30)]
            )
        ),
        {"format": "prompt_completion"},
    ),
    "tabs between columns": (
        lambda folder: (folder / "rows.tsv").write_text(
            "instruction\tresponse\n"
            + "".join(f"{say(4, random.Random(at))}\tred\n" for at in range(30))
        ),
        {"format": "alpaca", "columns": {"instruction": "instruction", "output": "response"}},
    ),
    "Parquet": (alpaca, {"format": "alpaca"}),
    "chats": (chat(2), {"format": "messages"}),
    "plain text": (texts, {"format": "text"}),
    "a text and its summary": (
        lambda folder: write_table(folder / "rows.csv", ("document", "summary"), 30),
        {"format": "prompt_completion", "columns": {"prompt": "document", "completion": "summary"}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_kind_are_recognised(init, tmp_path: Path, kind: str) -> None:
    write, wanted = KINDS[kind]
    write(tmp_path)
    done = init()  # the only file of rows that lies there
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load((tmp_path / "rows.yaml").read_text())["data"]
    assert data.pop("path").startswith("rows.")
    assert data.pop("eval_rows") in (3, 4)
    assert data == wanted


def test_two_answers_teach_which_is_better(init, lora, tmp_path: Path) -> None:
    preferences(tmp_path)
    done = init("rows.jsonl")
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tmp_path / "rows.yaml")
    assert (recipe.objective, recipe.data.format) == ("dpo", "preference")
    assert "which of two answers is better is learnt" in done.stderr
    assert re.search(r"\n  \d+ steps, about ", done.stderr)
    trained = lora("train", "rows.yaml", "--set", "training.max_steps=2", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    said = init("rows.jsonl", "--set", "objective=orpo", "--out", "odds.yaml").stderr
    assert "is learnt (objective: orpo)" in said, said
    odds = load_recipe(tmp_path / "odds.yaml")
    assert odds.preference.loss == "odds_ratio"
    rates = [each.training.learning_rate for each in (recipe, odds)]
    assert rates == [5e-5, 2.5e-4]  # a tenth and a half of what answers alone get
    words = ["--set", "preference.beta=0.3", "--gpu", "24GB", "--out", "closer.yaml"]
    closer = init("rows.jsonl", *words)
    assert closer.returncode == 0, closer.stderr
    assert load_recipe(tmp_path / "closer.yaml").preference.beta == 0.3
    better = init("rows.jsonl", "--set", "objective=sft", "--out", "better.yaml")
    assert better.returncode == 0, better.stderr
    columns = load_recipe(tmp_path / "better.yaml").data.columns
    assert columns == {"prompt": "question", "completion": "chosen"}


def test_answers_with_a_label_teach_what_is_wanted(init, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"a {n}", "completion": "b", "kto_tag": n % 2 == 0, "id": n} for n in range(60)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    done = init("rows.jsonl")
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tmp_path / "rows.yaml")
    assert (recipe.objective, recipe.data.format) == ("kto", "unpaired")
    assert recipe.data.columns == {"label": "kto_tag"}
    assert "what makes an answer wanted is learnt (objective: kto)" in done.stderr
    assert "  not read: id\n" in done.stderr


@pytest.mark.parametrize(
    ("family", "write", "task", "columns"),
    [
        ("llama", tasks.write_classes, "sequence_classification", None),
        ("bert", tasks.write_classes, "sequence_classification", None),
        ("bert", tasks.write_tags, "token_classification", None),
        ("bert", tasks.write_questions, "question_answering", None),
        ("t5", tasks.write_pairs, "seq2seq_lm", None),
        ("llama", tasks.write_pairs, None, ("prompt", "completion")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_columns_and_the_base_tell_the_task(
    init, lora, tmp_path: Path, family: str, write: Any, task: str | None, columns: Any
) -> None:
    base = tasks.make_base(tmp_path / "base", family)
    ending = ".csv" if write is tasks.write_classes else ".jsonl"
    write(tmp_path / f"rows{ending}", 60)
    done = init(f"rows{ending}", model=base)
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((tmp_path / "rows.yaml").read_text())
    assert written.get("task") == task
    if columns:
        assert tuple(written["data"]["columns"]) == columns
    checked = lora("check", "rows.yaml", "--samples", "0", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("turns", "template"), [(1, "alpaca"), (2, "chatml")])
def test_a_base_without_a_template_gets_one_that_suits(
    init, bare: Path, tmp_path: Path, turns: int, template: str
) -> None:
    chat(turns)(tmp_path)
    done = init("rows.jsonl", model=bare)
    assert done.returncode == 0, done.stderr
    assert f"chat template: {template}, for " in done.stderr
    assert load_recipe(tmp_path / "rows.yaml").model.chat_template == template


def test_bad_rows_are_listed_and_left_out(init, lora, tmp_path: Path) -> None:
    drawn = random.Random(5)
    file = write_lines(
        tmp_path / "rows.jsonl",
        [{"prompt": say(5, drawn), "completion": say(2, drawn)} for _ in range(60)],
    )
    lines = file.read_text().splitlines()
    lines[6], lines[9], lines[20] = "{oops", '{"prompt": "x"}', lines[19]
    file.write_text("\n".join(lines))
    done = init("rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl:7: column 2: invalid JSON" in done.stderr
    assert "rows.jsonl:10: there is no completion; the columns are prompt" in done.stderr
    assert "1 row says the same as an earlier one: rows.jsonl:21 as rows.jsonl:20" in done.stderr
    text = (tmp_path / "rows.yaml").read_text()
    assert re.search(r"on_bad_row: skip +# 2 of 60 cannot be used", text)
    assert lora("check", "rows.yaml", cwd=tmp_path).returncode == 0
    kept = init("rows.jsonl", "--out", "other.yaml", "--set", "data.on_bad_row=error")
    assert kept.returncode == 1
    assert "error: rows.jsonl:7: column 2: invalid JSON" in kept.stderr
    assert not (tmp_path / "other.yaml").exists()


def test_what_the_template_does_not_read_is_told_before_training(init, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "<|end|>"},
        {"role": "assistant", "content": "blue"},
    ]
    write_lines(tmp_path / "calls.jsonl", [{"messages": turns}] * 5)
    said = init("calls.jsonl", "--gpu", "24GB").stderr
    unread = "warning: 5 rows have tool_calls, which the chat template does not read"
    assert said.index("calls.jsonl: 5 rows; messages") < said.index(unread)
    assert "warning: 5 rows have control tokens in their text" in said


def test_of_several_formats_the_one_that_most_rows_have_is_read(init, tmp_path: Path) -> None:
    """And not the first that lora knows, by which two rows of 22 would be trained on."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [{"prompt": f"say {n}", "completion": f"word {n}"} for n in range(20)]
    write_lines(tmp_path / "rows.jsonl", [chat, *rows, chat])
    done = init("rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "22 rows; prompt_completion" in done.stderr
    assert "2 bad rows are left out" in done.stderr
    assert "not read: messages" in done.stderr


def test_more_bad_rows_than_good_ones_are_an_error(init, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"say {n}", "completion": f"word {n}"}) for n in range(5)]
    (tmp_path / "rows.jsonl").write_text(",\n".join(lines))
    done = init("rows.jsonl")
    assert done.returncode == 1
    assert "error: 4 of 5 rows cannot be used; rows.jsonl:1: a comma after" in done.stderr
    assert "hint: sed -E 's/,[[:space:]]*$//' < rows.jsonl > lines-rows.jsonl;" in done.stderr
    assert "--set data.on_bad_row=skip trains on the others" in done.stderr
    assert not (tmp_path / "rows.yaml").exists()
    done = init("rows.jsonl", "--set", "data.on_bad_row=skip")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_not_there_is_told_first(init, tmp_path: Path) -> None:
    """And not after steps were tried."""
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    done = init("rows.jsonl", "--out", "none/mine.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: none is not a folder"
    assert "hint: mkdir -p none" in done.stderr


def test_a_file_beside_the_rows_is_evaluated_on(init, tmp_path: Path) -> None:
    write_table(tmp_path / "own_train.csv", ("prompt", "completion"))
    write_table(tmp_path / "own_test.csv", ("prompt", "completion"), 12)
    done = init("own_train.csv")
    assert done.returncode == 0, done.stderr
    assert "evaluation: 12 of 12 rows" in done.stderr
    assert load_recipe(tmp_path / "own_train.yaml").data.eval_path == "own_test.csv"


def test_no_recipe_is_written_over(init, lora, tiny: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "rows.csv", ("prompt", "completion"), 30)
    (tmp_path / "rows.yaml").write_text("mine")
    for words in (["init", "rows.csv"], ["train", "rows.csv"]):
        done = lora(*words, "--model", tiny / "model", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(
            "error: rows.yaml already exists\n\nhint: lora train rows.yaml "
        )
        assert (tmp_path / "rows.yaml").read_text() == "mine"


def test_nothing_is_held_out_where_nobody_evaluates(init, tmp_path: Path) -> None:
    write_table(tmp_path / "mine.csv", ("prompt", "completion"))
    done = init("mine.csv", "--set", "training.eval_strategy=no", "--gpu", "24GB")
    assert done.returncode == 0, done.stderr
    assert not load_recipe(tmp_path / "mine.yaml").data.evaluates


def test_what_is_set_is_in_the_recipe_and_never_chosen(init, tmp_path: Path) -> None:
    write_table(tmp_path / "rows.csv", ("ask", "reply"), 40)
    refused = init("rows.csv")
    assert refused.returncode == 1
    hint = re.search(r"hint: --set data\.columns='(\{.+\})'", refused.stderr)
    assert hint is not None, refused.stderr
    done = init(
        "rows.csv", "--set", f"data.columns={hint[1]}", "--set", "lora.r=4", "--set",
        "training.max_steps=7", "--set", "data.eval_fraction=null", "--set", "method=dora",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tmp_path / "rows.yaml")
    assert recipe.data.columns == {"prompt": "ask", "completion": "reply"}
    assert (recipe.lora.r, recipe.training.max_steps, recipe.method) == (4, 7, "dora")
    assert not recipe.data.holds_out
    assert "\n  7 steps, about " in done.stderr
    wrong = init("rows.csv", "--out", "b.yaml", "--set", "training.learning_rat=1")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --set training.learning_rat=1: ")
    assert not (tmp_path / "b.yaml").exists()


def test_rows_are_trained_on_and_leave_their_recipe(lora, tiny: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "rows.csv", ("prompt", "completion"), 40)
    words = ("rows.csv", "--model", tiny / "model", "--method", "qlora")
    done = lora("train", *words, "--set", "training.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/rows/adapter\n"
    recipe = load_recipe(tmp_path / "rows.yaml")
    assert (recipe.method, recipe.training.max_steps) == ("qlora", 2)
    again = lora("train", *words, "--resume", cwd=tmp_path)
    assert again.returncode == 2
    assert "begins with a recipe" in again.stderr
    resumed = lora("train", "rows.yaml", "--resume", "--set", "training.max_steps=3", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train", "a.csv"], 2, "hint: lora train a.csv --model MODEL, a folder or a name"),
        (["train", "r.yaml", "--model", "x"], 2, "hint: --set model.name_or_path=x"),
        (["train", "r.yaml", "--method", "qlora"], 2, "hint: --set method=qlora"),
        (["init", "aa.csv"], 1, "error: aa.csv does not exist\n\nhint: lora init a.csv"),
        (["init"], 2, "error: 2 files of rows lie here: a.csv, b.csv\n\nhint: lora init a.csv"),
        (["init", "a.csv", "--method", "qlra"], 2, "hint: did you mean qlora?"),
        (["init", "a.csv", "--out", "x.txt"], 2, "hint: --out x.txt.yaml"),
        (["init", "notes.md"], 1, "error: data.path: notes.md is not one of .json, .jsonl"),
        (["init", "none.jsonl"], 1, "error: data.path: none.jsonl is empty"),
        (["init", "bare"], 1, "error: bare holds no file of rows (.json, "),
        (["init", "bad.jsonl"], 1, "error: bad.jsonl:1: the row is 3, not a mapping of columns"),
        (
            ["init", "wanted.jsonl"],
            1,
            "label is false at wanted.jsonl:101\n\nhint: --set objective=kto",
        ),
        (["init", "nameless.csv"], 1, "hint: sed -i '1i prompt,completion' nameless.csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_with_what_to_type(
    lora, tiny: Path, tmp_path: Path, words: list[str], status: int, said: str
) -> None:
    write_table(tmp_path / "a.csv", ("prompt", "completion"), 30)
    write_table(tmp_path / "b.csv", ("prompt", "completion"), 30)
    (tmp_path / "notes.md").write_text("notes")
    if words[-1] != words[0]:  # or there would be more files of rows
        (tmp_path / "none.jsonl").touch()
        (tmp_path / "bad.jsonl").write_text("3\n4\n")
        asked = {"prompt": "a", "completion": "b", "label": True}
        write_lines(tmp_path / "wanted.jsonl", [asked] * 100 + [{**asked, "label": False}])
        table = (tmp_path / "a.csv").read_text().splitlines()[1:]
        (tmp_path / "nameless.csv").write_text("\n".join(table))
    (tmp_path / "bare").mkdir()
    if words[0] == "init":
        words = [*words, "--model", str(tiny / "model")]
    done = lora(*words, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert said in done.stderr


def test_answers_that_are_not_wanted_are_left_out_by_the_hint(init, tmp_path: Path) -> None:
    """Where objective: sft is asked for, which would learn all."""
    rows = [{"prompt": f"a{n}", "completion": "b", "kto_tag": n % 2 == 0} for n in range(60)]
    write_lines(tmp_path / "my rows.jsonl", rows)
    hint = init("my rows.jsonl", "--set", "objective=sft").stderr.partition("hint: ")[2]
    command, _, made = hint.strip().partition("; then name ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    done = init(made.strip("'"))
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / made.strip("'")).open()]
    assert kept == [{"prompt": row["prompt"], "completion": "b"} for row in rows[::2]]


@pytest.mark.slow
def test_wanted_answers_alone_are_learnt_as_answers(init, tmp_path: Path) -> None:
    """As kto says of such rows; the last of a file that is in order is looked at, too."""
    rows = [{"prompt": f"a{n}", "completion": "b", "label": n < 110} for n in range(140)]
    write_lines(tmp_path / "wanted.jsonl", rows[:110])
    done = init("wanted.jsonl", "--set", "objective=sft")
    assert done.returncode == 0, done.stderr
    write_lines(tmp_path / "both.jsonl", rows)
    done = init("both.jsonl", "--set", "objective=kto")
    assert done.returncode == 0, done.stderr
    assert load_recipe(tmp_path / "both.yaml").data.format == "unpaired"


NO_ROWS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "a role": ("roles are", [{"messages": [{"role": "bot", "content": "a"}]}], ""),
    "an empty answer": ("mend such rows", [{"prompt": "a", "completion": ""}], "sed -n 1p 'my rows.jsonl'"),
    "numbers as answers": ("mend such rows", [{"question": "a", "answer": 3}], "sed -n 1p 'my rows.jsonl'"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ROWS)
def test_columns_are_not_blamed_for_what_is_in_them(name: str, init, tmp_path: Path) -> None:
    hint, rows, command = NO_ROWS[name]
    write_lines(tmp_path / "my rows.jsonl", rows * 5)
    done = init("my rows.jsonl")
    assert "5 of 5 rows cannot be used; my rows.jsonl:1: " in done.stderr
    said = done.stderr.partition("\nhint: ")[2]
    assert said.startswith(hint) and command in said
    assert "data.columns" not in said and "on_bad_row" not in said


FOUND: dict[str, dict[str, Any]] = {
    "a text beside numbers": {"id": 7, "price": "2.50", "title": "red dog", "sold": True},
    "two texts": {"id": 7, "asked": "red", "score": 0.5, "said": "dog"},
    "chats inside": {"id": "a1", "body": {"messages": [
        {"role": "user", "content": "red"}, {"role": "assistant", "content": "dog"}]}},
    "pairs inside": {"row_idx": 1, "row": {"question": "red", "answer": "dog"}},
    "an answer inside": {"prompt": "red", "completion": {"text": "dog", "n": 1}},
    "a text beside a number that is the answer": {"question": "red", "answer": 3, "why": "dog"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_columns_that_are_offered_have_texts_and_train(name: str, init, tmp_path: Path) -> None:
    write_lines(tmp_path / "my rows.jsonl", [FOUND[name]] * 5)
    hint = init("my rows.jsonl").stderr.partition("\nhint: ")[2].strip()
    assert hint.startswith("--set data.columns=")
    done = init("my rows.jsonl", *shlex.split(hint))
    assert done.returncode == 0, done.stderr
    assert "my rows.jsonl: 5 rows" in done.stderr
    assert "cannot be used" not in done.stderr


def test_the_longest_text_is_offered_as_what_is_asked(init, tmp_path: Path) -> None:
    mail = {"ticket": "T-1", "mail": "My lamp is broken, and I want another.", "queue": "returns"}
    write_lines(tmp_path / "r.jsonl", [mail] * 5)
    hint = "hint: --set data.columns='{prompt: mail, completion: queue}'"
    assert hint in init("r.jsonl").stderr
    table = {"ticket": "T-1", "mail": "My lamp is broken.", "sorted": "returns"}
    encoder = classify.LabelEncoder
    suggested = column_kinds.suggest(list(table), {}, [table], encoder)
    assert suggested == "--set data.columns='{text: mail, label: sorted}'"
    pair = {"asked": "a", "good": "a longer one", "bad": "b"}
    suggested = column_kinds.suggest(list(pair), {}, [pair], preferences_of.PreferenceEncoder)
    assert "{prompt: asked, chosen: good, rejected: bad}" in suggested


def test_what_columns_have_is_told_where_it_is_no_text(init, tmp_path: Path) -> None:
    write_lines(tmp_path / "r.jsonl", [{"id": 1, "ok": True, "of": {"a": 1}, "t": "", "n": "1,5"}])
    said = init("r.jsonl").stderr
    assert "the columns id (numbers), ok (true or false), of (mappings), t (nothing), n (n" in said
    assert "hint: add a column of texts" in said


def test_a_file_whose_name_begins_with_a_dash(init, tmp_path: Path) -> None:
    write_lines(tmp_path / "-rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    refused = init("-rows.jsonl", model=None)
    assert refused.stderr.endswith("hint: lora init ./-rows.jsonl\n")
    assert init("./-rows.jsonl").returncode == 0


def answer(warm, tmp_path: Path, words: list[str], answers: list[tuple[str, str]]) -> Terminal:
    """Run `lora init` on a terminal and type each answer once its question is shown."""

    def run(path: str) -> int:
        return warm.run(
            ["init", *words], cwd=tmp_path, terminal=path, environment={"TERM": "xterm-256color"}
        ).returncode

    terminal = Terminal(run, 160, 50)
    for question, keys in answers:
        terminal.wait_for(question)
        terminal.type(keys)
    terminal.end()
    return terminal


def test_a_person_is_asked_with_a_default_for_each(warm, tiny: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", ("ask", "reply"), 120)
    write_table(tmp_path / "b.csv", ("prompt", "completion"), 30)
    ended = answer(
        warm,
        tmp_path,
        [],
        [
            (r"which rows: 1 a\.csv, 2 b\.csv \[a\.csv\]:", "\r"),
            (r"base model.*\[HuggingFaceTB/SmolLM2-135M-Instruct\]:", "./nowhere\r"),
            (r"model\.name_or_path: \./nowhere", f"{tiny / 'model'}\r"),
            (r"which has the answers to learn: 1 ask, 2 reply \[reply\]:", "\r"),
            (r"which has what they answer.*\[ask\]:", "1\r"),
            (r"share of the rows to hold out.*\[0\.1\]:", "2\r"),
            (r"a number below 1, or 0 for none", "0.2\r"),
            (r"method: 1 lora, 2 qlora, 3 dora, 4 qdora \[lora\]:", "dora\r"),
            (r"passes over the rows \(one: \d+ steps, about \S+ here\) \[5\]:", "2\r"),
        ],
    )
    assert ended.result == 0, "\n".join(ended.history())
    recipe = load_recipe(tmp_path / "a.yaml")
    assert recipe.data.columns == {"prompt": "ask", "completion": "reply"}
    assert recipe.data.eval_fraction == 0.2
    assert recipe.method == "dora"
    assert recipe.training.num_train_epochs == 2


def test_yes_asks_nothing_on_a_terminal(warm, tiny: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", ("prompt", "completion"), 120)
    ended = answer(warm, tmp_path, ["a.csv", "--model", str(tiny / "model"), "--yes"], [])
    assert ended.result == 0, "\n".join(ended.history())
    assert "]: " not in "\n".join(ended.history())
    assert load_recipe(tmp_path / "a.yaml").data.eval_fraction == 0.1


def test_ctrl_c_and_the_end_of_input_write_nothing(warm, tiny: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", ("prompt", "completion"), 120)
    for keys in ("\x03", "\x04"):
        words = ["a.csv", "--model", str(tiny / "model")]
        ended = answer(warm, tmp_path, words, [("share of the rows", keys)])
        assert ended.result == 130, "\n".join(ended.history())
        assert "interrupted" in "\n".join(ended.history())
    assert not list(tmp_path.glob("*.yaml"))
