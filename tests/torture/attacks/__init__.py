"""What strangers, signals and neighbours may do to `lora`: eleven kinds of attack, a module each.

A module's `ATTACKS` are functions (place, chance) -> Attack: they write what a stranger sends into
a case's folders, drawing from `chance` what is where, and say which command is given it.
`tests/torture/attack.py` runs them and looks at what became of everything.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = (
    "screen", "records", "unbounded", "links", "leftovers", "neighbours", "secrets", "injection",
    "size", "crashes", "gguf_bases",
)  # fmt: skip


@dataclass
class Attack:
    """One command and what it is run in; what may come of it."""

    arguments: list[str]
    stdin: bytes = b""
    environment: dict[str, str] = field(default_factory=dict)
    fresh: bool = False
    """A process of its own, whose libraries read the environment and the limits as they start."""
    surroundings: list[tuple[str, Any]] = field(default_factory=list)
    """What the process is put into before it begins: ("umask", 0), ("close", 1), ("limit NOFILE",
    64), …"""
    together: list[list[str]] = field(default_factory=list)
    """Commands that run at the same time."""
    killed: float | None = None
    """kill -9 so many seconds after the start; then the command is run again, and judged."""
    program: str | None = None
    """Python that is run in the command's place."""
    codes: tuple[int, ...] = (0, 1, 2)
    winners: int | None = None
    """How many of the commands that run together end with 0."""
    secrets: list[str] = field(default_factory=list)
    """What may be neither said nor written."""
    unquoted: list[str] = field(default_factory=list)
    """Words of the stranger's that no shown command may have as words of its own."""
    output: str | None = None
    """What is not there after a failure, in the work folder."""
    absent: list[str] = field(default_factory=list)
    """What is not there after the end, in the work folder."""
    files: dict[str, str] = field(default_factory=dict)
    """What a file in the work folder may not match, as a regular expression."""
    modelfile: str | None = None
    """A Modelfile in the work folder, which says no more than what lora writes."""
    bug: bool = False
    """A bug's report, with its traceback, is what should be said."""
    dequantises: bool = False
    """Whether a GGUF file is read as a base, in processes of its own that import anew."""
    said: str | None = None
    """What must be said, as a regular expression."""

    @property
    def opens_gguf(self) -> bool:
        """Whether a process of llama.cpp's is started."""
        return any(word.endswith(".gguf") for word in self.arguments)

    @property
    def is_long(self) -> bool:
        """Whether it starts other programs, which import what is imported here."""
        return self.fresh or self.opens_gguf or "export-gguf" in self.arguments


Make = Callable[["Place", random.Random], Attack]


@dataclass(frozen=True)
class Place:
    """A case's folders: `work`, which is its current one, and what nobody may change beside it."""

    root: Path
    stage: Path
    """Sound artefacts to copy: base, other, tuned, adapter, dora, run, merged, model.gguf,
    rows.jsonl."""

    def __getattr__(self, name: str) -> Path:
        if name in ("work", "victim", "home", "tmp", "cache"):
            return self.root / name
        raise AttributeError(name)

    def copy(self, name: str, target: str | None = None) -> Path:
        """Copy an artefact of the stage into the work folder."""
        source, path = self.stage / name, self.work / (target or name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, path, symlinks=True)
        else:
            shutil.copy(source, path)
        return path

    def adapter(self, name: str = "adapter", base: object = None, kind: str = "adapter") -> Path:
        """Copy a foreign adapter that names `base`, or the stage's."""
        path = self.copy(kind, name)
        return (
            change(path / "adapter_config.json", base_model_name_or_path=str(base)).parent
            if base
            else path
        )

    def rows(self, name: str = "rows.jsonl", rows: list[Any] | None = None) -> Path:
        """Write rows, a line of JSON each."""
        path = self.work / name
        rows = rows if rows is not None else [{"prompt": "ask", "completion": "answer"}] * 4
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def run(self) -> Path:
        """Copy the run's folder, as if it had been made where it is."""
        folder = self.copy("run")
        for path in (
            folder / "record.json",
            folder / "recipe.yaml",
            *folder.rglob("lora_record.json"),
        ):
            path.write_text(path.read_text().replace(str(self.stage / "run"), str(folder)))
        return folder

    def recipe(
        self,
        text: str = "",
        base: object = None,
        data: object = None,
        name: str = "recipe.yaml",
        adapter: object = None,
    ) -> Path:
        """Write a recipe of two steps on a base or an adapter; `text` adds to it or replaces what it
        says."""
        data = data or (self.work / "rows.jsonl")
        if data == self.work / "rows.jsonl" and not data.exists():
            self.rows()
        model = (
            {"adapter": str(adapter)}
            if adapter
            else {"name_or_path": str(base or self.stage / "base")}
        )
        training = {
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
            "max_length": 64, "save_strategy": "no",
        }  # fmt: skip
        written = {
            "model": model,
            "data": {"path": str(data)},
            "training": training,
            "output_dir": str(self.work / "run"),
        }
        sound = "sound.yaml" if name == "recipe.yaml" else f"sound-{Path(name).stem[:9]}.yaml"
        (self.work / sound).write_text(json.dumps(written))
        path = self.work / name
        path.write_text(f"extends: {json.dumps(sound)}\n{text}")
        return path


