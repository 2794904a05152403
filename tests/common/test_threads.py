"""How threads wait is bounded unless the user says how, and other work is told from our own.

Hermetic. Alone: pytest tests/common/test_threads.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora_cli.common import threads
from lora_cli.common.threads import Moment


@pytest.mark.parametrize("name", threads.WAITING)
def test_what_the_user_says_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in threads.WAITING:
        monkeypatch.setenv(each, "")  # so that it is as before when the test ends
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "7")
    threads.bound_spinning()
    assert [each for each in threads.WAITING if each in os.environ] == [name]
    assert threads.describe_waiting() == f"{name}=7"


def test_the_bound_is_set_before_torch_is_loaded() -> None:
    code = (
        "import builtins, os, sys\n"
        "from lora_cli import cli\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv = ['lora', '--version']\n"
        "try:\n    cli.main()\nfinally:\n    print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    kept = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept)
    assert done.stdout.splitlines()[-1] in [f"{spins} False" for spins in threads.SPINS.values()]


@pytest.mark.parametrize(
    ("average", "now", "kind"), [(0.1, 1, "quiet"), (7.5, 1, "busy"), (0.1, 9, "busy")]
)
def test_fewer_spins_beside_other_work(
    average: float, now: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in threads.WAITING:
        monkeypatch.setenv(each, "")  # so that it is as before when the test ends
        monkeypatch.delenv(each)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (average, 0.0, 0.0), raising=False)
    monkeypatch.setattr(threads.Path, "read_text", lambda path: f"0 0 0 {now}/900 4711")
    threads.bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == threads.SPINS[kind]


@pytest.mark.parametrize(
    ("ours", "busy", "num_threads", "told"),
    [
        (19, 19.5, 2, False),  # alone, both processors
        (10, 20, 2, True),  # beside other work, half of both
        (3, 20, 1, True),
        (9, 18, 1, False),  # one thread, which has a processor for itself
        (6, 6.5, 2, False),  # little to do, nobody else
    ],
)
def test_slowness_is_explained_where_other_work_causes_it(
    ours: float, busy: float, num_threads: int, told: bool
) -> None:
    before, after = Moment(100, 50, 500, 2000), Moment(110, 50 + ours, 500 + busy, 2020)
    said = threads.explain_slowness(before, after, num_threads)
    assert (said is not None) == told
    if said:
        assert said.startswith("other work took ")


def test_this_process_s_work_is_seen() -> None:
    before = threads.look()
    while threads.look().ours < before.ours + 0.2:
        sum(range(10_000))
    after = threads.look()
    assert after.busy - before.busy > 0.1
    assert after.possible - before.possible >= after.busy - before.busy
