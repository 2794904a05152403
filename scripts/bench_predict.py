"""Rows a second of `lora predict` against transformers' pipeline on the same model, with the same
batch size, in one run.

    python scripts/bench_predict.py [--rows 1000] [--layers 4] [--width 256] [--batch-size 32]
                                    [--kind classification] [--repeat 5]

A BERT with random weights, and texts of 2 to 120 words, most of them short. Both are loaded before
and take turns; tokenising counts. The answers are compared first: unequal work has no ratio.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from lora_cli.evaluate.input_rows import Rows
from lora_cli.evaluate.opened import open_all, read_all
from lora_cli.evaluate.predict import WINDOW, Answering, Options, Waiting
from lora_cli.evaluate.predictors import Reading, find_predictor

WORDS = [f"w{number}" for number in range(2000)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LABELS = {"classification": ["ham", "spam", "eggs"], "tagging": ["O", "B-PER", "I-PER", "B-LOC"]}
CLASSES = {"classification": "SequenceClassification", "tagging": "TokenClassification"}


def make_model(folder: Path, kind: str, layers: int, width: int) -> Path:
    """Write a BERT of a shape, with a head, and its tokenizer of whole words."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: at for at, w in enumerate([*SPECIAL, *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=128,
    ).save_pretrained(folder)  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 32, intermediate_size=4 * width, max_position_embeddings=128,
        id2label=dict(enumerate(LABELS[kind])),
    )  # fmt: skip
    network = getattr(transformers, f"BertFor{CLASSES[kind]}")(config)
    network.classifier.weight.data.normal_()
    network.save_pretrained(folder)
    return folder


def make_texts(count: int) -> list[str]:
    """Draw texts whose lengths are spread as those of sentences and messages are: log-normally."""
    drawn = random.Random(0)
    lengths = [min(120, max(2, round(drawn.lognormvariate(2.7, 0.8)))) for _ in range(count)]
    return [" ".join(drawn.choices(WORDS, k=length)) for length in lengths]


def answer_here(folder: Path, batch_size: int, kind: str) -> Callable[[list[str]], list[Any]]:
    """Return what answers texts as `lora predict` does, its model loaded."""
    named = read_all([str(folder)], None)
    [model] = open_all(named)
    predictor = find_predictor(model.task)
    options = Options(Reading(batch_size=batch_size))

    def answer(texts: list[str]) -> list[Any]:
        rows = Rows(iter(()), "labelled" if kind == "classification" else "text", {}, False)
        asked = [
            Waiting(str(at), {"text": text}, rows.convert(str(at), {"text": text}))
            for at, text in enumerate(texts)
        ]
        answering = Answering({model.name: predictor(model, options.reading)}, options)
        size = batch_size * WINDOW
        with model.asking():
            return [
                line
                for at in range(0, len(asked), size)
                for line in answering.answer(asked[at : at + size])
            ]

    return answer


def answer_there(folder: Path, batch_size: int, kind: str) -> Callable[[list[str]], list[Any]]:
    """Return transformers' pipeline for texts."""
    task = "text-classification" if kind == "classification" else "token-classification"
    given = {} if kind == "classification" else {"aggregation_strategy": "first"}
    found = pipeline(task, str(folder), batch_size=batch_size, device="cpu", **given)
    return lambda texts: list(found(texts))


def refuse_differences(kind: str, ours: list[Any], theirs: list[Any]) -> None:
    """Raise AssertionError unless both answer the same."""
    for line, other in zip(ours, theirs, strict=True):
        if kind == "classification":
            assert line["label"] == other["label"], (line, other)
            assert abs(line["probability"] - other["score"]) < 1e-5, (line, other)
        else:
            places = [(each["type"], each["start"], each["end"]) for each in line["entities"]]
            wanted = [(each["entity_group"], each["start"], each["end"]) for each in other]
            assert places == wanted, (line, other)


def main() -> None:
    """Measure both in turns after a warm-up of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("rows", 1000),
        ("layers", 4),
        ("width", 256),
        ("batch-size", 32),
        ("repeat", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kind", choices=LABELS, default="classification")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    texts = make_texts(given.rows)
    with tempfile.TemporaryDirectory() as folder:
        made = make_model(Path(folder), given.kind, given.layers, given.width)
        sides = {
            "lora predict": answer_here(made, given.batch_size, given.kind),
            "pipeline": answer_there(made, given.batch_size, given.kind),
        }
        refuse_differences(given.kind, *(answer(texts) for answer in sides.values()))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(given.repeat):
            for name, answer in sides.items():
                started = time.perf_counter()
                answer(texts)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in medians.items():
        print(f"{name:12} {given.rows / each:8,.0f} rows/s")
    ratios = [b / a for a, b in zip(*seconds.values())]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio {statistics.median(ratios):.2f} ({spread}), {given.kind}, answers equal")


if __name__ == "__main__":
    main()
