"""The site of docs/: built strict, every link and anchor followed, nothing fetched from elsewhere;
and the same pages' links as a forge follows them, from file to file.

Hermetic: mkdocs in a process of its own, in a folder of the test. Alone: pytest tests/docs/test_site.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_site, site_hooks

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_leads_somewhere_and_nothing_is_fetched(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = check_site.main(site)
    said = capsys.readouterr()
    assert status == 0, said.err
    pages, links = re.findall(r"\d+", said.out)[:2]
    assert int(pages) >= 20
    assert int(links) >= 1000


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    for folder in site_hooks.SECTIONS:
        own = {path.name for path in (ROOT / "docs" / folder).glob("*.md")}
        assert own - {"index.md"} == {Path(page).name for page in site_hooks.list_pages(folder)}
        assert f'href="{folder}/index.html"' in home


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="gone.html">x</a>', "gone.html is no file"),
        ('<a href="#gone">x</a>', "#gone has no such anchor"),
        ('<a href="other.html#gone">x</a>', "other.html#gone has no such anchor"),
        ('<img src="https://elsewhere.example/a.png">', "fetches https://elsewhere.example/a.png"),
        ('<script src="//elsewhere.example/a.js"></script>', "fetches //elsewhere.example/a.js"),
        ('<link rel="stylesheet" href="https://x.example/a.css">', "fetches https://x.example"),
    ],
)
def test_what_is_wrong_is_found(
    body: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.html").write_text('<h1 id="here">x</h1>')
    (tmp_path / "index.html").write_text('<a href="other.html#here">x</a>')
    assert check_site.main(tmp_path) == 0
    (tmp_path / "index.html").write_text(body)
    assert check_site.main(tmp_path) == 1
    assert said in capsys.readouterr().err


def test_a_style_that_fetches_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("")
    (tmp_path / "a.css").write_text("@font-face {src: url('https://fonts.example/a.woff2')}")
    assert check_site.main(tmp_path) == 1


def list_anchors(page: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()), re.M
    ):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = sum(
            each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None
            for each in found
        )
        found.add(f"{slug}-{number}" if number else slug)
    return found


def test_links_lead_from_file_to_file() -> None:
    """As on a forge, where nothing is built."""
    followed = 0
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
        for path, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", text):
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.relative_to(ROOT)} links to {path}"
            if anchor and there.suffix == ".md":
                assert anchor in list_anchors(there), f"{page.relative_to(ROOT)}: {path}#{anchor}"
            followed += 1
    assert followed >= 40


def test_a_link_that_mkdocs_does_not_follow_ends_the_build(tmp_path: Path) -> None:
    """With --quiet it counts no warnings, and strict is nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[x](gone.md)\n")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: x\nstrict: true\nvalidation: {links: {not_found: warn}}\n"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "gone.md" in done.stderr
