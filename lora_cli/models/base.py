"""Load a base model, and attach a new or a trained adapter to it."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import resolve_revision
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lora_cli.common import library_errors as foreign
from lora_cli.common import remote_code as trust
from lora_cli.common.errors import LoraError
from lora_cli.models import adapter_folder as record
from lora_cli.models import patterns
from lora_cli.models import tensors as shards
from lora_cli.models import token_rows as tokens
from lora_cli.recipe.keys import Recipe

BROKEN_CONFIG = "its config.json is damaged, or of another version: copy it again"
UNBUILDABLE = "transformers cannot build the model that its config.json describes"
UNBUILDABLE = "transformers cannot build the model that its config.json describes"


def resolve(name: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's branch, tag or commit stands for now; None for a folder.

    Everything of a run is loaded at this one commit, and merging loads the base at it again. LoraError when `name` is
    neither a model's folder nor a name on the hub; the hub's own errors when it does not know the name or revision.
    """
    if record.kind(name) == "model":
        return None
    if record.kind(name) != "hub":
        raise LoraError(f"{name} is not a base model", "give a folder with config.json or a name on the hub")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return str(resolve_revision(name, revision=revision).resolved)


def of_recipe(recipe: Recipe) -> tuple[str | None, PretrainedConfig]:
    """The commit that a recipe's base stands for now, and its configuration; LoraError naming the key."""
    try:
        commit = resolve(recipe.model.name_or_path, recipe.model.revision)
        return commit, load_config(recipe.model.name_or_path, commit)
    except LoraError as error:
        if not error.message.startswith("model."):
            error.message = f"model.name_or_path: {error.message}"
        raise


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model on the hub or in a folder; where it names no type, with that of the weights."""
    with foreign.refused(f"transformers cannot read the configuration of {name}", BROKEN_CONFIG):
        trust.check(name, PretrainedConfig.get_config_dict(name, revision=revision)[0])
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust.allowed())
    if config.dtype is None and (found := shards.open_model(name, revision)):
        sizes = Counter[torch.dtype]()
        for entry in found.entries.values():
            sizes[entry.dtype] += math.prod(entry.shape) if entry.dtype.is_floating_point else 0
        config.dtype = sizes.most_common(1)[0][0]
    return config


def checkpoint_dtype(config: PretrainedConfig) -> torch.dtype:
    """The type the weights have on disk (float32 when the configuration does not say)."""
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_base(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The base in `dtype`, or in 4 bits with `dtype` for what is not quantised; `kwargs` go to from_pretrained."""
    refuse_without_safetensors(name, revision)
    if quantization is not None and any(isinstance(module, Conv1D) for module in skeleton(name, revision).modules()):
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
        trust_remote_code=trust.allowed(),
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
        keep_4bit_weights_unpacked(model)
        refuse_misread_rows(model, name)
    return model


def refuse_without_safetensors(name: str, revision: str | None) -> None:
    """LoraError where a model's weights are not there, or pickled, or where it is a base and an adapter at once."""
    if Path(name, "adapter_config.json").is_file():  # transformers would load the base that it names instead
        raise LoraError(f"{name} is an adapter as well as a base", f"move {name}/adapter_*.* to another folder")
    if shards.open_model(name, revision) is None:
        pickled = sorted(file.name for kind in record.PICKLED for file in Path(name).glob(f"*{kind}"))
        only = f": it has pickled ones ({pickled[0]}), which may run code when they are loaded" if pickled else ""
        raise LoraError(
            f"{name} has no weights in safetensors files{only}", "take a revision or copy that has model.safetensors"
        )


def skeleton(name: str, revision: str | None) -> PreTrainedModel:
    """The base without weights (on the `meta` device): its modules' names and shapes, in an instant."""
    return from_config(load_config(name, revision))


