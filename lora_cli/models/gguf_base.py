"""Make a GGUF file a base to train on: dequantised once, into a folder of lora's cache.

transformers reads the file, its tokenizer and its chat template (with the package `gguf`); the
folder is called by the file's sha256, so that a file is found again under another name. What was
written is read again and held against the file: the numbers of every tensor, and, where xllamacpp
is installed, how llama.cpp splits texts into tokens and what it expects after them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from lora_cli.common import (
    LoraError,
    RejectedError,
    children,
    files,
    library_errors,
    lock,
    privacy,
    quote,
    ui,
)
from lora_cli.models import probes
from lora_cli.models.record import GGUFSource
from lora_cli.models.tensors import open_model

if TYPE_CHECKING:
    from gguf import GGUFReader

SOURCE = "gguf_source.json"
"""Beside a dequantised model: the file that it was made from."""
PROGRAM = Path(__file__).with_name("llama_program.py")
MOST_KL = 0.1
"""Mean KL in nats between llama.cpp's next tokens and those of the dequantised model, up to which
they are one function: llama.cpp rounds what it multiplies, too."""
TEXTS = (
    *probes.PROBES,
    "  2 + 2 = 1,024?\n\n\tna\u00efve caf\u00e9s \u2013 \u4f60\u597d, it's 12:30",
)
"""What the tokenizer has to split as llama.cpp does, beside prompts by the chat template."""
OTHERWISE = "take the model as a folder of safetensors, or its name on the hub"


def read_source(folder: str) -> GGUFSource | None:
    """Return the GGUF file that the model in a folder was made from; None for any other model."""
    file = Path(folder) / SOURCE
    return GGUFSource.read(file) if file.is_file() else None


def dequantise(path: Path) -> Path:
    """Return the folder with the model of a GGUF file, which is made where it is not there yet.

    Raises LoraError for a file that transformers does not read, RejectedError where what it reads
    is not the model in the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LoraError(
            f"{path} as a base needs the package gguf, which is not installed",
            "pip install 'lora-cli[gguf]'",
        )
    state = path.stat()
    return _dequantise_once(path.absolute(), state.st_mtime_ns, state.st_size)


@cache
def _dequantise_once(path: Path, _written: int, _size: int) -> Path:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    place = _find_place(digest)
    files.make_cache_folder(place.parent)
    with lock.hold_in_turn(place, f"dequantising {path}"):
        found = _find_made(digest)
        if found is None:
            found = place / path.stem
            with files.staged_folder(found) as staging:
                _make(path, digest, staging)
    ui.say(f"{path.name}: {_describe(found)}")
    return found


def find_again(source: GGUFSource) -> Path | None:
    """Return the folder of a base that was made from a GGUF file, which is made anew where the file
    is still what it was; None where neither is here."""
    found = _find_made(source.sha256)
    if found is not None:
        return found
    path = Path(privacy.expand_home(source.file))
    if not path.is_file():
        return None
    made = dequantise(path)
    return made if made.parent == _find_place(source.sha256) else None


def _find_place(digest: str) -> Path:
    """Return the folder of the cache for what is made from a file of this sha256."""
    return files.find_cache_home() / "gguf" / digest


def _find_made(digest: str) -> Path | None:
    return next((file.parent for file in _find_place(digest).glob(f"[!.]*/{SOURCE}")), None)


def _describe(folder: Path) -> str:
    source = GGUFSource.read(folder / SOURCE)
    return (
        f"dequantised from {source.type} to {source.dtype}, in {privacy.replace_home(str(folder))}"
    )


def _make(path: Path, digest: str, folder: Path) -> None:
    """Write the model of a GGUF file, with its tokenizer and what it is made from, and check it."""
    with library_errors.translate_file_errors(
        f"{path} cannot be a base: transformers does not read it", OTHERWISE
    ):
        reader = _open(path)
        kinds = _count_types(reader)
        dtype = _choose_dtype(reader, kinds)
        kind, name = kinds.most_common(1)[0][0], str(dtype).removeprefix("torch.")
        ui.say(f"{path.name}: its weights, most of them {kind}, are dequantised to {name}, once")
        _write(path, folder, dtype)
        tokenizer = _mend_tokenizer(reader, folder)
    checked = _check_numbers(path, reader, folder, dtype)
    if importlib.util.find_spec("xllamacpp") is not None:
        checked += f"; {_check_in_llama(path, folder, tokenizer)}"
    ui.say(f"  {checked}")
    where = str(privacy.make_portable(str(path)))
    source = GGUFSource(file=where, sha256=digest, type=kind, dtype=name)
    files.write_json(folder / SOURCE, source.to_data())