def change(path: Path, **values: Any) -> Path:
    """Replace values of a JSON mapping; lone surrogates are written as escapes."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


def write_tensors(
    path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata or {"format": "pt"})
    return path


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file whole."""
    from safetensors.torch import load_file

    return load_file(path)


def raw_safetensors(header: dict[str, Any] | bytes, size: int = 0) -> bytes:
    """A safetensors file with whatever header, and so many bytes of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """Brackets in brackets."""
    return opening * depth + closing * depth


def spread(value: Any, chance: random.Random, odd: Callable[[], Any], share: float = 0.2) -> Any:
    """The JSON value with some of its parts, at any depth, replaced by odd ones."""
    if chance.random() < share:
        return odd()
    if isinstance(value, dict):
        return {key: spread(inner, chance, odd, share) for key, inner in value.items()}
    if isinstance(value, list):
        return [spread(inner, chance, odd, share) for inner in value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key's path in a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    else:
        inner = []
    for key, each in inner:
        found += places(each, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another one at the path; `...` takes the key away."""
    if not path:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del made[path[0]]
    else:
        made[path[0]] = put(made[path[0]], path[1:], new)
    return made


ESCAPES = (
    "\x1b[2J", "\x1b]52;c;Zm9yZ2Vk\x07", "\x1b]8;;http://forged.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]0;forged title\x07", "\x9b31m", "\x85", "\u202egnp.exe", "\u2066x\u2069", "\u200f",
    "\u061c", "\x08\x08\x08", "\x7f", "\x0b", "\x0c", "\u2028error: forged", "\u2029warning: forged",
    "\rerror: forged", "x\nerror: forged line\n\nhint: forged", "x\r\nwarning: forged", "\x1bc",
    "\x1b[1A\x1b[2Kerror: forged", "\x0e", "\x07", "\x1b[8m", "\u202d\u2067", "\x90q\x9c", "\x1d", "\x1c",
)  # fmt: skip
"""What moves, colours, hides or forges on a terminal."""


def draw_text(chance: random.Random) -> str:
    """A text that a terminal must not get: one escape or two amid words."""
    made = f"see{chance.choice(ESCAPES)}here"
    return made + chance.choice(ESCAPES) if chance.random() < 0.3 else made


SHELL = (
    "$(touch pwned)", "`touch pwned`", "; touch pwned", "| touch pwned", "&& touch pwned", "> pwned",
    "' ; touch pwned ; '", '" ; touch pwned ; "', "x y", "$HOME", "*", "~", "!!", "#", "\ttouch pwned",
    "$'\\x74ouch pwned'", "<(touch pwned)", "{touch,pwned}", "\\", "'", '"',
)  # fmt: skip


def link(path: Path, target: object) -> Path:
    """Put a link where a file or folder was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(str(target))
    return path


def special(path: Path, kind: str, victim: Path) -> Path:
    """Put something that is no plain file of the folder's where a file was."""
    import socket

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's name is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(before)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.write_text("{}")
        path.chmod(0)
    else:
        target = {
            "secret": victim / "secret.txt", "loop": path.name, "dangling": "nowhere/at/all",
            "zero": "/dev/zero", "tty": "/dev/tty", "random": "/dev/urandom", "stdin": "/dev/stdin",
            "environ": "/proc/self/environ", "memory": "/proc/self/mem", "out": "../victim/secret.txt",
            "victim": victim,
        }[kind]  # fmt: skip
        path.symlink_to(str(target))
    return path


SPECIAL = (
    "pipe", "socket", "folder", "secret", "loop", "dangling", "zero", "random", "environ", "memory",
    "out", "victim", "tty",
)  # fmt: skip
