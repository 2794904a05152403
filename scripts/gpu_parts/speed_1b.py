"""A model of 1B: where the host waits, what the GPU does in a step, and tokens a second by length
of the sequences, attention and other levers. Every run makes the same steps of the same rows."""

from __future__ import annotations

from typing import Any

from gpu_parts import models, speeds
from gpu_parts.part import Bench, Case, Figures
from gpu_parts.report import Column

TITLE = "1B: steps of 16,384 tokens in rows of 512, rank 16 on all linear layers"
COLUMNS = (
    *speeds.COLUMNS[:-2],
    Column("kernels a step", "kernels"),
    Column("device idle", "idle", 1, 100, "%"),
    Column("waits a step", "waited"),
)
LISTED = {
    "waits": "waits by place",
    "longest_ms": "kernels, their number and ms",
    "host_ms": "the host's longest, their number and ms",
}
MOST = 4096
"""Tokens of a sequence that fit beside 8B in 80 GB without checkpointing."""
LENGTH, ROWS = 512, 32
COMPILED: Figures = {"torch_compile": True}
MASKED: Figures = {"model": {"attn_implementation": "sdpa"}}


def _pack(length: int, **more: Any) -> Figures:
    """Return a recipe's changes: sequences of up to `length` tokens, and no checkpointing."""
    return {"training": {"packed_length": length, "gradient_checkpointing": False, **more}}


RUNS: dict[str, tuple[list[str], Figures]] = {
    "as it is": ([], {}),
    "16384": ([], _pack(16_384)),
    "16384, Liger's layers": (["liger"], _pack(16_384, use_liger_kernel=True)),
    "16384, PEFT's LoRA": (["peft"], _pack(16_384)),
    "4096": ([], _pack(4096)),
    "4096, mask": ([], _pack(4096) | MASKED),
    "1024, mask, PEFT's LoRA": (["peft"], _pack(1024) | MASKED),
    "1024": ([], _pack(1024)),
    "16384, mask": ([], _pack(16_384) | MASKED),
    "4096, compiled": ([], _pack(4096, **COMPILED)),
}
"""Levers, and what the recipe says, by name."""


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    cases = {
        name: Case(_measure(name), 60 if "compiled" in name or name == "as it is" else 30)
        for name in RUNS
        if not (bench.small and "compiled" in name)  # `right` compiles in a dry run too
    }
    looked_into = {
        f"{WATCHED}{name}": Case(_measure(name, watched=True), 60) for name in LOOKED_INTO
    }
    first = [*cases][:4]
    return {name: cases.pop(name) for name in first} | looked_into | cases


WATCHED = "looked into: "
LOOKED_INTO = ("as it is", "1024, mask, PEFT's LoRA")
"""Runs that are made once more to see where the host waits, in one step, and what the device does,
in another: what looks costs time."""


def _measure(name: str, watched: bool = False) -> Any:
    """Return the case that measures this run; only what is seen of it counts where it is
    watched."""

    def measure(bench: Bench) -> Figures:
        names, changes = RUNS[name]
        length, number = (64, 4) if bench.small else (LENGTH, ROWS)
        training = dict(changes.get("training", {}))
        if bench.small and "packed_length" in training:
            training["packed_length"] //= 32
        rows = models.write_even_rows(bench, length, number * speeds.STEPS)
        training["per_device_train_batch_size"] = number
        model = models.make_model(bench, "1B")
        given = changes | {"training": training}
        seen = {"waits_in": 3, "profile_in": 5} if watched else {}
        found = speeds.measure(bench, f"1B {name}", model, rows, given, names, **seen)
        if watched:
            profile, waits = found["profile"], found.get("waits", {})
            counted = {"kernels": profile["kernels"], "idle": profile["idle"]}
            listed = {"waits": waits} | {name: profile[name] for name in ("longest_ms", "host_ms")}
            return counted | {"waited": sum(waits.values())} | listed
        return found | {"settings": {"levers": names, "changes": changes}}

    return measure


def find_best(bench: Bench) -> Figures | None:
    """Return the settings of the quickest run that was measured, with sequences of MOST tokens at
    most; None where none was."""
    cases = bench.read_part("speed 1B").values()
    done = [case["figures"] for case in cases if "settings" in case.get("figures", {})]
    if not done:
        return None
    found: Figures = max(done, key=lambda each: each["tokens_per_s"])["settings"]
    training = dict(found["changes"].get("training", {}))
    if "packed_length" in training:
        training["packed_length"] = min(training["packed_length"], MOST)
    return found | {"changes": found["changes"] | {"training": training}}