def from_config(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without weights."""
    with (
        torch.device("meta"),
        foreign.refused(UNBUILDABLE, BROKEN_CONFIG),
    ):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust.allowed())


def weightless(name: str, revision: str | None) -> PreTrainedModel:
    """The base with float32 zeros for weights, each tensor one number in memory: a place for adapters to be read on."""
    network = skeleton(name, revision)
    for module in network.modules():
        for key, weight in module.named_parameters(recurse=False):
            setattr(module, key, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return network


def to_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the GPU where there is one. Not for 4-bit weights: `load_base` has put those where they run."""
    accelerator = torch.accelerator.current_accelerator()
    return model if accelerator is None else model.to(accelerator)


def keep_4bit_weights_unpacked(model: torch.nn.Module) -> None:
    """Turn off bitsandbytes' repacking of 4-bit weights on CPUs with AVX512_BF16.

    Its first forward in eval mode repacks each `Linear4bit` in place for a kernel without autograd; the gradients of
    every training step after an evaluation are then wrong (measured: by 89 %), without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_misread_rows(model: torch.nn.Module, name: str) -> None:
    """LoraError where bitsandbytes would read 4-bit weights wrongly: on some processors it gives values the scale of
    another block when the length of a row is a multiple of 16, but not of 64 (measured with 0.50.2 and AVX512)."""
    from bitsandbytes.nn import Linear4bit

    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    lengths = {module.in_features for module in layers.values() if module.weight.device.type == "cpu"}
    misread = {length for length in lengths if misreads(length)}
    paths = [path for path, module in layers.items() if module.in_features in misread]
    if paths:
        endings = sorted({path.rpartition(".")[2] for path in paths})
        raise LoraError(
            f"bitsandbytes reads 4-bit rows of {sorted(misread)[0]} weights wrongly on this processor; {name} has such "
            f"in {len(paths)} modules, the first {paths[0]}",
            f"--set method=lora, or --set 'quantization.llm_int8_skip_modules=[lm_head, {', '.join(endings)}]'",
        )


def misreads(length: int) -> bool:
    """Whether bitsandbytes reads a CPU's 4-bit matrix with rows of this length unlike the same numbers in one row."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(0.01, 1, 8 * length).reshape(8, length)  # every block has another scale
    packed, state = quantize_4bit(weight, quant_type="nf4")
    rows = dequantize_4bit(packed, state)
    state.shape = torch.Size([1, weight.numel()])
    return not torch.equal(rows.flatten(), dequantize_4bit(packed, state).flatten())


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings of what is checked here, and is an error where it is wrong."""
    with warnings.catch_warnings():
        for message in (
            "Found missing adapter keys",
            "The following (rank|alpha)_pattern keys",  # also where they did match, for experts
            "fan_in_fan_out is set to",
            ".*ensure_weight_tying",
            "Adapter '.*LoRA tensor\\(s\\) have invalid shape",  # lora_bias: its tensors have one dimension
            "lora with eva initialization used with low_cpu_mem_usage",
            "Full backward hook is firing",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def attach_adapter(model: PreTrainedModel, config: LoraConfig, autocast_adapter_dtype: bool = True) -> PeftModel:
    """A new adapter on `model`, changed in place. LoraError with PEFT's words where it refuses."""
    try:
        with quiet_peft():
            return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise LoraError(
            f"lora: {' '.join(str(error).split())}", "mend the values of lora, or leave them out"
        ) from error


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """`model` with the trained adapter of `folder`, beside those it has; LoraError unless every one of its tensors
    found its place."""
    refuse_slow_patterns(model, folder)
    tokens.fit(model, folder)
    hint = "give the base it was trained on with --base"
    with quiet_peft(), foreign.refused(f"PEFT cannot put the adapter {folder} on its base", hint):
        try:
            if isinstance(model, PeftModel):
                peft_model = model
                model.load_adapter(str(folder), adapter_name=name)
            else:
                peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise LoraError(f"PEFT cannot put the adapter {folder} on its base: {_misfit(error)}", hint) from error
    check_adapter_complete(peft_model, folder, name)
    return peft_model


def refuse_slow_patterns(model: torch.nn.Module, folder: Path) -> None:
    """UsageError for an adapter whose regular expressions would keep PEFT busy for ever on the model's names."""
    names = [name for name, _ in model.named_modules() if name]
    patterns.refuse(adapter_config(folder), names, lambda field: f"{folder / 'adapter_config.json'}: {field}")


def adapter_config(folder: Path) -> LoraConfig:
    """What the adapter in `folder` says of itself, as PEFT reads it; LoraError with PEFT's words where it does not."""
    with foreign.refused(f"PEFT cannot read {folder / 'adapter_config.json'}", "copy the adapter again"):
        return LoraConfig.from_pretrained(str(folder))


def _misfit(error: Exception) -> str:
    """PEFT's words; of tensors that have another size, how many and the first."""
    said = " ".join(str(error).split())
    sizes = re.findall(r"size mismatch for (\S+): .*?Size\(\[([^]]*)\]\).*?Size\(\[([^]]*)\]\)", said)
    if not sizes:
        return said[:300]
    name, given, wanted = sizes[0]
    return f"{len(sizes)} tensors are of another size, the first {name}: ({given}), where ({wanted}) is wanted"


def check_adapter_complete(model: PeftModel, folder: Path, name: str) -> None:
    """PEFT warns of tensors that match nothing and leaves B zero; here it is an error, as is a tensor not finite."""
    stored = load_peft_weights(str(folder), device="cpu")
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # An adapter may carry whole embeddings and heads as well, under the names the model has for them.
    whole = {key.replace(f".{name}.", ".") for key in model.state_dict()}
    refuse_incomplete(folder, set(stored), set(loaded), whole)
    bad = [key for key, tensor in stored.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise LoraError(f"{folder}: {bad[0]} holds values that are not finite ({len(bad)} tensors do)", "train again")


def refuse_incomplete(folder: Path, stored: set[str], loaded: set[str], whole: set[str]) -> None:
    """LoraError unless the adapter's tensors are those the model has places for: `loaded`, and any of its `whole`."""
    unplaced = stored - loaded - whole
    for keys, what in ((unplaced, "the model has no place for"), (loaded - stored, "the adapter lacks")):
        if keys:
            raise LoraError(
                f"{folder} does not fit its base model: {what} {len(keys)} tensors, such as {min(keys)}",
                "give the base it was trained on with --base",
            )


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The adapted modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def trainable(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Names and tensors of what training changes."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
