"""A loaded model made ready: on its device, its numbers looked at, in another type."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from lora_cli.common import LoraError, devices, gpu_faults, spell_count
from lora_cli.models import tensors
from lora_cli.models.head import find_statistics


def is_quantised(model: PreTrainedModel) -> bool:
    """Return whether weights of the loaded model are quantised."""
    return getattr(model, "hf_quantizer", None) is not None  # only set where they are


def to_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """Move the model to the GPU where there is one; quantised weights are where they run
    already."""
    gpu_faults.check_gpu(in_4bit=is_quantised(model))
    return model if is_quantised(model) else model.to(devices.find_device())


def refuse_not_finite(network: torch.nn.Module, name: str) -> None:
    """Raise LoraError naming the first tensor of the base `name` that holds NaN or an infinity."""
    bad = list(
        dict.fromkeys(
            key for key, tensor in _walk_numbers(network) if not tensors.is_finite(tensor)
        )
    )
    if bad:
        raise LoraError(
            f"the base {name} holds values that are not finite, in "
            f"{spell_count(len(bad), 'tensor')}, the first "
            f"{bad[0]}",
            "copy or download its weights again; float16 cannot hold what bfloat16 does: --set "
            "model.dtype=bfloat16",
        )


def _walk_numbers(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight with its name; of a 4-bit one its scales, which are not finite where a
    weight was not."""
    for key, parameter in network.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            yield key, parameter.detach()
            continue
        scales = [state.absmax] if state.state2 is None else [state.offset, state.state2.absmax]
        yield from ((key, scale) for scale in scales)


def leave_out_cache(network: PreTrainedModel) -> None:
    """Keep a model from caching what it has computed, which training never reads; a decoder beside
    an encoder has a configuration of its own."""
    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False


def convert_to_float32(base: PreTrainedModel) -> PreTrainedModel:
    """Convert every weight to float32, exactly, and the means and variances that a model keeps;
    other buffers, such as rotary frequencies, stay as they are."""
    for parameter in base.parameters():
        parameter.data = parameter.data.float()
    for path in find_statistics(base):
        base.get_submodule(path).float()
    base.config.dtype = torch.float32
    return base
