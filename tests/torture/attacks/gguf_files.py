"""GGUF files of a stranger's: a sound one with some of its texts, numbers or tensors replaced."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def read(path: Path) -> tuple[str, dict[str, tuple[Any, Any, Any]], list[tuple[str, Any, Any]]]:
    """Architecture, fields (value, type, type of items), tensors of a GGUF."""
    reader = gguf.GGUFReader(path)
    fields = {}
    for name, each in reader.fields.items():
        if not name.startswith("GGUF."):
            fields[name] = (
                each.contents(),
                each.types[0],
                each.types[-1] if len(each.types) > 1 else None,
            )
    tensors = [(each.name, np.array(each.data), each.tensor_type) for each in reader.tensors]
    return fields.pop("general.architecture")[0], fields, tensors


def write(
    path: Path,
    arch: str,
    fields: dict[str, tuple[Any, Any, Any]],
    tensors: list[tuple[str, Any, Any]],
) -> None:
    """Write them."""
    writer = gguf.GGUFWriter(path, arch)
    for name, (value, kind, items) in fields.items():
        writer.add_key_value(name, value, kind, sub_type=items)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite(path: Path, how: str, text: str, chance: random.Random) -> None:
    """Put a text where a GGUF has one."""
    arch, fields, tensors = read(path)
    string = gguf.GGUFValueType.STRING
    if how == "architecture":
        arch = text
    elif how == "name":
        fields["general.name"] = (text, string, None)
    elif how == "template":
        fields["tokenizer.chat_template"] = (
            chance.choice([text, f"{{{{ raise_exception('{text}') }}}}", "{{ x"]),
            string,
            None,
        )
    elif how == "key":
        fields[text] = (text, string, None)
    elif how == "tensor":
        tensors = [(text, *tensors[0][1:]), *tensors[1:]]
    elif how == "tokens":
        tokens, *kinds = fields["tokenizer.ggml.tokens"]
        fields["tokenizer.ggml.tokens"] = (
            [token if number < 4 else f"{text}{number}" for number, token in enumerate(tokens)],
            *kinds,
        )
    else:
        fields[f"tokenizer.ggml.{how}"] = (text, string, None)
    write(path, arch, fields, tensors)
