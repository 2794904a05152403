"""A page as its reader follows it: files written, commands typed in one folder from top to bottom,
what they print compared with what the page shows.

    sh fence              commands, a line each (`\\` at a line's end goes on)
    any fence right after its output, stdout and stderr as they came
    title="NAME"          a file that the reader writes, or that the page shows: it is written

A comment before a fence says what a reader need not see:

    <!-- varies: 0.0041 in 0..0.05; Ada like \\w+ -->   where another run prints otherwise
    <!-- exit: 2 -->       how the last command ends, if not well
    <!-- typed: TEXT -->   what is typed into it (\\n ends a line)
    <!-- alone: WHY -->    a fence whose lines are typed in an empty environment, by test_pip_lines.py
    <!-- small: WHY -->    a fence before which the large base that pages name becomes a small one
    <!-- slow: WHY -->     a fence that is run only where outputs are compared too
    <!-- quoted from: PAGE --> a fence whose commands and lines are on a page that is followed
    <!-- after: PAGE -->   a page that is followed in the folder of another one, after that

In an output, a line of … stands for any lines, and … at a line's end for the rest of it. Times,
rates, amounts of memory, dates and digests are compared in their form. Spaces are one space.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent.parent
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
DURATION = r"(?:\d+h)?(?:\d+m)?\d+(?:\.\d+)?(?: ?ms| ?s| min|m)\b"
MEMORY = rf"{NUMBER} (?:B|KB|MB|GB|KiB|MiB|GiB)\b"
DATE = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?Z?)?"
DIGEST = r"\b(?=[a-f]*\d)[0-9a-f]{8,64}\b"
RATE = rf"{NUMBER}(?= (?:tokens/s|rows/s|a second)\b)"
FORMS = (DATE, DIGEST, RATE, MEMORY, DURATION)
"""What differs from run to run and machine to machine wherever it stands, and its form."""


class Varying(NamedTuple):
    """A text of a shown output that may be another: a number in a range, or what a pattern
    matches."""

    shown: str
    pattern: str
    low: float = 0.0
    high: float = 0.0


class Step(NamedTuple):
    """One fence: `kind` is run, file, quoted or alone."""

    kind: str
    line: int
    text: str
    output: str | None = None
    name: str = ""
    status: int = 0
    typed: str = ""
    why: str = ""
    varies: tuple[Varying, ...] = ()
    is_slow: bool = False
    is_small: bool = False

    @property
    def commands(self) -> list[str]:
        """The commands of the fence."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if line.strip() and line[0] != "#"]


def read_page(path: Path) -> list[Step]:
    """The steps of a page in order. ValueError where a comment says what is not known."""
    steps: list[Step] = []
    said: dict[str, str] = {}
    after_commands = False
    for token in MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "html_block":
            said |= read_comment(token.content)
            continue
        if token.type == "fence":
            line = (token.map or [0])[0] + 1
            if after_commands and token.info != "sh" and "title=" not in token.info:
                steps[-1] = steps[-1]._replace(
                    output=token.content, varies=steps[-1].varies + read_varying(said)
                )
                after_commands = False
            else:
                steps += make_step(token.info, token.content, line, said)
                after_commands = token.info == "sh"
        elif token.level == 0 and token.nesting >= 0:
            after_commands = False
        said = {} if token.type == "fence" else said
    return steps


def find_chain(path: Path) -> list[Path]:
    """The pages that are followed in one folder for this one: those before it, and itself."""
    found = re.search(r"<!-- after: (\S+) -->", path.read_text(encoding="utf-8"))
    return [*(find_chain(path.parent / found[1]) if found else []), path]


def read_comment(html: str) -> dict[str, str]:
    """What a comment says of the next fence."""
    known = "varies|exit|typed|alone|small|slow|quoted from|after"
    found = re.fullmatch(rf"\s*<!-- ({known}): (.*?) -->\s*", html, re.S)
    if not found and re.match(r"\s*<!-- ", html):
        raise ValueError(f"a comment that is none of {known}: {html}")
    return {found[1]: found[2]} if found else {}


def make_step(info: str, text: str, line: int, said: dict[str, str]) -> list[Step]:
    """The step of one fence; none where it only shows something."""
    title = re.search(r'title="([^"]+)"', info)
    if info == "sh" and "alone" in said:
        return [Step("alone", line, text, why=said["alone"])]
    if info == "sh" and "quoted from" in said:
        return [Step("quoted", line, text, why=said["quoted from"])]
    if info == "sh":
        typed = said.get("typed", "").replace("\\n", "\n")
        status = int(said.get("exit", 0))
        run = Step("run", line, text, status=status, typed=typed, is_slow="slow" in said)
        return [run._replace(varies=read_varying(said), is_small="small" in said)]
    return [Step("file", line, text, name=title[1])] if title else []


