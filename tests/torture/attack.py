"""Attacks on `lora` by strangers' files, in eleven kinds; a line for each: OK, or what happened.

    python tests/torture/attack.py                              # 1,232 cases, each a line
    python tests/torture/attack.py --kind screen --cases 20     # one kind
    python tests/torture/attack.py --case screen-17 --keep DIR  # one case, its folders and output kept

A case is a function of `tests/torture/attacks/` and a generator of random numbers that the seed, the
kind and the case's number start, so that it is always the same. It runs in a process forked from this
one, which has imported everything, in folders of its own. Faults are:

    an exit status but 0, 1, 2, or what the case says; a signal; a traceback
    over SECONDS of processor time or MEMORY beside the imports; standing still for IDLE seconds
    a control, bidi or line character of a stranger's on the screen, or a line that it forged
    a shown command with a stranger's words as words of its own
    a secret, or what a link led to, on the screen or in a file that was written
    a change outside the work folder; a half-made output, scratch folder or child process that is left

Hermetic: a random Llama of two layers, no network. Needs build/tiny (make test makes it).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib
import os
import pickle
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.torture.attacks import KINDS, Attack, Make, Place  # noqa: E402
from tests.torture.attacks.judging import FOLDERS, judge_case, list_tree  # noqa: E402
from tests.torture.attacks.running import SUBREAPER, Ended, Limits, measure_baseline, perform  # noqa: E402
from tests.torture.attacks.stage import find_llama_cpp, forked, make_stage  # noqa: E402
from tests.warm import IMPORTED  # noqa: E402

CASES = 110

SOUND = 22
"""Commands of attacks/sound.py."""


class Outcome(NamedTuple):
    """What became of a case."""

    name: str
    faults: list[str]
    command: str
    ended: Ended
    said: str


def find_make(kind: str, number: int) -> Make:
    """The function that makes a kind's case of this number."""
    attacks: list[Make] = importlib.import_module(f"tests.torture.attacks.{kind}").ATTACKS
    return attacks[number % len(attacks)]


def make_folders(root: Path, name: str) -> None:
    """A case's folders, with the victim's files in theirs."""
    for each in FOLDERS:
        (root / each).mkdir(parents=True)
    canary = hashlib.sha256(name.encode()).hexdigest()[:16]
    (root / "victim" / "secret.txt").write_text(f"canary-{canary}\n")
    (root / "victim" / "folder").mkdir()
    (root / "victim" / "folder" / "config.json").write_text('{"keep": "me"}')
    (root / "victim" / "folder" / "empty").mkdir()
    (root / "home" / ".profile").write_text("# mine\n")


def prepare(make: Make, name: str, seed: int, root: Path, stage: Path) -> Attack:
    """Make a case's folders and files, in a child: what a stranger writes takes no memory here."""
    make_folders(root, f"{seed} {name}")

    def make_files() -> None:
        os.chdir(root / "work")
        attack = make(Place(root, stage), random.Random(f"{seed}-{root.name}"))
        (root / "attack").write_bytes(pickle.dumps(attack))

    if forked(make_files, root / "making")[0]:
        raise RuntimeError(f"{name} cannot be made: {(root / 'making').read_text()}")
    made: Attack = pickle.loads((root / "attack").read_bytes())
    return made


def try_number(
    kind: str, number: int, given: argparse.Namespace, stage: Path, folder: Path, limits: Limits
) -> Outcome | None:
    """A kind's case, from its files to its faults; None for one that `--short` leaves out."""
    make, root = find_make(kind, number), folder / f"{kind}-{number}"
    if given.short and make.__name__.startswith("gguf"):  # needs what only llama.cpp makes
        return None
    name = f"{root.name}-{make.__name__}"
    attack = prepare(make, name, given.seed, root, stage)
    return None if given.short and attack.is_long else try_case(name, attack, root, stage, limits)


def try_case(name: str, attack: Attack, root: Path, stage: Path, limits: Limits) -> Outcome:
    """Run a case whose folders are made, and look at what became of everything."""
    limits = limits.allow_for(attack, stage)
    before = {each: list_tree(root / each, each != "work") for each in FOLDERS}
    ended, left = perform(root, attack, limits)
    for path in root.rglob("*"):  # what is closed is opened to be looked at
        if path.is_dir() and not path.is_symlink() and not os.access(path, os.X_OK | os.R_OK):
            path.chmod(0o700)
    faults, said = judge_case(root, attack, before, ended, left, limits)
    command = shlex.join(["lora", *attack.arguments])
    return Outcome(name, faults, command, max(ended, key=lambda each: each.seconds), said)


