"""Compute logits and cross entropy only at tokens with a label, some rows at a time.

Hugging Face's loss makes logits for every token, in float32, and keeps them for the backward pass:
with a vocabulary of 128 000 and 8192 tokens, 4 GB twice. Here rows of the head's input are gathered
where there is a label. For a chunk of them at a time, logits, loss and the gradient with respect to
the input are computed together in the forward pass; only the gradient, as large as the input, is
kept. That needs a head that is not trained. For one that is trained or adapted, each chunk is
computed again in the backward pass (checkpointing), which is right whatever the head is made of.

Both compute cross entropy over log-sum-exp in float32, as transformers' `ForCausalLMLoss` does;
Cohere's and Granite's scaling and Gemma's soft cap are applied. `install` tries on the model itself
that its loss needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_cli.models import IGNORED

CHUNK = 1 << 24
"""How many logits are alive at a time, made in one product, on a CPU: 32 MB in bfloat16."""
ROWS, TILE = 1024, 128
"""How many rows at least go into a product on a GPU, which reads the whole head for each, and in
how large tiles it works on them. Not measured."""
BLOCK = 1 << 18
"""How many of those are worked on at a time in float32 on a CPU, whose cache holds them. Measured
in one thread: 560 rows took 0.09 s so and 0.18 s all at once for a head of 32 000 by 320, 1.4 s and
2.5 s for one of 128 000 by 1024."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""The relative difference to the model's own loss, by type, up to which `install` takes both for
the same."""


LABELLED = "labelled"
"""The argument by which a model's loss is told the places in a batch whose next token has a label:
otherwise it asks the device, and waits."""
UNFIT = (TypeError, ValueError, AttributeError, RuntimeError, LookupError)
"""What a way to compute the loss raises that is none for a model."""


class Shape(NamedTuple):
    """What becomes of the head's output z: cap · tanh(scale · z / cap), or scale · z without a
    cap."""

    scale: float
    cap: float | None

    def make_logits(self, made: Tensor) -> Tensor:
        """Return the model's logits, in float32."""
        logits = made.float() * self.scale if self.scale != 1 else made.float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def differentiate_cap(self, logits: Tensor) -> Tensor | None:
        """Return the cap's derivative (the whole derivative is `scale` times this), or None without
        a cap."""
        return None if self.cap is None else 1 - (logits / self.cap).square()


def find_shape(model: PreTrainedModel) -> Shape:
    """Return scale and cap, by the names that the families' configurations give them."""
    config = model.config.get_text_config()
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return Shape(float(scale) / float(divisor), None if cap is None else float(cap))


class _FrozenHead(torch.autograd.Function):
    """Cross entropy (rows, float32) of `hidden` (rows × width) through a head (vocabulary × width)
    that is not trained."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: Shape,
        kind: str,
        rehearsed: bool,
    ) -> Tensor:
        all_losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        # the loss scale comes from above, after float16 would have lost what is small
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        gradient = torch.empty_like(hidden, dtype=kept) if hidden.requires_grad else None
        rows = count_rows(len(weight), kind)
        block = min(rows, max(1, BLOCK // len(weight))) if kind == "cpu" else rows
        scratch = hidden.new_empty(min(block, len(hidden)), len(weight), dtype=torch.float32)
        starts = range(0, len(hidden), rows)
        # the second begins while what the first has made is still there
        for start in (*starts[:2], *starts[2:][-1:]) if rehearsed else starts:
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            made = functional.linear(part, weight, bias)
            found = [
                _fill_probabilities(*pair, shape, scratch)
                for pair in zip(made.split(block), wanted.split(block))
            ]
            losses, sums, slopes = (torch.cat(each) for each in zip(*found))
            all_losses[start : start + rows] = losses[:, 0]
            if gradient is not None:
                mean = (made @ weight).float() / sums  # divided where there is less of it
                gradient[start : start + rows] = (
                    mean - slopes * weight[wanted[:, 0]]
                ) * shape.scale
        ctx.save_for_backward(gradient)
        ctx.type = hidden.dtype
        return all_losses

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        each = above[0].to(gradient.dtype)[:, None]
        return (gradient * each).to(ctx.type), None, None, None, None, None, None


def _fill_probabilities(
    made: Tensor, wanted: Tensor, shape: Shape, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's cross entropy, sum of powers, and derivative at its `wanted` token (rows ×
    1 each).

    `made` holds rows of the head's output; it becomes e^(logit - the row's highest) times the cap's
    derivative. `scratch` (as many rows or more × vocabulary, float32) is written over.
    """
    logits = shape.make_logits(scratch[: len(made)].copy_(made))
    bend = shape.differentiate_cap(logits)
    own = logits.gather(-1, wanted)
    top = logits.amax(-1, keepdim=True)
    likely = logits.sub_(top).exp_()
    sums = likely.sum(-1, keepdim=True)
    losses = sums.log() + top - own
    if bend is None:
        made.copy_(likely)
        return losses, sums, torch.ones_like(sums)
    made.copy_(likely.mul_(bend))
    return losses, sums, bend.gather(-1, wanted)