def read_varying(said: dict[str, str]) -> tuple[Varying, ...]:
    """What a comment says may vary."""
    found = []
    for part in filter(None, (each.strip() for each in said.get("varies", "").split(";"))):
        if ranged := re.fullmatch(r"(.+) in (\S+)\.\.(\S+)", part):
            found.append(Varying(ranged[1], NUMBER, float(ranged[2]), float(ranged[3])))
        elif like := re.fullmatch(r"(.+?) like (.+)", part):
            found.append(Varying(like[1], like[2]))
        else:
            raise ValueError(f"neither “in LOW..HIGH” nor “like PATTERN”: {part}")
    return tuple(found)


def compare(step: Step, printed: str) -> str:
    """What is wrong with the output of a step: nothing, or a text."""
    shown = step.output or ""
    unused = [each.shown for each in step.varies if each.shown not in shown]
    if unused:
        return f"the page shows no {', '.join(unused)}, which it says varies"
    pattern, ranges = make_pattern(shown, step.varies)
    found = re.fullmatch(pattern, squeeze(printed))
    if not found:
        return f"printed\n{printed}\nwhere the page shows\n{shown}\n{find_first(step, printed)}"
    for number, each in ranges.items():
        value = float(found[number].replace(",", ""))
        if not each.low <= value <= each.high:
            return f"{found[number]} is not within {each.low}..{each.high} (shown: {each.shown})"
    return ""


def find_misquoted(quoted: Step, steps: list[Step]) -> list[str]:
    """What a quoted fence has that the steps of its page do not show: a command, or a line of an
    output that does not follow the line before it there."""
    own = [step for step in steps if set(step.commands) & set(quoted.commands) and step.output]
    typed = {command for step in steps if step.kind == "run" for command in step.commands}
    shown = iter(line for step in own for line in squeeze(step.output or "").splitlines())
    lines = [line for line in squeeze(quoted.output or "").splitlines() if line.strip(" …")]
    wrong = [command for command in quoted.commands if command not in typed]
    return wrong + [line for line in lines if line not in shown]  # `in` goes on where it was


def find_first(step: Step, printed: str) -> str:
    """The first shown line that no printed line is like, for whoever reads the failure."""
    lines = squeeze(printed).splitlines()
    for line in squeeze(step.output or "").splitlines():
        varies = tuple(each for each in step.varies if squeeze(each.shown).strip() in line)
        pattern = make_pattern(line, varies)[0]
        if line != "…" and not any(re.fullmatch(pattern, f"{each}\n") for each in lines):
            return f"first line that is not there: {line}"
    return "every line is there, in another order or with others between"


def squeeze(text: str) -> str:
    """The text with single spaces, none at a line's end; rules of a table are of one length."""
    lines = [re.sub(r"(?<!\S)-{2,}(?!\S)", "---", line) for line in text.split("\n")]
    lines = [re.sub(r"(?<=\S) +", " ", line).rstrip() for line in lines]
    return "\n".join(lines).rstrip("\n") + "\n"


def make_pattern(shown: str, varies: tuple[Varying, ...]) -> tuple[str, dict[str, Varying]]:
    """A pattern for what a page shows, and the groups of it that have a range."""
    ranges: dict[str, Varying] = {}
    held: list[str] = []

    def hold(pattern: str) -> str:
        held.append(pattern)
        return f"\ue000{len(held) - 1}\ue001"

    text = squeeze(shown)
    for each in sorted(varies, key=lambda each: -len(each.shown)):
        shown_as = re.escape(squeeze(each.shown).strip())
        parts = re.split(rf"(?<![\w.\ue000]){shown_as}(?![\w])", text)
        joined = parts[0]
        for part in parts[1:]:
            name = f"g{len(held)}"
            ranges |= {name: each} if each.pattern == NUMBER else {}
            joined += hold(f"(?P<{name}>{each.pattern})") + part
        text = joined
    for form in FORMS:
        text = re.sub(form, lambda _, form=form: hold(form), text)
    escaped = re.escape(text).replace("\\\n", "\n")
    escaped = re.sub(r"(?m)^\\?…\n", r"(?:.*\\n)*?", escaped)
    escaped = re.sub(r"(?:\\ )?…(?=\n)", ".*", escaped)
    return re.sub("\ue000(\\d+)\ue001", lambda match: held[int(match[1])], escaped), ranges
