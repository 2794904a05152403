"""Which commands a stranger's adapter, base, rows, recipe or GGUF are given to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.torture.attacks import Attack, Place

SHORT = ["--max-new-tokens", "2"]
TALK = b"hello\nwhat is it?\n/quit\n"


def use_adapter(place: Place, chance: random.Random, adapter: Path, **more: Any) -> Attack:
    """A command that is given an adapter."""
    made = str(adapter)
    light = [
        ["merge", made, "out"], ["merge", made, "out", "--no-stream"], ["convert", made, "out", "--r", "1"],
        ["combine", made, str(place.stage / "second"), "out"], ["verify", made, str(place.stage / "base")],
        ["generate", made, "--prompt", "ask", *SHORT], ["chat", made, *SHORT],
        ["check", "onward.yaml"], ["plan", "onward.yaml"], ["train", "onward.yaml"],
        ["merge", made, str(place.stage / "second"), "out"],
    ]  # fmt: skip
    heavy = [["export-gguf", made, "--adapter-only", "-o", "gg"], ["export-gguf", made, "-o", "gg"]]
    words = chance.choice(heavy if chance.random() < 0.04 else light)
    if "onward.yaml" in words:
        place.recipe(adapter=made, name="onward.yaml")
    return Attack(words, stdin=TALK, **{"output": "out", **more})


def use_base(place: Place, chance: random.Random, base: Path, **more: Any) -> Attack:
    """A command that is given a base."""
    made = str(base)
    light = [
        ["check", "recipe.yaml"], ["check", "recipe.yaml", "--json"], ["plan", "recipe.yaml"],
        ["train", "recipe.yaml"], ["generate", made, "--prompt", "ask", *SHORT], ["chat", made, *SHORT],
        ["verify", made, str(place.stage / "base")], ["extract", str(place.stage / "base"), made, "out", "--r", "2"],
        ["merge", str(place.stage / "adapter"), "out", "--base", made],
        ["combine", str(place.stage / "adapter"), str(place.stage / "second"), "out", "--base", made],
    ]  # fmt: skip
    words = chance.choice([["export-gguf", made, "-o", "gg"]] if chance.random() < 0.04 else light)
    if "recipe.yaml" in words:
        place.recipe(base=made)
    return Attack(words, stdin=TALK, **{"output": "out", **more})


def use_weights(place: Place, chance: random.Random, content: bytes) -> Attack:
    """A command that is given an adapter or a base whose safetensors file holds this."""
    if chance.random() < 0.5:
        adapter = place.adapter()
        (adapter / "adapter_model.safetensors").write_bytes(content)
        return use_adapter(place, chance, adapter)
    base = place.copy("base")
    (base / "model.safetensors").write_bytes(content)
    return use_base(place, chance, base)


def use_imatrix(place: Place, *more: str) -> Attack:
    """An export by the importance matrix `m.imatrix`."""
    given = ["-o", "gg", "-q", "q2_k", "--imatrix", "m.imatrix", *more]
    return Attack(["export-gguf", str(place.stage / "merged"), *given])


def use_rows(
    place: Place, chance: random.Random, rows: object, text: str = "", **more: Any
) -> Attack:
    """A command that is given rows."""
    words = chance.choice(
        [
            ["check", "recipe.yaml"],
            ["check", "recipe.yaml", "--samples", "5"],
            ["train", "recipe.yaml"],
            ["check", "recipe.yaml", "--json"],
            ["plan", "recipe.yaml", "--data"],
            ["generate", str(place.stage / "base"), "--file", str(rows), *SHORT],
        ]  # fmt: skip
    )
    place.recipe(text, data=rows)
    return Attack(words, **more)


def use_recipe(chance: random.Random, recipe: Path, **more: Any) -> Attack:
    """A command that is given a recipe."""
    verb = chance.choice(["check", "plan", "train"])
    return Attack([verb, str(recipe.name if chance.random() < 0.5 else recipe)], **more)


def use_gguf(place: Place, chance: random.Random, gguf: Path, **more: Any) -> Attack:
    """A command that is given a GGUF."""
    made = str(gguf)
    words = chance.choice(
        [
            ["generate", made, "--prompt", "ask", *SHORT],
            ["chat", made, *SHORT],
            ["verify", made, str(place.stage / "merged")],
            ["verify", str(place.stage / "merged"), made],
            ["generate", made, "--prompt", "ask", "--json", *SHORT],
        ]  # fmt: skip
    )
    return Attack(words, stdin=TALK, **more)
