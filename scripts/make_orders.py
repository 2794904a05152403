"""Write rows of a task that people have: an order in somebody's words, answered with JSON.

    python scripts/make_orders.py OUT [--train 320] [--held-out 200] [--seed 0]

writes, in an instant:

    OUT/train.jsonl      {"prompt": "Ada Okafor from Oslo wants 12 lamps.",
                          "completion": "{\"name\": \"Ada Okafor\", \"city\": \"Oslo\", …}"}
    OUT/held_out.jsonl   the same of other people, who want other things, and another number of them

No first name, last name, town, thing or number of a held-out row is in a training row, and no row
is there twice: what is learned is the form of the answer, and to copy out of a text one has not
seen. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Words of several tokens of SmolLM2's, and things that it splits alike after a space and after a
# quotation mark. Others have to be copied by letters that 135M parameters have hardly seen: trained
# on 320 or 480 rows, it copied 85 of 100 of those, and 97 of 100 of what is split alike.
FIRST = (
    "Carla Dario Elif Femi Greta Ines Jonas Kemal Lena Noor Pilar Sven Tomas Ursula Wanda Xenia "
    "Yusuf Zora Amir Farid Gita Hanna Karim Nadia Paula Quentin Rania Umar Viktor Willem Yara "
    "Zeno Dora Emil Fiona Goran Helga Isak Klaus Livia Milo Nora"
).split()
LAST = (
    "Okafor Lindqvist Marino Novak Osei Park Quiroga Rossi Silva Tanaka Ueda Vogel Weber Yilmaz "
    "Abbott Becker Castro Dupont Eriksen Ferrari Garcia Haddad Ivanov Jensen Kowalski Larsen "
    "Meyer Nguyen Olsen Petrov Romero Schmidt Andersen Bianchi Cohen Delgado Fischer Gupta "
    "Hansen Ibrahim Johansson Keller Lopez Moreau Nilsson Ortega Pereira Ramos Santos Torres "
    "Varga Wagner Aalto Bauer Conti Diaz Fontaine Greco Horvat Iyer Jovanovic Kaya Lund Mendez"
).split()
TOWNS = (
    "Turin Graz Quito Hanoi Dakar Bergen Osaka Malaga Tartu Porto Ghent Delft Riga Accra "
    "Seville Bilbao Utrecht Antwerp Malmo Aarhus Tampere Vilnius Krakow Gdansk Brno Zagreb "
    "Skopje Tirana Ankara Izmir Rabat Lagos Kampala Durban Chennai Jakarta Busan Taipei Hobart "
    "Bogota Caracas Cusco"
).split()
THINGS = (
    "armchairs artichokes backpacks bagels bandages barometers bathrobes beanbags binders "
    "blenders bookmarks bookshelves briefcases buckles candlesticks cardigans cashews chargers "
    "clipboards coasters colanders combs croissants crowbars cupboards doormats doughnuts "
    "drawers easels eggplants fishhooks flashlights flutes footstools funnels globes "
    "hairbrushes handbags handkerchiefs hourglasses jigsaws joysticks kettles keychains ladders "
    "ladles lettuces lightbulbs lipsticks loudspeakers megaphones metronomes moccasins mops "
    "mousepads mousetraps mugs nightgowns notepads nutcrackers oars pajamas paperclips "
    "penknives periscopes pincushions pineapples pitchforks placemats pliers ponchos pretzels "
    "projectors protractors radishes raincoats rakes razors sacks sandals scarfs scarves "
    "screwdrivers skewers snowshoes sofas spectacles staplers sweaters tablecloths tambourines "
    "teapots thimbles toasters toolboxes toothbrushes tripods trowels turnips typewriters "
    "ukuleles umbrellas vases vests violins waffles wardrobes wheelbarrows whistles whiteboards "
    "windbreakers yoyos zippers"
).split()
NUMBERS = range(2, 100)
LAYOUTS = (
    "{name} from {town} wants {number} {thing}.",
    "Please send {number} {thing} to {name}, {town}.",
    "Order: {number} x {thing}\nCustomer: {name}\nCity: {town}",
    "Hi, this is {name}. Could I get {number} {thing} delivered to {town}? Thanks!",
    "Monday, {town}. {name} asks for {number} {thing}.",
    "item={thing}; quantity={number}; name={name}; city={town}",
    "Dear shop,\nI need {number} {thing}. Ship them to {town}, please.\nBest wishes, {name}",
    "FROM: {name}\nSUBJECT: {thing}\n\n{number} pieces please, to our office in {town}.",
    "| customer | city | item | quantity |\n| {name} | {town} | {thing} | {number} |",
    "Call at 9:40: {name} ({town}) would like {number} of the {thing}.",
)
"""How orders are written. An answer has the same keys in the same order, whatever the layout, and
its values are copied as they are written."""


class Stock(NamedTuple):
    """What the rows of one file are drawn from, and no other file's."""

    first: Sequence[str]
    last: Sequence[str]
    towns: Sequence[str]
    things: Sequence[str]
    numbers: Sequence[int]


def divide_stock(rng: random.Random) -> tuple[Stock, Stock]:
    """Divide names, towns, things and numbers: two thirds of each are for training."""
    halves = []
    for kind in (FIRST, LAST, TOWNS, THINGS, NUMBERS):
        shuffled = rng.sample(list(kind), len(kind))
        cut = 2 * len(shuffled) // 3
        halves.append((shuffled[:cut], shuffled[cut:]))
    train, held_out = zip(*halves, strict=True)
    return Stock(*train), Stock(*held_out)


def make_row(rng: random.Random, stock: Stock) -> dict[str, str]:
    """Make a row {"prompt", "completion"}."""
    name, town = f"{rng.choice(stock.first)} {rng.choice(stock.last)}", rng.choice(stock.towns)
    thing, number = rng.choice(stock.things), rng.choice(stock.numbers)
    said = rng.choice(LAYOUTS).format(name=name, town=town, thing=thing, number=number)
    order = {"name": name, "city": town, "item": thing, "quantity": number}
    return {"prompt": said, "completion": json.dumps(order)}


def write_rows(folder: Path, num_train: int, num_held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl into `folder`; return their paths."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    numbers = (num_train, num_held_out)
    for path, stock, number in zip(paths, divide_stock(rng), numbers, strict=True):
        rows: dict[str, None] = {}  # as a set that keeps its order
        while len(rows) < number:
            rows[json.dumps(make_row(rng, stock))] = None
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return paths


def main() -> None:
    """Read the arguments and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--train", type=int, default=320, help="rows to train on (320)")
    parser.add_argument("--held-out", type=int, default=200, help="rows to be asked (200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_rows(args.out, args.train, args.held_out, args.seed)


if __name__ == "__main__":
    main()
