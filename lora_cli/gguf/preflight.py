"""Refuse an export that would fail or mislead, before anything is converted: vocabulary, ties,
template, disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.common import LoraError, quote, ui
from lora_cli.gguf import tools
from lora_cli.gguf.tools import Found
from lora_cli.models import Base, chat_template, empty
from lora_cli.recipe import DEFAULT_TASK, Task

BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
Q6_K = 6.5625
WIDE = 256
BLOCKED = re.compile(r"_K|^IQ[1-3]|^IQ4_XS|^TQ")
"""Types whose blocks are of WIDE weights."""


def check_convertible(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, converter: Found
) -> None:
    """Raise LoraError for a model in `folder` (configuration and tokenizer; weights where they
    exist) that the converter would refuse, or convert into another function; warn where a chat
    template is missing."""
    rows, ids = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values(), default=-1)
    if ids >= rows:
        last = tokenizer.convert_ids_to_tokens(ids)
        raise LoraError(
            f"the tokenizer of {folder} has token {ids} ({last!r}), but the embeddings end at "
            f"{rows - 1}",
            "merge the adapter with the tokenizer it was trained with, or resize the embeddings",
        )
    _refuse_head_of_its_own(folder, config)
    if chat_template.find_template(tokenizer) is None:
        ui.warn("the model has no chat template: llama.cpp will render chats as ChatML")
    tools.try_vocabulary(folder, converter)


def refuse_other_task(path: object, task: Task, is_adapter: bool) -> None:
    """Raise LoraError for a model, or an adapter on one, that writes no text: the converter drops
    heads in silence, such as BERT's pooler, and llama.cpp has none for most."""
    if task.has_targets:
        raise LoraError(
            f"{path} is for models that {task.does}, of which no GGUF is made: none was compared "
            "in llama.cpp yet",
            f"lora generate {quote(path)} --prompt TEXT",
        )
    if not task.writes_next_tokens:
        merging = f"lora merge {quote(path)} MODEL, then lora export-onnx MODEL OUT"
        raise LoraError(
            f"{path} is for models that {task.does}, and GGUF files are of models that write",
            merging if is_adapter else f"lora export-onnx {quote(path)} OUT",
        )


def is_convertible(model: Base) -> bool:
    """Return whether the converter reads the model's weights: they are plain, or quantised in a
    way that it dequantises exactly and lora can compare."""
    return model.quantised is None or model.quantised.is_dequantised


def refuse_quantised(model: Base) -> None:
    """Raise LoraError for a model whose quantised weights the converter does not read."""
    if is_convertible(model):
        return
    found = model.quantised
    assert found is not None, "only quantised weights are not convertible"
    hint = "export the 16-bit model it was made from (-q makes it small again)"
    if found.in_4bit:
        hint = f"{hint}, or an adapter on it, which is merged into its dequantised weights"
    raise LoraError(f"{model} is already quantised ({found}), which is not converted to GGUF", hint)


def _refuse_head_of_its_own(folder: Path, config: PretrainedConfig) -> None:
    """Raise LoraError where the configuration ties the head to the embeddings, but the files hold
    another head."""
    model = empty.build_empty(config, DEFAULT_TASK)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embeddings.weight is not head.weight:
        return
    ends: dict[str, torch.Tensor] = {}
    for module in (embeddings, head):
        name = next(name for name, each in model.named_modules() if each is module)
        # files may name the parts around it as an older transformers did
        ends |= _read_endings(folder, f".{name.rpartition('.')[2]}.weight")
    if len(ends) == 2 and not torch.equal(*ends.values()):
        raise LoraError(
            f"config.json of {folder} ties the head to the embeddings, but its files hold a "
            "separate head",
            'set "tie_word_embeddings" in config.json to what was trained',
        )


def _read_endings(folder: Path, ending: str) -> dict[str, torch.Tensor]:
    """Read those tensors of a folder's files whose names end so, a dot before them."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            wanted = [key for key in stored.keys() if f".{key}".endswith(ending)]  # noqa: SIM118
            found |= {key: stored.get_tensor(key) for key in wanted}
    return found


def check_disk(
    folder: Path,
    config: PretrainedConfig,
    types: Iterable[str],
    merged: torch.dtype | None,
) -> None:
    """Raise LoraError naming the megabytes that `folder` lacks for GGUFs of `types`, estimated from
    the parameters. `merged`: a merged model of that type is written there first."""
    network = empty.build_empty(config, DEFAULT_TASK)
    bits = sum(estimate_bits(network, name) for name in types)
    bits += 8 * merged.itemsize * network.num_parameters() if merged else 0
    needed, free = int(1.02 * bits / 8), shutil.disk_usage(folder).free
    if needed > free:
        megabytes, missing = (needed >> 20) + 1, (needed - free >> 20) + 1
        raise LoraError(
            f"the export needs about {megabytes} MB in {folder}, {missing} MB more than are free",
            "--output DIR on another disk, or fewer types",
        )


def estimate_bits(network: PreTrainedModel, name: str) -> float:
    """Estimate the bits of a model's weights in a type, from above.

    llama.cpp's mixtures put the head, and embeddings tied to it, into Q6_K at least, and rows that
    do not divide into blocks of 256 into the next larger type of smaller blocks: Q8_0 at most.
    """
    if name in BITS:
        return BITS[name] * network.num_parameters()
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    large = {id(end.weight) for end in ends if end is not None}
    total = 0.0
    for weight in network.parameters():
        bits, fits = estimate_bits_per_weight(name), weight.shape[-1] % WIDE == 0
        if BLOCKED.search(name) and not fits:
            bits = max(bits, min(bits + 1, BITS["q8_0"]))
        if id(weight) in large:
            bits = max(bits, Q6_K if fits else BITS["q8_0"])
        total += bits * weight.numel()
    return total


def estimate_bits_per_weight(name: str) -> float:
    """Estimate a type's bits from above: llama.cpp's mixtures (Q4_K_M) hold some tensors in more
    bits than the name says."""
    number = re.search(r"\d", name)
    return BITS.get(name, (float(number[0]) if number else 16.0) + 1.5)
