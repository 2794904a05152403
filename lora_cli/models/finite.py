"""Is every weight of a base a number? Looked at where it is loaded, before a step can spread what is not."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_cli.common.errors import LoraError


def check(network: torch.nn.Module, name: str) -> None:
    """LoraError naming the first tensor of the base `name` that holds NaN or an infinity."""
    bad = list(dict.fromkeys(key for key, tensor in _numbers(network) if not _finite(tensor)))
    if bad:
        raise LoraError(
            f"the base {name} holds values that are not finite, in {len(bad)} tensors, the first {bad[0]}",
            "copy or download its weights again; float16 cannot hold what bfloat16 does: --set model.dtype=bfloat16",
        )


def _numbers(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight with its name; of one in 4 bits the scales, which are not finite where a weight was not."""
    for key, parameter in network.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            yield key, parameter.detach()
            continue
        scales = [state.absmax] if state.state2 is None else [state.offset, state.state2.absmax]
        yield from ((key, scale) for scale in scales)


def _finite(tensor: torch.Tensor) -> bool:
    """By the least and the greatest value, for which nothing of the tensor's size is made."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
