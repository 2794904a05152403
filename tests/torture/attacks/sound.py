"""No attack: sound files and commands, which must go on working, or the others show nothing."""

from __future__ import annotations

import random

from tests.torture.attacks import Attack, Place
from tests.torture.attacks.verbs import TALK

COMMANDS = (
    "merge {adapter} out", "merge {run}/adapter out --no-stream", "convert {dora} out --r 1", "combine {adapter} {second} out",
    "extract {base} {tuned} out --r 2", "verify {run}/adapter {merged}", "generate {adapter} {base} --prompt ask --max-new-tokens 2",
    "chat {merged} --max-new-tokens 2", "check recipe.yaml", "plan recipe.yaml", "train recipe.yaml", "recipes copy own-data x.yaml",
    "train onward.yaml", "train resumed.yaml --resume --allow-changes training.max_steps --set training.max_steps=3",
    "merge {adapter} {second} out", "check recipe.yaml --json", "recipes", "doctor", "generate {gguf} --prompt ask --max-new-tokens 2",
    "export-gguf {adapter} --adapter-only -o gg", "export-gguf {merged} -o gg", "train recipe.yaml --set training.save_strategy=epoch",
)  # fmt: skip


def sound(place: Place, chance: random.Random) -> Attack:
    """The commands in turn."""
    number = int(place.root.name.rpartition("-")[2])
    rows = place.stage / "rows.jsonl"
    if "resumed" in COMMANDS[number % len(COMMANDS)]:
        place.run()
    place.recipe(data=rows)
    place.recipe(adapter=place.stage / "adapter", data=rows, name="onward.yaml")
    saving = "training: {save_strategy: steps, save_steps: 1}\n"
    place.recipe(saving, data=rows, name="resumed.yaml")
    names = {
        name: place.stage / name
        for name in ("adapter", "second", "dora", "base", "tuned", "run", "merged")
    }
    words = (
        COMMANDS[number % len(COMMANDS)].format(**names, gguf=place.stage / "model.gguf").split()
    )
    return Attack(words, stdin=TALK, codes=(0,) if words[0] != "doctor" else (0, 1))


ATTACKS = [sound]
