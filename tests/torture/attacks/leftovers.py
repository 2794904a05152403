"""Kind 5: what is left after an end that nobody wished for, and what the next start makes of it.

Signals at random instants are `tests/torture/signals.py`'s; here are kill -9, what stands in the
way of tidying, and stale things of dead processes.
"""

from __future__ import annotations

import json
import os
import random

from tests.torture.attacks import Attack, Place
from tests.torture.attacks.verbs import SHORT, TALK


def draw_making(place: Place, chance: random.Random) -> list[str]:
    """A command that makes something."""
    adapter, second, base = (str(place.stage / name) for name in ("adapter", "second", "base"))
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    return chance.choice([
        ["merge", adapter, "out"], ["merge", adapter, "out", "--no-stream"], ["convert", adapter, "out", "--r", "1"], ["combine", adapter, second, "out"],
        ["extract", base, str(place.stage / "tuned"), "out", "--r", "2"], ["merge", adapter, second, "out"], ["check", "recipe.yaml"],
    ])  # fmt: skip


def killed(place: Place, chance: random.Random) -> Attack:
    """kill -9, and the same again: it sweeps what the first had in the making."""
    return Attack(draw_making(place, chance), killed=chance.uniform(0.02, 0.7), output=None)


def killed_training(place: Place, chance: random.Random) -> Attack:
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1, max_steps: 6}\n",
        data=place.stage / "rows.jsonl",
    )
    program = """
import sys
from pathlib import Path
from lora_cli.cli import main
if Path("run/record.json").exists():
    sys.argv.append("--resume")
main()
"""
    return Attack(["train", "recipe.yaml"], killed=chance.uniform(0.2, 1.5), program=program)


def killed_export(place: Place, chance: random.Random) -> Attack:
    words = chance.choice(
        [
            ["export-gguf", str(place.stage / "adapter"), "--adapter-only", "-o", "gg"],
            ["export-gguf", str(place.stage / "merged"), "-o", "gg"],
        ]
    )
    return Attack(words, killed=chance.uniform(0.2, 6))


def stale(place: Place, chance: random.Random) -> Attack:
    """Names that dead processes left: of ours they go, a stranger's stay; neither stops anything."""
    program = """
import os
from pathlib import Path
from lora_cli.common import files
dead = os.fork()
if not dead:
    folder = files._name_passing(Path.cwd())
    if %(file)r:
        folder.write_text("stale")
    else:
        folder.mkdir()
        (folder / "model.safetensors").write_text("stale")
        (folder / "link").symlink_to(str(Path.cwd().parent / "victim" / "folder"))
    os._exit(0)
os.waitpid(dead, 0)
from lora_cli.cli import main
main()
"""
    words = draw_making(place, chance)
    while words[-1] == "recipe.yaml":
        words = draw_making(place, chance)
    return Attack(words, program=program % {"file": chance.random() < 0.3}, absent=["out/link"])


def foreign_names(place: Place, chance: random.Random) -> Attack:
    """Names like ours that are not ours: they stay, and are no hindrance."""
    words = draw_making(place, chance)
    name = chance.choice([".out.tmp", ".out.1.tmp", ".out.999999999.tmp", ".out.-1-00000000.tmp", ".out.x-y.tmp", ".out.1-zzzzzzzz.tmp", ".out..tmp", ".out.1e9-12345678.tmp",
                          f".out.{os.getpid()}-00000000.tmp", ".out.99999999999999999999-00000000.tmp", "out.rejected", ".out.\u0661-00000000.tmp"])  # fmt: skip
    (place.work / name).mkdir()
    (place.work / name / "mine").write_text("keep")
    program = f"""
from pathlib import Path
from lora_cli.cli import main
try:
    main()
finally:
    assert (Path.cwd() / {name!r} / "mine").read_text() == "keep", "what was not ours is gone"
"""
    return Attack(words, program=program)


def unremovable(place: Place, chance: random.Random) -> Attack:
    """A folder in which nothing can be made, or removed."""
    target = place.work / "closed"
    target.mkdir()
    words = [word if word != "out" else "closed/out" for word in draw_making(place, chance)]
    target.chmod(chance.choice([0o555, 0o000, 0o444, 0o333]))
    return Attack(words, surroundings=[("powerless", True)])


def full(place: Place, chance: random.Random) -> Attack:
    """No file may be larger than so many bytes: as a full disk, at some write or other."""
    words = draw_making(place, chance)
    return Attack(
        words,
        surroundings=[("limit FSIZE", chance.choice([4096, 10_000, 20_000, 60_000, 100_000]))],
        output="out",
    )


