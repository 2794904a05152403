"""What is said of a run that has ended: numbers to keep, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_cli.common import provenance, quote, remote_code, ui
from lora_cli.distributed import ranks
from lora_cli.models import TrainingRecord
from lora_cli.recipe import Recipe

SHORT = 60
"""Characters of a prompt that stands in a command."""


def list_lines(folder: Path, record: TrainingRecord, recipe: Recipe, seen: int) -> list[str]:
    """Return the receipt of the finished run in `folder`, which has seen so many tokens, or
    pictures: a line each."""
    rows = [*_list_numbers(record, recipe.task_row.unit, seen), ("folder", str(folder))]
    width = max(len(name) for name, _ in rows)
    table = [f"  {name:{width}}  {text}" for name, text in rows]
    return [*table, *(f"next: {command}" for command in list_commands(folder, recipe))]


def _list_numbers(record: TrainingRecord, unit: str, seen: int) -> Iterator[tuple[str, str]]:
    assert record.results is not None
    results = record.results.to_data()
    if (seconds := results.get("duration_s")) is not None:
        again = ", since it was resumed" if record.resumed else ""
        yield "time", f"{ui.format_duration(seconds)}{again}"
    yield "steps", f"{record.results.steps:,}"
    yield unit, f"{seen:,}, {results[f'{unit}_per_second']:,.0f} a second"
    if (loss := record.results.train_loss) is not None:
        yield "loss", f"{loss:.4f}, the mean of all steps"
    if (kept := record.kept) is not None and kept.value is not None:
        last = "" if kept.last_value is None else f"; {kept.last_value:.4f} at {kept.last_step}"
        others = last if kept.last_step != kept.step else ""
        yield "adapter", f"{kept.metric} {kept.value:.4f} at step {kept.step}{others}"
    planned = record.planned_memory_gb
    of = "" if planned is None else f", {planned:.1f} GB planned"
    yield "memory", f"{results['peak_memory_gb']:.1f} GB at most{of}"


def list_commands(folder: Path, recipe: Recipe) -> Iterator[str]:
    """Return commands that work as pasted, for an adapter of the recipe's task in the folder of its
    run."""
    trust = _list_trust()
    adapter, task = quote(folder / "adapter"), recipe.task_row
    commands = [["merge", adapter, quote(folder / "merged"), *trust], ["report", quote(folder)]]
    if task.writes_next_tokens and recipe.data.holds_out:
        commands.insert(0, ["evaluate", adapter, *trust])
    elif rows := _find_rows(recipe):
        verb = "evaluate" if task.writes_next_tokens else "predict"
        commands.insert(0, [verb, adapter, "--data", rows, *trust])
    if task.writes_next_tokens:
        first = next(iter(recipe.training.sample_prompts), "")
        short = first.isprintable() and 0 < len(first) <= SHORT and not first.startswith("-")
        asked = ["generate", adapter, "--prompt", quote(first)] if short else ["chat", adapter]
        commands.insert(0, [*asked, *trust])
    return (" ".join(["lora", *words]) for words in commands)


def write_resumption(folder: Path) -> str:
    """Return the command by which the run in a folder goes on as it was started here: in as many
    processes, and with its base's own code."""
    words = ["lora", "train", quote(folder / provenance.RESOLVED_RECIPE), "--resume"]
    if ranks.may_start_again():
        words += ["--nproc", str(ranks.count())]
    return " ".join([*words, *_list_trust()])


def _list_trust() -> list[str]:
    return [remote_code.FLAG] if remote_code.is_allowed() else []


def _find_rows(recipe: Recipe) -> str | None:
    """Return the file of rows to evaluate on, quoted, if it is one that can be given as it is."""
    data = recipe.data
    path = data.eval_path
    plain = not data.columns and data.format == "auto" and not recipe.task_row.reads_pictures
    if isinstance(path, str) and plain and Path(path).is_file():
        return quote(path)
    return None
