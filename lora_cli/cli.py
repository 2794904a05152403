"""The command line: one verb, one short function, heavy imports inside it. Errors are rendered here
only."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from lora_cli import __version__
from lora_cli.common import (
    LoraError,
    UsageError,
    endings,
    files,
    gpu_memory,
    library_errors,
    library_warnings,
    privacy,
    remote_code,
    threads,
    ui,
)
from lora_cli.distributed import place, ranks

if TYPE_CHECKING:
    from lora_cli.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA, QLoRA and DoRA; merge and export what was trained.",
)

BUG = 70
INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a bug: EX_SOFTWARE of sysexits.h."""


def _find_base(error: type[Exception], name: str) -> type[Exception]:
    """Return the class of this name that `error` derives from. ImportError where there is none."""
    for base in error.__mro__:
        if base.__name__ == name:
            return base
    raise ImportError(f"{error.__name__} is no {name}: lora does not know this typer")


# typer keeps its click to itself; a wrong option or argument is this base of what it does export
USAGE_ERROR: Any = _find_base(typer.BadParameter, "UsageError")


def _require_finite(number: float | None) -> float | None:
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
Overrides = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a value of the recipe; may be repeated.",
    ),
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
    typer.Option(min=0.0, callback=_require_finite, help="0 takes the likeliest token each time."),
]


class BaseWeights(StrEnum):
    """The weights that an adapter trained in 4 bits is merged into (`--base` names the model)."""

    dequantized = "dequantized"
    original = "original"


def _version(show: bool) -> None:
    if show:
        ui.report(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue this recipe's interrupted run.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allowed: AllowedChanges = None,
    nproc: Processes = "auto",
    nnodes: Machines = None,
    endpoint: Endpoint = None,
) -> None:
    """Train an adapter as RECIPE says; it is saved in the recipe's output_dir."""
    gpu_memory.let_segments_grow()
    if allowed and not resume:
        raise UsageError("--allow-changes is for a run that is resumed", "add --resume")
    own = place.take_place(os.environ, is_node=nnodes is not None or endpoint is not None)
    nodes = None if own else place.find_nodes(os.environ, _parse_nproc(nproc), nnodes, endpoint)
    with _load_recipe(recipe, overrides) as loaded:
        from lora_cli.distributed import launch
        from lora_cli.train import run

        rows, on_cpu = loaded.count_step_rows(), loaded.trains_on_cpu
        several = None if own else launch.settle_nodes(nodes, rows, on_cpu)
        if several:
            run.prepare(loaded, resume, allowed or [], several)
            words = sys.argv[1:]
            while asked := launch.start(several, words):
                run.change_before_again(loaded, asked)
                words = [*sys.argv[1:], "--resume"]
            return
        with ranks.joined(own):
            adapter = run.train(loaded, resume, allowed or [])
            if ranks.is_first():
                ui.report_path(adapter)


def _parse_nproc(text: str) -> int | None:
    """Return the number of processes that an option says; None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise UsageError(f"--nproc {text} is neither a number from 1 on nor auto", "--nproc 2")
    return int(text)


@app.command()
def launch(
    recipe: RecipeFile,
    slurm: Annotated[bool, typer.Option("--slurm", help="A script for sbatch.")] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="A TrainJob of Kubeflow Trainer 2, for kubectl.")
    ] = False,
    skypilot: Annotated[bool, typer.Option("--skypilot", help="A task for sky launch.")] = False,
    hf_jobs: Annotated[
        bool, typer.Option("--hf-jobs", help="A script that calls hf jobs run.")
    ] = False,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of each machine.")] = 1,
    gpu: Gpu = None,
    image: Image = None,
    time: LongestTime = None,
    name: JobName = None,
    out: NewFile = None,
) -> None:
    """Write the file that has a cluster train RECIPE; nothing is submitted."""
    from lora_cli.distributed import jobs
    from lora_cli.recipe import load_recipe

    flags = {"slurm": slurm, "kubernetes": kubernetes, "skypilot": skypilot, "hf-jobs": hf_jobs}
    kinds = [kind for kind, given in flags.items() if given]
    folder = load_recipe(recipe, overrides or []).output_dir
    job = jobs.Job(str(recipe), overrides or [], folder, nodes, gpus, gpu, image, time, name)
    jobs.launch(kinds, job, out)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show as the model sees them.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what RECIPE would train on and how, without loading weights. Exit 1 for what would waste
    the run."""
    with _load_recipe(recipe, overrides) as loaded:
        from lora_cli.plan import check
        from lora_cli.train import trial

        trial.try_training(loaded)
        check.show_check(loaded, samples, as_json)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[
        Optional[str],
        typer.Option("--gpu", metavar="24GB|H100|…", help="Plan for this; default: this machine."),
    ] = None,
    tokens_per_second: Annotated[
        Optional[float],
        typer.Option(
            "--tokens-per-second",
            min=0.001,
            callback=_require_finite,
            help="A speed you know, to tell the time by.",
        ),
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Prepare the rows, however many, to count the steps.")
    ] = False,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, help="Processes that are to train together, in all.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead.")
    ] = False,
) -> None:
    """Show what RECIPE needs, without loading weights: parameters, memory, whether it fits, steps,
    time."""
    with _load_recipe(recipe, overrides, needs_rows=False) as loaded:
        from lora_cli.plan import show

        show.show_plan(loaded, gpu, tokens_per_second, data, as_json, nproc)


