"""Encoders are refused before they are trained to foretell tokens that they see. Hermetic. Alone:
pytest tests/models/test_causality.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MusicgenConfig

from lora_cli.common import LoraError
from lora_cli.models import causality
from lora_cli.recipe import DEFAULT_TASK
from tests import architectures, quantised

CAUSAL = ("llama", "gpt2", "mamba", "bart", "opt", "xglm", "mixtral", "recurrent_gemma", "bloom")
ENCODERS = ("bert", "roberta", "electra", "xlm-roberta-xl", "rembert", "xlnet", "cpmant")
TOLD = ("bert", "roberta", "electra", "xlm-roberta-xl", "rembert")
"""Those whose configuration has `is_decoder`."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_passes(family: str, dtype: torch.dtype) -> None:
    network = architectures.make_model(family).to(dtype)
    network.train()
    causality.refuse_encoder(network, "it")
    assert network.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused(family: str, dtype: torch.dtype) -> None:
    with pytest.raises(LoraError, match="it is an encoder, in which each token sees the next"):
        causality.refuse_encoder(architectures.make_model(family).to(dtype), "it")


@pytest.mark.parametrize("family", TOLD)
def test_an_encoder_is_known_by_its_configuration_and_becomes_causal_by_it(family: str) -> None:
    with pytest.raises(LoraError, match="is an encoder") as refused:
        causality.refuse_encoder_by_config(
            architectures.make_config(family, 300), DEFAULT_TASK, "it"
        )
    assert '"is_decoder": true' in str(refused.value.hint)
    told = architectures.make_config(family, 300, is_decoder=True)
    causality.refuse_encoder_by_config(told, DEFAULT_TASK, "it")
    causality.refuse_encoder(architectures.make_model(family, is_decoder=True), "it")


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_configuration_passes(family: str) -> None:
    causality.refuse_encoder_by_config(architectures.make_config(family, 300), DEFAULT_TASK, "it")


@pytest.mark.parametrize("family", ["blip", "pix2struct"])
def test_a_base_that_asks_for_pictures_is_refused(family: str) -> None:
    with pytest.raises(LoraError, match="it does not run on a text alone: .*(pixel|patches)"):
        causality.refuse_encoder(architectures.make_model(family), "it")


def test_a_base_with_several_text_models_is_refused(lora, write_recipe, tiny, tmp_path) -> None:
    quantised.copy_tokenizer(tiny / "model", tmp_path)
    MusicgenConfig().save_pretrained(tmp_path)
    done = lora("check", write_recipe(f"model: {{name_or_path: {tmp_path}}}\n"))
    assert done.returncode == 1
    assert "has several text models, of which none writes text" in done.stderr


@pytest.mark.parametrize("verb", ["check", "train"])
def test_the_verbs_say_it_before_the_rows_are_read(
    lora, write_recipe, tiny: Path, tmp_path: Path, verb: str
) -> None:
    base = architectures.make_folder("bert", tmp_path / "bert", tiny / "model")
    done = lora(verb, write_recipe(f"model: {{name_or_path: {base}}}\n"))
    assert done.returncode == 1
    assert "is an encoder, in which each token sees the next ones" in done.stderr
    assert "prepared before, in" not in done.stderr
