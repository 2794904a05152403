"""What the decoder of a model with an encoder is fed: the target, shifted by one token."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.common import LoraError
from lora_cli.models import answering
from lora_cli.models.head import find_task_of
from lora_cli.models.tokenizer import IGNORED

BEGINNING = 8
"""Tokens that a decoder is fed where two forms of a model are compared."""


class Written(NamedTuple):
    """A text that a decoder has written."""

    text: str
    is_whole: bool
    """Whether it has come to its end, and not to the most tokens there may be."""


class First(NamedTuple):
    """How a decoder is begun, as training began it."""

    start: int
    """What it is fed first."""
    forced: int | None
    """What it writes first whatever it would: the mark of a language."""


def shift_labels(network: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return what the decoder is fed to write labels (rows, length), as the model itself makes it:
    its first token, and then each label but the last, padding in the place of -100."""
    if bool((labels == IGNORED).all()):  # of a process without a row, in which mBART would look
        return torch.zeros_like(labels)
    own = getattr(network, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        made = own(labels)
    else:
        config, module = network.config, sys.modules[type(network).__module__]
        made = module.shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    assert isinstance(made, torch.Tensor)
    return made


def refuse_beginless(network: PreTrainedModel, name: str) -> None:
    """Raise LoraError for a model whose configuration does not say what its decoder is fed first;
    it needs no weights."""
    try:
        shift_labels(network, torch.tensor([[1, 2]]))
    except (ValueError, TypeError, AttributeError) as error:  # its words, or a field it lacks
        field = "pad_token_id" if "pad_token_id" in str(error) else "decoder_start_token_id"
        raise LoraError(
            f"model.name_or_path: config.json of {name} has no {field}: what the decoder begins "
            "with is not known",
            "add it to a copy of config.json: T5 begins with its padding token, BART with the one "
            "that ends a text",
        ) from error


def make_text_inputs(
    model: nn.Module, ids: Sequence[int], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Return what a model of any task is given to say something of a text; a decoder beside an
    encoder, the beginning of the same text."""
    given = {"input_ids": torch.tensor([list(ids)], device=device)}
    if find_task_of(model).has_targets:
        network = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(network, PreTrainedModel)
        given["decoder_input_ids"] = shift_labels(network, given["input_ids"][:, :BEGINNING])
    return given


def find_first(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> First:
    """Return how answers are begun: as targets of this tokenizer were."""
    labels = tokenizer(text_target="a")["input_ids"]
    start = int(shift_labels(network, torch.tensor([labels]))[0, 0])
    language = getattr(tokenizer, "tgt_lang", None)
    marks = language is not None and labels[0] == tokenizer.convert_tokens_to_ids(language)
    return First(start, labels[0] if marks else None)


def find_room(config: PretrainedConfig, of_target: bool) -> int | None:
    """Return how many tokens there are positions for, of what is read or of what is written; None
    where there is no such limit, as for T5."""
    side = "decoder" if of_target else "encoder"
    fields = (f"max_{side}_position_embeddings", "max_position_embeddings")
    found = (getattr(config, field, None) for field in fields)
    return next((number for number in found if isinstance(number, int)), None)


def pad_sources(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return sources as (rows, length) `input_ids` and `attention_mask`, filled at their ends as in
    training."""
    padded = tokenizer.pad(
        {"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt"
    )
    return {name: padded[name].to(device) for name in ("input_ids", "attention_mask")}


def write_targets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, torch.Tensor],
    most: int,
    **drawing: Any,
) -> list[Written]:
    """Return the target that a model in eval mode writes for each source, of `most` tokens at most
    and no more than it has positions for; greedily unless `drawing` says otherwise.

    `sources` are (rows, length) `input_ids` and `attention_mask`.
    """
    adapted: Any = model
    network = adapted.get_base_model() if isinstance(model, PeftModel) else adapted
    first = find_first(network, tokenizer)
    begun = {} if first.forced is None else {"forced_bos_token_id": first.forced}
    positions = find_room(network.config, of_target=True)
    room = most if positions is None else min(most, positions - 1)  # the first one is fed
    given = network.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if given is None else given
    options = {**answering.ONE_TEXT, "do_sample": False, "use_cache": True} | begun | drawing
    with torch.inference_mode():
        made = adapted.generate(
            **sources,
            max_new_tokens=room,
            decoder_start_token_id=first.start,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            tokenizer=tokenizer,
            **options,
        )[:, 1:]
    ids = torch.tensor([] if ends is None else ends, dtype=torch.long, device=made.device)
    if network.generation_config.forced_eos_token_id is None:
        ended = torch.isin(made, ids).any(1)
    else:  # the last token there may be is the end, whatever the model would write
        ended = torch.isin(made[:, : room - 1], ids).any(1)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in made]
    return list(map(Written, texts, ended.tolist()))
