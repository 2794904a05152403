"""A GGUF file as a base: what it is dequantised into, how that is checked, and what is trained on it.

Held against the model that the file was made from, and against llama.cpp. Hermetic: GGUF files of
the tiny model, made here. Alone: pytest tests/models/test_gguf_base.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_cli.common import LoraError, RejectedError, files
from lora_cli.models import (
    gguf_base,
    gguf_in_llama,
    gguf_kept,
    gguf_reading,
    gguf_rope,
    gguf_weights,
    read_adapter,
)
from lora_cli.models.base import Base
from lora_cli.models.record import GGUFSource
from tests.torture.attacks import gguf_bases

TYPES = {"f16": torch.float16, "q8_0": torch.bfloat16, "Q4_K_M": torch.bfloat16}
FAR = {"f16": 1e-3, "q8_0": 1e-2, "Q4_K_M": 0.15}
"""How far a matrix may lie from the one it was made from, as a share of that one's length."""
TEXTS = ("Reverse: red dog sun", " two  spaces", "<|user|>\nred<|end|>", "naïve €5\n\n  two")


@pytest.fixture(scope="module")
def ggufs(lora, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as GGUF files, by type."""
    folder = tmp_path_factory.mktemp("ggufs")
    options = [word for kind in TYPES for word in ("-q", kind)]
    done = lora("export-gguf", tiny / "model", *options, "-o", folder / "out", "--no-base-cost")
    assert done.returncode == 0, done.stderr
    return dict(zip(TYPES, map(Path, done.stdout.splitlines()), strict=True))


def forget() -> None:
    """As a new process would find it: nothing is made."""
    gguf_base._dequantise_once.cache_clear()
    shutil.rmtree(files.find_cache_home() / "gguf", ignore_errors=True)


def test_nothing_that_lies_beside_it_is_read(
    ggufs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An adapter's configuration was taken for one of this model's."""
    forget()
    plain = gguf_base.dequantise(ggufs["f16"])
    names = {file.name: file.read_bytes() for file in plain.iterdir()}
    assert "it/s" not in capfd.readouterr().err
    forget()
    beside = tmp_path / "x.gguf"
    shutil.copy(ggufs["f16"], beside)
    odd = '{"peft_type": "LORA", "base_model_name_or_path": "gone", "auto_map": {"AutoConfig": "m.C"}}'
    for name in (
        "adapter_config.json",
        "config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        (tmp_path / name).write_text(odd)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    made = gguf_base.dequantise(beside)
    assert {file.name for file in made.iterdir()} == names.keys()
    for name in names.keys() - {gguf_kept.SOURCE}:
        assert (made / name).read_bytes() == names[name], name


@pytest.mark.parametrize("kind", TYPES)
def test_it_is_the_model_that_the_file_was_made_from(
    kind: str, ggufs: dict[str, Path], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget()
    folder = gguf_base.dequantise(ggufs[kind])
    said = capsys.readouterr().err
    assert "16 of 16 matrices hold the file's numbers; mean KL" in said
    assert "the same tokens" in said
    given, made = (load_file(each / "model.safetensors") for each in (tiny / "model", folder))
    assert given.keys() == made.keys()
    for name, wanted in given.items():
        assert made[name].dtype == TYPES[kind]
        off = (made[name].float() - wanted).norm() / wanted.norm()
        assert off < FAR[kind], name
    own, read = (AutoTokenizer.from_pretrained(each) for each in (tiny / "model", folder))
    assert len(own) == len(read)
    assert own.chat_template == read.chat_template
    for text in TEXTS:
        assert read(text)["input_ids"] == own(text)["input_ids"], text
        assert read.decode(read(text)["input_ids"]) == own.decode(own(text)["input_ids"])


def test_what_transformers_does_not_read_is_put_right(tmp_path: Path) -> None:
    """It knows no `smollm`, and splits its digits as GPT-2 does; and no scaling of positions."""
    raw = gguf_bases.sound()
    raw.put("tokenizer.ggml.tokens", gguf_bases.texts([*gguf_bases.TOKENS[:-1], "12"]))
    raw.put("tokenizer.ggml.merges", gguf_bases.texts(["h e", "1 2"]))
    raw.put("tokenizer.ggml.pre", gguf_bases.value(gguf_bases.TEXT, "smollm"))
    raw.put("llama.rope.scaling.type", gguf_bases.value(gguf_bases.TEXT, "linear"))
    raw.put("llama.rope.scaling.factor", gguf_bases.value(gguf_bases.FLOAT32, 8.0))
    # llama.cpp's tokens, and its logits
    folder = gguf_base.dequantise(raw.write(tmp_path / "x.gguf"))
    assert Base(str(folder)).config.rope_parameters["factor"] == 8
    read = AutoTokenizer.from_pretrained(folder)
    assert read.tokenize("he12 12") == ["he", "1", "2", "\u0120", "1", "2"]


def write_scaled(path: Path, scaling: dict[str, str | float], divisors: list[float]) -> Path:
    """A GGUF file that scales its positions: by these keys, or by what divides its frequencies."""
    raw = gguf_bases.sound()
    kinds = {str: gguf_bases.TEXT, float: gguf_bases.FLOAT32, int: gguf_bases.UINT32}
    for key, given in scaling.items():
        raw.put(f"llama.rope.scaling.{key}", gguf_bases.value(kinds[type(given)], given))
    if divisors:
        data = torch.tensor(divisors).numpy().tobytes()
        shape = (len(divisors),)
        raw.tensors.append(gguf_bases.Tensor(b"rope_freqs.weight", shape, gguf_bases.F32, data))
    return raw.write(path)


def divide_frequencies(rope: dict[str, Any]) -> list[float]:
    """What transformers divides the frequencies by, of a head of 16."""
    config = LlamaConfig(head_dim=16, max_position_embeddings=128, rope_parameters=rope)
    plain = 10_000.0 ** (-torch.arange(8) / 8)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]).tolist()


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALED: dict[str, tuple[dict[str, str | float], dict[str, Any]]] = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "llama3": ({}, LLAMA3),
    "none": ({"type": "none"}, {"rope_type": "default"}),
}


