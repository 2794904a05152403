"""Refuse a launcher's variables that contradict each other or ask for several processes.

`lora` trains in one process. Without this check an incomplete rendezvous hangs for minutes, and a
complete one ends with processes that refuse each other's folder. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_cli.common import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Everything that torchrun sets."""
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIZES = (
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""The number of processes, by the names that torchrun, MPI's launchers and srun have for it."""
TURNED_ON = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise UsageError for variables that are not numbers or contradictory, and for several
    processes."""
    numbers = {
        name: _parse_number(name, environment[name])
        for name in (*VARIABLES, *SIZES)
        if name in environment and name != "MASTER_ADDR"
    }
    for name, size in numbers.items():
        if name in SIZES and size > 1:
            raise UsageError(
                f"{name} is {size}, and lora trains in one process",
                "lora train RECIPE, without torchrun, mpirun or srun",
            )
    for rank, size_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size_name in numbers and numbers.get(rank, 0) >= numbers[size_name]:
            contradiction = f"{rank} is {numbers[rank]}, but {size_name} is {numbers[size_name]}"
            raise UsageError(contradiction, _explain_unset(environment))
    if not 0 <= numbers.get("MASTER_PORT", 0) < 2**16:
        port = numbers["MASTER_PORT"]
        raise UsageError(f"MASTER_PORT is {port}, which is not a port", _explain_unset(environment))
    # some launchers set a rank of -1 where they start no other process
    if numbers.get("LOCAL_RANK", -1) >= 0 or {"RANK", "WORLD_SIZE"} & numbers.keys():
        missing = [name for name in NEEDED if not environment.get(name)]
        if missing:
            present = " and ".join(name for name in VARIABLES if name in environment)
            absent = " and ".join(missing)
            raise UsageError(f"{present} is set, but {absent} is not", _explain_unset(environment))
    _check_accelerate(environment)


def _check_accelerate(environment: Mapping[str, str]) -> None:
    for name, what in TURNED_ON.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            message = f"{name} turns {what} on, which lora does not train with"
            raise UsageError(message, f"unset {name}")
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
