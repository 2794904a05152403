"""Which metrics an evaluation gives, by the task and what its labels are."""

from __future__ import annotations

from lora_cli.recipe import Task

OF_NUMBERS = ("mse", "mae", "r2", "pearson", "spearman")
OF_SETS = ("accuracy", "f1_micro", "f1_macro")
OF_CLASSES = ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews")
OF_TWO = ("f1", "precision", "recall")
SMALLER = ("mse", "mae", "perplexity")
"""Metrics by which a model is better where they are smaller."""


def list_metrics(task: Task, problem_type: str | None) -> tuple[str, ...]:
    """Return the names of what an evaluation may measure beside the loss."""
    if task.places_labels or not task.counts_labels:
        return task.metrics
    if problem_type == "regression":
        return OF_NUMBERS
    return OF_SETS if problem_type == "multi_label_classification" else (*OF_CLASSES, *OF_TWO)
