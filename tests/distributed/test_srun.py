"""What srun starts is a machine's launcher or one of the processes, as its options say.

Hermetic. Alone: pytest tests/distributed/test_srun.py
"""

from __future__ import annotations

import pytest

from lora_cli.common import UsageError
from lora_cli.distributed import place

TASK = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "7",
}  # fmt: skip


def test_a_task_of_sruns_is_a_worker_or_a_node_as_its_options_say() -> None:
    worker = place.Place(1, 2, 0, 1, "gpu03", 20007)
    assert place.take_place(dict(TASK)) == worker
    environment = {**TASK, "PMI_SIZE": "2"}  # srun --mpi=pmi2
    assert place.take_place(dict(environment)) == worker
    assert place.take_place(environment, is_node=True) is None
    assert environment == TASK  # accelerate would ask MPI
    node = place.Nodes(8, 2, "gpu03:1", "7")
    assert place.find_nodes(environment, 8, 2, "gpu03:1") == node
    assert place.find_nodes(environment, 8, None, "gpu03:1") == node
    # what torch's agent starts there is a worker, whatever its command line says
    started = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    started |= {"MASTER_ADDR": "gpu03", "MASTER_PORT": "2"}
    found = place.take_place({**TASK, **started}, is_node=True)
    assert found == place.Place(9, 16, 1, 8, "gpu03", 2)


def test_srun_and_the_options_must_not_contradict_each_other() -> None:
    four = {**TASK, "SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(
        UsageError, match="srun has started 4 tasks, and --nnodes 2 wants one on each"
    ):
        place.find_nodes(four, 8, 2, "gpu03:1")
    with pytest.raises(UsageError, match="OMPI_COMM_WORLD_SIZE is 16"):
        place.take_place({**TASK, "OMPI_COMM_WORLD_SIZE": "16"})
    # a step of one task on each machine is another way to start two
    alone = {**TASK, "SLURM_STEP_NUM_TASKS": "1"}
    assert place.take_place(alone, is_node=True) is None
    assert place.find_nodes(alone, 8, 2, "gpu03:1") == place.Nodes(8, 2, "gpu03:1", "7")
