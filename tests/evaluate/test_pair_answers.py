"""`lora generate` with models that read a text and write another: adapter and merged model give the
same answers, to sources that begin as in training.

Compared with transformers' own generate. Hermetic: random bases of two layers. Alone:
pytest tests/evaluate/test_pair_answers.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lora_cli.common import LoraError, UsageError
from lora_cli.evaluate import generate, open_answerers
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.predict import Options, predict
from lora_cli.evaluate.predictors import Reading
from lora_cli.merge.extract import convert
from lora_cli.merge.merge import merge
from lora_cli.recipe import load_recipe
from lora_cli.train import run
from tests import tasks
from tests.evaluate import odd_settings

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
    opened = open_answerers.open_models([str(path) for path in paths])
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
        [opened] = open_answerers.open_models([str(path)]).values()
        assert opened.prefix == PREFIX
        asked = Asked([{"role": "user", "content": "tree"}])
        assert opened.encode(asked) == opened.tokenizer(PREFIX + "tree")["input_ids"]
    [base] = open_answerers.open_models([str(made / "base")]).values()
    assert base.prefix == ""
    both = open_answerers.open_models([str(made / "base"), str(adapter)])
    assert both[str(made / "base")].prefix == PREFIX  # so that they can be compared


def test_an_answer_is_drawn_and_streamed(made: Path, capsys) -> None:
    torch.manual_seed(0)
    [[first, *_]] = answer(made / "merged", temperature=1.0)
    torch.manual_seed(0)
    assert answer(made / "merged", temperature=1.0)[0][0] == first
    [opened] = open_answerers.open_models([str(made / "merged")]).values()
    said = opened.stream(Asked([{"role": "user", "content": TEXTS[0]}]), Sampling(12, 0.0))
    assert said == answer(made / "merged")[0][0]
    assert capsys.readouterr().out.strip() == said.strip()


def ask(paths: list[Path], data: Path | None, out: Path, reading: Reading = Reading(), **given):
    names = [str(path) for path in paths]
    texts = [] if data else TEXTS
    predict(names, data and str(data), texts, out, None, [], Options(reading, **given))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_predict_says_the_same_in_lines(made: Path, tmp_path: Path, capsys) -> None:
    adapter, merged = made / "run" / "adapter", made / "merged"
    [wanted] = answer(adapter)
    said = ask([adapter, merged], None, tmp_path / "out", Reading(batch_size=3, max_new_tokens=12))
    for line, text, target in zip(said, TEXTS, wanted, strict=True):
        assert (line["text"], line["place"][:5]) == (text, "text ")
        assert line["answers"] == {str(path): {"target": target} for path in (adapter, merged)}
    assert ("not finished" in capsys.readouterr().err) == made.name.startswith("bart")
    short = ask([merged], None, tmp_path / "1", Reading(max_new_tokens=1))
    assert all(whole.startswith(line["target"]) for line, whole in zip(short, wanted))
    assert "4 texts were not finished within --max-new-tokens 1" in capsys.readouterr().err


def test_rows_of_any_format_are_read_as_in_training(made: Path, tmp_path: Path, capsys) -> None:
    merged = made / "merged"
    kinds = {
        "pairs": {"document": "tree house", "summary": "tree"},
        "alpaca": {"instruction": "tree house", "input": "", "output": "tree"},
        "unknown": {"source": "tree house", "target": None},
    }
    found = {}
    for kind, row in kinds.items():
        file = tmp_path / f"{kind}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        [found[kind]] = ask([merged], file, tmp_path / f"{kind}.out")
    assert len({line["target"] for line in found.values()}) == 1
    assert [line.get("expected") for line in found.values()] == ["tree", "tree", None]
    (tmp_path / "more.jsonl").write_text('{"instruction": "tree", "input": "glass, bad"}\n')
    [more] = ask([merged], tmp_path / "more.jsonl", tmp_path / "more.out")
    asked = Asked([{"role": "user", "content": "tree\n\nglass, bad"}])
    [opened] = open_answerers.open_models([str(merged)]).values()
    assert more["target"] == opened.answer([asked], Sampling(64, 0.0))[0]


def test_texts_by_language_are_read_as_in_training(made: Path, tmp_path: Path, capsys) -> None:
    merged, (file, source) = made / "merged", (tmp_path / "both.jsonl", tmp_path / "one.jsonl")
    file.write_text('{"id": 7, "translation": {"de": "tree house", "en": "tree"}}\n')
    source.write_text('{"translation": {"de": "tree house"}}\n')
    german = "columns: translation.de as source"
    [line] = ask([merged], file, tmp_path / "1", keep=["translation.en", "translation", "id"])
    assert (line["source"], line["expected"]) == ("tree house", "tree")
    whole = {"de": "tree house", "en": "tree"}
    assert line["row"] == {"translation.en": "tree", "translation": whole, "id": 7}
    assert f"{german}, translation.en as target" in capsys.readouterr().err
    [alone] = ask([merged], source, tmp_path / "2")
    assert (alone["source"], alone["target"]) == ("tree house", line["target"])
    assert f"{german}\n" in capsys.readouterr().err
    by_hand, options = ["source=translation.en"], Options()
    predict([str(merged)], str(file), [], tmp_path / "3", None, by_hand, options)
    assert json.loads((tmp_path / "3").read_text())["source"] == "tree"
    with pytest.raises(UsageError, match="no column translation.dr; there are id, translation.de"):
        wrong = ["source=translation.dr"]
        predict([str(merged)], str(file), [], tmp_path / "4", None, wrong, options)


def test_metrics_are_those_of_the_last_evaluation(tmp_path: Path, capsys) -> None:
    base = tasks.make_base(tmp_path / "base", "t5")
    rows = tasks.write_pairs(tmp_path / "eval.jsonl", 20, seed=4)
    more = f", eval_path: {rows}, max_target_length: 9, source_prefix: 'tree , '"
    recipe = tasks.write_recipe(tmp_path, "seq2seq_lm", base, "dora", data=more)
    changed = ["training.learning_rate=0.05", "training.max_steps=30", "training.eval_steps=30"]
    changed += ["training.eval_strategy=steps", "training.generate_at_evaluation=true"]
    adapter = run.train(load_recipe(recipe, changed))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    wanted = [line for line in lines if "eval_rougeL" in line][-1]
    merge(adapter, tmp_path / "merged")
    for path in (adapter, tmp_path / "merged"):
        capsys.readouterr()
        ask([path], rows, tmp_path / f"{path.name}.out", as_json=True)
        [metrics] = json.loads(capsys.readouterr().out)["metrics"].values()
        assert len(metrics) == 6
        assert metrics == pytest.approx({name: wanted[f"eval_{name}"] for name in metrics})


def test_bad_rows_are_named(made: Path, tmp_path: Path) -> None:
    rows = [{"source": "tree"}, {"source": ""}, {"source": 7}, {"source": "tree " * 80}, {"a": "b"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading(cuts=False, max_length=40)
    said = ask([made / "merged"], file, tmp_path / "out", reading, skips_bad=True)
    assert [line.get("error") for line in said] == [
        None,
        "source is empty",
        "source is a number (7), but must be text",
        "84 tokens, over 40",
        "there is no source; the columns are a",
    ]
    with pytest.raises(UsageError, match="--max-new-tokens: .* is for sequence_classification"):
        predict([str(make_classifier(tmp_path))], None, ["tree"], None, None, [],
                Options(Reading(max_new_tokens=4)))  # fmt: skip


def make_classifier(folder: Path) -> Path:
    base = tasks.make_base(folder / "base", "bert")
    AutoModelForSequenceClassification.from_pretrained(base).save_pretrained(folder / "c")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "c")
    return folder / "c"


def test_a_damaged_record_is_named(made: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(made / "run" / "adapter", tmp_path / "adapter")
    record = json.loads((adapter / "lora_record.json").read_text())
    for key, value in (("max_target_length", "x"), ("source_prefix", 7)):
        record["recipe"]["data"][key] = value
        (adapter / "lora_record.json").write_text(json.dumps(record))
        with pytest.raises(LoraError, match=rf"lora_record.json.*recipe\.data\.{key}"):
            ask([adapter], None, tmp_path / "out")
        record["recipe"]["data"].pop(key)


def test_it_holds_no_conversation(made: Path) -> None:
    [opened] = open_answerers.open_models([str(made / "merged")]).values()
    turns = [{"role": "user", "content": "tree"}, {"role": "assistant", "content": "stone"}]
    with pytest.raises(LoraError, match="reads a text and writes another: it holds no conv"):
        opened.answer([Asked([*turns, turns[0]])], Sampling(4, 0.0))


def test_a_text_that_is_too_long_is_refused(tmp_path: Path) -> None:
    base = tasks.make_base(tmp_path / "base", "bart", max_position_embeddings=16)
    [opened] = open_answerers.open_models([str(base)]).values()
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


def test_settings_of_the_model_leave_one_text_for_each_source(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [opened] = open_answerers.open_models([str(made / "merged")]).values()
    asked = [Asked([{"role": "user", "content": text}]) for text in TEXTS]
    expected = opened.answer(asked, Sampling(12, 0.0))
    for name in odd_settings.ODD.keys() - {"stop_strings"}:  # transformers' own need letters
        value = odd_settings.ODD[name]
        monkeypatch.setattr(opened.network.generation_config, name, value)
    assert opened.answer(asked, Sampling(12, 0.0)) == expected
