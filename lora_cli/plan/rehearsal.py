"""Rehearse one training step on tensors without storage, to see which bytes are alive when.

The recipe's own network is built, with checkpointing, autocast, the loss head and the optimiser. It
then runs forward and backward on torch's fake tensors. So nothing here knows how large an
activation is: what autograd keeps is what is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import Trainer
from trl.trainer.utils import add_fused_lm_head

from lora_cli.models import attach, find_picture_shape, leave_out_cache, quantised, read_logits
from lora_cli.plan.live_bytes import (
    ACTIVATIONS,
    ADAPTERS,
    BACKWARD,
    GRADIENTS,
    HEAD,
    OPTIMIZER,
    Live,
    Peaks,
)
from lora_cli.plan.weightless import Unforeseen, materialise, translate_unforeseen
from lora_cli.recipe import Recipe, upstream
from lora_cli.scoring import make_scorer
from lora_cli.speed import dora_norms, install, loss_head

OFFLOADED = 1024
"""Bytes from which TRL offloads what is kept for the backward pass."""
MOST_OPERATIONS = 100_000
MOST_BY_MODULE = 100
"""Operations of a step that are followed: so many, or so many for each module of a large network,
whichever are more. A layer takes some hundred (with DoRA, checkpointing and 4 bits 3,200, in 70
modules), whatever the length of the rows, but in a network that goes through them token by token,
as Mamba's does on a CPU."""
LENGTHS = (8, 16)
"""Tokens of the rows from which longer ones are foreseen in such a network."""
CHANNELS = 3
"""Of a picture: red, green and blue."""


class Batch(NamedTuple):
    """What one forward pass sees: `rows` of `length` tokens, all with a label; or of one picture
    each."""

    rows: int
    length: int
    waiting: bool
    """Whether gradients of earlier passes of the same optimiser step are there already."""
    targets: int = 0
    """Tokens of the targets, where a decoder writes some."""


class TooManyOperations(Exception):
    """A step takes more operations than are followed."""