def count_rows(vocabulary: int, kind: str) -> int:
    """Return how many rows at a time go through a head, on a device of this kind."""
    most = CHUNK // vocabulary
    return max(1, most) if kind == "cpu" else max(ROWS, most // TILE * TILE)


def sum_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    shape: Shape,
    kind: str | None = None,
    rehearsed: bool = False,
) -> Tensor:
    """Return cross entropy in float32, summed over the rows of `hidden`; see `compute_losses`."""
    losses = compute_losses(hidden, head, targets, shape, kind, rehearsed)
    rows = count_rows(_count_words(head), kind or hidden.device.type)
    if len(losses) <= rows:  # one kernel, and none in the pass back
        return losses.sum()
    return torch.stack([part.sum() for part in losses.split(rows)]).sum()


def _count_words(head: nn.Module) -> int:
    weight: Any = head.weight
    return int(getattr(head, "out_features", 0) or weight.shape[0])


def compute_losses(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    shape: Shape,
    kind: str | None = None,
    rehearsed: bool = False,
) -> Tensor:
    """Return cross entropy in float32 of each row of `hidden` (rows × width), whose next tokens are
    `targets`; computed as on a device of that kind, by default the one it is on.

    Where it is `rehearsed` for the memory that it needs, only the first rows that go through a
    frozen head together are computed, the next and the last: all others need as much as these.
    """
    kind = kind or hidden.device.type
    frozen = type(head) is nn.Linear and not any(
        parameter.requires_grad for parameter in head.parameters()
    )
    if frozen:
        return _FrozenHead.apply(hidden, head.weight, head.bias, targets, shape, kind, rehearsed)
    rows = count_rows(_count_words(head), kind)

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        logits = shape.make_logits(head(some))
        return functional.cross_entropy(logits, wanted.long(), reduction="none")

    pairs = zip(hidden.split(rows), targets.split(rows))
    parts = [checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in pairs]
    return torch.cat(parts) if len(hidden) else hidden.sum(dim=-1).float()


class LabelCollator(NamedTuple):
    """Makes batches by another collator, and names the places of their labels while these are on
    the host."""

    collate: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        # one row: what cuts a batch to its rows leaves it whole
        return batch | {LABELLED: find_labelled(batch["labels"])[None]}


def find_labelled(labels: Tensor) -> Tensor:
    """Return the places in a flattened batch (rows × length) whose next token has a label.

    On a device this waits; a mask instead would wait once for each tensor, and on the way back.
    """
    return (_shift(labels) != IGNORED).nonzero()[:, 0]


def _shift(labels: Tensor) -> Tensor:
    """Return the label of each token's next one, flattened."""
    return functional.pad(labels[..., 1:], (0, 1), value=IGNORED).flatten()


def install(model: PreTrainedModel) -> str | None:
    """Let `model` compute its loss here when it is given labels; without labels nothing changes.

    Return None, or why the model was left as it was: its own loss, tried on a few tokens, is a
    different one. `labels` (batch × length) are as transformers takes them; `labelled` are the
    places in the flattened batch whose next token has a label, where the caller knows them. The
    loss is divided by `num_items_in_batch`, or by the number of labels; with `each` it is of each
    label. Outputs have `loss` and no logits.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return "the model does not name its decoder and head"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "its loss also balances experts"
    own, shape = model.forward, find_shape(model)

    @wraps(own)  # Trainer reads from the signature which columns the model takes
    def forward(
        *args: Any,
        labels: Tensor | None = None,
        labelled: Tensor | None = None,
        num_items_in_batch: Any = None,
        each: bool = False,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return own(*args, **kwargs)
        hidden = decoder(*args, **kwargs).last_hidden_state
        rows, targets = _find_targets(hidden, labels, labelled)
        given = rows, model.get_output_embeddings(), targets, shape
        if each:
            return CausalLMOutputWithPast(loss=compute_losses(*given))
        count = max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=sum_loss(*given) / count)

    difference = _explain_difference(model, forward)
    if difference is None:
        model.forward = forward
    return difference


def _find_targets(hidden: Tensor, labels: Tensor, labelled: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the head's inputs (labels × width) at the places whose next token has a label, and
    these tokens."""
    at = find_labelled(labels) if labelled is None else labelled.flatten()
    return hidden.flatten(0, -2).index_select(0, at), _shift(labels).index_select(0, at)


