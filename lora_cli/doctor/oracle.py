"""Compare the installed PEFT and bitsandbytes with the reference.

Every comparison starts from one small network and one adapter whose every trainable tensor is
random (B ≠ 0), written by the reference as an adapter file and loaded by PEFT from it. `lora
doctor` runs them on the user's machine, the tests over more cases.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_cli.common import files, ui
from lora_cli.doctor.reference import nf4
from lora_cli.doctor.reference.tree import LoraModel
from lora_cli.models import four_bit

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
KINDS = ("Linear", "Embedding", "Conv2d")
BIASES = ("none", "all", "lora_only")
R, ALPHA = 4, 6

EXACT = 1e-12
"""Largest deviation allowed in float64: absolute up to values of 1, relative above."""
SINGLE = 1e-5
"""The same where a library computes in float32."""
SCALE_CODES = 0.005
"""Largest share of 8-bit scale codes that may differ under double quantisation. bitsandbytes' CPU
kernel does not compare with the middle between two codes: it looks the value up, rounded to one of
65536 steps from −1 to 1, and a value within a step of the middle may get the neighbouring code
(measured: 0.15 % of normal values)."""


class Deviation(NamedTuple):
    """How far one measure of one pair lies apart, and how far it may."""

    group: str
    pair: str
    measure: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit  # False for NaN


class Network(nn.Module):
    """A layer `target`, to be adapted, and an `other`, not to be."""

    def __init__(self, target: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.target, self.other = target, other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.target(x))


def make_network(kind: str, dtype: torch.dtype, device: str) -> tuple[Network, Tensor]:
    """Make a network whose target is of the kind, and an input for it."""
    torch.manual_seed(0)
    if kind == "Embedding":
        target: nn.Module = nn.Embedding(13, 6, padding_idx=3, scale_grad_by_freq=True)
        nn.init.normal_(target.weight)
        x = torch.randint(0, 13, (5, 7))
    elif kind == "Conv2d":
        target = nn.Conv2d(3, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2))
        x = torch.randn(5, 3, 9, 8, dtype=torch.float64)
    else:
        target = nn.Linear(9, 6)
        x = torch.randn(5, 7, 9, dtype=torch.float64)
    other = nn.Conv2d(6, 4, 1) if kind == "Conv2d" else nn.Linear(6, 4)
    net = Network(target, other).to(device, dtype)
    return net, x.to(device) if kind == "Embedding" else x.to(device, dtype)


def compare_layers(
    kind: str,
    method: str,
    bias: str = "none",
    lora_dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, float]:
    """PEFT's layer against the reference's: `forward`, `gradients` of all that trains, `merged`
    weights, `unmerged` weights, and the `exchange` of the adapter file from PEFT back to the
    reference. ArithmeticError when the two do not train the same tensors."""
    base, x = make_network(kind, dtype, device)
    settings: dict[str, Any] = {
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": lora_dropout,
        "bias": bias,
    }
    ours = LoraModel(copy.deepcopy(base), ["target"], **settings, **METHODS[method])
    for tensor in ours.adapter_tensors().values():
        tensor.data += torch.randn_like(tensor)
    with files.scratch_folder() as folder:
        ours.save_adapter(folder / "ours")
        theirs = PeftModel.from_pretrained(
            copy.deepcopy(base),
            str(folder / "ours"),
            is_trainable=True,
            autocast_adapter_dtype=False,
        )
        result = _compare_training(ours, theirs, x)
        theirs.save_pretrained(str(folder / "theirs"))
        ours.swap_adapter(folder / "theirs")
    ours.eval(), theirs.eval()
    result["exchange"] = measure_deviation(ours(x), theirs(x))
    return result | _compare_merging(ours, theirs, base)


def _compare_merging(ours: LoraModel, theirs: PeftModel, base: nn.Module) -> dict[str, float]:
    """Compare what unmerging leaves with the base, and both sides' merged weights."""
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    left = theirs.get_submodule("base_model.model.target.base_layer").weight
    unmerged = measure_deviation(base.get_submodule("target").weight, left)
    plain, peft_plain = ours.merge().state_dict(), theirs.merge_and_unload().state_dict()
    _require_same_keys(plain, peft_plain)
    merged = find_largest(measure_deviation(plain[name], peft_plain[name]) for name in plain)
    return {"unmerged": unmerged, "merged": merged}


