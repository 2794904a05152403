"""The merge engine: a base with its adapter becomes one plain model, written whole and compared with what it came from.

The adapter is folded by PEFT's `merge_and_unload` in float32 and each weight rounded once to the base's type. A base
that was trained in 4 bits is dequantised first: those values, not the original 16-bit ones, are what the adapter was
fitted to (measured mean |Δlogit|: 1.5e-7 against 5.9e-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli import files, model, record, ui, verify
from lora_cli.errors import LoraError
from lora_cli.record import Adapter

SHARD_SIZE = "5GB"


class Merged(NamedTuple):
    """What a merge did: modules folded, and the merged model's distance from base with adapter."""

    modules: int
    dtype: torch.dtype
    difference: verify.Difference
    limit: float


def load_base(adapter: Adapter) -> PreTrainedModel:
    """The base as the adapter was trained on it: same revision, type, quantisation; a foreign one as its files are."""
    name, revision = adapter.base, adapter.revision
    dtype = getattr(torch, adapter.dtype) if adapter.dtype else dtype_on_disk(adapter)
    quantization = BitsAndBytesConfig(load_in_4bit=True, **adapter.quantization) if adapter.quantization else None
    return model.load_base(name, revision, dtype, quantization)


def dtype_on_disk(adapter: Adapter) -> torch.dtype:
    """The type of the base's own files, which the merged model gets."""
    return model.checkpoint_dtype(model.load_config(adapter.base, adapter.revision))


def load_tokenizer(adapter: Adapter) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, with the template that was trained; the base's where it has none."""
    if (adapter.folder / "tokenizer_config.json").is_file():
        return model.load_tokenizer(str(adapter.folder))
    return model.load_tokenizer(adapter.base, adapter.revision)


def merge(adapter: Adapter, out: Path) -> Merged:
    """Merge `adapter` into its base and write the plain model to `out`.

    Raises LoraError when `out` is occupied, a module was not merged, or the merged model's logits on the probe prompts
    lie further from base with adapter than rounding explains; `out` is not made then.
    """
    with files.staged_folder(out) as staging:
        tokenizer = load_tokenizer(adapter)
        probes = verify.probes(tokenizer)
        base, dtype = load_base(adapter), dtype_on_disk(adapter)
        base_dtype = base.config.dtype
        if adapter.quantization:
            quantised = model.load_adapter(base, adapter.folder)
            before = verify.logits(quantised, probes)
            base = quantised.unload().dequantize()
        to_float32(base)
        adapted = model.load_adapter(base, adapter.folder)
        if not adapter.quantization:
            before = verify.logits(adapted, probes)
        kept = verify.check_trained(adapter.folder, before, base_dtype)
        if kept:
            ui.say(f"  base with adapter against the end of training: {kept}")
        refuse_tied(adapted, adapter.base)
        plain, modules = fold(adapted)
        round_once(plain, dtype)
        plain.config.use_cache = True
        end_where_trained(plain, [tokenizer.eos_token_id, *adapter.stop_token_ids])
        plain.save_pretrained(str(staging), max_shard_size=SHARD_SIZE)
        model.save_tokenizer(tokenizer, staging, adapter.base, adapter.revision)
        files.write_json(
            staging / record.ARTEFACT_RECORD,
            record.new("merge", base=adapter.base, revision=adapter.revision, parent=adapter.record),
        )
        del base, adapted, plain
        written = to_float32(model.load_base(str(staging), None, dtype))
        difference = verify.compare(before, verify.logits(written, probes))
        result = Merged(modules, dtype, difference, verify.limit(difference, dtype))
        ui.say(f"  {modules} of {modules} modules merged")
        distance = f"{difference} (limit {result.limit:.2e})"
        ui.say(f"  merged against base with adapter: {distance}")
        if not difference.max_abs <= result.limit:
            raise LoraError(
                f"the merged model differs from base with adapter: {distance}; not written",
                f"is {adapter.base} the base it was trained on? --base gives another",
            )
    return result


def fold(adapted: PeftModel) -> tuple[PreTrainedModel, int]:
    """`merge_and_unload`, and how many modules it merged. LoraError if a module was left out."""
    layers = model.lora_layers(adapted)
    try:
        plain = adapted.merge_and_unload()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise LoraError(
            f"PEFT cannot merge this adapter: {' '.join(str(error).split())[:300]}", "serve it as it is"
        ) from error
    left = [name for name, layer in layers.items() if not layer.merged] + list(model.lora_layers(plain))
    if left or not layers:
        done = f"{len(layers) - len(left)} of {len(layers)} modules merged"
        raise LoraError(
            f"{done}; left out: {', '.join(left[:3]) or 'there are none'}", "train with other target_modules"
        )
    return plain, len(layers)


def refuse_tied(adapted: PeftModel, base: str) -> None:
    """LoraError where one weight serves as embedding and head and an adapter changes it in only one of the two."""
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    if adapted.config.tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        raise LoraError(
            f"{base} uses one weight for its embeddings and its head, and the adapter changes one of the two: "
            "no plain model can hold both",
            "train with modules_to_save, trainable_token_indices, or without embed_tokens and lm_head",
        )


def end_where_trained(plain: PreTrainedModel, ends: Sequence[int | None]) -> None:
    """Make the model's configurations name the tokens that ended the trained answers, beside those they had."""
    configured = plain.generation_config.eos_token_id
    before = configured if isinstance(configured, list) else [configured]
    wanted = list(dict.fromkeys(token for token in [*ends, *before] if token is not None))
    if wanted != [token for token in before if token is not None]:
        plain.config.eos_token_id = wanted[0]
        plain.generation_config.eos_token_id = wanted


def to_float32(base: PreTrainedModel) -> PreTrainedModel:
    """Every weight in float32, exactly; buffers such as rotary frequencies as they are."""
    for parameter in base.parameters():
        parameter.data = parameter.data.float()
    base.config.dtype = torch.float32
    return base


def round_once(plain: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every weight to `dtype`, to nearest even; tied weights stay tied."""
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    plain.config.dtype = dtype
