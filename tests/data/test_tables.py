"""CSV files as spreadsheets and people write them: read as they were meant and said so, or refused
with a command that mends the file when it is pasted.

Compared with the rows that were meant. Hermetic. Alone: pytest tests/data/test_tables.py
"""

from __future__ import annotations

import gzip
import shlex
import subprocess
from pathlib import Path

import pytest

from lora_cli.common import ui
from lora_cli.common.errors import LoraError
from lora_cli.data import load, prepare, readers, tables
from lora_cli.data.encode import Renderer
from lora_cli.data.formats import BadRow
from lora_cli.recipe.load import load_recipe
from tests.data.test_bad_data import tokenizer

MEANT = [{"prompt": "ask, me", "completion": "answer"}, {"prompt": "más", "completion": "müde"}]
QUOTED = 'prompt,completion\n"ask, me",answer\nmás,müde\n'
# name -> the file's name, its content, what is said of it
READ: dict[str, tuple[str, str | bytes, str]] = {
    "plain": ("r.csv", QUOTED, ""),
    "a mark of the byte order": ("r.csv", b"\xef\xbb\xbf" + QUOTED.encode(), ""),
    "semicolons": ("r.csv", "prompt;completion\nask, me;answer\nmás;müde\n", "semicolons"),
    "tabs": ("r.csv", "prompt\tcompletion\nask, me\tanswer\nmás\tmüde\n", "tabs"),
    "bars": ("r.csv", "prompt|completion\nask, me|answer\nmás|müde\n", "bars"),
    "a .tsv": ("r.tsv", "prompt\tcompletion\nask, me\tanswer\nmás\tmüde\n", ""),
    "a .tsv of commas": ("r.tsv", QUOTED, "commas"),
    "a .tsv.gz": ("r.tsv.gz", gzip.compress(b"prompt\tcompletion\nask, me\tanswer\n"
                                            + "más\tmüde\n".encode()), ""),
    "Excel's first line": ("r.csv", "sep=;\nprompt;completion\nask, me;answer\nmás;müde\n", "semicolons"),
    "Excel's first line, any": ("r.csv", "SEP=^\r\nprompt^completion\r\nask, me^answer\r\nmás^müde\r\n", "'^'"),
    "spaces around names": ("r.csv", ' prompt ,completion \n"ask, me",answer\nmás,müde\n', ""),
    "spaces after commas": ("r.csv", 'prompt, completion\n"ask, me", answer\nmás, "müde"\n', ""),
    "names in quotes": ("r.csv", '"prompt","completion"\n"ask, me","answer"\n"más","müde"\n', ""),
    "a comma in a name": ("r.csv", '"prompt";"completion";"a,b,c,d"\n"ask, me";answer;\nmás;müde;\n', "semicolons"),
    "CRLF": ("r.csv", QUOTED.replace("\n", "\r\n"), ""),
    "CR alone": ("r.csv", QUOTED.replace("\n", "\r"), ""),
    "no end of the last line": ("r.csv", QUOTED.rstrip(), ""),
    "a comma too many": ("r.csv", 'prompt,completion,\n"ask, me",answer,\nmás,müde,\n', "1 of 3 columns has no name and is left out"),
    "an index and more": ("r.csv", ',prompt,completion,\n0,"ask, me",answer,\n1,más,müde,\n', "2 of 4 columns"),
    "blank lines": ("r.csv", 'prompt,completion\n\n"ask, me",answer\n\nmás,müde\n\n', ""),
    "thousands of columns": ("r.csv", "prompt,completion," + ",".join(f"c{n}" for n in range(5000))
                             + '\n"ask, me",answer' + "," * 5000 + "\nmás,müde" + "," * 5000 + "\n", ""),
}  # fmt: skip


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    tables._say_once.cache_clear()
    lines: list[str] = []
    monkeypatch.setattr(ui, "say", lines.append)
    return lines


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", READ)
def test_a_table_is_read_as_it_was_meant(name: str, tmp_path: Path, heard: list[str]) -> None:
    file, content, said = READ[name]
    path = written(tmp_path / file, content)
    for _ in range(2):  # read twice, said once
        rows = [{key: row[key] for key in MEANT[0]} for _, row in readers.read(path)]
        assert rows == MEANT
    assert len(heard) == (said != "")
    assert said in "".join(heard)