def warm_up() -> float:
    """Import everything; return the seconds of processor time that took."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1", "LLAMA_CPP_DIR": str(find_llama_cpp()),
    }  # fmt: skip
    for name in [name for name in os.environ if re.search(r"TOKEN$|KEY$|SECRET|PASSWORD", name)]:
        del os.environ[name]
    began = time.process_time()
    for name in IMPORTED:
        importlib.import_module(f"lora_cli.{name}")
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()  # or a child's collector copies all that is here
    return time.process_time() - began


def attack_kind(
    kind: str, given: argparse.Namespace, stage: Path, folder: Path, limits: Limits
) -> tuple[int, int]:
    """Try a kind's cases; print a line for each. Returns cases and faults."""
    began, outcomes, number = time.monotonic(), list[Outcome](), 0
    count = min(given.short or given.cases, SOUND if kind == "sound" else sys.maxsize)
    while len(outcomes) < count:
        outcome = try_number(kind, number, given, stage, folder, limits)
        if outcome is not None:
            outcomes.append(outcome)
            show(outcome)
        if (folder / f"{kind}-{number}").exists():
            remove(folder / f"{kind}-{number}")
        number += 1
    bad = sum(bool(each.faults) for each in outcomes)
    slowest = max(outcomes, key=lambda each: each.ended.seconds)
    print(
        f"{kind}: {count} cases, {count - bad} OK, {bad} faults; slowest "
        f"{slowest.ended.seconds:.1f} s ({slowest.name}); {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return count, bad


def show(outcome: Outcome) -> None:
    """Print a case's line."""
    ended = outcome.ended
    took = f"exit {ended.status}, {ended.seconds:.2f} s, {max(0, ended.memory) >> 20} MiB"
    if outcome.faults:
        said = "; ".join(outcome.faults[:4])
        print(f"FAULT {outcome.name}: {said}\n      {outcome.command[:300]} ({took})", flush=True)
    else:
        print(f"OK {outcome.name} ({took})", flush=True)


def remove(folder: Path) -> None:
    """Remove a case's folders, whatever modes they have."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


def show_case(given: argparse.Namespace, stage: Path, folder: Path, limits: Limits) -> bool:
    """Try one case, and print all that was said."""
    kind, number = given.case.split("-")[:2]
    if (folder / f"{kind}-{number}").exists():
        remove(folder / f"{kind}-{number}")
    outcome = try_number(kind, int(number), given, stage, folder, limits)
    assert outcome is not None
    print(f"{outcome.said!r}\n")
    show(outcome)
    return bool(outcome.faults)


def main() -> None:
    """Exit 1 where anything was found."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--kind", action="append", choices=("sound", *KINDS), help="may be repeated; default: all"
    )
    options.add_argument("--cases", type=int, default=CASES, help="of each kind")
    options.add_argument(
        "--short", type=int, help="so many of each kind that need no other program's time"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--case", help="KIND-NUMBER")
    options.add_argument("--keep", type=Path, help="a folder for the cases' folders and the stage")
    given = options.parse_args()
    limits = measure_baseline(warm_up())
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    folder = given.keep or Path(tempfile.mkdtemp(prefix="attack-"))  # a child's end removes none
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    try:
        sys.exit(attack(given, folder, limits))
    finally:
        if given.keep is None:
            remove(folder)


def attack(given: argparse.Namespace, folder: Path, limits: Limits) -> bool:
    """Do what the command line says; return whether anything was found."""
    stage = folder / "stage"
    last = "seconds.json" if given.short else "model.gguf"
    if not (stage / last).is_file():
        shutil.rmtree(stage, ignore_errors=True)
        make_stage(stage, given.short is None)
    if given.case:
        return show_case(given, stage, folder, limits)
    untouched, counts = list_tree(stage, content=False), Counter[str]()
    for kind in given.kind or ("sound", *KINDS):
        tried, bad = attack_kind(kind, given, stage, folder, limits)
        counts += Counter({"cases": tried, "faults": bad})
    if list_tree(stage, content=False) != untouched:
        print("FAULT the stage, outside every work folder, was changed")
        counts["faults"] += 1
    print(f"{counts['cases']} cases, {counts['faults']} faults")
    return counts["faults"] > 0


if __name__ == "__main__":
    main()
