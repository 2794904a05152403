"""What is wrong after a case: on the screen, in files, in what is left."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.torture.attacks import Attack
from tests.torture.attacks.running import Ended, Limits

FOLDERS = ("work", "victim", "home", "tmp", "cache")

RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a stranger's text may not bring to the screen; bytes that are not UTF-8 read as surrogates."""

FORGED = re.compile(r"^(?:error|warning|hint): forged", re.MULTILINE)

TRACES = re.compile(
    r"^Traceback \(most recent|^Exception ignored|panicked at|^Fatal Python error|This is a bug in lora"
    r"|leaked \w+ objects|^terminate called|Segmentation fault",
    re.MULTILINE,
)

STAGING = re.compile(
    r"^\..*\.tmp$|^\.rows-|^\.lora-|^lora-\w+-|^\.llama\.cpp-|^\.[^.]+\.[0-9a-z_]{8}$|^tmp\w{8}$"
)
"""Names that are made for a while."""


def list_tree(folder: Path, content: bool) -> dict[str, tuple[Any, ...]]:
    """Each name below a folder, with what it is; links are not followed."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        about: list[Any] = [stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)]
        if path.is_symlink():
            about.append(str(path.readlink()))
        elif stat.S_ISREG(status.st_mode):
            about += [status.st_size, status.st_mtime_ns]
            if content and status.st_size < 2**24:
                about.append(hashlib.sha256(path.read_bytes()).hexdigest())
        found[str(path.relative_to(folder))] = tuple(about)
    return found


def judge_case(
    root: Path, attack: Attack, before: dict[str, dict[str, tuple[Any, ...]]], ended: list[Ended],
    left: list[int], limits: Limits,
) -> tuple[list[str], str]:  # fmt: skip
    """Everything that is wrong after a case, and what was said."""
    faults, said = [], ""
    for number, each in enumerate(ended):
        out, err = read_said(root / f"io{number}")
        said += f"{err}{out}"
        faults += judge_end(each, attack, limits)
        faults += judge_screen(out, "stdout", attack.bug) + judge_screen(err, "stderr", attack.bug)
        faults += judge_commands(err, attack.unquoted)
    won = sum(not each.status for each in ended)
    if attack.winners not in (None, won):
        faults.append(f"{won} of {len(ended)} won, not {attack.winners}")
    if left and not any(each.stopped for each in ended):
        faults.append(f"left {len(left)} processes")
    after = {name: list_tree(root / name, name != "work") for name in FOLDERS}
    faults += judge_folders(root, attack, before, after, ended)
    faults += judge_secrets(root, attack, before["work"], after["work"], said)
    if attack.said and not re.search(attack.said, said):
        faults.append(f"does not say {attack.said}")
    return list(dict.fromkeys(faults)), said


def read_said(folder: Path) -> list[str]:
    """stdout and stderr, whatever bytes they are."""
    return [
        (folder / name).read_bytes().decode("utf-8", "surrogateescape")
        if (folder / name).exists()
        else ""
        for name in "12"
    ]


def judge_end(ended: Ended, attack: Attack, limits: Limits) -> list[str]:
    """Faults of how a command ended."""
    faults = []
    if ended.stopped:
        faults.append(ended.stopped)
    elif ended.status < 0 and ended.status not in attack.codes:
        faults.append(f"was ended by {signal.Signals(-ended.status).name}")
    elif ended.status not in attack.codes:
        faults.append(f"exit {ended.status}")
    if ended.seconds > limits.seconds and not ended.stopped:
        faults.append(f"took {ended.seconds:.1f} s of processor time")
    if ended.memory > limits.memory and not ended.stopped:
        faults.append(f"took {ended.memory >> 20} MiB of memory")
    return faults


def judge_screen(said: str, where: str, bug: bool = False) -> list[str]:
    """Faults of what was said."""
    faults = []
    if found := RAW.search(said):
        around = said[max(0, found.start() - 40) : found.end() + 20]
        faults.append(f"raw {found[0]!r} on {where}: {around!r}")
    lines = "\n".join(said.splitlines())
    if found := FORGED.search(lines):
        faults.append(
            f"a forged line on {where}: {lines[max(0, found.start() - 60) : found.end()]!r}"
        )
    if not bug and (found := TRACES.search(said)):
        last = [
            line for line in said.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)
        ]
        faults.append(f"a traceback: {last[-1][:150] if last else said[found.start() :][:150]!r}")
    return faults


def judge_commands(said: str, unquoted: list[str]) -> list[str]:
    """Faults of the commands that were shown: a stranger's words are no words of theirs."""
    faults = []
    for line in said.splitlines():
        shown = re.match(r"hint: (.*)|  ((?:llama-server|ollama|vllm|lora) .*)", line)
        if shown is None:
            continue
        command = shown[1] or shown[2]
        try:
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.commenters = ""
            words = [word.strip("`") for word in lexer]
        except ValueError:
            words = [word.strip("`'\"();") for word in command.split()]
        if found := [word for word in unquoted if word in words]:
            faults.append(f"{found[0]} is a word of a shown command: {line[:150]}")
    return faults


