"""Logits that are compared are those of float32's own products.

Hermetic: no model. Alone: pytest tests/models/test_probes.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_cli.models import compute_logits


class Asking(torch.nn.Module):
    """A model whose logits come from asking how CUDA would multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[str] = []

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return SimpleNamespace(logits=torch.ones(*input_ids.shape, 3))


def test_a_training_in_tf32_is_measured_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    products, model = torch.backends.cuda.matmul, Asking()
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        compute_logits(model, [SimpleNamespace(ids=[1, 2])])
        assert model.seen == ["ieee"]
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
