"""llama.cpp's converter and its quantiser: where they are found, how they are run. `llama_cpp_setup.py` installs them.

Both are searched for on their own, in this order: the directory the user named (`--llama-cpp DIR`), `$LLAMA_CPP_DIR`,
the PATH, the managed copy. A directory is a llama.cpp checkout (binaries in `build/bin`, `bin` or the top). A named
directory that does not hold what is needed is an error: the search never falls through to another llama.cpp in silence.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.common import LoraError, Progress, UsageError, files, find_nearest, warn

VERSION = "0.3.36"
"""Release of llama-cpp-python whose source package carries the llama.cpp revision everything here was tried with."""

KIND = 2
"""Counted up when more of that revision is installed than before, so that an older copy is not taken for it."""

CONVERTER, LORA_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
QUANTIZER = "llama-quantize.exe" if os.name == "nt" else "llama-quantize"

CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes by itself."""
EXACT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Which of these holds weights of a type of torch as they are."""

# Names and order of tools/quantize/quantize.cpp, without the plain copies (F32, F16, BF16, COPY: the converter's work)
# and without MXFP4_MOE, which turns a model that is no mixture of experts into Q8_0 and does not say so.
# fmt: off
QUANTIZER_TYPES = (
    "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "TQ1_0",
    "TQ2_0", "Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_S", "IQ3_M", "Q3_K", "IQ3_XS", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_NL",
    "IQ4_XS", "Q4_K", "Q4_K_S", "Q4_K_M", "Q5_K", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
)
# Found by running every type on a Llama. IQ3_XS is not in llama.cpp's own list, but some of its tensors are IQ3_XXS.
NEEDS_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
# fmt: on

# What the tools say when they stop -> what it means, and what to do. The last line they printed is shown as well.
KNOWN_FAILURES = (
    (
        r"BPE pre-tokenizer was not recognized",
        "llama.cpp does not know this tokenizer: it recognises BPE tokenizers by a hash of what they produce",
        "keep the base model's own tokenizer, or point --llama-cpp at a newer llama.cpp that knows it",
    ),
    (
        r"Model (\S+) is not supported",
        r"llama.cpp's converter does not know the architecture \1",
        "a newer llama.cpp may know it: clone it and pass its folder with --llama-cpp DIR",
    ),
    (r"No module named '(\w+)", r"the converter needs the Python package \1", r"python -m pip install \1"),
    (
        r"requantizing from type (\w+) is disabled",
        r"the model is already quantised (\1)",
        "pass an f16 or bf16 GGUF",
    ),
    (r"No space left on device|not enough space on the", "the disk is full", "make room, or write to another disk"),
)


@dataclass(frozen=True)
class Found:
    """A tool and where it came from: `--llama-cpp`, `LLAMA_CPP_DIR`, `PATH` or `managed copy`."""

    path: Path
    source: str

    def __str__(self) -> str:
        return f"{self.path} ({self.source})"


def find_managed_home() -> Path:
    """Folder of the managed copy, present or not, in `files.cache_home()`; its last number is that of its kind."""
    return files.find_cache_home() / f"llama.cpp-{VERSION}-{KIND}"


def find_converter(directory: Path | None = None) -> Found:
    """`convert_hf_to_gguf.py`, complete.

    Complete means: the `conversion` package lies beside it where it imports that (older revisions are one file), and
    `gguf` lies beside it or is installed here; on the PATH a converter that is not complete does not count.
    Raises LoraError with the one command that mends it.
    """
    found = _search_converter(directory)
    if found is None:
        raise _missing_error(directory, "lora setup-llama-cpp", lambda root: find_missing_part(root / CONVERTER))
    return found


def find_quantizer(directory: Path | None = None) -> Found:
    """The `llama-quantize` program. Raises LoraError with the one command that mends it."""
    found = _search_quantizer(directory)
    if found is None:
        raise _missing_error(
            directory, "lora setup-llama-cpp --quantizer", lambda _: f"{QUANTIZER} (in build/bin, bin or .)"
        )
    return found


def spell_converter_type(name: str) -> str:
    """The converter's own spelling of `name`, whatever its case. Raises UsageError."""
    return _pick_name(name, CONVERTER_TYPES)


def spell_quantizer_type(name: str, imatrix: bool = False) -> str:
    """The quantiser's own spelling of `name`, whatever its case. Raises UsageError, also for a type that needs an
    importance matrix where there is none."""
    picked = _pick_name(name, QUANTIZER_TYPES)
    if picked in NEEDS_IMATRIX and not imatrix:
        raise UsageError(
            f"{picked} needs an importance matrix, measured on text like that the model is for",
            "--imatrix DATA.jsonl, or a type that needs none: Q2_K, Q3_K_M, IQ3_S, IQ4_XS or Q4_K_M",
        )
    return picked


