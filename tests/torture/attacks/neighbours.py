"""Kind 6: two at once."""

from __future__ import annotations

import random

from tests.torture.attacks import Attack, Place, change


def one_output(place: Place, chance: random.Random) -> Attack:
    """Two or three commands make one output: one wins, the others are told so."""
    adapter, second, base, tuned = (
        str(place.stage / name) for name in ("adapter", "second", "base", "tuned")
    )
    making = [
        ["merge", adapter, "out"], ["merge", adapter, "out", "--no-stream"], ["convert", adapter, "out", "--r", "1"], ["combine", adapter, second, "out"],
        ["extract", base, tuned, "out", "--r", "2"], ["merge", second, "out"], ["merge", adapter, second, "out"],
    ]  # fmt: skip
    first = chance.choice(making)
    others = [
        first if chance.random() < 0.6 else chance.choice(making)
        for _ in range(chance.choice([1, 1, 2]))
    ]
    return Attack(first, together=others, winners=1)


def spelled_otherwise(place: Place, chance: random.Random) -> Attack:
    """One output under two names."""
    adapter = str(place.stage / "adapter")
    (place.work / "real").mkdir()
    (place.work / "alias").symlink_to("real")
    names = [
        "real/out",
        "./real/out",
        "real/../real/out",
        "alias/out",
        str(place.work / "real" / "out"),
        "real//out",
        "real/out/",
    ]
    first, second = chance.sample(names, 2)
    verb = chance.choice([["merge", adapter, "{}"], ["convert", adapter, "{}", "--r", "1"]])
    return Attack(
        [w.format(first) for w in verb], together=[[w.format(second) for w in verb]], winners=1
    )


def exports(place: Place, chance: random.Random) -> Attack:
    """Two exports into one folder: of one name one wins."""
    adapter = place.copy("adapter")
    words = ["export-gguf", str(adapter), "--adapter-only", "-o", "gg"]
    if chance.random() < 0.3:
        words = ["export-gguf", str(place.stage / "merged"), "-o", "gg"]
    return Attack(words, together=[words], winners=1)


def runs(place: Place, chance: random.Random) -> Attack:
    """Two trainings into one run's folder."""
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1, max_steps: 6}\n",
        data=place.stage / "rows.jsonl",
    )
    words = ["train", "recipe.yaml"]
    return Attack(words, together=[words] * chance.choice([1, 2]), winners=1)


def resumed(place: Place, chance: random.Random) -> Attack:
    """A run is resumed twice at once, or merged while it is resumed."""
    run = place.run()
    change(run / "record.json", status="running")
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    words = [
        "train",
        "recipe.yaml",
        "--resume",
        "--allow-changes",
        "training.max_steps",
        "--set",
        "training.max_steps=6",
    ]
    if chance.random() < 0.5:
        return Attack(words, together=[words])
    return Attack(words, together=[["merge", str(run / "adapter"), "out"]])


def one_cache(place: Place, chance: random.Random) -> Attack:
    """The same rows prepared by several at once: all of them go on."""
    place.recipe(data=place.stage / "rows.jsonl")
    words = ["check", "recipe.yaml"]
    others = [words] * chance.choice([1, 2, 3])
    return Attack(words, together=others, winners=len(others) + 1)


def copies(place: Place, chance: random.Random) -> Attack:
    """One recipe's copy by several: one wins."""
    words = ["recipes", "copy", "own-data", "mine.yaml"]
    return Attack(words, together=[words] * chance.choice([1, 2, 3]), winners=1)


def read_while_made(place: Place, chance: random.Random) -> Attack:
    """What is being made is read: it is there whole, or not at all."""
    adapter = str(place.stage / "adapter")
    readers = [
        ["generate", "out", "--prompt", "x", "--max-new-tokens", "2"],
        ["verify", "out", adapter],
        ["merge", "out", "out2"],
        ["export-gguf"],
    ]
    return Attack(["merge", adapter, "out"], together=[chance.choice(readers)])


def source_is_output(place: Place, chance: random.Random) -> Attack:
    """What is read is what is written."""
    adapter = place.copy("adapter")
    merged = place.copy("merged")
    words = chance.choice([["merge", str(adapter), str(adapter)], ["convert", "adapter", "adapter", "--r", "1"], ["combine", "adapter", str(place.stage / "second"), "adapter"],
                           ["extract", str(place.stage / "base"), str(merged), str(merged)], ["merge", "adapter", "adapter/out"], ["convert", "adapter", "adapter/."],
                           ["merge", "adapter", "."], ["merge", "adapter", ".."], ["merge", "adapter", "/"], ["merge", "adapter", ""], ["convert", "adapter", "./x/../adapter"]])  # fmt: skip
    return Attack(words)


ATTACKS = [
    one_output, spelled_otherwise, runs, one_cache, copies, source_is_output, one_output, resumed, read_while_made, one_output,
    one_output, spelled_otherwise, exports,
]  # fmt: skip
