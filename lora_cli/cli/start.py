"""What verbs do before their work: read the recipe, count the paths, quiet the libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.common import LoraError, UsageError, files, library_warnings, quote

if TYPE_CHECKING:
    from lora_cli.recipe import Recipe


@contextmanager
def open_recipe(
    path: Path,
    overrides: Sequence[str] | None,
    needs_rows: bool = True,
) -> Iterator[Recipe]:
    """The recipe, read before the libraries are imported: a mistake in it is answered at once.

    So is a missing file of rows, where the block needs them. Errors inside the block that begin
    with a key of the recipe name the file and line it stands in.
    """
    from lora_cli.recipe import load_recipe

    try:
        recipe = load_recipe(path, overrides or [])
    except UsageError:
        from lora_cli.translate import refuse_other_tools

        refuse_other_tools(path)
        raise
    try:
        if needs_rows:
            from lora_cli.data import picture_folder, readers

            readers.refuse_missing_files(recipe.data)
            picture_folder.refuse_pictures(recipe)
        quiet_libraries()
        yield recipe
    except LoraError as error:
        raise error.with_message(recipe.add_place(error.message)) from error


def recognise_rows(recipe: Path, model: str | None, method: str | None) -> str | None:
    """Return what stands in a recipe's place if it is rows to train a model on; None for a recipe.

    UsageError for rows without a model, and for a recipe with one.
    """
    rows, is_named = str(recipe), recipe.name == str(recipe) and not recipe.suffix
    if recipe.suffix in (".yaml", ".yml") or (is_named and not recipe.is_dir()):
        for option, key, value in (
            ("model", "model.name_or_path", model),
            ("method", "method", method),
        ):
            if value is not None:
                said = f"--{option} is for rows, and {rows} is a recipe, which has its own"
                raise UsageError(said, f"--set {key}={quote(value)}")
        return None
    if model is not None:
        return rows
    from lora_cli.data import readers

    if method is None and (recipe.is_dir() or readers.guess_kind(recipe) is None):
        return None
    raise UsageError(
        f"{rows} is rows, and what is to be trained on them is not said",
        f"lora train {quote(rows)} --model MODEL, a folder or a name on the hub",
    )


def draft_recipe(
    rows: str,
    model: str | None,
    method: str | None,
    overrides: Sequence[str] | None,
    needs_one: bool,
) -> Path:
    """Write the recipe that trains a model on rows, and return its path. UsageError where what is
    asked for `needs_one` that is there already."""
    if needs_one:
        raise UsageError(
            "a run that is resumed, or of several machines, begins with a recipe",
            f"lora init {quote(rows)} --model {quote(model)} writes one",
        )
    quiet_libraries()
    from lora_cli.drafts import write

    asked = write.Asked(rows, model, method, overrides or [], measures=False)
    return write.write_recipe(asked)


def two_or_more(paths: list[Path], usage: str) -> list[Path]:
    """Return the paths; UsageError for a single one."""
    if len(paths) < 2:
        raise UsageError("the folder to write to is missing", usage)
    return paths


def quiet_libraries() -> None:
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
