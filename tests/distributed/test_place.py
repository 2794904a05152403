"""Where a process stands, by what launchers leave in the environment.

No process is started. Alone: pytest tests/distributed/test_place.py
"""

from __future__ import annotations

import pytest

from lora_cli.common import UsageError
from lora_cli.distributed.place import Nodes, Place, find_first_host, find_nodes, take_place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04],big7",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_ID": "41234",
}
TRAIN_JOB = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
}
PYTORCH_JOB = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
}


def test_a_worker_of_torchrun() -> None:
    environment = dict(TORCHRUN)
    assert take_place(environment) == Place(3, 4, 1, 2, "node0", 29501)
    # what a library would join a group at is gone, and can be put back
    assert environment == {"TORCHELASTIC_RUN_ID": "none"}
    assert Place(3, 4, 1, 2, "node0", 29501).to_environment().items() <= TORCHRUN.items()


def test_a_task_of_srun() -> None:
    assert take_place(dict(SRUN)) == Place(9, 16, 1, 8, "gpu03", 20000 + 41234 % 20000)
    assert take_place({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "7"}) == Place(
        9, 16, 1, 8, "a", 7
    )


def test_one_process_is_alone_whoever_started_it() -> None:
    for environment in (
        {},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"LOCAL_RANK": "-1"},
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ):
        given = dict(environment)
        assert take_place(given) is None
        assert "WORLD_SIZE" not in given
        assert find_nodes(given) is None


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        (TRAIN_JOB, Nodes(8, 2, "job-node-0-0.job:29500")),
        (PYTORCH_JOB, Nodes(0, 3, "job-master-0:23456")),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"}, Nodes(4)),
        ({"PET_NPROC_PER_NODE": "auto"}, None),
    ],
)
def test_a_node_of_a_scheduler(environment: dict[str, str], nodes: Nodes | None) -> None:
    given = dict(environment)
    assert take_place(given) is None
    assert find_nodes(given) == nodes
    assert not given


def test_options_say_what_the_environment_does_not() -> None:
    assert find_nodes({}, 4) == Nodes(4)
    assert find_nodes({}, 8, 2, "node1:1234") == Nodes(8, 2, "node1:1234")
    assert find_nodes({"SLURM_JOB_ID": "7"}, 8, 2, "n:1") == Nodes(8, 2, "n:1", "7")
    assert find_nodes(dict(TRAIN_JOB), 4) == Nodes(4, 2, "job-node-0-0.job:29500")
    assert find_nodes(dict(TRAIN_JOB), 4, 2, "other:1") == Nodes(4, 2, "other:1")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "but MASTER_ADDR is not"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', which is not a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_LOCALID"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2"),
        ({**SRUN, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x', which is not a whole number"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[1-2]"}, "which names no host"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        take_place(dict(environment))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-07,12]", "gpu03"),
        ("gpu[3,9]-ib,login", "gpu3-ib"),
        ("a1,b2", "a1"),
        ("rack-2-[004-008]", "rack-2-004"),
    ],
)
def test_the_first_host_of_slurms_lists(nodes: str, host: str) -> None:
    assert find_first_host(nodes) == host