def find_largest(values: Iterable[float]) -> float:
    """Return the largest value; NaN counts as larger than all."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _require_same_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if ours.keys() != theirs.keys():
        raise ArithmeticError(
            f"not the same tensors: {', '.join(sorted(ours.keys() ^ theirs.keys())[:4])}"
        )


def _compare_training(ours: LoraModel, theirs: PeftModel, x: Tensor) -> dict[str, float]:
    """Compare outputs and gradients in training mode, with the same dropout."""
    outputs = []
    for side in (ours, theirs):
        side.train()
        torch.manual_seed(1)
        outputs.append(side(x))
        (
            outputs[-1]
            * torch.linspace(-1, 1, outputs[-1].numel()).to(outputs[-1]).view_as(outputs[-1])
        ).sum().backward()
    gradients = {
        name.replace(".default", "").replace(
            "lora_magnitude_vector.weight", "lora_magnitude_vector"
        ): tensor.grad
        for name, tensor in theirs.named_parameters()
        if tensor.requires_grad
    }
    trained = ours.adapter_tensors()
    _require_same_keys(trained, gradients)
    return {
        "forward": measure_deviation(*outputs),
        "gradients": find_largest(
            measure_deviation(tensor.grad, gradients[name]) for name, tensor in trained.items()
        ),
    }


def measure_deviation(ours: Tensor, theirs: Tensor) -> float:
    """max |ours − theirs|, relative to the largest |ours| where that is above 1. ArithmeticError
    for other shapes."""
    _require_same_shape(ours, theirs)
    scale = max(1.0, ours.detach().abs().max().item())
    return (ours.detach() - theirs.detach()).abs().max().item() / scale


def _require_same_shape(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ArithmeticError(
            f"a tensor of shape {tuple(theirs.shape)} in place of {tuple(ours.shape)}"
        )


def compare_nf4(weight: Tensor) -> dict[str, float]:
    """Compare bitsandbytes' NF4 of `weight` with the reference's.

    `codes` and `absmax`: shares that differ without double quantisation, `scale codes`: with it;
    `values` and `values (double)`: deviation of what the same codes and scales are read as.
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=nf4.BLOCK)
    twice, double = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=nf4.BLOCK, compress_statistics=True
    )
    ours, ours_double = nf4.NF4Tensor(weight, double_quant=False), nf4.NF4Tensor(weight)
    result = {
        "codes": measure_differing(ours.packed, packed.flatten()),
        "absmax": measure_differing(ours.absmax(), state.absmax),
        "scale codes": measure_differing(ours_double.scale_codes, double.absmax),
    }
    ours.packed, ours.plain_absmax = packed.flatten(), state.absmax
    ours_double.packed, ours_double.scale_codes = twice.flatten(), double.absmax
    ours_double.scale_absmax, ours_double.offset = double.state2.absmax, double.offset
    result["values"] = measure_deviation(
        ours.dequantize(), functional.dequantize_4bit(packed, state)
    )
    result["values (double)"] = measure_deviation(
        ours_double.dequantize(), functional.dequantize_4bit(twice, double)
    )
    return result


def measure_differing(ours: Tensor, theirs: Tensor) -> float:
    """Return the share of elements that are not equal."""
    _require_same_shape(ours, theirs)
    return (ours != theirs).float().mean().item()


def compare_qlora(device: str = "cpu", protected: bool = True) -> dict[str, float]:
    """LoRA on bitsandbytes' 4-bit Linear against `QLoRALinear`, in float32: `forward` and
    `gradients` of A, B and x, after a pass in eval mode as an evaluation makes it, and the `merged`
    weight against the dequantised one with ΔW. Without double quantisation, so that both sides hold
    the same values.

    Not `protected`: without what `model.keep_4bit_weights_unpacked` does, and without a bias (which
    raises then).
    """
    ours, theirs = _make_qlora_pair(device, protected)
    adapted = theirs.get_submodule("base_model.model.0")
    x = torch.randn(64, 128, device=device)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    theirs.eval()
    with torch.no_grad():
        theirs(x)
    theirs.train()
    outputs = [ours(1 * inputs[0]), theirs(1 * inputs[1])]
    for output in outputs:
        output.pow(2).mean().backward()
    pairs = [(inputs[0], inputs[1])]
    pairs += [
        (getattr(ours, name), getattr(adapted, name)["default"].weight)
        for name in ("lora_A", "lora_B")
    ]
    return {
        "forward": measure_deviation(*outputs),
        "gradients": find_largest(measure_relative(one.grad, other.grad) for one, other in pairs),
        "merged": measure_deviation(ours.merged_weight(), merge_4bit(theirs)),
    }


