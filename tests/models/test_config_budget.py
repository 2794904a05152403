"""A configuration whose numbers ask for more than there is: refused by field before anything is
built.

Hermetic: the tiny model with another config.json. Alone: pytest tests/models/test_config_budget.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from lora_cli.common.errors import LoraError
from lora_cli.models import config
from lora_cli.models.base import Base

SAID = {
    "num_labels": (10**9, "num_labels is 1,000,000,000, and at most 100,000"),
    "num_hidden_layers": (10**6, "num_hidden_layers is 1,000,000, and at most 2,000"),
    "num_attention_heads": (10**6, "num_attention_heads is 1,000,000, and at most 100,000"),
    "num_local_experts": (10**6, "num_local_experts is 1,000,000, and at most 100,000"),
    "hidden_size": (10**9, "hidden_size is 1,000,000,000, and at most 134,217,728"),
    "max_position_embeddings": (10**12, "max_position_embeddings is 1,000,000,000,000"),
    "vocab_size": (10**8, r"asks for .* model.embed_tokens.weight of \(100000000, "),
    "intermediate_size": (10**7, "asks for .* model.layers.0.mlp.gate_proj.weight of"),
    "text_config": ({"num_layers": 10**6}, "text_config.num_layers is 1,000,000"),
}


@pytest.mark.parametrize("field", SAID)
def test_what_is_too_large_is_named(tiny: Path, tmp_path: Path, field: str) -> None:
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    value, said = SAID[field]
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {field: value}))
    with pytest.raises(LoraError, match=said):
        Base(str(folder)).load(torch.float32)


def test_no_known_model_is_refused() -> None:
    """transformers' own defaults are those of a family's first model."""
    tried = 0
    for kind in sorted(CONFIG_MAPPING):
        try:
            written = CONFIG_MAPPING[kind]().to_dict()
        except Exception:  # needs arguments, or a package
            continue
        config.refuse_impossible(kind, written)
        tried += 1
    assert tried > 300
