"""The verbs about a recipe: train, launch, check, plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.options import (
    AllowedChanges,
    DraftMethod,
    DraftModel,
    Endpoint,
    Gpu,
    Image,
    JobName,
    LongestTime,
    Machines,
    NewFile,
    Overrides,
    Processes,
    RecipeFile,
    RecipeOrRows,
    TrustRemoteCode,
    require_finite,
)
from lora_cli.cli.start import draft_recipe, open_recipe, recognise_rows
from lora_cli.common import UsageError, gpu_memory, remote_code, ui
from lora_cli.distributed import place, ranks

verbs = typer.Typer()


@verbs.command()
def train(
    recipe: RecipeOrRows,
    overrides: Overrides = None,
    model: DraftModel = None,
    method: DraftMethod = None,
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
    needs_one = resume or own is not None or nnodes is not None
    recipe, overrides, words = _take_recipe(recipe, overrides, model, method, needs_one)
    with open_recipe(recipe, overrides) as loaded:
        from lora_cli.distributed import launch
        from lora_cli.train import run

        step, on_cpu = loaded.count_step_rows(), loaded.trains_on_cpu
        several = None if own else launch.settle_nodes(nodes, step, on_cpu)
        if several:
            run.prepare(loaded, resume, allowed or [], several)
            while asked := launch.start(several, words):
                run.change_before_again(loaded, asked)
                words = [*words, "--resume"]
            return
        with ranks.joined(own):
            with _reported(Path(loaded.output_dir)):
                adapter = run.train(loaded, resume, allowed or [])
            if ranks.is_first():
                ui.report_path(adapter)


def _take_recipe(
    recipe: Path,
    overrides: list[str] | None,
    model: str | None,
    method: str | None,
    needs_one: bool,
) -> tuple[Path, list[str] | None, list[str]]:
    """Return the recipe to train, what overrides it, and the words by which processes of their own
    train it; the recipe is written first where rows stand in its place."""
    rows = recognise_rows(recipe, model, method)
    if rows is None:
        return recipe, overrides, sys.argv[1:]
    written = draft_recipe(rows, model, method, overrides, needs_one)
    return written, None, ["train", str(written), *[remote_code.FLAG] * remote_code.is_allowed()]


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Write the report of the run in the block when that ends, well or not."""
    from lora_cli.report import history, report

    before = history.stamp(folder)
    try:
        yield
    finally:
        if ranks.is_first():
            report.write_after(folder, before)


def _parse_nproc(text: str) -> int | None:
    """Return the number of processes that an option says; None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise UsageError(f"--nproc {text} is neither a number from 1 on nor auto", "--nproc 2")
    return int(text)


@verbs.command()
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


@verbs.command()
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
    with open_recipe(recipe, overrides) as loaded:
        from lora_cli.plan import check
        from lora_cli.train import trial

        trial.try_training(loaded)
        check.show_check(loaded, samples, as_json)


@verbs.command()
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
            callback=require_finite,
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
    with open_recipe(recipe, overrides, needs_rows=False) as loaded:
        from lora_cli.plan import show

        show.show_plan(loaded, gpu, tokens_per_second, data, as_json, nproc)
