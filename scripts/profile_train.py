"""Where the time of a training step goes, by kind of work: `lora train` on the random Llama of
bench_train.py.

    python scripts/profile_train.py [--method lora] [--rows 48] [--width 320] [--vocabulary 32000] …

One thread, so that the times of the operations add up. Matrix products are told apart by their
sizes: one with the adapter's rank is the adapter's, one with the vocabulary's size the head's, any
other the base's. `framework` is what is left of the step's time beside the operations themselves:
Python, autograd, Trainer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
sys.path.insert(0, str(Path(__file__).parent))

import bench_train  # noqa: E402

PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::linear",
    "aten::matmul",
    "aten::mkldnn_linear",
}


def kind_of(name: str, shapes: list[Any], options: argparse.Namespace) -> str:
    """What an operation of this name, on tensors of these shapes, belongs to."""
    sizes = {
        size
        for shape in shapes
        if isinstance(shape, (list, tuple))
        for size in shape
        if isinstance(size, int)
    }
    if "attention" in name or "flash" in name or "softmax" in name:
        return "head and loss" if options.vocabulary in sizes else "attention"
    if "adam" in name or "foreach_norm" in name or "_foreach" in name:
        return "optimiser"
    if options.vocabulary in sizes:
        return "head and loss"
    if name in PRODUCTS or "linear" in name or "mm" in name.removeprefix("aten::"):
        return "LoRA products" if options.rank in sizes else "base products"
    if name in ("aten::copy_", "aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous"):
        return "casts and copies"
    return "norms, activations, sums"


def main() -> None:
    """Train once to warm up and once under torch's profiler."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench_train.add_model_options(parser)
    parser.set_defaults(rows=48)
    options = parser.parse_args()
    from torch.profiler import ProfilerActivity, profile
    from transformers import Trainer

    from lora_cli.common import ui

    times, seconds, own = Counter[str](), 0.0, Trainer.train
    names = dict[str, Counter[str]]()

    def profiled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            started = time.perf_counter()
            result = own(self, *args, **kwargs)
            seconds = time.perf_counter() - started
        for event in found.events():
            if event.name.startswith(("aten::", "mkldnn", "bitsandbytes::")):
                kind = kind_of(event.name, event.input_shapes, options)
                times[kind] += event.self_cpu_time_total / 1e6
                names.setdefault(kind, Counter())[event.name] += event.self_cpu_time_total / 1e6
        return result

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_CACHE_DIR"] = folder
        bench_train.make_model(Path(folder) / "model", options)
        tokens = bench_train.write_rows(Path(folder) / "rows.jsonl", options)
        Trainer.train = profiled
        bench_train.ours(Path(folder), options)
    times["framework"] = seconds - sum(times.values())
    print(f"{options.method}: {tokens:,} tokens in {seconds:.1f} s (profiler running), one thread")
    rows = []
    for kind, spent in times.most_common():
        most = ", ".join(
            name.removeprefix("aten::") for name, _ in names.get(kind, Counter()).most_common(3)
        )
        rows.append([kind, f"{spent:.2f}", f"{spent / seconds:.0%}", most])
    print(*ui.format_table(["", "s", "share", "mostly"], rows), sep="\n")


if __name__ == "__main__":
    main()
