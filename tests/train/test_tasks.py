"""Task × method × architecture: what trained is what PEFT loads again by itself, what merges, and
what resumes.

Hermetic: random bases of two layers, CPU. Alone: pytest tests/train/test_tasks.py. The whole table:
pytest -m slow tests/train/test_tasks.py; as text: python -m tests.train.test_tasks
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig

from lora_cli.common import LoraError
from lora_cli.merge.merge import merge
from lora_cli.models import four_bit, make_probes, read_adapter
from lora_cli.models.probes import TRAINED, compute_logits
from lora_cli.recipe import load_recipe
from lora_cli.recipe.tasks import name_task
from lora_cli.train import run, trial
from lora_cli.train.trainers import Watched
from tests import tasks
from tests.runs import KilledError

METHODS = ["lora", "dora", "qlora", "qdora"]
TABLE = [
    (task, method, family)
    for task, method, family in itertools.product(tasks.ROWS, METHODS, tasks.FAMILIES)
    if task != "seq2seq_lm" or family in ("bart", "t5", "bert")
]
QUICK = [
    ("sequence_classification", "lora", "bert"),
    ("sequence_classification", "qdora", "bert"),
    ("sequence_classification", "dora", "deberta"),
    ("sequence_classification", "lora", "llama"),
    ("sequence_classification", "lora", "bart"),
    ("token_classification", "lora", "distilbert"),
    ("token_classification", "qlora", "modernbert"),
    ("token_classification", "dora", "qwen3"),
    ("question_answering", "lora", "bert"),
    ("question_answering", "qdora", "modernbert"),
    ("seq2seq_lm", "lora", "t5"),
    ("seq2seq_lm", "qdora", "bart"),
    ("seq2seq_lm", "lora", "bert"),
]
REFUSED = {
    ("token_classification", "bart"): "transformers has no bart model to tag words",
    ("question_answering", "llama"): "do not fit LlamaForQuestionAnswering: 22 are missing",
    ("question_answering", "qwen3"): "do not fit Qwen3ForQuestionAnswering: 26 are missing",
    ("seq2seq_lm", "bert"): "transformers has no bert model to read a text and write another",
}
"""What is refused whatever the method, and with which words."""


def load_as_peft_does(adapter: Path) -> PeftModel:
    """Base and adapter as PEFT alone puts them together, from what lies in the adapter's folder."""
    read = read_adapter(adapter)
    kept = read.quantization
    auto = getattr(transformers, read.base.task.auto_class)
    torch.manual_seed(1)  # what is not saved would be other numbers
    network = auto.from_pretrained(
        read.base.name,
        config=AutoConfig.from_pretrained(
            read.base.name if read.base.task.writes_text else adapter  # where its head is described
        ),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # a base's own head of other labels
        **({"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **kept)} if kept else {}),
    )
    if kept:  # bitsandbytes computes packed ones in another type on some CPUs
        four_bit.keep_4bit_weights_unpacked(network)
    return PeftModel.from_pretrained(network, str(adapter)).eval()


def measure_apart(adapter: Path, network: torch.nn.Module, scale: bool = False) -> float:
    """How far a model's logits on the probes lie from those that training left."""
    kept = load_file(adapter / TRAINED)["logits"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    every = compute_logits(network, make_probes(tokenizer))
    last = len(kept) == len(every)  # of a whole vocabulary at each position
    given = torch.cat([rows[-1:] if last else rows for rows in every])
    assert given.shape == kept.shape
    return (given - kept).abs().max().item() / (kept.std().item() if scale else 1)


def resume_from_two(recipe: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Train again, killed in the third step, and go on from the second."""
    loaded = load_recipe(recipe, [f"output_dir={folder}"])
    steps = itertools.count(1)
    step = Watched.training_step

    def killed(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(steps) == 4:
            raise KilledError
        return step(*args, **kwargs)

    with patch.context() as patched:
        patched.setattr(trial, "try_training", lambda _: None)
        patched.setattr(Watched, "training_step", killed)
        with pytest.raises(KilledError):
            run.train(loaded)
    assert (folder / "checkpoint-2").is_dir()
    return run.train(loaded, resume=True)


def try_all(folder: Path, task: str, method: str, family: str) -> dict[str, float | bool | str]:
    """One line of the table."""
    base = tasks.make_base(folder / "base", family)
    recipe = tasks.write_recipe(folder, task, base, method)
    try:
        adapter = run.train(load_recipe(recipe))
    except LoraError as error:
        return {"refused": error.message}
    found: dict[str, float | bool | str] = {}
    found["reloaded"] = measure_apart(adapter, load_as_peft_does(adapter), scale=True)
    merge(adapter, folder / "merged", None, None, False)
    auto = getattr(transformers, name_task(task).auto_class)
    merged = auto.from_pretrained(folder / "merged", dtype=torch.float32)
    found["merged"] = measure_apart(adapter, merged, scale=True)
    again = resume_from_two(recipe, folder / "again", pytest.MonkeyPatch())
    weights = "adapter_model.safetensors"
    found["resumed"] = (adapter / weights).read_bytes() == (again / weights).read_bytes()
    return found


def judge(task: str, method: str, family: str, found: dict[str, float | bool | str]) -> None:
    if (task, family) in REFUSED:
        assert REFUSED[task, family] in str(found["refused"])
        return
    # DoRA is factored in training, so that its sums have another order
    assert found["reloaded"] <= (1e-5 if "dora" in method else 0)
    assert found["merged"] < (2e-5 if method in ("lora", "dora") else 2e-4)
    assert found["resumed"]


@pytest.mark.parametrize(("task", "method", "family"), QUICK)
def test_what_trained_is_loaded_merged_and_resumed(
    tmp_path: Path, task: str, method: str, family: str
) -> None:
    judge(task, method, family, try_all(tmp_path, task, method, family))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method", "family"), [each for each in TABLE if each not in QUICK]
)
def test_the_whole_table(tmp_path: Path, task: str, method: str, family: str) -> None:
    judge(task, method, family, try_all(tmp_path, task, method, family))


def print_table() -> None:
    for task, method, family in TABLE:
        folder = Path(tempfile.mkdtemp())
        found = try_all(folder, task, method, family)
        shutil.rmtree(folder)
        shown = [f"{name} {value:.1e}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in found.items()]  # fmt: skip
        sys.stdout.write(f"| {task} | {method} | {family} | {' | '.join(shown)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    print_table()
