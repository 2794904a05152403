"""A model whose only vocabulary is a SentencePiece file is read.

Hermetic: the tiny model without its tokenizer.json. Alone: pytest tests/models/test_tokenizer.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_cli.models import load_tokenizer


def test_tokenizer_model_alone_is_enough(tiny: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(tiny / "model", tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    given, wanted = (
        load_tokenizer(str(each))("red dog sun", add_special_tokens=False)["input_ids"]
        for each in (alone, tiny / "model")
    )
    assert given == wanted