@pytest.mark.parametrize("kind", SCALED)
def test_positions_are_scaled_as_the_file_says(kind: str, tmp_path: Path) -> None:
    """transformers leaves the scaling out: its model passed as Llama 3.1's, 0.03 nats off."""
    keys, wanted = SCALED[kind]
    divisors = divide_frequencies(LLAMA3 | {"rope_theta": 1e4}) if kind == "llama3" else []
    reader = GGUFReader(write_scaled(tmp_path / "x.gguf", keys, divisors))
    config = LlamaConfig()
    gguf_rope.put_scaling(tmp_path, reader, config)
    assert config.rope_parameters == wanted | {"rope_theta": 10_000.0}
    if kind != "llama3":  # of Gemma's theta, no such divisors are Llama 3's
        windowed = Gemma3TextConfig()
        gguf_rope.put_scaling(tmp_path, reader, windowed)
        assert windowed.rope_parameters["sliding_attention"]["rope_type"] == "default"
        assert windowed.rope_parameters["full_attention"].items() >= wanted.items()


@pytest.mark.parametrize(
    ("keys", "divisors", "said"),
    [
        ({"type": "longrope"}, [], "its positions are scaled by longrope"),
        ({"type": "yarn", "factor": 4.0}, [], "scaled by yarn, and it does not say how far"),
        ({"type": "linear", "factor": 4.0, "attn_factor": 2.0}, [], "scaled by linear, attn_factor"),
        ({}, [1.0, 1, 1, 1, 1, 5, 3, 8], "its rope_freqs.weight is none of Llama 3's"),
    ],
)  # fmt: skip
def test_another_scaling_is_refused(
    keys: dict[str, str | float], divisors: list[float], said: str, tmp_path: Path
) -> None:
    reader = GGUFReader(write_scaled(tmp_path / "x.gguf", keys, divisors))
    with pytest.raises(LoraError, match=f"x cannot be a base: .*{said}"):
        gguf_rope.put_scaling(Path("x"), reader, LlamaConfig())


