"""What each `auto` of a recipe becomes on a device, and why.

Each key has one function, from the situation to the value and the reason, so that the choices for
GPUs are tested without one. An option is on where a benchmark here showed a gain, or where somebody
installed it on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import ConfigDict, TypeAdapter
from transformers import PretrainedConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.common import LoraError, UsageError, find_nearest, remote_code, stored
from lora_cli.models import get_checkpoint_dtype, num_experts, quantised
from lora_cli.plan import hardware, memory
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.plan.rehearsal import OPTIMIZER
from lora_cli.recipe import Recipe, upstream
from lora_cli.speed import document_attention, step_packing

DECIDED_LAST = ("training.optim", "training.gradient_checkpointing", "training.packed_length")
"""What the memory plan has to say to, after CHOOSERS."""
OF_THE_DATA = ("model.labels", "model.problem_type")
"""What `task_settings.py` finds before all else."""
Chosen = tuple[Any, str]
"""A value and the reason for it."""
FLASH_NEEDS = {
    "flash_attention_2": (range(8, 100), "RTX 30, A100 and newer cards"),
    "flash_attention_3": (range(9, 10), "H100 and H200"),
}
"""First numbers of the compute capabilities that versions of flash attention run on, and in
words."""
FASTEST_OPTIMIZER = "adamw_torch_fused"
FAR_BELOW = 0.1
SAFE = 0.9
"""Of a GPU's memory, what is taken by choice: no forecast was held against one yet."""
REPORTERS = {"azure_ml": "azureml-core", "flyte": "flytekit", "neptune": "neptune-client"}
"""Packages by the names under which transformers reports to them, where the two differ."""


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


def settle(
    recipe: Recipe,
    config: PretrainedConfig | None = None,
    device: Hardware | None = None,
    processes: int = 1,
) -> tuple[Recipe, list[Choice]]:
    """Return the recipe with every `auto` replaced, and the choices made.

    `config` is the base's. Without it a checkpoint in float32 is assumed, and what the memory plan
    has to say to is chosen by the kind of device alone. `device` is what the recipe is to run on,
    by default this machine's. How to share the work stays open where one process trains alone.
    """
    device = device or hardware.detect_device(hardware.find_training_device(recipe))
    choices: list[Choice] = []
    recipe = _adopt_storage(recipe, config, choices)
    for key, choose in CHOOSERS.items():
        if _read_key(recipe, key) == "auto":
            recipe = _make_choice(recipe, key, choose(Situation(recipe, device, config)), choices)
    given = Situation(recipe, device, config, processes)
    outlook = foresee_memory(given)
    decided = {
        "training.optim": choose_optimizer(device, outlook),
        "training.gradient_checkpointing": (outlook.checkpointing, outlook.reason),
    }
    if given.lets_shard:
        decided["distributed.strategy"] = choose_strategy(given, outlook)
    for key, chosen in decided.items():
        if _read_key(recipe, key) == "auto":
            recipe = _make_choice(recipe, key, chosen, choices)
    if recipe.training.packed_length == "auto":
        chosen = choose_packed_length(Situation(recipe, device, config))
        recipe = _make_choice(recipe, "training.packed_length", chosen, choices)
    return recipe, choices


def _adopt_storage(
    recipe: Recipe, config: PretrainedConfig | None, choices: list[Choice]
) -> Recipe:
    """Return the recipe with the 4-bit storage of a base that is quantised already, and add what
    that changes to `choices`."""
    found = quantised.find_quantised(config) if config and recipe.quantized else None
    if found is None or not found.in_4bit:
        return recipe
    stored = found.read_stored()
    for key, value in stored.items():
        if getattr(recipe.quantization, key) != value:
            choices.append(Choice(f"quantization.{key}", value, "the base is quantised so already"))
    return recipe.replace(recipe.trainer, {"quantization": stored})