@app.command()
def merge(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER... OUT",
            help="LoRA or DoRA adapters, ours or any PEFT ones; a new folder.",
        ),
    ],
    base: BaseModel = None,
    weights: Weights = None,
    combination: Combination = "cat",
    density: Density = None,
    stream: Annotated[
        Optional[bool],
        typer.Option(
            "--stream/--no-stream",
            help="In constant memory, or not; default: where that is possible.",
        ),
    ] = None,
    base_weights: Annotated[
        BaseWeights, typer.Option(help="Of an adapter trained in 4 bits: what it is merged into.")
    ] = BaseWeights.dequantized,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fold an adapter, or several combined, into their base model and verify the result."""
    *adapters, out = _two_or_more(paths, "lora merge ADAPTER OUT")
    _quiet_libraries()
    from lora_cli.merge import combine, merge

    with combine.join_adapters(adapters, out, weights, combination, density, base) as adapter:
        merge.merge(adapter, out, base, stream, base_weights is BaseWeights.original)
    ui.report_path(out)


@app.command()
def combine(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER ADAPTER... OUT", help="LoRA adapters of one base; a new folder."
        ),
    ],
    weights: Weights = None,
    combination: Combination = "cat",
    density: Density = None,
    r: Annotated[
        Optional[int],
        typer.Option("--r", min=1, help="Rank of the svd kinds; default: the largest."),
    ] = None,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make one adapter of several, by PEFT's add_weighted_adapter."""
    *adapters, out = _two_or_more(paths, "lora combine ADAPTER ADAPTER OUT")
    _quiet_libraries()
    from lora_cli.merge import combine

    combine.combine(adapters, out, weights, combination, density, r, base)
    ui.report_path(out)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model that the fine-tuning started from.")],
    finetuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to; must not exist.")],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank of the adapter.")] = 64,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a LoRA adapter of what a full fine-tuning changed, by truncated SVD."""
    _quiet_libraries()
    from lora_cli.merge import extract

    extract.extract(base, finetuned, out, r)
    ui.report_path(out)


@app.command()
def convert(
    adapter: Annotated[
        Path, typer.Argument(help="A LoRA or DoRA adapter folder, ours or any PEFT one.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder to write the plain LoRA adapter to; must not exist.")
    ],
    r: Annotated[
        Optional[int], typer.Option("--r", min=1, help="Rank; default: the adapter's largest.")
    ] = None,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a plain LoRA adapter of a DoRA one, or one of a smaller rank, and say what that
    costs."""
    _quiet_libraries()
    from lora_cli.merge import extract

    extract.convert(adapter, out, r, base)
    ui.report_path(out)