def test_places_count_all_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "r.csv", "sep=;\nprompt;completion\na;b\nc\nd;e\n")
    assert [(place, type(row)) for place, row in readers.read(path)] == [
        (f"{path}:3", dict),
        (f"{path}:4", BadRow),
        (f"{path}:5", dict),
    ]


# name -> the file's name, its content, and the rows there are once the hint has been pasted
PASTED: dict[str, tuple[str, bytes, list[dict[str, str]]]] = {
    "no names, two columns": ("my rows.csv", b"Who are you?,a model\nask,answer\n", [
        {"prompt": "Who are you?", "completion": "a model"}, {"prompt": "ask", "completion": "answer"}]),
    "no names, semicolons": ("r.csv", b"This is a long one;7\nask;8\n", [{"prompt": "This is a long one", "completion": "7"},
        {"prompt": "ask", "completion": "8"}]),
    "no names, three columns": ("r.csv", b"Add them.,1 2,3\nAdd.,2,2\n", [
        {"instruction": "Add them.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "2", "output": "2"}]),
    "no names, one column": ("r.csv", b"The end.\nThe start.\n", [{"text": "The end."}, {"text": "The start."}]),
    "UTF-16": ("r.csv", QUOTED.encode("utf-16"), MEANT),
    "UTF-16 without its mark": ("r.csv", QUOTED.encode("utf-16-le"), MEANT),
    "Latin-1": ("it's.csv", QUOTED.encode("latin-1"), MEANT),
    "Windows": ("r.csv", "text\n“quoted”\n".encode("cp1252"), [{"text": "“quoted”"}]),
    "Windows, packed": ("r.csv.gz", gzip.compress("text\n“quoted”\n".encode("cp1252")), [{"text": "“quoted”"}]),
}  # fmt: skip


def refusal(path: Path) -> LoraError:
    """What is said of a table whose rows cannot be trained on."""
    text = (
        f"model: {{name_or_path: x}}\ndata: {{path: '{str(path).replace(chr(39), chr(39) * 2)}'}}\n"
    )
    recipe = written(path.parent / "r.yaml", text)
    with pytest.raises(LoraError) as refused:
        load.load_rows(load_recipe(recipe), tokenizer())
    return refused.value


@pytest.mark.parametrize("name", PASTED)
def test_a_hint_that_is_pasted_mends_the_file(name: str, tmp_path: Path, heard: list[str]) -> None:
    file, content, meant = PASTED[name]
    path = written(tmp_path / file, content)
    command, _, other = str(refusal(path).hint).partition("; then name ")
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    named = ["bash", "-c", f"printf %s {other or '.'}"]
    mended = subprocess.run(named, capture_output=True, text=True, check=True).stdout
    assert [row for _, row in readers.read(Path(mended) if other else path)] == meant


@pytest.mark.parametrize(
    "header",
    [
        "foo,bar",
        "answer,ask",
        'What is asked?,It\'s "so": a {b}',
        "only",
        "Größe,数",
        "null,true",
        "😀,no",
    ],
)
def test_the_hint_for_unknown_columns_can_be_pasted(header: str, tmp_path: Path) -> None:
    """As `--set` in a shell: the same columns are then known, so that other things are wrong."""
    path = written(tmp_path / "r.txt.csv", "x\n")
    names = header.split(",")
    hint = Renderer.suggest_columns(names)
    given = shlex.split(hint)
    assert given[0] == "--set"
    recipe = written(tmp_path / "r.yaml", f"model: {{name_or_path: x}}\ndata: {{path: {path}}}\n")
    columns = load_recipe(recipe, [given[1]]).data.columns
    assert set(columns.values()) <= set(names)
    assert (
        prepare.choose_format(load_recipe(recipe, [given[1]]).data, names, Renderer)[1] == columns
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('prompt,completion\nask,"answer\n', "unexpected end of data"),
        ("prompt,completion,prompt\na,b,c\n", "two columns named prompt"),
        ("prompt, prompt \na,b\n", "two columns named prompt"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(LoraError, match=said):
        list(readers.read(written(tmp_path / "r.csv", content)))
