"""Small random networks that several tests hold lora's operations against."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

IN, OUT = 96, 160


def greedy(network: PreTrainedModel, ids: list[int], length: int, apart: float) -> list[int]:
    """The likeliest continuation, as far as the likeliest token lies `apart` above the next, in
    logits.

    Beyond that another runtime may rightly take the other one; how soon it comes hangs on what the
    model learnt.
    """
    made: list[int] = []
    with torch.no_grad():
        while len(made) < length:
            logits, tokens = network(input_ids=torch.tensor([ids + made])).logits[0, -1].topk(2)
            if logits[0] - logits[1] < apart:
                break
            made.append(int(tokens[0]))
            if made[-1] == network.config.eos_token_id:
                break
    return made


class Layers(torch.nn.Module):
    """A linear layer with bias, one without, one the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(IN, OUT), torch.nn.Linear(OUT, IN, bias=False)
        self.third = Conv1D(OUT, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


def random_model(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A model of a family with two layers of width 64, 300 tokens unless told otherwise, as
    transformers begins it."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    given = {"vocab_size": 300, "num_key_value_heads": 2, **shape, **ids, **more}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).to(dtype)
