"""A model whose only vocabulary is a SentencePiece file is read; what a tokenizer is called is kept.

Hermetic: the tiny model without its tokenizer.json, and GPT-2's tokenizer. Alone: pytest tests/models/test_tokenizer.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_cli.models import load_tokenizer, save_tokenizer


def test_tokenizer_model_alone_is_enough(tiny: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(tiny / "model", tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    given, wanted = (
        load_tokenizer(str(each))("red dog sun", add_special_tokens=False)["input_ids"]
        for each in (alone, tiny / "model")
    )
    assert given == wanted


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_the_base_s_name_for_a_tokenizer_is_kept(
    vocabularies: Path, tmp_path: Path, family: str
) -> None:
    # as Phi-4: its converter asks whether it is GPT-2's; transformers takes it for none of Phi-3's
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(vocabularies, gguf_file="ggml-vocab-gpt-2.gguf").save_pretrained(
        base
    )
    (base / "config.json").write_text(json.dumps({"model_type": family}))
    save_tokenizer(load_tokenizer(str(base)), tmp_path / "saved", str(base), None)
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "GPT2Tokenizer"
    assert load_tokenizer(str(tmp_path / "saved"))("red dog")["input_ids"] == [445, 3290]
