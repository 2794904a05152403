"""How long a text a base reads, held against what transformers does with a longer one; and what
check, plan and train say of rows that are longer.

Hermetic: small random models with the tiny model's tokenizer, CPU. Alone: pytest
tests/models/test_positions.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
)

from lora_cli.common.errors import LoraError
from lora_cli.models.base import Base
from lora_cli.models.positions import Positions, find_positions
from lora_cli.plan import auto, check, show
from lora_cli.recipe import load
from lora_cli.train import run as train
from tests.units import STEADY_ADAM, assert_same_training

NUMBER = 160
"""More than the probe prompts have, and fewer than the longest row below."""
GPT = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": NUMBER}
STEADY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OTHER = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 4}
LLAMA = {
    **OTHER,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": NUMBER,
}


def llama(**rope: Any) -> LlamaConfig:
    return LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 1e4, **rope} if rope else None)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(**GPT, **STEADY),
    "bigcode": lambda: GPTBigCodeConfig(**GPT),
    "gptj": lambda: GPTJConfig(**GPT, rotary_dim=8),
    "codegen": lambda: CodeGenConfig(**GPT, rotary_dim=8),
    "neo": lambda: GPTNeoConfig(
        **OTHER,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=NUMBER,
        attention_types=[[["global"], 2]],
    ),
    "opt": lambda: OPTConfig(
        **OTHER,
        num_hidden_layers=2,
        ffn_dim=48,
        max_position_embeddings=NUMBER,
        word_embed_proj_dim=32,
        dropout=0.0,
    ),
    "bloom": lambda: BloomConfig(**OTHER, n_layer=2, n_head=4),
    "llama": llama,
    "linear": lambda: llama(rope_type="linear", factor=2.0),
    "yarn": lambda: llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=80),
    "llama3": lambda: llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=20,
    ),
}
FOUND = {
    "bloom": None,
    "llama": Positions(NUMBER, False),
    "linear": Positions(2 * NUMBER, False),
    "yarn": Positions(320, False),
    "llama3": Positions(NUMBER, False),
}
"""All others have a table."""


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bases(name)` is the folder of a random model, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder / name)
            for file in [*tiny.glob("model/*token*"), tiny / "model" / "chat_template.jinja"]:
                shutil.copy(file, folder / name)
        return folder / name

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve rows of about 120 tokens; the first has 251."""
    words = "the quick brown fox jumps over a lazy dog " * 9
    given = [
        {"prompt": words[: 9 + i], "completion": words[: 130 if i else 330]} for i in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_ends_where_transformers_can_read_no_more(bases, name: str) -> None:
    found = find_positions(Base(str(bases(name))))
    assert found == FOUND.get(name, Positions(NUMBER, True))
    network = AutoModelForCausalLM.from_pretrained(bases(name)).eval()

    def read(tokens: int) -> None:
        with torch.no_grad():
            network(torch.zeros(1, tokens, dtype=torch.long))

    read(NUMBER)
    if found is not None and found.ends:
        with pytest.raises((IndexError, RuntimeError)):
            read(NUMBER + 1)
    else:
        read(NUMBER + 1)


def recipe(write_recipe, base: Path, rows: Path, *overrides: str, out: str = "run") -> Any:
    path = write_recipe(f"training: {{{STEADY_ADAM}}}\n")
    given = [f"model.name_or_path={base}", f"data.path={rows}", "training.max_length=512"]
    given.append(f"output_dir={path.parent / out}")
    return load.load_recipe(path, [*given, *overrides])


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_rows_that_cannot_be_read_are_refused(write_recipe, bases, rows: Path, name: str) -> None:
    base = bases(name)
    said = rf"training.max_length: rows longer than the 160 positions of {base}: 1, up to 251"
    for refuse in (
        lambda given: check.show_check(given, 0, False),
        lambda given: show.show_plan(given, None, None, True, False),
        train.train,
    ):
        with pytest.raises(LoraError, match=said) as caught:
            refuse(recipe(write_recipe, base, rows))
        assert caught.value.hint == "--set training.max_length=160"
    check.show_check(recipe(write_recipe, base, rows, "training.max_length=160"), 0, False)
    for more in (
        ["training.packing=true", "training.packing_strategy=wrapped"],  # one text over all rows
        ["training.packing=false", "training.pad_to_multiple_of=200"],
        ["data.streaming=true"],
    ):
        limited = ["data.on_long_row=drop", "training.max_length=170"]
        with pytest.raises(LoraError, match=r"rows longer than the 160 positions"):
            check.show_check(recipe(write_recipe, base, rows, *limited, *more), 0, False)


def test_rows_beyond_what_was_trained_are_said(
    write_recipe, bases, rows: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    base = bases("llama")
    said = f"rows longer than the 160 positions of {base}: 1, up to 251 tokens "
    said += "(--set training.max_length=160 limits them)\n"
    check.show_check(recipe(write_recipe, base, rows), 0, False)
    show.show_plan(recipe(write_recipe, base, rows), None, None, True, False)
    assert capsys.readouterr().out.count(said) == 2
    train.train(recipe(write_recipe, base, rows))
    assert f"warning: {said}" in capsys.readouterr().err
    for name, limit in (("llama", 160), ("yarn", 512), ("bloom", 512)):
        given = recipe(write_recipe, bases(name), rows, f"training.max_length={limit}")
        check.show_check(given, 0, False)
        assert "positions of" not in capsys.readouterr().out
    monkeypatch.setattr(show, "SMALL", 0)  # rows that are not counted on the way
    other = tmp_path / "other.jsonl"
    other.write_bytes(rows.read_bytes() * 2)
    show.show_plan(recipe(write_recipe, base, other), None, None, False, False)
    over = f"training.max_length 512 is over the 160 positions of {base}\n"
    assert over in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_that_share_a_sequence_count_from_zero_each(
    write_recipe, bases, rows: Path, tmp_path: Path, name: str, capsys
) -> None:
    """Sequences of up to 512 tokens on a model of 160 positions train as padded batches do."""
    short = tmp_path / "short.jsonl"
    short.write_text("".join(f"{line}\n" for line in rows.read_text().splitlines()[1:]))
    made = {}
    for packing in ("step", "false"):
        given = recipe(write_recipe, bases(name), short, f"training.packing={packing}", out=packing)
        made[packing] = load_file(train.train(given) / "adapter_model.safetensors")
    assert "training.packing = false" not in capsys.readouterr().err
    assert_same_training(made["step"], made["false"])


def test_a_mask_of_its_own_length_is_found(write_recipe, bases, rows: Path, capsys) -> None:
    given = recipe(write_recipe, bases("neo"), rows, "data.on_long_row=truncate")
    said = "  training.packing = false: this model takes no sequence of more than 160 tokens\n"
    for packed_length, padded in (("auto", False), (1024, True)):
        training = {"max_length": 160, "packed_length": packed_length}
        changed = given.replace("auto", {"training": training})
        folder = f"{given.output_dir}-{packed_length}"
        train.train(changed.model_copy(update={"output_dir": folder}))
        assert (said in capsys.readouterr().err) is padded


def test_sequences_are_no_longer_than_a_table_of_positions(
    write_recipe, bases, rows: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a GPU, where a place that is not in the table spoils the whole process
    monkeypatch.setattr(auto, "choose_packed_length", lambda given: (8192, "a GPU"))
    given = recipe(write_recipe, bases("neo"), rows, "data.on_long_row=truncate")
    train.train(given.replace("auto", {"training": {"max_length": 100}}))
    said = capsys.readouterr().err
    assert "packed_length = 160 (auto: the base has a table of so many positions)" in said
    assert "training.packing = false" not in said


def test_a_model_too_short_for_the_prompts_that_compare_it_is_refused(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(GPT2Config(**{**GPT, "n_positions": 64})).save_pretrained(base)
    for file in [*tiny.glob("model/*token*"), tiny / "model" / "chat_template.jinja"]:
        shutil.copy(file, base)
    path = write_recipe("training: {max_length: 64}\n")
    given = load.load_recipe(path, [f"model.name_or_path={base}"])
    with pytest.raises(LoraError, match="reads 64 tokens at most, and the prompts by which"):
        check.show_check(given, 0, False)