def few_files(place: Place, chance: random.Random) -> Attack:
    words = draw_making(place, chance)
    return Attack(
        words, surroundings=[("limit NOFILE", chance.choice([16, 24, 32, 64]))], output="out"
    )


def closed(place: Place, chance: random.Random) -> Attack:
    """Without stdin, stdout or stderr."""
    words = [*draw_making(place, chance)]
    if chance.random() < 0.3:
        words = (
            ["generate", str(place.stage / "base"), "--prompt", "x", *SHORT]
            if chance.random() < 0.5
            else ["chat", str(place.stage / "base"), *SHORT]
        )
    which = chance.choice([[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
    return Attack(
        words,
        stdin=TALK,
        fresh=True,
        surroundings=[("close", each) for each in which],
        codes=(0, 1, 2),
    )


def masks(place: Place, chance: random.Random) -> Attack:
    words = draw_making(place, chance)
    mask = chance.choice([0, 0o077, 0o777, 0o022])
    return Attack(
        words,
        surroundings=[("umask", mask)],
        codes=(0,) if mask in (0, 0o077) else (0, 1, 2),
        output="out",
    )


def homeless(place: Place, chance: random.Random) -> Attack:
    """HOME, TMPDIR or the cache missing, unwritable, or no folder."""
    words = draw_making(place, chance)
    file = place.work / "file"
    file.write_text("x")
    where = chance.choice(
        [
            "/nonexistent/x",
            "",
            "/dev/null",
            str(file),
            "/proc",
            "relative/path",
            "~",
            "/",
            "x" * 5000,
            "//x",
        ]
    )
    name = chance.choice(["HOME", "TMPDIR", "LORA_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME"])
    if chance.random() < 0.25:
        return Attack(
            words, surroundings=[("unset", chance.choice(["HOME", "TMPDIR", "PATH", "LANG"]))]
        )
    if where == "/":
        where = "/proc/self"
    return Attack(
        words,
        environment={name: where, **({"LORA_CACHE_DIR": ""} if name == "XDG_CACHE_HOME" else {})},
    )


def closed_home(place: Place, chance: random.Random) -> Attack:
    """HOME, its cache or TMPDIR can be read, or not even that, and not be written to."""
    words = draw_making(place, chance)
    closed = place.work / "closed"
    closed.mkdir()
    closed.chmod(chance.choice([0o555, 0o000, 0o111]))
    name = chance.choice(["HOME", "TMPDIR", "LORA_CACHE_DIR", "XDG_CACHE_HOME"])
    more = (
        {"LORA_CACHE_DIR": "", "XDG_CACHE_HOME": ""}
        if name == "HOME" and chance.random() < 0.6
        else {}
    )
    return Attack(
        words, environment={**more, name: str(closed)}, surroundings=[("powerless", True)]
    )


def little_memory(place: Place, chance: random.Random) -> Attack:
    """Little address space, or stack: a message, no crash."""
    words = draw_making(place, chance)
    kind, value = chance.choice(
        [
            ("STACK", 256 << 10),
            ("STACK", 1 << 20),
            ("AS", 3 << 30),
            ("DATA", 1 << 30),
            ("NPROC", 20),
        ]
    )
    return Attack(words, surroundings=[(f"limit {kind}", value)], output="out")


def clock_back(place: Place, chance: random.Random) -> Attack:
    """The clock jumps back by an hour, or thirty years, amid the work."""
    words = draw_making(place, chance)
    return Attack(
        words,
        surroundings=[("clock", chance.choice([3600, 10**9, -(10**8)]))],
        codes=(0,),
        output="out",
    )


def broken_cache(place: Place, chance: random.Random) -> Attack:
    """Half a cache of killed processes, and things that nobody made."""
    rows = place.cache / "lora-cli" / "rows"
    rows.mkdir(parents=True)
    for name in chance.sample(
        [".rows-1-00000000-0000000000000000", "x", ".tmp", "a" * 32, ".rows-", "b" * 32 + ".lock"],
        3,
    ):
        if chance.random() < 0.5:
            (rows / name).write_text("x")
        else:
            (rows / name).mkdir()
            (rows / name / "counts.json").write_text(json.dumps({"x": 1}))
    place.recipe(data=place.stage / "rows.jsonl")
    return Attack([chance.choice(["check", "train"]), "recipe.yaml"], codes=(0,))


ATTACKS = [
    killed, stale, foreign_names, full, few_files, masks, homeless, closed_home, killed_training, unremovable, closed, little_memory,
    clock_back, broken_cache, killed, killed_export,
]  # fmt: skip
