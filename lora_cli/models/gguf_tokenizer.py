"""Write the tokenizer of a GGUF file, as transformers reads it, without what it adds to it.

It runs where the file is read: in the process of `gguf_program.py`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from lora_cli.common import files
from lora_cli.models.gguf_weights import ALONE

DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""What llama.cpp splits at each digit, and then as GPT-2 does, by the names that files have for it
(`tokenizer.ggml.pre`; llama-vocab.cpp): transformers knows none, and splits as GPT-2 does."""
BY_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}

if TYPE_CHECKING:
    from gguf import GGUFReader


def write_tokenizer(alone: Path, reader: GGUFReader, folder: Path) -> None:
    """Write the tokenizer of the GGUF file in the folder `alone`."""
    read = AutoTokenizer.from_pretrained(str(alone), gguf_file=ALONE, trust_remote_code=False)
    read.save_pretrained(folder)
    _mend(reader, folder)


def _mend(reader: GGUFReader, folder: Path) -> None:
    """Take out of a tokenizer what transformers makes of every SentencePiece vocabulary, and this
    file does not have: a token after the last one, and a space before a text. Let it split digits
    where the file says so."""
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    num_tokens = len(_read_value(reader, "tokenizer.ggml.tokens", []))
    made["added_tokens"] = [each for each in made["added_tokens"] if each["id"] < num_tokens]
    splitter = made["pre_tokenizer"] or {}
    adds_space = _read_value(reader, "tokenizer.ggml.add_space_prefix", True)
    if splitter.get("type") == "Metaspace" and not adds_space:
        splitter["prepend_scheme"] = "never"
        decoders = made["decoder"].get("decoders", [])
        made["decoder"]["decoders"] = [each for each in decoders if each["type"] != "Strip"]
    if _read_value(reader, "tokenizer.ggml.pre", "") in DIGITS:
        made["pre_tokenizer"] = BY_DIGITS
    files.write_text(file, json.dumps(made, ensure_ascii=False))
    if _read_value(reader, "tokenizer.ggml.model", "") == "llama":
        (folder / "tokenizer.model").write_bytes(_make_pieces(reader, adds_space))
        settings = files.read_json(folder / "tokenizer_config.json")
        settings["add_prefix_space"] = bool(adds_space)  # where llama.cpp's converter looks for it
        files.write_json(folder / "tokenizer_config.json", settings)


def _make_pieces(reader: GGUFReader, adds_space: bool) -> bytes:
    """Return the SentencePiece vocabulary that the file was made from: llama.cpp's converter asks
    for it, and knows by it which tokens are special."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, too

    made: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    read = partial(_read_value, reader)
    kinds = read("tokenizer.ggml.token_type", [])  # numbered as SentencePiece numbers them
    pieces = zip(read("tokenizer.ggml.tokens", []), read("tokenizer.ggml.scores", []), kinds)
    for text, score, kind in pieces:
        made.pieces.add(piece=text, score=score, type=kind)
    made.trainer_spec.model_type = made.trainer_spec.BPE
    made.trainer_spec.byte_fallback = 6 in kinds
    made.trainer_spec.vocab_size = len(made.pieces)
    for role, of_ggml in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = read(f"tokenizer.ggml.{of_ggml}_token_id", -1)
        setattr(made.trainer_spec, f"{role}_id", number)
        if number >= 0:
            setattr(made.trainer_spec, f"{role}_piece", made.pieces[number].piece)
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.add_dummy_prefix = adds_space
    made.normalizer_spec.remove_extra_whitespaces = False
    return made.SerializeToString()


def _read_value(reader: GGUFReader, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()
