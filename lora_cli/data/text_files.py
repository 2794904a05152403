"""Read the lines of a text file within limits; what is no file of rows, whatever its name says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lora_cli.common import LoraError, files, quote
from lora_cli.data.json_text import LONGEST

BATCH = 1000
"""Lines between two looks at how much was unpacked."""
LARGEST = 2**25
"""Bytes, over which what was packed may not be over RATIO times its file. Text is packed to a
fifth, seldom to a thirtieth."""
RATIO = 40
WEB_PAGE = "a web page, not a file of rows"
BEGINNINGS = (
    (rb"version https://git-lfs\.github\.com/", "a pointer of Git LFS, not the file itself"),
    (rb"\s*(?i:<!doctype html|<html)", WEB_PAGE),
    (rb"PK\x03\x04", "a ZIP archive, as Excel's files are"),
)
"""How files begin that are no rows, whatever they are called."""
REMEDIES = (
    "git lfs pull --include {name}, in its repository",
    "give the address that its download has, not that of the page about it",
    "unzip -l {file} lists what is in it; a table goes out of Excel by Save as, CSV UTF-8",
)


def refuse_no_rows(file: Path, is_text: bool) -> None:
    """Raise LoraError for a file that was given the name of a file of rows, and is none; of texts,
    a web page may be one."""
    with file.open("rb") as stream:
        head = stream.read(64)
    for (beginning, what), remedy in zip(BEGINNINGS, REMEDIES):
        if re.match(beginning, head) and not (is_text and what == WEB_PAGE):
            hint = remedy.format(name=quote(file.name), file=quote(file))
            raise LoraError(f"{file} is {what}", hint)


def walk_lines(file: Path, stream: TextIO) -> Iterator[str]:
    """Yield the lines. Raises LoraError for one that is too long, and for a packed file that grows
    to many times its size."""
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise LoraError(
                f"{file}:{number}: a line of over {LONGEST:,} characters",
                "write it as several rows",
            )
        if number % BATCH == 0:
            refuse_bomb(file, stream)
        yield line


def refuse_bomb(file: Path, stream: TextIO) -> None:
    """Raise LoraError for a packed file that has grown to more than any text is packed to."""
    most = max(LARGEST, RATIO * file.stat().st_size)
    if stream.buffer.tell() > most:
        raise LoraError(
            f"{file} unpacks to over {most >> 20:,} MiB, {RATIO} times its size",
            f"if it is what it should be: gunzip {quote(file)}",
        )


def suggest_edit(file: Path | None, convert: str, prefix: str = "lines-") -> str:
    """Return the hint that makes another file of one by a command that reads what it is given, such
    as iconv; of what comes by a pipe (None), that the command goes before."""
    if file is None:
        return f"{convert} before it"
    is_packed = file.suffix.lower() == ".gz"
    name = f"{prefix}{file.stem if is_packed else file.name}"
    if prefix == "lines-":
        name = f"{name.removesuffix('.json')}.jsonl" if name.endswith(".json") else name
    other = name if is_fetched(file) else file.with_name(name)
    if is_packed:
        return f"gzip -dc {quote(file)} | {convert} > {quote(other)}; then name {quote(other)}"
    return f"{convert} < {quote(file)} > {quote(other)}; then name {quote(other)}"


def show_line(file: Path, line: int) -> str:
    """Return the command that shows a line of a text file, from 1."""
    if file.suffix.lower() == ".gz":
        return f"gzip -dc {quote(file)} | sed -n {line}p"
    return f"sed -n {line}p {quote(file)}"


def is_fetched(file: Path) -> bool:
    """Return whether it is the cache's copy of another machine's file, which nobody is to mend."""
    return file.is_relative_to(files.find_cache_home())
