"""`lora predict`: the answers are those of transformers' pipelines on the merged model, and of each
row alone; rows stay in their order, whatever happens to them.

Hermetic: BERTs of two layers and bases of nine families made here, adapters with B ≠ 0 made by PEFT
alone. Alone: pytest tests/evaluate/test_predict.py
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.data import readers
from lora_cli.evaluate import open_answerers, opened, tagger
from lora_cli.evaluate.predict import Options, predict
from lora_cli.evaluate.predictors import Reading
from lora_cli.gguf.adapter import export_adapter
from lora_cli.gguf.export import export
from lora_cli.models import Base
from lora_cli.models.adapter_folder import CONFIG
from lora_cli.recipe import load
from lora_cli.train import run
from tests import tasks

WORDS = "angela merkel visited paris and new york in may . , - un believ ab ly great bad".split()
PIECES = ["##ing", "##ed", "##s", "##a", "##b", "##un", "##ly", "##is", "##er"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = {
    "single_label_classification": ["ham", "spam", "eggs"],
    "multi_label_classification": ["red", "green", "blue", "grey"],
    "regression": ["value"],
}
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
CLASSES, TOKENS = "SequenceClassification", "TokenClassification"


def make_tokenizer(**given: Any) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that splits at punctuation and into pieces, as BERT's does."""
    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *WORDS, *PIECES])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"model_max_length": 48, **names, **given},
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as it is published: with the head that foretells masked words, and without a pooler."""
    folder = tmp_path_factory.mktemp("bert") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len([*SPECIAL, *WORDS, *PIECES]), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=48,
    )  # fmt: skip
    network = BertForMaskedLM(config)
    network.get_input_embeddings().weight.data.normal_()
    network.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, out: Path, kind: str, labels: list[str], seed: int = 1, **config: Any
) -> Path:
    """An adapter made by PEFT alone, with config.json beside it; what is random is as large as what
    was trained, so that answers differ."""
    torch.manual_seed(seed)
    named = {
        "id2label": dict(enumerate(labels)),
        "label2id": {n: at for at, n in enumerate(labels)},
    }
    network = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(base, **named, **config)
    saved = ["bert.pooler", "classifier"] if kind == CLASSES else ["classifier"]
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value", "dense"],
        exclude_modules=["bert.pooler.dense"],
        modules_to_save=saved,
        task_type="SEQ_CLS" if kind == CLASSES else "TOKEN_CLS",
    )
    adapted = get_peft_model(network, lora)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=2.0 if "classifier" in name else 0.3)
    given = make_tokenizer()(make_texts(40), return_tensors="pt", padding=True)
    with torch.no_grad():  # each label is as likely as the others
        logits = adapted.eval()(**given).logits.flatten(0, -2)
    head = network.classifier.modules_to_save["default"]
    head.bias.data -= logits.mean(0)
    adapted.save_pretrained(out)
    network.config.architectures = [f"BertFor{kind}"]
    network.config.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


def merge_by_peft(base: Path, adapter: Path, kind: str) -> Any:
    """The merged model by PEFT and transformers alone."""
    config = transformers.AutoConfig.from_pretrained(adapter)
    network = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(base, config=config)
    return PeftModel.from_pretrained(network, adapter).merge_and_unload().eval()


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of words and pieces, of one to thirty words."""
    drawn = random.Random(seed)
    words = [*(word for word in WORDS if word.isalpha()), "unbelievably", "visiting", "parises"]
    texts = []
    for _ in range(count):
        chosen = [drawn.choice(words).capitalize() for _ in range(drawn.randint(1, 20))]
        texts.append(" ".join(chosen) + drawn.choice(["", ".", ", and", " ."]))
    return texts


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(
    paths: Path | list[Path], data: Path | None = None, texts: list[str] | None = None, **given: Any
) -> list[dict[str, Any]]:
    """The lines that `lora predict --out` writes."""
    out = Path(given.pop("folder")) / f"out-{random.random()}.jsonl"
    columns, base = given.pop("columns", []), given.pop("base", None)
    reading = {name: given.pop(name) for name in Reading._fields if name in given}
    options = Options(Reading(**reading), **given)
    names = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    predict(names, None if data is None else str(data), texts or [], out, base, columns, options)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("problem", KINDS)
