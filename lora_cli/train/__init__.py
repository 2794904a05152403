"""The run: setup, trainers, checkpoints, resuming, signals and progress."""
