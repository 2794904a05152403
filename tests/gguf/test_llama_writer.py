"""Answers of many conversations side by side are those that llama.cpp's server gives one after the
other, and texts that begin alike are read on from where they part.

Hermetic: the tiny model, and one of another shape, converted here. Alone: pytest
tests/gguf/test_llama_writer.py
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lora_cli.common import LoraError
from lora_cli.gguf import engine, llama_api, llama_writer, tools
from tests import architectures

QUESTIONS = (
    "Reverse: red dog", "Reverse: red dog sun cat", "red dog sun", "Reverse: blue",
    "Reverse: red", "two words and then some more of them", "café ☃ 🙂",
)  # fmt: skip

LONGEST = 128
"""Tokens that the tiny model is opened for, the same each time: a number is tried once."""


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    tools.convert(tiny / "model", file, "f32", tools.find_converter())
    return file


@pytest.fixture(scope="module")
def asked(gguf: Path) -> tuple[list[list[int]], list[int], list[llama_writer.Answer]]:
    """Prompts, how many tokens each answer may have, and the answers of the server."""
    with engine.GGUFModel(gguf) as model:
        asked = [model.render([{"role": "user", "content": text}]) for text in QUESTIONS]
        prompts = [model.encode(text) for text in asked]
        rooms = [24, 1, 24, 2, 3, 24, 24]
        answers = [model.write(*each) for each in zip(prompts, rooms, strict=True)]
    return prompts, rooms, [llama_writer.Answer(*each) for each in answers]


@pytest.mark.parametrize("cells", [llama_writer.CELLS, 3 * llama_writer.BLOCK, 1])
def test_side_by_side_they_are_the_server_s(cells: int, gguf: Path, asked, monkeypatch) -> None:
    prompts, rooms, expected = asked
    monkeypatch.setattr(llama_writer, "CELLS", cells)
    assert llama_writer.Writer(gguf).write_likeliest(prompts, rooms) == expected
    assert {each.ended for each in expected} == {True, False}


def test_an_answer_that_ends_with_its_last_token_has_ended(gguf: Path, asked) -> None:
    prompts, _, expected = asked
    with llama_api.open_gguf(gguf, LONGEST) as opened, engine.GGUFModel(gguf) as model:
        lengths = [len(model.tokenize(each.text, add_special=False)) for each in expected]
        assert opened.read(model.tokenize(expected[0].text, add_special=False)) == expected[0].text
    writer = llama_writer.Writer(gguf)
    for more in (0, 1):
        [found, _] = writer.write_likeliest(prompts[:2], [lengths[0] + more, lengths[1]])
        assert found == (expected[0].text, bool(more))


def test_numbers_that_are_none_are_refused(gguf: Path, asked, monkeypatch) -> None:
    given = llama_api.Opened.decode
    prompts, rooms, _ = asked

    def decode(opened: llama_api.Opened, steps) -> np.ndarray:
        return given(opened, steps) * np.float32("nan")

    monkeypatch.setattr(llama_api.Opened, "decode", decode)
    with pytest.raises(LoraError, match="not finite"):
        llama_writer.Writer(gguf).write_likeliest(prompts, rooms)


def test_a_text_is_as_the_server_has_it(gguf: Path) -> None:
    with llama_api.open_gguf(gguf, LONGEST) as opened, engine.GGUFModel(gguf) as model:
        ids = model.tokenize("red ☃", add_special=False)
        assert opened.read(ids) == "red ☃"
        assert opened.read(ids[:-1]) == "red "  # the first bytes of what ☃ has
        assert opened.read([*ids, model.tokenize(model.eos_token)[-1]]) == "red ☃"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens are computed each time."""
    counts, given = [], llama_api.Opened.decode

    @functools.wraps(given)
    def decode(opened: llama_api.Opened, steps) -> np.ndarray:
        counts.append(len(steps))
        return given(opened, steps)

    monkeypatch.setattr(llama_api.Opened, "decode", decode)
    return counts


def test_what_texts_begin_with_is_read_once(gguf: Path, asked, counted: list[int]) -> None:
    prompts, _, _ = asked
    shared = prompts[0][: llama_api.count_shared(prompts, 1000)]
    assert len(shared) > 2
    with llama_api.open_gguf(gguf, LONGEST) as opened:
        alone = [opened.compute(prompt) for prompt in prompts]
    counted.clear()
    with llama_api.open_gguf(gguf, LONGEST) as opened:
        opened.share(shared)
        for prompt, logits in zip(prompts, alone):
            places = range(len(shared), len(prompt))
            torch.testing.assert_close(
                opened.compute(prompt, places), logits[len(shared) :], atol=1e-4, rtol=0
            )
        assert counted[2:] == [len(prompt) - len(shared) for prompt in prompts]
        # one that is looked at before, and one that begins otherwise, are read whole
        other = [prompts[0][-1], *prompts[0][1:]]
        for prompt, places in ((prompts[1], range(1, len(prompts[1]))), (other, range(6, 9))):
            counted.clear()
            torch.testing.assert_close(
                opened.compute(prompt, places),
                next(llama_api.compute_logits(gguf, [prompt]))[list(places)],
                atol=1e-4, rtol=0,
            )  # fmt: skip
            assert counted[0] == len(prompt)
        counted.clear()
        opened.compute(prompts[2], [len(prompts[2]) - 1])
        assert counted == [len(shared), len(prompts[2]) - len(shared)]


@pytest.mark.parametrize("family", ["mamba", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_a_state_that_cannot_go_back_is_not_shared(
    family: str, vocabularies: Path, tmp_path: Path, counted: list[int]
) -> None:
    folder = tmp_path / "gpt-2"
    tokenizer = AutoTokenizer.from_pretrained(vocabularies, gguf_file="ggml-vocab-gpt-2.gguf")
    tokenizer.save_pretrained(folder)
    model = architectures.make_folder(family, tmp_path / "model", folder)
    file = tmp_path / "model.gguf"
    tools.convert(model, file, "f32", tools.find_converter())
    texts = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 7, 11, 12, 13]]
    alone = list(llama_api.compute_logits(file, texts))
    with llama_api.open_gguf(file, 6) as opened:
        opened.share([5, 6, 7])
        assert bool(opened.shared) == (family != "mamba")
        for text, logits in zip(texts, alone):
            places = range(3, len(text))
            torch.testing.assert_close(opened.compute(text, places), logits[3:], atol=1e-4, rtol=0)
    with engine.GGUFModel(file) as server:
        expected = [server.write(text, 6) for text in texts]
    assert llama_writer.Writer(file).write_likeliest(texts, [6] * 3) == expected
