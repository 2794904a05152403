"""Tokenizers with several named chat templates: which one is taken, as transformers takes it.

Hermetic: the tiny model's tokenizer. Alone: pytest tests/models/test_several_templates.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_cli.common.errors import LoraError
from lora_cli.models import chat_template
from lora_cli.models.probes import make_probes
from lora_cli.models.tokenizer import set_chat_template


@pytest.fixture
def several(tiny: Path):
    """`several(*names)`: the tiny model's tokenizer with templates of these names."""

    def make(*names: str):
        tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
        own = tokenizer.chat_template
        tokenizer.chat_template = {name: f"{{{{ '{name} ' }}}}{own}" for name in names}
        return tokenizer

    return make


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
@pytest.mark.parametrize("names", [("default",), ("default", "rag"), ("default", "tool_use")])
def test_of_several_templates_the_one_that_transformers_takes(several, names, tools) -> None:
    tokenizer, asked = several(*names), [{"role": "user", "content": "ask"}]
    expected = tokenizer.apply_chat_template(asked, tools=tools, tokenize=False)
    assert chat_template.render(tokenizer, asked, tools) == expected
    assert make_probes(tokenizer)[0].text.startswith("default ")


def test_several_templates_are_named_and_one_is_chosen(several, tmp_path: Path) -> None:
    tokenizer = several("default", "rag", "tool_use")
    assert set_chat_template(tokenizer, "auto") == (
        "the tokenizer's own, default of default, rag, tool_use; tool_use for rows with tools"
    )
    assert (
        set_chat_template(tokenizer, "rag") == "the tokenizer's own, rag of default, rag, tool_use"
    )
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text().startswith("{{ 'rag ' }}")
    with pytest.raises(LoraError, match="has rag, tool_use, and none is called default") as refused:
        set_chat_template(several("tool_use", "rag"), "auto")
    assert refused.value.hint == "--set model.chat_template=rag"
    assert chat_template.find_template(several("tool_use", "rag")) is None
    assert make_probes(several("tool_use", "rag"))[0].plain
