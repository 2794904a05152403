"""Draw docs/pictures/rooms.svg: the rooms of the package and who imports whom, from the imports
themselves.

    python -m scripts.make_rooms_picture

A room stands above all that it imports. An arrow that a way over other rooms implies is left out.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean

from tests.test_design import EVERY, FLOOR, room_of

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "rooms.svg"
WIDE, HIGH = 118, 34
"""A room's box, in pixels."""
PASSING = 12
"""What an arrow takes of a line that it passes."""
SWEEPS = 12
BESIDE, BETWEEN = 22, 38
"""The gaps beside a box, and between two lines of them."""
MARGIN = 14
STYLE = """
  text { font: 14px sans-serif; text-anchor: middle; fill: #1b1f24 }
  rect { fill: #eef3fb; stroke: #4a6fa5; stroke-width: 1.2 }
  path { fill: none; stroke: #8a94a3; stroke-width: 1.2 }
  marker path { fill: #8a94a3; stroke: none }
  .ground { fill: #ffffff; stroke: none }
"""


def find_imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports, the lowest rooms first."""
    rooms = sorted(FLOOR, key=lambda room: (FLOOR[room], room))
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for each in EVERY:
        if each.room != room_of(each.source):
            found[each.room].add(room_of(each.source))
    return found


def find_reached(room: str, imports: dict[str, set[str]]) -> set[str]:
    """Return the rooms that `room` imports, itself or through others."""
    return imports[room].union(*(find_reached(each, imports) for each in imports[room]))


def drop_implied(imports: dict[str, set[str]]) -> dict[str, list[str]]:
    """Return the imports of each room without those that another of them reaches, in order."""
    return {
        room: sorted(
            each
            for each in direct
            if not any(each in find_reached(other, imports) for other in direct - {each})
        )
        for room, direct in imports.items()
    }


def find_levels(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the rooms in lines, the lowest first: each as low as what it imports allows."""
    level: dict[str, int] = {}
    for room in imports:
        level[room] = max((level[each] + 1 for each in imports[room]), default=0)
    lines: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for room, number in level.items():
        lines[number].append(room)
    return lines


def lay_ways(
    lines: list[list[str]], arrows: dict[str, list[str]]
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the lines with a place for each arrow that passes one (`upper>lower@line`), and each
    arrow as the places it goes through."""
    level = {room: number for number, line in enumerate(lines) for room in line}
    filled = [[*line] for line in lines]
    ways = []
    for upper, below in arrows.items():
        for lower in below:
            passed = range(level[upper] - 1, level[lower], -1)
            ways.append([upper, *(f"{upper}>{lower}@{number}" for number in passed), lower])
            for number, place in zip(passed, ways[-1][1:-1], strict=True):
                filled[number].append(place)
    return filled, ways


def sort_lines(lines: list[list[str]], ways: list[list[str]]) -> None:
    """Order each line so that what arrows join stands near each other: by the mean place of its
    neighbours, up and down in turn."""
    joined: dict[str, list[str]] = {}
    for way in ways:
        for one, other in pairwise(way):
            joined.setdefault(one, []).append(other)
            joined.setdefault(other, []).append(one)
    for _ in range(SWEEPS):
        for line in [*lines[1:], *reversed(lines[:-1])]:
            placed = {
                name: place / max(len(each) - 1, 1)
                for each in lines
                for place, name in enumerate(each)
            }
            line.sort(key=lambda name: (fmean(placed[each] for each in joined[name]), name))


def place_all(lines: list[list[str]]) -> dict[str, tuple[int, int]]:
    """Return the middle of each box, and of each place where an arrow passes a line."""
    widths = [[PASSING if "@" in name else WIDE for name in line] for line in lines]
    across = max(sum(each) + (len(each) - 1) * BESIDE for each in widths)
    places: dict[str, tuple[int, int]] = {}
    for number, (line, wide) in enumerate(zip(lines, widths, strict=True)):
        x = MARGIN + (across - sum(wide) - (len(wide) - 1) * BESIDE) // 2
        y = MARGIN + HIGH // 2 + (len(lines) - 1 - number) * (HIGH + BETWEEN)
        for name, each in zip(line, wide, strict=True):
            places[name] = (x + each // 2, y)
            x += each + BESIDE
    return places


def draw_arrow(points: list[tuple[int, int]]) -> str:
    """Return a curve from the lower edge of the first box through the gaps to the upper edge of the
    last."""
    x, y = points[0]
    drawn = f"M{x},{y + HIGH // 2}"
    for (x, y), (to_x, to_y) in pairwise(points):
        top, end = y + HIGH // 2, to_y - HIGH // 2
        bend = (end - top) // 2
        drawn += f" L{x},{top} C{x},{top + bend} {to_x},{end - bend} {to_x},{end - 2}"
    return f'<path d="{drawn}" marker-end="url(#tip)"/>'


def draw_room(room: str, place: tuple[int, int]) -> str:
    """Return a box with the room's name."""
    x, y = place
    return (
        f'<rect x="{x - WIDE // 2}" y="{y - HIGH // 2}" width="{WIDE}" height="{HIGH}" rx="5"/>\n'
        f'<text x="{x}" y="{y + 5}">{room}</text>'
    )


def make_picture() -> str:
    """Return the SVG."""
    imports = find_imports()
    arrows = drop_implied(imports)
    lines, ways = lay_ways(find_levels(imports), arrows)
    sort_lines(lines, ways)
    places = place_all(lines)
    width = max(places[room][0] for room in imports) + WIDE // 2 + MARGIN
    width = max(width, *(x + MARGIN for x, _ in places.values()))
    height = max(y for _, y in places.values()) + HIGH // 2 + MARGIN
    drawn = [draw_arrow([places[each] for each in way]) for way in ways]
    drawn += [draw_room(room, places[room]) for room in imports]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            "<title>The rooms of lora_cli: each imports only rooms below it</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
            f'<rect class="ground" width="{width}" height="{height}"/>',
            *drawn,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(make_picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
