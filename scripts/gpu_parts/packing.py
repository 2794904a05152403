"""Whether documents in one sequence are what they are alone: logits, and gradients of an adapter.

Each kind of attention, in float32 and bfloat16, on the tiny model and on a random one as deep as
those of 8B. The unit of the logits' difference is what `lora_cli/speed/step_packing.py` allows by:
the type's epsilon times the root of the number of layers, of the logits' spread.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_parts import models, runs
from gpu_parts.part import Bench, Case, Figures, NotHereError
from gpu_parts.report import Column
from lora_cli.models import Base, attach
from lora_cli.recipe import load_recipe, upstream
from lora_cli.speed import document_attention, step_packing

TITLE = "Documents in one sequence against each alone"
COLUMNS = (
    Column("used by", "attention"),
    Column("logits off, in units", "units", 2),
    Column("largest logit off, of spread", "largest", 4),
    Column("gradients off", "gradients", 2, 100, "%"),
    Column("words of others seen", "seen", 6),
    Column("lora packs", "packs"),
)
LENGTHS = (203, 150, 97, 61, 30, 7)
ATTENTIONS = ("what lora takes", "sdpa", "eager", "flash_attention_2")
KINDS = ("bfloat16", "float32")


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    return {
        f"{model}, {kind}, {attention}": Case(partial(compare, model, kind, attention), 20)
        for model in ("tiny", "deep")
        for kind in KINDS
        for attention in ATTENTIONS
    }


def compare(model: str, kind: str, attention: str, bench: Bench) -> Figures:
    """Return how far packed documents are from each alone."""
    network = load_adapted(model, kind, attention, bench)
    size = network.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(10, size, (length,), generator=draw).tolist() for length in LENGTHS]
    rows = [{"input_ids": ids, "labels": ids} for ids in drawn]
    packed, packed_by = _pass(network, kind, rows, sum(LENGTHS), bench)
    alone, alone_by = _pass(network, kind, rows, 1, bench)
    spread, layers = alone.std(), network.config.num_hidden_layers
    unit = torch.finfo(getattr(torch, kind)).eps * math.sqrt(layers)
    # the last document's words are changed by those of the first, if it sees them
    other = [{**rows[0], "input_ids": rows[0]["input_ids"][::-1]}, *rows[1:]]
    changed, _ = _pass(network, kind, other, sum(LENGTHS), bench)
    seen = (changed - packed)[LENGTHS[0] :].abs().max() / spread
    return {
        "attention": network.get_base_model().config._attn_implementation,
        "units": float((packed - alone).square().mean().sqrt() / spread / unit),
        "largest": float((packed - alone).abs().max() / spread),
        "gradients": float((packed_by - alone_by).norm() / alone_by.norm()),
        "seen": float(seen),
        "packs": step_packing.find_unsuitable(network.get_base_model()) is None,
    }


def load_adapted(model: str, kind: str, attention: str, bench: Bench) -> Any:
    """Return a base with an adapter whose B is not zero, with that kind of attention."""
    folder = bench.tiny / "model" if model == "tiny" else models.make_model(bench, model)
    given = {} if attention == ATTENTIONS[0] else {"attn_implementation": attention}
    if attention == "flash_attention_2" and not _has_flash(bench, kind):
        raise NotHereError("flash-attn is not installed, or has no such type")
    network = Base(str(folder)).load(getattr(torch, kind), None, bench.clock.device, **given)
    if attention == ATTENTIONS[0]:
        document_attention.install(network, max(LENGTHS))
    recipe = load_recipe(runs.write_recipe(runs.make_folder(bench, "packing"), folder, folder, {}))
    adapted = attach.attach_adapter(network, upstream.build_lora_config(recipe))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(attach.walk_trainable(adapted)):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * runs.SPREAD)
    return adapted


def _has_flash(bench: Bench, kind: str) -> bool:
    return bool(find_spec("flash_attn")) and bench.clock.on_gpu and kind != "float32"


def _pass(
    network: Any, kind: str, rows: list[Figures], length: int, bench: Bench
) -> tuple[Tensor, Tensor]:
    """Return all rows' logits one after another, and the adapter's gradients, of sequences of up to
    `length` tokens."""
    network.zero_grad()
    made, device = [], bench.clock.device
    half = kind == "bfloat16"
    step = step_packing.StepCollator(length)(rows)
    step = {
        name: given.to(device) if isinstance(given, Tensor) else given
        for name, given in step.items()
    }
    told = document_attention.takes_bounds(network)
    for part in step_packing.split_sequences(step, documents=told):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = network(**part, num_items_in_batch=sum(LENGTHS), use_cache=False)
        found.loss.backward()
        made.append(found.logits[0].detach().float())
    gradients = [parameter.grad.flatten() for _, parameter in attach.walk_trainable(network)]
    return torch.cat(made), torch.cat(gradients).float()
