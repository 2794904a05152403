"""Find and run llama.cpp's converters; `install.py` installs them.

They are searched for in this order: the directory the user named (`--llama-cpp DIR`),
`$LLAMA_CPP_DIR`, the PATH, the managed copy. A directory is a llama.cpp checkout. A named directory
that does not hold what is needed is an error: the search never falls through to another llama.cpp
in silence.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.common import (
    LoraError,
    Progress,
    UsageError,
    children,
    files,
    find_nearest,
    quote_words,
)

VERSION = "0.3.36"
"""Release of llama-cpp-python whose source package carries the llama.cpp revision everything here
was tried with."""

KIND = 2
"""Counted up when more of that revision is installed than before, so that an older copy is not
taken for it."""

INSTALLED = re.compile(r"LICENSE|convert_(hf|lora)_to_gguf\.py|(conversion|gguf-py)/.+")
"""Of that package's 4000 files, those that are installed."""
IMPORTED = re.compile(r"[^/]+(/__init__)?\.(pyc?|so|pyd)")
"""What else beside them Python would import before its own."""
DIGEST = "2aa7e2811a003ef9f11e4d6c8c25e028b2d3cc00f56af3be854163426f22e92d"
"""Of the managed copy, as `hash_installed` returns it."""

CONVERTER, LORA_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"

CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes by itself."""
EXACT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Which of these holds weights of a type of torch as they are."""

# What the tools say when they stop -> what it means, and what to do. The last line they printed is
# shown as well.
KNOWN_FAILURES = (
    (
        r"BPE pre-tokenizer was not recognized",
        "llama.cpp does not know this tokenizer: it recognises BPE tokenizers by a hash of what "
        "they produce",
        "keep the base model's own tokenizer, or point --llama-cpp at a newer llama.cpp that "
        "knows it",
    ),
    (
        r"Model (\S+) is not supported",
        r"llama.cpp's converter does not know the architecture \1",
        "a newer llama.cpp may know it: clone it and pass its folder with --llama-cpp DIR",
    ),
    (
        r"No module named '(\w+)",
        r"the converter needs the Python package \1",
        r"python -m pip install \1",
    ),
    (
        r"No space left on device|not enough space on the",
        "the disk is full",
        "make room, or write to another disk",
    ),
)


@dataclass(frozen=True)
class Found:
    """A tool and where it came from: `--llama-cpp`, `LLAMA_CPP_DIR`, `PATH` or `managed copy`."""

    path: Path
    source: str

    def __str__(self) -> str:
        return f"{self.path} ({self.source})"


def find_managed_home() -> Path:
    """Return the folder of the managed copy, present or not; the last number of its name is that of
    its layout."""
    return files.find_cache_home() / f"llama.cpp-{VERSION}-{KIND}"


def find_converter(directory: Path | None = None) -> Found:
    """Find a complete `convert_hf_to_gguf.py`.

    Complete means: the `conversion` package lies beside it where it imports that (older revisions
    are one file), and `gguf` lies beside it or is installed here; on the PATH a converter that is
    not complete does not count. Raises LoraError with the one command that mends it.
    """
    found = _search_converter(directory)
    if found is None:
        raise _missing_error(directory)
    return found


def spell_converter_type(name: str) -> str:
    """Return the converter's own spelling of `name`, in any case. Raises UsageError."""
    return pick(name, CONVERTER_TYPES)


def pick(name: str, known: Collection[str]) -> str:
    """Return the one of the GGUF types in `known` that `name` means, in any case. Raises
    UsageError."""
    by_upper = {each.upper(): each for each in known}
    if name.upper() in by_upper:
        return by_upper[name.upper()]
    close = find_nearest(name.upper(), by_upper)
    meant = f"; did you mean {by_upper[close]}?" if close else ""
    raise UsageError(f"unknown GGUF type {name!r}{meant}", f"known types: {', '.join(known)}")


