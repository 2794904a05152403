"""Run one of llama.cpp's converters: `python run_converter.py CONVERTER MODEL [OPTION …]`.

A program of its own, which imports nothing of lora. The converters ask for some fields of a
configuration that transformers 5 writes under other names, and they take for granted that a
family's layers for guessing several tokens ahead are in the files, and that embeddings are padded.
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


def _mark_layers(config: Config, field: str, kind: str) -> list[int]:
    """Return 1 for each layer that is of a kind, else 0."""
    return [int(each == kind) for each in config[field]]


def _describe_kimi_layers(config: Config) -> Config:
    full = _mark_layers(config, "layer_types", "full_attention")
    return {
        "full_attn_layers": [layer for layer, is_full in enumerate(full, 1) if is_full],
        "kda_layers": [layer for layer, is_full in enumerate(full, 1) if not is_full],
        "num_heads": config["linear_num_heads"],
        "head_dim": config["linear_head_dim"],
        "short_conv_kernel_size": config["linear_conv_kernel_dim"],
    }


def _count_leading_dense(config: Config) -> int:
    return (*_mark_layers(config, "mlp_layer_types", "dense"), 0).index(0)


def _repeat_by_layer(config: Config, value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] * config["num_hidden_layers"]


def _count_falcon_key_heads(config: Config) -> int:
    """Count the heads for keys as transformers' FalconAttention does, whatever the field says."""
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads") or config["num_attention_heads"]
    return 1 if config.get("multi_query", True) else config["num_attention_heads"]


def _name_layers(*names: tuple[str, str]) -> Callable[[Config], list[str]]:
    """Return what gives the kinds of layers the names of before."""
    old = dict(names)
    return lambda config: [old.get(kind, kind) for kind in config["layer_types"]]


def _spell_nemotron_layers(config: Config) -> str:
    letters = {"mamba": "M", "attention": "*", "moe": "E", "mlp": "-"}
    letters |= {"linear_attention": "M", "full_attention": "*"}
    return "".join(letters[kind] for kind in config.get("layers_block_type") or ())


def _drop_without_experts(name: str) -> Callable[[Config], Any]:
    """Return what leaves a field as it is, or takes it from a network that has no experts."""

    def find(config: Config) -> Any:
        return config.get(name) if "moe" in config.get("layers_block_type", ["moe"]) else None

    return find


SIGMOID: dict[str, Callable[[Config], Any]] = {"scoring_func": lambda _: "sigmoid"}
"""How experts are chosen, where transformers knows one way only and does not write it."""
ROPE_THETA = 10_000
"""What ChatGLM multiplied by its `rope_ratio`."""
DENSE_FIRST: dict[str, Callable[[Config], Any]] = {"first_k_dense_replace": _count_leading_dense}
"""How many layers come before the first with experts."""
OLD_NAMES: dict[str, dict[str, Callable[[Config], Any]]] = {
    "gpt2": {"n_ctx": lambda config: config["n_positions"]},
    "gpt_neox": {"rotary_pct": _find_rotary_share},
    "cohere2": {"rotary_pct": _find_rotary_share},
    "falcon_h1": {"head_dim": _find_head_width},
    "bamba": {
        "attn_rotary_emb": lambda config: int(_find_rotary_share(config) * _find_head_width(config))
    },
    "glm": {
        "seq_length": lambda config: config["max_position_embeddings"],
        "layernorm_epsilon": lambda config: config["rms_norm_eps"],
        "rope_ratio": lambda config: config["rope_parameters"]["rope_theta"] / ROPE_THETA,
    },
    "glm4_moe_lite": DENSE_FIRST | SIGMOID,
    "glm_moe_dsa": DENSE_FIRST,
    "afmoe": SIGMOID | {"route_norm": lambda _: True},
    "exaone_moe": SIGMOID,
    "solar_open": SIGMOID,
    "minimax_m2": SIGMOID
    | {
        "rotary_dim": lambda config: int(
            _find_rotary_share(config) * (config.get("head_dim") or _find_head_width(config))
        )
    },
    "kimi_linear": SIGMOID
    | DENSE_FIRST
    | {
        "linear_attn_config": _describe_kimi_layers,
        "norm_topk_prob": lambda config: config["moe_renormalize"],
    },
    "nemotron_h": {"hybrid_override_pattern": _spell_nemotron_layers},
    "hunyuan_v1_moe": {
        "moe_intermediate_size": lambda config: _repeat_by_layer(
            config, config["intermediate_size"]
        ),
        "num_shared_expert": lambda config: _repeat_by_layer(config, 1),
    },
    "mimo_v2_flash": SIGMOID
    | {
        "swa_head_dim": lambda config: config["head_dim"],
        "swa_v_head_dim": lambda config: config["v_head_dim"],
        "swa_num_attention_heads": lambda config: config["num_attention_heads"],
        "swa_num_key_value_heads": lambda config: config["num_key_value_heads"],
        "hybrid_layer_pattern": lambda config: _mark_layers(
            config, "layer_types", "sliding_attention"
        ),
        "topk_method": lambda _: "noaux_tc",
        "layernorm_epsilon": lambda config: config["rms_norm_eps"],
    },
}
"""By model_type: fields that a converter reads and transformers 5 does not write, with their
values."""
OTHER_FORMS: dict[str, dict[str, Callable[[Config], Any]]] = {
    "falcon": {"num_kv_heads": _count_falcon_key_heads},
    "solar_open": {
        "rope_parameters": lambda config: {
            "partial_rotary_factor": 1.0,  # the converter's default is GLM's, a half
            **(config.get("rope_parameters") or {}),
        }
    },
    # a count of experts is taken for having some
    "nemotron_h": {
        name: _drop_without_experts(name)
        for name in (
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "topk_group",
        )
    },
    "granitemoehybrid": {
        "layer_types": _name_layers(("linear_attention", "mamba"), ("full_attention", "attention"))
    },
    "hunyuan_v1_moe": {"moe_topk": lambda config: _repeat_by_layer(config, config["moe_topk"])},
}
"""By model_type: fields that transformers 5 writes in another form than a converter reads them in;
None takes one away."""


