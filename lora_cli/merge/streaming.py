"""Merge in constant memory: the base's tensors pass through PEFT's own layers a few rows at a time.

PEFT attaches the adapter to a base without weights (on the `meta` device), and so decides which
modules are adapted, with which rank, scale and variant. For each tensor of the base's files, in
their order, the layer that changes it gets the real rows and its real adapter weights, merges them
in float32, and is emptied again.

Rows of a LoRA or DoRA on a linear module are merged separately, and so are those of embeddings:
each has its own row of B, magnitude and norm. Other layers take their whole tensor at once. A block
of rows may be multiplied by another kernel than the whole: what is written is `merge_and_unload` to
a few units in the last place (tests/units.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from lora_cli.common import LoraError, spell_count
from lora_cli.models import Tensors, split_rows, tensors

NAME = "default"
# Steps that PEFT adds to the path of a base's tensor
STEPS = {"base_layer", "token_adapter", "original_module", "modules_to_save", NAME}
# How many tensors are worked on at a time at most: each takes some ten megabytes, and more threads
# wait for the disk
WORKERS = 4
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def strip_peft_steps(path: str) -> str:
    """Return the base's name for a tensor, without the steps that PEFT put into its path."""
    steps = path.removeprefix("base_model.model.").split(".")
    return ".".join(step for step in steps if step not in STEPS)


