"""The stand-in for Ollama: it reads what Ollama reads, refuses what Ollama refuses, and answers as
the model does when the Modelfile says the right things, and not otherwise.

Hermetic, but for llama.cpp's converters: a GGUF of the tiny model, once. Alone: pytest
tests/docs/test_ollama.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_cli.gguf import modelfile
from tests.docs import ollama
from tests.docs.pages import ROOT
from tests.gguf.test_modelfile import PARSED, REFUSED


@pytest.fixture(scope="module")
def exported(tiny: Path, lora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Modelfile of the tiny model, beside its GGUF."""
    folder = tmp_path_factory.mktemp("exported")
    done = lora("export-gguf", tiny / "model", "-o", folder, "--quantize", "f16")
    assert done.returncode == 0, done.stderr
    return folder / "Modelfile"


def call(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the program as a page's reader does."""
    command = [sys.executable, "-m", "tests.docs.ollama", *map(str, words)]
    env = {**os.environ, "OLLAMA_MODELS": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("text", PARSED)
def test_it_reads_what_ollama_reads(text: str) -> None:
    wanted = [("parameter " + n[10:] if " " in n else n.lower(), v) for n, v in PARSED[text]]
    assert list(ollama.read_modelfile(text)) == wanted


@pytest.mark.parametrize("text", [*REFUSED, "FORM x\n", "FROM x\nPARAMETER stop\n"])
def test_it_refuses_what_ollama_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"instruction|closed|without a name"):
        list(ollama.read_modelfile(text))


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
]


def test_a_template_renders_as_the_tokenizer_does(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    found = modelfile.find_pieces(tokenizer)
    assert found is not None
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    rendered = ollama.render(ollama.parse_template(found.go()), TURNS)
    assert rendered == wanted.removeprefix(tokenizer.bos_token)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        (
            '{{ range .Messages }}{{ .Role }}{{ if eq .Role "user" }}!{{ end }};{{ end }}',
            "system;user!;assistant;user!;",
        ),
        (
            '{{- range .Messages -}}\n  {{ if eq .Role "system" }}S{{ else if eq .Role "system" }}T{{ end }}\n{{- end }}',
            "S",
        ),
    ],
)
def test_a_template_is_run(text: str, rendered: str) -> None:
    assert ollama.render(ollama.parse_template(text), TURNS) == rendered


@pytest.mark.parametrize(
    "text",
    [
        "{{ .Prompt }}",
        "{{ range .Messages }}",
        "{{ end }}",
        '{{ else if eq .Role "user" }}{{ end }}',
        "{{ .Content }}",
    ],
)
def test_a_template_beyond_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="action|without|outside"):
        ollama.render(ollama.parse_template(text), TURNS)


def test_the_answer_is_that_of_the_model(exported: Path, lora, tmp_path: Path) -> None:
    asked = "Reverse: jet fan red"
    assert call(tmp_path, "create", "toy", "-f", exported).returncode == 0
    answered = call(tmp_path, "run", "toy", asked).stdout
    [gguf] = exported.parent.glob("*.gguf")
    done = lora("generate", gguf, "--prompt", asked, "--max-new-tokens", ollama.LONGEST)
    assert f"{gguf}: {answered.strip()}\n" in done.stdout
    text = exported.read_text()
    wrong = exported.with_name("Wrong")
    for there, other in (('<|assistant|>\n"""', '"""'), ('stop "<|end|>"', 'stop "e"')):
        assert there in text
        wrong.write_text(text.replace(there, other))
        assert call(tmp_path, "create", "wrong", "-f", wrong).returncode == 0
        assert call(tmp_path, "run", "wrong", asked).stdout != answered


@pytest.mark.parametrize(
    ("there", "other", "said"),
    [
        ("FROM ./", "FROM ./no-", "FROM names no GGUF"),
        ("PARAMETER stop", "PARAMETER stops", "unknown parameter 'stops'"),
        ("PARAMETER stop", "ADAPTER", "adapter is Ollama's"),
        ("TEMPLATE", "SYSTEM", "no TEMPLATE"),
    ],
)
def test_a_wrong_modelfile_is_refused(exported: Path, there: str, other: str, said: str) -> None:
    text = exported.read_text()
    assert there in text
    wrong = exported.with_name("Refused")
    wrong.write_text(text.replace(there, other))
    with pytest.raises(ValueError, match=said):
        ollama.create("x", wrong)


def test_what_it_cannot_do_ends_with_its_word(exported: Path, tmp_path: Path) -> None:
    for words in (["run", "nobody", "Hi."], ["create", "X Y", "-f", exported], ["pull", "llama"]):
        done = call(tmp_path, *words)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
    kept = ollama.create("toy", exported)
    (tmp_path / "toy.json").write_text(json.dumps(kept | {"sha256": "0"}))
    assert "was changed since" in call(tmp_path, "run", "toy", "Hi.").stderr
