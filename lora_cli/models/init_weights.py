"""Compute an adapter's first A and B where that takes the data or the base's own weights.

eva and corda look at activations of the first rows, lora_ga at their gradients, loftq at the error
of 4-bit storage. pissa, olora, corda and lora_ga start from s·B₀A₀ ≠ 0 and take it off the base: W₀
− s·B₀A₀. What is saved is the same function on the base as it is: W₀ + s·(BA − B₀A₀), a plain
adapter of twice the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from lora_cli.common import UsageError, files
from lora_cli.models import attach, peft_matching
from lora_cli.models.base import Base
from lora_cli.recipe import Recipe, find_initialisation

ROWS = 256
"""How many rows, from the first, an initialisation looks at."""
EVA_ROWS = 8
START = "initial_adapter.safetensors"
Rows = list[dict[str, Any]]
Collate = Callable[[Rows], dict[str, Tensor]]
ComputeLoss = Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]
"""Computes the loss of a batch."""


def prepare_base(
    recipe: Recipe,
    base: PreTrainedModel,
    config: LoraConfig,
    rows: Rows,
    collate: Collate,
    compute_loss: ComputeLoss,
) -> None:
    """corda and lora_ga: leave in the base, for PEFT to find, what it computes A and B from."""
    if recipe.lora.init_lora_weights not in ("corda", "lora_ga"):
        return
    config.target_modules = peft_matching.resolve_targets(base, config).target_modules
    if recipe.lora.init_lora_weights == "corda":

        def run_model() -> None:  # one row at a time: PEFT's statistics take no more
            for row in rows:
                compute_loss(base, _on(base, collate([row])))

        preprocess_corda(base, config, run_model=run_model)
        return

    def train_step() -> None:
        size = recipe.training.per_device_train_batch_size
        for start in range(0, len(rows), size):
            compute_loss(base, _on(base, collate(rows[start : start + size]))).backward()

    preprocess_loraga(base, config, train_step)
    set_seed(recipe.training.seed)


def prepare_adapter(
    recipe: Recipe, adapted: PeftModel, rows: Rows, collate: Collate, base: Base
) -> None:
    """eva and loftq: replace A and B of the attached adapter."""
    if recipe.lora.init_lora_weights == "eva":
        config = adapted.peft_config["default"]
        rank = max([config.r, *config.rank_pattern.values()])
        needed = round(config.eva_config.rho * rank)
        batches = [_on(adapted, batch) for batch in _batches(rows, collate, needed)]
        if not batches:
            where = recipe.where("lora", "init_lora_weights")
            if len(rows) < EVA_ROWS:
                raise UsageError(
                    f"{where}: eva needs at least {EVA_ROWS} rows, there are {len(rows)}",
                    "give more rows",
                )
            raise UsageError(
                f"{where}: eva needs {needed} trained tokens, more than the first {ROWS} rows have",
                "lower r",
            )
        initialize_lora_eva_weights(
            adapted,
            batches,
            gather_distributed_inputs=False,  # each process has the same rows
            show_progress_bar=False,
        )
        if (
            recipe.lora.autocast_adapter_dtype
        ):  # the modules whose rank it changed have the base's type now
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_" in name:
                    parameter.data = parameter.data.float()
    elif recipe.lora.init_lora_weights == "loftq":
        original = base.load(torch.float32)
        _loftq(adapted, original)


def _batches(rows: Rows, collate: Collate, needed: int) -> Iterator[dict[str, Tensor]]:
    """Make batches of at least EVA_ROWS rows and `needed` tokens with loss each: with fewer, PEFT's
    eva waits for ever."""
    batch: Rows = []
    for row in rows:
        batch.append(row)
        if (
            len(batch) >= EVA_ROWS
            and sum(label != -100 for kept in batch for label in kept["labels"]) >= needed
        ):
            made = collate(batch)
            if made["labels"].shape != made["input_ids"].shape:  # no token has one of its own
                del made["labels"]
            yield made
            batch = []


def _on(network: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(network.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def _loftq(adapted: PeftModel, original: PreTrainedModel) -> None:
    """Compute A and B such that s·BA is the best rank-r approximation of W − dequantize(NF4(W))
    (LoftQ, arXiv:2310.08659, with one iteration, which leaves the quantised base as it is).

    PEFT's own needs CUDA and leaves out the scaling s: at alpha = 2r it adds the correction twice.
    """
    for name, layer in attach.find_lora_layers(adapted).items():
        stored = layer.get_base_layer()
        if type(stored).__name__ != "Linear4bit":
            continue
        quantised = dequantize_module_weight(stored).float()
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight.to(quantised)
        u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        rank = layer.r["default"]
        root = (s[:rank] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_(root[:, None] * vh[:rank])
        layer.lora_B["default"].weight.copy_(u[:, :rank] * root)


def keep_start(recipe: Recipe, adapted: PeftModel, folder: Path) -> None:
    """Save A₀ and B₀ where they were taken off the base; `as_plain` needs them."""
    found = find_initialisation(recipe.lora.init_lora_weights)
    if found and found.moves_base:
        start = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        save_file(
            {name: tensor.contiguous() for name, tensor in start.items() if _half(name)},
            folder / START,
        )


def save_as_plain(adapter: Path, config: LoraConfig, start: Path) -> None:
    """Make the saved adapter one that any program puts on the base as it is, in place.

    s·[B, −B₀]·[A; A₀] = s·(BA − B₀A₀): with twice the rank, alpha grows so that s stays. DoRA's
    magnitudes and all else stay too. The configuration then names no initialisation: PEFT would
    repeat it at loading.
    """
    config = copy.copy(config)
    config.init_lora_weights, config.eva_config, config.corda_config, config.lora_ga_config = (
        True,
        None,
        None,
        None,
    )
    if start.is_file():
        tensors, first = load_file(adapter / "adapter_model.safetensors"), load_file(start)
        for name in first:
            if _half(name) == "A":
                tensors[name] = torch.cat([tensors[name], first[name].to(tensors[name])], dim=0)
            else:
                tensors[name] = torch.cat([tensors[name], -first[name].to(tensors[name])], dim=1)
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        growth = 2**0.5 if config.use_rslora else 2
        config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {
            name: growth * alpha for name, alpha in config.alpha_pattern.items()
        }
    config.inference_mode = True
    # PEFT's name of the base's class, which it writes where it has none of the task
    saved = files.read_json(adapter / "adapter_config.json").get("auto_mapping")
    config.save_pretrained(str(adapter), auto_mapping_dict=saved)


def _half(name: str) -> str | None:
    """`A` or `B` for a tensor that is half of a product, else None."""
    if "lora_A" in name or "lora_embedding_A" in name:
        return "A"
    return "B" if "lora_B" in name or "lora_embedding_B" in name else None
