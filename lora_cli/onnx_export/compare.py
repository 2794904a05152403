"""Hold what onnxruntime makes of a file against what torch made of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lora_cli.common import LoraError, RejectedError, library_errors, streams
from lora_cli.onnx_export.feeds import Feed
from lora_cli.onnx_export.graph import keep_model, shorten

LIMIT = 1e-4
"""How far an output may lie from torch's, times the outputs' spread where that is above one. Sums
in another order came to 5.7e-6 at most (ten families by three tasks, small and random), and to
2.0e-6 in a MiniLM trained to classify; its mask ignored came to 1.2, its token types to 0.2."""
QUIET = 4
"""onnxruntime's level for what it says of itself: only what ends the process."""

Outputs = dict[str, torch.Tensor]
"""What a model gives, by name."""


class Distance(NamedTuple):
    """How far an output lies from torch's at most, and how far it may."""

    largest: float
    limit: float

    @property
    def is_kept(self) -> bool:
        """Whether it is within the limit; NaN is not."""
        return self.largest <= self.limit

    def __str__(self) -> str:
        return f"{self.largest:.2e} (limit {self.limit:.2e})"


def run_torch(network: PreTrainedModel, feeds: Sequence[Feed], name: str) -> list[Outputs]:
    """Return the logits that a network gives for each feed. Raises LoraError where it fails on
    them, has none, or some that are no numbers."""
    network.eval()
    with (
        library_errors.translate_file_errors(f"{name} does not run", "does config.json fit it?"),
        torch.inference_mode(),
    ):
        made = [network(**feed.inputs) for feed in feeds]
    logits = [
        {key: value.float() for key, value in each.items() if key.endswith("logits")}
        for each in made
    ]
    if not logits[0]:
        raise LoraError(
            f"{type(network).__name__} ({name}) gives no logits, by which it could be compared",
            keep_model(name),
        )
    if any(value.isnan().any() for each in logits for value in each.values()):
        raise LoraError(
            f"{name} answers NaN in torch", "lora verify it against what it is made from"
        )
    return logits


def run_onnx(file: Path, feeds: Sequence[Feed], names: Sequence[str]) -> list[Outputs]:
    """Return what onnxruntime gives for each feed, on the CPU and optimised as it does by itself.
    Raises RejectedError where it refuses the file, or fails."""
    with streams.silence_libraries():
        import onnxruntime

    onnxruntime.disable_telemetry_events()  # of Windows' builds
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        given = [
            session.run(list(names), {key: value.numpy() for key, value in feed.inputs.items()})
            for feed in feeds
        ]
    except Exception as error:
        if known := library_errors.translate(error):
            raise known from error
        raise RejectedError(
            f"onnxruntime {onnxruntime.__version__} does not run {file.name}: {shorten(error)}",
            "pip install -U onnxruntime",
        ) from error
    return [dict(zip(names, map(torch.from_numpy, each))) for each in given]


def measure(
    feeds: Sequence[Feed], expected: Sequence[Outputs], given: Sequence[Outputs]
) -> dict[str, Distance]:
    """Return how far each output lies from what was expected, over all feeds; what a model says of
    padding does not count."""
    return {name: _measure(*_cut_padding(name, feeds, expected, given)) for name in expected[0]}


def is_same_on_either_side(feeds: Sequence[Feed], made: Sequence[Outputs]) -> bool:
    """Return whether a model says the same of the texts of the first two batches, which are padded
    on one side and on the other.

    One that reads the first place as the whole text's does not: what it says of a padding token is
    nobody's, and differs between two ways to attend to nothing.
    """
    cut = [_cut_padding(name, feeds, made)[0] for name in made[0]]
    return all(_measure(each[:1], each[1:2]).is_kept for each in cut)


def _cut_padding(
    name: str, feeds: Sequence[Feed], *made: Sequence[Outputs]
) -> list[list[torch.Tensor]]:
    """Return an output of each feed where it says something of text: by token where each has one,
    which shows by its length."""
    places = [feed.text.shape for feed in feeds]
    by_token = all(
        each[name].shape[:2] == shape for runs in made for each, shape in zip(runs, places)
    )
    return [
        [each[name][feed.text] if by_token else each[name] for each, feed in zip(runs, feeds)]
        for runs in made
    ]


def _measure(expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Distance:
    """Return the largest difference; infinite for outputs of another shape."""
    if [each.shape for each in expected] != [each.shape for each in given]:
        return Distance(float("inf"), LIMIT)
    before, after = (torch.cat([part.flatten() for part in each]) for each in (expected, given))
    spread = before.double().std().item()
    apart = (before.double() - after.double()).abs().max().item()
    return Distance(apart, LIMIT * max(1.0, spread))


def refuse_different(distances: Mapping[str, Distance], name: str, version: str) -> None:
    """Raise RejectedError where onnxruntime gives something else than the model."""
    wrong = [f"{output} by {each}" for output, each in distances.items() if not each.is_kept]
    if wrong:
        raise RejectedError(
            f"onnxruntime {version} says something else than {name} in torch: {', '.join(wrong)}",
            keep_model(name),
        )
