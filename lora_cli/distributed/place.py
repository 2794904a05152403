"""Find out from the environment where this process stands among those that train together.

torchrun and its like start a process per device and say which it is: a *worker*. Others start one
per machine, which has to start its workers itself: a *node*. srun does either, and what it starts
is a node where the command line says so. Contradictions are refused: an incomplete rendezvous hangs
for minutes. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from lora_cli.common import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Everything that torchrun sets for a worker."""
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PET_NNODES", "SLURM_STEP_NUM_TASKS", *OF_MPI)
"""Numbers of processes, by the names that torchrun, srun and MPI's launchers have for them."""
TURNED_ON = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
PORT = 29500
"""torchrun's, where nobody names one."""


class Place(NamedTuple):
    """Where a worker stands: which it is of how many, in all and on its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    """Where the first of them can be met."""
    port: int

    def to_environment(self) -> dict[str, str]:
        """Return the variables by which torch and accelerate know the place."""
        values = (self.rank, self.world, self.local_rank, self.local_world, self.address, self.port)
        return dict(zip(VARIABLES, map(str, values)))


class Nodes(NamedTuple):
    """What a launcher has to start, and where it meets those on other machines."""

    processes: int
    """On this machine; 0 for one for each of its GPUs."""
    machines: int = 1
    endpoint: str = "localhost:0"
    id: str = "lora"


def take_place(environment: MutableMapping[str, str], is_node: bool = False) -> Place | None:
    """Return the place of a worker, None for a process that nobody has started as one of several,
    and for a task of srun's that `is_node`, as its options say.

    The variables that say so are taken out of `environment`, as libraries join a group at their
    sight: `ranks.join` puts them back. Raise UsageError for variables that contradict each other.
    """
    _check_accelerate(environment)
    numbers = _read_numbers(environment)
    tasks = numbers.get("SLURM_STEP_NUM_TASKS", 1)
    for name in OF_MPI:
        if numbers.get(name, 1) not in (1, tasks):  # srun sets PMI_SIZE, too
            raise UsageError(
                f"{name} is {numbers[name]}, and lora does not meet the processes of mpirun",
                "lora train RECIPE --nproc N starts them; torchrun and srun can, too",
            )
        environment.pop(name, None)
    if "RANK" not in numbers and tasks > 1 and not is_node:
        return _read_slurm(environment, numbers)
    # some launchers set a rank of -1 where they start no other process
    is_worker = numbers.get("LOCAL_RANK", -1) >= 0
    if is_worker or {"RANK", "WORLD_SIZE"} & numbers.keys():
        missing = [name for name in NEEDED if not environment.get(name)]
        if missing:
            present = " and ".join(name for name in VARIABLES if name in environment)
            absent = " and ".join(missing)
            raise UsageError(f"{present} is set, but {absent} is not", _explain_unset(environment))
    if not is_worker:
        return None
    world = numbers["WORLD_SIZE"]
    place = Place(
        numbers["RANK"], world, numbers["LOCAL_RANK"], numbers.get("LOCAL_WORLD_SIZE", world),
        environment["MASTER_ADDR"], numbers["MASTER_PORT"],
    )  # fmt: skip
    for name in VARIABLES:
        environment.pop(name, None)
    return place if world > 1 else None


def find_nodes(
    environment: MutableMapping[str, str],
    processes: int | None = None,
    count: int | None = None,
    endpoint: str | None = None,
) -> Nodes | None:
    """Return what this process has to start: as its options say, else as a scheduler's variables do
    (PET_…, RANK and WORLD_SIZE of a pod, the number of srun's tasks); None where it may train
    alone.

    The variables are taken out of `environment`. Raise UsageError where the two contradict each
    other.
    """
    numbers = _read_numbers(environment)
    count = _count_machines(numbers, count)
    address = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
    port = numbers.get("PET_MASTER_PORT", numbers.get("MASTER_PORT", PORT))
    per_node = environment.get("PET_NPROC_PER_NODE", "")
    if processes is None and per_node.isdecimal():
        processes = int(per_node)
    if count > 1 and not (endpoint or address):
        raise UsageError(
            f"{count} machines cannot meet: nobody says where", "--rdzv-endpoint HOST:PORT"
        )
    job = environment.get("SLURM_JOB_ID") or environment.get("PET_RDZV_ID") or "lora"
    for name in (*VARIABLES, *[each for each in environment if each.startswith("PET_")]):
        environment.pop(name, None)
    if count == 1:
        return Nodes(processes) if processes is not None else None
    endpoint = endpoint or f"{address}:{port}"
    found = re.fullmatch(r"(.+?)(?::(\d*))?", endpoint, re.ASCII)
    if not (found and found[2] and int(found[2]) < 2**16):
        host = found[1] if found else "HOST"
        raise UsageError(
            f"--rdzv-endpoint {endpoint} names no port", f"--rdzv-endpoint {host}:{PORT}"
        )
    return Nodes(processes or 0, count, endpoint, job)


def _count_machines(numbers: Mapping[str, int], count: int | None) -> int:
    """Return how many machines a launcher is one of: `count`, or what the variables say."""
    tasks = numbers.get("SLURM_STEP_NUM_TASKS", 1)
    said = numbers.get("PET_NNODES", numbers.get("WORLD_SIZE", tasks))
    if count and "PET_NNODES" in numbers and count != said:
        raise UsageError(f"--nnodes is {count}, but PET_NNODES is {said}", "leave --nnodes out")
    count = count or said
    if tasks not in (1, count):
        raise UsageError(
            f"srun has started {tasks} tasks, and --nnodes {count} wants one on each machine",
            f"srun --nodes={count} --ntasks-per-node=1",
        )
    return count


def _read_slurm(environment: Mapping[str, str], numbers: Mapping[str, int]) -> Place:
    """Return the place of a task that srun has started, of several."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in numbers]
    if missing or not nodes:
        absent = " and ".join([*missing, *([] if nodes else ["SLURM_STEP_NODELIST"])])
        raise UsageError(
            f"SLURM_STEP_NUM_TASKS is {numbers['SLURM_STEP_NUM_TASKS']}, but {absent} is not set",
            "unset SLURM_STEP_NUM_TASKS",
        )
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Place(
        numbers["SLURM_PROCID"],
        numbers["SLURM_STEP_NUM_TASKS"],
        numbers["SLURM_LOCALID"],
        int(tasks[0]) if tasks else 1,
        environment.get("MASTER_ADDR") or find_first_host(nodes),
        # those of one job meet, and no two jobs of a machine
        numbers.get("MASTER_PORT", 20000 + numbers.get("SLURM_JOB_ID", 0) % 20000),
    )


def find_first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it, such as `gpu[03-07,12],login1`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise UsageError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which names no host", "set MASTER_ADDR"
        )
    return "".join(part or "" for part in found.groups())