def convert(model_dir: Path, outfile: Path, outtype: str, converter: Found, base: Path | None = None) -> None:
    """Write the Hugging Face model in `model_dir` as the GGUF `outfile`, all at once or not at all.

    `outtype` is one of CONVERTER_TYPES. With `base`, the folder of a model, `model_dir` is a LoRA adapter of it. Runs
    in a process of its own, offline. Raises LoraError when the converter fails or leaves no GGUF; `outfile` is then
    untouched.
    """
    outtype = spell_converter_type(outtype)
    script, wanted = converter.path, "config.json"
    if base is not None:
        script, wanted = converter.path.with_name(LORA_CONVERTER), "adapter_config.json"
    if not (model_dir / wanted).is_file():
        raise LoraError(f"{model_dir} is not a model: it has no {wanted}", "pass the folder of a merged model")
    if not script.is_file():
        raise LoraError(f"{converter} has no {script.name} beside it", "leave out --llama-cpp: lora setup-llama-cpp")
    with _stage(outfile) as folder:
        made = Path(folder) / "model.gguf"
        command = [sys.executable, str(script), str(model_dir.resolve()), "--outfile", str(made), "--outtype", outtype]
        command += ["--base", str(base.resolve())] if base else []
        code, lines = run_command(command, f"converting to {outtype}", {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"})
        _accept_file(code, lines, command, made, outfile)


def try_vocabulary(model_dir: Path, converter: Found) -> None:
    """Let the converter read configuration and tokenizer of `model_dir`, without weights: LoraError for an architecture
    or a tokenizer that it does not know."""
    with tempfile.TemporaryDirectory(prefix="lora-vocabulary-") as folder:
        command = [sys.executable, str(converter.path), str(model_dir.resolve()), "--vocab-only"]
        command += ["--outfile", str(Path(folder) / "vocabulary.gguf")]
        code, lines = run_command(command, "reading the vocabulary", {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"})
    if code:
        raise _failure_error(code, lines, command)


def quantize(gguf: Path, outfile: Path, type_name: str, quantizer: Found, imatrix: Path | None = None) -> None:
    """Write `gguf` (f32, f16 or bf16) as `outfile` with `type_name`, one of QUANTIZER_TYPES, all at once or not at all.

    `imatrix` is an importance matrix as llama.cpp writes it. Warns of tensors that llama.cpp stored in a larger type
    because their rows do not divide into its blocks. Raises LoraError when the quantiser fails or leaves no GGUF;
    `outfile` is then untouched.
    """
    type_name = spell_quantizer_type(type_name, imatrix is not None)
    with _stage(outfile) as folder:
        made = Path(folder) / "model.gguf"
        # Absolute paths: llama-quantize reads an output name that starts with digits ("7b.gguf") as a type number.
        weighted = ["--imatrix", str(imatrix.resolve())] if imatrix else []
        command = [str(quantizer.path), *weighted, str(gguf.resolve()), str(made), type_name]
        code, lines = run_command(command, f"quantising to {type_name}")
        _accept_file(code, lines, command, made, outfile)
    if fallback := re.search(r"(\d+) of (\d+) tensor\(s\) required fallback", "\n".join(lines)):
        warn(f"{fallback[1]} of {fallback[2]} tensors take a larger type: their rows do not fit {type_name}'s blocks")


def run_command(
    command: Sequence[str], label: str, env: Mapping[str, str] | None = None, log: Path | None = None
) -> tuple[int, list[str]]:
    """Run `command` under one progress line: (exit status, every line of its stdout and stderr).

    `env` is added to the environment; `log` receives the lines as they come. The percentage is read from what the
    program prints (`42%`, `[ 12/ 30]`). Raises LoraError when the program cannot be started.
    """
    progress, lines = Progress(), []
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **(env or {})},
        )
    except OSError as error:
        raise LoraError(f"{command[0]} cannot be run: {error.strerror}", f"try it: {shlex.join(command)}") from error
    with process, (log or Path(os.devnull)).open("a", encoding="utf-8") as sink:
        assert process.stdout is not None
        try:
            for line in process.stdout:  # text mode: tqdm's \r ends a line too
                sink.write(line)
                lines.append(line.rstrip())
                if step := re.search(r"(\d+)%|^\[ *(\d+)/ *(\d+)\]", line):
                    percent = int(step[1]) if step[1] else 100 * int(step[2]) // int(step[3])
                    progress.update(f"{label}: {percent}%")
        except BaseException:
            process.kill()
            raise
    progress.clear()
    return process.returncode, lines


def find_last_line(lines: Sequence[str]) -> str:
    """What a failed program said: its last exception or `ERROR:`, else its last line that is no logger's chatter."""
    telling = [line for line in lines if line.strip() and not re.match(r"INFO:|WARNING:|\s*\w+:\s+\d+%", line)]
    final = r"ERROR:|[\w.]+(Error|Exception):|llama_model_quantize: failed"
    errors = [line for line in telling if re.match(final, line)]
    return re.sub(r"^ERROR:([\w.-]+:)?", "", (errors or telling)[-1]).strip() if telling else "it printed nothing"


def _search_converter(directory: Path | None) -> Found | None:
    """As `find_converter`, but None where there is none."""
    if chosen := _choose_directory(directory):
        root, source = chosen
        return None if find_missing_part(root / CONVERTER) else Found(root / CONVERTER, source)
    on_path = shutil.which(CONVERTER)
    if on_path and not find_missing_part(script := Path(on_path).resolve()):
        return Found(script, "PATH")
    script = find_managed_home() / CONVERTER
    return None if find_missing_part(script) else Found(script, "managed copy")


def _search_quantizer(directory: Path | None) -> Found | None:
    """As `find_quantizer`, but None where there is none."""
    root, source = _choose_directory(directory) or (find_managed_home(), "managed copy")
    if source == "managed copy" and (on_path := shutil.which(QUANTIZER)):
        return Found(Path(on_path).resolve(), "PATH")
    places = [root / place / QUANTIZER for place in ("build/bin", "build/bin/Release", "bin", ".")]
    found = [place for place in places if place.is_file() and os.access(place, os.X_OK)]
    return Found(found[0], source) if found else None


def _choose_directory(directory: Path | None) -> tuple[Path, str] | None:
    """The directory the user named, and by what; None where the choice is ours."""
    if directory is not None:
        return directory.expanduser().resolve(), "--llama-cpp"
    named = os.environ.get("LLAMA_CPP_DIR")
    return (Path(named).expanduser().resolve(), "LLAMA_CPP_DIR") if named else None


def find_missing_part(script: Path) -> str | None:
    """What keeps this converter from running, or None."""
    if not script.is_file():
        return CONVERTER
    split_up = re.search(r"^from conversion import", script.read_text(encoding="utf-8"), re.MULTILINE)
    if split_up and not (script.parent / "conversion").is_dir():
        return f"conversion/, which {CONVERTER} imports"
    if not (script.parent / "gguf-py").is_dir() and importlib.util.find_spec("gguf") is None:
        return "gguf-py/ (and no `gguf` package is installed)"
    return None


def _missing_error(directory: Path | None, fix: str, lacks: Callable[[Path], str | None]) -> LoraError:
    chosen = _choose_directory(directory)
    if chosen is None:
        return LoraError(f"no {lacks(find_managed_home())} was found: not on the PATH, nor in the managed copy", fix)
    root, source = chosen
    instead = "leave out --llama-cpp" if source == "--llama-cpp" else "unset LLAMA_CPP_DIR"
    return LoraError(f"{source} {root} has no {lacks(root)}", f"{instead} and install it: {fix}")


def _pick_name(name: str, known: Sequence[str]) -> str:
    by_upper = {each.upper(): each for each in known}
    if name.upper() in by_upper:
        return by_upper[name.upper()]
    close = find_nearest(name.upper(), by_upper)
    meant = f"; did you mean {by_upper[close]}?" if close else ""
    raise UsageError(f"unknown GGUF type {name!r}{meant}", f"known types: {', '.join(known)}")


def _stage(outfile: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside `outfile`, on the same disk, that goes away with all that is in it."""
    outfile.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".lora-gguf-", dir=outfile.parent.resolve())


def _accept_file(code: int, lines: Sequence[str], command: Sequence[str], made: Path, outfile: Path) -> None:
    """Give a finished file its final name, or say why there is none."""
    if code == 0 and is_gguf(made):
        made.replace(outfile)
        return
    raise _failure_error(code, lines, [part.replace(str(made), str(outfile.resolve())) for part in command])


def _failure_error(code: int, lines: Sequence[str], command: Sequence[str]) -> LoraError:
    """What a program that failed said, in a user's words where they are known."""
    tool, said = Path(command[1] if command[0] == sys.executable else command[0]).name, find_last_line(lines)
    for pattern, meaning, hint in KNOWN_FAILURES:
        if match := re.search(pattern, "\n".join(lines[-50:])):
            return LoraError(f"{match.expand(meaning)}\n  {tool}: {said}", match.expand(hint))
    why = f"failed (exit {code})" if code > 0 else f"was killed by signal {-code}" if code else "left no GGUF behind"
    return LoraError(f"{tool} {why}: {said}", f"see all it says: {shlex.join(command)}")


def is_gguf(path: Path, with_tensors: bool = True) -> bool:
    """Whether `path` starts as a GGUF (magic, version), by default as one that holds tensors."""
    if not path.is_file() or path.stat().st_size < 24:
        return False
    with path.open("rb") as file:
        magic, version, num_tensors = struct.unpack("<4sIQ", file.read(16))
    return magic == b"GGUF" and version >= 2 and (num_tensors > 0 or not with_tensors)
