"""Checks of the processor and of each GPU: whether torch finds it, computes rightly on it in every
type, and trains there by every method.

The libraries are imported inside, so that a broken one is a finding too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

from lora_cli.common import LoraError
from lora_cli.doctor.finding import Check, name_fix

EXACT_SIZE = 512
"""Rows and columns of the matrices whose product is compared with float64."""
TIMED_SIZES = {"cpu": 512}
LARGE_SIZE = 4096
"""… and of those whose product is timed: an accelerator takes less time for a small one than for
being told of it."""


def _check_gpus() -> Iterator[Check]:
    """Report a GPU that torch cannot use, or why it finds none, and which of several is used."""
    from lora_cli.common import devices, gpu_faults

    fault = gpu_faults.find_fault() if len(list_device_names()) == 1 else None
    if fault is not None:
        status: Literal["note", "problem"] = "problem" if fault.refused else "note"
        yield Check("GPU", status, f"{fault.said}: the CPU is used", fault.fix)
        return
    try:
        gpu_faults.check_gpu(in_4bit=True)
    except LoraError as error:
        yield Check("GPU", "problem", error.message, error.hint)
    device = devices.find_device()
    if chosen := gpu_faults.describe_choice(device):
        yield Check("GPU", "note", " ".join(line.strip() for line in chosen))


def list_device_names() -> list[str]:
    """List `cpu` and every accelerator, as torch names them."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(count))]


def check_devices() -> Iterator[Check]:
    """Check a matrix product and its gradient on every device in every type, against float64 on the
    CPU."""
    import torch

    yield from _check_gpus()
    for device in list_device_names():
        times: dict[str, float] = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            try:
                off, times[name] = measure_matmul_error(device, dtype), time_matmul(device, dtype)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                status: Literal["note", "problem"] = "problem" if name == "float32" else "note"
                said = (
                    f"has no {name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
                )
                yield Check(
                    device, status, said, name_fix("torch") if status == "problem" else None
                )
                continue
            if not off <= 8 * torch.finfo(dtype).eps:
                said = f"computes wrongly in {name}: "
                said += f"a product is off by {off:.1e} of its largest value"
                yield Check(device, "problem", said, name_fix("torch"))
        shown = [
            f"{name} ({times[name] / times['float32']:.2g}x the time)"
            for name in times
            if name != "float32"
        ]
        if "float32" in times:
            yield Check(
                device,
                "ok",
                f"tried in {', '.join(['float32', *shown])}{_measure_device_memory(device)}",
            )


def measure_matmul_error(device: str, dtype: Any) -> float:
    """Return how far a product of two matrices, and its gradient, are from those in float64 on the
    CPU, as a share of the largest value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (EXACT_SIZE, EXACT_SIZE)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    one, other = left.to(device).requires_grad_(), right.to(device)
    product = one @ other
    product.backward(torch.ones_like(product))
    assert one.grad is not None
    pairs = [
        (left.double() @ right.double(), product.detach()),
        (torch.ones(shape).double() @ right.double().T, one.grad),
    ]
    return max(
        ((value.cpu().double() - exact).abs().max() / exact.abs().max())
        .nan_to_num(float("inf"))
        .item()
        for exact, value in pairs
    )


def time_matmul(device: str, dtype: Any) -> float:
    """Return the seconds of one product of two matrices with its gradient: the best of five."""
    import torch

    size = TIMED_SIZES.get(device, LARGE_SIZE)
    one = torch.randn(size, size, dtype=dtype, device=device, requires_grad=True)
    other, above = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        one.grad = None
        _wait_for(device)
        started = time.perf_counter()
        (one @ other).backward(above)
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait_for(device: str) -> None:
    """Wait until an accelerator has done what it was told."""
    import torch

    if device != "cpu":
        torch.accelerator.synchronize(device)


def _measure_device_memory(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"; {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def check_training() -> Iterator[Check]:
    """Make one training step by each method where it trains, with all around it, as `lora train`
    does."""
    from lora_cli.doctor import training_steps

    made: list[str] = []
    for step in training_steps.try_methods():
        if step.said is None:
            made.append(f"{step.method} on {step.device} ({step.seconds:.1f} s)")
            continue
        needed = ["torch", "peft", *(["bitsandbytes"] if step.method.startswith("q") else [])]
        said = f"fails on {step.device}: {step.said}"
        yield Check(f"training by {step.method}", "problem", said, step.fix or name_fix(*needed))
    if made:
        yield Check("training", "ok", f"one step by {', '.join(made)}")
