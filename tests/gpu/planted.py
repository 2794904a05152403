"""A part of the GPU benchmark in which all goes wrong that can; for test_bench_gpu.py."""

from __future__ import annotations

import os
import time

from gpu_parts.part import Bench, Case, Figures, NotHereError
from gpu_parts.report import Column

TITLE = "Planted"
COLUMNS = (Column("answer", "answer"),)


def list_cases(bench: Bench) -> dict[str, Case]:
    return {
        "works": Case(work),
        "raises": Case(fail),
        "hangs": Case(hang, 0.3),
        "dies": Case(die),
        "is not for this machine": Case(refuse),
        "works again": Case(work),
    }


def work(bench: Bench) -> Figures:
    return {"answer": 42}


def fail(bench: Bench) -> Figures:
    raise ValueError("as planted")


def hang(bench: Bench) -> Figures:
    time.sleep(1000)
    return {}


def die(bench: Bench) -> Figures:
    print("last words", flush=True)
    os._exit(3)


def refuse(bench: Bench) -> Figures:
    raise NotHereError("no such kernel")
