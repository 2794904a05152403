"""What a person can get wrong in `lora predict`, and in verbs that are for models that write, and the
one message each gets. Compared with bad_predictions.txt.

Each case is a whole call of `lora` in this process. Hermetic: random models of two layers. Alone:
pytest tests/cli/test_bad_predictions.py. After a change of a message:
python -m tests.cli.test_bad_predictions > tests/cli/bad_predictions.txt
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests import snapshots, tasks
from tests.cli.test_bad_artefacts import base, gguf
from tests.cli.test_bad_inputs import Arguments, Case, said, typed, written

SNAPSHOT = Path(__file__).parent / "bad_predictions.txt"
LABELS = {"SequenceClassification": ["ham", "spam"], "TokenClassification": ["O", "B-X", "I-X"]}
ROWS = '{"text": "good tree", "label": "ham"}\n{"text": "sad river", "label": "spam"}\n'


def model(d: Path, kind: str = "SequenceClassification", name: str = "model") -> Path:
    """A whole model in a folder, whose head is random."""
    found = tasks.make_base(d / "bert", "bert")
    labels = dict(enumerate(LABELS[kind]))
    names = {"id2label": labels, "label2id": {label: at for at, label in labels.items()}}
    auto = getattr(transformers, f"AutoModelFor{kind}")
    auto.from_pretrained(found, **names).save_pretrained(d / name)
    transformers.AutoTokenizer.from_pretrained(found).save_pretrained(d / name)
    (d / "rows.jsonl").write_text(ROWS)
    return d / name


def tagger(d: Path) -> Path:
    return model(d, "TokenClassification", "tagger")


def lora(d: Path, saved: list[str]) -> Path:
    """An adapter by PEFT that has these modules beside LoRA."""
    found = tasks.make_base(d / "bert", "bert")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(found)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=saved, task_type="SEQ_CLS")
    adapted = get_peft_model(network, config)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_()
    adapted.peft_config["default"].base_model_name_or_path = "bert"
    adapted.save_pretrained(d / "adapter")
    return d / "adapter"


def asking(*options: str, rows: str | None = None, make: Callable[[Path], object] = model) -> Case:
    """`lora predict` of a sound model, with rows of its own."""

    def call(d: Path) -> Arguments:
        name = str(getattr(make(d), "name", "model"))
        if rows is not None:
            (d / "rows.jsonl").write_text(rows)
        return ["predict", name, *(options or ("--data", "rows.jsonl"))]

    return call


def file(name: str, text: str | bytes, *options: str) -> Case:
    """The same, of a file of another name."""
    return asking("--data", name, *options, make=lambda d: [written(d / name, text), model(d)][1])


def spoilt(d: Path) -> Path:
    """A model with a weight that is no number."""
    weights = load_file(model(d) / "model.safetensors")
    weights["classifier.weight"][0, 0] = torch.nan
    save_file(weights, d / "model" / "model.safetensors", {"format": "pt"})
    return d / "model"


def headless(d: Path) -> Path:
    """A model without its head."""
    weights = load_file(model(d) / "model.safetensors")
    del weights["classifier.weight"], weights["classifier.bias"]
    save_file(weights, d / "model" / "model.safetensors", {"format": "pt"})
    return d / "model"


def without_padding(d: Path) -> Path:
    """A model whose tokenizer has nothing that fills short rows."""
    path = model(d) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("pad_token", "eos_token")})
    )
    return path.parent


def answering(d: Path) -> Path:
    """A whole model that answers questions."""
    found = tasks.make_base(d / "bert", "bert")
    auto = transformers.AutoModelForQuestionAnswering
    auto.from_pretrained(found).save_pretrained(d / "model")
    transformers.AutoTokenizer.from_pretrained(found).save_pretrained(d / "model")
    return d / "model"


def labelled(*names: str) -> Callable[[Path], Path]:
    """A model whose labels are called so."""

    def make(d: Path) -> Path:
        path = model(d) / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "id2label": dict(enumerate(names)), "label2id": {}}))
        return path.parent

    return make


LONG = json.dumps({"text": " ".join(["tree"] * 100)}) + "\n"
HERE = ("--data", "rows.jsonl")
BAD: dict[str, Case] = {
    "predict: no model": typed("predict"),
    "predict: no rows": typed("predict", "model"),
    "predict: rows twice": typed("predict", "model", "--data", "rows.jsonl", "--text", "x"),
    "predict: --json beside the answers": typed("predict", "model", "--text", "x", "--json"),
    "predict: no rows at a time": typed("predict", "model", "--text", "x", "--batch-size", "0"),
    "predict: rows of one token": typed("predict", "model", "--text", "x", "--max-length", "1"),
    "predict: a text without a question": asking("--text", "x", make=answering),
    "predict: no such model": typed("predict", "./gone", "--text", "x"),
    "predict: a model that writes": lambda d: [base(d), ["predict", "base", "--text", "x"]][1],
    "predict: a GGUF": lambda d: [gguf(d), ["predict", "model.gguf", "--text", "x"]][1],
    "predict: a base": lambda d: [model(d), ["predict", "bert", "--text", "x"]][1],
    "predict: a head that the files lack": asking(make=headless),
    "predict: a pooler that the adapter lacks": asking(
        "--text", "tree", make=lambda d: lora(d, ["classifier"])),
    "predict: models of two tasks": lambda d: [
        model(d), tagger(d), ["predict", "model", "tagger", "--text", "x"]][2],
    "predict: no such file": asking("--data", "gone.jsonl"),
    "predict: a file of an unknown ending": file("rows.xml", "<x/>"),
    "predict: an empty file": asking(rows=""),
    "predict: a file of empty lines": asking(rows="\n\n"),
    "predict: a folder of nothing": asking("--data", "here", make=lambda d: [(d / "here").mkdir(), model(d)][1]),
    "predict: no text": asking(rows='{"body": "good tree", "id": 1}\n'),
    "predict: no words": asking(rows='{"body": ["good"]}\n', make=tagger),
    "predict: a table without names": file("rows.csv", "A tree is good, they say.\nNo, it is sad.\n"),
    "predict: a table in Latin-1": file("rows.csv", "text\nschöner Baum\n".encode("latin-1")),
    "predict: a column of no meaning": asking(*HERE, "--column", "txet=body"),
    "predict: a column of half a name": asking(*HERE, "--column", "body"),
    "predict: a column that is not there": asking(*HERE, "--column", "text=txt"),
    "predict: a column to keep that is not there": asking(*HERE, "--keep", "labl"),
    "predict: a label that is none": asking(rows='{"text": "tree", "label": "spma"}\n'),
    "predict: a label like none": asking(rows='{"text": "tree", "label": "eggs"}\n'),
    "predict: an empty text": asking(rows='{"text": "tree"}\n{"text": " "}\n'),
    "predict: a text that is none": asking(rows='{"text": "tree"}\n{"text": ["tree"]}\n'),
    "predict: a row without text": asking(rows='{"text": "tree"}\n{"txt": "tree"}\n'),
    "predict: a row that is no JSON": asking(rows='{"text": "tree"}\n{"text": tree}\n'),
    "predict: an entity that goes on": asking(
        rows='{"tokens": ["good", "tree"], "tags": ["O", "I-X"]}\n', make=tagger),
    "predict: more tags than words": asking(
        rows='{"tokens": ["good", "tree"], "tags": ["O"]}\n', make=tagger),
    "predict: a long row": asking(*HERE, "--on-long-row", "error", rows=LONG),
    "predict: longer than it reads": asking(*HERE, "--max-length", "999"),
    "predict: a policy that is none": typed("predict", "model", "--text", "x", "--on-long-row", "drop"),
    "predict: the file is there": asking(
        *HERE, "--out", "out.jsonl", make=lambda d: [written(d / "out.jsonl", ""), model(d)][1]),
    "predict: into no folder": asking(*HERE, "--out", "gone/out.jsonl"),
    "predict: weights that are not finite": asking(make=spoilt),
    "predict: a label without a name": asking("--text", "x", make=labelled("ham", "")),
    "predict: two labels of one name": asking("--text", "x", make=labelled("ham", "ham")),
    "predict: nothing fills short rows": asking(make=without_padding),
    "generate: a model that classifies": lambda d: [model(d), ["generate", "model", "-p", "x"]][1],
    "generate: an adapter that classifies": lambda d: [
        lora(d, ["classifier", "bert.pooler"]), ["generate", "adapter", "-p", "x"]][1],
    "chat: a model that tags": lambda d: [tagger(d), ["chat", "tagger"]][1],
    "export-gguf: a model that classifies": lambda d: [model(d), ["export-gguf", "model"]][1],
    "export-gguf: an adapter that classifies": lambda d: [
        lora(d, ["classifier", "bert.pooler"]), ["export-gguf", "adapter"]][1],
    "export-gguf: its adapter alone": lambda d: [
        lora(d, ["classifier", "bert.pooler"]), ["export-gguf", "adapter", "--adapter-only"]][1],
}  # fmt: skip


def test_the_snapshot_covers_every_case() -> None:
    assert len(BAD) >= 40
    assert snapshots.list_names(SNAPSHOT) == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_bad_input_and_that_nothing_is_silent(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    found = said(name, tmp_path, BAD)
    assert found == snapshots.find(SNAPSHOT, name)
    lines = found.splitlines()
    assert lines[1].startswith("error: ")
    assert lines[-1] in ("(exit 1)", "(exit 2)")
    assert lines[-2].startswith("hint: ")
    assert len(lines) - 2 <= 6
    assert "Traceback" not in found
    assert not (tmp_path / "gone").exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["LORA_CACHE_DIR"] = fresh
        sys.stdout.write(snapshots.render(BAD, lambda name, folder: said(name, folder, BAD)))
