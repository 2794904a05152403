"""A Modelfile holds the instructions that were meant and no other, whatever is in its values.

Ollama is no Python package; its grammar is `read_modelfile`, which is held here against cases of
Ollama's own parser_test.go. Hermetic: the tiny model. Alone: pytest tests/gguf/test_modelfile.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_cli.gguf import modelfile
from lora_cli.gguf.modelfile import Pieces, read_modelfile, write_modelfile

PARSED = {
    "FROM model1\nADAPTER adapter1\nLICENSE MIT\nPARAMETER param1 value1\nTEMPLATE template1\n": [
        ("FROM", "model1"), ("ADAPTER", "adapter1"), ("LICENSE", "MIT"), ("PARAMETER param1", "value1"), ("TEMPLATE", "template1"),
    ],
    '\nFROM "FOO BAR "\nPARAMETER param1 value1\n': [("FROM", "FOO BAR "), ("PARAMETER param1", "value1")],
    'FROM foo\nSYSTEM """\nThis is a\nmultiline system.\n"""\n': [("FROM", "foo"), ("SYSTEM", "\nThis is a\nmultiline system.\n")],
    'FROM foo\nSYSTEM """This is a\nmultiline system."""\n': [("FROM", "foo"), ("SYSTEM", "This is a\nmultiline system.")],
    'FROM foo\nSYSTEM """This is a multiline ""system."""\n': [("FROM", "foo"), ("SYSTEM", 'This is a multiline ""system.')],
    'FROM foo\nSYSTEM """"""\n': [("FROM", "foo"), ("SYSTEM", "")],
    'FROM foo\nSYSTEM ""\n': [("FROM", "foo"), ("SYSTEM", "")],
    "FROM foo\n# a comment\nSYSTEM    You are  kind.   \n": [("FROM", "foo"), ("SYSTEM", "You are  kind.")],
    "FROM foo\r\n\r\n  SYSTEM x": [("FROM", "foo"), ("SYSTEM", "x")],
}  # fmt: skip
REFUSED = (
    'FROM foo\nSYSTEM """a',
    'FROM foo\nSYSTEM "a',
    "FROM foo\n\x00",
    "FROM\nx",
    "1 x",
    'FROM foo\nSYSTEM """a""',
)


@pytest.mark.parametrize("text", PARSED)
def test_the_grammar_is_ollama_s(text: str) -> None:
    assert list(read_modelfile(text)) == PARSED[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_ollama_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"instruction|closed"):
        list(read_modelfile(text))


HELD = (
    '"""',
    "Be brief.", 'He said "no"', '"', '""', "a\nFROM evil", 'a"\nFROM evil', " blank around ", "tab\tin", "two\n\nlines\n",
    "# no comment", 'PARAMETER stop "x"', "'", "\\", "名前 🙂", '"\n"', "</s>", "{{ .System }}", "a\r\nADAPTER x",
)  # fmt: skip
NOT_HELD = (
    'a"""\nFROM evil',
    'x"""  \nADAPTER evil\nSYSTEM """',
    "a\x1bb",
    "a\u202eb",
    "a\u00a0b",
    "a\x00b",
)


def write(folder: Path, base: Path, monkeypatch, system: str, stop: str, name: str) -> str | None:
    pieces = Pieces(dict.fromkeys(modelfile.ROLES, ("<|x|>", "")), "<|a|>", system)
    monkeypatch.setattr(modelfile, "find_pieces", lambda tokenizer: pieces)
    monkeypatch.setattr(modelfile, "list_stop_tokens", lambda tokenizer, merged: [stop])
    write_modelfile(folder, [folder / name, folder / f"other-{name}"], base)
    path = folder / "Modelfile"
    return path.read_bytes().decode() if path.exists() else None


@pytest.mark.parametrize("where", ["system", "stop", "name"])
def test_no_value_becomes_an_instruction(
    where: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(modelfile.Base, "load_tokenizer", lambda self: None)
    for value in (*HELD, *NOT_HELD):
        given = {"system": "Be kind.", "stop": "<|end|>", "name": "x.gguf", where: value}
        if where == "name" and set("\0/") & set(value):
            continue
        text = write(tmp_path, tiny / "model", monkeypatch, **given)
        assert (text is None) == (value in NOT_HELD), value
        if text is not None:
            found = list(read_modelfile(text))
            assert [name for name, _ in found] == ["FROM", "TEMPLATE", "SYSTEM", "PARAMETER stop"]
            assert found[0] == ("FROM", f"./{given['name']}")
            assert found[2:] == [("SYSTEM", given["system"]), ("PARAMETER stop", given["stop"])]
    assert capfd.readouterr().err.count("no Modelfile: ") >= 5


def test_a_template_that_would_be_a_program_is_not_translated(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}ASK{% endif %}"
    for ask, certain in (("<assistant>", True), ("{{ '{{' }} .System }}", False)):
        tokenizer.chat_template = plain.replace("ASK", ask)
        assert (modelfile.find_pieces(tokenizer) is not None) == certain


def test_a_pipe_in_the_modelfile_s_place_is_left(tiny: Path, tmp_path: Path, capfd) -> None:
    import os

    os.mkfifo(tmp_path / "Modelfile")
    write_modelfile(tmp_path, [tmp_path / "x.gguf"], tiny / "model")
    assert "is not ours" in capfd.readouterr().err