def test_it_is_made_once_and_known_by_its_contents(ggufs: dict[str, Path], tmp_path: Path) -> None:
    forget()
    first = gguf_base.dequantise(ggufs["q8_0"])
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    copy = Path(shutil.copy(ggufs["q8_0"], tmp_path / "another name.gguf"))
    gguf_base._dequantise_once.cache_clear()
    assert gguf_base.dequantise(copy) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    source = gguf_kept.read_source(str(first))
    assert source is not None
    assert source.sha256 == hashlib.sha256(copy.read_bytes()).hexdigest()
    assert (source.file, source.type, source.dtype) == (str(ggufs["q8_0"]), "Q8_0", "bfloat16")
    assert Base(str(copy)).resolve().name == str(first)


def test_an_adapter_is_trained_on_it_and_finds_it_again(
    lora, ggufs: dict[str, Path], write_recipe, tmp_path: Path
) -> None:
    forget()
    gguf = Path(shutil.copy(ggufs["q8_0"], tmp_path / "mine.gguf"))
    recipe = write_recipe(f"model: {{name_or_path: {gguf}}}\n")
    done = lora("train", recipe)
    assert done.returncode == 0, done.stderr
    assert f"lora on mine.gguf (Q8_0), dequantised -> {tmp_path / 'run'}\n" in done.stderr
    adapter = tmp_path / "run" / "adapter"
    recorded = json.loads((adapter / "lora_record.json").read_text())["base"]
    assert recorded["made_from"] == {
        "file": str(gguf),
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "type": "Q8_0",
        "dtype": "bfloat16",
    }
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == recorded["name"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)

    forget()  # as if another machine had the file alone
    done = lora("merge", adapter, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "14 of 14 modules merged" in done.stderr
    done = lora("export-gguf", tmp_path / "merged", "-q", "q8_0")
    assert done.returncode == 0, done.stderr

    forget()
    moved = gguf.rename(tmp_path / "moved.gguf")
    done = lora("merge", adapter, tmp_path / "again")
    assert done.returncode == 1
    assert f"{gguf}, is not here, or not the file any more" in done.stderr
    assert "hint: --base FILE.gguf" in done.stderr
    done = lora("merge", adapter, tmp_path / "again", "--base", moved)
    assert done.returncode == 0, done.stderr


def test_another_file_than_a_record_says_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record may be a stranger's."""
    path = write_header(tmp_path / "x.gguf", "llama")
    monkeypatch.setattr(gguf_base, "dequantise", lambda path: path)
    source = GGUFSource(file=str(path), sha256="0" * 64, type="F32", dtype="float32")
    assert gguf_base.find_again(source) is None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert gguf_base.find_again(source.model_copy(update={"sha256": digest})) == path


def test_check_and_plan_take_it(lora, ggufs: dict[str, Path], write_recipe) -> None:
    recipe = write_recipe(f"model: {{name_or_path: {ggufs['Q4_K_M']}}}\n")
    for verb in ("check", "plan"):
        done = lora(verb, recipe)
        assert done.returncode == 0, done.stderr
        assert "lora on model-Q4_K_M.gguf (Q4_K), dequantised\n" in done.stdout + done.stderr


def write_header(path: Path, architecture: str, **numbers: int) -> Path:
    """A GGUF file of one small tensor."""
    writer = GGUFWriter(path, architecture)
    for key, number in numbers.items():
        writer.add_uint32(key.replace("__", "."), number)
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_no_model_is_refused_in_words(
    lora, ggufs: dict[str, Path], write_recipe, tmp_path: Path
) -> None:
    whole = ggufs["q8_0"].read_bytes()
    bad = {
        "unknown": write_header(tmp_path / "unknown.gguf", "abacus"),
        "part": write_header(tmp_path / "part.gguf", "llama", split__count=3),
        "cut": tmp_path / "cut.gguf",
        "other": tmp_path / "other.gguf",
        "absent": tmp_path / "absent.gguf",
        "inside": tmp_path / "in",
    }
    bad["inside"].mkdir()
    (bad["inside"] / "A.GGUF").write_bytes(whole)
    bad["cut"].write_bytes(whole[: len(whole) // 2])
    bad["other"].write_bytes(b"PK" + bytes(1000))
    said = {
        "unknown": "transformers does not read it: ValueError: GGUF model with architecture abacus",
        "part": "is one of 3 parts of a model",
        "cut": f"hint: fetch the file again: here it has {len(whole) // 2:,} bytes",
        "other": "cannot be a base: it begins with b'PK\\x00\\x00', and not with GGUF",
        "inside": f"is neither a model nor an adapter\n\nhint: did you mean {tmp_path / 'in'}/A.GGUF?",
        "absent": "absent.gguf does not exist",
    }
    for name, path in bad.items():
        done = lora("check", write_recipe(f"model: {{name_or_path: {path}}}\n"))
        assert done.returncode == 1, name
        assert said[name] in done.stderr, name
        assert done.stderr.count(": model.name_or_path: ") == 1, name
        assert "\nhint: " in done.stderr, name
        assert "Traceback" not in done.stderr
    assert not list((files.find_cache_home() / "gguf").glob("*/*/model.safetensors*cut*"))


def test_another_model_than_the_file_s_is_rejected(ggufs: dict[str, Path], tmp_path: Path) -> None:
    """Rows of queries in another order, as a reader would leave them that does not undo what the
    converter of llama.cpp did; a number that the file does not hold; one that is none; other
    tokens."""
    forget()
    path, made = ggufs["q8_0"], gguf_base.dequantise(ggufs["q8_0"])
    reader, limits = GGUFReader(path), gguf_reading.read_layout(path).make_llama_limits()
    key = "model.layers.0.self_attn.q_proj.weight"

    def copy(name: str, change) -> Path:
        folder = Path(shutil.copytree(made, tmp_path / name))
        tensors = load_file(folder / "model.safetensors")
        change(tensors[key])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def check(folder: Path) -> None:
        gguf_weights.check_weights(path, reader, folder, torch.bfloat16)
        gguf_in_llama.check_in_llama(path, folder, limits)

    check(copy("same", lambda weight: None))
    changes = {
        "as transformers reads it, it is another model": lambda weight: weight.copy_(
            weight.flip(0).clone()
        ),
        f"{key} as transformers reads it is none of the file's": lambda weight: weight[0, :1].add_(
            1
        ),
        f"{key}, dequantised to bfloat16, is not finite": lambda weight: weight[1, :1].fill_(
            float("nan")
        ),
    }
    for number, (said, change) in enumerate(changes.items()):
        with pytest.raises(RejectedError, match=said):
            check(copy(str(number), change))
    other = copy("tokens", lambda weight: None)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = None
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(RejectedError, match=r"splits .* otherwise than llama\.cpp"):
        check(other)


def test_the_package_that_reads_it_is_named_where_it_is_missing(
    ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraError, match="needs the package gguf") as caught:
        gguf_base.dequantise(ggufs["f16"])
    assert caught.value.hint == "pip install 'lora-cli[gguf]'"


@pytest.mark.slow
def test_another_program_s_file_is_the_real_model(real: Path, lora, tmp_path: Path) -> None:
    """SmolLM2 as lora exports it, in types that llama.cpp's programs write; its own GGUF is what the
    real model was made of (tests/conftest.py)."""
    done = lora(
        "export-gguf", real, "-q", "f16", "-q", "q8_0", "-q", "Q4_K_M", "-o", tmp_path / "g"
    )
    assert done.returncode == 0, done.stderr
    given = load_file(real / "model.safetensors")
    for gguf, far in zip(map(Path, done.stdout.splitlines()), (1e-6, 1e-2, 0.15), strict=True):
        folder = gguf_base.dequantise(gguf)
        made = load_file(folder / "model.safetensors")
        assert made.keys() == given.keys()
        off = {
            name: ((made[name].float() - wanted.float()).norm() / wanted.float().norm()).item()
            for name, wanted in given.items()
        }
        assert max(off.values()) <= far, gguf.name


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
def test_one_that_an_adapter_names_is_not_opened_unasked(suffix: str, tmp_path: Path) -> None:
    """A stranger's adapter would say which file of this machine is read."""
    file = tmp_path / f"x{suffix}"
    file.write_bytes(b"GGUF")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    named = config | {"base_model_name_or_path": str(file)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {place.format("A"): torch.zeros(2, 4), place.format("B"): torch.zeros(4, 2)}
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(LoraError, match="is not a model") as said:
        read_adapter(adapter, None)
    assert said.value.hint == "--base MODEL"
