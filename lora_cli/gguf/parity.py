"""Compare a GGUF in llama.cpp with the Hugging Face model it was made from: token ids,
distributions, metadata."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_cli.common import LoraError, ui
from lora_cli.gguf import llama_api
from lora_cli.gguf.engine import GGUFModel
from lora_cli.models import (
    TRAINED_KL,
    Probe,
    chat_template,
    compute_logits,
    make_probes,
    passages,
)

NO_ENGINE = "not compared: no llama.cpp engine"
SPLITS = (
    "a base that transformers saved anew lacks tokenizer.model: copy it from the original; "
    "else report it"
)
REPORT = "report it, with the model's name"
FINER = 64
"""How much less a KL float16 costs than bfloat16: three more bits, and it grows with the square."""
LONGEST = 512
"""Tokens of a passage that are compared."""


class Source(NamedTuple):
    """The model that a GGUF was made from, as far as the file must say the same of itself."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    num_params: int


def find_engine() -> bool:
    """Return whether xllamacpp is installed and lets others use llama.cpp; warn where not."""
    if importlib.util.find_spec("xllamacpp") is None:
        ui.warn(
            "not compared with the Hugging Face model: no llama.cpp engine here (pip install "
            "'lora-cli[gguf]')"
        )
        return False
    try:
        llama_api.load_api()
    except LoraError as error:
        ui.warn(f"not compared with the Hugging Face model: {error.message} ({error.hint})")
        return False
    return True


class Reference(NamedTuple):
    """What a GGUF's model says where it comes from: `logits` at every position of `passages`
    (float32), and the mean KL that computing them in bfloat16 would cost."""

    source: Source | None
    probes: list[Probe]
    passages: list[passages.Passage]
    logits: list[torch.Tensor]
    noise: float


def make_reference(
    model: torch.nn.Module,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Source | None,
) -> Reference:
    """Compute what `model` (float32) says of the passages. It is in bfloat16 afterwards."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST
    made = passages.make_passages(tokenizer, min(longest, LONGEST))
    logits = compute_logits(model, made)
    # PEFT's layers cast to their adapters' type, so those change with the base
    _round_weights(model)
    rough = compute_logits(model, made)
    noise = passages.compare_passages(made, logits, rough).mean_kl
    return Reference(source, make_probes(tokenizer), made, logits, noise)


def _round_weights(model: torch.nn.Module) -> None:
    """Round what a model's files hold to bfloat16, as loading it in that type would. What it
    computes of its configuration, such as rotary frequencies, stays as it is."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.bfloat16)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(torch.bfloat16))


def limit_kl(type_name: str, noise: float) -> float | None:
    """Return the mean KL that arithmetic in a type explains; None for types whose weights are
    rounded, too.

    llama.cpp rounds what goes into a product to the type of its weights. That is noise as large as
    that of bfloat16 here, and less by FINER for float16; four times that is let pass. In float32
    some of its functions are tables of float16. Measured on the models of
    tests/cli/test_architectures.py: up to 1 / 100 of bfloat16's noise where the function is the
    same, and from 1 / 3 on where rotation, scale or experts' weights are another's.
    """
    fine, least = 4 * noise / FINER, 1e-5
    limits = {"f32": max(fine, 1e-9), "f16": max(fine, least), "bf16": max(4 * noise, least)}
    return limits.get(type_name)


def limit_any_kl(type_name: str) -> float | None:
    """Return the mean KL that a form of this type, a GGUF's or torch's, may lie from its model in
    float32, whatever the model; None for types of fewer than four bits, which may cost anything.

    Where it was made, `limit_kl` is tighter. A type of four bits or more has cost SmolLM2-135M
    under 0.1 (Q4_K_M 0.03 to 0.08); the limit is six times that, to tell another model's file.
    """
    # Hugging Face models, whose types have torch's names, are computed in float32
    exact = dict.fromkeys(("f32", "float32", "float16", "bfloat16"), TRAINED_KL[torch.float32])
    rough = TRAINED_KL[torch.bfloat16]
    known = {**exact, "f16": rough / FINER, "bf16": rough}
    if type_name in known:
        return known[type_name]
    bits = re.search(r"\d", type_name)
    return 0.5 if bits and int(bits[0]) >= 4 else None


def compare_gguf(
    gguf: Path, type_name: str, reference: Reference, adapter: Path | None = None
) -> passages.Likeness:
    """Compare llama.cpp's token ids, and its logits at every position of the passages, with the
    Hugging Face model's.

    Loading looks for values that are not finite. Raises LoraError when a tensor holds such, the
    file says otherwise of itself than the reference's source, ids differ, or the mean KL is over
    `limit_kl`. `adapter` is a GGUF of a LoRA adapter, laid over `gguf` and then the one that is
    judged.
    """
    judged = (adapter or gguf).name
    with GGUFModel(gguf, exact=True, adapter=adapter) as engine:
        if reference.source is not None:
            _check_metadata(engine, judged, reference.source)
        _check_tokens(engine, judged, reference.probes)
    texts = [passage.ids for passage in reference.passages]
    given = list(llama_api.compute_logits(gguf, texts, adapter))
    sizes = [rows[0].shape[-1] for rows in (given, reference.logits)]
    if sizes[0] != sizes[1]:
        raise LoraError(f"{judged} has {sizes[0]} tokens, the model {sizes[1]}", REPORT)
    found = passages.compare_passages(reference.passages, reference.logits, given)
    limit = limit_kl(type_name, reference.noise)
    if limit is not None and not found.mean_kl <= limit:
        raise LoraError(
            f"{judged} differs from the model it was made from: {found} (limit of the mean KL "
            f"{limit:.1e})",
            REPORT,
        )
    return found


def _check_tokens(engine: GGUFModel, name: str, probes: Sequence[Probe]) -> None:
    """Raise LoraError unless llama.cpp splits every probe into the model's own tokens."""
    for probe in probes:
        if engine.tokenize(probe.text, add_special=probe.plain) != probe.ids:
            raise LoraError(f"{name}: llama.cpp splits {probe.text!r} into other tokens", SPLITS)


def _check_metadata(engine: GGUFModel, name: str, source: Source) -> None:
    """Raise LoraError unless llama.cpp reads the model's own end token, chat template and added
    tokens, and no shorter context or fewer parameters, from its file."""
    config, tokenizer = source.config.get_text_config(), source.tokenizer
    said: dict[str, tuple[object, object]] = {
        "end-of-sequence token": (engine.eos_token, tokenizer.eos_token or engine.eos_token),
        "chat template": (
            engine.chat_template.strip(),
            (chat_template.find_template(tokenizer) or engine.chat_template).strip(),
        ),
    }
    # llama.cpp gives networks with a state more than their configuration; ALiBi knows no number
    positions = getattr(config, "max_position_embeddings", None) or 0
    if engine.metadata["n_ctx_train"] < positions:
        said["context length"] = (engine.metadata["n_ctx_train"], positions)
    for token, number in tokenizer.get_added_vocab().items():
        said[f"added token {token!r}"] = (engine.tokenize(token, add_special=False), [number])
    if engine.metadata["n_params"] < source.num_params:
        said["number of parameters"] = (engine.metadata["n_params"], source.num_params)
    wrong = [
        f"its {what} is {given!r}, not {wanted!r}"
        for what, (given, wanted) in said.items()
        if given != wanted
    ]
    if wrong:
        raise LoraError(f"{name} is not the model it was made from: {'; '.join(wrong[:3])}", REPORT)
