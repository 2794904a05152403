"""Finding and running llama.cpp's converters: which one is taken, and that a failure never looks
like a result.

Hermetic: fake trees, and small Python programs in the place of the converter; the real one is run
by tests/e2e. Alone: pytest tests/gguf/test_tools.py
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from lora_cli.common import LoraError, UsageError
from lora_cli.gguf import mixture, tools
from lora_cli.gguf.tools import CONVERTER, Found, convert, find_converter, run_command

pytestmark = pytest.mark.usefixtures("bare")

HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)


def program(path: Path, body: str) -> Path:
    """An executable Python program at `path`; `json`, `os`, `sys` and `Path` are imported for
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n{body}\n")
    path.chmod(0o755)
    return path


def checkout(root: Path) -> Path:
    """A llama.cpp checkout with everything in it."""
    (root / "conversion").mkdir(parents=True)
    (root / "gguf-py").mkdir()
    program(root / CONVERTER, "from conversion import ModelBase")
    return root


def test_each_place_is_searched_in_order(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, in_env = checkout(tmp_path / "named"), checkout(tmp_path / "env")
    managed, installed = checkout(tools.find_managed_home()), checkout(tmp_path / "installed")
    # as package managers do; what a converter imports lies beside its target
    (bare / CONVERTER).symlink_to(installed / CONVERTER)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(in_env))
    assert tools.find_converter(named) == Found(named / CONVERTER, "--llama-cpp")
    assert tools.find_converter() == Found(in_env / CONVERTER, "LLAMA_CPP_DIR")
    monkeypatch.delenv("LLAMA_CPP_DIR")
    assert tools.find_converter() == Found(installed / CONVERTER, "PATH")
    (bare / CONVERTER).unlink()
    monkeypatch.setattr(tools, "DIGEST", tools.hash_installed(managed))
    assert tools.find_converter() == Found(managed / CONVERTER, "managed copy")


@pytest.mark.parametrize("named_by", ["--llama-cpp", "LLAMA_CPP_DIR"])
@pytest.mark.parametrize("lost", [CONVERTER, "conversion"])
def test_a_named_directory_is_never_replaced(
    named_by: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tools.find_managed_home())  # would do, but was not asked for
    root = checkout(tmp_path / "named")
    directory = root if named_by == "--llama-cpp" else None
    if named_by == "LLAMA_CPP_DIR":
        monkeypatch.setenv("LLAMA_CPP_DIR", str(root))
    assert tools.find_converter(directory).source == named_by
    (root / lost).rename(tmp_path / "lost")
    with pytest.raises(LoraError, match=lost) as caught:
        tools.find_converter(directory)
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


def test_type_names() -> None:
    assert mixture.pick("q4_k_m", weighted=False) == "Q4_K_M"
    assert tools.spell_converter_type("BF16") == "bf16"
    with pytest.raises(UsageError, match=r"unknown GGUF type 'q4km'; did you mean Q4_K_M\?"):
        mixture.pick("q4km", weighted=False)
    with pytest.raises(UsageError, match="unknown GGUF type 'int4'$"):
        tools.spell_converter_type("int4")


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
        (
            WRITE + GGUF + "raise ValueError('half way')",
            f"{CONVERTER} failed (exit 1): ValueError: half way",
        ),
        ("print('Bye')", f"{CONVERTER} left no GGUF behind: Bye"),
        (
            WRITE + "out.write_bytes(b'GGML' + bytes(100))",
            f"{CONVERTER} left no GGUF behind: it printed nothing",
        ),
        (
            WRITE + f"out.write_bytes({HEADER!r}[:20])",
            f"{CONVERTER} left no GGUF behind: it printed nothing",
        ),
        (
            WRITE + GGUF + "os.kill(os.getpid(), 9)",
            f"{CONVERTER} was killed by signal 9: it printed nothing",
        ),
        (
            "print('ERROR:hf-to-gguf:Model FooForCausalLM is not "
            "supported')\nprint('INFO:x:y')\nsys.exit(1)",
            f"llama.cpp's converter does not know the architecture FooForCausalLM\n"
            f"  {CONVERTER}: Model FooForCausalLM is not supported",
        ),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized - update "
            "get_vocab_base_pre()')",
            "llama.cpp does not know this tokenizer: it recognises BPE tokenizers by a hash of "
            "what they produce\n"
            f"  {CONVERTER}: NotImplementedError: BPE pre-tokenizer was not recognized - update "
            "get_vocab_base_pre()",
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
    assert "\n".join([caught.value.message, *caught.value.details]) == message
    assert caught.value.hint
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == {
        "out.gguf": b"the old one"
    }


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no config.json"):
        convert(tmp_path, tmp_path / "x.gguf", "f16", Found(tmp_path / CONVERTER, "test"))


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="cannot be run: no such program"):
        run_command([str(tmp_path / "nothing")], "trying")
