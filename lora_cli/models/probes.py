"""Compare the logits of two forms of one model on probe prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file

from lora_cli.common import LoraError, stored
from lora_cli.models import chat_template
from lora_cli.models.decoder import make_text_inputs
from lora_cli.models.head import find_task_of
from lora_cli.models.processor import KINDS, PictureProcessor, Reader, make_picture
from lora_cli.models.tensors import Tensors, is_finite
from lora_cli.recipe import DEFAULT_TASK, Task

TRAINED = "lora_probes.safetensors"
# Mean KL by which arithmetic in a type (training's own, and other hardware) may differ from float32
TRAINED_KL = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}

ARITHMETIC = 4
"""How much further from float32 training's own arithmetic may lie than the same type's here: as far
again in the logits, since a KL grows with their square."""

PROBES = (
    "List three primary colours.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What is 17 times 23? Explain each step.",
    "Translate to French: the cat sleeps on the warm windowsill.\n\nAnswer in one line.",
)
FAR = 1e-2
"""Largest |Δlogit| per unit of logit spread that float32 on other hardware may come to: a hundred
times what two orders of the sums do here."""
SUMS = 512
"""See `choose_limit`."""


class Difference(NamedTuple):
    """How far two sets of logits lie apart, over every position of every probe."""

    max_abs: float
    mean_kl: float
    top1: float
    spread: float

    def __str__(self) -> str:
        top1 = f"{100 * self.top1:.1f}%"
        largest, kl = f"{self.max_abs:.2e}", f"{self.mean_kl:.2e}"
        return f"largest |Δlogit| {largest}, mean KL {kl}, top-1 agreement {top1}"


class Probe(NamedTuple):
    """A prompt as it is fed: rendered by the chat template, else plain text that still gets its
    BOS; or a picture, called by a name."""

    text: str
    ids: list[int]
    plain: bool
    pixels: torch.Tensor | None = None
    """A picture, (1, channels, height, width)."""

    def is_same(self, other: Probe) -> bool:
        """Return whether another reader makes the same picture of it."""
        pixels = self.pixels, other.pixels
        return pixels[0] is not None and pixels[1] is not None and torch.equal(*pixels)


def make_probes(reader: Reader) -> list[Probe]:
    """Make the probe prompts for this tokenizer, or the probe pictures for this processor."""
    if isinstance(reader, PictureProcessor):
        made = {kind: make_picture(kind, reader.shape[::-1]) for kind in KINDS}
        return [
            Probe(kind, [], True, reader([picture])["pixel_values"])
            for kind, picture in made.items()
        ]
    tokenizer = reader
    if chat_template.find_template(tokenizer) is None:
        return [Probe(text, tokenizer(text)["input_ids"], True) for text in PROBES]
    texts = [
        chat_template.render(
            tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for text in PROBES
    ]
    return [
        Probe(text, tokenizer(text, add_special_tokens=False)["input_ids"], False) for text in texts
    ]


def save_trained(model: torch.nn.Module, reader: Reader, folder: Path) -> None:
    """Save the logits after each probe at the end of training (float32, probes × vocabulary) with
    the adapter."""
    rows = _choose_kept(find_task_of(model), compute_logits(model, make_probes(reader)))
    save_file({"logits": torch.cat(rows)}, folder / TRAINED)


def _choose_kept(task: Task, logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the positions of each probe whose logits are kept: the last one where there is a whole
    vocabulary for each."""
    return [rows[-1:] if task.writes_text else rows for rows in logits]


def measure_trained(
    folder: Path, given: Sequence[torch.Tensor], task: Task = DEFAULT_TASK
) -> Difference | None:
    """Return how far probe logits `given` lie from those that training left in the adapter's
    folder; None for an adapter that was saved without."""
    file = folder / TRAINED
    if not file.is_file():
        return None
    tensors = Tensors([file])
    found = tensors.entries.get("logits")
    if found is None or found.dtype != torch.float32 or len(found.shape) != 2:
        raise stored.explain_damage(file, "it holds no logits in float32")
    rows = _choose_kept(task, given)
    sizes = [len(each) for each in rows]
    if found.shape[0] != sum(sizes):
        raise stored.explain_damage(file, f"logits of {found.shape[0]} probes, not {sum(sizes)}")
    kept = tensors.rows("logits")
    if not is_finite(kept):
        raise stored.explain_damage(file, "logits that are not finite")
    return compare_logits(list(kept.split(sizes)), rows)


def check_trained(
    folder: Path,
    given: Sequence[torch.Tensor],
    dtype: torch.dtype,
    compute_rough: Callable[[], Sequence[torch.Tensor] | None],
    task: Task = DEFAULT_TASK,
) -> str | None:
    """Return whether base with adapter, whose probe logits in float32 are `given`, is still the
    function that training left behind.

    Where 16 bits lie further off than most models' arithmetic, this model's own is measured:
    `compute_rough` gives its logits in training's type, or None where they cannot be had. Returns
    the distance in words, None for an adapter that was saved without logits. LoraError when it is
    another function: the base has changed, or was loaded otherwise than for training.
    """
    difference = measure_trained(folder, given, task)
    if difference is None:
        return None
    # one wrong row of a vocabulary hides in the mean; in float32 no logit may be far off
    far = dtype == torch.float32 and not difference.max_abs <= FAR * difference.spread
    kept, said = difference.mean_kl <= TRAINED_KL[dtype], str(difference)
    rough = None if kept or dtype == torch.float32 else compute_rough()
    if rough is not None:
        kept_rows = [_choose_kept(task, each) for each in (given, rough)]
        noise = compare_logits(*kept_rows).mean_kl
        kept = difference.mean_kl <= ARITHMETIC * noise
        said += f" (what its arithmetic comes to here: mean KL {noise:.2e})"
    if far or not kept:
        raise LoraError(
            f"{folder} on its base is not the model that was trained: {said}",
            "the base has changed since: --base gives the one it was trained on",
        )
    return said


