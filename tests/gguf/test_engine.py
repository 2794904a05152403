"""A GGUF in llama.cpp is the Hugging Face model: token ids, rendered chats, next-token
distribution, greedy answers.

Hermetic: the tiny model, converted here in float32 by the managed converter. Alone: pytest
tests/gguf/test_engine.py
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.common.errors import LoraError
from lora_cli.gguf import header, llama_api, parity, tools
from lora_cli.gguf.engine import GGUFModel
from lora_cli.models import passages
from tests.networks import greedy

TEXTS = [
    "red dog sun",
    "Reverse: red dog",
    "two\nlines",
    "café ☃ 🙂",
    "  spaces  ",
    "<|user|>\nred<|end|>",
]


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    tools.convert(tiny / "model", file, "f32", tools.find_converter())
    return file


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Iterator[GGUFModel]:
    with GGUFModel(gguf, exact=True) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokenizer(tiny: Path):
    return AutoTokenizer.from_pretrained(tiny / "model")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_same_token_ids(engine: GGUFModel, tokenizer, text: str) -> None:
    assert engine.tokenize(text) == tokenizer(text)["input_ids"]
    assert (
        engine.tokenize(text, add_special=False)
        == tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def test_a_rendered_chat_has_the_same_token_ids_and_one_bos(engine: GGUFModel, tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Copy: red dog"},
        {"role": "assistant", "content": "red dog"},
        {"role": "user", "content": "Sort: sun dog"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert engine.tokenize(engine.render(messages)) == ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_distributions_and_answers_agree_with_transformers(
    engine: GGUFModel, tiny: Path, tokenizer
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    for task in ("Copy: red dog sun", "Sort: zoo ant cat", "Count: ant bee"):
        messages = [{"role": "user", "content": task}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        given = torch.tensor(engine.logprobs(ids), dtype=torch.float64)
        torch.testing.assert_close(given, logits.log_softmax(-1), rtol=0, atol=2e-3)
        answer = engine.complete(ids, 16)
        assert answer.startswith(
            tokenizer.decode(greedy(model, ids, 16, apart=0.01), skip_special_tokens=True)
        )
        assert "".join(engine.stream(engine.render(messages), 16)) == answer


def test_every_position_agrees_with_transformers(gguf: Path, tiny: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()
    made = passages.make_passages(tokenizer, 512)
    assert len({len(passage.ids) for passage in made}) > 1
    texts = [passage.ids for passage in made]
    for ids, given in zip(texts, llama_api.compute_logits(gguf, texts), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(given.log_softmax(-1), wanted.log_softmax(-1), rtol=0, atol=2e-3)


def test_a_template_that_shows_no_answer_leaves_the_passages_plain(tokenizer) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    wanted = passages.make_passages(plain, 512)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ 9 }}"
    assert passages.make_passages(tokenizer, 512) == wanted
    assert wanted


def test_another_layout_of_llama_cpp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(llama_api.ContextParams):
        _fields_ = (("more", ctypes.c_uint8 * 64),)

    lib = SimpleNamespace(**dict.fromkeys(llama_api.SIGNATURES, SimpleNamespace()))
    lib.llama_context_default_params = Moved
    monkeypatch.setattr(llama_api.ggml, "load_library", lambda: lib)
    with pytest.raises(LoraError, match="lays out llama.cpp's parameters otherwise"):
        llama_api.load_api.__wrapped__()
    del lib.llama_decode
    with pytest.raises(LoraError, match="does not let others use llama.cpp .*llama_decode"):
        llama_api.load_api.__wrapped__()


def test_the_server_still_says_why_it_cannot_load(gguf: Path, tmp_path: Path) -> None:
    list(llama_api.compute_logits(gguf, [[1, 2]]))  # in silence
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with pytest.raises(LoraError, match=r"cannot load .*cut.gguf: .*(not within|data|bounds)"):
        GGUFModel(cut)


@pytest.mark.parametrize(("key", "value"), [("llama.block_count", 0), ("llama.context_length", 0)])
def test_what_ends_llama_cpp_s_process_is_an_error(
    gguf: Path, tmp_path: Path, key: str, value: int
) -> None:
    """The first when the file is opened, the second at the first token."""
    data = gguf.read_bytes()
    found = header.read_header(memoryview(data))
    assert found.get(key)
    begins = header.header(found.metadata | {key: header.uint32(value)}, found.tensors)
    spoilt = tmp_path / "spoilt.gguf"
    spoilt.write_bytes(begins + data[found.data_start :])
    # the server may refuse the first token before its thread comes to what ends it
    with pytest.raises(LoraError, match="cannot load .*(GGML_ASSERT|context size)"):
        GGUFModel(spoilt)
    with pytest.raises(LoraError, match="cannot load .*(GGML_ASSERT|context size)"):
        next(llama_api.compute_logits(spoilt, [[1, 2]]))


def test_without_llama_cpp_s_functions_nothing_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hidden() -> None:
        raise LoraError("this xllamacpp hides them", "pip install -U xllamacpp")

    monkeypatch.setattr(llama_api, "load_api", hidden)
    assert not parity.find_engine()
    assert "not compared with the Hugging Face model: this xllamacpp hides them" in (
        capsys.readouterr().err
    )


def test_another_model_s_file_is_refused(gguf: Path, tiny: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()
    right = parity.make_reference(model, model.config, tokenizer, None)
    assert parity.compare_gguf(gguf, "f16", right).top1 > 0.99
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()
    # the likelihood of another token for each
    model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0)
    wrong = parity.make_reference(model, model.config, tokenizer, None)
    with pytest.raises(LoraError, match="differs from the model it was made from"):
        parity.compare_gguf(gguf, "f16", wrong)
    assert parity.compare_gguf(gguf, "q8_0", wrong).mean_kl > 0.1  # reported


def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(LoraError, match=r"x.gguf is not a GGUF file"):
        GGUFModel(tmp_path / "x.gguf")
