"""How the time of `lora train` grows with length, rank, vocabulary and layers, one of them at a
time.

    python scripts/bench_growth.py [--method lora] [--tokens 8192]

The random Llama of bench_train.py (8 layers of width 320, vocabulary 32 000, rank 16) and rows of
256 tokens unless told otherwise, as many as make `--tokens`. Printed: CPU microseconds a token,
memory over what the process had when training began, and the exponent: the power of the size with
which the time grew from the smallest to the largest, and between the two largest.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import bench_train  # noqa: E402

AXES = {
    "length": (256, 512, 1024, 2048, 4096),
    "rank": (8, 16, 32, 64, 128, 256),
    "vocabulary": (8_000, 16_000, 32_000, 64_000, 128_000),
    "layers": (4, 8, 16, 32),
}


def measure(axis: str, size: int, method: str, tokens: int) -> tuple[float, float]:
    """CPU microseconds a token, and MB."""
    parser = argparse.ArgumentParser()
    bench_train.add_model_options(parser)
    length = size if axis == "length" else 256
    given = {
        "length": length,
        "rows": tokens // length,
        "max-length": max(1024, length),
        axis: size,
    }
    arguments = [
        "--method",
        method,
        *(text for name, value in given.items() for text in (f"--{name}", str(value))),
    ]
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_train.make_model(folder / "model", options)
        total = bench_train.write_rows(folder / "rows.jsonl", options)
        found = bench_train.measure("lora train", folder, arguments)
    return found["cpu"] / total * 1e6, found["mb"]


def exponent(first: tuple[int, float], last: tuple[int, float]) -> float:
    """The power of the size with which the time grew."""
    return math.log(last[1] / first[1]) / math.log(last[0] / first[0])


def main() -> None:
    """Every size of every axis once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("lora", "dora", "qlora", "qdora"), default="lora")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    for axis, sizes in AXES.items():
        found = [(size, *measure(axis, size, options.method, options.tokens)) for size in sizes]
        cells = "   ".join(
            f"{size:,}: {time:,.0f} µs {memory:,.0f} MB" for size, time, memory in found
        )
        times = [(size, time) for size, time, _ in found]
        powers = f"{exponent(times[0], times[-1]):.2f}, last {exponent(times[-2], times[-1]):.2f}"
        print(f"{axis:10}  exponent {powers}\n    {cells}", flush=True)


if __name__ == "__main__":
    main()
