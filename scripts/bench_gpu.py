"""Everything worth knowing on one NVIDIA GPU, in one call of nine minutes, without a network.

    python scripts/bench_gpu.py --out DIR [--budget 520] [--only ground,right]
    python scripts/bench_gpu.py --out DIR --device cpu --tiny   # the dry run, on a processor
    python scripts/bench_gpu.py --table DIR/report.json    # … into docs/explanation/benchmarks.md

`make gpu` installs what `make gpu-wheels` has fetched into a folder, and then runs the first. The
parts stand in scripts/gpu_parts, in order of value here; each is run in a process of its own until
its share of the budget is over. DIR/report.json is written anew after each case, DIR/table.md at
the end; DIR/log.txt is what the processes said.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpu_parts import child, driver, report  # noqa: E402

ON_PROCESSOR = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
PARTS = (
    driver.Part("ground", "gpu_parts.ground", 30),
    # of many processors' threads most wait for each other where matrices are small
    driver.Part("reference", "gpu_parts.reference", 20, ON_PROCESSOR),
    driver.Part("right", "gpu_parts.right", 70),
    driver.Part("packing", "gpu_parts.packing", 20),
    driver.Part("resume", "gpu_parts.resume", 40, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    driver.Part("speed 1B", "gpu_parts.speed_1b", 110),
    driver.Part("speed 8B", "gpu_parts.speed_8b", 125),
    driver.Part("peers", "gpu_parts.peers", 65),
    driver.Part("loss head", "gpu_parts.head", 35),
    driver.Part("rest", "gpu_parts.rest", 30),
)
"""In order of value, each with its share of the budget in seconds of 520."""
KEPT = 200_000
"""Characters of each process's log that are kept."""
PATIENCE = {True: 6.0, False: 1.0}
"""How many times its usual limit a case may take, in a dry run and on a GPU."""


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all parts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a processor gets through")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--also", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="the tiny model's folder")
    parser.add_argument("--table", type=Path, metavar="REPORT")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def find_tiny(given: Path | None) -> Path:
    """Return the folder of the tiny model and its rows."""
    for folder in (given, ROOT / ".gpu/tiny", ROOT / "build/tiny"):
        if folder is not None and (folder / "model/config.json").is_file():
            return folder.absolute()
    raise SystemExit("error: there is no tiny model\n\nhint: make gpu-wheels")


def choose_parts(options: argparse.Namespace) -> list[driver.Part]:
    """Return the parts that are asked for, and those that a test adds."""
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := set(wanted) - {part.name for part in PARTS}:
        raise SystemExit(f"error: there is no part {', '.join(sorted(unknown))}")
    added = [driver.Part(name.rpartition(".")[2], name, 30) for name in options.also]
    return added + [part for part in PARTS if not wanted or part.name in wanted]


def measure(options: argparse.Namespace) -> None:
    """Run the parts; print and write the table."""
    if options.device == "cuda" and not (
        shutil.which("nvidia-smi") or [*Path("/dev").glob("nvidia*")]
    ):
        raise SystemExit("error: there is no NVIDIA GPU here\n\nhint: --device cpu --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    given = {"device": options.device, "small": options.tiny, "tiny": str(find_tiny(options.model))}
    given["patience"] = PATIENCE[options.tiny]
    with tempfile.TemporaryDirectory(prefix="lora-gpu-") as name:
        scratch = Path(name)
        work = driver.Driver(options.out.absolute() / "report.json", scratch, given, options.budget)
        try:
            found = work.run(choose_parts(options))
        finally:
            logs = sorted(scratch.glob("*.log"), key=lambda path: path.stat().st_mtime)
            texts = [f"==== {log.stem}\n{log.read_text(errors='replace')[-KEPT:]}" for log in logs]
            (options.out / "log.txt").write_text("\n".join(texts), encoding="utf-8")
    text = report.make_text(found)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Measure, or write the table of what was measured."""
    options = parse_options()
    if options.child:
        child.serve()
    elif options.table:
        report.write_section(options.table, ROOT / "docs/explanation/benchmarks.md")
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left
        measure(options)


if __name__ == "__main__":
    main()
