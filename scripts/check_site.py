"""Every link of the built site leads somewhere, and no page fetches anything from elsewhere.

    python scripts/check_site.py build/site

Reads the HTML as a browser would get it: each `href` and `src` that stays in the site must be a
file, each anchor an id on its page. What a browser would fetch by itself (scripts, styles,
pictures, fonts) must be in the site. Exit 1 with a line for each that is wrong.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

FETCHED = {"script", "img", "iframe", "source", "video", "audio", "embed"}
FETCHED_LINKS = {"stylesheet", "preload", "preconnect", "icon", "manifest", "modulepreload"}


class Reference(NamedTuple):
    """What an element refers to, and whether a browser fetches it unasked."""

    target: str
    fetched: bool


class PageReader(HTMLParser):
    """Collects a page's ids and references."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.references: list[Reference] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one element is called and refers to."""
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        fetched = tag in FETCHED or bool(FETCHED_LINKS & set(given.get("rel", "").split()))
        for name in ("href", "src"):
            if name in given and tag != "base":
                self.references.append(Reference(given[name], fetched))


def main(site: Path) -> int:
    """Check all pages below `site`; the exit code."""
    pages = {
        path.resolve(): PageReader(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }
    problems = [
        f"{path.relative_to(site.resolve())}: {problem}"
        for path, page in pages.items()
        for reference in page.references
        for problem in find_problems(site, path, reference, pages)
    ]
    problems += find_fetching_styles(site)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    links = sum(len(page.references) for page in pages.values())
    print(f"{len(pages)} pages, {links} links, {len(problems)} of them wrong")
    return 1 if problems or not pages else 0


def find_problems(
    site: Path, path: Path, reference: Reference, pages: dict[Path, PageReader]
) -> list[str]:
    """What is wrong with one reference of the page at `path`: nothing, or a line."""
    parts = urlsplit(reference.target)
    if parts.scheme in ("http", "https", "mailto") or parts.netloc:
        return [f"fetches {reference.target}"] if reference.fetched else []
    if parts.scheme:  # data:
        return []
    there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if parts.path.startswith("/"):  # of the page for what is not there, served at any depth
        there = (site / unquote(parts.path)[1:]).resolve()
    if not there.is_file():
        return [f"{reference.target} is no file"]
    anchor = unquote(parts.fragment)
    if anchor and there in pages and anchor not in pages[there].ids:
        return [f"{reference.target} has no such anchor"]
    return []


def find_fetching_styles(site: Path) -> list[str]:
    """Style sheets that fetch something from elsewhere."""
    pattern = re.compile(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')]*)")
    return [
        f"{path.relative_to(site)}: fetches {address}"
        for path in site.rglob("*.css")
        for address in pattern.findall(path.read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
