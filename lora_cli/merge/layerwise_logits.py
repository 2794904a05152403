"""Compute logits of a model of any size, by reading its weights from the files as the forward pass
comes to them.

The modules of a model without weights keep their own forward, which gets real tensors for as long
as it runs: linear modules some rows of output at a time, embeddings the rows of the given tokens,
PEFT's layers their adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers import PretrainedConfig

from lora_cli.common import ui
from lora_cli.merge import streaming_plan, unread
from lora_cli.merge.streaming import (
    Changed,
    Plan,
    fill_buffers,
    fill_module,
    limit_threads,
    strip_peft_steps,
)
from lora_cli.models import (
    Base,
    Probe,
    Tensors,
    compute_logits,
    convert_to_float32,
    find_task_of,
    make_inputs,
    quantised,
    read_rows,
    split_rows,
    token_rows,
)
from lora_cli.recipe import Task

# How many positions at the end of each probe keep their logits: with a large vocabulary, those of
# every position take much memory
KEPT = 8
Read = Callable[[str, int, int | None], torch.Tensor]
Forward = Callable[..., Any]


def walk_logits(
    model: nn.Module, read: Read, plan: Plan | None, probes: Sequence[Probe]
) -> list[torch.Tensor]:
    """Return float32 logits at the last positions of each probe: one (positions, vocabulary) tensor
    per probe; of other tasks than writing, all that is said of it.

    `model` has no weights; `read(name, start, stop)` returns rows of its tensors in float32. `plan`
    says which of its modules are PEFT's layers. Raises RuntimeError or NotImplementedError where a
    module's code does not stand weights that are read as it runs.
    """
    if not find_task_of(model).writes_next_tokens:
        with torch.inference_mode(), limit_threads(), _hook_modules(model, read, plan):
            model.eval()
            made = [model(**make_inputs(model, probe)) for probe in probes]
            return [read_rows(each).float() for each in made]
    width = max(len(probe.ids) for probe in probes)
    # later positions are hidden from earlier ones, so padding on the right changes nothing
    ids = torch.tensor([[*probe.ids, *([0] * (width - len(probe.ids)))] for probe in probes])
    kept = [range(max(0, len(probe.ids) - KEPT), len(probe.ids)) for probe in probes]
    wanted = [(row, position) for row, positions in enumerate(kept) for position in positions]
    head = _limit_head(model.get_output_embeddings(), wanted, ids.shape)
    with torch.inference_mode(), limit_threads(), _hook_modules(model, read, plan), head:
        made = model.eval()(input_ids=ids, use_cache=False).logits
    if made.shape[:2] != (1, len(wanted)):  # the model uses its head's weight, not the head
        made = made[tuple(torch.tensor(wanted).T)]
    rows = made.reshape(len(wanted), -1).float()
    return list(rows.split([len(positions) for positions in kept]))


def walk_logits_of(
    model: Base,
    dtype: torch.dtype,
    probes: Sequence[Probe],
    config: PretrainedConfig | None = None,
) -> list[torch.Tensor] | None:
    """Return the same for a plain model, on the hub or in a folder, or None where they cannot be
    computed; `config`: its weights by another configuration than its own."""

    if model.quantised:
        quantised.refuse_undequantisable(model.name, model.quantised)

    def load() -> list[torch.Tensor]:
        loaded = model.load(dtype, config=config) if config else model.load_plain(dtype)
        return compute_logits(convert_to_float32(loaded), probes)

    names = streaming_plan.find_own_names(model)
    if model.tensors is None or not names:
        return keep_last(model.task, load())
    return walk_or_load(
        lambda: _walk_files(model, names, probes, config), load, model.tensors, model.task
    )


def walk_or_load(
    walked: Callable[[], list[torch.Tensor]],
    loaded: Callable[[], list[torch.Tensor]],
    tensors: Tensors,
    task: Task,
) -> list[torch.Tensor] | None:
    """Return `walked()`, or `loaded()` for a model whose code does not stand weights that are read
    as it runs.

    Loading has to fit a quarter of the free memory: else warn and return None.
    """
    try:
        return walked()
    except (RuntimeError, NotImplementedError) as error:
        if not fits_memory(tensors):
            ui.warn(
                "logits were not compared: that needs the whole model in memory "
                f"({measure_float32(tensors) / 2**30:.0f} GiB), because "
                f"{' '.join(str(error).split())[:100]}"
            )
            return None
    return keep_last(task, loaded())


def keep_last(task: Task, logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits at the positions that `walk_logits` computes."""
    return [rows[-KEPT:] if task.writes_next_tokens else rows for rows in logits]


def fits_memory(tensors: Tensors) -> bool:
    """Return whether a model in float32 takes no more than a quarter of the free memory."""
    return measure_float32(tensors) <= psutil.virtual_memory().available / 4


def measure_float32(tensors: Tensors) -> int:
    """Return the bytes that a model takes in float32."""
    return 4 * sum(math.prod(entry.shape) for entry in tensors.entries.values())


