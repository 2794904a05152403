"""A model whose only vocabulary is a SentencePiece file is read; a token that a recipe adds may end
its answers.

Hermetic: the tiny model without its tokenizer.json. Alone: pytest tests/models/test_tokenizer.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from lora_cli.models import Base, load_tokenizer, save_tokenizer
from lora_cli.models.tokenizer import load_recipe_tokenizer
from lora_cli.recipe import load_recipe


def test_tokenizer_model_alone_is_enough(tiny: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(tiny / "model", tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    given, wanted = (
        load_tokenizer(str(each))("red dog sun", add_special_tokens=False)["input_ids"]
        for each in (alone, tiny / "model")
    )
    assert given == wanted


def test_a_saved_tokenizer_splits_as_the_base_s_does(vocabularies: Path, tmp_path: Path) -> None:
    # its files name a class whose own way to split is another, which an adapter's folder would take
    base, saved = tmp_path / "base", tmp_path / "saved"
    known = AutoTokenizer.from_pretrained(vocabularies, gguf_file="ggml-vocab-llama-bpe.gguf")
    known.save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "olmo2"}))
    told = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps(told | {"tokenizer_class": "GPT2Tokenizer"})
    )
    tokenizer = load_tokenizer(str(base))
    save_tokenizer(tokenizer, saved, str(base), None)
    text = "DON'T 2024-01"
    assert load_tokenizer(str(saved))(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_token_that_the_recipe_adds_may_end_an_answer(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(
        f"model: {{name_or_path: {tiny / 'model'}, chat_template: chatml, add_special_tokens: "
        "['<|im_start|>', '<|im_end|>']}\ndata: {path: rows.jsonl}\n"
        "training: {eos_token: '<|im_end|>', pad_token: '<pad>'}\n"
    )
    tokenizer, added, _ = load_recipe_tokenizer(load_recipe(path), Base(str(tiny / "model")))
    assert tokenizer.eos_token_id == added[1]
    assert tokenizer.pad_token == "<pad>"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], return_dict=False
    )
    assert ids.count(added[1]) == 2
