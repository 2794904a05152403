"""Write what a merged model's folder holds beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import GenerationConfig, PreTrainedModel

from lora_cli.common import LoraError
from lora_cli.models import (
    Adapter,
    Base,
    Reader,
    decoder,
    find_shared,
    quantised,
    read_field,
    token_rows,
)


def write_config(
    adapter: Adapter, folder: Path, dtype: torch.dtype, ends: Sequence[int | None]
) -> None:
    """Write the configurations of a merged model of type `dtype`, whose answers end in `ends`, as
    save_pretrained does."""
    plain_model = adapter.base.build_unweighted()
    adapter.base.refuse_odd_generation()
    # a base may lack one, and transformers makes one from its configuration where it writes
    with suppress(OSError):
        if plain_model.can_generate():
            plain_model.generation_config = GenerationConfig.from_pretrained(
                adapter.base.name, revision=adapter.base.revision
            )
    plain_model.config = quantised.without_quantisation(plain_model.config)
    plain_model.config.dtype = str(dtype).removeprefix("torch.")
    plain_model.config.architectures = [type(plain_model).__name__]
    plain_model.config.use_cache = True
    end_where_trained(plain_model, ends)
    plain_model.config.save_pretrained(str(folder))
    if plain_model.can_generate():
        plain_model.generation_config.save_pretrained(str(folder))


def refuse_tied(adapted: PeftModel, base: Base) -> None:
    """Raise LoraError where one weight serves as embedding and head and an adapter changes only one
    of the two; of a model with an encoder and a decoder, one of up to four."""
    if base.task.has_targets:
        _refuse_tied_pair(adapted, base)
        return
    ends = (token_rows.find_embeddings(adapted), adapted.get_output_embeddings())
    if ends[1] is None:  # it writes nothing
        return
    if read_field(adapted.config, "tie_word_embeddings") and any(
        isinstance(end, LoraLayer) for end in ends
    ):
        raise LoraError(
            f"{base} uses one weight for its embeddings and its head, and the adapter changes one "
            "of the two: a plain model cannot hold both",
            "train with modules_to_save, trainable_token_indices, or without embed_tokens and "
            "lm_head",
        )


def _refuse_tied_pair(adapted: PeftModel, base: Base) -> None:
    """Raise LoraError where an adapter changes a weight that serves encoder and decoder, or one of
    these and the head."""
    changed = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper))
    }
    for shared in find_shared(base.build_empty()):
        if both := changed.intersection(shared):
            raise LoraError(
                f"{base} uses one weight for {', '.join(shared)}, and the adapter changes "
                f"{', '.join(sorted(both))}: a plain model cannot hold both",
                "train with trainable_token_indices, or leave them out",
            )


def begin_where_trained(adapter: Adapter, reader: Reader, folder: Path) -> None:
    """Make the generation config of a merged model with an encoder begin what the decoder writes as
    the targets began that were trained."""
    if not adapter.base.task.has_targets:
        return
    first = decoder.find_first(adapter.base.build_empty(), reader)
    config = GenerationConfig.from_pretrained(str(folder))
    config.decoder_start_token_id = first.start
    if first.forced is not None:
        config.forced_bos_token_id = first.forced
    config.save_pretrained(str(folder))


def end_where_trained(plain: PreTrainedModel, ends: Sequence[int | None]) -> None:
    """Make the model's configurations name the tokens that ended the trained answers, beside those
    they had."""
    if not plain.can_generate():
        return
    configured = plain.generation_config.eos_token_id
    before = configured if isinstance(configured, list) else [configured]
    wanted = list(dict.fromkeys(token for token in [*ends, *before] if token is not None))
    if wanted != [token for token in before if token is not None]:
        plain.config.eos_token_id = wanted[0]
        plain.generation_config.eos_token_id = wanted
