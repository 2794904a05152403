"""Finding and running llama.cpp's tools: which one is taken, and that a failure never looks like a result.

Hermetic: fake trees, and small Python programs in the place of the converter and llama-quantize; the real ones are run
by tests/cli/test_pipeline.py. Alone: pytest tests/gguf/test_tools.py
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.gguf.tools import (
    CONVERTER,
    NEEDS_IMATRIX,
    QUANTIZER,
    QUANTIZER_TYPES,
    Found,
    convert,
    find_converter,
    find_managed_home,
    find_quantizer,
    quantize,
    run_command,
    spell_converter_type,
    spell_quantizer_type,
)

HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)


def program(path: Path, body: str) -> Path:
    """An executable Python program at `path`; `json`, `os`, `sys` and `Path` are imported for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n{body}\n")
    path.chmod(0o755)
    return path


def checkout(root: Path, quantizer_in: str = "build/bin") -> Path:
    """A llama.cpp checkout with everything in it."""
    (root / "conversion").mkdir(parents=True)
    (root / "gguf-py").mkdir()
    program(root / CONVERTER, "from conversion import ModelBase")
    program(root / quantizer_in / QUANTIZER, "")
    return root


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without llama.cpp: empty cache, empty PATH. Returns the only folder on the PATH."""
    on_path = tmp_path / "path"
    on_path.mkdir()
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    return on_path


def test_each_place_is_searched_in_order(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, in_env = checkout(tmp_path / "named"), checkout(tmp_path / "env")
    managed = checkout(find_managed_home(), "bin")
    installed = checkout(tmp_path / "installed")
    for tool in (installed / CONVERTER, installed / "build/bin" / QUANTIZER):
        (bare / tool.name).symlink_to(tool)  # as package managers do; what a converter imports lies beside its target
    monkeypatch.setenv("LLAMA_CPP_DIR", str(in_env))

    def found(directory: Path | None = None) -> list[Found]:
        return [find_converter(directory), find_quantizer(directory)]

    def tools(root: Path, source: str, quantizer_in: str = "build/bin") -> list[Found]:
        return [Found(root / CONVERTER, source), Found(root / quantizer_in / QUANTIZER, source)]

    assert found(named) == tools(named, "--llama-cpp")
    assert found() == tools(in_env, "LLAMA_CPP_DIR")
    monkeypatch.delenv("LLAMA_CPP_DIR")
    assert found() == tools(installed, "PATH")
    (bare / QUANTIZER).unlink()  # each is searched for on its own
    assert found() == [tools(installed, "PATH")[0], tools(managed, "managed copy", "bin")[1]]
    (bare / CONVERTER).unlink()
    assert found() == tools(managed, "managed copy", "bin")


@pytest.mark.parametrize("place", ["build/bin", "bin", "."])
def test_binaries_of_a_checkout(place: str, tmp_path: Path) -> None:
    root = checkout(tmp_path / "llama.cpp", place)
    assert find_quantizer(root).path == root / place / QUANTIZER


@pytest.mark.parametrize("named_by", ["--llama-cpp", "LLAMA_CPP_DIR"])
@pytest.mark.parametrize("lost", [CONVERTER, "conversion", QUANTIZER])
def test_a_named_directory_is_never_replaced(
    named_by: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(find_managed_home(), "bin")  # would do, but was not asked for
    root = checkout(tmp_path / "named", ".")
    (root / lost).rename(tmp_path / "lost")
    if named_by == "LLAMA_CPP_DIR":
        monkeypatch.setenv("LLAMA_CPP_DIR", str(root))
    find, other = find_converter, find_quantizer
    if lost == QUANTIZER:
        find, other = other, find
    directory = root if named_by == "--llama-cpp" else None
    assert other(directory).source == named_by
    with pytest.raises(LoraError, match=lost) as caught:
        find(directory)
    assert caught.value.message.startswith(f"{named_by} {root} has no {lost}")
    assert "setup-llama-cpp" in str(caught.value.hint)


def test_a_converter_without_its_package_does_not_count_on_the_path(bare: Path) -> None:
    program(bare / CONVERTER, "from conversion import ModelBase")
    with pytest.raises(LoraError) as caught:
        find_converter()
    assert caught.value.hint == "lora setup-llama-cpp"
    (bare / "conversion").mkdir()
    (bare / "gguf-py").mkdir()
    assert find_converter() == Found(bare / CONVERTER, "PATH")


def test_what_is_missing_comes_with_one_command() -> None:
    with pytest.raises(LoraError) as caught:
        find_quantizer()
    assert caught.value.hint == "lora setup-llama-cpp --quantizer"


def test_type_names() -> None:
    assert spell_quantizer_type("q4_k_m") == "Q4_K_M"
    assert spell_converter_type("BF16") == "bf16"
    with pytest.raises(UsageError, match=r"unknown GGUF type 'q4km'; did you mean Q4_K_M\?"):
        spell_quantizer_type("q4km")
    with pytest.raises(UsageError, match="unknown GGUF type 'int4'$"):
        spell_converter_type("int4")
    assert len(NEEDS_IMATRIX) == 9 and set(NEEDS_IMATRIX) < set(QUANTIZER_TYPES)
    for name in NEEDS_IMATRIX:
        with pytest.raises(UsageError, match="importance matrix"):
            spell_quantizer_type(name.lower())


WRITE = "out = Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
GGUF = f"out.write_bytes({HEADER!r} + json.dumps([*sys.argv[1:], os.environ['HF_HUB_OFFLINE']]).encode())\n"


def model_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_convert_gives_a_finished_file_its_name(tmp_path: Path) -> None:
    model, out = model_in(tmp_path / "model"), tmp_path / "new" / "out.gguf"
    converter = Found(program(tmp_path / CONVERTER, WRITE + GGUF), "test")
    convert(model, out, "F16", converter)
    said = json.loads(out.read_bytes()[len(HEADER) :])
    assert [*said[:2], *said[3:]] == [str(model), "--outfile", "--outtype", "f16", "1"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (WRITE + GGUF + "raise ValueError('half way')", f"{CONVERTER} failed (exit 1): ValueError: half way"),
        ("print('Bye')", f"{CONVERTER} left no GGUF behind: Bye"),
        (WRITE + "out.write_bytes(b'GGML' + bytes(100))", f"{CONVERTER} left no GGUF behind: it printed nothing"),
        (WRITE + f"out.write_bytes({HEADER!r}[:20])", f"{CONVERTER} left no GGUF behind: it printed nothing"),
        (WRITE + GGUF + "os.kill(os.getpid(), 9)", f"{CONVERTER} was killed by signal 9: it printed nothing"),
        (
            "print('ERROR:hf-to-gguf:Model FooForCausalLM is not supported')\nprint('INFO:x:y')\nsys.exit(1)",
            f"llama.cpp's converter does not know the architecture FooForCausalLM\n"
            f"  {CONVERTER}: Model FooForCausalLM is not supported",
        ),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')",
            "llama.cpp does not know this tokenizer: it recognises BPE tokenizers by a hash of what they produce\n"
            f"  {CONVERTER}: NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()",
        ),
        (
            "import mistral_common_not_here",
            "the converter needs the Python package mistral_common_not_here\n"
            f"  {CONVERTER}: ModuleNotFoundError: No module named 'mistral_common_not_here'",
        ),
    ],
)
def test_a_failed_converter_leaves_what_was_there(body: str, message: str, tmp_path: Path) -> None:
    model, out = model_in(tmp_path / "model"), tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    out.write_bytes(b"the old one")
    with pytest.raises(LoraError) as caught:
        convert(model, out, "f16", Found(program(tmp_path / CONVERTER, body), "test"))
    assert caught.value.message == message
    assert caught.value.hint
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == {"out.gguf": b"the old one"}


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no config.json"):
        convert(tmp_path, tmp_path / "x.gguf", "f16", Found(tmp_path / CONVERTER, "test"))


def test_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    body = f"Path(sys.argv[2]).write_bytes({HEADER!r} + json.dumps(sys.argv[1:]).encode())\n"
    warns = "print('llama_model_quantize_impl: WARNING: 3 of 30 tensor(s) required fallback quantization')"
    quantizer = Found(program(tmp_path / QUANTIZER, body + warns), "test")
    monkeypatch.chdir(tmp_path)
    quantize(Path("7b-f16.gguf"), Path("7b.gguf"), "q4_k_m", quantizer)
    source, made, type_name = json.loads(Path("7b.gguf").read_bytes()[len(HEADER) :])
    # llama-quantize would read a bare "7b.gguf" as type number 7.
    assert Path(source) == tmp_path / "7b-f16.gguf" and Path(made).is_absolute() and type_name == "Q4_K_M"
    assert "warning: 3 of 30 tensors take a larger type: their rows do not fit Q4_K_M's" in capsys.readouterr().err


def test_a_failed_quantiser_says_why(tmp_path: Path) -> None:
    said = "llama_model_quantize: failed to quantize: requantizing from type q8_0 is disabled"
    quantizer = Found(program(tmp_path / QUANTIZER, f"print({said!r})\nprint('failed')\nsys.exit(1)"), "test")
    with pytest.raises(LoraError) as caught:
        quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q4_0", quantizer)
    assert caught.value.message == f"the model is already quantised (q8_0)\n  {QUANTIZER}: {said}"
    assert not (tmp_path / "out.gguf").exists()


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="cannot be run: No such file"):
        run_command([str(tmp_path / "nothing")], "trying")
