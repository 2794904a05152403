"""What this machine is, whether its libraries are right, and what its device can do at most."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess

import torch

from gpu_parts import runs
from gpu_parts.part import Bench, Case, Figures
from gpu_parts.report import Column

TITLE = "The machine"
COLUMNS: tuple[Column, ...] = ()
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
ASKED = "name,driver_version,memory.total,clocks.max.sm,power.limit"


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    return {
        "host": Case(describe_host, 30),
        "ceilings": Case(measure_ceilings),
        "lora doctor": Case(run_doctor, 60),
    }


def describe_host(bench: Bench) -> Figures:
    """Return names and versions."""
    found: Figures = {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "disk_free_gb": shutil.disk_usage(bench.scratch).free / 1e9,
        **{name: _find_version(name) for name in PACKAGES},
    }
    if bench.clock.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        query = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": total / 2**30,
            "free_gib": free / 2**30,
            "cuda": torch.version.cuda,
            "nvidia_smi": said.strip(),
        }
    return found


def _find_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def run_doctor(bench: Bench) -> Figures:
    """Return what `lora doctor` finds: its problems in words, and how near the libraries come to
    the papers, as a share of what is allowed."""
    text = runs.call("doctor", "--json", fails=True)  # as it does where it has found a problem
    report = json.loads(text[text.index("{") :])
    compared = report["oracle"]
    return {
        **{f"{status}s": _list_checks(report, status) for status in ("problem", "note")},
        "compared": len(compared),
        "wrong": sum(not each["ok"] for each in compared),
        "largest_share_of_limit": max(
            (each["value"] / each["limit"] for each in compared if each["value"] and each["limit"]),
            default=None,
        ),
    }


def _list_checks(report: Figures, status: str) -> list[str]:
    checks = [each for each in report["checks"] if each["status"] == status]
    return [f"{each['name']}: {each['said']}" for each in checks]


def measure_ceilings(bench: Bench) -> Figures:
    """Return TFLOP/s of one bfloat16 product and GB/s of one copy (read and written), of random
    numbers: zeros are faster by themselves."""
    size, cells = (256, 1 << 20) if bench.small else (8192, 1 << 31)
    device = bench.clock.device
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = bench.clock.time(lambda: left @ right, rounds=20, warm=5)
    source = torch.randint(0, 255, (cells,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = bench.clock.time(lambda: target.copy_(source), rounds=20, warm=3)
    return {
        "product_tflops": 2 * size**3 / (product["ms"] / 1e3) / 1e12,
        "copy_gb_per_s": 2 * cells / (copy["ms"] / 1e3) / 1e9,
        "product_ms": product["ms"],
        "copy_ms": copy["ms"],
    }