def take_recorded(recipe: Recipe, recorded: dict[str, Any], file: Path) -> Recipe:
    """Return the recipe of a run that goes on: what it leaves open is what the run began with.

    What `auto` becomes may hang on what is free of a GPU's memory when it is asked. Raises
    DamagedError for a value in the run's record, `file`, that the key cannot have.
    """
    for key in (*CHOOSERS, *DECIDED_LAST, *OF_THE_DATA):
        section, _, name = key.rpartition(".")
        values = (recorded.get(section) or {}) if section else recorded
        if name in values and _read_key(recipe, key) == "auto":
            with stored.explain_misfits(file, "recipe", key):
                recipe = _set_key(recipe, key, _check_value(recipe, key, values[name]))
    return recipe


def _check_value(recipe: Recipe, key: str, value: Any) -> Any:
    section, _, name = key.rpartition(".")
    field = type(getattr(recipe, section) if section else recipe).model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)


def _read_key(recipe: Recipe, key: str) -> Any:
    """Return the value of `trainer` or `section.name`; None for 4-bit storage without a 4-bit
    method."""
    section, _, name = key.rpartition(".")
    if section == "quantization" and not recipe.quantized:
        return None
    return getattr(getattr(recipe, section) if section else recipe, name)


def _make_choice(recipe: Recipe, key: str, chosen: Chosen, choices: list[Choice]) -> Recipe:
    """Return the recipe with a value chosen for `key`, which is added to `choices`.

    None leaves the key open: it is transformers' choice, and recorded when the model is loaded.
    """
    value, reason = chosen
    if value is not None:
        choices.append(Choice(key, value, reason))
    return _set_key(recipe, key, value)


