"""What an adapter was trained on: its base in the type and storage of training, and the tokenizer it learned with."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.models import base, config, fingerprint, tokenizer
from lora_cli.models.adapter_folder import Adapter


def load_base(adapter: Adapter, original: bool = False) -> PreTrainedModel:
    """The base as the adapter was trained on it: same revision, type, quantisation; a foreign one as its files are.

    `original` leaves the quantisation out. LoraError where it is not the base that was trained on.
    """
    fingerprint.refuse_other_base(adapter)
    quantization = adapter.quantization if not original else None
    settings = BitsAndBytesConfig(load_in_4bit=True, **quantization) if quantization else None
    return base.load_base(adapter.base, adapter.revision, find_trained_dtype(adapter), settings)


def find_dtype_on_disk(adapter: Adapter) -> torch.dtype:
    """The type of the base's own files, which the merged model gets."""
    return config.get_checkpoint_dtype(config.load_config(adapter.base, adapter.revision))


def load_tokenizer(adapter: Adapter) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, with the template that was trained; the base's where it has none."""
    if (adapter.folder / "tokenizer_config.json").is_file():
        return tokenizer.load_tokenizer(str(adapter.folder))
    return tokenizer.load_tokenizer(adapter.base, adapter.revision)


def find_trained_dtype(adapter: Adapter) -> torch.dtype:
    """The type the base's weights had in training; that of its files for an adapter made elsewhere."""
    return getattr(torch, adapter.dtype) if adapter.dtype else find_dtype_on_disk(adapter)


def convert_to_float32(base: PreTrainedModel) -> PreTrainedModel:
    """Every weight in float32, exactly; buffers such as rotary frequencies as they are."""
    for parameter in base.parameters():
        parameter.data = parameter.data.float()
    base.config.dtype = torch.float32
    return base
