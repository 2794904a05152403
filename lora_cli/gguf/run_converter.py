"""Run one of llama.cpp's converters: `python run_converter.py CONVERTER MODEL [OPTION …]`.

A program of its own, which imports nothing of lora. The converters ask for some fields of a
configuration that transformers 5 writes under other names, and they take for granted that a
family's layers for guessing several tokens ahead are in the files.
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import struct
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

Config = dict[str, Any]


def _find_rotary_share(config: Config) -> float:
    return (config.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0


def _find_head_width(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


OLD_NAMES: dict[str, dict[str, Callable[[Config], Any]]] = {
    "gpt2": {"n_ctx": lambda config: config["n_positions"]},
    "gpt_neox": {"rotary_pct": _find_rotary_share},
    "cohere2": {"rotary_pct": _find_rotary_share},
    "falcon_h1": {"head_dim": _find_head_width},
    "minimax_m2": {
        "rotary_dim": lambda config: int(
            _find_rotary_share(config) * (config.get("head_dim") or _find_head_width(config))
        )
    },
}
"""By model_type: fields that a converter reads and transformers 5 does not write, with their
values."""


def add_old_names(config: Config) -> Config:
    """Add to a configuration, and to that of its text model, what a converter reads under a name of
    before; return it."""
    if isinstance(config.get("text_config"), dict):
        add_old_names(config["text_config"])
    for name, find in OLD_NAMES.get(str(config.get("model_type")), {}).items():
        if config.get(name) is None:
            config[name] = find(config)
    return config


def has_ahead_layers(model: Path) -> bool:
    """Whether the files of a model hold layers that guess several tokens ahead.

    They are named so, or numbered after the layers that the configuration counts.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    count = text.get("num_hidden_layers")
    for name in _list_tensors(model):
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if re.search(r"(^|\.)(mtp|nextn)\b", name):
            return True
        if layer and isinstance(count, int) and int(layer[1]) >= count:
            return True
    return False


def _list_tensors(model: Path) -> set[str]:
    """List the tensors in the headers of a folder's safetensors files."""
    found: set[str] = set()
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            found |= json.loads(opened.read(size)).keys()
    return found


def main() -> None:
    """Prepare the converter, then run it as if it had been called itself."""
    converter, model = Path(sys.argv[1]), Path(sys.argv[2])
    sys.argv = sys.argv[1:]
    sys.path[0] = str(converter.parent)
    if (converter.parent / "conversion").is_dir() and (model / "config.json").is_file():
        _prepare_converter(model)
    runpy.run_path(str(converter), run_name="__main__")


def _prepare_converter(model: Path) -> None:
    """Let every class of the converter read old names, and leave layers out that are not there."""
    ModelBase = importlib.import_module("conversion").ModelBase  # noqa: N806 – a class
    load, make = ModelBase.load_hparams, ModelBase.__init__

    @wraps(load)
    def load_with_old_names(*given: Any, **named: Any) -> Config:
        return add_old_names(load(*given, **named))

    @wraps(make)
    def make_with_old_names(self: Any, *given: Any, **named: Any) -> None:
        if named.get("hparams"):  # some read config.json themselves
            add_old_names(named["hparams"])
        make(self, *given, **named)

    ModelBase.load_hparams = staticmethod(load_with_old_names)
    ModelBase.__init__ = make_with_old_names
    ModelBase.no_mtp = not has_ahead_layers(model)


if __name__ == "__main__":
    main()
