"""Signals at random instants of every verb that makes something: nothing is left behind, no child runs on, no traceback, and
the status says which signal it was. Then kill -9: the next start sweeps, and does its work.

    python tests/torture/signals.py [--signals 300] [--kills 100] [--seed 0] [--verbs merge train …]

Commands are forked from a process that holds the imports already; every tenth signal comes to one of its own, amid its imports
as well. Half of the signals are followed by a second one. Prints a line for each instant at which something was wrong, and a
table; exit 1 if there was one. Linux. Needs build/tiny and llama.cpp's converters (make test makes them).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from lora_cli.gguf import install, tools  # noqa: E402
from tests.warm import IMPORTED  # noqa: E402

TINY = ROOT / "build" / "tiny"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl: orphans become children of this process, so that they are found."""
PATIENCE = 20.0
"""Seconds within which all that a killed process started must have ended: a data worker looks for its parent each five."""


class Place(NamedTuple):
    """A folder for one command: what it may write to lies below."""

    root: Path

    @property
    def out(self) -> Path:
        """What is to be made."""
        return self.root / "work" / "out"

    @property
    def log(self) -> Path:
        """What was said."""
        return self.root / "log"

    def list_files(self) -> set[str]:
        """All that is there but the log, as paths."""
        found = (path for name in ("work", "t", "cache") for path in (self.root / name).rglob("*"))
        return {str(path.relative_to(self.root)) for path in found}

    def make(self, converters: Path) -> None:
        """Begin anew."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("work", "t", "cache/lora-cli"):
            (self.root / name).mkdir(parents=True)
        (self.root / "cache/lora-cli" / converters.name).symlink_to(converters)


class Verb(NamedTuple):
    """A command by its words, and what is done before it in its process."""

    words: Callable[[Path, Path], list[str]]
    prepare: Callable[[Path], None] = lambda folder: None
    has_cold_form: bool = True


def write_recipe(folder: Path) -> None:
    """The recipe of `train` and `check`."""
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {TINY / 'model'}}}\n"
        f"data: {{path: {TINY / 'train.jsonl'}, max_rows: 12}}\nlora: {{r: 2}}\n"
        "training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1e-2, max_length: 64, "
        "save_strategy: steps, save_steps: 2, dataloader_num_workers: 2, gradient_accumulation_steps: 1}\n"
    )


def write_source_package(folder: Path) -> None:
    """A source package as small as it can be, in the place of llama.cpp's."""
    with tarfile.open(folder / "offered.tar.gz", "w:gz") as archive:
        for name in (tools.CONVERTER, "conversion/__init__.py", "gguf-py/gguf/__init__.py"):
            member = tarfile.TarInfo(f"llama_cpp_python-{tools.VERSION}/vendor/llama.cpp/{name}")
            archive.addfile(member, io.BytesIO(b""))


PIP = """
import shutil, subprocess, sys, tempfile, time
compiler = "import time; open({!r}, 'w'); time.sleep(0.3)"
with tempfile.TemporaryDirectory() as folder:
    made = [subprocess.Popen([sys.executable, "-c", compiler.format(f"{folder}/{n}.o")]) for n in range(3)]
    print([each.wait() for each in made])
target = sys.argv[sys.argv.index("--dest") + 1]
shutil.copy(sys.argv[1], f"{target}/llama_cpp_python-" + sys.argv[2] + ".tar.gz")
"""
"""What pip does with a source package, in short: several compilers, then the file."""


def stand_in_for_pip(folder: Path) -> None:
    """Let `setup-llama-cpp` find nothing installed, and get the small source package."""
    offered = folder / "offered.tar.gz"
    home = Path(os.environ["LORA_CACHE_DIR"]) / "lora-cli" / tools.find_managed_home().name
    if home.is_symlink():
        home.unlink()
    else:  # installed just before the kill
        shutil.rmtree(home, ignore_errors=True)
    install.SHA256 = hashlib.sha256(offered.read_bytes()).hexdigest()
    install._unpack(offered, folder / "unpacked")
    tools.DIGEST = tools.hash_installed(folder / "unpacked")
    install._pip = lambda *words: [sys.executable, "-c", PIP, str(offered), tools.VERSION, *words]  # type: ignore[assignment]


