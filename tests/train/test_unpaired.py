"""Training on answers that are each wanted or not (KTO): the loss, z, runs that are cut, dealt,
killed and resumed.

The loss is held against TRL's KTOTrainer, which renders, tokenises, borrows answers and computes by
itself, and against the paper's formula in float64. Hermetic: the tiny model, CPU.
Alone: pytest tests/train/test_unpaired.py
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from lora_cli.common import LoraError
from lora_cli.data import unpaired
from lora_cli.models import IGNORED
from lora_cli.recipe import UNPAIRED_METRICS, Preference, Recipe
from lora_cli.train import reference, run, trial, unpaired_batches, unpaired_losses
from lora_cli.train.unpaired_losses import Answers
from lora_cli.train.unpaired_trainer import UnpairedTrainer
from tests import runs
from tests.runs import read_adapter, read_metrics, read_steps

NAMES, THINGS = ["Ada", "Bo", "Cem", "Dia", "Eli"], ["lamp", "rope", "kettle", "map"]


def make_rows(number: int) -> list[dict[str, Any]]:
    """Orders, each with another prompt: a wanted answer is JSON, others are longer or shorter."""
    drawn = random.Random(3)
    rows = []
    for at in range(number):
        who, what = drawn.choice(NAMES), drawn.choice(THINGS)
        order = json.dumps({"name": who, "item": what, "count": 10 + at})
        worse = drawn.choice(["Sure!", f"Sure! {who} wants {10 + at} of it, namely {what}."])
        wanted = at % 3 != 1
        prompt = f"{who} orders {10 + at} of {what}. Write JSON."
        rows.append({"prompt": prompt, "completion": order if wanted else worse, "label": wanted})
    return rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def train(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """`train(name, *overrides)` trains on ten rows, four of them a step, and returns the run's
    folder."""
    monkeypatch.setattr(trial, "try_training", lambda recipe: None)  # for recipes of strangers
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(10)))

    def start(name: str, *overrides: str, resume: bool = False) -> Path:
        return run.train(make_recipe(tmp_path, tiny, name, *overrides), resume=resume).parent

    return start


def make_recipe(folder: Path, tiny: Path, name: str, *overrides: str) -> Recipe:
    rows = folder / "rows.jsonl"
    return runs.write_comparing_recipe(folder, tiny, name, "kto", rows, overrides)


# The loss -----------------------------------------------------------------------------------------

LOGPS, START = [-20.0, -31.0, -8.5, -3.0, -700.0], [-24.0, -30.5, -8.0, -7.0, -20.0]
WANTED = [1, 0, 1, 0, 1]


@pytest.mark.parametrize("divergence", [0.0, 1.75])
def test_the_loss_is_the_papers(divergence: float) -> None:
    answers = Answers(*map(torch.tensor, (LOGPS, START, [4.0] * 5, [float(x) for x in WANTED])))
    given = Preference(loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    found = unpaired_losses.compute_losses(answers, torch.tensor(divergence), given)
    wanted = []
    for logp, start, is_wanted in zip(LOGPS, START, WANTED):
        value = 0.3 * (logp - start - divergence) * (1 if is_wanted else -1)
        weight = 1.5 if is_wanted else 0.5
        wanted.append(weight * (1 - 1 / (1 + math.exp(-value))))
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def test_what_is_said_of_answers() -> None:
    answers = Answers(*map(torch.tensor, (LOGPS, START, [4.0] * 5, [float(x) for x in WANTED])))
    given = Preference(loss="kto", beta=0.5)
    losses = unpaired_losses.compute_losses(answers, torch.tensor(2.0), given)
    sums = unpaired_losses.describe_answers(answers, losses, torch.tensor(2.0), given).tolist()
    desirable, undesirable = 0.5 * (4 - 0.5 - 680) / 3, 0.5 * (-0.5 + 4) / 2
    assert unpaired_losses.average(sums) == pytest.approx(
        {
            "rewards_margin": desirable - undesirable,
            "rewards_desirable": desirable,
            "rewards_undesirable": undesirable,
            "logps_desirable": (-20 - 8.5 - 700) / 3,
            "logps_undesirable": -17.0,
            "kl": 2.0,
        }
    )
    one_kind = answers._replace(desirable=torch.ones(5))
    sums = unpaired_losses.describe_answers(one_kind, losses, torch.tensor(2.0), given).tolist()
    assert list(unpaired_losses.average(sums)) == ["rewards_desirable", "logps_desirable", "kl"]


@pytest.mark.parametrize(("total", "number", "z"), [(6.0, 3.0, 2.0), (-6.0, 3.0, 0.0), (0, 0, 0)])
def test_z_is_a_mean_and_not_below_zero(total: float, number: float, z: float) -> None:
    found = unpaired_losses.estimate_divergence(torch.tensor(total), torch.tensor(number))
    assert float(found) == z


@pytest.mark.parametrize("packing", ["step", pytest.param("false", marks=pytest.mark.slow)])
def test_the_loss_is_trls(packing: str, train, tiny: Path, tmp_path, monkeypatch) -> None:
    """One batch of all rows, so that both borrow the same answers. The model is an adapter with a B
    that is not zero, and the reference its base."""
    first = train("first", "training.learning_rate=2e-4", "training.max_steps=3") / "adapter"
    own = reference.find_reference

    def find(recipe: Any, base: Any, adapted: PeftModel, *given: Any) -> Any:
        with adapted.disable_adapter():
            return own(recipe, base, adapted, *given)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "find_reference", find)
        patch.setattr(UnpairedTrainer, "_judge_start", lambda *_: None)
        folder = train(
            "looked", f"model.adapter={first}", "training.max_steps=1", "preference.beta=0.02",
            "training.per_device_train_batch_size=10", f"training.packing={packing}",
            "preference.desirable_weight=0.75",
        )  # fmt: skip
    found = read_steps(folder)[0]

    tokenizer = AutoTokenizer.from_pretrained(first)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in make_rows(10)
    ]
    options = KTOConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=10, beta=0.02, desirable_weight=0.75,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", max_length=None,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = KTOTrainer(
        PeftModel.from_pretrained(base, first, is_trainable=True),
        AutoModelForCausalLM.from_pretrained(tiny / "model"), options,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    wanted = float(trainer.compute_loss(trainer.model, batch))
    theirs = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert theirs["kl"] > 0.01 and abs(theirs["rewards/margins"]) > 0.01  # or nothing is compared
    assert found["loss"] == pytest.approx(wanted, rel=2e-5)
    assert found["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
    names = {"margin": "margins", "desirable": "chosen", "undesirable": "rejected"}
    for ours, name in names.items():
        assert found[f"rewards_{ours}"] == pytest.approx(theirs[f"rewards/{name}"], rel=1e-3)
    assert found["logps_desirable"] == pytest.approx(theirs["logps/chosen"], rel=2e-5)


# Who is held against whose answer -----------------------------------------------------------------


def make_dataset(prompts: str) -> Dataset:
    rows = {
        "input_ids": [[ord(each), 7, 100 + at] for at, each in enumerate(prompts)],
        "labels": [[IGNORED, IGNORED, 100 + at] for at in range(len(prompts))],
        unpaired.DESIRABLE: [[at % 2] for at in range(len(prompts))],
    }
    return Dataset.from_dict(rows)


@pytest.mark.parametrize("prompts", ["abcdef", "aabbcc", "abab", "aabc", "aaabbc", "abcaa", "ab"])
def test_each_answer_is_lent_once_and_to_another_prompt(prompts: str) -> None:
    found = unpaired.match_answers(make_dataset(prompts)).tolist()
    assert all(prompts[at] != prompts[other] for at, other in enumerate(found))
    most = Counter(prompts).most_common(1)[0][1]
    assert (sorted(found) == list(range(len(prompts)))) == (2 * most <= len(prompts))


def test_rows_of_different_prompts_borrow_as_trls_do() -> None:
    assert unpaired.match_answers(make_dataset("abc")).tolist() == [2, 0, 1]  # as TRL's rotation
    assert unpaired.match_answers(make_dataset("abc").select([])).tolist() == []


def test_a_borrowed_answer_is_cut_at_the_limit() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    other = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    found = unpaired.exchange_answer(row, other, 4)
    assert found == {"input_ids": [1, 2, 6, 7], "labels": [-100, -100, 6, 7]}


def test_the_empty_row_of_a_process_has_nothing_to_borrow() -> None:
    empty = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}
    for collate in (unpaired_batches.Steps(8), unpaired_batches.PaddedRows(0)):
        batch = collate([empty])
        for each in (batch, batch[unpaired_batches.MISMATCHED]):
            assert each["answers"] == [[]] and each["reference"].shape == (1, 0)


# Runs ---------------------------------------------------------------------------------------------


def test_a_step_is_the_same_in_any_cutting(train) -> None:
    """Sequences of one row each, padded batches that are accumulated: z is of the whole step."""
    cut = ("training.gradient_accumulation_steps=4", "training.per_device_train_batch_size=1")
    runs = [
        train("whole"),
        train("short", "training.packed_length=1"),
        train("padded", "training.packing=false", "training.loss_head=stock", *cut),
    ]
    wanted = read_steps(runs[0])
    assert wanted[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert any(line["kl"] > 0.1 for line in wanted)
    for folder in runs[1:]:
        for line, other in zip(read_steps(folder), wanted, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=2e-3, abs=1e-4)
            assert line["kl"] == pytest.approx(other["kl"], rel=2e-3, abs=1e-3)
        first = read_steps(folder)[0]["grad_norm"]
        assert first == pytest.approx(wanted[0]["grad_norm"], rel=1e-4)


def test_an_evaluation_is_the_same_in_any_cutting(train, tmp_path: Path) -> None:
    given = (f"data.eval_path={tmp_path / 'rows.jsonl'}", "training.max_steps=2")
    found = []
    for name, size in (("whole", 8), ("cut", 1)):
        more = f"training.per_device_eval_batch_size={size}"
        found.append(read_metrics(train(name, *given, more))[-2])
    assert {f"eval_{each}" for each in UNPAIRED_METRICS} <= found[0].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_nothing_is_dropped_for_z(train, monkeypatch) -> None:
    """An adapter that is trained on with dropout differs from its start, and what z is made of does
    not, also where it is negative."""
    own, totals = unpaired_losses.estimate_divergence, []

    def estimate(total: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        totals.append(float(total))
        return own(total, number)

    start = train("first", "training.max_steps=3", "data.max_rows=6") / "adapter"
    given = (f"model.adapter={start}", "training.max_steps=1", "lora.lora_dropout=0.5")
    monkeypatch.setattr(unpaired_losses, "estimate_divergence", estimate)
    [line] = read_steps(train("second", *given, "preference.beta=1"))
    assert totals == pytest.approx([0], abs=1e-2)
    assert abs(line["rewards_desirable"]) > 1


def test_another_reference_is_an_error(train, monkeypatch) -> None:
    own = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *given: own(*given) - 1)
    with pytest.raises(LoraError, match=r"the first step's loss is 0.*nats a token from it"):
        train("run")


@pytest.mark.parametrize("how", ["kill", pytest.param("signal", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_bytes(how: str, train, monkeypatch) -> None:
    """Records are of two steps, so that one is cut through; dropout draws numbers, and none for
    z."""
    given = (
        "training.logging_steps=2", "lora.lora_dropout=0.2", "data.eval_rows=2",
        "training.keep=last", "training.gradient_accumulation_steps=2",
        "training.per_device_train_batch_size=2", "training.max_steps=7", "training.save_steps=3",
        "training.packing=false",
    )  # fmt: skip
    whole = train("whole", *given)
    stopped = runs.stop_once(train, given, how, monkeypatch)
    assert read_adapter(stopped) == read_adapter(whole)
    assert read_metrics(stopped) == read_metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_the_same_run(strategy: str, train, tiny: Path, tmp_path: Path) -> None:
    """Of seven rows and three to evaluate on, a sequence each, one process has more passes than
    the other."""
    given = ["data.eval_rows=3", "training.max_steps=5", "training.packed_length=1"]
    alone = train("alone", *given)
    make_recipe(tmp_path, tiny, "both", *given)
    runs.train_by_two(tmp_path / "both.yaml", strategy, given)
    assert any(line.get("kl", 0) > 0.1 for line in read_metrics(alone))
    names = ("loss", "eval_loss", "kl", "eval_kl", *UNPAIRED_METRICS)
    runs.compare_metrics(alone, tmp_path / "both", names, near=1e-3)
