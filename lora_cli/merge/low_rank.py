"""Turn a change of linear weights into the factors of a plain LoRA adapter: cut to a rank, written,
read back and compared.

The best factors of a rank are those of the singular value decomposition (Eckart and Young 1936).
They are found here from the Gram matrix of the shorter side in float64, which is exact to the last
digits of a float32 weight and many times faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lora_cli.common import LoraError, ui
from lora_cli.models import Base, attach

PREFIX = "base_model.model."
TOLERANCE = 1e-5
"""How far, relative to the whole change, what is read back may lie from what was meant: float32
rounding."""


class Factors(NamedTuple):
    """`lora_A` (r, in) and `lora_B` (out, r) in float32, whose product is the update, and what they
    keep of the whole change.

    `kept` is the share of its energy (squared Frobenius norm), `norm` the norm of the whole and
    `rest` that of the rest.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    kept: float
    norm: float
    rest: float


def truncate(delta: torch.Tensor, r: int) -> Factors:
    """Return the best factors of rank `r` (at most the shorter side) of `delta` (out, in)."""
    delta = delta.double()
    tall = delta.shape[0] > delta.shape[1]
    wide = delta.T if tall else delta
    energies, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    left = vectors[:, -min(r, len(wide)) :].flip(-1)  # (shorter side, r), orthonormal
    right = left.T @ wide
    total = energies.clamp(min=0).sum().item()
    kept = right.square().sum().item()
    rest = (wide - left @ right).norm().item()
    lora_A, lora_B = (left.T, right.T) if tall else (right, left)
    share = min(kept / total, 1.0) if total else 1.0
    return Factors(
        lora_A.float().contiguous(), lora_B.float().contiguous(), share, total**0.5, rest
    )


def save(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    folder: Path,
    base: Base,
    fan_in_fan_out: bool,
) -> int:
    """Write `(lora_A, lora_B)` by module name as a PEFT adapter of scale 1 for `base`; return its
    most common rank."""
    ranks = {name: len(lora_A) for name, (lora_A, _) in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(factors),
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base.name,
        task_type=base.task.peft_type,
        inference_mode=True,
    )
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B.contiguous()
    config.save_pretrained(str(folder))
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return r


def check_saved(
    base: PreTrainedModel, folder: Path, meant: Iterable[tuple[str, torch.Tensor, Factors]]
) -> Any:
    """Load the adapter in `folder` on `base` by PEFT, and check that each update misses its change
    (out, in) by what was cut off.

    Return the adapted model; raise LoraError, naming the module, where the update is a different
    one.
    """
    adapted = attach.load_adapter(base, folder)
    layers = {
        name.removeprefix(PREFIX): layer for name, layer in attach.find_lora_layers(adapted).items()
    }
    for name, delta, factors in meant:
        given = layers[name].get_delta_weight("default")
        given = given.T if layers[name].fan_in_fan_out else given
        rest = (delta - given).norm().item()
        if not abs(rest - factors.rest) <= TOLERANCE * factors.norm:
            raise LoraError(
                f"{name} was not written as it should be: off by {rest:.2e}, not {factors.rest:.2e}"
            )
    return adapted


def format_table(factors: Mapping[str, Factors]) -> list[str]:
    """Return the lines of a table: energy kept and relative error over the modules, the lowest,
    median and mean."""
    by_energy = sorted(factors.values(), key=lambda each: each.kept)
    energies = [each.kept for each in by_energy]
    errors = [each.rest / (each.norm or 1.0) for each in by_energy]

    def row(name: str, energy: float, error: float) -> list[str]:
        return [name, f"{energy:.4%}", f"{error:.2e}"]

    worst = next(name for name, each in factors.items() if each is by_energy[0])
    rows = [
        row(f"lowest: {worst}", energies[0], max(errors)),
        row("median", median(energies), median(errors)),
        row("mean", fmean(energies), fmean(errors)),
    ]
    return ui.format_table(["modules", "energy kept", "relative error"], rows)


def describe_modules(factors: Mapping[str, Factors]) -> list[dict[str, Any]]:
    """Return the same for every module, for the record."""
    return [
        {
            "module": name,
            "r": len(each.lora_A),
            "energy_kept": each.kept,
            "norm": each.norm,
            "rest": each.rest,
        }
        for name, each in factors.items()
    ]
