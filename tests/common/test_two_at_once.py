"""Two processes that make the same thing: one is refused, with the name of the other, and nothing is left beside the result.

Hermetic: processes of its own. Alone: pytest tests/common/test_two_at_once.py
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.common import LoraError, files, lock
from lora_cli.recipe import shipped_recipes

CONTEXT = multiprocessing.get_context("fork")


def make_folder(folder: Path) -> None:
    with files.staged_folder(folder / "out") as staging:
        (staging / "file").write_text(str(os.getpid()))


def make_file(folder: Path) -> None:
    target = folder / "out" / "file"
    with files.scratch_beside(target.parent, [target], target.parent / "Modelfile") as scratch:
        (scratch / "made").write_text(str(os.getpid()))
        files.move_together({scratch / "made": target})


def copy_recipe(folder: Path) -> None:
    os.chdir(folder)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "recipe.schema.json").touch()
    shipped_recipes.copy_recipe("gsm8k", folder / "out" / "file")


MAKERS: list[Callable[[Path], None]] = [make_folder, make_file]


def try_once(make: Callable[[Path], None], folder: Path, start, said) -> None:
    start.wait()
    try:
        make(folder)
        said.put((os.getpid(), None))
    except LoraError as error:
        said.put((os.getpid(), error.message))
    except BaseException as error:
        said.put((os.getpid(), repr(error)))


@pytest.mark.parametrize("make", [*MAKERS, copy_recipe])
def test_one_of_eight_makes_it(make: Callable[[Path], None], tmp_path: Path) -> None:
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        start, said = CONTEXT.Barrier(8), CONTEXT.Queue()
        every = [
            CONTEXT.Process(target=try_once, args=(make, folder, start, said)) for _ in range(8)
        ]
        for each in every:
            each.start()
        answers = [said.get(timeout=60) for _ in every]
        for each in every:
            each.join()
        winners = [process for process, message in answers if message is None]
        assert len(winners) == 1, answers
        if make is not copy_recipe:
            assert (folder / "out" / "file").read_text() == str(winners[0])
        for _, message in answers:
            assert (
                message is None or "is in use by process" in message or "already exists" in message
            ), message
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".lora-")]


@pytest.mark.parametrize("make", MAKERS)
def test_who_comes_second_is_told_who_was_first(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" if make is make_folder else tmp_path / "out" / "file"
    with lock.hold(target):
        start, said = CONTEXT.Barrier(1), CONTEXT.Queue()
        other = CONTEXT.Process(target=try_once, args=(make, tmp_path, start, said))
        other.start()
        _, message = said.get(timeout=60)
        other.join()
        with lock.hold(target):  # by the same process
            pass
    assert message == f"{target} is in use by process {os.getpid()} on {socket.gethostname()}"
    make(tmp_path)


def test_a_lock_whose_file_lost_its_name_is_none(tmp_path: Path) -> None:
    """As by one who removes it while another opens it."""
    with lock.hold(tmp_path / "out"):
        next(tmp_path.glob(".lora-*.lock")).unlink()
        with pytest.raises(AssertionError), lock._try(tmp_path / "x", tmp_path) as mine:
            assert not mine
    assert list(tmp_path.iterdir()) == []