def _open(path: Path) -> GGUFReader:
    """Open a GGUF file. Raises LoraError for one that is only a part of a model."""
    from gguf import GGUFReader

    with library_errors.translate_file_errors(
        f"{path} cannot be a base: it is cut short, damaged or no GGUF file",
        f"fetch the file again: here it has {path.stat().st_size:,} bytes",
    ):
        reader = GGUFReader(path)
    parts = int(_read_value(reader, "split.count", 1))
    if parts > 1:
        whole = f"llama-gguf-split --merge {quote(path)} whole.gguf"
        raise LoraError(
            f"{path} is one of {parts} parts of a model", f"{whole}, with the first part's name"
        )
    return reader


def _count_types(reader: GGUFReader) -> Counter[str]:
    """Count weights by the type that they are kept in."""
    kinds = Counter[str]()
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    return kinds


def _choose_dtype(reader: GGUFReader, kinds: Counter[str]) -> torch.dtype:
    """Return the type to write: the file's own where it is one of torch's, and bfloat16 for what
    was quantised, or holds no more than that."""
    kind = kinds.most_common(1)[0][0]
    if kind == "F32":
        return torch.float32
    if kind == "F16":
        halves = (each.data for each in reader.tensors if each.tensor_type.name == "F16")
        return torch.bfloat16 if all(map(_fits_bfloat16, halves)) else torch.float16
    return torch.bfloat16


def _fits_bfloat16(data: np.ndarray[Any, Any]) -> bool:
    values = torch.from_numpy(np.array(data))
    return torch.equal(values.float(), values.bfloat16().float())


