"""Read out of a GGUF file how its rotary positions are scaled: transformers leaves that out, and
its model is another one, the more so the longer a text is.

It runs where the file is read: in the process of `gguf_program.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig

from lora_cli.common import LoraError
from lora_cli.models.gguf_weights import OTHERWISE

if TYPE_CHECKING:
    from gguf import GGUFReader

FREQUENCIES = "rope_freqs.weight"
"""What each frequency is divided by, as llama.cpp's converter writes it for Llama 3.1 and later."""
PLAIN = ("type", "factor", "original_context_length", "finetuned")
"""The settings of a scaling that are the same here and there; others change it further."""
LOW, HIGH = 1.0, 4.0
"""Llama 3's bounds, in wavelengths of its first context: none was published with others."""
CONTEXTS = [2**n for n in range(6, 21)]
"""What that first context may be; Llama's is 8192."""


def put_scaling(shown: Path, reader: GGUFReader, config: PretrainedConfig) -> None:
    """Write the scaling of a GGUF file, which errors call `shown`, into the configuration that
    transformers made of it. Raises LoraError for one that is not known here."""
    found: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = isinstance(found.get("full_attention"), dict)  # Gemma's windows are not scaled
    rope = found["full_attention"] if nested else found
    if rope.get("rope_type", "default") != "default":
        return  # transformers has read it, as it does that of gpt-oss
    scaling = _read_scaling(shown, reader, rope.get("rope_theta"))
    if not scaling:
        return
    if not rope:
        raise _refuse(shown, f"its positions are scaled ({scaling['rope_type']}), by no key of it")
    made = rope | scaling
    config.get_text_config().rope_parameters = found | (
        {"full_attention": made} if nested else made
    )


def _read_scaling(shown: Path, reader: GGUFReader, theta: Any) -> dict[str, Any]:
    """Return the fields of transformers' `rope_parameters`; none where nothing is scaled."""
    values = _read_values(reader)
    kind = values.get("type", "none")
    tensors = {each.name: each for each in reader.tensors if "rope_f" in each.name}
    if kind == "none" and not tensors:
        return {}
    if kind == "none" and set(tensors) == {FREQUENCIES}:
        return _read_frequencies(shown, tensors[FREQUENCIES], theta)
    more = sorted({*values} - {*PLAIN}) + sorted(tensors)
    if kind not in ("linear", "yarn") or more:
        raise _refuse(shown, f"its positions are scaled by {', '.join([str(kind), *more])}")
    scaling = {"rope_type": kind, "factor": values.get("factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = values.get("original_context_length")
    if not all(scaling.values()):
        raise _refuse(shown, f"its positions are scaled by {kind}, and it does not say how far")
    return scaling


def _read_values(reader: GGUFReader) -> dict[str, Any]:
    """Return what the file's keys say of the scaling, without what says nothing."""
    architecture = reader.get_field("general.architecture")
    prefix = f"{architecture.contents() if architecture else ''}.rope.scaling."
    values = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }
    if values.get("attn_factor") == 1.0:
        del values["attn_factor"]
    return values


def _read_frequencies(shown: Path, tensor: Any, theta: Any) -> dict[str, Any]:
    """Return the settings of Llama 3 that make these divisors of the frequencies of `theta`."""
    from gguf import dequantize

    given = np.array(dequantize(tensor.data, tensor.tensor_type), np.float64).reshape(-1)
    if (given == 1).all():
        return {}
    factor = float(given.max())
    for context in CONTEXTS if isinstance(theta, (int, float)) else ():
        if np.allclose(make_divisors(len(given), float(theta), factor, context), given, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": context,
            }
    raise _refuse(shown, f"its {FREQUENCIES} is none of Llama 3's")


def make_divisors(count: int, theta: float, factor: float, context: int) -> np.ndarray[Any, Any]:
    """Return what Llama 3 divides its first `count` frequencies by: long waves by `factor`, short
    ones by 1, and those between by something between (llama.cpp's conversion of Llama)."""
    turns = context * theta ** (-np.arange(count) / count) / (2 * np.pi)
    smooth = np.clip((turns - LOW) / (HIGH - LOW), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _refuse(shown: Path, why: str) -> LoraError:
    return LoraError(f"{shown} cannot be a base: {why}", OTHERWISE)
