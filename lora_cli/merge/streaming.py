"""Merging in constant memory: the base's tensors pass through PEFT's own layers a few rows at a
time.

PEFT attaches the adapter to a base without weights (on the `meta` device), and so decides which
modules are adapted, with which rank, scale and variant. For each tensor of the base's files, in
their order, the layer that changes it gets the real rows and its real adapter weights, merges them
in float32, and is empty again.

Rows of a LoRA or DoRA on a linear module are merged apart, and so are those of embeddings: each has
its own row of B, magnitude and norm. Other layers take their whole tensor at once. A block of rows
may be multiplied by another kernel than the whole: what is written is `merge_and_unload` to a few
units in the last place (tests/units.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from lora_cli.common import LoraError
from lora_cli.models import (
    Tensors,
    split_rows,
    tensors,
)

NAME = "default"
# PEFT's own steps in the path of a base's tensor
STEPS = {"base_layer", "token_adapter", "original_module", "modules_to_save", NAME}
# Tensors worked on at a time, at most: some ten megabytes each, and more threads than this wait for
# the disk
WORKERS = 4
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def plain(path: str) -> str:
    """The base's name for a tensor, without the steps that PEFT put into its path."""
    steps = path.removeprefix("base_model.model.").split(".")
    return ".".join(step for step in steps if step not in STEPS)


