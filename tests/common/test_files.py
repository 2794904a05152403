"""Files that appear whole: a signal at any instant leaves what was there or what was to come, and
nothing beside.

The signal is an exception raised in turn at every line, call and return of what makes, names and
removes: what a handler raises comes at such instants alone. Hermetic. Alone: pytest
tests/common/test_files.py
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lora_cli.common import files
from lora_cli.common.errors import LoraError, RejectedError
from lora_cli.train import checkpoints

ROOT = Path(__file__).parent.parent.parent


class SignalError(BaseException):
    """What a signal's handler raises."""


TRACED = {module.__file__ for module in (checkpoints, contextlib, files, shutil)}


def interrupted(block: Callable[[], None], instant: int) -> bool:
    """Whether `block` came to this instant, and was ended there."""
    instants = itertools.count()
    raised: list[SignalError] = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in TRACED:
            return None
        if next(instants) == instant:
            raised.append(SignalError())
            raise raised[0]
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        block()
    except SignalError:
        pass
    except OSError:  # rmtree closes a folder, and if it is ended before it notes that, again
        assert raised
    finally:
        sys.settrace(before)
    return bool(raised)


def stage(folder: Path) -> None:
    with files.staged_folder(folder / "out") as staging:
        (staging / "one").write_text("1")
        (staging / "two").write_text("2")


def reject(folder: Path) -> None:
    with (
        suppress(RejectedError),
        files.staged_folder(folder / "out", folder / "out.rejected") as staging,
    ):
        (staging / "one").write_text("1")
        (staging / "two").write_text("2")
        raise RejectedError("no", "again")


def fail(folder: Path) -> None:
    with suppress(LoraError), files.staged_folder(folder / "out") as staging:
        (staging / "one").write_text("1")
        raise LoraError("no", "again")


def write(folder: Path) -> None:
    files.write_text(folder / "text", "new")


def scratch(folder: Path) -> None:
    with files.scratch_folder(".scratch-", folder) as made:
        (made / "below").mkdir()
        (made / "below" / "one").write_text("1")


def save(folder: Path) -> None:
    with checkpoints.stage_checkpoint(folder, "run", 2) as staging:
        (staging / "one").write_text("1")


def rotate(folder: Path) -> None:
    checkpoints.delete_old(folder, "run", 1, last=9, best=None)


def old_checkpoint(folder: Path) -> None:
    """Two, so that the older one goes."""
    for step in (1, 9):
        with checkpoints.stage_checkpoint(folder, "run", step) as staging:
            (staging / "one").write_text("1")


WHOLE = {"one": "1", "two": "2"}
CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], list[str]]] = {
    "a folder": (stage, lambda folder: None, ["out"]),
    "a folder that takes an empty one's place": (
        stage,
        lambda folder: (folder / "out").mkdir(),
        ["out"],
    ),
    "a rejected folder": (reject, lambda folder: None, ["out.rejected"]),
    "a failure": (fail, lambda folder: None, []),
    "a file": (write, lambda folder: (folder / "text").write_text("old"), ["text"]),
    "a scratch folder": (scratch, lambda folder: None, []),
    "a checkpoint": (save, lambda folder: None, ["checkpoint-2"]),
    "rotation": (rotate, old_checkpoint, ["checkpoint-1", "checkpoint-9"]),
}


def instants_of(case: str, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """The folder after an interruption at each instant in turn, and whether there was one; the last
    has none."""
    act, prepare, _ = CASES[case]
    for instant in itertools.count():
        folder = tmp_path / str(instant)
        folder.mkdir()
        prepare(folder)
        ended = interrupted(lambda: act(folder), instant)  # noqa: B023
        files._remove_the_rest()  # as at the process's end
        yield folder, ended
        if not ended:
            return


# an exception in a context manager that is being thrown away is only told
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_signal_at_any_instant_leaves_nothing_half_made(case: str, tmp_path: Path) -> None:
    known, seen = CASES[case][2], 0
    for folder, ended in instants_of(case, tmp_path):
        left = sorted(path.name for path in folder.iterdir())
        assert set(left) <= set(known), (folder.name, left)
        for name in left:
            check_whole(folder / name)
        seen += ended
    assert seen > 40
    assert left == ([] if not known else [known[-1]])  # uninterrupted
    assert not files._passing


def check_whole(path: Path) -> None:
    if path.name.startswith("checkpoint-"):
        assert isinstance(checkpoints.read_checkpoint(path, "run"), checkpoints.Checkpoint), path
    elif path.is_file():
        assert path.read_text() in ("old", "new")
    else:
        found = {each.name: each.read_text() for each in path.iterdir()}
        assert found in (WHOLE, {}), path  # {}: the empty folder that was there


AMID_REMOVAL = """
import os, shutil, signal, sys
from pathlib import Path
from lora_cli.common import files

remove = shutil.rmtree

def interrupted(path, **options):
    shutil.rmtree = remove
    next(Path(path).iterdir()).unlink()
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
shutil.rmtree = interrupted
with files.staged_folder(Path(sys.argv[1]) / "out") as staging:
    (staging / "one").write_text("1")
    (staging / "two").write_text("2")
    raise ValueError
"""


def test_what_a_signal_left_of_a_removal_goes_with_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AMID_REMOVAL, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 143
    assert not list(tmp_path.iterdir())


def test_a_forked_child_leaves_its_parent_s_folders_alone(tmp_path: Path) -> None:
    with files.scratch_folder(".scratch-", tmp_path) as folder:
        child = os.fork()
        if not child:
            files._remove_the_rest()
            os._exit(0)
        os.waitpid(child, 0)
        assert folder.is_dir()


def test_a_dead_process_s_folder_of_the_same_number_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / f".out.{files._stamp()}.tmp"
    left.mkdir()
    (left / "stale").write_text("of another run")
    stage(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "two"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_cli.common import files

with files.staged_folder(Path(sys.argv[1]) / "out"), files.scratch_folder(".scratch-", Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_when_the_same_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    host = files._stamp().partition("-")[2]
    alive, elsewhere = f".out.{os.getppid()}-{host}.tmp", ".out.999999999-01234567.tmp"
    for name in (alive, elsewhere):
        (tmp_path / name).mkdir()
    stage(tmp_path)
    scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive, elsewhere}
    assert capsys.readouterr().err.count("which a process that was killed had left") == 2


def test_a_folder_for_results_goes_where_there_are_none(tmp_path: Path) -> None:
    with suppress(LoraError), files.scratch_beside_results(".scratch-", tmp_path / "new"):
        raise LoraError("no", "again")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    for name in ("old", "filled"):
        with files.scratch_beside_results(".scratch-", tmp_path / name):
            if name == "filled":
                (tmp_path / name / "one").write_text("1")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["filled", "old", "one"]


def test_a_folder_that_cannot_be_made_is_refused_and_one_that_can_is_not_made(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for wrong in ("file", "file/below", "link", "link/below", "n" * 300, "new/" + "n" * 300):
        with pytest.raises(LoraError, match="cannot be made: "):
            files.refuse_unmakable(tmp_path / wrong)
    files.refuse_unmakable(tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "kept"
