"""Which differences of two configurations are refused, and which are no difference.

Hermetic: configurations without weights. Alone: pytest tests/merge/test_rounding.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lora_cli.common.errors import RejectedError
from lora_cli.merge import rounding
from lora_cli.models import Adapter, Base
from tests import architectures


@pytest.mark.parametrize("family", ["llama", "bart", "trocr"])
def test_what_a_class_makes_of_its_configuration_is_no_other_setting(
    family: str, tmp_path: Path
) -> None:
    """BART's causal class sets is_decoder, and a merge writes what it has set."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    base = Base(str(tmp_path / "base"))
    architectures.make_config(family, 300).save_pretrained(base.name)
    built = base.build_unweighted()
    built.config.architectures = [type(built).__name__]
    built.config.save_pretrained(str(tmp_path / "merged"))
    adapter = cast(Adapter, SimpleNamespace(base=base, folder=tmp_path))
    rounding.refuse_other_settings(adapter, Base.of_model(str(tmp_path / "merged")))
    built.config.max_position_embeddings = 77
    built.config.save_pretrained(str(tmp_path / "merged"))
    with pytest.raises(RejectedError, match="max_position_embeddings is 77 in config.json of"):
        rounding.refuse_other_settings(adapter, Base.of_model(str(tmp_path / "merged")))
