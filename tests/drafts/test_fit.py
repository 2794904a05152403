"""What fits a device: LoRA, then QLoRA, activations computed again, smaller batches, shorter rows.

Hermetic: a network of 100 million parameters that is never made, only its shape. Alone:
pytest tests/drafts/test_fit.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_cli.common import LoraError
from lora_cli.drafts import fit
from lora_cli.drafts.draft import Draft
from lora_cli.plan.hardware import GIB, Hardware
from tests import tasks

WIDE = {
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 8192,
    "dtype": "bfloat16",
    "max_position_embeddings": 8192,
}


@pytest.fixture
def draft(tiny: Path, tmp_path: Path) -> Draft:
    """A recipe on a wide base, of which there is the configuration alone."""
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base, ignore=shutil.ignore_patterns("*.safetensors"))
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | WIDE))
    made = Draft(Path("mine.yaml"))
    made.put("model.name_or_path", str(base))
    made.put("data.path", "rows.jsonl")
    made.put("training.per_device_train_batch_size", 8)
    made.put("training.max_length", 128)
    return made


def card(memory: float) -> Hardware:
    """A GPU with so many GiB."""
    return Hardware("cuda", "a card", int(memory * GIB), (8, 0), bf16=True)


@pytest.mark.parametrize(("memory", "method"), [(24, "lora"), (1.3, "qlora")])
def test_the_first_method_that_fits_is_taken(draft: Draft, memory: float, method: str) -> None:
    found = fit.fit(draft, fit.METHODS, card(memory))
    assert draft.read("method") == found.found.recipe.method == method
    assert found.need is not None
    assert found.need.total <= fit.SAFE * memory * GIB
    assert draft.read("training.max_length") == 128
    assert found.describe().endswith(f"of {memory:.1f} GiB on a card")


def test_a_method_that_is_asked_for_is_the_only_one_tried(draft: Draft) -> None:
    fixed = Draft(draft.path, ["training.max_length=128"])
    fixed.values, fixed.notes = draft.values, draft.notes
    with pytest.raises(LoraError, match=r"lora on .* needs .* of 1\.2 GiB on a card, which is too"):
        fit.fit(fixed, ["lora"], card(1.2))


def test_rows_that_are_too_long_are_shortened(draft: Draft, capsys) -> None:
    draft.put("training.max_length", 8192)
    found = fit.fit(draft, ["qlora"], card(2.5))
    length = draft.read("training.max_length")
    assert fit.SHORTEST <= length < 8192
    assert length % fit.ROUND == 0
    assert found.found.recipe.training.gradient_checkpointing
    assert found.need is not None
    assert found.need.total <= 2.5 * GIB
    assert f"rows of over {length:,} tokens do not fit" in capsys.readouterr().err


def test_batches_become_smaller_where_rows_do_not_share_sequences(tmp_path: Path) -> None:
    base = tasks.make_base(tmp_path / "base", "bert", max_position_embeddings=4096)
    made = Draft(Path("mine.yaml"))
    made.put("task", "sequence_classification")
    made.put("model.name_or_path", str(base))
    made.put("data.path", str(tasks.write_classes(tmp_path / "rows.csv", 40)))
    made.put("training.per_device_train_batch_size", 8)
    made.put("training.max_length", 4096)
    whole = fit.fit(made, ["lora"], Hardware("cpu", "memory", 64 * GIB))
    assert whole.need is not None
    assert made.read("training.per_device_train_batch_size") == 8
    fit.fit(made, ["lora"], Hardware("cpu", "memory", int(whole.need.total * 0.5)))
    size = made.read("training.per_device_train_batch_size")
    assert size in (1, 2, 4)
    assert size * made.read("training.gradient_accumulation_steps") == 8
    assert made.read("training.max_length") == 4096
