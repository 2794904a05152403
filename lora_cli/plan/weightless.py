"""A recipe's network without weights.

It is transformers' model from its configuration, bitsandbytes' 4-bit weights, PEFT's adapters.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.common import LoraError
from lora_cli.models import Parent, attach, empty, targets
from lora_cli.recipe import Recipe, upstream

UNFORESEEN = (
    RuntimeError,
    NotImplementedError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
)


class Unforeseen(LoraError):
    """The network depends on its tensors' content, so that it cannot be rehearsed."""


@contextmanager
def translate_unforeseen() -> Iterator[None]:
    """Turn what the libraries raise for tensors without content into Unforeseen, in their words."""
    logger = logging.getLogger(
        "torch._subclasses.fake_tensor"
    )  # repeats the error, with a traceback
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UNFORESEEN as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"the memory of this recipe cannot be foreseen: {words}"
        raise Unforeseen(message, "train, and watch it") from error
    finally:
        logger.setLevel(level)


class _Packed(FakeTensor):
    """A 4-bit weight, with the class name by which PEFT recognises one."""


_Packed.__name__ = Params4bit.__name__


def build_adapted(
    recipe: Recipe,
    config: PretrainedConfig,
    vocabulary: int = 0,
    new_ids: Sequence[int] = (),
    parent: Parent | None = None,
) -> PeftModel:
    """Return the settled recipe's base with its adapter on the `meta` device.

    Where there are `new_ids`, the embeddings have at least `vocabulary` rows; `parent` is the
    adapter that is trained on. UsageError where the recipe's names match nothing in the base.
    """
    config = copy.deepcopy(config)
    config.dtype = getattr(torch, recipe.model.dtype)
    if recipe.model.attn_implementation == "eager":
        config._attn_implementation = "eager"
    base = empty.build_empty(config, recipe.task_row)
    folder = parent.folder if parent else None
    lora_config, _ = targets.make_config(recipe, base, vocabulary, new_ids, folder)
    lora_config.init_lora_weights = True  # other initialisations need the base's weights
    with translate_unforeseen(), torch.device("meta"), attach.quiet_peft():
        if recipe.quantized:
            _quantize_modules(recipe, base)
        return attach.attach_adapter(base, lora_config, recipe.lora.autocast_adapter_dtype)


def _quantize_modules(recipe: Recipe, base: PreTrainedModel) -> None:
    """Replace what transformers would quantise by bitsandbytes' modules, on the `meta` device."""
    quantizer = AutoHfQuantizer.from_config(
        upstream.build_quantization_config(recipe), pre_quantized=False
    )
    quantizer.preprocess_model(model=base, device_map=None)
    base.is_loaded_in_4bit = True  # PEFT looks at it
    # bitsandbytes keeps the first table it makes for the whole process, so that one needs content
    with torch.device("cpu"):
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # as it is read from the base: what it is dequantised to
            module.weight.data = module.weight.data.to(getattr(torch, recipe.model.dtype))
            module.weight._quantize("meta")
            module.support_avx512bf16_for_cpu = False


def materialise(network: nn.Module) -> None:
    """Replace `meta` tensors by fake ones; tensors that are shared stay so."""
    known: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = _fake_tensor(module, parameter)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fake_tensor(module: nn.Module, parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, Params4bit):
        return nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
        )
    whole = torch.empty(parameter.quant_state.shape, dtype=parameter.quant_state.dtype)
    packed, state = functional.quantize_4bit(
        whole,
        None,
        None,
        parameter.blocksize,
        parameter.compress_statistics,
        parameter.quant_type,
        parameter.quant_storage,
    )
    made: Any = nn.Parameter(packed, requires_grad=False)
    made.__class__ = _Packed
    made.quant_state = state
    module.quant_state = state
    return made