def _make_qlora_pair(device: str, protected: bool) -> tuple[nf4.QLoRALinear, PeftModel]:
    """Return LoRA on the reference's 4-bit layer and on bitsandbytes', with the same values."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    plain = nn.Linear(128, 192, bias=protected)
    quantised = Linear4bit(
        128,
        192,
        bias=protected,
        compute_dtype=torch.float32,
        quant_type="nf4",
        compress_statistics=False,
    )
    quantised.load_state_dict(plain.state_dict())
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(quantised).to(device), config)
    if protected:
        four_bit.keep_4bit_weights_unpacked(theirs)
    adapted = theirs.get_submodule("base_model.model.0")
    ours = nf4.QLoRALinear(plain.to(device), r=R, lora_alpha=ALPHA, double_quant=False)
    for name in ("lora_A", "lora_B"):
        getattr(ours, name).data = 0.1 * torch.randn_like(getattr(ours, name))
        getattr(adapted, name)["default"].weight.data = getattr(ours, name).data.clone()
    return ours, theirs


def measure_relative(ours: Tensor, theirs: Tensor) -> float:
    """Return max |ours − theirs| as a share of the largest |ours|."""
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def merge_4bit(adapted: PeftModel) -> Tensor:
    """Merge as `lora merge` does on a 4-bit base: dequantised base plus PEFT's own ΔW."""
    from peft.utils.integrations import dequantize_module_weight

    layer = adapted.get_submodule("base_model.model.0")
    return dequantize_module_weight(layer.get_base_layer()) + layer.get_delta_weight("default")


def measure_deviations(device: str = "cpu") -> dict[str, Callable[[], Iterator[Deviation]]]:
    """Return the comparisons on `device` by group, in float64 where the device has that."""
    if device.startswith("mps"):  # nothing is trained in 4 bits there (common/devices.py)
        return {"LoRA, rsLoRA, DoRA": lambda: _measure_layers(device)}
    return {
        "LoRA, rsLoRA, DoRA": lambda: _measure_layers(device),
        "QLoRA": lambda: _measure_qlora(device),
        "NF4": lambda: _measure_nf4(device),
    }


def _measure_layers(device: str) -> Iterator[Deviation]:
    dtype, limit = (torch.float32, SINGLE) if device.startswith("mps") else (torch.float64, EXACT)
    for kind, method, bias, dropout in itertools.product(KINDS, METHODS, BIASES, (0.0, 0.25)):
        for measure, value in compare_layers(kind, method, bias, dropout, dtype, device).items():
            yield Deviation(
                "LoRA, rsLoRA, DoRA", f"{kind} {method} ({device})", measure, value, limit
            )


def _measure_qlora(device: str) -> Iterator[Deviation]:
    for measure, value in compare_qlora(device).items():
        yield Deviation("QLoRA", f"Linear QLoRA ({device})", measure, value, SINGLE)


def _measure_nf4(device: str) -> Iterator[Deviation]:
    """Equal on the CPU; elsewhere a kernel may divide where this multiplies by the reciprocal, so
    that a value between two codes falls to the other side, and round a product otherwise."""
    cpu = device == "cpu"
    limits = {"codes": 0.0 if cpu else 1e-5, "absmax": 0.0, "scale codes": SCALE_CODES}
    torch.manual_seed(0)
    for shape in ((256, 256), (100, 62), (2, 70)):
        for measure, value in compare_nf4(torch.randn(shape, device=device)).items():
            limit = limits.get(measure, 0.0 if cpu else 1e-6)
            yield Deviation("NF4", f"NF4 ({device})", measure, value, limit)


def find_worst(found: Iterable[Deviation]) -> list[Deviation]:
    """Return the largest deviation of each pair and measure (a NaN is larger than all)."""
    by_key: dict[tuple[str, str], list[Deviation]] = {}
    for each in found:
        by_key.setdefault((each.pair, each.measure), []).append(each)
    return [
        max(group, key=lambda each: (math.isnan(each.value), each.value))
        for group in by_key.values()
    ]


def format_deviations(deviations: list[Deviation]) -> list[str]:
    """Return the lines of the largest deviation of every pair, one table per set of measures."""
    rows: dict[str, dict[str, float]] = {}
    for each in deviations:
        rows.setdefault(each.pair, {})[each.measure] = each.value
    by_measures: dict[tuple[str, ...], list[str]] = {}
    for pair, found in rows.items():
        by_measures.setdefault(tuple(found), []).append(pair)
    lines: list[str] = []
    for measures, pairs in by_measures.items():
        cells = [[pair, *(f"{rows[pair][measure]:.1e}" for measure in measures)] for pair in pairs]
        lines += [""] * bool(lines) + ui.format_table(["largest deviation", *measures], cells)
    return lines
