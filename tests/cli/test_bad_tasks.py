"""What a person can get wrong with a task other than writing, and the one message each gets.
Compared with bad_tasks.txt.

Each case is a whole `lora check` or `lora merge` in this process. Hermetic: random bases of two
layers. Alone: pytest tests/cli/test_bad_tasks.py. After a change of a message:
python -m tests.cli.test_bad_tasks > tests/cli/bad_tasks.txt
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from lora_cli import cli
from tests import snapshots, tasks

SNAPSHOT = Path(__file__).parent / "bad_tasks.txt"
CLASSES = "sequence_classification"
TAGS = "token_classification"
TWO = "text,label\nglass house,good\ntree,bad\n"
PAIRS = "seq2seq_lm"
LONG = "source,target\nglass house river,tree stone paper\n"
WORDS = '{"tokens": ["glass", "tree"], "tags": ["B-GOOD", "O"]}\n'
BAD: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    # name: (task, name of the rows' file, its content, options)
    "no labels": (CLASSES, "r.csv", "text\nglass\n", ()),
    "other columns": (CLASSES, "r.csv", "what,which\nglass,good\ntree,bad\n", ()),
    "a table without names": (CLASSES, "r.csv", "Glass is not a house.,good\nno tree,bad\n", ()),
    "half a character": (CLASSES, "r.jsonl", '{"text": "a\\ud800", "label": "x"}\n'
                         '{"text": "b", "label": "y"}\n', ()),
    "a label of half a character": (CLASSES, "r.jsonl", '{"text": "a", "label": "\\ud800"}\n'
                                    '{"text": "b", "label": "²"}\n{"text": "c", "label": "--5"}\n',
                                    ()),
    "a column that is not there": (CLASSES, "r.csv", TWO, ("data.columns={text: txt}",)),
    "one label in all": (CLASSES, "r.csv", "text,label\nglass,good\ntree,good\n", ()),
    "an empty label": (CLASSES, "r.csv", TWO + "stone,\n", ()),
    "a label of null": (CLASSES, "r.jsonl", '{"text": "glass", "label": null}\n'
                        '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', ()),
    "an unknown label": (CLASSES, "r.csv", TWO, ("model.labels=[good, worse]",)),
    "an unknown label like a known one": (CLASSES, "r.csv", TWO, ("model.labels=[good, bed]",)),
    "a number beyond the labels": (CLASSES, "r.jsonl", '{"text": "glass", "label": 7}\n',
                                   ("model.labels=[good, bad]",)),
    "an empty text": (CLASSES, "r.csv", TWO + ",good\n", ()),
    "a text that is a number": (CLASSES, "r.jsonl", '{"text": 3, "label": "x"}\n'
                                '{"text": "a", "label": "y"}\n', ()),
    "an empty second text": (CLASSES, "r.jsonl",
                             '{"text": "glass", "text_pair": "", "label": "x"}\n'
                             '{"text": "a", "text_pair": "b", "label": "y"}\n', ()),
    "lists and single labels": (CLASSES, "r.jsonl", '{"text": "glass", "label": ["x"]}\n'
                                '{"text": "a", "label": "y"}\n', ()),
    "numbers and names": (CLASSES, "r.jsonl", '{"text": "glass", "label": 1.5}\n'
                          '{"text": "a", "label": "y"}\n', ()),
    "a number that is none": (CLASSES, "r.csv", TWO, ("model.problem_type=regression",)),
    "infinite": (CLASSES, "r.jsonl", '{"text": "glass", "label": 1.5}\n'
                 '{"text": "a", "label": 1e999}\n', ()),
    "other numbers of values": (CLASSES, "r.jsonl", '{"text": "glass", "label": [1.5, 2.0]}\n'
                                '{"text": "a", "label": [0.5]}\n', ()),
    "an unknown label of several": (CLASSES, "r.jsonl", '{"text": "glass", "label": ["x", "z"]}\n',
                                    ("model.labels=[x, y]",)),
    "labels that are no list": (CLASSES, "r.jsonl", '{"text": "glass", "label": {"x": 1}}\n',
                                ("model.labels=[x, y]",
                                 "model.problem_type=multi_label_classification")),
    "too long": (CLASSES, "r.csv", TWO, ("data.on_long_row=error", "training.max_length=3")),
    "all too long": (CLASSES, "r.csv", TWO, ("training.max_length=2",)),
    "beyond the positions": (CLASSES, "r.csv", f"text,label\n{'glass ' * 600},good\ntree,bad\n",
                             ()),
    "a text that ends as padding": (CLASSES, "r.csv", "text,label\nglass,good\ntree,bad\n",
                                    ("training.pad_token='[SEP]'",)),
    "a token that is not there": (CLASSES, "r.csv", TWO, ("training.pad_token=<none>",)),
    "one label named": (CLASSES, "r.csv", TWO, ("model.labels=[good]",)),
    "a label named twice": (CLASSES, "r.csv", TWO, ("model.labels=[good, bad, good]",)),
    "smoothed numbers": (CLASSES, "r.csv", TWO, ("model.problem_type=regression",
                                                 "training.label_smoothing_factor=0.1")),
    "parts of a row": (CLASSES, "r.csv", TWO, ("data.on_long_row=split",)),
    "packing": (CLASSES, "r.csv", TWO, ("training.packing=step",)),
    "answers": (CLASSES, "r.csv", TWO, ("data.train_on=completion",)),
    "a template": (CLASSES, "r.csv", TWO, ("model.chat_template=chatml",)),
    "TRL's trainer": (CLASSES, "r.csv", TWO, ("trainer=sft",)),
    "a format of conversations": (CLASSES, "r.csv", TWO, ("data.format=alpaca",)),
    "a metric of numbers": (CLASSES, "r.csv", TWO, ("data.eval_split=train",
                                                    "training.metric_for_best_model=pearson")),
    "a smaller metric": (CLASSES, "r.jsonl", '{"text": "glass", "label": 1.5}\n',
                         ("data.eval_split=train", "training.metric_for_best_model=mae")),
    "the head adapted": (CLASSES, "r.csv", TWO, ("lora.target_modules=[classifier]",)),
    "labels for writing": ("causal_lm", "r.csv", TWO, ("model.labels=[a, b]",)),
    "an unknown task": ("seq_cls", "r.csv", TWO, ()),
    "a family without the task": (TAGS, "r.jsonl", WORDS, ("model.name_or_path=DIR/bart",)),
    "a base without its layers": (CLASSES, "r.csv", TWO, ("model.name_or_path=DIR/short",)),
    "a base with more layers": (CLASSES, "r.csv", TWO, ("model.name_or_path=DIR/long",)),
    "words without tags": (TAGS, "r.jsonl", '{"tokens": ["glass"], "tags": []}\n' + WORDS, ()),
    "fewer tags than words": (TAGS, "r.jsonl", '{"tokens": ["glass", "tree"], "tags": ["O"]}\n'
                              + WORDS, ()),
    "a word without tokens": (TAGS, "r.jsonl", WORDS + '{"tokens": ["glass", ""], '
                              '"tags": ["O", "O"]}\n', ()),
    "half a character in a word": (TAGS, "r.jsonl", WORDS + '{"tokens": ["\\ud800"], "tags": '
                                   '["O"]}\n', ()),
    "a word that is a number": (TAGS, "r.jsonl", WORDS + '{"tokens": [3], "tags": ["O"]}\n', ()),
    "an entity not begun": (TAGS, "r.jsonl", WORDS + '{"tokens": ["glass", "tree"], '
                            '"tags": ["O", "I-GOOD"]}\n', ()),
    "an unknown tag": (TAGS, "r.jsonl", WORDS, ("model.labels=[O, B-BAD]",)),
    "tags that are numbers": (TAGS, "r.jsonl", WORDS, ("model.problem_type=regression",)),
    "no target": (PAIRS, "r.csv", "source,which\nglass,tree\n", ()),
    "an empty target": (PAIRS, "r.csv", "source,target\nglass,tree\nstone,\n", ()),
    "a source that is a list": (PAIRS, "r.jsonl", '{"source": ["a"], "target": "tree"}\n', ()),
    "three languages": (PAIRS, "r.jsonl",
                        '{"translation": {"de": "a", "en": "b", "fr": "c"}}\n', ()),
    "a language that is not there": (PAIRS, "r.jsonl", '{"translation": {"de": "a", "en": "b"}}\n',
                                     ("data.columns={source: translation.de, "
                                      "target: translation.fr}",)),
    "a long source": (PAIRS, "r.csv", LONG, ("data.on_long_row=error", "training.max_length=4")),
    "a long target": (PAIRS, "r.csv", LONG, ("data.on_long_row=error",
                                             "data.max_target_length=4")),
    "all targets too long": (PAIRS, "r.csv", LONG, ("data.max_target_length=4",)),
    "a target beyond the positions": (PAIRS, "r.csv", f"source,target\nglass,{'glass ' * 600}\n",
                                      ("model.name_or_path=DIR/narrow",)),
    "parts of a pair": (PAIRS, "r.csv", LONG, ("data.on_long_row=split",)),
    "loss on answers of a pair": (PAIRS, "r.csv", LONG, ("data.train_on=all",)),
    "a prefix for writing": ("causal_lm", "r.csv", LONG, ("data.source_prefix=hello",)),
    "targets of classes": (CLASSES, "r.csv", TWO, ("data.max_target_length=9",)),
    "a metric of texts that are not written": (
        PAIRS, "r.csv", LONG, ("data.eval_split=train", "training.metric_for_best_model=rougeL")),
    "writing without evaluation": (PAIRS, "r.csv", LONG, ("training.generate_at_evaluation=true",)),
    "a smaller perplexity": (PAIRS, "r.csv", LONG, ("data.eval_split=train",
                                                    "training.metric_for_best_model=perplexity")),
    "one language": (PAIRS, "r.csv", LONG, ("data.source_language=de_DE",)),
    "languages that are not marked": (PAIRS, "r.csv", LONG, ("data.source_language=de_DE",
                                                            "data.target_language=ro_RO")),
    "a start by rows of one text": (PAIRS, "r.csv", LONG, ("lora.init_lora_weights=eva",)),
    "a weight that is shared": (PAIRS, "r.csv", LONG, ("lora.target_modules=[shared]",)),
    "a shared weight trained whole": (PAIRS, "r.csv", LONG, ("lora.modules_to_save=[lm_head]",)),
    "a decoder without a beginning": (PAIRS, "r.csv", LONG, ("model.name_or_path=DIR/beginless",)),
    "an encoder alone": (PAIRS, "r.csv", LONG, ("model.name_or_path=DIR/bert",)),
}  # fmt: skip


@cache
def bases() -> Path:
    """Bases that are made once: two that are as they should be, and two that are not."""
    folder = Path(tempfile.mkdtemp()).resolve()
    for family in ("bert", "bart"):
        tasks.make_base(folder / family, family)
    for name, layers in (("short", 3), ("long", 1)):
        tasks.make_base(folder / name, "bert")
        config = json.loads((folder / name / "config.json").read_text())
        config["num_hidden_layers"] = layers
        (folder / name / "config.json").write_text(json.dumps(config))
    tasks.make_base(folder / "narrow", "bart", max_position_embeddings=64)
    tasks.make_base(folder / "beginless", "t5")
    config = json.loads((folder / "beginless" / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "beginless" / "config.json").write_text(json.dumps(config))
    return folder


def said(name: str, folder: Path) -> str:
    """What `lora check` says of the case's rows and options, beside what it reads and chooses."""
    task, file, content, options = BAD[name]
    (folder / file).write_text(content)
    (folder / "r.yaml").write_text(
        f"task: {task}\nmodel:\n  name_or_path: {bases() / ('bart' if task == PAIRS else 'bert')}\n"
        f"data:\n  path: {folder / file}\noutput_dir: {folder / 'out'}\n"
    )
    given = [str(each).replace("DIR", str(bases())) for each in options]
    arguments = ["check", str(folder / "r.yaml"), *(part for o in given for part in ("--set", o))]
    with contextlib.ExitStack() as stack:
        out, heard = io.StringIO(), io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(heard))
        stack.enter_context(mock.patch.object(sys, "argv", ["lora", *arguments]))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    lines = [line for line in heard.getvalue().splitlines() if line and line[0] != " "]
    text = "\n".join([*lines, f"[{ended.value.code}]"])
    return text.replace(f"{folder}/", "").replace(str(bases()), "BASES")


def test_the_snapshot_covers_every_case() -> None:
    assert len(BAD) >= 40
    assert snapshots.list_names(SNAPSHOT) == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_a_bad_task(name: str, tmp_path: Path) -> None:
    found = said(name, tmp_path.resolve())
    assert found == snapshots.find(SNAPSHOT, name)
    assert found.startswith(("error: ", "warning: "))


if __name__ == "__main__":
    os.environ["LORA_CACHE_DIR"] = tempfile.mkdtemp()
    sys.stdout.write(snapshots.render(BAD, said))
