"""The card of an adapter, a merged model or a GGUF file: its README.md, made from its record.

Its doors, in the order a reader needs them:

    write_card              the card of a folder, written into it at saving
    read_facts, Facts       what a folder or file says of itself; read_export a GGUF
    find_evaluations, read_evaluation
                            what `lora evaluate` found of it
    make_card, is_edited    the card, with what a person wrote in the one before it
    parse_license           the license that a card names
    trim_paths, is_public_name, name_file
                            records without places of this machine
    CARD                    the file's name
"""

from lora_cli.card.evaluations import find_evaluations, read_evaluation
from lora_cli.card.facts import CARD, Facts, parse_license, read_export, read_facts
from lora_cli.card.portable import is_public_name, name_file, trim_paths
from lora_cli.card.renew import is_edited, make_card
from lora_cli.card.write import write_card

__all__ = [
    "CARD",
    "Facts",
    "find_evaluations",
    "is_edited",
    "is_public_name",
    "make_card",
    "name_file",
    "parse_license",
    "read_evaluation",
    "read_export",
    "read_facts",
    "trim_paths",
    "write_card",
]
