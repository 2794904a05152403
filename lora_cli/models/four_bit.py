"""Guards around bitsandbytes' 4-bit weights."""

from __future__ import annotations

import torch

from lora_cli.common import LoraError, spell_count


def keep_4bit_weights_unpacked(model: torch.nn.Module) -> None:
    """Turn off bitsandbytes' repacking of 4-bit weights on CPUs with AVX512_BF16.

    Its first forward in eval mode repacks each `Linear4bit` in place for a kernel without autograd;
    the gradients of every training step after an evaluation are then wrong (measured: by 89 %),
    without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_misread_rows(model: torch.nn.Module, name: str, already: bool) -> None:
    """Raise LoraError where bitsandbytes would read 4-bit weights wrongly: on some processors it
    gives values the scale of another block when the length of a row is a multiple of 16, but not of
    64 (measured with 0.50.2 and AVX512). `already`: its files hold them in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    layers = {
        path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    sizes = {
        path: (module.in_features, module.weight.blocksize)
        for path, module in layers.items()
        if module.weight.device.type == "cpu"
    }
    misread = {size for size in set(sizes.values()) if misreads_rows(*size)}
    paths = [path for path, size in sizes.items() if size in misread]
    if paths:
        endings = sorted({path.rpartition(".")[2] for path in paths})
        raise LoraError(
            f"bitsandbytes reads 4-bit rows of {min(misread)[0]} weights wrongly on this "
            f"processor; {name} has such "
            f"in {spell_count(len(paths), 'module')}, the first {paths[0]}",
            "a GPU reads them rightly; or take the 16-bit model it was made from"
            if already
            else "--set method=lora, or --set 'quantization.llm_int8_skip_modules=[lm_head, "
            f"{', '.join(endings)}]'",
        )


def misreads_rows(length: int, block: int = 64) -> bool:
    """Return whether bitsandbytes reads a CPU's 4-bit matrix with rows of this length, and a scale
    per `block` weights, unlike the same numbers in one row."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(0.01, 1, 8 * length).reshape(8, length)  # every block has another scale
    packed, state = quantize_4bit(weight, blocksize=block, quant_type="nf4")
    rows = dequantize_4bit(packed, state)
    state.shape = torch.Size([1, weight.numel()])
    return not torch.equal(rows.flatten(), dequantize_4bit(packed, state).flatten())
