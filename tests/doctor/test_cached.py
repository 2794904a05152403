"""`lora cache`: which bases are kept, who uses one, and that none goes while it is used.

Hermetic: a cache of a few bytes. Alone: pytest tests/doctor/test_cached.py
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock
import pytest

from lora_cli.common import LoraError, UsageError, files, lock
from lora_cli.doctor import cached
from lora_cli.models import gguf_base, gguf_kept, gguf_reading
from tests.torture.attacks import gguf_bases

HOLD = (
    "import sys; from pathlib import Path; from lora_cli.models import Base\n"
    "Base(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two bases in a cache, by name; the file of the second is gone."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    made = {}
    for number, name in enumerate(("one", "two")):
        folder = gguf_kept.find_place(f"{number}" * 64) / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(3_000_000))
        source = {"file": str(tmp_path / f"{name}.gguf"), "sha256": f"{number}" * 64}
        files.write_json(folder / gguf_kept.SOURCE, source | {"type": "Q4_K", "dtype": "bfloat16"})
        os.utime(folder / gguf_kept.SOURCE, (10**9 + number, 10**9 + number))
        made[name] = folder
    return made


def test_they_are_listed(bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (files.find_cache_home() / "rows" / "x").mkdir(parents=True)
    (files.find_cache_home() / "rows" / "x" / "rows.arrow").write_bytes(bytes(2_000_000))
    cached.show_cache([], as_json=False)
    said = capsys.readouterr().out
    assert re.search(r"one +one\.gguf \(Q4_K\) +000000000000 +3\.0 MB +2001-.* here +nobody", said)
    assert re.search(r"two +two\.gguf \(Q4_K\) +111111111111 +3\.0 MB +2001-.* gone +nobody", said)
    assert "lora cache --remove 000000000000 removes the one unused longest" in said
    assert re.search(r"prepared rows +1 +2\.0 MB +what is not used for 30 days goes", said)
    assert cached.measure_cache()[0] > cached.measure_cache()[1] > 6_000_000


def test_one_is_removed_by_name_or_hash(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no base in the cache is called three"):
        cached.show_cache(["three"], as_json=True)
    cached.show_cache(["two"], as_json=True)
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["bases"]] == ["one"]
    assert not bases["two"].parent.exists()
    cached.show_cache(["000000"], as_json=True)
    assert json.loads(capsys.readouterr().out)["bases"] == []
    assert not bases["one"].parent.exists()


class Room(NamedTuple):
    free: int


def test_none_is_removed_while_a_process_uses_it(bases: dict[str, Path]) -> None:
    command = [sys.executable, "-c", HOLD, str(bases["one"])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "held\n"
        first = gguf_kept.list_kept()[0]
        assert (first.folder, len(first.users)) == (bases["one"], 1)  # used last, just now
        assert f"process {user.pid} on" in first.users[0]
        with pytest.raises(LoraError, match=f"is in use by process {user.pid} on"):
            cached.show_cache(["one"], as_json=True)
        assert (bases["one"] / "model.safetensors").is_file()
        user.kill()
    cached.show_cache(["one"], as_json=True)  # kill -9 leaves no user behind
    assert not bases["one"].parent.exists()


AMID_REMOVAL = """
import os, signal, sys
from pathlib import Path
from lora_cli.common import files
from lora_cli.models import gguf_kept

def die(path, **options):
    next(Path(path).rglob("model.safetensors")).unlink()
    os.kill(os.getpid(), signal.SIGKILL)

