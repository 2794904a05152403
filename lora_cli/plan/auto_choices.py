"""What an `auto` becomes, and why: for each key a function from the situation to value and reason.

So the choices for GPUs are tested without one. An option is on where a benchmark here showed a
gain, or where somebody installed it on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from lora_cli.models import get_checkpoint_dtype
from lora_cli.plan.hardware import Hardware
from lora_cli.recipe import Recipe

Chosen = tuple[Any, str]
"""A value and the reason for it."""


class Choice(NamedTuple):
    """What one `auto` became, and why."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name} = {shown} (auto: {self.reason})"


class Situation(NamedTuple):
    """What a choice depends on."""

    recipe: Recipe
    """With every earlier choice made."""
    device: Hardware
    config: PretrainedConfig | None
    """The base's; None where it is not known yet."""
    processes: int = 1
    """That train together."""

    @property
    def lets_shard(self) -> bool:
        """Whether it is open if a base is sharded over several processes."""
        return self.processes > 1 and self.recipe.distributed.strategy == "auto"


def choose_trainer(given: Situation) -> Chosen:
    """Return the objective's trainer of TRL, unless it refuses what the recipe adapts."""
    if not given.recipe.task_row.writes_next_tokens:
        return "trainer", "TRL's trains models that foretell the next token"
    objective = given.recipe.objective_row
    if objective.compares:
        return "trainer", f"with lora's own loss for {objective.name}"
    if given.recipe.adapts_head:
        return "trainer", f"{objective.trainer} cannot adapt the output head"
    return objective.name, "rows and labels are the same for both"


def choose_dtype(given: Situation) -> Chosen:
    """Return the type of the base's weights, and of the arithmetic."""
    checkpoint = torch.float32 if given.config is None else get_checkpoint_dtype(given.config)
    on_disk = str(checkpoint).removeprefix("torch.")
    if given.device.kind == "cuda":
        if given.device.bf16:
            return "bfloat16", "this GPU computes it natively"
        if given.device.capability >= (7, 0):
            return "float16", "this GPU has no native bfloat16, but float16"
        return "float32", "this GPU computes neither bfloat16 nor float16 faster"
    if on_disk == "bfloat16" and given.device.bf16:
        here = "CPU" if given.device.kind == "cpu" else "GPU"
        return "bfloat16", f"the checkpoint's type, which this {here} computes natively"
    return "float32", f"without CUDA the safe choice for a {on_disk} checkpoint"


def choose_attention(given: Situation) -> Chosen:
    """Flash attention where it is installed and works; None leaves the choice to transformers."""
    device = given.device
    if device.kind == "cuda" and given.recipe.model.dtype != "float32":
        if 3 in device.flash_attention and device.capability[0] == 9:
            return "flash_attention_3", "installed, and this GPU is of its kind"
        if 2 in device.flash_attention and device.capability >= (8, 0):
            return "flash_attention_2", "installed"
    return None, "transformers' choice, sdpa where the model has it"


def choose_compute_dtype(given: Situation) -> Chosen:
    """Return the type that 4-bit weights are dequantised to."""
    return given.recipe.model.dtype, "as model.dtype"


def choose_autocast(given: Situation) -> Chosen:
    """Return whether Trainer computes in bfloat16."""
    dtype = given.recipe.model.dtype
    return dtype == "bfloat16", f"model.dtype is {dtype}"


def choose_loss_head(given: Situation) -> Chosen:
    """Return the loss at tokens with a label only, unless an option of the stock loss is given."""
    if not given.recipe.task_row.writes_next_tokens:
        return "stock", "the task has a loss of its own"
    training = given.recipe.training.collect_values()
    usual_values: dict[str, Any] = {"label_smoothing_factor": 0.0, "loss_type": "nll"}
    if not _takes_liger_layers_alone(given.recipe):
        usual_values["use_liger_kernel"] = False
    for name, usual in usual_values.items():
        if training.get(name) not in (None, "auto", usual):
            twice = name == "label_smoothing_factor" and given.recipe.uses_trl
            cost = ", and an extra forward pass in each step (trainer: trainer has none)"
            return "stock", f"training.{name} needs it{cost if twice else ''}"
    return "trained_tokens", "the same loss for less time and memory"


def _takes_liger_layers_alone(recipe: Recipe) -> bool:
    """Return whether Liger's kernels, where they are used, leave the loss alone, as they do in
    TRL."""
    kernels = recipe.training.collect_values().get("liger_kernel_config") or {}
    return recipe.uses_trl or kernels.get("fused_linear_cross_entropy") is False


def choose_packing(given: Situation) -> Chosen:
    """Sequences of a step's rows without padding, unless an option that contradicts it is given."""
    if not given.recipe.task_row.writes_next_tokens:
        return False, "rows of this task do not share sequences"
    for name in given.recipe.list_against_packing():
        return False, f"training.{name} is given"
    return "step", "no padding, and the same run"


def choose_compilation(given: Situation) -> Chosen:
    """Off: the gain on a CPU is smaller than the wait before the first step."""
    if given.device.kind == "cuda":
        return False, "not measured on a GPU"
    return False, "a tenth of a step's time, and half a minute before the first"


def choose_liger(given: Situation) -> Chosen:
    """Off: on an H100 a step took 0.88 of the time with its layers; one family was tried."""
    if given.device.kind != "cuda":
        return False, "its kernels need a GPU"
    if not given.device.liger:
        return False, "not installed"
    return False, "tried on one family of models"


def choose_workers(given: Situation) -> Chosen:
    """Processes that load data."""
    return 0, "the rows are prepared before the run"


def choose_evaluation(given: Situation) -> Chosen:
    """When the model is evaluated."""
    if given.recipe.data.evaluates:
        return "epoch", "evaluation data given"
    return "no", "no evaluation data"


def choose_kept(given: Situation) -> Chosen:
    """Which step becomes the adapter."""
    training = given.recipe.training
    if training.eval_strategy == "no":
        return "last", "no evaluations"
    if training.collect_values().get("save_strategy") == "no":
        return "last", "no checkpoint is to be saved"
    return "best", "there are evaluations"


CHOOSERS: dict[str, Callable[[Situation], Chosen]] = {
    "trainer": choose_trainer,
    "model.dtype": choose_dtype,
    "model.attn_implementation": choose_attention,
    "quantization.bnb_4bit_compute_dtype": choose_compute_dtype,
    "training.bf16": choose_autocast,
    "training.loss_head": choose_loss_head,
    "training.packing": choose_packing,
    "training.torch_compile": choose_compilation,
    "training.use_liger_kernel": choose_liger,
    "training.dataloader_num_workers": choose_workers,
    "training.eval_strategy": choose_evaluation,
    "training.keep": choose_kept,
}
"""In this order, as later choices depend on earlier ones; those of the memory plan come last."""
