"""`lora serve` of a GGUF file, in llama.cpp: the answers of `lora generate FILE`, within the same
limits.

Hermetic: the tiny model with random adapters merged, converted here. Alone: pytest
tests/serve/test_serve_gguf.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from lora_cli.evaluate import answerers, open_answerers
from lora_cli.gguf import tools
from lora_cli.gguf.engine import GGUFModel
from tests.serve.serving import Served, make_endless

PROMPTS = ["Reverse: red dog", "Copy: map bus gas", "café ☃"]
MOST = 30


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that never ends an answer."""
    folder = tmp_path_factory.mktemp("gguf")
    model = make_endless(tiny / "model", folder / "endless")
    tools.convert(model, folder / "endless-f32.gguf", "f32", tools.find_converter())
    return folder / "endless-f32.gguf"


@pytest.fixture(scope="module")
def served(gguf: Path) -> Iterator[Served]:
    made = Served(gguf, "--max-context", 2048, "--max-new-tokens", 2000, "--max-requests", 3)
    yield made
    assert made.end() == 143
    assert "Traceback" not in made.said


def complete(served: Served, prompt: str, client: openai.OpenAI | None = None, **more):
    given = {"temperature": 0, "max_tokens": MOST} | more
    messages = [{"role": "user", "content": prompt}]
    create = (client or served.client).chat.completions.create
    return create(model="endless-f32", messages=messages, **given)


def test_answers_are_those_of_lora_generate(served: Served, gguf: Path) -> None:
    opened = open_answerers.open_models([str(gguf)])[str(gguf)]
    for prompt in PROMPTS:
        asked = answerers.Asked([{"role": "user", "content": prompt}])
        [said] = opened.answer([asked], answerers.Sampling(MOST, 0.0))
        given = complete(served, prompt)
        assert given.choices[0].message.content == said != ""
        assert given.choices[0].finish_reason == "length"
        assert given.usage.completion_tokens == MOST
        chunks = complete(served, prompt, stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == said


def test_each_answer_is_drawn_by_a_seed_of_its_own(gguf: Path) -> None:
    """And the same again from one seed of the program's."""
    opened = open_answerers.open_models([str(gguf)])[str(gguf)]
    asked = [answerers.Asked([{"role": "user", "content": PROMPTS[0]}])] * 2

    def draw() -> list[str]:
        torch.manual_seed(7)
        return opened.answer(asked, answerers.Sampling(MOST, 1.0))

    first, second = draw()
    assert first != second
    assert draw() == [first, second]


def test_log_probabilities_and_stop_strings(served: Served, gguf: Path) -> None:
    whole = complete(served, PROMPTS[1], logprobs=True, top_logprobs=3)
    text, told = whole.choices[0].message.content, whole.choices[0].logprobs.content
    assert len(told) <= MOST
    with GGUFModel(gguf) as model:
        ids = model.encode(model.render([{"role": "user", "content": PROMPTS[1]}]))
        best = max(model.logprobs(ids))
    assert told[0].logprob == told[0].top_logprobs[0].logprob == pytest.approx(best, abs=1e-3)
    stop = text[4:8]
    ended = complete(served, PROMPTS[1], stop=stop)
    assert ended.choices[0].message.content == text.partition(stop)[0]
    assert ended.choices[0].finish_reason == "stop"
    drawn = [complete(served, PROMPTS[1], temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    first, same, other = (each.choices[0].message.content for each in drawn)
    assert first == same != other


def test_a_client_that_goes_away_frees_its_place(served: Served) -> None:
    streams = [complete(served, "red", max_tokens=2000, stream=True) for _ in range(1)]
    for stream in streams:
        next(stream)
        stream.close()
    client = served.client.with_options(max_retries=4)
    assert complete(served, "red", client, max_tokens=2).usage.completion_tokens == 2
    with pytest.raises(openai.BadRequestError, match="may have 2,048"):
        complete(served, "dog " * 3000)
    with pytest.raises(openai.BadRequestError, match="the prompt has at least"):
        complete(served, "dog " * 1_000_000)
