"""Several machines, which are launchers on the loopback here: they meet, or say who did not come.

Real processes on gloo, a random model of two layers. Alone: pytest tests/distributed/test_machines.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from lora_cli.common import LoraError, UsageError
from lora_cli.distributed import launch, ports, ranks
from lora_cli.distributed.place import Nodes, Place
from tests.distributed.jobs import Job, count_steps, write_recipe


def find_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_launchers_are_one_job(tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, max_steps=4)
    meet = ["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", f"127.0.0.1:{find_port()}"]
    jobs = [Job(["train", str(recipe), *meet]) for _ in range(2)]
    ended = [job.end() for job in jobs]
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(said for _, said, _ in ended)
    together = "".join(said for _, said, _ in ended)
    assert together.count("trained 4 steps") == 1, together
    assert count_steps(tmp_path / "out") == 5
    assert json.loads((tmp_path / "out" / "record.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_machines_that_share_no_disk_go_on_as_one_run(
    tiny: Path, tmp_path: Path, strategy: str
) -> None:
    """One of them has the checkpoints: bit for bit as where both read them, the best model too."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "keep": "best"}
    adapters = {}
    for name, folders in (("shared", ("a", "a")), ("apart", ("b", "c"))):
        for folder in {tmp_path / each for each in folders}:
            folder.mkdir()
            recipe = write_recipe(folder, tiny, max_steps=4, save_steps=2, **best)
            given = json.loads(recipe.read_text())
            given["data"]["eval_path"] = given["data"]["path"]
            given["distributed"] = {"strategy": strategy}
            recipe.write_text(json.dumps(given | {"output_dir": "out"}))
        longer = ["--set", "training.max_steps=6", "--allow-changes", "training.max_steps"]
        for more in ([], ["--resume", *longer]):
            meet = ["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", f"127.0.0.1:{find_port()}"]
            jobs = [Job(["train", "r.yaml", *meet, *more], tmp_path / each) for each in folders]
            ended = [job.end() for job in jobs]
            assert [status for status, _, _ in ended] == [0, 0], "\n".join(
                said for _, said, _ in ended
            )
        (written,) = [each for each in dict.fromkeys(folders) if (tmp_path / each / "out").is_dir()]
        assert "resuming from" in "".join(said for _, said, _ in ended)
        out = tmp_path / written / "out"
        assert count_steps(out) > 6
        adapters[name] = load_file(out / "adapter" / "adapter_model.safetensors")
    assert adapters["shared"].keys() == adapters["apart"].keys()
    assert all(
        torch.equal(adapters["apart"][key], each) for key, each in adapters["shared"].items()
    )


@pytest.mark.slow
def test_another_recipe_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, max_steps=4)
    meet = ["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", f"127.0.0.1:{find_port()}"]
    jobs = [
        Job(["train", str(recipe), "--set", f"training.learning_rate={rate}", *meet])
        for rate in (1e-3, 2e-3)
    ]
    ended = [job.end() for job in jobs]
    assert all(status == 1 for status, _, _ in ended), ended
    together = "".join(said for _, said, _ in ended)
    assert together.count("error: this process has another recipe or lora than the first one") == 1
    assert not (tmp_path / "out" / "adapter").exists()


def test_who_does_not_come(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 3)
    port = find_port()
    with pytest.raises(
        LoraError, match=rf"2 machines did not all come to 127.0.0.1:{port} within 3 s"
    ):
        launch.start(Nodes(1, 2, f"127.0.0.1:{port}"), ["--version"])


def test_a_port_that_nobody_listens_at(monkeypatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 3)
    with pytest.raises(LoraError, match="did not all come to 192.0.2.1:29500 within 3 s"):
        launch.start(Nodes(1, 2, "192.0.2.1:29500"), ["--version"])


def test_a_worker_whose_peers_do_not_come() -> None:
    """In a process of its own: a store that waits in this one would not let it end."""
    program = (
        "from datetime import timedelta\n"
        "from lora_cli.common import LoraError\n"
        "from lora_cli.distributed import ranks\n"
        "from lora_cli.distributed.place import Place\n"
        "ranks.MEETING = timedelta(seconds=2)\n"
        f"with ranks.joined(Place(0, 2, 0, 2, '127.0.0.1', {find_port()})): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert "process 0 of 2 cannot meet the others at 127.0.0.1:" in done.stderr
    assert "1/2 clients joined" in done.stderr


def run_torchrun(recipe: Path) -> subprocess.CompletedProcess[str]:
    """`lora train` in two processes of torchrun's."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lora_cli", "train"]
    return subprocess.run(
        [sys.executable, *command, str(recipe)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_foreign_launcher(tiny: Path, tmp_path: Path) -> None:
    """torchrun: nobody prepares for the ranks, nor collects what they say."""
    recipe = write_recipe(tmp_path, tiny, max_steps=4)
    done = run_torchrun(recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out' / 'adapter'}\n"
    assert done.stderr.count("trained 4 steps") == 1


@pytest.mark.slow
def test_an_error_under_a_foreign_launcher_is_said_once(tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, max_steps=4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("a user's")
    done = run_torchrun(recipe)
    assert done.returncode != 0
    assert done.stderr.count("out already exists") == 1, done.stderr


@pytest.mark.parametrize(
    ("devices", "rows", "on_cpu", "started"),
    [
        (0, 8, False, None),
        (1, 8, False, None),
        (4, 8, False, 4),
        (8, 6, False, 6),
        (8, 1, False, None),
        (8, 8, True, None),
    ],
)
def test_a_process_for_each_gpu_where_nobody_says(
    devices: int, rows: int, on_cpu: bool, started: int | None, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert launch.settle_nodes(None, rows, on_cpu) == (Nodes(started) if started else None)
    assert launch.settle_nodes(Nodes(1), rows, on_cpu) is None
    of_two = launch.settle_nodes(Nodes(0, 2, "h:1"), rows, on_cpu)
    assert of_two == Nodes(1 if on_cpu else max(1, devices), 2, "h:1")
    if devices == 4:
        with pytest.raises(UsageError, match="--nproc 5: this machine has 4 GPUs"):
            launch.settle_nodes(Nodes(5), rows, on_cpu)


@pytest.mark.slow
def test_an_interface_that_is_none(tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny)
    job = Job(["train", str(recipe), "--nproc", "2"], GLOO_SOCKET_IFNAME="eth9")
    status, said, _ = job.end()
    assert status == 1
    assert (
        "error: the processes find no network to speak over: Unable to find address for: eth9"
        in said
    )
    assert said.count("error: ") == 1


@pytest.mark.parametrize("of_machine", [True, False])
def test_a_port_of_a_program_that_does_not_answer(
    of_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "ANSWER", 2.0)
    monkeypatch.setattr(ranks, "_place", None)  # which a process that ends by an error keeps
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        with pytest.raises(LoraError, match=f"127.0.0.1:{port} is another program's"):
            if of_machine:
                launch.start(Nodes(1, 2, f"127.0.0.1:{port}"), ["--version"])
            else:
                with ranks.joined(Place(1, 2, 1, 2, "127.0.0.1", port)):
                    pass


def test_a_port_where_the_others_are_is_no_other_program_s() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ports.refuse_mute("127.0.0.1", store.port)
    ports.refuse_mute("127.0.0.1", find_port())
