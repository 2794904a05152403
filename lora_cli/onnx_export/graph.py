"""Write a network as an ONNX file, by torch's own exporter."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_cli.common import LoraError, RejectedError, library_errors, streams, ui
from lora_cli.onnx_export.feeds import Feed

FILE = "model.onnx"
OPSET = 20
"""The version of ONNX's operations. From 23 on attention and rotary positions are one operation
each, and onnxruntime 1.32 refuses the latter as torch 2.13 writes it (Llama)."""
LARGEST = 1536 << 20
"""Bytes of weights that stand in the file itself, beside which ONNX's format (2 GB) has room for
the graph; more stand in a file beside it."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SAID = 300
"""Characters of what another program says that are shown."""


def refuse_missing_packages() -> None:
    """Raise LoraError where a package of the extra is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise LoraError(
            f"writing ONNX needs {' and '.join(missing)}, which {verb} not installed",
            "pip install 'lora-cli[onnx]'",
        )


class Plain(torch.nn.Module):
    """A network as ONNX has it: tensors by their places go in, and the logits come out."""

    def __init__(
        self, network: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.network, self.inputs, self.outputs = network, inputs, outputs
        keeps = "use_cache" in inspect.signature(network.forward).parameters
        self.options = {"use_cache": False} if keeps else {}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs in their order."""
        made = self.network(**dict(zip(self.inputs, tensors)), **self.options)
        return tuple(made[name] for name in self.outputs)


def write_graph(
    network: PreTrainedModel, feed: Feed, outputs: Sequence[str], file: Path, name: str
) -> None:
    """Write `file`: the network of the model `name`, which takes what `feed` has, of any batch and
    length, and gives `outputs`. It is left with eager attention.

    Raise LoraError where the exporter does not know what the model computes, RejectedError where
    onnx finds a fault in what it wrote.
    """
    import onnx

    # of the ways to attend the plainest: others of T5's have no ONNX, and numbers and speed of
    # what comes out are the same
    network.set_attn_implementation("eager")
    plain = Plain(network, list(feed.inputs), list(outputs))
    with _hushed():
        program = _export(plain, feed, name)
        _forget_sources(program.model)
        size = sum(weight.numel() * weight.element_size() for weight in network.parameters())
        program.save(file, external_data=size > LARGEST)
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RejectedError(
            f"what torch's exporter made of {name} is not sound: {shorten(error)}", keep_model(name)
        ) from error


def _export(plain: Plain, feed: Feed, name: str) -> Any:
    """Return torch's program of a network. Raises LoraError with the exporter's reason."""
    try:
        return torch.onnx.export(
            plain,
            tuple(feed.inputs.values()),
            dynamo=True,
            dynamic_shapes=(tuple(feed.axes for _ in feed.inputs),),
            input_names=list(feed.inputs),
            output_names=plain.outputs,
            opset_version=OPSET,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        if known := library_errors.translate(error):
            raise known from error
        kind = type(plain.network).__name__
        raise LoraError(
            f"torch's exporter cannot write {kind} ({name}) as ONNX: {_explain(error)}",
            keep_model(name),
        ) from error


def keep_model(name: str) -> str:
    """Return the hint where no ONNX can be had."""
    return f"transformers runs {name} as it is"


def _explain(error: BaseException) -> str:
    """Return the reason under what the exporter says of itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {shorten(error)}"


def shorten(error: BaseException) -> str:
    """Return what another program says, in one line."""
    said = " ".join(str(error).split())
    return said if len(said) <= SAID else f"{said[: SAID - 1]}…"


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep off the screen what the exporter says of its own work, and the graphs that torch prints
    where it fails."""
    with ui.hush(), streams.silence_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield


def _forget_sources(model: Any) -> None:
    """Take out of a graph (onnx_ir's) which lines of Python each part is from: paths of this
    machine, and half the size of a small model."""
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
