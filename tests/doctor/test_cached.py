"""`lora cache`: which bases are kept, who uses one, and that none goes while it is used.

Hermetic: a cache of a few bytes. Alone: pytest tests/doctor/test_cached.py
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_cli.common import LoraError, UsageError, files
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