@app.command()
def verify(
    first: Annotated[
        str,
        typer.Argument(metavar="A", help="An adapter, a model (folder or hub), or a .gguf file."),
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="What should be the same function: any of these.")
    ],
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare what two forms of a model say to the same prompts. Exit 1 where rounding does not
    explain it."""
    _quiet_libraries()
    from lora_cli.evaluate import verify

    ui.report(verify.verify(first, second, base))


@app.command("export-gguf")
def export_gguf(
    path: Annotated[
        Optional[Path],
        typer.Argument(
            help="A merged model or an adapter; default: the newest result under this folder."
        ),
    ] = None,
    quantize: GGUFTypes = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the files; default: PATH."),
    ] = None,
    base: BaseModel = None,
    imatrix: ImportanceMatrix = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only", help="Write the adapter alone, for llama.cpp to lay over its base."
        ),
    ] = False,
    base_cost: BaseCost = True,
    llama_cpp: LlamaCpp = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a model, or an adapter merged on the way, to GGUF with llama.cpp's own converter and
    quantiser."""
    _quiet_libraries()
    types = quantize or ["f16"]
    if adapter_only:
        from lora_cli.gguf import adapter

        folder = _require_adapter_alone(path, imatrix)
        files = adapter.export_adapter(folder, types, output, base, llama_cpp)
    else:
        from lora_cli.gguf import export

        files = export.export(path, types, output, base, llama_cpp, imatrix, base_cost)
    for file in files:
        ui.report_path(file)


def _require_adapter_alone(path: Path | None, imatrix: str | None) -> Path:
    """Return the adapter's folder; raise UsageError for options that --adapter-only cannot have."""
    if imatrix is not None:
        raise UsageError(
            "--imatrix is for the quantiser's types, which an adapter has none of", "leave it out"
        )
    if path is None:
        raise UsageError(
            "--adapter-only needs the adapter's folder", "lora export-gguf ADAPTER --adapter-only"
        )
    return path


@app.command("setup-llama-cpp")
def setup_llama_cpp() -> None:
    """Install a pinned copy of llama.cpp's converters, checked by sha256."""
    from lora_cli.gguf import install

    ui.report_path(install.install_converters())


