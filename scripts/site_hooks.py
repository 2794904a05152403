"""What mkdocs does not know of this repository: where its navigation is written, and that pages
link to files beside docs/.

mkdocs calls these functions by their names (`hooks:` in mkdocs.yml). The navigation is the links of
each section's index.md, in their order. A page may link to any file of the repository, as it has to
on a forge: pages of the root become pages of the site, other files are copied to files/.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "tutorials": "Tutorials",
    "how-to": "How to",
    "reference": "Reference",
    "explanation": "Explanation",
}
PROJECT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}
"""Pages of the root, and what they are called in the site."""
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
"""The path of a link or picture, without its anchor; addresses have a colon."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation of what the sections' index pages link to."""
    config.nav = [{"lora": "index.md"}]
    for folder, title in SECTIONS.items():
        if (ROOT / "docs" / folder / "index.md").is_file():
            config.nav.append({title: [f"{folder}/index.md", *list_pages(folder)]})
    config.nav.append({"Project": list(PROJECT.values())})
    return config


def list_pages(folder: str) -> list[str]:
    """The pages of a section that its index.md links to, in order, as paths below docs/."""
    named = [path for _, path in find_links((ROOT / "docs" / folder / "index.md").read_text())]
    own = [path for path in named if path.endswith(".md") and "/" not in path]
    return [f"{folder}/{path}" for path in dict.fromkeys(own)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the files that any page links to."""
    for path, uri in PROJECT.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for file in list(files.documentation_pages()):
        for _, link in find_links(Path(file.abs_src_path or "").read_text(encoding="utf-8")):
            path = find_in_repository(file.src_uri, link)
            if path and not is_page(path) and not files.get_file_from_path(f"files/{path}"):
                if not (ROOT / path).is_file():
                    raise PluginError(f"{file.src_uri} links to {path}, which is no file")
                copied = File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path))
                files.append(copied)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links that leave docs/ to where on_files put what they name."""
    lines = markdown.split("\n")
    for number, link in reversed(list(find_links(markdown))):
        path = find_in_repository(page.file.src_uri, link)
        if path is None:
            continue
        uri = path.removeprefix("docs/") if path.startswith("docs/") else PROJECT.get(path)
        there = os.path.relpath(uri or f"files/{path}", PurePosixPath(page.file.src_uri).parent)
        lines[number] = re.sub(rf"(?<=\]\(){re.escape(link)}(?=[)#])", there, lines[number])
    return "\n".join(lines)


def find_links(markdown: str) -> Iterator[tuple[int, str]]:
    """Every path that the page links to, with the index of its line; none of code."""
    fence = ""
    for number, line in enumerate(markdown.split("\n")):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        if not fence:
            yield from ((number, path) for path in LINK.findall(re.sub(r"`[^`]*`", "", line)))


def find_in_repository(uri: str, link: str) -> str | None:
    """The path from the root of what a page's link names; None where it stays in docs/, which
    mkdocs looks at by itself."""
    origin = {there: here for here, there in PROJECT.items()}.get(uri, f"docs/{uri}")
    path = os.path.normpath(PurePosixPath(origin).parent / link)
    return None if origin.startswith("docs/") and path.startswith("docs/") else path


def is_page(path: str) -> bool:
    """Whether what lies at this path of the repository is in the site under another name."""
    return path.startswith("docs/") or path in PROJECT