def test_labels_are_those_of_transformers_pipeline(
    bert: Path, tmp_path: Path, problem: str
) -> None:
    labels, texts = KINDS[problem], make_texts(70)
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, labels, problem_type=problem)
    data = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    said = ask(adapter, data, everything=True, batch_size=8, folder=tmp_path)
    merged = merge_by_peft(bert, adapter, CLASSES)
    classify = pipeline("text-classification", model=merged, tokenizer=make_tokenizer())
    wanted = classify(texts, top_k=None, batch_size=8, truncation=True)
    assert [line["place"] for line in said] == [f"{data}:{at}" for at in range(1, 71)]
    assert [line["text"] for line in said] == texts
    for line, each in zip(said, wanted, strict=True):
        scores = {found["label"]: found["score"] for found in each}
        if problem == "regression":
            assert line["value"] == pytest.approx(scores["value"], rel=1e-5, abs=1e-5)
            continue
        assert line["probabilities"] == pytest.approx(scores, abs=1e-5)
        if problem == "single_label_classification":
            best = max(scores, key=lambda name: scores[name])
            assert (line["label"], line["probability"]) == (
                best,
                pytest.approx(scores[best], abs=1e-5),
            )
        else:
            assert line["labels"] == [name for name in labels if scores[name] > 0.5]
    if problem != "regression":
        told = [line.get("label", str(line.get("labels"))) for line in said]
        assert len(set(told)) >= 3  # else the test could not fail


def test_entities_are_those_of_transformers_pipeline(bert: Path, tmp_path: Path) -> None:
    texts = make_texts(60)
    adapter = make_adapter(bert, tmp_path / "a", TOKENS, TAGS)
    data = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    said = ask(adapter, data, batch_size=8, folder=tmp_path)
    merged = merge_by_peft(bert, adapter, TOKENS)
    tag = pipeline(
        "token-classification", merged, tokenizer=make_tokenizer(), aggregation_strategy="first"
    )
    count = 0
    for line, text, wanted in zip(said, texts, tag(texts, batch_size=8), strict=True):
        assert [(e["type"], e["start"], e["end"]) for e in line["entities"]] == [
            (each["entity_group"], each["start"], each["end"]) for each in wanted
        ]
        assert [e["probability"] for e in line["entities"]] == pytest.approx(
            [float(each["score"]) for each in wanted], abs=1e-5
        )
        assert all(e["text"] == text[e["start"] : e["end"]] for e in line["entities"])
        count += len(wanted)
    assert count >= 100
    assert any(" " in e["text"] for line in said for e in line["entities"])  # of several words