BASE, A, B, MERGED = str(TINY / "model"), "a/adapter", "b/adapter", "merged"
VERBS = {
    "merge": Verb(lambda made, out: ["merge", f"{made / A}", f"{out}"]),
    "merge two": Verb(lambda made, out: ["merge", f"{made / A}", f"{made / B}", f"{out}"]),
    "combine": Verb(lambda made, out: ["combine", f"{made / A}", f"{made / B}", f"{out}"]),
    "convert": Verb(lambda made, out: ["convert", f"{made / A}", f"{out}", "--r", "1"]),
    "extract": Verb(lambda made, out: ["extract", BASE, f"{made / MERGED}", f"{out}", "--r", "2"]),
    "export-gguf": Verb(
        lambda made, out: ["export-gguf", f"{made / MERGED}", "-q", "f32", "-o", f"{out}"]
    ),
    "setup-llama-cpp": Verb(lambda made, out: ["setup-llama-cpp"], stand_in_for_pip, False),
    "check": Verb(
        lambda made, out: ["check", f"{made / 'recipe.yaml'}", "--set", f"output_dir={out}"]
    ),
    "train": Verb(
        lambda made, out: [
            "train",
            f"{made / 'recipe.yaml'}",
            "--set",
            f"output_dir={out}",
            *(["--resume"] if (out / "record.json").is_file() else []),
        ]
    ),
}


class Shop:
    """Where commands are started: a folder with what they read, and a place for what they make."""

    def __init__(self, folder: Path) -> None:
        self.made = folder / "made"
        self.place = Place(folder / "p")
        self.converters = tools.find_managed_home()
        self.made.mkdir()
        write_recipe(self.made)
        write_source_package(self.made)

    def prepare(self) -> None:
        """Make two adapters and a merged model."""
        recipe = str(self.made / "recipe.yaml")
        for name, seed in (("a", 1), ("b", 2)):
            words = ["train", recipe, "--set", f"output_dir={self.made / name}", "--set"]
            self.place.make(self.converters)
            self.finish(Verb(lambda made, out: [*words, f"training.seed={seed}"]))  # noqa: B023
        self.place.make(self.converters)
        self.finish(Verb(lambda made, out: ["merge", str(made / A), str(made / MERGED)]))

    def start(self, verb: Verb, cold: bool = False) -> int:
        """Start a command, forked or in an interpreter of its own; its process."""
        words, place = verb.words(self.made, self.place.out), self.place
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            os.chdir(place.root / "work")
            log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["LORA_CACHE_DIR"] = str(place.root / "cache")
            os.environ["TMPDIR"] = str(place.root / "t")
            os.environ["PYTHONPATH"] = str(ROOT)
            if cold:
                os.execv(sys.executable, [sys.executable, "-m", "lora_cli", *words])
            tempfile.tempdir = None
            verb.prepare(self.made)
            sys.argv = ["lora", *words]
            importlib.import_module("lora_cli.__main__").main()
        except BaseException:
            traceback.print_exc()
        os._exit(71)

    def finish(self, verb: Verb) -> float:
        """Let a command run to its end, and return the seconds it took; SystemExit where it
        fails."""
        began = time.monotonic()
        status = os.waitstatus_to_exitcode(os.waitpid(self.start(verb), 0)[1])
        if status:
            sys.exit(
                f"{verb.words(self.made, self.place.out)}: {status}\n{self.place.log.read_text()}"
            )
        return time.monotonic() - began


def end_by(child: int, numbers: list[int], delay: float, between: float) -> int:
    """Send the signals after `delay` seconds, `between` seconds apart, unless the command has ended by
    then; return its exit status."""
    deadline = time.monotonic() + delay
    while (left := deadline - time.monotonic()) > 0:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(left, 0.01))
    for number in numbers:
        os.kill(child, number)  # it is not waited for yet, so the number is its own
        time.sleep(between)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def find_orphans(patience: float) -> list[str]:
    """What is still running of all that was started."""
    left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=patience)[1]
    found = [" ".join(each.cmdline())[:100] for each in left]
    for each in left:
        each.kill()
    psutil.wait_procs(left)
    return found


def find_faults(place: Place, whole: set[str], status: int, allowed: set[int]) -> list[str]:
    """What is wrong after a command that was ended; `whole` is what one that was let be leaves."""
    said = place.log.read_text() if place.log.exists() else ""
    faults = [f"status {status}"] if status not in allowed else []
    faults += [
        f"said: {word}" for word in ("Traceback", "Exception ignored", "lora 0.") if word in said
    ]
    run = (place.out / "record.json").exists() or (place.out / "checkpoint-2").exists()
    kept = place.list_files()
    left = {
        name for name in kept - whole if not re.match(r"cache/lora-cli/rows(/[0-9a-f]{32})?", name)
    }
    if run:  # a run may be resumed
        left = {name for name in left if ".lora-" in name or name.endswith(".lock")}
    if not run and place.out.is_dir() and "work/out/lora_record.json" in whole:
        missing = {name for name in whole if name.startswith("work/out/")} - place.list_files()
        faults += [f"half made: without {name}" for name in sorted(missing)[:1]]
    return faults + [f"left: {name}" for name in sorted(left)[:2]]


