"""Write the card of what was just made into its folder."""

from __future__ import annotations

from pathlib import Path

from lora_cli.card.facts import CARD, read_facts
from lora_cli.card.renew import make_card
from lora_cli.common import files


def write_card(folder: Path, title: str) -> None:
    """Write README.md for the adapter or merged model in `folder`, which is to be called `title`,
    over what the libraries wrote there."""
    facts = read_facts(folder, title=title)
    files.write_text(folder / CARD, make_card(facts).text)
