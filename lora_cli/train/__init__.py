"""The run: setup, trainers, checkpoints, resuming, signals and progress."""

__all__ = [
    "launch",
    "run",
]