class Rehearsal:
    """A recipe's network on fake tensors, which can make steps of any shape.

    `recipe` is settled. `adapted` comes from `build_adapted`, and the rehearsal owns it from now
    on. `kind` is the device's, as torch names it. Raises Unforeseen.
    """

    def __init__(self, recipe: Recipe, adapted: PeftModel, kind: str = "cpu") -> None:
        self.recipe = recipe
        self.adapted = adapted
        self.kind = kind
        self.live = Live()
        self.base: Any = adapted.get_base_model()
        self.arguments = upstream.build_training_arguments(recipe)
        self.by_token = False
        """Whether the network goes through the tokens one by one."""
        self.first: tuple[int, int] | None = None
        """The length of the first rows that were rehearsed, and its operations."""
        self.picture: tuple[int, int] | None = None
        """Height and width of what a model of pictures takes."""
        if recipe.task_row.reads_pictures:
            self.picture = find_picture_shape(recipe.model.name_or_path, recipe.model.revision)
        self.quantised_from = 0
        """Bytes of the weights that 4-bit ones are made from, in the model's type; none where the
        base's files hold them in 4 bits."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake():
            self._prepare()
        self.resting = Peaks(*(Counter(now) for now in self.live.now))
        """Bytes of what lives as long as the run."""

    @contextmanager
    def _fake(self) -> Iterator[None]:
        with translate_unforeseen(), self.mode, self.live:
            yield

    def _prepare(self) -> None:
        """Make what lives as long as the run: weights, adapters, the optimiser's state."""
        materialise(self.adapted)
        packed = [module for module in self.adapted.modules() if isinstance(module, Linear4bit)]
        size = getattr(torch, self.recipe.model.dtype).itemsize
        if quantised.find_quantised(self.base.config) is None:
            self.quantised_from = size * sum(
                module.in_features * module.out_features for module in packed
            )
        self.trained = [parameter for _, parameter in attach.walk_trainable(self.adapted)]
        for parameter in self.trained:
            self.live.reassign(parameter, ADAPTERS)
            parameter.register_post_accumulate_grad_hook(self._count_gradient)
        self._prepare_network()
        self._make_optimizer()
        modules = list(self.adapted.modules())
        self.most = max(MOST_OPERATIONS, MOST_BY_MODULE * len(modules))
        for module in modules:
            module.register_forward_pre_hook(self._count_operations)

    def _prepare_network(self) -> None:
        """Change the network as training does: faster layers, the loss head, checkpointing."""
        with unset_fake_temporarily():  # some of the layers that are installed compute then
            install.install(self.adapted, self.kind)
        for layer in self.adapted.modules():
            if isinstance(layer, dora_norms.FactoredDora):
                layer.squares = torch.empty(layer.weight.numel())
        if self.recipe.training.loss_head == "stock" and self.recipe.uses_trl:
            add_fused_lm_head(self.base, outputs=("log_probs", "entropy", "is_top1"))
        leave_out_cache(self.base)
        self.adapted.train()
        if self.arguments.activation_checkpointing:
            options = dict(self.arguments.activation_checkpointing_kwargs or {})
            own = ("every_n_layers", "offload")
            chosen = {name: options.pop(name) for name in own if name in options}
            self.base.activation_checkpointing_enable(
                activation_checkpointing_kwargs=options or None, **chosen
            )
            self.adapted.enable_input_require_grads()

    def _make_optimizer(self) -> None:
        """Make the optimiser's state, by a step."""
        self._make_gradients()
        self.live.item = OPTIMIZER
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.arguments, self.adapted)
        with unset_fake_temporarily():  # bitsandbytes' optimisers read the tables that they make
            self.optimizer = kind(self.trained, **options)
        self.optimizer.step()
        self._drop_gradients()

    def _count_operations(self, *_: Any) -> None:
        """Raise TooManyOperations before a module runs. Where torch itself calls Python, as in
        `Live`, an exception would end the process."""
        if self.live.operations > self.most:
            raise TooManyOperations

    def _count_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.live.reassign(parameter.grad, GRADIENTS)

    def _make_gradients(self) -> None:
        self.live.item = GRADIENTS
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)

    def _drop_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def step(self, batch: Batch) -> Peaks:
        """Bytes by item in one forward and backward pass, each at its highest.

        What a network that goes through the tokens one by one keeps grows with their number, and is
        foreseen from shorter rows.
        """
        if not self.by_token:
            try:
                peaks = self._step(batch)
            except TooManyOperations:
                self.by_token = True
            else:
                self._compare_operations(batch.length)
                return peaks
        try:
            short, longer = (self._step(batch._replace(length=length)) for length in LENGTHS)
        except TooManyOperations as error:
            message = f"its memory is not foreseen: {self.most:,} operations are not yet a step"
            raise Unforeseen(message, "train, and watch it") from error
        share = (batch.length - LENGTHS[0]) / (LENGTHS[1] - LENGTHS[0])
        return Peaks(*(_extend(*each, share) for each in zip(short, longer)))

    def _compare_operations(self, length: int) -> None:
        """Find out from rows of another length whether each token takes operations of its own."""
        before, first = self.first or (length, self.live.operations)
        more, tokens = self.live.operations - first, length - before
        self.by_token = tokens != 0 and more / tokens >= 2
        self.first = before, first

    def _step(self, batch: Batch) -> Peaks:
        self.live.operations = 0
        with self._fake():
            self._drop_gradients()
            if batch.waiting:
                self._make_gradients()
            self.live.reset_peaks()
            self.live.item = ACTIVATIONS
            half = torch.float16 if self.arguments.fp16 else torch.bfloat16
            mixed = self.arguments.bf16 or self.arguments.fp16
            # the backward pass too: checkpointing goes through the layers again in it
            with attach.keep_input_types(self.adapted, mixed):
                with (
                    torch.autocast("cpu", half, enabled=mixed),
                    self._offload_activations(),
                ):
                    total = self._loss(batch)
                self.live.item = BACKWARD
                total.backward()
            del total
            self._drop_gradients()
        return Peaks(*(Counter(most) for most in self.live.most))

    def _offload_activations(self) -> AbstractContextManager[Any]:
        """With activation offloading, drop what TRL moves to the host's memory."""
        if not getattr(self.arguments, "activation_offloading", False):
            return nullcontext()
        weights = {parameter.untyped_storage()._cdata for parameter in self.adapted.parameters()}

        def pack(kept: torch.Tensor) -> torch.Tensor | tuple[Any, ...]:
            if kept.nbytes < OFFLOADED or kept.untyped_storage()._cdata in weights:
                return kept
            return kept.shape, kept.stride(), kept.dtype

        def unpack(kept: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            shape, stride, dtype = kept
            return torch.empty_strided(shape, stride, dtype=dtype)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _loss(self, batch: Batch) -> torch.Tensor:
        if self.picture is not None:
            kind = getattr(torch, self.recipe.model.dtype)
            shown = torch.zeros(batch.rows, CHANNELS, *self.picture, dtype=kind)
            return self._task_loss({"pixel_values": shown})
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        packed = self.recipe.training.packing not in (False, None)
        other = "position_ids" if packed else "attention_mask"
        inputs = {"input_ids": ids, other: torch.ones_like(ids)}
        if batch.targets:
            inputs["decoder_input_ids"] = torch.zeros(batch.rows, batch.targets, dtype=torch.long)
        if not self.recipe.task_row.writes_next_tokens:
            return self._task_loss(inputs)
        if self.recipe.training.loss_head == "stock":
            self.live.item = HEAD if self.recipe.training.gradient_checkpointing else ACTIVATIONS
            fused = {"fused_lm_head": True} if self.recipe.uses_trl else {}
            return self.base(**inputs, labels=ids, **fused).loss
        hidden = self.base.get_decoder()(**inputs).last_hidden_state
        self.live.item = HEAD
        network = self.live.operations
        where = torch.zeros(batch.rows * (batch.length - 1), dtype=torch.long)
        rows = hidden.flatten(0, 1)[where]
        head = self.base.get_output_embeddings()
        shape = loss_head.find_shape(self.base)
        total = loss_head.sum_loss(rows, head, where, shape, self.kind, rehearsed=True)
        self.live.operations = network  # the loss takes some rows at a time, the network does not
        return total / len(where)

    def _task_loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a task that is not to foretell the next token."""
        scorer = make_scorer(self.recipe)
        assert scorer is not None
        logits = read_logits(self.base(**inputs))
        self.live.item = HEAD
        labels = scorer.make_labels(logits)
        return scorer.sum_loss(logits, labels, inputs.get("attention_mask")) / labels.numel()


def _extend(short: Counter[str], longer: Counter[str], share: float) -> Counter[str]:
    """Return the bytes by item on the line through two rehearsals, `share` times as far from the
    first as the second is."""
    items = short.keys() | longer.keys()
    grown = {item: short[item] + (longer[item] - short[item]) * share for item in items}
    return Counter({item: max(0, round(size)) for item, size in grown.items()})
