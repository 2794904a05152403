"""The options and arguments of verbs, each declared once."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.common import remote_code


def require_finite(number: float | None) -> float | None:
    """Return the number of an option; BadParameter for `nan` and `inf`, which no range refuses."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or one of those that `lora recipes` lists."
    ),
]
RecipeOrRows = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or one of those that `lora recipes` lists; or, with --model, rows: "
        "their recipe is written first.",
    ),
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a value of the recipe; may be repeated.",
    ),
]
DraftModel = Annotated[
    Optional[str],
    typer.Option("--model", metavar="MODEL", help="The base: a folder, or a name on the hub."),
]
DraftMethod = Annotated[
    Optional[str],
    typer.Option("--method", help="lora, qlora, dora, qdora; default: the first that fits."),
]
BaseModel = Annotated[
    Optional[str],
    typer.Option(
        "--base", metavar="MODEL", help="Use this base instead of the one the adapter names."
    ),
]
BaseCost = Annotated[
    bool,
    typer.Option(
        "--base-cost/--no-base-cost",
        help="Measure what a quantised type costs the base as well: a third of the time.",
    ),
]
LlamaCpp = Annotated[
    Optional[Path],
    typer.Option(
        "--llama-cpp", metavar="DIR", help="A llama.cpp folder to take the converters from."
    ),
]
Weights = Annotated[
    Optional[str],
    typer.Option("--weights", metavar="W,W…", help="One number per adapter; default: 1 each."),
]
Combination = Annotated[
    str, typer.Option(help="cat, svd, linear, ties, dare_ties, …: PEFT's combination_type.")
]
Density = Annotated[
    Optional[float],
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the weights that ties, dare, magnitude_prune keep.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
GGUFTypes = Annotated[
    Optional[list[str]],
    typer.Option(
        "--quantize",
        "-q",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, Q4_K_M, …; may be repeated.",
    ),
]
ImportanceMatrix = Annotated[
    Optional[str],
    typer.Option(
        "--imatrix", metavar="FILE|DATA", help="An importance matrix, or rows to measure one on."
    ),
]
AllowedChanges = Annotated[
    Optional[list[str]],
    typer.Option(
        "--allow-changes",
        metavar="SECTION.KEY",
        help="With --resume: this may differ; may be repeated.",
    ),
]
Processes = Annotated[
    str,
    typer.Option(
        "--nproc",
        metavar="N|auto",
        help="Processes that train together on this machine; auto: one for each GPU.",
    ),
]
Machines = Annotated[
    Optional[int],
    typer.Option("--nnodes", min=1, help="Machines, on each of which this command is started."),
]
Endpoint = Annotated[
    Optional[str],
    typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the machines meet."),
]
Gpu = Annotated[
    Optional[str],
    typer.Option("--gpu", metavar="H100|…", help="Their kind, as the scheduler calls it."),
]
Image = Annotated[Optional[str], typer.Option("--image", help="A container image with lora.")]
LongestTime = Annotated[
    Optional[str],
    typer.Option(
        "--time", metavar="90m|24h|3d", help="The longest; default: 24h, Kubernetes sets none."
    ),
]
JobName = Annotated[
    Optional[str], typer.Option("--name", help="The job's name; default: lora- and the recipe's.")
]
AskedRows = Annotated[
    Optional[str],
    typer.Option(
        "--data", metavar="FILE", help="Rows as for data.path; - reads JSON lines from stdin."
    ),
]
AskedTexts = Annotated[Optional[list[str]], typer.Option("--text", help="A text; may be repeated.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows that are computed at a time.")]
LongestRow = Annotated[
    Optional[int],
    typer.Option(
        "--max-length", min=2, help="Tokens of a row; default: as in training, or as a model reads."
    ),
]
ComparesLabels = Annotated[
    bool, typer.Option("--labels/--no-labels", help="Compare answers with what rows say is right.")
]
LongestText = Annotated[
    Optional[int],
    typer.Option("--max-new-tokens", min=1, help="Tokens of a written text; as in training."),
]
SaysAll = Annotated[
    bool,
    typer.Option("--all", help="Say what is likely of all labels, words, windows over a text."),
]
Columns = Annotated[
    Optional[list[str]],
    typer.Option(
        "--column",
        metavar="OURS=THEIRS",
        help="What a column is called in the rows (text=body); may be repeated.",
    ),
]
KeptColumns = Annotated[
    Optional[list[str]],
    typer.Option(
        "--keep", metavar="COLUMN", help="Repeat this column beside the answers; may be repeated."
    ),
]
NewFile = Annotated[
    Optional[Path],
    typer.Option("--out", metavar="FILE", help="Write it there; must not exist; default: stdout."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        remote_code.FLAG,
        callback=lambda given: remote_code.set_allowed(given),
        help="Let a model's repository run its own Python code here; only this option allows it.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, callback=require_finite, help="0 takes the likeliest token each time."),
]

HeldOutRows = Annotated[
    Optional[str],
    typer.Option("--data", metavar="FILE", help="Held-out rows; by default the run's own."),
]
MetricNames = Annotated[
    Optional[str],
    typer.Option(
        metavar="NAMES",
        help="loss, perplexity, exact, normalised, f1, contains, numeric, json_valid, json_equal, "
        "regex, chrf, bleu, with commas between; default: by the data.",
    ),
]
Pattern = Annotated[
    Optional[str],
    typer.Option(metavar="PATTERN", help="Its first group is compared; without one it must occur."),
]
ResultFolder = Annotated[
    Optional[Path],
    typer.Option("--out", metavar="DIR", help="Default: evaluations/NAME in the adapter's run."),
]
FirstRows = Annotated[Optional[int], typer.Option(min=1, help="Score the first rows only.")]
Forgetting = Annotated[
    bool,
    typer.Option("--forgetting/--no-forgetting", help="Measure the loss on a general text, too."),
]
TaskNames = Annotated[
    Optional[str], typer.Option(metavar="NAMES", help="lm-eval's tasks, with commas between.")
]
TaskFiles = Annotated[
    Optional[Path], typer.Option(metavar="DIR", help="A folder with lm-eval's task files.")
]
ShownRows = Annotated[int, typer.Option(min=0, help="Print so many rows answered differently.")]
MoreAdapters = Annotated[
    Optional[list[str]],
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        help="One more adapter on the same base; may be repeated.",
    ),
]
Host = Annotated[str, typer.Option(help="The address to listen at.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")]
ApiKey = Annotated[
    Optional[str],
    typer.Option(envvar="LORA_API_KEY", help="Who asks must know it; default: a random one."),
]
NoApiKey = Annotated[bool, typer.Option("--no-api-key", help="Let anybody ask.")]
LongestContext = Annotated[
    Optional[int],
    typer.Option(
        min=2, help="Tokens of prompt and answer; default: what the model reads, a GGUF 4096."
    ),
]
MaxBody = Annotated[
    float, typer.Option(min=0.001, callback=require_finite, help="Megabytes of a request.")
]
MaxRequests = Annotated[
    int, typer.Option(min=1, help="Requests that wait or are answered; more get 503.")
]
RequestTime = Annotated[
    float, typer.Option(min=0.1, callback=require_finite, help="Seconds that a request may take.")
]
Grace = Annotated[
    float,
    typer.Option(
        min=0, callback=require_finite, help="Seconds for an answer when the server is ended."
    ),
]


class OtherEngine(StrEnum):
    """Another engine that serves what was trained."""

    vllm = "vllm"
    sglang = "sglang"
    ollama = "ollama"
    llama_cpp = "llama.cpp"


class LongRow(StrEnum):
    """What becomes of a row of more tokens than `--max-length`."""

    truncate = "truncate"
    error = "error"


class BadRow(StrEnum):
    """What becomes of a row that cannot be used."""

    error = "error"
    skip = "skip"


class BaseWeights(StrEnum):
    """The weights that an adapter trained in 4 bits is merged into (`--base` names the model)."""

    dequantized = "dequantized"
    original = "original"
