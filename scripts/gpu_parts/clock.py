"""The device that is measured: its time, memory, waits and profile. Without a GPU a dry run
measures the processor, so that the same code runs."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WAITING = "synchronizing CUDA operation"
"""What torch warns of, where it is asked to, when the host waits for the GPU."""
PLACES = ("lora_cli", "trl", "peft", "transformers", "accelerate", "bitsandbytes", "torch")
"""Packages by which a line is named, the innermost of the first that has one."""


class Clock:
    """One device. On a CPU memory is not counted, and nothing is waited for."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.on_gpu = kind == "cuda"
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def finish(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def is_sound(self) -> bool:
        """Return whether the device still computes: an error of CUDA's costs the process."""
        try:
            self.finish()
            return float(torch.ones(8, device=self.device).sum()) == 8
        except RuntimeError:
            return False

    def free(self) -> None:
        """Give back what nothing refers to any more, and count memory anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def read_memory(self) -> dict[str, float]:
        """Return the most MiB allocated and reserved since `free`; nothing on a CPU."""
        if not self.on_gpu:
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_mib": allocated / 2**20, "reserved_mib": reserved / 2**20}

    def read_held(self) -> dict[str, float]:
        """Return the MiB allocated now, such as what an earlier case has left; nothing on a CPU."""
        return {"held_mib": torch.cuda.memory_allocated() / 2**20} if self.on_gpu else {}

    def limit_memory(self, size: float) -> None:
        """Let this process have `size` bytes of the device, or with infinity all of it."""
        if self.on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))

    def time(self, work: Callable[[], Any], rounds: int = 5, warm: int = 2) -> dict[str, float]:
        """Return median, least and most milliseconds of `work`, after `warm` that do not count."""
        for _ in range(warm):
            work()
        spent = []
        for _ in range(rounds):
            self.finish()
            began = time.perf_counter()
            work()
            self.finish()
            spent.append((time.perf_counter() - began) * 1e3)
        return {"ms": statistics.median(spent), "least_ms": min(spent), "most_ms": max(spent)}

    @contextmanager
    def note_waits(self, found: Counter[str]) -> Iterator[None]:
        """Count by place in the code where the host waits for the GPU inside the block."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            show = warnings.showwarning

            def note(message: Any, *given: Any, **more: Any) -> None:
                if WAITING in str(message):
                    found[find_place()] += 1
                else:
                    show(message, *given, **more)

            warnings.showwarning = note
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")

    def make_profile(self) -> Any:
        """Return a profiler of the host, and of the GPU where there is one."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        return profile(activities=kinds)

    def read_profile(self, made: Any, seconds: float) -> dict[str, Any]:
        """Return the number of kernels of a profile, their time, the share of `seconds` in which
        none ran, and what the host did longest; of a CPU the same of torch's operations."""
        seen = made.key_averages()
        on_device = torch.autograd.DeviceType.CUDA if self.on_gpu else torch.autograd.DeviceType.CPU
        kernels = [each for each in seen if each.device_type == on_device]
        host = sorted(seen, key=lambda each: -each.self_cpu_time_total)[:12]
        spent = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        longest = sorted(kernels, key=lambda each: -getattr(each, spent))[:12]
        busy = sum(getattr(each, spent) for each in kernels) / 1e6
        listed = {each.key[:80]: [each.count, getattr(each, spent) / 1e3] for each in longest}
        return {
            "kernels": sum(each.count for each in kernels),
            "busy_s": busy,
            "wall_s": seconds,
            "idle": max(0.0, 1 - busy / seconds),
            "longest_ms": listed,
            "host_ms": {
                each.key[:80]: [each.count, each.self_cpu_time_total / 1e3] for each in host
            },
        }


def find_place() -> str:
    """Return the innermost line of the first of PLACES on the stack, as `lora_cli/…/file.py:12`."""
    frames = traceback.extract_stack()
    for package in PLACES:
        for frame in reversed(frames):
            _, found, rest = frame.filename.rpartition(f"/{package}/")
            if found:
                return f"{package}/{rest}:{frame.lineno}"
    return "elsewhere"
