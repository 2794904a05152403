"""The loss where it counts: logits and cross entropy at tokens with a label only, some rows at a
time.

Hugging Face's loss makes logits for every token, in float32, and keeps them for the backward pass:
with a vocabulary of 128 000 and 8192 tokens, 4 GB twice. Here rows of the head's input are gathered
where there is a label, and for a chunk of them at a time logits, loss and the gradient with respect
to the input are made at once in the forward pass; only the gradient, as large as the input, is
kept. That needs a head that is not trained; for one that is trained or adapted, each chunk is
computed again in the backward pass (checkpointing), which is right whatever the head is made of.

Both are cross entropy over log-sum-exp in float32, as transformers' `ForCausalLMLoss`; Cohere's and
Granite's scaling and Gemma's soft cap are applied. `install` proves on the model itself that
nothing else is.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_cli.models import IGNORED

CHUNK = 1 << 24
"""Logits alive at a time, made in one product: 32 MB in bfloat16."""
BLOCK = 1 << 18
"""Of those, the logits worked on at a time in float32 on a CPU, whose cache holds them: in one
thread 560 rows of a head of 32 000 by 320 took 0.09 s so and 0.18 s all at once, of one of 128 000
by 1024 1.4 s and 2.5 s."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative difference to the model's own loss, by type, within which `install` takes both for the
same."""


class Shape(NamedTuple):
    """What becomes of the head's output z: cap · tanh(scale · z / cap), or scale · z without a
    cap."""

    scale: float
    cap: float | None

    def logits(self, made: Tensor) -> Tensor:
        """The model's logits, in float32."""
        logits = made.float() * self.scale if self.scale != 1 else made.float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def bend(self, logits: Tensor) -> Tensor | None:
        """What the cap leaves of the derivative, which is `scale` times this; None without a
        cap."""
        return None if self.cap is None else 1 - (logits / self.cap).square()


def find_shape(model: PreTrainedModel) -> Shape:
    """Scale and cap as the families' configurations name them."""
    config = model.config.get_text_config()
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    return Shape(
        float(scale) / float(getattr(config, "logits_scaling", None) or 1.0), _find_cap(config)
    )


def _find_cap(config: Any) -> float | None:
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


class _FrozenHead(torch.autograd.Function):
    """Summed cross entropy of `hidden` (rows × width) through a head (vocabulary × width) that is
    not trained."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Shape
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        rows = max(1, CHUNK // len(weight))
        block = min(rows, max(1, BLOCK // len(weight))) if hidden.device.type == "cpu" else rows
        scratch = hidden.new_empty(min(block, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            made = functional.linear(part, weight, bias)
            found = [
                _fill_probabilities(*pair, shape, scratch)
                for pair in zip(made.split(block), wanted.split(block))
            ]
            losses, sums, slopes = (torch.cat(each) for each in zip(*found))
            total += losses.sum()
            if gradient is not None:
                mean = (made @ weight).float() / sums  # divided where there is less of it
                gradient[start : start + rows] = (
                    mean - slopes * weight[wanted[:, 0]]
                ) * shape.scale
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None, None, None, None


def _fill_probabilities(
    made: Tensor, wanted: Tensor, shape: Shape, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows of the head's output, which become e^(logit - the row's highest) times the cap's
    derivative: each row's cross entropy, sum of those powers, and derivative at its `wanted` token
    (rows × 1 each).

    `scratch` (rows or more × vocabulary, float32) is written over.
    """
    logits = shape.logits(scratch[: len(made)].copy_(made))
    bend, own, top = shape.bend(logits), logits.gather(-1, wanted), logits.amax(-1, keepdim=True)
    likely = logits.sub_(top).exp_()
    sums = likely.sum(-1, keepdim=True)
    losses = sums.log() + top - own
    if bend is None:
        made.copy_(likely)
        return losses, sums, torch.ones_like(sums)
    made.copy_(likely.mul_(bend))
    return losses, sums, bend.gather(-1, wanted)


def sum_loss(hidden: Tensor, head: nn.Module, targets: Tensor, shape: Shape) -> Tensor:
    """Cross entropy in float32, summed over the rows of `hidden` (rows × width), whose next tokens
    are `targets`."""
    frozen = type(head) is nn.Linear and not any(
        parameter.requires_grad for parameter in head.parameters()
    )
    if frozen:
        return _FrozenHead.apply(hidden, head.weight, head.bias, targets, shape)
    rows = max(1, CHUNK // int(getattr(head, "out_features", 0) or head.weight.shape[0]))

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(shape.logits(head(some)), wanted, reduction="sum")

    pairs = zip(hidden.split(rows), targets.split(rows))
    parts = [checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in pairs]
    return torch.stack(parts).sum() if parts else hidden.sum().float() * 0


def install(model: PreTrainedModel) -> str | None:
    """Let `model`, given labels, compute its loss here; without labels nothing changes. Returns
    None, or why it was left as it was: a model whose own loss is another one, tried on a few
    tokens.

    `labels` (batch × length) as transformers takes them; the loss is divided by
    `num_items_in_batch`, or by the number of labels. Outputs have `loss` and no logits.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return "the model does not name its decoder and head"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "its loss balances experts as well"
    own, shape = model.forward, find_shape(model)

    @wraps(own)  # Trainer reads from the signature which columns the model takes
    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return own(*args, **kwargs)
        hidden = decoder(*args, **kwargs).last_hidden_state
        wanted = functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
        where = wanted != IGNORED
        targets = wanted[where]
        total = sum_loss(hidden[where], model.get_output_embeddings(), targets, shape)
        count = max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    other = _differs(model, forward)
    if other is None:
        model.forward = forward
    return other


def _differs(model: PreTrainedModel, forward: Any) -> str | None:
    """Whether the model's own loss on a few tokens is another one."""
    size = min(model.config.get_text_config().vocab_size, 1000)
    ids = (torch.arange(16, device=model.device) * 37 % size)[None]
    training = model.training
    with torch.no_grad():
        model.eval()
        theirs, ours = (
            float(run(input_ids=ids, labels=ids, use_cache=False).loss)
            for run in (model.forward, forward)
        )
        model.train(training)
    near = abs(theirs - ours) <= TOLERANCE[model.dtype] * max(1.0, abs(theirs))
    return None if near else f"its own loss is another: {theirs:.5f}, not {ours:.5f}"
