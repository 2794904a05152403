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

from lora_cli.common import endings, files, lock
from lora_cli.common.errors import LoraError, RejectedError
from lora_cli.train import checkpoints

ROOT = Path(__file__).parent.parent.parent


class SignalError(BaseException):
    """What a signal's handler raises."""


TRACED = {module.__file__ for module in (checkpoints, contextlib, endings, files, shutil)}


def interrupted(block: Callable[[], None], instant: int) -> bool:
    """Whether `block` came to this instant, and was ended there."""
    instants = itertools.count()
    raised: list[SignalError] = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in TRACED:
            return None
        if next(instants) >= instant and not raised and not endings._postponing:
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
    with files.scratch_folder(folder) as made:
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


@pytest.fixture(autouse=True)
def swept_anew() -> None:
    files.remove_leftovers.cache_clear()


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
        endings.undo_all()  # as at the process's end
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
    assert not endings._undoings


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
from lora_cli.common import endings, files

remove = shutil.rmtree

def interrupted(path, **options):
    if (one := next(Path(path).rglob("one"), None)):
        one.unlink()
    else:
        shutil.rmtree = remove
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)

endings.listen()
shutil.rmtree = interrupted
with files.staged_folder(Path(sys.argv[1]) / "out") as staging:
    (staging / "one").write_text("1")
    (staging / "two").write_text("2")
    raise ValueError
"""


def test_a_signal_amid_a_removal_and_amid_its_own_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AMID_REMOVAL, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 143
    assert not list(tmp_path.iterdir())


def test_a_forked_child_leaves_its_parent_s_folders_alone(tmp_path: Path) -> None:
    with files.scratch_folder(tmp_path) as folder:
        child = os.fork()
        if not child:
            endings.undo_all()
            os._exit(0)
        os.waitpid(child, 0)
        assert folder.is_dir()


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_cli.common import files, lock

here = Path(sys.argv[1])
with files.staged_folder(here / "out"), files.scratch_folder(here), lock.hold(here / "other"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_at_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert len(list(tmp_path.iterdir())) == 4
    start, host = files._find_start(os.getppid()), files._name_host()
    alive = f".lora-{os.getppid()}-{start}-{host}-01234567.tmp"
    elsewhere = f".lora-999999999-1-{'0' * 6}-01234567.tmp"
    reused = f".lora-{os.getppid()}-{start - 1}-{host}-01234567.tmp"
    for name in (alive, elsewhere, reused):
        (tmp_path / name).mkdir()
    with lock.hold(tmp_path / "held"):
        stage(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
    assert left - {"out", alive, elsewhere} == {name for name in left if name.endswith(".lock")}
    assert len(left) == 4
    assert capsys.readouterr().err.count("which a process that was killed had left") == 3
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="names of processes are Linux's")
def test_a_process_may_be_called_anything(tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(b"x\xff) 1 \xe9")
    named.symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([named, "60"]) as process:
        try:
            assert files._find_start(process.pid) >= files._find_start(os.getpid()) > 0
        finally:
            process.kill()
    assert files._find_start(process.pid) == -1


def test_only_folders_that_stay_empty_go_again(tmp_path: Path) -> None:
    for name in ("new/below", "old", "filled/below"):
        if name == "old":
            (tmp_path / name).mkdir()
        with suppress(LoraError), files.made_folder(tmp_path / name):
            if "filled" in name:
                (tmp_path / name / "one").write_text("1")
            raise LoraError("no", "again")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["filled", "filled/below", "filled/below/one", "old"]


@pytest.mark.parametrize("mask", [0, 0o077, 0o027])
def test_what_is_in_the_making_is_the_maker_s_alone_and_what_is_made_is_as_the_umask_says(
    mask: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with files.staged_folder(tmp_path / "out") as staging:
            assert staging.parent.stat().st_mode & 0o777 == 0o700
            (staging / "file").touch(0o600)  # as safetensors does
        files.write_text(tmp_path / "text", "1")
    finally:
        os.umask(before)
    modes = [tmp_path / "out", tmp_path / "out" / "file", tmp_path / "text"]
    assert [path.stat().st_mode & 0o777 for path in modes] == [
        0o777 & ~mask,
        0o666 & ~mask,
        0o666 & ~mask,
    ]


PLANTED = {
    "a folder": Path.mkdir,
    "a file": Path.touch,
    "a link": lambda path: path.symlink_to(path.parent.parent / "victim"),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("make", [stage, write, scratch])
def test_nothing_that_somebody_planted_is_taken_over(
    make: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the random number is guessed."""
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    victim.mkdir()
    monkeypatch.setattr(files.secrets, "token_hex", lambda length: "0" * 2 * length)
    PLANTED[kind](files._name_passing(folder))
    with pytest.raises(LoraError, match="another program's"):
        make(folder)
    assert not list(victim.iterdir())


def fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "theirs").touch()


@pytest.mark.parametrize("plant", [*PLANTED.values(), fill])
def test_a_name_that_is_taken_meanwhile_is_left_as_it_is(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "below").mkdir()
    made = tmp_path / "below" / "out"
    with suppress(LoraError), files.staged_folder(made) as staging:
        (staging / "one").write_text("1")
        plant(made)
    assert not list((tmp_path / "victim").iterdir())
    if plant is Path.mkdir:  # an empty folder may be taken
        assert (made / "one").is_file()
    else:
        assert not (made / "one").exists()
    assert [path.name for path in made.parent.iterdir()] == ["out"]


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