class Tokens(Protocol):
    """What can be fed: token ids."""

    @property
    def ids(self) -> list[int]: ...


def make_inputs(
    model: torch.nn.Module,
    probe: Tokens,
    device: torch.device | None = None,
    kind: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Return what a model of any task is given for one probe; a picture in a type of numbers."""
    if isinstance(probe, Probe) and probe.pixels is not None:
        return {"pixel_values": probe.pixels.to(device, kind)}
    return make_text_inputs(model, probe.ids, device)


def compute_logits(model: torch.nn.Module, probes: Sequence[Tokens]) -> list[torch.Tensor]:
    """Return float32 logits, one (length, vocabulary) tensor on the CPU per probe, or one row of a
    text that is classified; `model` in eval mode, on its own device."""
    model.eval()
    device = next(model.parameters()).device
    kind = next(each.dtype for each in model.parameters() if each.is_floating_point())
    with torch.inference_mode(), multiply_in_float32():
        made = [make_inputs(model, probe, device, kind) for probe in probes]
        return [read_rows(model(**inputs)).float().cpu() for inputs in made]


def read_logits(outputs: Any) -> torch.Tensor:
    """Return what a model of any task says of a batch: (rows, outputs), or (rows, positions,
    outputs of each); two for a position where an answer is sought: it begins, or ends, there."""
    start: torch.Tensor | None = getattr(outputs, "start_logits", None)
    if start is not None:
        return torch.stack([start, outputs.end_logits], -1)
    logits: torch.Tensor = outputs.logits
    return logits


def read_rows(outputs: Any) -> torch.Tensor:
    """Return what a model of any task says of a single text: (positions, outputs of each)."""
    logits = read_logits(outputs)[0]
    return logits if logits.dim() == 2 else logits[None]


@contextmanager
def multiply_in_float32() -> Iterator[None]:
    """Let CUDA's products of float32 be that inside the block, also in a training that `tf32: true`
    lets round their factors: the limits here are float32's."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def compare_logits(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Difference:
    """Compare `after` with `before`, both from `compute_logits`. Raises LoraError if the
    vocabularies differ."""
    sizes = [logits[0].shape[-1] for logits in (before, after)]
    if sizes[0] != sizes[1]:
        raise LoraError(
            f"the vocabularies differ: {sizes[0]} and {sizes[1]} tokens",
            "use the base it was trained on",
        )
    # one probe at a time: in double precision, a large vocabulary at every position is itself large
    each = [
        _differ_by_position(first.double(), second.double())
        for first, second in zip(before, after, strict=True)
    ]
    max_abs, kl, same = torch.cat(each, dim=1)
    return Difference(
        max_abs=max_abs.max().item(),
        mean_kl=kl.mean().item(),
        top1=same.mean().item(),
        spread=torch.cat(list(before)).std().item(),
    )


def _differ_by_position(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return for each position the largest difference, the KL, and whether the likeliest token is
    the same, as (3, positions)."""
    if first.shape[-1] == 1:  # a measured value, beside which there is nothing
        first, second = (torch.cat([each, torch.zeros_like(each)], -1) for each in (first, second))
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    same = first.argmax(-1) == second.argmax(-1)
    return torch.stack(
        [(first - second).abs().amax(-1), (p.exp() * (p - q)).sum(-1), same.double()]
    )


class Limit(NamedTuple):
    """How far two forms of a model may lie apart: what is limited, its limit, and what it is."""

    what: str
    limit: float
    value: float

    @property
    def kept(self) -> bool:
        """Whether the value is within the limit; a NaN is not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"limit: {self.what} {self.limit:.2e}"


def choose_limit(difference: Difference, dtype: torch.dtype, layers: int) -> Limit:
    """Return the limit that tells two forms of one model of so many layers from two models, their
    logits computed in float32; `dtype` is the coarser type of their weights.

    In float32 only sums of many products in another order move the logits. Each layer's errors are
    in proportion to the epsilon and do not know of the others', so that they grow with the root of
    their number. Measured by scripts/measure_limits.py (see benchmarks.md): 9 to 41 for 2 to 30
    layers, widths of 192 to 1152 and 32 to 262 thousand tokens; 158 at most among 145 architectures
    (tests/cli/test_architectures.py); a missing module comes to 18,000. In 16 bits every weight is
    rounded, which moves single logits as far as a module that is missing would: only another
    function altogether can be told.
    """
    if dtype != torch.float32:
        return Limit("mean KL", TRAINED_KL[dtype], difference.mean_kl)
    spread = max(difference.spread, 1e-3)
    most = SUMS * math.sqrt(layers) * torch.finfo(dtype).eps * spread
    return Limit("|Δlogit|", most, difference.max_abs)