def _read_numbers(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the variables that are numbers; UsageError for those that are none, or contradict each
    other."""
    names = (*VARIABLES, *SIZES, "PET_MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    numbers = {
        name: _parse_number(name, environment[name])
        for name in names
        if name in environment and name != "MASTER_ADDR"
    }
    for rank, size_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size_name in numbers and numbers.get(rank, 0) >= numbers[size_name]:
            contradiction = f"{rank} is {numbers[rank]}, but {size_name} is {numbers[size_name]}"
            raise UsageError(contradiction, _explain_unset(environment))
    for name in ("MASTER_PORT", "PET_MASTER_PORT"):
        if not 0 <= numbers.get(name, 0) < 2**16:
            raise UsageError(
                f"{name} is {numbers[name]}, which is not a port", _explain_unset(environment)
            )
    return numbers


def _check_accelerate(environment: Mapping[str, str]) -> None:
    for name, what in TURNED_ON.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            message = f"{name} turns {what} on, but a recipe decides how processes share its base"
            raise UsageError(message, f"unset {name}; the recipe's key is distributed.strategy")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UsageError(
            f"ACCELERATE_MIXED_PRECISION is {precision}, but a recipe decides what it computes in",
            "unset ACCELERATE_MIXED_PRECISION; the recipe's keys are model.dtype and training.bf16",
        )


def _parse_number(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise UsageError(
            f"{name} is {text!r}, which is not a whole number", f"unset {name}"
        ) from None
    if number < (-1 if "RANK" in name else 0) or (name in SIZES and number == 0):
        raise UsageError(f"{name} is {number}, which is out of range", f"unset {name}")
    return number


def _explain_unset(environment: Mapping[str, str]) -> str:
    """Return what to type where the variables are a launcher's leftovers."""
    return f"unset {' '.join(name for name in VARIABLES if name in environment)}"
