"""A base whose files keep its weights quantised: what its config.json says of that, in words,
before weights are loaded or the shapes of tensors are judged.

There are three sorts. bitsandbytes' 4-bit weights stay as they are: qlora and qdora train on them.
Those of FP8 and MXFP4 are dequantised as they are loaded, which is exact, and then are plain
weights. All others are transformers' to load, where the package that it needs is installed; lora
does not train on them or merge into them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_cli.common import LoraError, UsageError, library_errors
from lora_cli.recipe import Recipe

FIELDS = ("quantization_config", "compression_config", "quantization")
"""Where a config.json says it: transformers', llm-compressor's old one, and MLX's."""
IN_4BIT, IN_8BIT = "bitsandbytes_4bit", "bitsandbytes_8bit"
DEQUANTISED = ("fp8", "mxfp8", "mxfp4")
"""Methods whose weights transformers dequantises exactly while it loads them."""
UPPER = ("gptq", "awq", "hqq", "aqlm", "eetq", "vptq", "fp8", "mxfp4", "mxfp8", "nvfp4", "higgs")
"""Methods whose names are written in capitals."""
RENAMED = {IN_8BIT: "bitsandbytes 8-bit", "": "in a way that config.json does not name"}
SAID = ("bits", "load_in_4bit", "load_in_8bit")
"""Settings that say that weights are quantised where the method is not named."""
STORED = (
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
    "llm_int8_skip_modules",
)
"""Settings that say how 4-bit weights are stored; the type they are computed in is the run's."""


class Quantised(NamedTuple):
    """How a base's weights are quantised: the method by transformers' name for it, and its
    settings as config.json has them."""

    method: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        if self.in_4bit:
            stored = self.read_stored()
            doubly = ", scales quantised as well" if stored["bnb_4bit_use_double_quant"] else ""
            return f"bitsandbytes {str(stored['bnb_4bit_quant_type']).upper()}{doubly}"
        upper = self.method.upper() if self.method in UPPER else self.method
        return ", ".join([RENAMED.get(self.method, upper), *self._list_sizes()])

    def _list_sizes(self) -> Iterator[str]:
        bits = self.settings.get("bits") or self.settings.get("w_bit")
        if bits:
            yield f"{bits} bits"
        if group := self.settings.get("group_size") or self.settings.get("q_group_size"):
            yield f"groups of {group}"
        if block := self.settings.get("weight_block_size"):
            yield f"blocks of {' x '.join(map(str, block))}"

    @property
    def in_4bit(self) -> bool:
        """Whether the weights are bitsandbytes' 4-bit ones, which qlora trains on."""
        return self.method == IN_4BIT

    @property
    def is_dequantised(self) -> bool:
        """Whether the weights are dequantised as they are loaded."""
        return self.method in DEQUANTISED

    @property
    def is_mergeable(self) -> bool:
        """Whether plain weights are made of them, into which an adapter can be merged."""
        return self.in_4bit or self.is_dequantised

    def read_stored(self) -> dict[str, Any]:
        """Return the recipe's keys that say how 4-bit weights are stored, with the base's
        values."""
        with library_errors.translate_file_errors(
            "transformers cannot read the quantization_config of config.json", "copy it again"
        ):
            known = BitsAndBytesConfig.from_dict(dict(self.settings)).to_dict()
        return {name: known[name] for name in STORED}

    def explain_unloadable(self) -> str | None:
        """Return why transformers cannot load such weights here, in its words; None where it
        can."""
        if self.method not in AUTO_QUANTIZER_MAPPING:
            return "transformers does not know this kind"
        settings = {**self.settings, **({"dequantize": True} if self.is_dequantised else {})}
        try:
            with _quiet_transformers():
                quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
                quantizer.validate_environment(device_map=None, weights_only=True)
        except Exception as error:  # each kind has its own ways to refuse
            return " ".join(str(error).split())[:200] or type(error).__name__
        return None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep back what transformers logs of a kind that is only asked about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def find_quantised(config: PretrainedConfig) -> Quantised | None:
    """Return how a configuration says that weights are quantised; None where it does not. Raises
    LoraError for settings that are none."""
    found = next(_walk_settings(config), None)
    if found is None:
        return None
    _, _, settings = found
    method = str(settings.get("quant_method") or "")
    for bits in ("4bit", "8bit"):
        if settings.get(f"load_in_{bits}") and method in ("", "bitsandbytes"):
            method = f"bitsandbytes_{bits}"
    stored = Quantised(method, settings)
    if stored.in_4bit:
        stored.read_stored()  # what is wrong with its settings is said here
    return stored