def walk_unrounded(
    plan: Plan, base: Base, probes: Sequence[Probe], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return the logits of the merged model before its weights are rounded: each is merged, in
    float32, as the forward pass comes to it. `dtype`: each is then rounded once to this."""
    kept: dict[str, torch.Tensor] = {}

    def read(name: str, start: int, stop: int | None) -> torch.Tensor:
        rows = merge_rows(name, start, stop)
        if not rows.is_floating_point():
            return rows
        return rows.to(plan.choose_dtype(name, dtype)).float()

    def merge_rows(name: str, start: int, stop: int | None) -> torch.Tensor:
        changed = plan.layers.get(name)
        if changed is None or changed.by_rows:
            return plan.read_merged(name, start, stop)
        if name not in kept:  # merged whole, and read some rows at a time
            kept.clear()
            kept[name] = plan.read_merged(name, 0, None)
        return kept[name][start:stop]

    network = base.build_unweighted()
    fill_buffers(network, plan.parameters, plan.weights.rows)
    return walk_logits(network, read, None, probes)


def _walk_files(
    model: Base,
    names: Mapping[str, bool],
    probes: Sequence[Probe],
    config: PretrainedConfig | None,
) -> list[torch.Tensor]:
    """Return the logits of a plain model whose files name its tensors as it does, by `config` or
    else its own configuration."""
    tensors = model.tensors
    assert tensors is not None, "walk_logits_of has looked"

    def read(tensor: str, start: int, stop: int | None) -> torch.Tensor:
        rows = tensors.rows(tensor, start, stop)
        return rows.float() if rows.is_floating_point() else rows

    network = model.build_unweighted(config)
    fill_buffers(network, names, tensors.rows)
    return walk_logits(network, read, None, probes)


@contextmanager
def _limit_head(
    head: nn.Module, wanted: Sequence[tuple[int, int]], shape: torch.Size
) -> Iterator[None]:
    """Let the head see only these (row, position) of the hidden states of `shape` (rows × length ×
    width)."""
    rows, positions = torch.tensor(wanted).T

    def choose(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        usual = given[0].shape[:2] == shape
        return (given[0][rows, positions][None],) if usual else None

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _hook_modules(model: nn.Module, read: Read, plan: Plan | None) -> Iterator[None]:
    """Let each module's forward read what it needs while the block runs."""
    changed = {layer.path: layer for layer in plan.layers.values()} if plan is not None else {}
    # tied weights have one name, that of the first module which has them
    names = {
        id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    done: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for path, module in list(model.named_modules()):
        if path.startswith(inside) and inside:
            continue
        if isinstance(module, (LoraLayer, TrainableTokensLayer)):
            inside += (f"{path}.",)
        forward = _make_forward(module, names, read, plan, changed.get(path))
        if forward is not None:
            module.forward = forward
            done.append(module)
    try:
        with unread.replace_meta(model, lambda tensor: read(names[id(tensor)], 0, None)):
            yield
    finally:
        for module in done:
            del module.forward  # the class's own shows again


def _make_forward(
    module: nn.Module, names: dict[int, str], read: Read, plan: Plan | None, changed: Changed | None
) -> Forward | None:
    """Return the module's forward, reading its tensors as it runs; None for a module without
    tensors on `meta`."""
    forward = module.forward
    if changed is not None and plan is not None and changed.by_rows and type(module) is Linear:
        return _make_adapted_linear(module, forward, plan, changed)
    whole = isinstance(module, (LoraLayer, TrainableTokensLayer))
    tensors = [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]
    # PEFT keeps the rows it has replaced, which no forward reads
    own = {
        path: names[id(t)]
        for path, t in tensors
        if t.is_meta and not path.startswith("trainable_tokens_original")
    }
    if not own:
        return None
    if type(module) is nn.Linear:
        return _make_linear(module, forward, own, read)
    if token_rows.looks_up_ids(module):
        return _make_embedding(module, forward, own["weight"], read)

    def with_all(*given: Any, **options: Any) -> Any:
        with fill_module(module, {leaf: read(name, 0, None) for leaf, name in own.items()}):
            return forward(*given, **options)

    return with_all


def _make_linear(module: nn.Linear, forward: Forward, own: dict[str, str], read: Read) -> Forward:
    """Return a forward that computes some rows of output at a time; `own` are the module's tensors
    and their names."""
    shape = tuple(module.weight.shape)

    def by_rows(x: torch.Tensor) -> torch.Tensor:
        # filled piece by piece: pieces kept between the blocks would leave holes in memory
        out = x.new_empty(*x.shape[:-1], shape[0])
        for start, stop in split_rows(shape):
            with fill_module(module, {leaf: read(name, start, stop) for leaf, name in own.items()}):
                out[..., start:stop] = forward(x)
        return out

    return by_rows


def _make_embedding(module: nn.Embedding, forward: Forward, name: str, read: Read) -> Forward:
    """Return a forward that reads only the rows of the tokens it is given."""
    module.padding_idx = None  # counts the rows of the whole table, not those read here

    def of_tokens(ids: torch.Tensor) -> torch.Tensor:
        tokens, positions = ids.unique(return_inverse=True)
        rows = torch.cat([read(name, token, token + 1) for token in tokens.tolist()])
        with fill_module(module, {"weight": rows}):
            return forward(positions)

    return of_tokens


def _make_adapted_linear(layer: Linear, forward: Forward, plan: Plan, changed: Changed) -> Forward:
    """Return a forward for LoRA or DoRA on a linear module that computes some rows of output at a
    time."""
    if layer.get_base_layer().bias is not None:
        changed = changed._replace(
            base={**changed.base, "base_layer.bias": strip_peft_steps(f"{changed.path}.bias")}
        )
    for magnitude in layer.lora_magnitude_vector.values():
        # PEFT multiplies an identity of the input's width through both, for FSDP's sake; the
        # product is the same
        magnitude.get_lora_weight = lambda lora_A, lora_B, adapter_name=None: (
            lora_B.weight @ lora_A.weight
        )
    shape = tuple(layer.get_base_layer().weight.shape)

    def by_rows(x: torch.Tensor) -> torch.Tensor:
        adapter = changed.read_adapter(plan.weights)
        out = x.new_empty(*x.shape[:-1], shape[0])
        for start, stop in changed.blocks:
            with fill_module(layer, changed.select_tensors(plan.weights, adapter, start, stop)):
                out[..., start:stop] = forward(x)
        return out

    return by_rows
