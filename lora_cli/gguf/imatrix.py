"""Measure an importance matrix for llama.cpp's quantiser: how large the inputs of each linear layer
are over rows of text.

As llama.cpp's own llama-imatrix (tools/imatrix/imatrix.cpp): the sum of squares of every input
column, and the number of tokens. Measured here on the Hugging Face model; written by
`imatrix_writer.py` with the converter's gguf package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_cli.common import LoraError, plain_files, spell_count, ui
from lora_cli.data import encode, prepare, sources
from lora_cli.gguf import tools
from lora_cli.gguf.tools import Found
from lora_cli.models import Base, to_accelerator
from lora_cli.recipe import Data, Model, Recipe, Training

MAX_TOKENS, CHUNK = 65536, 512
FILES = (".gguf", ".dat", ".imatrix")
"""Endings of importance matrices; anything else is data to measure one on."""


def is_imatrix(given: str) -> bool:
    """Return whether `--imatrix` names an importance matrix, and not data to measure one on."""
    path = Path(given)
    return path.suffix.lower() in FILES or ("://" not in given and plain_files.is_gguf(path))


def refuse_missing_file(given: str) -> None:
    """Raise LoraError where `--imatrix` names a file that does not exist."""
    if "://" in given and not is_imatrix(given):
        return  # rows by address, which data.path takes too
    if Path(given).suffix and not Path(given).exists():
        raise LoraError(f"--imatrix {given} does not exist", plain_files.suggest_other(Path(given)))
    if is_imatrix(given):
        plain_files.refuse_odd(Path(given), Path(given).stat())


def make_imatrix(rows: str, folder: Path, exact: Path, outfile: Path, converter: Found) -> None:
    """Measure the model in `folder` on `rows` (a file or data set as in `data.path`) and write
    `outfile`.

    `exact` is the model's GGUF, which says what its tensors are called. Raises LoraError for rows
    that cannot be used.
    """
    model = Base(str(folder))
    tokenizer, network = model.load_tokenizer(), model.load()
    batches = list(read_rows(rows, tokenizer))
    sums, num_tokens = measure_inputs(to_accelerator(network), batches)
    ui.say(
        f"  importance matrix: {spell_count(len(sums), 'layer')} over "
        f"{spell_count(num_tokens, 'token')} of {rows}"
    )
    scratch = outfile.with_suffix(".safetensors")
    save_file(
        sums, scratch, metadata={"tokens": str(num_tokens), "chunk": str(CHUNK), "rows": rows}
    )
    script, package = (
        Path(__file__).with_name("imatrix_writer.py"),
        converter.path.parent / "gguf-py",
    )
    command = [sys.executable, str(script), str(scratch), str(exact), str(outfile)]
    code, lines = tools.run_command(
        command, "writing the importance matrix", {"PYTHONPATH": str(package)}
    )
    left_out = [line.partition(": ")[2] for line in lines if line.startswith("left out: ")]
    if left_out:
        ui.warn(
            f"{spell_count(len(left_out), 'layer has', 'layers have')} no importance matrix, "
            "since their names "
            "are not known: "
            f"{left_out[0]}, …"
        )
    if code or len(left_out) == len(sums):
        raise LoraError(
            f"the importance matrix cannot be written: {tools.find_last_line(lines)}",
            "leave --imatrix out",
        )


def read_rows(rows: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of the rows as they would be trained on, in pieces of at most CHUNK, up
    to MAX_TOKENS in all."""
    recipe = Recipe(
        model=Model(name_or_path="-"),
        data=Data(path=rows, on_long_row="split"),
        training=Training(max_length=CHUNK),
        output_dir="-",
    )
    left = MAX_TOKENS
    source = sources.find_source(recipe.data, "path", rows, "train")
    for row in prepare.stream_rows(
        source, recipe, encode.Renderer(tokenizer, recipe.data.train_on)
    ):
        if left <= 0:
            ui.say(f"  importance matrix: the first {MAX_TOKENS} tokens of {rows}")
            return
        left -= len(row.input_ids)
        yield [int(token) for token in row.input_ids]


def measure_inputs(
    network: PreTrainedModel, batches: Iterable[list[int]]
) -> tuple[dict[str, torch.Tensor], int]:
    """Sum the squares of each input column (float32, on the CPU) by linear module; return the sums
    and the number of tokens."""
    sums: dict[str, torch.Tensor] = {}
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    device, num_tokens = next(network.parameters()).device, 0
    with ExitStack() as stack, torch.inference_mode():
        for name, module in layers.items():
            stack.enter_context(_watch_inputs(name, module, sums))
        for ids in batches:
            network.eval()(input_ids=torch.tensor([ids], device=device))
            num_tokens += len(ids)
    if not num_tokens:
        raise LoraError(
            "there are no rows to measure an importance matrix on",
            "--imatrix DATA with rows of text",
        )
    return {name: each.float().cpu() for name, each in sums.items()}, num_tokens


@contextmanager
def _watch_inputs(name: str, module: nn.Module, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """Add up the squares of what goes into `module`, for a while."""

    def add(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        squares = given[0].float().square().flatten(0, -2).sum(0, dtype=torch.float64)
        sums[name] = sums[name] + squares if name in sums else squares

    hook = module.register_forward_pre_hook(add)
    try:
        yield
    finally:
        hook.remove()