def judge_folders(
    root: Path, attack: Attack, before: dict[str, Any], after: dict[str, Any], ended: list[Ended]
) -> list[str]:
    """Faults of what was changed and left; what we ended could not tidy up."""
    faults, stopped = [], any(each.stopped for each in ended)
    for name in ("victim", "home") if stopped else ("victim", "home", "tmp"):
        names = {*before[name], *after[name]} - {"."}
        # pip asks rustc for its version, whose proxy makes this
        names = {each for each in names if Path(each).parts[0] != ".rustup"}
        if changed := sorted(x for x in names if before[name].get(x) != after[name].get(x)):
            what = "changed" if changed[0] in before[name] else "left"
            faults.append(f"{what} {name}/{changed[0]}, of {len(changed)}")
    for name in ("work", "cache"):
        made = [Path(each) for each in after[name] if each not in before[name] and not stopped]
        if staging := [path for path in made if any(map(STAGING.search, path.parts))]:
            faults.append(f"left {name}/{staging[0]}")
    failed = not stopped and all(each.status for each in ended)
    if failed and attack.output in set(after["work"]) - set(before["work"]):
        faults.append(f"failed, and left {attack.output}")
    return [*faults, *judge_made(root, attack, before, after)]


def judge_made(
    root: Path, attack: Attack, before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """Faults of what was made."""
    work = root / "work"
    made = {each: about for each, about in after["work"].items() if each not in before["work"]}
    faults = [f"{each} was made" for each in ("pwned", *attack.absent) if each in made]
    for each, pattern in attack.files.items():
        text = (work / each).read_text(errors="replace") if (work / each).is_file() else ""
        if found := re.search(pattern, text):
            faults.append(f"{each} has {found[0][:60]!r}")
    if attack.modelfile and (work / attack.modelfile).is_file():
        faults += judge_modelfile((work / attack.modelfile).read_text(encoding="utf-8"))
    for each, about in made.items():
        if stat.S_ISLNK(about[0]) and not (work / each).resolve().is_relative_to(work):
            faults.append(f"made a link out of the folder: {each}")
    closed = [
        each for each, about in after["cache"].items() if each != "." and not about[1] & 0o011
    ]
    for each, about in after["cache"].items():
        if any(each.startswith(f"{folder}/") for folder in closed):
            continue  # nobody else comes that far
        if each not in before["cache"] and not stat.S_ISLNK(about[0]) and about[1] & 0o022:
            faults.append(f"others may write to cache/{each}")
            break
    return faults


def judge_modelfile(text: str) -> list[str]:
    """Faults of a Modelfile as Ollama reads it: what it says beside what lora writes."""
    faults, names = [], Counter[str]()
    for name, value in read_modelfile(text):
        names[name] += 1
        known = {
            "FROM": value.startswith("./") and "evil" not in value,
            "TEMPLATE": True,
            "SYSTEM": True,
            "PARAMETER": re.match(r"stop ", value) is not None,
        }
        if not known.get(name, False):
            faults.append(f"the Modelfile says {name} {value[:60]!r}")
    if {name: names[name] for name in ("FROM", "TEMPLATE", "SYSTEM") if names[name] > 1}:
        faults.append(f"the Modelfile says some things twice: {dict(names)}")
    return faults


def read_modelfile(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a Modelfile with its value, by the rules of Ollama's parser/parser.go: a value
    ends with the first line at whose end its quotation is complete."""
    rest = re.sub(r"\r\n?", "\n", text)
    while rest := rest.lstrip(" \t\n"):
        line, _, after = rest.partition("\n")
        if line.startswith("#"):
            rest = after
            continue
        name, _, value = line.partition(" ")
        first, _, value = value.partition(" ") if name.upper() == "PARAMETER" else ("", "", value)
        while not is_quoted(value) and after:
            line, _, after = after.partition("\n")
            value += "\n" + line
        said = f"{first} {value.strip()}".lstrip()
        yield (name.upper() if is_quoted(value) else "an open quotation:"), said
        rest = after


def is_quoted(value: str) -> bool:
    """Whether a value is complete (parser.go: unquote)."""
    value = value.strip()
    if value.startswith('"""'):
        return len(value) >= 6 and value.endswith('"""')
    return not value.startswith('"') or len(value) >= 2 and value.endswith('"')


def judge_secrets(
    root: Path, attack: Attack, before: dict[str, Any], after: dict[str, Any], said: str
) -> list[str]:
    """Faults of what was told: secrets, and what links led to."""
    canary = (root / "victim" / "secret.txt").read_text().strip()
    faults = []
    for what, secret in [
        ("what a link led to", canary),
        *(("a secret", each) for each in attack.secrets),
    ]:
        if secret in said:
            faults.append(
                f"{what} on the screen: {said[max(0, said.index(secret) - 60) :][:120]!r}"
            )
        for name, paths in (
            ("work", changed_files(root / "work", before, after)),
            ("cache", all_files(root / "cache")),
            ("home", all_files(root / "home")),
        ):
            for path in paths:
                if path.stat().st_size < 2**24 and secret.encode() in path.read_bytes():
                    faults.append(f"{what} in {name}/{path.relative_to(root / name)}")
                    break
    return faults


def changed_files(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> list[Path]:
    """The plain files that are new or other than before."""
    return [
        folder / each for each, about in after.items()
        if stat.S_ISREG(about[0]) and before.get(each) != about and os.access(folder / each, os.R_OK)
    ]  # fmt: skip


def all_files(folder: Path) -> list[Path]:
    """The plain files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