def _walk_settings(
    config: PretrainedConfig,
) -> Iterator[tuple[PretrainedConfig, str, Mapping[str, Any]]]:
    """Yield each settings of quantised weights, with the configuration and the field that have
    them."""
    text = config.get_text_config()
    for part in [config] if text is config else [config, text]:
        for field in FIELDS:
            settings = getattr(part, field, None)
            if isinstance(settings, QuantizationConfigMixin):  # of a model that is loaded
                settings = settings.to_dict()
            if isinstance(settings, Mapping) and not {"quant_method", *SAID}.isdisjoint(settings):
                yield part, field, settings


def without_quantisation(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration for the same model with plain weights."""
    config = copy.deepcopy(config)
    for part, field, _ in list(_walk_settings(config)):
        delattr(part, field)
    return config


def config_for_loading(config: PretrainedConfig, compute: torch.dtype | None) -> PretrainedConfig:
    """Return a copy of a quantised base's configuration, for transformers to load its weights:
    4-bit ones to be computed in `compute` (None: as it says), those of DEQUANTISED to be
    dequantised."""
    config, found = copy.deepcopy(config), find_quantised(config)
    assert found is not None, "asked for quantised bases only"
    changes: dict[str, Any] = {"dequantize": True} if found.is_dequantised else {}
    if found.in_4bit and compute is not None:
        changes["bnb_4bit_compute_dtype"] = str(compute).removeprefix("torch.")
    part, field, settings = next(_walk_settings(config))
    setattr(part, field, {**settings, **changes})
    return config


def refuse_untrainable(recipe: Recipe, name: str, found: Quantised) -> None:
    """Raise LoraError where the recipe's method does not train on a base that is so quantised, or
    its keys say that it is quantised otherwise."""
    already = f"{name} is already quantised ({found})"
    if not found.is_mergeable:
        raise LoraError(
            f"model.name_or_path: {already}, which lora does not train on",
            "give the 16-bit model it was made from; method: qlora then keeps it in 4 bits "
            f"({_explain_running(found)})",
        )
    dora = recipe.method in ("dora", "qdora")
    if found.in_4bit != recipe.quantized:
        wanted = ("qdora" if dora else "qlora") if found.in_4bit else ("dora" if dora else "lora")
        why = "trains on 4-bit weights" if found.in_4bit else "trains on it dequantised"
        raise LoraError(
            f"{recipe.where('method')} is {recipe.method}, but {already}",
            f"--set method={wanted}, which {why}",
        )
    if not found.in_4bit:
        return
    for key, stored in found.read_stored().items():
        given = getattr(recipe.quantization, key)
        if recipe.find_place("quantization", key) and given != stored:
            raise UsageError(
                f"{recipe.where('quantization', key)} is {given}, but {already}: {key} is {stored}",
                f"leave {key} out: the base's own holds",
            )
    if recipe.lora.init_lora_weights == "loftq":
        raise LoraError(
            f"{recipe.where('lora', 'init_lora_weights')} makes up for what 4-bit storage lost, "
            f"and {already}: what it lost is not in its files",
            "--set lora.init_lora_weights=true, or the 16-bit model it was made from",
        )


def _explain_running(found: Quantised) -> str:
    """Return whether transformers runs weights that are so quantised here, in words."""
    why = found.explain_unloadable()
    if why is None:
        return "as it is, lora generate runs it"
    return f"as it is, lora generate cannot run it here: {why}"


def refuse_unloadable(name: str, found: Quantised) -> None:
    """Raise LoraError where transformers cannot load a base that is so quantised here."""
    why = found.explain_unloadable()
    if why is not None:
        raise LoraError(
            f"{name} is already quantised ({found}), and cannot be loaded here: {why}",
            "install what it asks for, or take the 16-bit model it was made from",
        )


def refuse_undequantisable(name: str, found: Quantised) -> None:
    """Raise LoraError where nothing here makes plain weights of those that are so quantised."""
    if not found.is_mergeable and found.method != IN_8BIT:
        raise LoraError(
            f"{name} is already quantised ({found}), which lora does not make plain weights of",
            "give the 16-bit model it was made from",
        )


def refuse_unmergeable(name: str, found: Quantised) -> None:
    """Raise LoraError where nothing can be added to weights that are so quantised."""
    if not found.is_mergeable:
        raise LoraError(
            f"{name} is already quantised ({found}): an adapter cannot be merged into it",
            "--base MODEL, the 16-bit model it was made from",
        )
