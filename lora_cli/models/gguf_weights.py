"""Write the weights of a GGUF file as safetensors, by transformers, and hold them against the file.

It runs where the file is read: in the process of `gguf_program.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from lora_cli.common import LoraError, RejectedError
from lora_cli.models.config import refuse_impossible
from lora_cli.models.tensors import is_finite, open_model

if TYPE_CHECKING:
    from gguf import GGUFReader

ALONE = "model.gguf"
"""What a file is called in a folder of its own: transformers looks at what lies beside it."""
OTHERWISE = "take the model as a folder of safetensors, or its name on the hub"
TIES = 2
"""How many times the file's numbers a model may have: embeddings that are the head's weight too are
in the file once."""


def choose_dtype(reader: GGUFReader) -> torch.dtype:
    """Return the type to write: the file's own where it is one of torch's, and bfloat16 for what
    was quantised, or holds no more than that."""
    kinds = Counter[str]()
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = kinds.most_common(1)[0][0]
    if kind == "F32":
        return torch.float32
    if kind == "F16":
        halves = (each.data for each in reader.tensors if each.tensor_type.name == "F16")
        return torch.bfloat16 if all(map(_fits_bfloat16, halves)) else torch.float16
    return torch.bfloat16


def _fits_bfloat16(data: np.ndarray[Any, Any]) -> bool:
    values = torch.from_numpy(np.array(data))
    return torch.equal(values.float(), values.bfloat16().float())


def write_weights(
    shown: Path,
    alone: Path,
    folder: Path,
    dtype: torch.dtype,
    most: int,
    mend: Callable[[PretrainedConfig], None],
) -> None:
    """Write the model of the GGUF file in the folder `alone`, which holds so many numbers at most;
    errors call it `shown`. `mend` puts into its configuration what transformers does not read."""
    given = {"pretrained_model_name_or_path": str(alone), "gguf_file": ALONE}
    config = AutoConfig.from_pretrained(**given, trust_remote_code=False)
    _refuse_larger(shown, config, most)
    with without_progress_bars():
        network, report = AutoModelForCausalLM.from_pretrained(
            **given,
            **_ask_for_plain_weights(),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if lacking := sorted(report["missing_keys"]):
        raise LoraError(
            f"{shown} cannot be a base: transformers finds no {lacking[0]} in it, and "
            f"{len(lacking) - 1} others",
            OTHERWISE,
        )
    # transformers takes the dequantised model for a quantised one, which it would not save
    network.config.__dict__.pop("quantization_config", None)
    network.is_quantized, network.hf_quantizer = False, None
    mend(network.config)
    with without_progress_bars():
        network.save_pretrained(folder)


def _refuse_larger(shown: Path, config: PretrainedConfig, most: int) -> None:
    """Raise LoraError for settings that ask for more weights than are in the file: they would be
    made up, and fill the memory first."""
    refuse_impossible(str(shown), config.to_dict())
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    asked = sum(each.numel() for each in network.parameters())
    if asked > TIES * most:
        raise LoraError(
            f"{shown} cannot be a base: its settings ask for {asked:,} weights, and it holds "
            f"{most:,}",
            OTHERWISE,
        )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing: its own bars, and the one for GGUF files, which it takes from
    tqdm without asking whether any are wanted."""
    shown, bar = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _ask_for_plain_weights() -> dict[str, Any]:
    """Return what tells transformers to dequantise, which newer versions would not where they have
    kernels for what is quantised."""
    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def check_weights(shown: Path, reader: GGUFReader, folder: Path, dtype: torch.dtype) -> int:
    """Check that every matrix written holds the numbers of one in the file, in whatever order of
    rows, and that all weights are finite; return how many matrices there are."""
    from gguf import dequantize

    written = open_model(str(folder))
    assert written is not None, "written just now"
    for name in written.entries:
        if not is_finite(written.rows(name)):
            raise RejectedError(
                f"{shown} cannot be a base: {name}, dequantised to {_name(dtype)}, is not finite",
                "fetch the file again, or another quantisation of the model",
            )
    wanted = Counter(
        _sum_bits(torch.from_numpy(np.array(dequantize(each.data, each.tensor_type))).to(dtype))
        for each in reader.tensors
        if len(each.shape) > 1
    )
    names = [name for name, entry in written.entries.items() if len(entry.shape) > 1]
    for name in names:
        found = _sum_bits(written.rows(name))
        if not wanted[found]:
            raise RejectedError(
                f"{shown} cannot be a base: {name} as transformers reads it is none of the file's",
                OTHERWISE,
            )
        wanted[found] -= 1
    return len(names)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sum_bits(values: torch.Tensor) -> tuple[int, int, int]:
    """Return how many numbers there are, and two sums over their bits that do not depend on their
    order."""
    whole = torch.int32 if values.dtype == torch.float32 else torch.int16
    bits = values.contiguous().view(whole).reshape(-1).to(torch.int64)
    return bits.numel(), int(bits.sum()), int((bits % 8191).square().sum())
