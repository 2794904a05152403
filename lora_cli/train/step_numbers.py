"""The loss and the gradient of a step, read once, and none that is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lora_cli.common import LoraError
from lora_cli.distributed import ranks


class NonFiniteError(LoraError):
    """The loss or a gradient is NaN or infinite: nothing more is trained or saved."""


class StepNumbers(NamedTuple):
    """What is looked at of a step, on the device or on the host."""

    number: int
    """The step's, counted from 1."""
    loss: torch.Tensor | float
    gradient_norm: torch.Tensor | float
    tokens: torch.Tensor | int
    """Trained on, by those that train together; 0 where Trainer counts them."""
    lower: str
    """The hint to a lower learning rate."""
    copied: torch.Event | None = None
    """When both are on the host."""

    def sum_up(self) -> StepNumbers:
        """Return the numbers of the step whose rows are dealt over several processes: each has its
        share's loss times their number."""
        if ranks.count() == 1:
            return self
        loss = torch.as_tensor(self.loss).double() / ranks.count()
        loss, tokens = ranks.add_up(torch.stack([loss, torch.as_tensor(self.tokens).to(loss)]))
        return self._replace(loss=loss, tokens=tokens)

    def judge(self, limit: float | None) -> torch.Tensor:
        """Return 1 on the device for a step that is to be left out, else 0."""
        loss, norm = torch.as_tensor(self.loss), torch.as_tensor(self.gradient_norm)
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        if limit is not None:
            fine = fine & (loss <= limit)
        return (~fine).float()

    def copy_to_host(self) -> StepNumbers:
        """Begin to copy the numbers to the host, behind what the device has to do before."""
        numbers = (self.loss, self.gradient_norm, self.tokens)
        there = torch.stack([torch.as_tensor(each).float() for each in numbers])
        loss, norm, tokens = there.to("cpu", non_blocking=True)
        event = None
        if there.device.type != "cpu":
            event = torch.Event(there.device)
            event.record()
        return self._replace(loss=loss, gradient_norm=norm, tokens=tokens, copied=event)

    def read(self) -> tuple[int, float, float, int, str]:
        """Return the step's number, loss, gradient norm, tokens and hint, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        numbers = float(self.loss), float(self.gradient_norm), int(self.tokens)
        return self.number, *numbers, self.lower


def find_leaving_out(optimizer: Any) -> Any:
    """Return torch's own optimiser if it leaves out a step on a GPU that it is told to, as its
    fused AdamW does; None for others, and on a CPU, which has nothing to wait for."""
    own = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    if not isinstance(own, torch.optim.Adam):  # AdamW is one
        return None
    fused = all(group.get("fused") for group in own.param_groups)
    # LoRA+ keeps groups of none
    first = next((each for group in own.param_groups for each in group["params"]), None)
    return own if fused and first is not None and first.device.type == "cuda" else None