def test_words_that_are_given_have_places_counted_in_words(bert: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bert, tmp_path / "a", TOKENS, TAGS)
    rows = [text.split() for text in make_texts(40)]
    data = write_lines(tmp_path / "rows.jsonl", [{"words": row, "id": 7} for row in rows])
    options = {"columns": ["tokens=words"], "keep": ["id"], "everything": True, "folder": tmp_path}
    said = ask(adapter, data, **options)
    merged, tokenizer = merge_by_peft(bert, adapter, TOKENS), make_tokenizer()
    for line, words in zip(said, rows, strict=True):
        given = tokenizer([words], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            likely = merged(**given).logits[0].softmax(-1)
        firsts = [given.word_ids(0).index(at) for at in range(len(words))]
        assert [each["text"] for each in line["tags"]] == words
        assert [each["tag"] for each in line["tags"]] == [
            TAGS[number] for number in likely[firsts].argmax(-1)
        ]
        for entity in line["entities"]:
            assert entity["text"] == " ".join(words[entity["start"] : entity["end"]])
        assert line["row"] == {"id": 7}
    assert sum(len(line["entities"]) for line in said) >= 50


@pytest.mark.parametrize("family", tasks.FAMILIES)
@pytest.mark.parametrize("kind", [CLASSES, TOKENS])
def test_a_batch_gives_the_answers_of_single_rows(tmp_path: Path, family: str, kind: str) -> None:
    """Whole models of each family: of padding nothing is seen, and rows come back in their order."""
    base = tasks.make_base(tmp_path / "base", family)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    config = transformers.AutoConfig.from_pretrained(base, num_labels=3)
    if type(config) not in auto._model_mapping:
        pytest.skip(f"transformers has no {family} of this kind")
    torch.manual_seed(0)
    network = auto.from_pretrained(base, config=config).eval()
    for name, parameter in network.named_parameters():
        if "score" in name or "class" in name:
            parameter.data.normal_()
    network.save_pretrained(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "m")
    texts = [text for text, _ in tasks.make_texts(30)]
    said = ask(tmp_path / "m", None, texts, batch_size=7, everything=True, folder=tmp_path)
    for line, text in zip(said, texts, strict=True):
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            outputs = network(**{k: v for k, v in given.items() if k != "token_type_ids"})
        likely = outputs.logits[0].softmax(-1)
        found = (
            [line["probability"]] if kind == CLASSES else [t["probability"] for t in line["tags"]]
        )
        wanted = likely.max(-1).values.reshape(-1)
        assert found == pytest.approx(
            (wanted if kind == CLASSES else wanted[1:-1]).tolist(), abs=2e-6
        )


def test_adapters_share_one_base_whatever_their_labels(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        make_adapter(bert, tmp_path / f"a{size}", CLASSES, [f"L{n}" for n in range(size)], size)
        for size in (3, 3, 5)
    ]
    paths[1] = make_adapter(bert, tmp_path / "other", CLASSES, ["x", "y", "z"], 9)
    loads: list[Any] = []
    load_one = Base.load
    monkeypatch.setattr(
        Base, "load", lambda self, *a, **k: loads.append(self.name) or load_one(self, *a, **k)
    )
    networks: list[Any] = []
    attach = opened.attach.load_adapter
    monkeypatch.setattr(
        opened.attach,
        "load_adapter",
        lambda *a, **k: networks.append(attach(*a, **k)) or networks[-1],
    )
    texts = make_texts(20)
    together = ask(paths, None, texts, everything=True, folder=tmp_path)
    assert loads == [str(bert)]
    places = {each.get_input_embeddings().weight.data_ptr() for each in networks}
    assert len(networks) == 3
    assert len(places) == 1
    for path in paths:
        alone = ask(path, None, texts, everything=True, folder=tmp_path)
        for both, one in zip(together, alone, strict=True):
            answer = both["answers"][str(path)]
            assert answer["probabilities"] == pytest.approx(one["probabilities"], abs=1e-6)
            assert answer["label"] == one["label"]
    assert len({line["answers"][str(paths[2])]["label"] for line in together}) >= 3


def test_every_kind_of_file_gives_the_same_answers(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, KINDS["single_label_classification"])
    rows = [{"text": text} for text in make_texts(9) if "," not in text]
    lines = write_lines(tmp_path / "r.jsonl", rows)
    (tmp_path / "r.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    (tmp_path / "r.txt").write_text("".join(f"{row['text']}\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    given = [ask(adapter, lines, folder=tmp_path)]
    given += [
        ask(adapter, tmp_path / f"r.{end}", folder=tmp_path) for end in ("csv", "txt", "parquet")
    ]
    given.append(ask(adapter, None, [row["text"] for row in rows], folder=tmp_path))
    stream = io.TextIOWrapper(io.BytesIO(lines.read_bytes()))
    monkeypatch.setattr("sys.stdin", stream)
    capsys.readouterr()
    given.append(ask(adapter, Path("-"), batch_size=2, folder=tmp_path))
    counted = [line for line in capsys.readouterr().err.splitlines() if "rows answered" in line]
    assert counted[-1] == f"{len(rows)} rows answered"
    answers = [[(line["text"], line["label"]) for line in each] for each in given]
    assert all(each == answers[0] for each in answers)
    assert given[-1][2]["place"] == "stdin:3"
    assert given[-2][2]["place"] == "text 3"


def test_it_is_said_which_split_is_read(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, KINDS["single_label_classification"])
    (tmp_path / "tables").mkdir()
    for name in ("train", "test"):
        (tmp_path / "tables" / f"{name}.csv").write_text(f"text\n{name} paris\n")
    parts = {name: Dataset.from_list([{"text": f"{name} may"}]) for name in ("train", "dev")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for folder, other, text in (("tables", "test", "train paris"), ("saved", "dev", "train may")):
        said = ask(adapter, tmp_path / folder, folder=tmp_path)
        assert [line["text"] for line in said] == [text]
        assert f"of its splits train is read, and not {other}" in capsys.readouterr().err


def test_metrics_are_of_the_rows_that_say_what_is_right(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = KINDS["single_label_classification"]
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, labels)
    rows = [
        {"sentence1": text, "label": [*labels, None][at % 4]}
        for at, text in enumerate(make_texts(40))
    ]
    said = ask(
        adapter, write_lines(tmp_path / "r.jsonl", rows), columns=["text=sentence1", "label=label"],
        as_json=True, folder=tmp_path,
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    told = [line for line in said if "expected" in line]
    assert len(told) == report["told"] == 30
    right = sum(line["label"] == line["expected"] for line in told)
    assert report["metrics"][str(adapter)]["accuracy"] == pytest.approx(right / 30)
    assert 0 < right < 30
    classes = {row["name"]: row for row in report["classes"][str(adapter)]}
    assert list(classes) == labels
    for name, row in classes.items():
        expected = [line for line in told if line["expected"] == name]
        found = [line for line in told if line["label"] == name]
        both = sum(line["label"] == line["expected"] for line in found)
        assert row["support"] == len(expected) == 10
        assert row["recall"] == pytest.approx(both / len(expected))
        assert row["precision"] == pytest.approx(both / max(len(found), 1))
    ask(adapter, tmp_path / "r.jsonl", columns=["text=sentence1", "label=label"], folder=tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-5].split() == ["class", "precision", "recall", "f1", "support"]
    assert shown[-3].split()[::4] == ["ham", "10"]
    assert ask(adapter, tmp_path / "r.jsonl", columns=["text=sentence1"], with_labels=False,
               folder=tmp_path)[0].keys() == {"place", "text", "label", "probability"}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qdora"])
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_metrics_are_those_of_the_last_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, method: str
) -> None:
    """In the type, and on the 4-bit weights, that were trained on."""
    base = tasks.make_base(tmp_path / "base", "bert")
    write, end = (
        (tasks.write_classes, "csv") if task.startswith("seq") else (tasks.write_tags, "jsonl")
    )
    train, test = (write(tmp_path / f"{n}.{end}", 100, n) for n in (1, 2))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: {task}\nmethod: {method}\nmodel: {{name_or_path: {base}}}\nlora: {{r: 4}}\n"
        f"data: {{path: {train}, eval_path: {test}}}\noutput_dir: {tmp_path / 'run'}\n"
        "training: {max_steps: 25, learning_rate: 5e-3, max_length: 64, eval_strategy: steps,"
        " eval_steps: 25}\n"
    )
    adapter = run.train(load.load_recipe(recipe))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    wanted = [line for line in lines if "eval_accuracy" in line][-1]
    capsys.readouterr()
    ask(adapter, test, as_json=True, batch_size=7, folder=tmp_path)
    found = json.loads(capsys.readouterr().out)["metrics"][str(adapter)]
    assert len(found) >= 4
    assert found == pytest.approx({name: wanted[f"eval_{name}"] for name in found}, abs=1e-6)


def test_lines_on_stdin_are_looked_at_as_they_come() -> None:
    lines = b'{"text": "a"}\n\n[1]\n{"text": "\xff"}\n'
    rows = readers.read_lines(io.BytesIO(lines), "stdin")
    assert next(rows) == ("stdin:1", {"text": "a"})
    place, bad = next(rows)
    assert (place, bad.said) == ("stdin:3", "the row is [1], not a mapping of columns")
    with pytest.raises(LoraError, match=r"stdin:4: byte 11 is not UTF-8 \(0xff\)"):
        next(rows)
    endless = readers.read_lines(io.BytesIO(b" " * (readers.LONGEST + 2)), "stdin")
    with pytest.raises(LoraError, match="stdin:1: a line of over 4,194,304 bytes"):
        next(endless)


def test_columns_of_training_are_known_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained adapter, and a checkpoint of its run, which has no config.json."""
    base = tasks.make_base(tmp_path / "base", "bert")
    rows = [{"body": text, "kind": label, "text": "?"} for text, label in tasks.make_texts(60)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sequence_classification\nmodel: {{name_or_path: {base}}}\n"
        f"data: {{path: {data}, columns: {{text: body, label: kind}}}}\nlora: {{r: 4}}\n"
        "training: {max_steps: 2, per_device_train_batch_size: 4, save_steps: 2, max_length: 20}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    adapter = run.train(load.load_recipe(recipe))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / CONFIG).exists()
    for path in (adapter, checkpoint):
        said = ask(path, data, folder=tmp_path)
        assert [line["text"] for line in said] == [row["body"] for row in rows]
        assert [line["expected"] for line in said] == [row["kind"] for row in rows]
        assert {line["label"] for line in said} <= {"good", "bad", "neutral"}
    assert "columns: body as text, kind as label" in capsys.readouterr().err


def test_long_rows_are_cut_and_counted(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["paris"] * 100)
    texts = ["great paris", long, "bad may"]
    for kind, labels in ((CLASSES, KINDS["single_label_classification"]), (TOKENS, TAGS)):
        adapter = make_adapter(bert, tmp_path / kind, kind, labels)
        said = ask(adapter, None, texts, everything=True, folder=tmp_path)
        assert "warning: 1 of 3 rows is cut at 48 tokens" in capsys.readouterr().err
        assert [line["text"] for line in said] == texts
        shorter = ask(adapter, None, texts, max_length=12, folder=tmp_path)
        assert "1 of 3 rows is cut at 12 tokens" in capsys.readouterr().err
        if kind == TOKENS:
            assert len(said[1]["tags"]) == 46
        with pytest.raises(LoraError, match="text 2: 102 tokens, over 48"):
            ask(adapter, None, texts, cuts=False, folder=tmp_path)
        skipped = ask(adapter, None, texts, cuts=False, skips_bad=True, folder=tmp_path)
        assert skipped[1] == {"place": "text 2", "text": long, "error": "102 tokens, over 48"}
        assert "1 of 3 rows has no answer (1 × too long)" in capsys.readouterr().err
        for line, other in ((said[0], skipped[0]), (said[2], skipped[2])):
            assert other["text"] == line["text"]
            if kind == CLASSES:
                assert other["probability"] == pytest.approx(line["probability"], abs=1e-5)
        assert len(shorter) == 3
        with pytest.raises(UsageError, match="--max-length 100: .* reads 48 tokens"):
            ask(adapter, None, texts, max_length=100, folder=tmp_path)


def test_a_bad_row_has_a_line_that_says_so(bert: Path, tmp_path: Path) -> None:
    labels = KINDS["single_label_classification"]
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, labels)
    data = tmp_path / "r.jsonl"
    data.write_text(
        '{"text": "great", "label": "ham"}\n{"text": ""}\n{"text": "may"}\n[1]\n'
        '{"text": "bad", "label": "spun"}\n{"label": "ham"}\n{"text": "york"\n'
    )
    said = ask(adapter, data, skips_bad=True, batch_size=2, folder=tmp_path)
    assert [line["place"] for line in said] == [f"{data}:{at}" for at in range(1, 8)]
    assert [line.get("error") for line in said] == [
        None,
        "text is empty",
        None,
        "the row is [1], not a mapping of columns",
        "the label 'spun' is not known; the labels are ham, spam, eggs",
        "there is no text; the columns are label",
        "column 16: invalid JSON: Expecting ',' delimiter",
    ]
    with pytest.raises(LoraError, match=r"r.jsonl:2: text is empty") as caught:
        ask(adapter, data, folder=tmp_path)
    assert caught.value.hint == "mend or remove the row, or --on-bad-row skip"
    assert not list(tmp_path.glob("*.passing*"))
    assert len(list(tmp_path.glob("out-*"))) == 1  # of the failed call nothing is left


def test_an_adapter_of_peft_alone_has_labels_with_numbers(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, labels in ((CLASSES, ["a", "b", "c", "d"]), (TOKENS, TAGS)):
        adapter = make_adapter(bert, tmp_path / kind, kind, labels)
        named = ask(adapter, None, make_texts(20), everything=True, folder=tmp_path)
        (adapter / CONFIG).unlink()
        said = ask(adapter, None, make_texts(20), everything=True, folder=tmp_path)
        assert f"{adapter} does not name its labels" in capsys.readouterr().err
        if kind == CLASSES:
            assert [labels[int(line["label"].removeprefix("LABEL_"))] for line in said] == [
                line["label"] for line in named
            ]
        else:
            assert [t["tag"].replace("LABEL_", "") for line in said for t in line["tags"]] == [
                str(TAGS.index(t["tag"])) for line in named for t in line["tags"]
            ]


def test_a_head_that_nothing_holds_is_refused(bert: Path, tmp_path: Path) -> None:
    """PEFT's default for BERT: its classifier is saved, and the pooler before it is not."""
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, ["x", "y"])
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["classifier"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraError, match="lacks bert.pooler.dense.bias, and so do the files"):
        ask(adapter, None, ["may"], folder=tmp_path)
    network = transformers.BertForSequenceClassification.from_pretrained(bert)
    network.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraError, match=r"whole is a base: its files lack the head \(classifier"):
        ask(tmp_path / "whole", None, ["may"], folder=tmp_path)