def _set_key(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, _, name = key.rpartition(".")
    if not section:
        return recipe.replace(value, {})
    return recipe.replace(recipe.trainer, {section: {name: value}})


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


class Outlook(NamedTuple):
    """What the memory plan says of a recipe."""

    checkpointing: bool
    """Whether a step fits with gradient checkpointing only."""
    reason: str
    state: int = 0
    """Bytes of fused AdamW's state."""
    missing: int = 0
    """Bytes by which the plan with gradient checkpointing, or as the recipe has it, is still too
    large."""

    @property
    def spared(self) -> int:
        """Bytes that AdamW of 8 bits saves."""
        return self.state * 3 // 4


def foresee_memory(given: Situation) -> Outlook:
    """Rehearse a step of a recipe in which all else is settled, if that decides what is open."""
    recipe, device, config = given.recipe, given.device, given.config
    usual = device.kind == "cuda"
    still_open = {
        name: value
        for name, value in (("gradient_checkpointing", False), ("optim", FASTEST_OPTIMIZER))
        if getattr(recipe.training, name) == "auto"
    }
    if device.kind == "cuda":
        decides = bool(still_open) or given.lets_shard
    else:
        decides = "gradient_checkpointing" in still_open
    if config is None or not decides:
        return Outlook(usual, f"as on any {device.kind}")
    recipe = recipe.replace(recipe.trainer, {"training": still_open})
    if is_far_below(recipe, config, device):
        return Outlook(False, f"needs a small part of {device}")
    batch = memory.largest_batch(recipe)
    try:
        plain = memory.make_forecast(recipe, config, device).need(batch)
        if plain.total <= (SAFE if usual else 1) * device.memory:
            return Outlook(False, f"{memory.format_bytes(plain.total)} of {device} without it")
        if "gradient_checkpointing" not in still_open:
            return _measure_lack(plain, plain, device)
        again = recipe.replace(recipe.trainer, {"training": {"gradient_checkpointing": True}})
        saving = memory.make_forecast(again, config, device).need(batch)
    except LoraError as error:  # a mistake in the recipe is reported where it is used
        return Outlook(usual, str(error))
    return _measure_lack(saving, plain, device)


def _measure_lack(saving: memory.Need, plain: memory.Need, device: Hardware) -> Outlook:
    """Return the outlook of a step that does not fit without checkpointing (`plain`)."""
    with_it, without = memory.format_bytes(saving.total), memory.format_bytes(plain.total)
    reason = f"{with_it} with it, {without} without, of {device}"
    return Outlook(True, reason, saving.items.get(OPTIMIZER, 0), saving.total - device.memory)


def choose_optimizer(device: Hardware, outlook: Outlook) -> Chosen:
    """Fused AdamW, or AdamW of 8 bits where only a quarter of its state makes the run fit."""
    if device.kind == "cuda" and 0 < outlook.missing <= outlook.spared:
        return (
            "paged_adamw_8bit",
            f"saves {outlook.spared / GIB:.1f} GiB, without which it does not fit",
        )
    return FASTEST_OPTIMIZER, "the fastest AdamW"


def choose_strategy(given: Situation, outlook: Outlook) -> Chosen:
    """Return how several processes share the work: the base is sharded where a step with all of it
    fits no GPU, whatever the optimiser."""
    if given.device.kind != "cuda":
        return "ddp", "each process has the whole base, which is fastest"
    eased = outlook.spared if given.recipe.training.optim == "auto" else 0
    if outlook.missing <= eased:
        return "ddp", "a step with the whole base fits, which is fastest"
    for key, why in given.recipe.list_against_sharding():
        return "ddp", f"{'.'.join(key)}: {why}"
    lacking = memory.format_bytes(outlook.missing)
    return "fsdp", f"a step with the whole base needs {lacking} more than {given.device}"


def choose_packed_length(given: Situation) -> Chosen:
    """Return the longest sequence that is worth its memory; None where no rows are joined."""
    recipe, device, config = given.recipe, given.device, given.config
    if recipe.training.packing != "step":
        return None, "no rows are joined"
    usual = memory.find_packed_length(recipe)
    if config is None or not _attends_by_row(given):
        return usual, "longer ones spend more on attention than on the rest"
    together = recipe.training.max_length * recipe.training.per_device_train_batch_size
    together *= recipe.training.gradient_accumulation_steps
    length = step_packing.LONG_SEQUENCE
    while length // 2 >= max(together, usual):
        length //= 2
    try:
        forecast = memory.make_forecast(recipe, config, device)
        while length > usual:
            batch = memory.largest_batch(_set_packed_length(recipe, length))
            need = forecast.need(batch).total
            if need <= SAFE * device.memory:
                needed = f"{memory.format_bytes(need)} of {device} are needed"
                return length, f"each row attends by itself, and {needed}"
            length //= 2
    except LoraError as error:  # a mistake in the recipe is reported where it is used
        return usual, str(error)
    return usual, f"longer ones do not fit in {device}"


def _attends_by_row(given: Situation) -> bool:
    """Return whether the work of attention does not grow with the sequences that rows share."""
    model, device = given.recipe.model, given.device
    if device.kind != "cuda" or given.config is None:
        return False
    if model.attn_implementation is not None:
        return model.attn_implementation in document_attention.TAKE_BOUNDS
    dtype, longest = getattr(torch, model.dtype), given.recipe.training.max_length
    return document_attention.suits_kernel(given.config, dtype, device.capability, longest)


def _set_packed_length(recipe: Recipe, length: int) -> Recipe:
    return recipe.replace(recipe.trainer, {"training": {"packed_length": length}})


def is_far_below(recipe: Recipe, config: PretrainedConfig, device: Hardware) -> bool:
    """Return whether several times what any method takes is a small part of the device's memory.

    Saves small runs the second that a rehearsal takes.
    """
    if num_experts(config):
        return False
    text = config.get_text_config()
    batch = memory.largest_batch(recipe)
    tokens = batch.rows * (batch.length + batch.targets)
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    sizes = [getattr(text, name, None) for name in names]
    hidden, layers, vocabulary, inner = (size if isinstance(size, int) else 0 for size in sizes)
    if not (hidden and layers and vocabulary):  # a family that gives its sizes otherwise
        return False
    layers *= 2 if batch.targets else 1  # the encoder's, and as many of the decoder's
    width = max(hidden, inner or 8 * hidden)
    weights = 4 * (2 * vocabulary * hidden + layers * 8 * hidden * width)
    activations = 4 * layers * (tokens * 64 * width + 2 * batch.rows * batch.length**2)
    logits = 12 * tokens * vocabulary
    return bool(4 * weights + activations + logits < FAR_BELOW * device.memory)


def try_configurations(recipe: Recipe, device: Hardware | None = None) -> None:
    """Build every configuration once, so that upstream refuses before anything is loaded.

    For this machine, or another device.
    """
    _refuse_unknown_attention(recipe)
    _refuse_attention_of_newer_cards(recipe, device)
    settled, _ = settle(recipe)
    upstream.build_lora_config(settled)
    upstream.build_quantization_config(settled)
    arguments = upstream.build_training_arguments(settled)
    if arguments.use_cpu and (device is None or device.kind == "cpu"):
        _refuse_what_needs_a_gpu(recipe, arguments)
    _refuse_unknown_reporters(recipe, arguments.report_to)


def _refuse_unknown_reporters(recipe: Recipe, names: list[str]) -> None:
    """Raise UsageError for what transformers does not report to, or cannot without a package."""
    place = recipe.where("training", "report_to")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            guess = find_nearest(name, INTEGRATION_TO_CALLBACK)
            listed = f"one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            hint = f"did you mean {guess}?" if guess else listed
            raise UsageError(f"{place}: there is no {name}", hint)
        if name not in get_available_reporting_integrations():
            package = REPORTERS.get(name, name)
            raise UsageError(f"{place}: {name} is not installed", f"pip install {package}")


def _refuse_unknown_attention(recipe: Recipe) -> None:
    """Raise UsageError for an attention that transformers does not know, or whose code is not
    allowed."""
    given = recipe.model.attn_implementation
    where = recipe.where("model", "attn_implementation")
    if remote_code.is_repository(given):
        remote_code.require_allowed(f"{where}: {given} is a repository of kernels", "sdpa")
        return
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if given not in (None, "auto", *known):
        guess = find_nearest(str(given), known)
        hint = f"did you mean {guess}?" if guess else f"one of {', '.join(known)}"
        raise UsageError(f"{where}: there is no {given}", hint)


def _refuse_attention_of_newer_cards(recipe: Recipe, device: Hardware | None) -> None:
    """Raise UsageError for a version of flash attention that has no kernels for the GPU."""
    given = str(recipe.model.attn_implementation)
    if given not in FLASH_NEEDS:
        return
    device = device or hardware.detect_device(hardware.find_training_device(recipe))
    wanted, cards = FLASH_NEEDS[given]
    major, minor = device.capability
    if device.kind != "cuda" or not major or major in wanted:
        return
    place = recipe.where("model", "attn_implementation")
    raise UsageError(
        f"{place}: {given} runs on {cards}; {device.name} has compute capability {major}.{minor}",
        "--set model.attn_implementation=auto",
    )


def _refuse_what_needs_a_gpu(recipe: Recipe, arguments: Any) -> None:
    if arguments.fp16:
        asked = (
            ("training", "fp16") if recipe.find_place("training", "fp16") else ("model", "dtype")
        )
        remedy = "model.dtype=float32" if asked[0] == "model" else "training.fp16=false"
        raise UsageError(f"{recipe.where(*asked)}: float16 training needs a GPU", f"--set {remedy}")
    if getattr(arguments, "activation_offloading", False):
        place = recipe.where("training", "activation_offloading")
        raise UsageError(
            f"{place} moves what a GPU keeps to the host's memory, and there is no GPU", "remove it"
        )