def convert(
    model_dir: Path, outfile: Path, outtype: str, converter: Found, base: Path | None = None
) -> None:
    """Write the Hugging Face model in `model_dir` as the GGUF `outfile`, all at once or not at all.

    `outtype` is one of CONVERTER_TYPES. With `base`, the folder of a model, `model_dir` is a LoRA
    adapter of it. Runs in a process of its own, offline. Raises LoraError when the converter fails
    or leaves no GGUF; `outfile` is then untouched.
    """
    outtype = spell_converter_type(outtype)
    script = _choose_script(model_dir, converter, is_adapter=base is not None)
    outfile.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch_folder(outfile.parent.resolve()) as folder:
        made = folder / "base.gguf"
        command = _make_command(script, model_dir, made)
        command += ["--outtype", outtype]
        command += ["--base", str(base.resolve())] if base else []
        code, lines = run_command(
            command, f"converting to {outtype}", {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        )
        if code or not is_whole_gguf(made):
            shown = [part.replace(str(made), str(outfile.resolve())) for part in command]
            raise _failure_error(code, lines, shown)
        made.replace(outfile)


def _choose_script(folder: Path, converter: Found, is_adapter: bool) -> Path:
    """Return the converter for a model or an adapter; raise LoraError where `folder` holds no such
    thing, or that converter is missing."""
    script, wanted = converter.path, "config.json"
    if is_adapter:
        script, wanted = converter.path.with_name(LORA_CONVERTER), "adapter_config.json"
    if not (folder / wanted).is_file():
        raise LoraError(
            f"{folder} is not a model: it has no {wanted}", "pass the folder of a merged model"
        )
    if not script.is_file():
        raise LoraError(
            f"{converter} has no {script.name} beside it",
            "leave out --llama-cpp: lora setup-llama-cpp",
        )
    return script


def _make_command(script: Path, folder: Path, outfile: Path) -> list[str]:
    """Return the command line of a converter for a model or an adapter."""
    runner = Path(__file__).with_name("run_converter.py")
    words = (sys.executable, runner, script, folder.resolve(), "--outfile", outfile)
    return [str(word) for word in words]


def try_vocabulary(model_dir: Path, converter: Found) -> None:
    """Let the converter read configuration and tokenizer of `model_dir`, without weights: LoraError
    for an architecture or a tokenizer that it does not know."""
    with files.scratch_folder() as folder:
        command = _make_command(converter.path, model_dir, folder / "vocabulary.gguf")
        command += ["--vocab-only"]
        code, lines = run_command(
            command, "reading the vocabulary", {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        )
    if code:
        raise _failure_error(code, lines, command)


def run_command(
    command: Sequence[str], label: str, env: Mapping[str, str] | None = None
) -> tuple[int, list[str]]:
    """Run `command` under one progress line: (exit status, every line of its stdout and stderr).

    `env` is added to the environment. The percentage is read from what the program prints (`42%`).
    Raises LoraError when the program cannot be started.
    """
    progress, lines = Progress(), []
    with children.start(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # no compiled code is left in the managed copy, where it would count as changed
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:  # text mode: tqdm's \r ends a line too
            lines.append(line.rstrip())
            if step := re.search(r"(\d+)%", line):
                progress.update(f"{label}: {step[1]}%")
    progress.clear()
    return process.returncode, lines


def find_last_line(lines: Sequence[str]) -> str:
    """Return the line in which a failed program says why: its last exception or `ERROR:`, else its
    last line that does not come from a logger."""
    telling = [
        line
        for line in lines
        if line.strip() and not re.match(r"INFO:|WARNING:|\s*\w+:\s+\d+%", line)
    ]
    final = r"ERROR:|[\w.]+(Error|Exception):"
    errors = [line for line in telling if re.match(final, line)]
    return (
        re.sub(r"^ERROR:([\w.-]+:)?", "", (errors or telling)[-1]).strip()
        if telling
        else "it printed nothing"
    )


def _search_converter(directory: Path | None) -> Found | None:
    """As `find_converter`, but None where there is none."""
    if chosen := _choose_directory(directory):
        root, source = chosen
        return None if find_missing_part(root / CONVERTER) else Found(root / CONVERTER, source)
    on_path = shutil.which(CONVERTER)
    if on_path and not find_missing_part(script := Path(on_path).resolve()):
        return Found(script, "PATH")
    home = find_managed_home()
    if find_missing_part(home / CONVERTER):
        return None
    if hash_installed(home) != DIGEST:
        raise LoraError(
            f"{home} is not as it was installed: files in it were changed or added",
            "install it again: lora setup-llama-cpp",
        )
    return Found(home / CONVERTER, "managed copy")


def _choose_directory(directory: Path | None) -> tuple[Path, str] | None:
    """Return the directory the user named, and how; None where they named none."""
    if directory is not None:
        return directory.expanduser().resolve(), "--llama-cpp"
    named = os.environ.get("LLAMA_CPP_DIR")
    return (Path(named).expanduser().resolve(), "LLAMA_CPP_DIR") if named else None


def hash_installed(home: Path) -> str:
    """Return a hash of all files of a managed copy that converting runs or reads."""
    total = hashlib.sha256()
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        name = path.relative_to(home).as_posix()
        if INSTALLED.fullmatch(name) or IMPORTED.fullmatch(name):
            total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def find_missing_part(script: Path) -> str | None:
    """Return what keeps this converter from running, or None."""
    if not script.is_file():
        return CONVERTER
    split_up = re.search(
        r"^from conversion import", script.read_text(encoding="utf-8"), re.MULTILINE
    )
    if split_up and not (script.parent / "conversion").is_dir():
        return f"conversion/, which {CONVERTER} imports"
    if not (script.parent / "gguf-py").is_dir() and importlib.util.find_spec("gguf") is None:
        return "gguf-py/ (and no `gguf` package is installed)"
    return None


def _missing_error(directory: Path | None) -> LoraError:
    fix, chosen = "lora setup-llama-cpp", _choose_directory(directory)
    if chosen is None:
        lacking = find_missing_part(find_managed_home() / CONVERTER)
        return LoraError(f"no {lacking} was found: not on the PATH, nor in the managed copy", fix)
    root, source = chosen
    instead = "leave out --llama-cpp" if source == "--llama-cpp" else "unset LLAMA_CPP_DIR"
    lacking = find_missing_part(root / CONVERTER)
    return LoraError(f"{source} {root} has no {lacking}", f"{instead} and install it: {fix}")


def _failure_error(code: int, lines: Sequence[str], command: Sequence[str]) -> LoraError:
    """Make the error of a converter that failed, in a user's words where they are known."""
    tool, said = Path(command[2]).name, find_last_line(lines)
    for pattern, meaning, hint in KNOWN_FAILURES:
        if match := re.search(pattern, "\n".join(lines[-50:])):
            return LoraError(match.expand(meaning), match.expand(hint), [f"  {tool}: {said}"])
    why = (
        f"failed (exit {code})"
        if code > 0
        else f"was killed by signal {-code}"
        if code
        else "left no GGUF behind"
    )
    return LoraError(f"{tool} {why}: {said}", f"see all it says: {quote_words(command)}")


def is_whole_gguf(path: Path, with_tensors: bool = True) -> bool:
    """Return whether `path` starts as a GGUF (magic, version), by default as one that holds
    tensors."""
    if not path.is_file() or path.stat().st_size < 24:
        return False
    with path.open("rb") as file:
        magic, version, num_tensors = struct.unpack("<4sIQ", file.read(16))
    return magic == b"GGUF" and version >= 2 and (num_tensors > 0 or not with_tensors)
