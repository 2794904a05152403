"""Planned against measured memory of training: methods, checkpointing, packing, lengths.

    python scripts/bench_memory.py [--width 512] [--layers 8] [--only qlora]
    python scripts/bench_memory.py --model build/smollm2/model [--only lora]

A random Llama (60 million parameters unless told otherwise), or the given model, is trained for
three steps by `lora train`'s own code, each combination in a process of its own. Measured on a CPU:
the highest resident memory over what the process had after its imports; on CUDA: the allocator's
peak. Planned: what `lora plan` says of the same recipe and rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench_train import ROOT, make_model

from lora_cli.data import load
from lora_cli.models.base import Base
from lora_cli.plan import auto

STEPS = 3


class Case(NamedTuple):
    """One combination; `row` is the rows' length, `rows` how many one forward pass is given (for
    step: one step)."""

    method: str
    checkpointing: bool
    packing: str
    row: int
    rows: int
    max_length: int
    lora: str = ""

    def recipe(self, folder: Path) -> str:
        """The recipe, with model and rows in `folder`."""
        return (
            f"method: {self.method}\noutput_dir: {folder / 'run'}\nmodel: "
            f"{{name_or_path: {folder / 'model'}}}\n"
            f"lora: {{r: 16{self.lora}}}\ndata: {{path: {folder / 'rows.jsonl'}}}\n"
            f"training: {{packing: {self.packing}, "
            f"gradient_checkpointing: {str(self.checkpointing).lower()}, "
            f"per_device_train_batch_size: {self.rows}, max_length: {self.max_length}, max_steps: "
            f"{STEPS}, "
            "save_strategy: 'no'}\n"
        )


CASES = [
    *(
        Case(method, on, "step", 256, 8, 1024)
        for method, on in product(("lora", "dora", "qlora", "qdora"), (False, True))
    ),
    *(Case(method, False, "false", 512, 4, 512) for method in ("lora", "dora", "qlora", "qdora")),
    Case("lora", True, "false", 1024, 4, 1024),
    Case("lora", False, "step", 2048, 2, 2048),
    Case("qlora", True, "step", 2048, 2, 2048),
    Case("lora", False, "dataset", 256, 2, 1024),
    Case("qdora", False, "dataset", 256, 2, 512),
    Case("lora", False, "step", 256, 8, 1024, ", lora_dropout: 0.05"),
]


def write_rows(path: Path, case: Case) -> None:
    """Rows of the case's length, but for one in four, which is half as long: padded batches need a
    mask."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(STEPS * case.rows * 8):
            length = case.row if number % 4 else case.row // 2
            ids = [10 + (number * 7 + place * 3) % 490 for place in range(length)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def measure(folder: Path) -> int:
    """Train the recipe in `folder`; the peak in bytes over what the process had after its
    imports."""
    import torch

    from lora_cli.recipe.load import load_recipe
    from lora_cli.train import run

    if torch.cuda.is_available():
        run.train(load_recipe(folder / "r.yaml"))
        return torch.cuda.max_memory_allocated()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    run.train(load_recipe(folder / "r.yaml"))
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) << 10


def plan(folder: Path) -> dict[str, Any]:
    """Bytes by item that `lora plan` foresees for the recipe in `folder` on this machine."""
    from lora_cli.plan import hardware, memory
    from lora_cli.recipe.load import load_recipe

    device, base = hardware.detect_device(), Base(str(folder / "model"))
    recipe, _ = auto.settle(load_recipe(folder / "r.yaml"), base.config, device)
    rows, _ = load.load_rows(recipe, base.load_tokenizer())
    items = (
        memory.make_forecast(recipe, base.config, device)
        .need(memory.largest_batch(recipe, rows))
        .items
    )
    return {
        item: size for item, size in items.items() if item != memory.RESERVE
    }  # not the allocator's


def asked(what: str, folder: Path) -> Any:
    """`measure` or `plan` in a process of its own."""
    command = [sys.executable, __file__, "--do", what, "--folder", str(folder)]
    environment = {**os.environ, "LORA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("FOUND "))


def main() -> None:
    """Every case, planned and measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model's folder, instead of a random one")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--do", choices=("measure", "plan"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        print("FOUND " + json.dumps({"measure": measure, "plan": plan}[options.do](options.folder)))
        return
    columns = (
        "method",
        "checkpointing",
        "packing",
        "row",
        "rows",
        "planned MB",
        "measured MB",
        "ratio",
    )
    print(("{:<14} {:<14} {:<8}" + " {:>12}" * 5).format(*columns))
    worst = 1.0
    for case in [
        case for case in CASES if not options.only or case.method in options.only.split(",")
    ]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if options.model:
                (folder / "model").symlink_to(options.model.resolve())
            else:
                make_model(folder / "model", options)
            write_rows(folder / "rows.jsonl", case)
            (folder / "r.yaml").write_text(case.recipe(folder))
            planned, measured = asked("plan", folder), asked("measure", folder)
        ratio = sum(planned.values()) / measured
        worst = max(worst, ratio, 1 / ratio)
        method = f"{case.method}{', dropout' if case.lora else ''}"
        cells = (method, "on" if case.checkpointing else "off", case.packing, case.row, case.rows)
        line = "{:<14} {:<14} {:<8} {:>12} {:>12} {:>12,.0f} {:>12,.0f} {:>12.2f}"
        print(line.format(*cells, sum(planned.values()) / 1e6, measured / 1e6, ratio), flush=True)
        if "MEMORY_ITEMS" in os.environ:
            print("   ", {item: round(size / 1e6) for item, size in planned.items()}, flush=True)
    print(f"furthest apart: {worst:.2f}")


if __name__ == "__main__":
    main()
