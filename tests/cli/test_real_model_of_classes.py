"""A real encoder through the whole chain, as a user types it: all-MiniLM-L6-v2 learns to tell which
package a docstring is of, and what PEFT and transformers load again answers as it did.

Hermetic: the model is made of a package, the rows are the docstrings of installed ones. Two minutes
on a quiet core. Alone: pytest -m slow tests/cli/test_real_model_of_classes.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
LEARNED = 0.5
"""The least share of held-out docstrings; chance is 0.125 with eight packages."""


def classify(network: torch.nn.Module, folder: Path, texts: list[str]) -> torch.Tensor:
    """Logits by transformers alone, of padded batches."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"truncation": True, "max_length": 96, "padding": True, "return_tensors": "pt"}
    with torch.inference_mode():
        batches = [tokenizer(texts[at : at + 32], **options) for at in range(0, len(texts), 32)]
        return torch.cat([network.eval()(**batch).logits for batch in batches])


def test_docstrings_are_told_apart_by_package(lora, minilm: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "docstrings.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    recipe = tmp_path / "docs.yaml"
    recipe.write_text(
        f"task: sequence_classification\nmodel: {{name_or_path: {minilm}}}\n"
        "lora: {r: 8, lora_alpha: 16}\n"
        f"data: {{path: {tmp_path / 'train.jsonl'}, eval_path: {tmp_path / 'test.jsonl'}, "
        "on_long_row: truncate}\n"
        "training: {learning_rate: 2.0e-3, max_steps: 120, per_device_train_batch_size: 16, "
        f"max_length: 96}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    done = lora("train", recipe)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    accuracy = next(each["eval_accuracy"] for each in records if "eval_accuracy" in each)
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    done = lora("merge", adapter, merged)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").open()]
    texts = [row["text"] for row in rows]
    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(minilm, config=config)
    by_peft = classify(PeftModel.from_pretrained(base, str(adapter)), adapter, texts)
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    by_transformers = classify(plain, merged, texts)
    assert (by_peft - by_transformers).abs().max() < 1e-4
    named = [plain.config.id2label[at] for at in by_transformers.argmax(-1).tolist()]
    right = sum(name == row["label"] for name, row in zip(named, rows)) / len(rows)
    assert right == pytest.approx(accuracy, abs=1 / len(rows))
    assert accuracy >= LEARNED
    sys.stdout.write(f"accuracy {accuracy:.3f}, by transformers {right:.3f}\n")