def _write(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and its tokenizer by transformers, which sees nothing of what lies beside the
    file: an adapter's configuration or a tokenizer's would be taken for this model's."""
    with files.scratch_folder() as alone:
        (alone / "model.gguf").symlink_to(path)
        given: dict[str, Any] = {
            "pretrained_model_name_or_path": str(alone),
            "gguf_file": "model.gguf",
        }
        with _without_progress_bars():
            network, report = AutoModelForCausalLM.from_pretrained(
                **given,
                **_ask_for_plain_weights(),
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(**given, trust_remote_code=False)
    if lacking := sorted(report["missing_keys"]):
        raise LoraError(
            f"{path} cannot be a base: transformers finds no {lacking[0]} in it, and "
            f"{len(lacking) - 1} others",
            OTHERWISE,
        )
    # transformers takes the dequantised model for a quantised one, which it would not save
    network.config.__dict__.pop("quantization_config", None)
    network.is_quantized, network.hf_quantizer = False, None
    with _without_progress_bars():
        network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing: its own bars, and the one for GGUF files, which it takes from
    tqdm without asking whether any are wanted."""
    shown, bar = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _mend_tokenizer(reader: GGUFReader, folder: Path) -> PreTrainedTokenizerBase:
    """Take out of a tokenizer what transformers makes of every SentencePiece vocabulary, and this
    file does not have: a token after the last one, and a space before a text; return it."""
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    num_tokens = len(_read_value(reader, "tokenizer.ggml.tokens", []))
    made["added_tokens"] = [each for each in made["added_tokens"] if each["id"] < num_tokens]
    splitter = made["pre_tokenizer"] or {}
    adds_space = _read_value(reader, "tokenizer.ggml.add_space_prefix", True)
    if splitter.get("type") == "Metaspace" and not adds_space:
        splitter["prepend_scheme"] = "never"
        decoders = made["decoder"].get("decoders", [])
        made["decoder"]["decoders"] = [each for each in decoders if each["type"] != "Strip"]
    files.write_text(file, json.dumps(made, ensure_ascii=False))
    if _read_value(reader, "tokenizer.ggml.model", "") == "llama":
        (folder / "tokenizer.model").write_bytes(_make_pieces(reader, adds_space))
        settings = files.read_json(folder / "tokenizer_config.json")
        settings["add_prefix_space"] = bool(adds_space)  # where llama.cpp's converter looks for it
        files.write_json(folder / "tokenizer_config.json", settings)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _make_pieces(reader: GGUFReader, adds_space: bool) -> bytes:
    """Return the SentencePiece vocabulary that the file was made from: llama.cpp's converter asks
    for it, and knows by it which tokens are special."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, too

    made: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    read = partial(_read_value, reader)
    kinds = read("tokenizer.ggml.token_type", [])  # numbered as SentencePiece numbers them
    pieces = zip(read("tokenizer.ggml.tokens", []), read("tokenizer.ggml.scores", []), kinds)
    for text, score, kind in pieces:
        made.pieces.add(piece=text, score=score, type=kind)
    made.trainer_spec.model_type = made.trainer_spec.BPE
    made.trainer_spec.byte_fallback = 6 in kinds
    made.trainer_spec.vocab_size = len(made.pieces)
    for role, of_ggml in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = read(f"tokenizer.ggml.{of_ggml}_token_id", -1)
        setattr(made.trainer_spec, f"{role}_id", number)
        if number >= 0:
            setattr(made.trainer_spec, f"{role}_piece", made.pieces[number].piece)
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.add_dummy_prefix = adds_space
    made.normalizer_spec.remove_extra_whitespaces = False
    return made.SerializeToString()


def _read_value(reader: GGUFReader, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _ask_for_plain_weights() -> dict[str, Any]:
    """Return what tells transformers to dequantise, which newer versions would not where they have
    kernels for what is quantised."""
    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _check_numbers(path: Path, reader: GGUFReader, folder: Path, dtype: torch.dtype) -> str:
    """Check that every matrix written holds the numbers of one in the file, in whatever order of
    rows; return that in words."""
    from gguf import dequantize

    written = open_model(str(folder))
    assert written is not None, "written just now"
    wanted = Counter(
        _sum_bits(torch.from_numpy(np.array(dequantize(each.data, each.tensor_type))).to(dtype))
        for each in reader.tensors
        if len(each.shape) > 1
    )
    names = [name for name, entry in written.entries.items() if len(entry.shape) > 1]
    for name in names:
        found = _sum_bits(written.rows(name))
        if not wanted[found]:
            raise RejectedError(
                f"{path} cannot be a base: {name} as transformers reads it is none of the file's",
                OTHERWISE,
            )
        wanted[found] -= 1
    return f"{len(names)} of {len(names)} matrices hold the file's numbers"


def _sum_bits(values: torch.Tensor) -> tuple[int, int, int]:
    """Return how many numbers there are, and two sums over their bits that do not depend on their
    order."""
    whole = torch.int32 if values.dtype == torch.float32 else torch.int16
    bits = values.contiguous().view(whole).reshape(-1).to(torch.int64)
    return bits.numel(), int(bits.sum()), int((bits % 8191).square().sum())


def _check_in_llama(path: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Compare the next tokens that llama.cpp expects with those of the model that was written;
    return how far they lie apart. Raises RejectedError for another function, or other tokens."""
    plain = [probes.Probe(text, tokenizer(text)["input_ids"], True) for text in TEXTS]
    asked = [*probes.make_probes(tokenizer), *plain]
    answers = list(_ask_llama(path, asked))
    for probe, answer in zip(asked, answers, strict=True):
        if answer["ids"] != probe.ids:
            raise RejectedError(
                f"{path} cannot be a base: transformers splits {probe.text[:40]!r} otherwise than "
                "llama.cpp",
                OTHERWISE,
            )
    with _without_progress_bars():
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False
        )
    ours = [rows[-1:] for rows in probes.compute_logits(network, asked)]
    theirs = [torch.tensor([answer["logprobs"]]) for answer in answers]
    found = probes.compare_logits(theirs, ours)
    said = f"mean KL {found.mean_kl:.1e} from llama.cpp's, top-1 agreement {found.top1:.0%}"
    if not found.mean_kl <= MOST_KL:
        raise RejectedError(
            f"{path} cannot be a base: as transformers reads it, it is another model ({said})",
            OTHERWISE,
        )
    return f"{said}; the same tokens"


def _ask_llama(path: Path, asked: Sequence[probes.Probe]) -> Iterator[dict[str, Any]]:
    """Return what llama.cpp says of each probe. Raises LoraError where it cannot open the file."""
    done = children.run(
        [sys.executable, "-P", str(PROGRAM), str(path)],
        input=json.dumps([[probe.text, probe.plain] for probe in asked]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"its process ended with {done.returncode}"
        raise LoraError(
            f"{path} cannot be a base: llama.cpp does not open it: {said}",
            f"copy it again: sha256sum {quote(path)}",
        )
    yield from json.loads(done.stdout)
