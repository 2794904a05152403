"""Load a base model, and attach a new or a trained adapter to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lora_cli.common import remote_code
from lora_cli.common.errors import LoraError
from lora_cli.models import adapter_folder, empty, four_bit, tensors


def load_base(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The base in `dtype`, or in 4 bits with `dtype` for what is not quantised; `kwargs` go to from_pretrained."""
    refuse_without_safetensors(name, revision)
    if quantization is not None and any(
        isinstance(module, Conv1D) for module in empty.build_empty(name, revision).modules()
    ):
        raise LoraError(
            f"{name} keeps its weights the other way round (Conv1D), and comes back from 4 bits wrongly",
            "--set method=lora, or method=dora",
        )
    if quantization is not None and torch.cuda.is_available():
        kwargs.setdefault("device_map", {"": torch.cuda.current_device()})
    model, report = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        quantization_config=quantization,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=remote_code.is_allowed(),
        ignore_mismatched_sizes=True,  # so that they are in the report, which is looked at below
        **kwargs,
    )
    # transformers fills weights that the files lack with random numbers, and says so in a log only
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[what]):
            raise LoraError(
                f"the weights of {name} do not fit its configuration: {len(names)} {what.replace('_', ' ')}, "
                f"such as {names[0]}",
                "config.json and the weights must be of one model",
            )
    if quantization is not None:
        four_bit.keep_4bit_weights_unpacked(model)
        four_bit.refuse_misread_rows(model, name)
    return model


def refuse_without_safetensors(name: str, revision: str | None) -> None:
    """LoraError where a model's weights are not there, or pickled, or where it is a base and an adapter at once."""
    if Path(name, "adapter_config.json").is_file():  # transformers would load the base that it names instead
        raise LoraError(f"{name} is an adapter as well as a base", f"move {name}/adapter_*.* to another folder")
    if tensors.open_model(name, revision) is None:
        pickled = sorted(file.name for kind in adapter_folder.PICKLED for file in Path(name).glob(f"*{kind}"))
        only = f": it has pickled ones ({pickled[0]}), which may run code when they are loaded" if pickled else ""
        raise LoraError(
            f"{name} has no weights in safetensors files{only}", "take a revision or copy that has model.safetensors"
        )


def to_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the GPU where there is one. Not for 4-bit weights: `load_base` has put those where they run."""
    accelerator = torch.accelerator.current_accelerator()
    return model if accelerator is None else model.to(accelerator)


def refuse_not_finite(network: torch.nn.Module, name: str) -> None:
    """LoraError naming the first tensor of the base `name` that holds NaN or an infinity."""
    bad = list(dict.fromkeys(key for key, tensor in _walk_numbers(network) if not _all_finite(tensor)))
    if bad:
        raise LoraError(
            f"the base {name} holds values that are not finite, in {len(bad)} tensors, the first {bad[0]}",
            "copy or download its weights again; float16 cannot hold what bfloat16 does: --set model.dtype=bfloat16",
        )


def _walk_numbers(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight with its name; of one in 4 bits the scales, which are not finite where a weight was not."""
    for key, parameter in network.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            yield key, parameter.detach()
            continue
        scales = [state.absmax] if state.state2 is None else [state.offset, state.state2.absmax]
        yield from ((key, scale) for scale in scales)


def _all_finite(tensor: torch.Tensor) -> bool:
    """By the least and the greatest value, for which nothing of the tensor's size is made."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
