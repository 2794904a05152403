"""Compare a GGUF in llama.cpp with the Hugging Face model it was made from: token ids,
distributions, metadata."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_cli.common import LoraError, ui
from lora_cli.gguf.engine import GGUFModel
from lora_cli.models import Probe

NO_ENGINE = "not compared: no llama.cpp engine"
SPLITS = (
    "a base that transformers saved anew lacks tokenizer.model: copy it from the original; "
    "else report it"
)
REPORT = "report it, with the model's name"


class Source(NamedTuple):
    """The model that a GGUF was made from, as far as the file must say the same of itself."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    num_params: int


def find_engine() -> bool:
    """Return whether xllamacpp is installed; a warning where it is not."""
    if importlib.util.find_spec("xllamacpp") is None:
        ui.warn(
            "not compared with the Hugging Face model: no llama.cpp engine here (pip install "
            "'lora-cli[gguf]')"
        )
        return False
    return True


def compare_gguf(
    gguf: Path,
    probes: Sequence[Probe],
    expected: Sequence[torch.Tensor],
    kl_limit: float | None,
    source: Source | None = None,
    adapter: Path | None = None,
) -> str:
    """Compare llama.cpp's token ids and next-token distributions on the probes with the Hugging
    Face model's; return the difference in words.

    `expected` holds the logits after each probe's last token. Loading looks for values that are not
    finite. Raises LoraError when a tensor holds such, the file says otherwise of itself than
    `source`, ids differ, or the mean KL is over `kl_limit` (None: reported only). `adapter` is a
    GGUF of a LoRA adapter, laid over `gguf` and then the one that is judged.
    """
    judged = (adapter or gguf).name
    with GGUFModel(gguf, exact=True, adapter=adapter) as engine:
        if source is not None:
            _check_metadata(engine, judged, source)
        _check_tokens(engine, judged, probes)
        given = torch.tensor([engine.logprobs(probe.ids) for probe in probes], dtype=torch.float64)
    wanted = torch.stack(list(expected)).double().log_softmax(-1)
    if given.shape != wanted.shape:
        raise LoraError(
            f"{judged} has {given.shape[-1]} tokens, the model {wanted.shape[-1]}", REPORT
        )
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    agree = int((wanted.argmax(-1) == given.argmax(-1)).sum())
    report = (
        f"in llama.cpp: mean KL {max(kl, 0.0):.1e}, top-1 agrees on {agree} of {len(probes)} probes"
    )
    if kl_limit is not None and not kl <= kl_limit:
        raise LoraError(
            f"{judged} differs from the model it was made from: {report} (limit {kl_limit:.0e})",
            REPORT,
        )
    return report


def _check_tokens(engine: GGUFModel, name: str, probes: Sequence[Probe]) -> None:
    """Raise LoraError unless llama.cpp splits every probe into the model's own tokens."""
    for probe in probes:
        if engine.tokenize(probe.text, add_special=probe.plain) != probe.ids:
            raise LoraError(f"{name}: llama.cpp splits {probe.text!r} into other tokens", SPLITS)


def _check_metadata(engine: GGUFModel, name: str, source: Source) -> None:
    """Raise LoraError unless llama.cpp reads the model's own end token, chat template, context
    length and added tokens, and no fewer parameters, from its file."""
    config, tokenizer = source.config.get_text_config(), source.tokenizer
    said = {
        "end-of-sequence token": (engine.eos_token, tokenizer.eos_token or engine.eos_token),
        "chat template": (
            engine.chat_template.strip(),
            (tokenizer.chat_template or engine.chat_template).strip(),
        ),
        "context length": (engine.metadata["n_ctx_train"], config.max_position_embeddings),
    }
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