def test_numbers_that_are_not_finite_are_no_answer(bert: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bert, tmp_path / "a", CLASSES, ["x", "y"])
    merged = merge_by_peft(bert, adapter, CLASSES)
    made = tmp_path / "m"
    make_tokenizer().save_pretrained(made)
    word = make_tokenizer().convert_tokens_to_ids("may")
    merged.bert.embeddings.word_embeddings.weight.data[word] = 3e38  # its norm has no number
    merged.save_pretrained(made)
    said = ask(made, None, ["paris", "may", "york"], skips_bad=True, folder=tmp_path)
    assert [("error" in line, "label" in line) for line in said] == [
        (False, True), (True, False), (False, True),
    ]  # fmt: skip
    with pytest.raises(LoraError, match="text 2: the numbers that .* answers with are not finite"):
        ask(made, None, ["paris", "may", "york"], folder=tmp_path)
    merged.classifier.weight.data[0, 0] = torch.nan
    merged.save_pretrained(made)
    with pytest.raises(LoraError, match="holds values that are not finite, in 1 tensor, the first"):
        ask(made, None, ["paris"], skips_bad=True, folder=tmp_path)


def test_models_that_write_and_others_are_told_apart(
    bert: Path, tiny: Path, tmp_path: Path
) -> None:
    classes = make_adapter(bert, tmp_path / "c", CLASSES, ["x", "y"])
    tags = make_adapter(bert, tmp_path / "t", TOKENS, TAGS)
    whole = tmp_path / "m"
    merge_by_peft(bert, classes, CLASSES).save_pretrained(whole)
    make_tokenizer().save_pretrained(whole)
    for path, does in ((classes, "classify texts"), (tags, "tag words"), (whole, "classify texts")):
        with pytest.raises(LoraError, match=f"models that {does}, and writes no text") as caught:
            open_answerers.open_models([str(path)])
        assert caught.value.hint == f"lora predict {path} --data FILE"
        with pytest.raises(LoraError, match=f"models that {does}, and GGUF files are of") as caught:
            export(path, ["f16"], None, None, None)
        merged = path == whole
        assert caught.value.hint == (
            f"lora export-onnx {path} OUT"
            if merged
            else f"lora merge {path} MODEL, then lora export-onnx MODEL OUT"
        )
    with pytest.raises(LoraError, match="GGUF files are of models that write"):
        export_adapter(tags, ["f16"], None, None, None)
    with pytest.raises(LoraError, match="is a model that writes text") as caught:
        ask(tiny / "model", None, ["x"], folder=tmp_path)
    assert caught.value.hint == f"lora generate {tiny / 'model'} --prompt TEXT"
    with pytest.raises(LoraError, match=r"is a base \(BertForMaskedLM\)"):
        ask(bert, None, ["x"], folder=tmp_path)
    with pytest.raises(UsageError, match="for sequence_classification, and .* token_class"):
        ask([classes, tags], None, ["x"], folder=tmp_path)


def test_words_of_a_tokenizer_that_splits_none_stand_between_spaces() -> None:
    """A text that is one word to its tokenizer, as of Llama 2's; and one with spaces in its
    tokens, as of GPT-2's."""
    text = "Angela Merkel  in\nParis."
    tokens = tagger.Tokens(
        {}, [None, 0, 0, 0, 0, 0, None],
        [(0, 0), (0, 6), (6, 10), (10, 13), (13, 17), (17, 24), (0, 0)],
    )  # fmt: skip
    words = tagger.find_words(tokens, text)
    assert [words.read(*span) for span in words.spans] == ["Angela", "Merkel", "in", "Paris."]
    assert words.firsts == [1, 2, 4, 5]
    own = tagger.Tokens(
        {}, [0, 1, 1, 2, 3, 4], [(0, 6), (6, 10), (10, 13), (13, 14), (14, 17), (17, 18)]
    )
    words = tagger.find_words(own, text)
    assert [words.read(*span) for span in words.spans] == ["Angela", "Merkel", "in"]
    assert words.firsts == [0, 1, 4]
