"""`lora generate` with models that read a text and write another: adapter and merged model give the
same answers, to sources that begin as in training.

Compared with transformers' own generate. Hermetic: random bases of two layers. Alone:
pytest tests/evaluate/test_pair_answers.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lora_cli.common import LoraError
from lora_cli.evaluate import answerers, generate
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.merge.extract import convert
from lora_cli.merge.merge import merge
from lora_cli.recipe import load_recipe
from lora_cli.train import run
from tests import tasks

TEXTS = ["glass house", "tree", "river stone paper glass good", "bad sad table"]
PREFIX = "paper , "


@pytest.fixture(scope="module", params=["t5", "bart"])
def made(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter that was trained with a prefix, and both merged."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tasks.make_base(folder / "base", request.param)
    network = AutoModelForSeq2SeqLM.from_pretrained(base)
    if request.param == "bart":  # T5 makes its head small by itself
        network.get_input_embeddings().weight.data.mul_(0.1)
    network.save_pretrained(base)
    more = f", source_prefix: '{PREFIX}'"
    recipe = tasks.write_recipe(folder, "seq2seq_lm", base, data=more, training=", warmup_steps: 0")
    run.train(load_recipe(recipe, ["training.learning_rate=0.05", "training.max_steps=40"]))
    merge(folder / "run" / "adapter", folder / "merged")
    convert(folder / "run" / "adapter", folder / "converted", None, None)
    return folder


def answer(*paths: Path, **sampling: float) -> list[list[str]]:
    asked = [Asked([{"role": "user", "content": text}]) for text in TEXTS]
    opened = answerers.open_models([str(path) for path in paths])
    drawn = Sampling(12, sampling.get("temperature", 0.0))
    return [each.answer(asked, drawn) for each in opened.values()]


def test_all_forms_give_one_answer(made: Path) -> None:
    paths = [made / "base", made / "run" / "adapter", made / "merged", made / "converted"]
    base, adapter, merged, converted = answer(*paths)
    assert adapter == merged == converted
    assert base != adapter
    assert any(adapter)
    tokenizer = AutoTokenizer.from_pretrained(made / "merged")
    network = AutoModelForSeq2SeqLM.from_pretrained(made / "merged").eval()
    for text, said in zip(TEXTS, merged):  # one by one, without padding
        ids = torch.tensor([tokenizer(PREFIX + text)["input_ids"]])
        written = network.generate(
            input_ids=ids, max_new_tokens=12, do_sample=False, num_beams=1,
            decoder_start_token_id=network.config.decoder_start_token_id,
        )  # fmt: skip
        assert said == tokenizer.decode(written[0], skip_special_tokens=True)


def test_the_prefix_is_remembered(made: Path) -> None:
    adapter = made / "run" / "adapter"
    for path in (adapter, made / "merged", made / "converted", adapter.parent / "checkpoint-40"):
        [opened] = answerers.open_models([str(path)]).values()
        assert opened.prefix == PREFIX
        asked = Asked([{"role": "user", "content": "tree"}])
        assert opened._ids(asked) == opened.tokenizer(PREFIX + "tree")["input_ids"]
    [base] = answerers.open_models([str(made / "base")]).values()
    assert base.prefix == ""
    both = answerers.open_models([str(made / "base"), str(adapter)])
    assert both[str(made / "base")].prefix == PREFIX  # so that they can be compared


def test_an_answer_is_drawn_and_streamed(made: Path, capsys) -> None:
    torch.manual_seed(0)
    [[first, *_]] = answer(made / "merged", temperature=1.0)
    torch.manual_seed(0)
    assert answer(made / "merged", temperature=1.0)[0][0] == first
    [opened] = answerers.open_models([str(made / "merged")]).values()
    said = opened.stream(Asked([{"role": "user", "content": TEXTS[0]}]), Sampling(12, 0.0))
    assert said == answer(made / "merged")[0][0]
    assert capsys.readouterr().out.strip() == said.strip()


def test_it_holds_no_conversation(made: Path) -> None:
    [opened] = answerers.open_models([str(made / "merged")]).values()
    turns = [{"role": "user", "content": "tree"}, {"role": "assistant", "content": "stone"}]
    with pytest.raises(LoraError, match="reads a text and writes another: it holds no conv"):
        opened.answer([Asked([*turns, turns[0]])], Sampling(4, 0.0))


def test_a_text_that_is_too_long_is_refused(tmp_path: Path) -> None:
    base = tasks.make_base(tmp_path / "base", "bart", max_position_embeddings=16)
    [opened] = answerers.open_models([str(base)]).values()
    long = Asked([{"role": "user", "content": "tree " * 20}])
    with pytest.raises(LoraError, match="the text has 22 tokens, and the model reads 16"):
        opened.answer([long], Sampling(4, 0.0))


def test_rows_of_pairs_are_questions(made: Path, tmp_path: Path, capfd) -> None:
    rows = [{"document": "tree house", "summary": "tree"}, {"document": "stone", "summary": "a"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = generate.read_questions([], file)
    assert [(each.text, each.expected) for each in found] == [
        ("tree house", "tree"),
        ("stone", "a"),
    ]
    generate.generate([str(made / "merged")], [], file, 8, 0.0, None, None, False)
    assert "0/2" in capfd.readouterr().out
