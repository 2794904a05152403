"""The command line: one verb, one short function, heavy imports inside it. Errors are rendered here
only."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from lora_cli import __version__
from lora_cli.common import (
    LoraError,
    UsageError,
    gpu_memory,
    library_errors,
    library_warnings,
    privacy,
    remote_code,
    threads,
    ui,
)
from lora_cli.train import launch

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
        min=0.0, max=1.0, help="Share of the weights that ties, dare, magnitude_prune keep."
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
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        remote_code.FLAG,
        callback=lambda given: remote_code.set_allowed(given),
        help="Let a model's repository run its own Python code here; only this option allows it.",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]


class BaseWeights(StrEnum):
    """The weights that an adapter trained in 4 bits is merged into (`--base` names the model)."""

    dequantized = "dequantized"
    original = "original"


def _version(show: bool) -> None:
    if show:
        typer.echo(f"lora {__version__}")
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
    allowed: Annotated[
        Optional[list[str]],
        typer.Option(
            "--allow-changes",
            metavar="SECTION.KEY",
            help="With --resume: this may differ; may be repeated.",
        ),
    ] = None,
) -> None:
    """Train an adapter as RECIPE says; it is saved in the recipe's output_dir."""
    gpu_memory.let_segments_grow()
    launch.check_launcher(os.environ)
    if allowed and not resume:
        raise UsageError("--allow-changes is for a run that is resumed", "add --resume")
    with _load_recipe(recipe, overrides) as loaded:
        from lora_cli.train import run

        typer.echo(run.train(loaded, resume, allowed or []))


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
            "--tokens-per-second", min=0.001, help="A speed you know, to tell the time by."
        ),
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Prepare the rows, however many, to count the steps.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead.")
    ] = False,
) -> None:
    """Show what RECIPE needs, without loading weights: parameters, memory, whether it fits, steps,
    time."""
    with _load_recipe(recipe, overrides, needs_rows=False) as loaded:
        from lora_cli.plan import show

        show.show_plan(loaded, gpu, tokens_per_second, data, as_json)


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
    typer.echo(out)


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
    typer.echo(out)


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
    typer.echo(out)


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
    typer.echo(out)


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

    typer.echo(verify.verify(first, second, base))


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
        typer.echo(file)


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

    typer.echo(install.install_converters())


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
        typer.echo(f"{recipe.name:{width}}  {recipe.purpose}")


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `lora recipes` lists them.")],
    target: Annotated[
        Optional[Path], typer.Argument(metavar="FILE", help="Must not exist; default: NAME.yaml.")
    ] = None,
) -> None:
    """Copy a shipped recipe to start your own from."""
    from lora_cli.recipe import shipped_recipes

    typer.echo(shipped_recipes.copy_recipe(name, target))


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference of all keys as Markdown instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from lora_cli.recipe import schema

    typer.echo(schema.make_markdown() if markdown else schema.make_json(), nl=False)


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
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    library_warnings.listen_to_transformers()


def _end(number: int, *_: object) -> NoReturn:
    """SIGTERM, or SIGHUP by a terminal that is closed: what is half made is removed, as after an
    interruption by hand."""
    with suppress(OSError):  # the terminal may be gone
        ui.say("terminated" if number == signal.SIGTERM else "hung up")
    sys.exit(128 + number)


def _listen() -> None:
    """Let the signals that end a program end it in order, but for those that it was started to
    ignore (nohup)."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def main() -> NoReturn:
    """Run the command line: exit 0, 1 for a failed run, 2 for wrong usage, 70 for a bug, 129 by
    SIGHUP, 130 when interrupted, 143 by SIGTERM."""
    _listen()
    ui.fit_to_encoding()
    threads.bound_spinning()
    try:
        if sys.stdout is None:
            raise LoraError("standard output is closed", "leave it open, or > /dev/null")
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except USAGE_ERROR as error:
        if len(sys.argv) == 1:  # no command at all: the message is the help
            ui.say(error.format_message())
            sys.exit(2)
        _fail(
            UsageError(
                error.format_message(), f"{error.ctx.command_path if error.ctx else 'lora'} --help"
            )
        )
    except Exception as error:
        known = library_errors.translate(error)
        if known is None:
            _report(error)
        _fail(known)


def _report(error: Exception) -> NoReturn:
    """Return what nobody has thought of is a bug: its traceback, and how to report it."""
    lines = "".join(traceback.format_exception(error))
    ui.say(privacy.replace_home(lines).rstrip())
    ui.say(
        f"\nThis is a bug in lora {__version__}, not a mistake of yours. Please report it with "
        "the lines above, the\n"
        "command, the recipe, and what `lora doctor --json` prints. Tokens and your home folder "
        "are left out above."
    )
    sys.exit(BUG)


def _fail(error: LoraError) -> NoReturn:
    ui.say(ui.render_error(error))
    sys.exit(error.exit_code)