class Weights:
    """The base's tensors as the adapter was trained on them, each read when it is needed.

    Rounded to the type of training, quantised to 4 bits and back where training was, and replaced
    where the adapter carries a whole tensor (`modules_to_save`, trained biases, embeddings).
    """

    def __init__(
        self,
        base: Tensors,
        carried: Tensors,
        replaced: Mapping[str, str],
        trained: torch.dtype,
        packed: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.base, self.carried, self.replaced, self.trained, self.packed = (
            base,
            carried,
            replaced,
            trained,
            packed,
        )
        self._dequantised = threading.local()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor, in float32; integers and booleans as they are."""
        if name in self.replaced:
            return self.carried.rows(self.replaced[name], start, stop).float()
        if name in self.packed:
            return self._from_4bit(name)[start:stop].float()
        rows = self.base.rows(name, start, stop)
        return rows.to(self.trained).float() if rows.is_floating_point() else rows

    def _from_4bit(self, name: str) -> torch.Tensor:
        """The whole tensor, quantised as bitsandbytes does it and back; kept until the thread asks
        for another."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Params4bit

        kept = self._dequantised
        if getattr(kept, "name", None) != name:
            kept.name, kept.tensor = name, None
            weight = self.base.rows(name).to(self.trained)
            stored = Params4bit(weight, requires_grad=False, **self.packed[name]).to("cpu")
            kept.tensor = dequantize_4bit(stored.data, stored.quant_state)
        return kept.tensor


class Changed(NamedTuple):
    """A LoraLayer or TrainableTokensLayer of PEFT's: its path in the model, and what fills it."""

    path: str
    layer: Any
    own: dict[str, str]
    """Path inside the layer -> key in the adapter's file."""
    base: dict[str, str]
    """Path inside the layer -> the base's tensor."""

    @property
    def by_rows(self) -> bool:
        """Whether each row is merged, and answers, apart from the others."""
        if type(self.layer) is Embedding:
            return not self.layer.lora_variant
        if isinstance(self.layer, TrainableTokensLayer):
            return True
        variants = [type(variant) for variant in getattr(self.layer, "lora_variant", {}).values()]
        return (
            type(self.layer) is Linear
            and not self.layer.fan_in_fan_out
            and variants in ([], [DoraLinearVariant])
        )

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The rows to take together. A variant such as DoRA makes several more tensors of their
        size."""
        shape = tuple(self.layer.get_base_layer().weight.shape)
        return list(
            split_rows(
                shape, tensors.BLOCK * 2 // 3 if getattr(self.layer, "lora_variant", None) else None
            )
        )

    def adapter(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Its adapter tensors, in float32 as PEFT loads them."""
        return {inside: weights.carried.rows(key).float() for inside, key in self.own.items()}

    def take(
        self, weights: Weights, adapter: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> dict[str, torch.Tensor]:
        """What fills the layer for rows `start` to `stop`, or for all where its rows are not
        apart."""
        if not self.by_rows:
            return {**{inside: weights.rows(name) for inside, name in self.base.items()}, **adapter}
        given = {inside: weights.rows(name, start, stop) for inside, name in self.base.items()}
        for inside, tensor in adapter.items():
            if inside.startswith("lora_embedding_A"):
                tensor = tensor[:, start:stop]
            elif inside.startswith(("lora_B", "lora_magnitude_vector")):
                tensor = tensor[start:stop]
            given[inside] = tensor
        return given


@contextmanager
def filled(module: nn.Module, given: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """`module` with these tensors as its parameters or buffers, by path inside it, and as it was
    afterwards."""
    before = {}
    for path, tensor in given.items():
        owner, leaf = _place(module, path)
        before[path] = getattr(owner, leaf)
        parameter = isinstance(before[path], nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
    try:
        yield
    finally:
        for path, empty in before.items():
            owner, leaf = _place(module, path)
            setattr(owner, leaf, empty)


def _place(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return module.get_submodule(parent), leaf


class Plan(NamedTuple):
    """What becomes of each tensor of the base's files."""

    weights: Weights
    layers: Mapping[str, Changed]
    """The layer that changes a tensor, by the tensor's name."""
    parameters: Mapping[str, bool]
    """Tensors of the merged model in the order of the files; False for a buffer, which keeps its
    type."""
    keys: Mapping[str, str]
    """Path in PEFT's model -> key in the adapter's file."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor of PEFT's model, the adapter's own or the base's, in float32."""
        if path in self.keys:
            return self.weights.carried.rows(self.keys[path], start, stop).float()
        return self.weights.rows(plain(path), start, stop)

    def merged(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor of the merged model in pieces: merged in float32 and rounded once to `dtype`."""
        changed, weights = self.layers.get(name), self.weights
        if changed is not None and isinstance(changed.layer, TrainableTokensLayer):
            return (rows.to(self.dtype(name, dtype)) for rows in self._with_tokens(name, changed))
        stored = weights.base.entries[name]
        untouched = changed is None and name not in weights.replaced and name not in weights.packed
        if (
            untouched
            and stored.dtype == self.dtype(name, dtype)
            and weights.trained in (stored.dtype, torch.float32)
        ):
            return (
                weights.base.rows(name, start, stop) for start, stop in split_rows(stored.shape)
            )
        pieces = self._plain(name) if changed is None else self._through(name, changed)
        return (rows.to(self.dtype(name, dtype)) for rows in pieces)

    def largest_whole(self) -> int:
        """The most bytes that merging a tensor which has to be taken whole needs: it, its change,
        and both again."""
        whole = [name for name, changed in self.layers.items() if not changed.by_rows]
        return max(
            (4 * 4 * math.prod(self.weights.base.entries[name].shape) for name in whole), default=0
        )

    def dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type of a tensor in a merged model of type `dtype`."""
        stored = self.weights.base.entries[name].dtype
        return dtype if self.parameters[name] and stored.is_floating_point else stored

    def _plain(self, name: str) -> Iterator[torch.Tensor]:
        for start, stop in split_rows(self.weights.base.entries[name].shape):
            yield self.weights.rows(name, start, stop)

    def _with_tokens(self, name: str, changed: Changed) -> Iterator[torch.Tensor]:
        """The pieces of embeddings of which some rows were trained."""
        layer, ids = changed.layer, changed.layer.token_indices[NAME]
        (inside,) = changed.base
        trained = changed.adapter(self.weights)
        for start, stop in split_rows(self.weights.base.entries[name].shape):
            rows = self.weights.rows(name, start, stop)
            here = [number for number, token in enumerate(ids) if start <= token < stop]
            if here:
                layer.token_indices[NAME] = [ids[number] - start for number in here]
                with filled(
                    layer,
                    {inside: rows, **{path: tensor[here] for path, tensor in trained.items()}},
                ):
                    layer.merge()
                    layer.merged_adapters.clear()
                    rows = layer.get_base_layer().weight.data
                layer.token_indices[NAME] = ids
            yield rows

    def _through(self, name: str, changed: Changed) -> Iterator[torch.Tensor]:
        """The pieces of a tensor that a layer merges."""
        inside = next(path for path, own in changed.base.items() if own == name)
        rows = self.weights.base.entries[changed.base.get("base_layer.weight", name)].shape
        adapter = changed.adapter(self.weights)
        for start, stop in changed.blocks if changed.by_rows else [(0, rows[0])]:
            with filled(changed.layer, changed.take(self.weights, adapter, start, stop)):
                try:
                    changed.layer.merge()
                except REFUSALS as error:
                    raise refused(error) from error
                changed.layer.merged_adapters.clear()
                owner, leaf = _place(changed.layer, inside)
                yield getattr(owner, leaf).data


def refused(error: Exception) -> LoraError:
    """What to say where PEFT refuses to merge."""
    return LoraError(
        f"PEFT cannot merge this adapter: {' '.join(str(error).split())[:300]}", "serve it as it is"
    )


def write(plan: Plan, folder: Path, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Write the merged model's weights, in files named as the base's are.

    Returns how many modules were merged, and a checksum of each tensor.

    LoraError where a value is not finite, or a module or tensor of the adapter was left out.
    """
    base = plan.weights.base
    places: dict[str, tensors.Entry] = {}
    for path in base.paths:
        names = [name for name in base.names(path) if name in plan.parameters]
        entries = {name: (plan.dtype(name, dtype), base.entries[name].shape) for name in names}
        places |= tensors.create_file(folder / path.name, entries)

    def fill(names: Sequence[str]) -> dict[str, int]:
        with torch.inference_mode():
            return {
                name: tensors.fill_tensor(places[name], name, plan.merged(name, dtype))
                for name in names
            }

    sums: dict[str, int] = {}
    with one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(fill, names) for names in together(plan, places)]
        try:
            for task in tasks:
                sums |= task.result()
        finally:
            pool.shutdown(cancel_futures=True)
    if len(base.paths) > 1:
        tensors.write_index(folder, places)
    return _count(plan, places), sums


def together(plan: Plan, names: Iterable[str]) -> list[list[str]]:
    """The tensors that one thread must do after each other, for one layer changes them all."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plan.layers[name].path if name in plan.layers else name, []).append(name)
    return list(groups.values())


@contextmanager
def one_thread_each() -> Iterator[int]:
    """How many tensors to work on at a time: blocks are small, so each thread of torch's does
    better with its own.

    Sharing such small work, they wait for each other, on a busy machine for most of the time
    (measured: 1.6 s for the logits of a 0.6 GB model with one thread, 5 to 25 s with two).
    """
    threads = torch.get_num_threads()
    tensors.keep_memory()
    torch.set_num_threads(1)
    try:
        yield min(threads, WORKERS)
    finally:
        torch.set_num_threads(threads)
        tensors.give_back_memory()


def _count(plan: Plan, written: Mapping[str, tensors.Entry]) -> int:
    """How many modules were merged, all of them: every tensor that one changes was written, and
    every one used."""
    modules = {changed.path: changed for name, changed in plan.layers.items() if name in written}
    used = {key for changed in modules.values() for key in changed.own.values()}
    used |= {key for name, key in plan.weights.replaced.items() if name in written}
    unused = plan.weights.carried.entries.keys() - used
    if unused:
        raise LoraError(
            f"{len(unused)} tensors of the adapter were not merged, such as {min(unused)}",
            "report it",
        )
    return sum(isinstance(changed.layer, LoraLayer) for changed in modules.values())
