"""Starts that look at rows look at them where the base is.

Hermetic: no model. Alone: pytest tests/models/test_init_weights.py
"""

from __future__ import annotations

import torch

from lora_cli.models import init_weights


def test_rows_are_moved_to_the_base() -> None:
    network = torch.nn.Linear(2, 2, device="meta")
    batch = init_weights._on(network, {"input_ids": torch.ones(2), "labels": torch.ones(2)})
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}
