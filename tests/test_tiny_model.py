"""scripts/make_tiny_model.py: the files, the same bytes twice, one BOS, masks, and rows that are
really held out.

Hermetic: two runs of the script side by side, of a few steps each, in a temporary folder; no
network. Whether a whole run learns its tasks is for the tests that train on it. Alone: pytest
tests/test_tiny_model.py
"""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_tiny_model.py"
TURN = [
    {"role": "user", "content": "Sort: red dog sun"},
    {"role": "assistant", "content": "dog red sun"},
]


def make(folder: Path) -> Path:
    """A model of three steps, in a process of its own."""
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, "--steps", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("exact match on held-out rows: Copy ")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "one")


@pytest.fixture(scope="module")
def tokenizer(made: Path):
    return AutoTokenizer.from_pretrained(made / "model")


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_same_seed_same_bytes(made: Path, tmp_path: Path) -> None:
    assert hashes(make(tmp_path / "two")) == hashes(made)


def test_files(made: Path) -> None:
    model = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    model |= {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert set(hashes(made)) == {f"model/{name}" for name in model} | {
        "train.jsonl",
        "eval.jsonl",
        "DONE",
    }
    assert [path.name for path in made.parent.iterdir()] == ["one"], "the folder beside it is gone"
    done = json.loads((made / "DONE").read_text())
    assert (done["seed"], done["steps"]) == (0, 3)
    assert done["script_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert set(done["exact_match"]) == {"Copy", "Sort", "First", "Last", "Count", "Reverse"}


def test_a_folder_with_files_is_left_alone(made: Path, monkeypatch, capsys) -> None:
    before = hashes(made)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(made), "--steps", "3"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    assert hashes(made) == before


def test_held_out_rows(made: Path) -> None:
    train, evaluation = rows(made, "train.jsonl"), rows(made, "eval.jsonl")
    assert len(train) >= 2000
    assert len(evaluation) >= 200
    prompts = [row["prompt"] for row in train + evaluation]
    assert len(set(prompts)) == len(prompts)
    for row in train + evaluation:
        task, *words = row["prompt"].split()
        assert task == "Reverse:"
        assert row["completion"].split() == words[::-1]


def test_special_tokens(made: Path, tokenizer) -> None:
    names = ["<s>", "<|end|>", "<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert set(tokenizer.all_special_tokens) == set(names)
    for name in names:
        assert tokenizer.encode(name, add_special_tokens=False) == [
            tokenizer.convert_tokens_to_ids(name)
        ]
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    assert len(matrices) == 2 + 2 * 7
    assert all(weight.shape[0] % 64 == 0 and weight.shape[1] % 256 == 0 for weight in matrices)


@pytest.mark.parametrize(
    "system", [[], [{"role": "system", "content": "Be brief."}]], ids=["bare", "system"]
)
def test_template(tokenizer, system: list[dict[str, str]]) -> None:
    messages = [*system, *TURN]
    whole = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = whole["input_ids"]
    assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    learnt = [token for token, answer in zip(ids, whole["assistant_masks"], strict=True) if answer]
    assert tokenizer.decode(learnt) == "dog red sun<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt + learnt == ids


@pytest.mark.parametrize(
    "text",
    ["red dog", " red", "  two  spaces ", "line\n\n end\n", "tab\there", "\n", ""]
    + ["naïve café 你好 🙂", "0123456789", "web wef gared yakyak zoozoo"],
)
def test_same_pieces_as_sentencepiece(made: Path, tokenizer, text: str) -> None:
    """llama.cpp reads tokenizer.model, transformers the merges made from it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(made / "model" / "tokenizer.model"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == model.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids], (
        "plain text gets its BOS, as with Llama"
    )


def test_a_word_is_one_piece(made: Path, tokenizer) -> None:
    words = {word for row in rows(made, "eval.jsonl") for word in row["completion"].split()}
    assert len(words) == 40
    assert all(
        len(tokenizer.encode(space + w, add_special_tokens=False)) == 1
        for w in words
        for space in ("", " ")
    )