files.shutil.rmtree = die
gguf_kept.remove(gguf_kept.list_kept()[0])
"""


def test_one_that_was_half_removed_is_no_base_and_goes(bases: dict[str, Path]) -> None:
    done = subprocess.run([sys.executable, "-c", AMID_REMOVAL], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (bases["two"] / "model.safetensors").exists()  # used last, so the first of them
    assert gguf_kept.find_made("1" * 64) is None
    assert gguf_kept.find_made("0" * 64) == bases["one"]
    files.remove_leftovers.cache_clear()
    gguf_kept.sweep()
    assert not list(bases["two"].parent.iterdir())


def test_who_comes_while_one_is_removed_keeps_it(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looks = lock.find_holders, list[list[str]]()

    def come_after(place: Path) -> list[str]:
        looks.append(look(place))
        if len(looks) == 2:  # the first is of the list, the second of the removal
            gguf_kept.hold(bases["one"])
        return looks[-1]

    kept = gguf_kept.list_kept()[1]
    looks.append([])
    monkeypatch.setattr(lock, "find_holders", come_after)
    with pytest.raises(LoraError, match=f"is in use by process {os.getpid()} on"):
        gguf_kept.remove(kept)
    assert [bool(users) for users in looks] == [False, False, True]
    assert (bases["one"] / gguf_kept.SOURCE).is_file()
    assert (bases["one"] / "model.safetensors").stat().st_size == 3_000_000


def test_who_comes_too_late_is_told_and_holds_nothing(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = lock.hold_with_others

    def hold_late(place: Path) -> Callable[[], bool]:
        cached.show_cache(["one"], as_json=True)
        return hold(place)

    monkeypatch.setattr(lock, "hold_with_others", hold_late)
    with pytest.raises(LoraError, match="another process has just removed .*one"):
        gguf_kept.hold(bases["one"])
    assert not bases["one"].parent.exists()


def test_who_looks_at_a_new_lock_takes_it_from_nobody(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, seen = filelock.FileLock.acquire, list[Path]()

    def acquire_probed(self: filelock.FileLock) -> object:
        """What another process does that lists users, between the file's opening and its lock."""
        if seen:
            return acquire(self)
        seen.append(Path(self.lock_file))
        with filelock.FileLock(self.lock_file):
            return acquire(self)

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire_probed)
    gguf_kept.hold(bases["one"])
    monkeypatch.undo()
    monkeypatch.setenv("LORA_CACHE_DIR", str(bases["one"].parents[3]))
    assert seen
    assert [len(each.users) for each in gguf_kept.list_kept()] == [1, 0]


def test_one_that_goes_while_it_is_looked_at_is_left_out(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = lock.find_holders

    def remove_then_look(place: Path) -> list[str]:
        files.remove(place)
        return look(place)

    with monkeypatch.context() as patch:
        patch.setattr(lock, "find_holders", remove_then_look)
        assert gguf_kept.list_kept() == []
    with pytest.raises(UsageError, match="no base in the cache is called one"):
        cached.show_cache(["one"], as_json=True)


def test_one_that_is_called_twice_is_removed_once(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = gguf_kept.list_kept()[0]
    cached.show_cache(["two", "111111", "two"], as_json=True)
    assert capsys.readouterr().err.count("removed ") == 1
    with pytest.raises(LoraError, match="another process has just removed .*two"):
        gguf_kept.remove(kept)


def test_only_one_that_nobody_uses_is_offered(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    gguf_kept.hold(bases["one"])
    os.utime(bases["one"] / gguf_kept.SOURCE, (1, 1))
    cached.show_cache([], as_json=False)
    assert "--remove 111111111111 removes" in capsys.readouterr().out
    gguf_kept.hold(bases["two"])
    cached.show_cache([], as_json=False)
    assert "--remove" not in capsys.readouterr().out


def test_a_damaged_one_is_listed_and_removed(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (bases["two"] / gguf_kept.SOURCE).write_text("{")
    cached.show_cache([], as_json=False)
    said = capsys.readouterr().out
    assert re.search(r"two +gguf_source\.json is damaged +111111111111 .* unknown +nobody", said)
    cached.show_cache([], as_json=True)
    damaged = json.loads(capsys.readouterr().out)["bases"][0]
    assert (damaged["name"], damaged["made_from"], damaged["file_is_here"]) == ("two", None, False)
    cached.show_cache(["one"], as_json=True)
    cached.show_cache(["two"], as_json=True)
    assert not list(gguf_kept.find_home().glob("*/*"))


@pytest.mark.parametrize("found", ["before", "amid"])
def test_a_full_disk_is_told_with_the_room_that_is_needed(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    path = gguf_bases.sound().write(tmp_path / "x.gguf")
    if found == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Room(1000))
    else:

        def fill(*_: object) -> None:
            raise OSError(errno.EDQUOT, "the quota is used up")

        monkeypatch.setattr(gguf_reading, "write_model", fill)
    layout = gguf_reading.read_layout(path)
    needed = (2 * layout.numbers + gguf_base.BESIDE * layout.items) / 1e6
    said = rf"x\.gguf dequantised takes {needed:.1f} MB, and .*/cache/lora-cli has room for"
    with pytest.raises(LoraError, match=said) as full:
        gguf_base.dequantise(path)
    assert full.value.hint is not None
    assert "lora cache shows what it holds" in full.value.hint
    assert not list(gguf_kept.find_home().glob("*/*"))