def _explain_difference(model: PreTrainedModel, forward: Any) -> str | None:
    """Return how the loss of `forward` on a few tokens differs from the stock one; None where it
    does not."""
    with _evaluate(model):
        wanted, _ = _find_wanted(model)
        found = _try(forward, _make_tokens(model))
    if found is None:
        return "its decoder and head do not follow each other"
    near = _is_near(model, found, wanted)
    return None if near else f"its own loss differs: {wanted:.5f}, not {found:.5f}"


class Stock(NamedTuple):
    """Which of the stock ways compute the loss of a model, tried on a few tokens."""

    own: bool
    """Its own, over as many labels as it is told. False of those that compare each token with
    itself, as BART's does, whose labels are another text, and of those that ignore the number."""
    fused: bool
    """TRL's head. False where it skips a part of the model's: BERT's transforms its input."""


def try_stock(model: PreTrainedModel) -> Stock:
    """Try the stock ways on a model; TRL's where it has put its head on."""
    with _evaluate(model):
        wanted, own = _find_wanted(model)
        found = _try(model.forward, _make_tokens(model), fused_lm_head=True)
        own = own and _takes_number(model)
    return Stock(own, found is not None and _is_near(model, found, wanted))


def compute_from_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the cross entropy of a model's logits (batch × length × vocabulary) with the next
    tokens among its `labels`, as transformers computes it."""
    size = outputs.logits.shape[-1]
    return ForCausalLMLoss(outputs.logits, labels, size, num_items_in_batch=num_items_in_batch)


def list_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy, in float32, of each next token among `labels` (batch × length) by a
    model's logits (batch × length × vocabulary)."""
    at = find_labelled(labels)
    rows = logits.flatten(0, -2).index_select(0, at).float()
    return functional.cross_entropy(rows, _shift(labels).index_select(0, at), reduction="none")


def _find_wanted(model: PreTrainedModel) -> tuple[float, bool]:
    """Return the right loss on a few tokens, and whether it is the model's own."""
    ids = _make_tokens(model)
    logits = model.forward(input_ids=ids, use_cache=False).logits.float()
    next_tokens = float(functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    same_tokens = float(functional.cross_entropy(logits[0], ids[0]))
    own = _try(model.forward, ids)
    if own is None or _is_near(model, own, same_tokens):
        return next_tokens, False
    return own, True


def _takes_number(model: PreTrainedModel) -> bool:
    """Return whether its own loss is over as many labels as it is told: of twice as many it is
    half, but for what balances experts. Some models take the number, and ignore it."""
    ids = _make_tokens(model)
    alone = _try(model.forward, ids)
    told = _try(model.forward, ids, num_items_in_batch=2 * (ids.shape[1] - 1))
    return alone is not None and told is not None and told < 0.75 * alone


def _try(forward: Any, ids: Tensor, **options: Any) -> float | None:
    """Return the loss of `forward` on these tokens; None where it gives none, or is none for such a
    model."""
    try:
        loss = forward(input_ids=ids, labels=ids, use_cache=False, **options).loss
    except UNFIT:
        return None
    return None if loss is None else float(loss)


def _is_near(model: PreTrainedModel, found: float, wanted: float) -> bool:
    return abs(wanted - found) <= TOLERANCE[model.dtype] * max(1.0, abs(wanted))


def _make_tokens(model: PreTrainedModel) -> Tensor:
    size = min(model.config.get_text_config().vocab_size, 1000)
    return (torch.arange(16, device=model.device) * 37 % size)[None]


@contextmanager
def _evaluate(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation, without gradients, while the block runs."""
    training = model.training
    with torch.no_grad():
        model.eval()
        yield
        model.train(training)
