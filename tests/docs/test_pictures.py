"""Pictures of the pages are there, and the drawn one is what its script draws now.

Hermetic: reads the repository. Alone: pytest tests/docs/test_pictures.py
"""

from __future__ import annotations

import re
from pathlib import Path

from scripts import make_rooms_picture

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_rooms_are_drawn_as_they_are() -> None:
    assert make_rooms_picture.PICTURE.read_text() == make_rooms_picture.make_picture(), "make docs"


def test_an_arrow_leads_down_and_every_import_has_a_way() -> None:
    imports = make_rooms_picture.find_imports()
    arrows = make_rooms_picture.drop_implied(imports)
    lines, ways = make_rooms_picture.lay_ways(make_rooms_picture.find_levels(imports), arrows)
    places = make_rooms_picture.place_all(lines)
    assert len(ways) > 20
    assert all(places[way[0]][1] < places[way[-1]][1] for way in ways)
    drawn = {room: {*below} for room, below in arrows.items()}
    for room, direct in imports.items():
        assert direct <= make_rooms_picture.find_reached(room, drawn)


def test_every_picture_is_shown() -> None:
    shown = {
        (path.parent / found).resolve()
        for path in DOCS.rglob("*.md")
        for found in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text())
    }
    of_site = "favicon.svg"  # which mkdocs.yml names
    kept = {path.resolve() for path in (DOCS / "pictures").iterdir() if path.name != of_site}
    assert len(kept) >= 2
    assert kept <= shown
    assert not [path for path in shown if not path.is_file()]