OLD_TENSORS = {"kimi_linear": (r"\.block_sparse_moe\.(\w+_proj)\.", r".mlp.\1.")}
"""By model_type: names of tensors that transformers 5 writes, and those of before."""


def add_old_names(config: Config) -> Config:
    """Add to a configuration, and to that of its text model, what a converter reads under a name or
    in a form of before; return it."""
    if isinstance(config.get("text_config"), dict):
        add_old_names(config["text_config"])
    family = str(config.get("model_type"))
    for name, find in OLD_NAMES.get(family, {}).items():
        if config.get(name) is None:
            _set(config, name, find)
    for name, find in OTHER_FORMS.get(family, {}).items():
        _set(config, name, find)
    return config


def _set(config: Config, name: str, find: Callable[[Config], Any]) -> None:
    """Set a field to what is found, or take it away. A configuration that lacks what it is found
    from is of an older transformers, whose fields the converter reads itself."""
    try:
        value = find(config)
    except KeyError:
        return
    config[name] = value
    if value is None:
        del config[name]


class Unpadded(Config):
    """A configuration whose vocabulary is not padded. The converters of networks with a state pad
    the tokens to a round number, as the first checkpoints did with their embeddings; transformers'
    have one row for each token."""

    def __init__(self, config: Config) -> None:
        super().__init__({**config, "pad_vocab_size_multiple": 1})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, 1 if name == "pad_vocab_size_multiple" else value)


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
        if renamed := OLD_TENSORS.get(str(self.hparams.get("model_type"))):
            self.model_tensors = {
                re.sub(*renamed, name): tensor for name, tensor in self.model_tensors.items()
            }

    prepare = ModelBase.prepare_metadata

    @wraps(prepare)
    def prepare_unpadded(self: Any, *given: Any, **named: Any) -> None:
        self.hparams = Unpadded(self.hparams)  # here, since some classes make theirs anew
        prepare(self, *given, **named)

    ModelBase.prepare_metadata = prepare_unpadded
    _let_phi_look_at_files()
    ModelBase.load_hparams = staticmethod(load_with_old_names)
    ModelBase.__init__ = make_with_old_names
    ModelBase.no_mtp = not has_ahead_layers(model)


def _let_phi_look_at_files() -> None:
    """Let Phi-3's converter see by its files which tokenizer a model has. It asks for the name of
    the tokenizer's class, which transformers 5 may save as another."""
    phi = importlib.import_module("conversion.phi").Phi3MiniModel
    set_vocabulary = phi.set_vocab

    @wraps(set_vocabulary)
    def set_vocabulary_of_files(self: Any) -> None:
        has_pieces = (self.dir_model / "tokenizer.model").is_file()
        set_vocabulary(self) if has_pieces else self._set_vocab_gpt2()

    phi.set_vocab = set_vocabulary_of_files


if __name__ == "__main__":
    main()