def try_signals(shop: Shop, name: str, count: int, draw: random.Random) -> Counter[str]:
    """End a verb at so many instants."""
    verb, counts = VERBS[name], Counter[str]()
    shop.place.make(shop.converters)
    length = shop.finish(verb)
    whole = shop.place.list_files()
    for number in range(count):
        cold = verb.has_cold_form and number % 10 == 9
        sent = [draw.choice(SIGNALS) for _ in range(draw.choice((1, 2)))]
        delay = draw.uniform(0, length + 6 * cold)
        shop.place.make(shop.converters)
        began, between = time.monotonic(), draw.uniform(0, 0.1)
        status = end_by(shop.start(verb, cold), sent, delay, between)
        seconds = time.monotonic() - began
        allowed = {
            0,
            *(128 + each for each in sent),
            *(-each for each in sent if delay < 0.1),
        }
        faults = find_faults(shop.place, whole, status, allowed)
        faults += [f"runs on: {each}" for each in find_orphans(0.5)]
        counts["ended"] += status != 0
        counts["finished before"] += status == 0
        length = min(length, seconds) if status == 0 and not cold else length  # it had been busier
        counts["faults"] += bool(faults)
        if faults:
            print(
                f"{name}: {sent} after {delay:.2f} s{' (cold)' * cold}: {'; '.join(faults)}",
                flush=True,
            )
    return counts


def is_done(out: Path) -> bool:
    """Whether all was there when a verb was killed: it is refused to do it again."""
    record = out / "record.json"
    run = record.is_file() and json.loads(record.read_text())["status"] == "finished"
    return run or (out / "lora_record.json").exists()


def try_kills(shop: Shop, name: str, count: int, draw: random.Random) -> Counter[str]:
    """Kill a verb at so many instants, and start it again each time."""
    verb, counts = VERBS[name], Counter[str]()
    shop.place.make(shop.converters)
    length = shop.finish(verb)
    whole = shop.place.list_files()
    for _ in range(count):
        delay = draw.uniform(0, length)
        shop.place.make(shop.converters)
        status = end_by(shop.start(verb), [signal.SIGKILL], delay, 0)
        orphans = find_orphans(PATIENCE)
        before = shop.place.list_files()
        again = 0
        shop.place.log.unlink(missing_ok=True)  # a worker may say that its parent is gone
        if status and not is_done(shop.place.out):
            again = os.waitstatus_to_exitcode(os.waitpid(shop.start(verb), 0)[1])
        elif name == "setup-llama-cpp" or status:
            shop.finish(VERBS["check"])  # another that makes something
        faults = find_faults(shop.place, whole, again, {0}) + [
            f"runs on: {each}" for each in orphans
        ]
        counts["killed"] += status != 0
        counts["left something"] += bool({each for each in before if ".lora-" in each})
        counts["faults"] += bool(faults)
        if faults:
            print(shop.place.log.read_text()[-2000:])
            print(f"{name}: killed after {delay:.2f} s: {'; '.join(faults)}", flush=True)
    return counts


def main() -> None:
    """Print what was wrong, and a table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--signals", type=int, default=300)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--verbs", nargs="+", default=list(VERBS), choices=VERBS)
    given = options.parse_args()
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in IMPORTED:
        importlib.import_module(f"lora_cli.{name}")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    total = Counter[str]()
    folder = Path(tempfile.mkdtemp(prefix="s")).resolve()  # a child's end removes none
    try:
        shop = Shop(folder)
        shop.prepare()
        for what, count in ((try_signals, given.signals), (try_kills, given.kills)):
            for index, name in enumerate(given.verbs):
                share = count * (index + 1) // len(given.verbs) - count * index // len(given.verbs)
                if not share:
                    continue
                began = time.monotonic()
                counts = what(shop, name, share, random.Random(f"{given.seed} {name}"))
                total.update(counts)
                told = ", ".join(f"{number} {kind}" for kind, number in counts.items())
                print(f"{name:15} {told}, in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    print(", ".join(f"{number} {kind}" for kind, number in total.items()))
    sys.exit(bool(total["faults"]))


if __name__ == "__main__":
    main()