class Weights:
    """The base's tensors as the adapter was trained on them, each read when it is needed.

    They are rounded to the type of training, quantised to 4 bits and back where training was, by
    the device `quantiser`, and replaced where the adapter carries a whole tensor
    (`modules_to_save`, trained biases, embeddings).
    """

    def __init__(
        self,
        base: Tensors,
        carried: Tensors,
        replaced: Mapping[str, str],
        trained: torch.dtype,
        packed: Mapping[str, Mapping[str, Any]],
        quantiser: torch.device,
    ) -> None:
        self.base = base
        self.carried = carried
        self.replaced = replaced
        self.trained = trained
        self.packed = packed
        self.quantiser = quantiser
        self._dequantised = threading.local()

    def find_entry(self, name: str) -> tensors.Entry:
        """Return the type and shape of a tensor: of the base's files, or of the adapter where the
        base has none, or one of another size, as of a head."""
        stored = self.base.entries.get(name)
        own = self.carried.entries[self.replaced[name]] if name in self.replaced else None
        if own is not None and (stored is None or stored.shape != own.shape):
            return own
        assert stored is not None, "what is in neither has no name"
        return stored

    def read_before(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return rows of a tensor as the base's files have them; None where these lack it, or have
        one of another size."""
        if name not in self.base.entries or self.find_entry(name) != self.base.entries[name]:
            return None
        return self.base.rows(name, start, stop)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows of a tensor, in float32; integers and booleans keep their type."""
        if name in self.replaced:
            rows = self.carried.rows(self.replaced[name], start, stop)
            return rows.float() if rows.is_floating_point() else rows
        if name in self.packed:
            return self._read_from_4bit(name)[start:stop].float()
        rows = self.base.rows(name, start, stop)
        return rows.to(self.trained).float() if rows.is_floating_point() else rows

    def _read_from_4bit(self, name: str) -> torch.Tensor:
        """Return the whole tensor, quantised as bitsandbytes does it and back; it is kept until the
        thread asks for another."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Params4bit

        kept = self._dequantised
        if getattr(kept, "name", None) != name:
            kept.name, kept.tensor = name, None
            weight = self.base.rows(name).to(self.trained)
            stored = Params4bit(weight, requires_grad=False, **self.packed[name])
            stored = stored.to(self.quantiser)
            kept.tensor = dequantize_4bit(stored.data, stored.quant_state).cpu()
        return kept.tensor


class Changed(NamedTuple):
    """One of PEFT's LoraLayers or TrainableTokensLayers: its path in the model, and what fills
    it."""

    path: str
    layer: Any
    own: dict[str, str]
    """Path inside the layer -> key in the adapter's file."""
    base: dict[str, str]
    """Path inside the layer -> the base's tensor."""

    @property
    def by_rows(self) -> bool:
        """Whether each row is merged, and computes its output, independently of the others."""
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
        """The ranges of rows to take together; a variant such as DoRA makes several more tensors of
        their size."""
        shape = tuple(self.layer.get_base_layer().weight.shape)
        has_variant = bool(getattr(self.layer, "lora_variant", None))
        return list(split_rows(shape, tensors.BLOCK * 2 // 3 if has_variant else None))

    def read_adapter(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Return its adapter tensors, in float32 as PEFT loads them."""
        return {inside: weights.carried.rows(key).float() for inside, key in self.own.items()}

    def select_tensors(
        self, weights: Weights, adapter: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> dict[str, torch.Tensor]:
        """Return what fills the layer for rows `start` to `stop`, or for all rows where they depend
        on each other."""
        if not self.by_rows:
            whole = {inside: weights.rows(name) for inside, name in self.base.items()}
            return whole | dict(adapter)
        given = {inside: weights.rows(name, start, stop) for inside, name in self.base.items()}
        for inside, tensor in adapter.items():
            if inside.startswith("lora_embedding_A"):
                tensor = tensor[:, start:stop]
            elif inside.startswith(("lora_B", "lora_magnitude_vector")):
                tensor = tensor[start:stop]
            given[inside] = tensor
        return given


def fill_buffers(
    network: nn.Module, parameters: Mapping[str, bool], read: Callable[[str], torch.Tensor]
) -> None:
    """Give the buffers of a model without weights, with an adapter or not, what `read(path)` has of
    those that are in the files, such as BART's bias of the logits or the means of a BatchNorm: they
    are names that stand for no parameter."""
    for path, buffer in network.named_buffers():
        if parameters.get(strip_peft_steps(path)) is False:
            buffer.copy_(read(path))


@contextmanager
def fill_module(module: nn.Module, given: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give `module` these tensors as its parameters or buffers, by path inside it, while the block
    runs."""
    before = {}
    for path, tensor in given.items():
        owner, leaf = _locate(module, path)
        before[path] = getattr(owner, leaf)
        parameter = isinstance(before[path], nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
    try:
        yield
    finally:
        for path, empty in before.items():
            owner, leaf = _locate(module, path)
            setattr(owner, leaf, empty)


def _locate(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the submodule that owns the tensor at `path`, and the tensor's name in it."""
    parent, _, leaf = path.rpartition(".")
    return module.get_submodule(parent), leaf


class Plan(NamedTuple):
    """What becomes of each tensor of the base's files, and of a head that they lack."""

    weights: Weights
    layers: Mapping[str, Changed]
    """The layer that changes a tensor, by the tensor's name."""
    parameters: Mapping[str, bool]
    """Tensors of the merged model in the order of the files; False for a buffer, which keeps its
    type."""
    keys: Mapping[str, str]
    """Path in PEFT's model -> key in the adapter's file."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows of a tensor of PEFT's model, the adapter's own or the base's, in float32."""
        if path in self.keys:
            rows = self.weights.carried.rows(self.keys[path], start, stop)
            return rows.float() if rows.is_floating_point() else rows
        return self.weights.rows(strip_peft_steps(path), start, stop)

    def merge_tensor(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Return a tensor of the merged model in pieces, merged in float32 and rounded once to
        `dtype`."""
        changed = self.layers.get(name)
        weights = self.weights
        chosen = self.choose_dtype(name, dtype)
        stored = weights.find_entry(name)
        untouched = changed is None and name not in weights.replaced and name not in weights.packed
        exact = stored.dtype == chosen and weights.trained in (stored.dtype, torch.float32)
        if untouched and exact:
            blocks = split_rows(stored.shape)
            return (weights.base.rows(name, start, stop) for start, stop in blocks)
        return (rows.to(chosen) for rows in self._merge_pieces(name))

    def _merge_pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the pieces of a tensor of the merged model, before rounding."""
        changed = self.layers.get(name)
        if changed is None or not isinstance(changed.layer, LoraLayer):
            blocks = list(split_rows(self.weights.find_entry(name).shape))
        elif changed.by_rows:
            blocks = changed.blocks
        else:
            blocks = [(0, self._count_rows(name, changed))]
        adapter = changed.read_adapter(self.weights) if changed is not None else {}
        for start, stop in blocks:
            yield self._merge_rows(name, adapter, start, stop)

    def _count_rows(self, name: str, changed: Changed) -> int:
        """Return the number of rows of the weight that a tensor is, or is the bias of."""
        return self.weights.base.entries[changed.base.get("base_layer.weight", name)].shape[0]

    def read_merged(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Return rows of a tensor of the merged model before rounding, in float32; integers and
        booleans keep their type."""
        changed = self.layers.get(name)
        if changed is None:
            return self.weights.rows(name, start, stop)
        adapter, rows = changed.read_adapter(self.weights), self._count_rows(name, changed)
        if changed.by_rows:
            return self._merge_rows(name, adapter, start, rows if stop is None else stop)
        return self._merge_rows(name, adapter, 0, rows)[start:stop]

    def measure_largest_whole(self) -> int:
        """Return the most bytes that a tensor needs which has to be merged whole: it, its change,
        and both again."""
        entries = self.weights.base.entries
        whole = [name for name, changed in self.layers.items() if not changed.by_rows]
        return max((4 * 4 * math.prod(entries[name].shape) for name in whole), default=0)

    def choose_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the type of a tensor in a merged model of type `dtype`."""
        stored = self.weights.find_entry(name).dtype
        return dtype if self.parameters[name] and stored.is_floating_point else stored

    def _merge_rows(
        self, name: str, adapter: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        """Return rows of a tensor merged in float32, by the layer that changes it, if any, whose
        own tensors are `adapter`; all rows where they depend on each other."""
        changed = self.layers.get(name)
        if changed is None:
            return self.weights.rows(name, start, stop)
        if isinstance(changed.layer, TrainableTokensLayer):
            return self._merge_token_rows(name, changed, adapter, start, stop)
        return self._merge_through_layer(name, changed, adapter, start, stop)

    def _merge_token_rows(
        self,
        name: str,
        changed: Changed,
        adapter: Mapping[str, torch.Tensor],
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Return rows of embeddings of which some were trained."""
        layer, ids = changed.layer, changed.layer.token_indices[NAME]
        (inside,) = changed.base
        rows = self.weights.rows(name, start, stop)
        here = [number for number, token in enumerate(ids) if start <= token < stop]
        if not here:
            return rows
        layer.token_indices[NAME] = [ids[number] - start for number in here]
        new = {path: tensor[here] for path, tensor in adapter.items()}
        with fill_module(layer, {inside: rows, **new}):
            layer.merge()
            layer.merged_adapters.clear()
            rows = layer.get_base_layer().weight.data
        layer.token_indices[NAME] = ids
        return rows

    def _merge_through_layer(
        self,
        name: str,
        changed: Changed,
        adapter: Mapping[str, torch.Tensor],
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Return rows of a tensor that a layer merges."""
        inside = next(path for path, own in changed.base.items() if own == name)
        given = changed.select_tensors(self.weights, adapter, start, stop)
        with fill_module(changed.layer, given):
            try:
                changed.layer.merge()
            except REFUSALS as error:
                raise explain_refusal(error) from error
            changed.layer.merged_adapters.clear()
            owner, leaf = _locate(changed.layer, inside)
            return getattr(owner, leaf).data


def explain_refusal(error: Exception) -> LoraError:
    """Return the error for a merge that PEFT refuses."""
    return LoraError(
        f"PEFT cannot merge this adapter: {' '.join(str(error).split())[:300]}", "serve it as it is"
    )


def write(plan: Plan, folder: Path, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Write the merged model's weights, in files named as the base's are.

    Return how many modules were merged, and a checksum of each tensor. Raise LoraError where a
    value is not finite, or a module or tensor of the adapter was left out.
    """
    base = plan.weights.base
    places: dict[str, tensors.Entry] = {}
    for path in base.paths:
        names = [name for name in base.names(path) if name in plan.parameters]
        if path == base.paths[-1]:
            names += [name for name in plan.parameters if name not in base.entries]
        entries = {
            name: (plan.choose_dtype(name, dtype), plan.weights.find_entry(name).shape)
            for name in names
        }
        places |= tensors.create_file(folder / path.name, entries)

    def fill(names: Sequence[str]) -> dict[str, int]:
        with torch.inference_mode():
            return {
                name: tensors.fill_tensor(places[name], name, plan.merge_tensor(name, dtype))
                for name in names
            }

    sums: dict[str, int] = {}
    with limit_threads() as workers, ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(fill, names) for names in group_by_layer(plan, places)]
        try:
            for task in tasks:
                sums |= task.result()
        finally:
            pool.shutdown(cancel_futures=True)
    if [path.name for path in base.paths] != [tensors.SINGLE]:
        tensors.write_index(folder, places)
    return _count_modules(plan, places), sums


def group_by_layer(plan: Plan, names: Iterable[str]) -> list[list[str]]:
    """Return the names in groups, each of tensors that one layer changes: one thread must merge
    these one after another."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = plan.layers[name].path if name in plan.layers else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


@contextmanager
def limit_threads() -> Iterator[int]:
    """Give torch one thread while the block runs, and yield how many tensors to work on at a time
    instead.

    Blocks are small: threads that share one wait for each other, on a busy machine most of the time
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


def _count_modules(plan: Plan, written: Mapping[str, tensors.Entry]) -> int:
    """Return how many modules were merged.

    Raise LoraError unless that is all of them: every tensor that one changes was written, and every
    tensor of the adapter was used.
    """
    modules = {changed.path: changed for name, changed in plan.layers.items() if name in written}
    used = {key for changed in modules.values() for key in changed.own.values()}
    used |= {key for name, key in plan.weights.replaced.items() if name in written}
    unused = plan.weights.carried.entries.keys() - used
    if unused:
        raise LoraError(
            f"{spell_count(len(unused), 'tensor')} of the adapter were not merged, such as "
            f"{min(unused)}",
            "this is a bug: please report it",
        )
    return sum(isinstance(changed.layer, LoraLayer) for changed in modules.values())
