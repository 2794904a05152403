"""Hold a dequantised model against llama.cpp: the tokens of some texts, and what comes after."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lora_cli.common import LoraError, RejectedError, children, quote
from lora_cli.models import probes, tokenizer
from lora_cli.models.config import load_config
from lora_cli.models.gguf_weights import OTHERWISE, without_progress_bars

PROGRAM = Path(__file__).with_name("llama_program.py")
MOST_KL = 0.1
"""Mean KL in nats between llama.cpp's next tokens and those of the dequantised model, up to which
they are one function: llama.cpp rounds what it multiplies, too."""
TEXTS = (
    *probes.PROBES,
    "  2 + 2 = 1,024?\n\n\tna\u00efve caf\u00e9s \u2013 \u4f60\u597d, it's 12:30",
)
"""What the tokenizer has to split as llama.cpp does, beside prompts by the chat template."""


def check_in_llama(path: Path, folder: Path, limits: tuple[float, int]) -> str:
    """Compare the next tokens that llama.cpp expects with those of the model that was written;
    return how far they lie apart. `limits` are llama.cpp's: processor seconds, bytes of memory.

    Raises RejectedError for another function, or other tokens.
    """
    reader = tokenizer.load_tokenizer(str(folder))
    plain = [probes.Probe(text, reader(text)["input_ids"], True) for text in TEXTS]
    asked = [*probes.make_probes(reader), *plain]
    answers = list(_ask_llama(path, asked, limits))
    for probe, answer in zip(asked, answers, strict=True):
        if answer["ids"] != probe.ids:
            raise RejectedError(
                f"{path} cannot be a base: transformers splits {probe.text[:40]!r} otherwise than "
                "llama.cpp",
                OTHERWISE,
            )
    config = load_config(str(folder))
    with without_progress_bars():
        network = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", trust_remote_code=False
        )
    ours = [rows[-1:] for rows in probes.compute_logits(network, asked)]
    theirs = [torch.tensor([answer["logprobs"]]) for answer in answers]
    found = probes.compare_logits(theirs, ours)
    said = f"mean KL {found.mean_kl:.1e} from llama.cpp's, top-1 agreement {found.top1:.0%}"
    if not found.mean_kl <= MOST_KL:
        raise RejectedError(
            f"{path} cannot be a base: as transformers reads it, it is another model ({said})",
            OTHERWISE,
        )
    return f"{said}; the same tokens"


def _ask_llama(
    path: Path, asked: Sequence[probes.Probe], limits: tuple[float, int]
) -> Iterator[dict[str, Any]]:
    """Return what llama.cpp says of each probe. Raises LoraError where it cannot open the file."""
    done = children.run(
        [sys.executable, "-P", str(PROGRAM), str(path), *(str(int(each)) for each in limits)],
        input=json.dumps([[probe.text, probe.plain] for probe in asked]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"its process ended with {done.returncode}"
        raise LoraError(
            f"{path} cannot be a base: llama.cpp does not open it: {said}",
            f"copy it again: sha256sum {quote(path)}",
        )
    yield from json.loads(done.stdout)
