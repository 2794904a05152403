"""A task for the real model: orders in many wordings, answered with JSON.

Every row has another customer and, where that fits, another wording: what is asked of the model is
the form of the answer, and to copy out of the question. Drawn by a seed, so that the rows held out
are nobody's training rows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FIRST = (
    "Ada Ben Carla Dario Elif Femi Greta Hugo Ines Jonas Kemal Lena Mira Noor Otto Pilar".split()
)
LAST = "Okafor Lindqvist Marino Novak Osei Park Quiroga Rossi Silva Tanaka Ueda Vogel Weber Yilmaz".split()
CITIES = (
    "Lisbon Oslo Turin Graz Leeds Quito Hanoi Dakar Bergen Lyon Osaka Malaga Tartu Cork".split()
)
ITEMS = "lamp chair kettle blanket notebook bicycle helmet radio vase basket ladder mirror".split()
COLOURS = "red blue green black white yellow grey purple".split()
LAYOUTS = (
    "{name} from {city} wants {quantity} {colour} {item}s.",
    "Please send {quantity} {item}s in {colour} to {name}, {city}.",
    "Order: {quantity} x {item} ({colour})\nCustomer: {name}\nCity: {city}",
    "Hi, this is {name}. Could I get {quantity} {colour} {item}s delivered to {city}?",
    "{city}, Monday. {name} asks for {quantity} {item}s, {colour} ones.",
    "item={item}; colour={colour}; quantity={quantity}; name={name}; city={city}",
)
KEYS = ("name", "city", "item", "colour", "quantity")


def write_rows(folder: Path, num_train: int, num_held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """Write rows to train on and rows held out, {"prompt", "completion"}; no customer has two."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rows = [_make_row(rng, name) for name in rng.sample(names, num_train + num_held_out)]
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, some in zip(paths, (rows[:num_train], rows[num_train:]), strict=True):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in some), encoding="utf-8")
    return paths


def _make_row(rng: random.Random, name: str) -> dict[str, str]:
    order = {
        "name": name,
        "city": rng.choice(CITIES),
        "item": rng.choice(ITEMS),
        "colour": rng.choice(COLOURS),
        "quantity": rng.randint(2, 99),
    }
    prompt = f"Write this order as JSON.\n{rng.choice(LAYOUTS).format(**order)}"
    return {"prompt": prompt, "completion": json.dumps({key: order[key] for key in KEYS})}
