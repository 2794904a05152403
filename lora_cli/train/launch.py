"""What a launcher of several processes has put into the environment: refused where it contradicts
itself.

`lora` trains in one process. Without this, a process whose siblings never come waits for them for
minutes, and several that do come take turns at refusing each other's folder. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_cli.common import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, all of it."""
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIZES = (
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
"""How many processes there are, as torchrun, MPI's launchers and srun say it."""
TURNED_ON = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_launcher(environment: Mapping[str, str]) -> None:
    """UsageError for variables that are no numbers, that contradict each other, or that ask for
    several processes."""
    numbers = {
        name: _number(name, environment[name])
        for name in (*VARIABLES, *SIZES)
        if _is_number(name, environment)
    }
    for name, size in numbers.items():
        if name in SIZES and size > 1:
            raise UsageError(
                f"{name} is {size}, and lora trains in one process",
                "lora train RECIPE, without torchrun, mpirun or srun",
            )
    for rank, size_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size_name in numbers and numbers.get(rank, 0) >= numbers[size_name]:
            raise UsageError(
                f"{rank} is {numbers[rank]}, but {size_name} is {numbers[size_name]}",
                _explain_unset(environment),
            )
    if not 0 <= numbers.get("MASTER_PORT", 0) < 2**16:
        raise UsageError(
            f"MASTER_PORT is {numbers['MASTER_PORT']}, which is no port",
            _explain_unset(environment),
        )
    # -1 is how some launchers spell a rank that there is not
    if numbers.get("LOCAL_RANK", -1) >= 0 or {"RANK", "WORLD_SIZE"} & numbers.keys():
        missing = [name for name in NEEDED if not environment.get(name)]
        if missing:
            there = " and ".join(name for name in VARIABLES if name in environment)
            raise UsageError(
                f"{there} is set, but {' and '.join(missing)} is not", _explain_unset(environment)
            )
    _check_accelerate(environment)


def _check_accelerate(environment: Mapping[str, str]) -> None:
    for name, what in TURNED_ON.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UsageError(
                f"{name} turns {what} on, which lora does not train with", f"unset {name}"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UsageError(
            f"ACCELERATE_MIXED_PRECISION is {precision}, and a recipe says itself what it "
            "computes in",
            "unset ACCELERATE_MIXED_PRECISION; the recipe's keys are model.dtype and training.bf16",
        )


def _is_number(name: str, environment: Mapping[str, str]) -> bool:
    return name in environment and name != "MASTER_ADDR"


def _number(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}, which is no whole number", f"unset {name}") from None
    if number < (-1 if "RANK" in name else 0) or (name in SIZES and number == 0):
        raise UsageError(f"{name} is {number}, which is none", f"unset {name}")
    return number


def _explain_unset(environment: Mapping[str, str]) -> str:
    """What to type where they are a launcher's leftovers."""
    return f"unset {' '.join(name for name in VARIABLES if name in environment)}"
