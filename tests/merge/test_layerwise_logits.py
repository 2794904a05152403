"""Logits of a model whose weights stay on disk, of architectures whose modules use each other's
weights. Against transformers. Hermetic. Alone: pytest tests/merge/test_layerwise_logits.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_cli.merge import layerwise_logits, streaming_plan
from lora_cli.models import Base, Probe
from tests import architectures

FAMILIES = (
    "llama", "gpt2", "opt", "bart", "xglm", "mamba", "mamba2", "falcon_mamba", "bamba", "falcon_h1",
    "lfm2", "lfm2_moe", "qwen3_5_text", "inkling_text", "jetmoe", "llama4_text", "reformer", "rwkv",
    "recurrent_gemma", "gpt_oss",
)  # fmt: skip
IDS = ([*range(5, 19)], [7, 11, 6])


@pytest.mark.parametrize("family", FAMILIES)
def test_walked_logits_are_those_of_the_loaded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    network = architectures.make_model(family, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    network.eval().save_pretrained(tmp_path)
    base = Base(str(tmp_path))
    assert streaming_plan.find_own_names(base)
    # walking is what is tried: loading instead must not be taken
    monkeypatch.setattr(Base, "load", None)
    probes = [Probe("", ids, plain=True) for ids in IDS]
    walked = layerwise_logits.walk_logits_of(base, torch.float32, probes)
    assert walked is not None
    for ids, rows in zip(IDS, walked):
        with torch.no_grad():
            wanted = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(rows, wanted[-layerwise_logits.KEPT :], atol=2e-5, rtol=1e-4)