@app.command()
def generate(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Base, adapters, merged folders, .gguf files."),
    ],
    prompt: Annotated[
        Optional[list[str]], typer.Option("--prompt", "-p", help="May be repeated.")
    ] = None,
    file: Annotated[
        Optional[Path],
        typer.Option(
            "--file",
            "-f",
            help="Prompts: lines of .txt, or rows as for training; their answers are compared.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    base: BaseModel = None,
    show: Annotated[
        Optional[int], typer.Option(min=0, help="Print at most this many prompts' answers.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per prompt and model on stdout.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer the same prompts with several models side by side."""
    _quiet_libraries()
    from lora_cli.evaluate import generate

    generate.generate(paths, prompt or [], file, max_new_tokens, temperature, base, show, as_json)


@app.command()
def chat(
    path: Annotated[str, typer.Argument(help="Base, adapter, merged folder or .gguf file.")],
    system: Annotated[Optional[str], typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model; answers stream. /reset starts over, /quit or end of input leaves."""
    _quiet_libraries()
    from lora_cli.evaluate import chat

    chat.chat(path, system, max_new_tokens, temperature, base)


@app.command()
def doctor(
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also print every comparison's largest deviation.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead.")
    ] = False,
) -> None:
    """Check what is installed here against the published formulas. Exit 1 if something a recipe
    needs is wrong."""
    from lora_cli.doctor import checks

    if not checks.run_doctor(oracle, as_json, _quiet_libraries):
        raise typer.Exit(1)


recipes = typer.Typer()
app.add_typer(recipes, name="recipes")


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with lora; `copy` writes one into the current folder."""
    if context.invoked_subcommand is not None:
        return
    from lora_cli.recipe import shipped_recipes

    found = shipped_recipes.list_recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        ui.report(f"{recipe.name:{width}}  {recipe.purpose}")


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `lora recipes` lists them.")],
    target: Annotated[
        Optional[Path], typer.Argument(metavar="FILE", help="Must not exist; default: NAME.yaml.")
    ] = None,
) -> None:
    """Copy a shipped recipe to start your own from."""
    from lora_cli.recipe import shipped_recipes

    ui.report_path(shipped_recipes.copy_recipe(name, target))


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference of all keys as Markdown instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from lora_cli.recipe import schema

    text = schema.make_markdown() if markdown else schema.make_json()
    ui.report(*text.splitlines())


@contextmanager
def _load_recipe(
    path: Path,
    overrides: Sequence[str] | None,
    needs_rows: bool = True,
) -> Iterator[Recipe]:
    """The recipe, read before the libraries are imported: a mistake in it is answered at once.

    So is a missing file of rows, where the block needs them. Errors inside the block that begin
    with a key of the recipe name the file and line it stands in.
    """
    from lora_cli.recipe import load_recipe

    recipe = load_recipe(path, overrides or [])
    try:
        if needs_rows:
            from lora_cli.data import readers

            readers.refuse_missing_files(recipe.data)
        _quiet_libraries()
        yield recipe
    except LoraError as error:
        raise error.with_message(recipe.add_place(error.message)) from error


def _two_or_more(paths: list[Path], usage: str) -> list[Path]:
    """Return the paths; UsageError for a single one."""
    if len(paths) < 2:
        raise UsageError("the folder to write to is missing", usage)
    return paths


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter and bars off the screen; what they warn of is said."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    library_warnings.listen()
    files.keep_temporary_files_together()
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    library_warnings.listen_to_transformers()


def _refuse_unusable(stdout: object, words: Sequence[str]) -> None:
    """Raise LoraError where there is nowhere to write results to, or a word is no text: it could
    stand in no record, and no model could read it."""
    if stdout is None:
        raise LoraError("standard output is closed", "leave it open, or > /dev/null")
    for word in words:
        if re.search("[\ud800-\udfff]", word):
            raise UsageError(f"{word} is not UTF-8", "rename it, or type it as UTF-8")


def main() -> NoReturn:
    """Run the command line: exit 0, 1 for a failed run, 2 for wrong usage, 70 for a bug, 129 by
    SIGHUP, 130 when interrupted, 143 by SIGTERM."""
    endings.listen()
    ui.open_streams()
    threading.excepthook = lambda ended: ui.say(
        *_list_traceback(ended.exc_value or ended.exc_type())
    )
    sys.unraisablehook = lambda ended: ui.say(*_list_traceback(ended.exc_value or ended.exc_type()))
    threads.bound_spinning()
    try:
        _refuse_unusable(sys.stdout, sys.argv[1:])
        status = app(prog_name="lora", standalone_mode=False)
        if status == INTERRUPTED:  # typer makes that of KeyboardInterrupt
            ui.say("interrupted")
        sys.exit(status)
    except LoraError as error:
        _fail(error)
    except typer.Abort:
        ui.say("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except USAGE_ERROR as error:
        if len(sys.argv) == 1:  # no command at all: the message is the help
            ui.say(*error.format_message().splitlines())
            sys.exit(2)
        _fail(
            UsageError(
                error.format_message(), f"{error.ctx.command_path if error.ctx else 'lora'} --help"
            )
        )
    except BaseException as error:
        _explain(error)


def _explain(error: BaseException) -> NoReturn:
    """Say what a library's exception means, or report it as a bug. What is no error goes on."""
    if not isinstance(error, Exception) and not library_errors.is_panic(error):
        raise error
    known = library_errors.translate(error)
    if ranks.count() > 1 and ranks.is_torn(error):
        known = LoraError("another process of this run has ended", "it says why")
    if known is None:
        _report(error)
    _fail(known, error)


def _list_traceback(error: BaseException) -> list[str]:
    """Return the lines that say where an error came from; those of what it says itself are
    indented."""
    text = privacy.mask_secrets(privacy.replace_home("".join(traceback.format_exception(error))))
    ours = ("  ", "Traceback ")
    return [line if line.startswith(ours) else f"  {line}" for line in text.splitlines()]


def _report(error: BaseException) -> NoReturn:
    """Say that what nobody has thought of is a bug: its traceback, and how to report it."""
    bug = (
        "",
        f"This is a bug in lora {__version__}, not a mistake of yours. Please report it with the "
        "lines above, the",
        "command, the recipe, and what `lora doctor --json` prints. Tokens and your home folder "
        "are left out above.",
    )
    _end([*_list_traceback(error), *bug], BUG, error)


def _fail(error: LoraError, cause: BaseException | None = None) -> NoReturn:
    _end(ui.list_lines(error), error.exit_code, cause or error)


def _end(lines: Sequence[str], status: int, error: BaseException) -> NoReturn:
    """End by an error: say it, unless this is one of several processes and another does."""
    if not ranks.tell_failure(lines, status, error):
        ui.say(*lines)
    sys.exit(status)
