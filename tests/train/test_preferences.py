"""Training on pairs of answers: losses, reference, runs that are cut, dealt, stopped and resumed.

Losses are held against TRL's trainers (DPO, ORPO, CPO with SimPO), which render, tokenise and
compute by themselves, and against the papers' formulas in float64 over a plain forward pass.
Hermetic: the tiny model, CPU.
Alone: pytest tests/train/test_preferences.py
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from lora_cli.common import LoraError
from lora_cli.models import IGNORED
from lora_cli.recipe import PREFERENCE_METRICS, Preference, Recipe, load_recipe
from lora_cli.train import pair_batches, preference_losses, reference, run, trial
from lora_cli.train.preference_losses import Pairs
from lora_cli.train.preference_trainer import PreferenceTrainer
from tests import runs
from tests.runs import read_adapter, read_metrics, read_steps

NAMES, THINGS = ["Ada", "Bo", "Cem", "Dia", "Eli"], ["lamp", "rope", "kettle", "map"]


def make_rows(number: int) -> list[dict[str, str]]:
    """Orders whose better answer is JSON; the worse one is longer or shorter."""
    drawn = random.Random(3)
    rows = []
    for _ in range(number):
        who, what = drawn.choice(NAMES), drawn.choice(THINGS)
        count = drawn.randint(2, 99)
        worse = drawn.choice(["Sure!", f"Sure! {who} wants {count} of it, namely {what}."])
        better = json.dumps({"name": who, "item": what, "count": count})
        prompt = f"{who} orders {count} of {what}. Write JSON."
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def train(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """`train(name, *overrides)` trains on ten pairs, four of them a step, and returns the run's
    folder."""
    monkeypatch.setattr(trial, "try_training", lambda recipe: None)  # for recipes of strangers
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(10)))

    def start(name: str, *overrides: str, resume: bool = False) -> Path:
        return run.train(make_recipe(tmp_path, tiny, name, *overrides), resume=resume).parent

    return start


def make_recipe(folder: Path, tiny: Path, name: str, *overrides: str) -> Recipe:
    rows = folder / "pairs.jsonl"
    return runs.write_comparing_recipe(folder, tiny, name, "dpo", rows, overrides)


# The losses --------------------------------------------------------------------------------------


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(kind: str, beta: float, wrong: float, ratios: list[float], tokens: list[int]) -> float:
    """The papers' formulas, one pair at a time, in float64."""
    chosen, rejected = ratios
    gap = chosen - rejected
    mean = chosen / tokens[0] - rejected / tokens[1]
    clean, flipped = -math.log(sigma(beta * gap)), -math.log(sigma(-beta * gap))
    return {
        "sigmoid": (1 - wrong) * clean + wrong * flipped,
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * gap),
        "robust": ((1 - wrong) * clean - wrong * flipped) / (1 - 2 * wrong),
        "sigmoid_norm": -math.log(sigma(beta * mean)),
        "apo_zero": 1 - sigma(beta * chosen) + sigma(beta * rejected),
        "apo_down": sigma(beta * chosen) + 1 - sigma(beta * gap),
    }[kind]


KINDS = [
    ("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.1),
    ("sigmoid_norm", 0.0), ("apo_zero", 0.0), ("apo_down", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "wrong"), KINDS)
def test_each_loss_is_its_papers(kind: str, wrong: float) -> None:
    logps = torch.tensor([[-20.0, -31.0], [-8.5, -3.0], [-55.0, -54.0]])
    start = torch.tensor([[-24.0, -30.5], [-8.0, -7.0], [-55.0, -54.0]])
    tokens = torch.tensor([[7.0, 12.0], [3.0, 1.0], [20.0, 19.0]])
    given = Preference(loss=kind, beta=0.3, label_smoothing=wrong)
    found = preference_losses.compute_losses(Pairs(logps, start, tokens), given)
    rows = zip((logps - start).tolist(), tokens.tolist())
    wanted = [by_hand(kind, 0.3, wrong, ratios, counts) for ratios, counts in rows]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def odds_by_hand(logp: float) -> float:
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


def without_reference(kind: str, wrong: float, logps: list[float], tokens: list[int]) -> float:
    """The papers' formulas without a reference, one pair at a time, in float64, at β 0.3, γ 0.7."""
    beta, gamma = 0.3, 0.7
    chosen, rejected = logps
    mean, other = chosen / tokens[0], rejected / tokens[1]
    apart = beta * (mean - other) - gamma
    return {
        "odds_ratio": -beta * math.log(sigma(odds_by_hand(mean) - odds_by_hand(other))),
        "simpo": -(1 - wrong) * math.log(sigma(apart)) - wrong * math.log(sigma(-apart)),
        "sigmoid": -math.log(sigma(beta * (chosen - rejected))),
        "ipo": (mean - other - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * (chosen - rejected)),
    }[kind]


ALONE = [("odds_ratio", 0.0), ("simpo", 0.0), ("simpo", 0.2), ("sigmoid", 0.0), ("ipo", 0.0),
         ("hinge", 0.0)]  # fmt: skip


@pytest.mark.parametrize(("kind", "wrong"), ALONE)
def test_each_loss_without_a_reference_is_its_papers(kind: str, wrong: float) -> None:
    logps = torch.tensor([[-20.0, -31.0], [-8.5, -3.0], [-0.01, -54.0]])
    tokens = torch.tensor([[7.0, 12.0], [3.0, 1.0], [20.0, 19.0]])
    gamma = 0.7 if kind == "simpo" else 0.0
    given = Preference(loss=kind, beta=0.3, gamma=gamma, label_smoothing=wrong, sft_weight=0.5)
    found = preference_losses.compute_losses(Pairs(logps, None, tokens), given)
    rows = zip(logps.double().tolist(), tokens.tolist())
    wanted = [without_reference(kind, wrong, *row) - 0.5 * row[0][0] / row[1][0] for row in rows]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_odds_of_what_is_certain_have_a_gradient() -> None:
    """A float32 probability of 1 has no odds: TRL's gradient is not a number there."""
    logps = torch.tensor([[0.0, -3.0], [-2.0, 0.0], [0.0, 0.0], [-1e-9, -200.0]])
    logps.requires_grad_()
    given = Preference(loss="odds_ratio", sft_weight=1.0)
    pairs = Pairs(logps, None, torch.ones(4, 2))
    losses = preference_losses.compute_losses(pairs, given)
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()
    assert logps.grad[1, 0] < 0  # what is not certain is still learnt


def test_what_is_said_of_pairs_by_token() -> None:
    logps = torch.tensor([[-20.0, -31.0], [-9.0, -3.0]])
    pairs = Pairs(logps, None, torch.tensor([[4.0, 10.0], [3.0, 1.0]]))
    given = Preference(loss="simpo", beta=2.0, gamma=1.0)
    losses = preference_losses.compute_losses(pairs, given)
    found = preference_losses.average(
        preference_losses.describe_pairs(pairs, losses, given).tolist()
    )
    assert found == pytest.approx(
        {
            "rewards_accuracy": 0.0,  # equal by token, although not as sums
            "rewards_margin": 2 * (-5 + 3.1) / 2,
            "rewards_chosen": 2 * (-5 - 3) / 2,
            "rewards_rejected": 2 * (-3.1 - 3) / 2,
            "logps_chosen": -14.5,
            "logps_rejected": -17.0,
        }
    )


def test_what_is_said_of_pairs() -> None:
    logps = torch.tensor([[-20.0, -31.0], [-8.5, -3.0], [-55.0, -54.0]])
    start = torch.tensor([[-24.0, -30.5], [-8.0, -7.0], [-55.0, -54.0]])
    pairs = Pairs(logps, start, torch.ones(3, 2))
    given = Preference(beta=0.5)
    losses = preference_losses.compute_losses(pairs, given)
    sums = preference_losses.describe_pairs(pairs, losses, given)
    assert sums[0] == losses.sum() and sums[-1] == 3
    assert preference_losses.average(sums.tolist()) == pytest.approx(
        {
            "rewards_accuracy": 1 / 3,  # nothing tells the last pair apart
            "rewards_margin": 0.5 * (4.5 - 4.5 + 0) / 3,
            "rewards_chosen": 0.5 * (4 - 0.5) / 3,
            "rewards_rejected": 0.5 * (-0.5 + 4) / 3,
            "logps_chosen": -83.5 / 3,
            "logps_rejected": -88 / 3,
        }
    )


def find_losses(train: Any, monkeypatch: Any, adapter: Path, *overrides: str) -> tuple[float, Any]:
    """The loss of the first step, and what is known of its pairs, of a model that is `adapter`
    against a reference that is its base."""
    seen: list[Any] = []

    def spy(trainer: PreferenceTrainer, model: Any, part: dict[str, Any]) -> Any:
        pairs, losses = own(trainer, model, part)
        seen.append((pairs, losses))
        return pairs, losses

    own = PreferenceTrainer._compare
    own_find = reference.find_reference

    def find(recipe: Any, base: Any, adapted: PeftModel, *given: Any) -> Any:
        with adapted.disable_adapter():
            return own_find(recipe, base, adapted, *given)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "_compare", spy)
        patch.setattr(reference, "find_reference", find)
        patch.setattr(PreferenceTrainer, "_judge_start", lambda *_: None)
        folder = train("looked", f"model.adapter={adapter}", "training.max_steps=1", *overrides)
    return read_steps(folder)[0]["loss"], seen


@pytest.mark.parametrize(
    ("kind", "packing"), [("sigmoid", "step"), ("ipo", "false"), ("apo_zero", "step")]
)
def test_the_loss_is_trls_and_that_of_a_plain_pass(
    kind: str, packing: str, train, tiny: Path, tmp_path, monkeypatch
) -> None:
    """The model is an adapter with a B that is not zero, and the reference its base."""
    first = train("first", "training.learning_rate=2e-4", "training.max_steps=3") / "adapter"
    every = ("training.per_device_train_batch_size=10", f"training.packing={packing}")
    found, seen = find_losses(train, monkeypatch, first, *every, f"preference.loss={kind}")

    tokenizer = AutoTokenizer.from_pretrained(first)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model = PeftModel.from_pretrained(base, first, is_trainable=True)
    rows = [make_turns(row) for row in make_rows(10)]
    options = DPOConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=10, loss_type=kind, beta=0.1,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        max_length=None,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, AutoModelForCausalLM.from_pretrained(tiny / "model"), options,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    wanted = float(trainer.compute_loss(trainer.model, batch))
    assert abs(wanted - (25 if kind == "ipo" else math.log(2))) > 0.01  # or nothing is compared
    assert found == pytest.approx(wanted, rel=2e-5)
    plain = [
        [score_plainly(each, tokenizer, row, name) for name in ("chosen", "rejected")]
        for each in (model.merge_and_unload().double(), trainer.ref_model.double())
        for row in rows
    ]
    pairs = [pairs for pairs, _ in seen]
    for ours, theirs in (("logps", plain[:10]), ("reference", plain[10:])):
        every = torch.cat([getattr(each, ours).detach().flatten() for each in pairs]).tolist()
        both = (numbers for row in theirs for numbers in row)
        assert sorted(every) == pytest.approx(sorted(both), rel=2e-5)


ASIDE: dict[str, Any] = {
    "per_device_train_batch_size": 10, "bf16": False, "gradient_checkpointing": False,
    "use_cpu": True, "report_to": "none", "max_length": 512, "remove_unused_columns": False,
}  # fmt: skip
SHAPES: dict[str, tuple[Any, ...]] = {
    "orpo": (("preference.beta=0.25",), ORPOConfig, {"beta": 0.25}),
    "simpo": (
        (),
        CPOConfig,
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "cpo": ((), CPOConfig, {"beta": 0.1, "cpo_alpha": 1.0}),
    "cpo ipo": (("preference.loss=ipo",), CPOConfig, {"loss_type": "ipo", "cpo_alpha": 1.0}),
}
"""By name of the objective: what the recipe says, and TRL's configuration of the same."""


@pytest.mark.parametrize(
    ("name", "packing"),
    [("orpo", "step"), ("orpo", "false"), ("simpo", "step"), ("cpo", "false"), ("cpo ipo", "step")],
)
def test_losses_without_a_reference_are_trls(
    name: str, packing: str, train, tiny: Path, tmp_path, monkeypatch
) -> None:
    """On average over the pairs: of their tokens TRL averages the chosen answers' own loss over the
    whole batch, and ORPO's over the prompts, too, so each pair is a batch of TRL's here."""
    first = train("first", "training.learning_rate=2e-4", "training.max_steps=3") / "adapter"
    given, kind, said = SHAPES[name]
    every = ("training.per_device_train_batch_size=10", f"training.packing={packing}", *given)
    found, seen = find_losses(train, monkeypatch, first, f"objective={name.split()[0]}", *every)

    tokenizer = AutoTokenizer.from_pretrained(first)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model = PeftModel.from_pretrained(base, first, is_trainable=True)
    options = kind(str(tmp_path / "trl"), **ASIDE | said | {"per_device_train_batch_size": 1})
    trainer = (ORPOTrainer if kind is ORPOConfig else CPOTrainer)(
        model, options, train_dataset=Dataset.from_list([make_turns(row) for row in make_rows(10)]),
        processing_class=tokenizer,
    )  # fmt: skip
    losses, rewards = [], []
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            inputs = trainer._prepare_inputs(batch)
            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs)
            if kind is ORPOConfig:  # the answer alone, as eq. 3 of the paper has it
                own, *_, whole = trainer.concatenated_forward(trainer.model, inputs)
                loss = loss - whole - own.mean()
        losses.append(float(loss))
        rewards.append([float(metrics[f"rewards/{each}"]) for each in ("chosen", "rejected")])
    assert found == pytest.approx(sum(losses) / 10, rel=2e-5)
    own_losses = torch.cat([each for _, each in seen]).tolist()
    assert sorted(own_losses) == pytest.approx(sorted(losses), rel=2e-5)
    recipe = load_recipe(tmp_path / "looked.yaml", [f"objective={name.split()[0]}", *given])
    mine = [preference_losses.describe_pairs(*each, recipe.preference) for each in seen]
    summed = [float(sum(each[at] for each in mine)) for at in (3, 4)]
    assert summed == pytest.approx([sum(each) for each in zip(*rewards)], rel=2e-5)


def make_turns(row: dict[str, str]) -> dict[str, Any]:
    """A row as conversations, as TRL's trainers take it."""
    asked = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    answers = {
        name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
    }
    return asked | answers


def score_plainly(model: Any, tokenizer: Any, row: dict[str, Any], name: str) -> float:
    """The log-probability of an answer: one row alone, log-softmax in float64."""
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row[name])["input_ids"]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    own = logps.gather(1, ids[0, 1:, None])[len(asked) - 1 :]
    return float(own.sum())


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        "method=dora", "method=qlora", "lora.init_lora_weights=pissa", "lora.lora_dropout=0.3",
        "model.dtype=bfloat16", "training.gradient_checkpointing=true",
    ],
)  # fmt: skip
def test_the_first_loss_is_that_of_the_start(how: str, train, capsys) -> None:
    folder = train("run", how, "training.max_steps=2")
    first, second = read_steps(folder)
    near = 2e-3 if "bfloat16" in how or "qlora" in how else 1e-5
    assert first["loss"] == pytest.approx(math.log(2), abs=near)
    assert second["loss"] != pytest.approx(math.log(2), abs=near)
    assert "of the start it is 0.693147 (log 2)" in capsys.readouterr().err


def test_the_start_may_be_an_adapter(train, capsys) -> None:
    start = train("first") / "adapter"
    folder = train("second", f"model.adapter={start}", "training.max_steps=1")
    assert read_steps(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    train("third", f"model.adapter={start}", "training.max_steps=1", "lora.lora_dropout=0.5")
    assert ", with dropout (lora.lora_dropout); of the start" in capsys.readouterr().err


def test_another_reference_is_an_error(train, monkeypatch) -> None:
    own = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *given: own(*given) - 1)
    with pytest.raises(LoraError, match="the first step's loss is 0.69.*nats a token from it"):
        train("run")


def test_the_reference_is_kept(train, monkeypatch, capsys) -> None:
    train("first")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_compute", None)
        again = train("again")
    assert "reference: computed before, in" in capsys.readouterr().err
    assert read_steps(again)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


class Backwards(set[str]):
    """A set as another process may order it."""

    def __repr__(self) -> str:
        return repr(list(reversed(sorted(self))))


def test_what_a_reference_is_kept_under_is_the_same_in_each_process() -> None:
    """PEFT keeps target_modules as a set."""
    config, other = LoraConfig(target_modules=["q_proj", "k_proj"]), LoraConfig()
    other.target_modules = Backwards(["q_proj", "k_proj"])
    assert isinstance(config.target_modules, set)
    assert reference._describe_config(config) == reference._describe_config(other)


@pytest.mark.parametrize("damage", [b"", b"{}", "rows", "nan", "number"])
def test_a_damaged_reference_is_computed_anew(damage: Any, train, tmp_path, capsys) -> None:
    whole = read_metrics(train("first"))
    (kept,) = reference.find_folder().iterdir()
    if isinstance(damage, bytes):
        kept.write_bytes(damage)
    elif damage == "number":  # which the first step may not see
        whole_file = kept.read_bytes()
        kept.write_bytes(whole_file[:-3] + bytes([whole_file[-3] ^ 1]) + whole_file[-2:])
    else:
        shape = (9, 2) if damage == "rows" else (10, 2)
        numbers = torch.full(shape, math.nan if damage == "nan" else -1.0)
        reference.save_file({reference.NAME: numbers}, kept)
    assert read_metrics(train("again")) == whole
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_step_is_the_mean_over_its_pairs_in_any_cutting(objective: str, train) -> None:
    """Sequences of one pair each, of two, padded batches that are accumulated: the same run."""
    which = f"objective={objective}"
    cut = ("training.gradient_accumulation_steps=4", "training.per_device_train_batch_size=1")
    runs = [
        train("whole", which),
        train("short", which, "training.packed_length=1"),
        train("cut", which, *cut),
        train("padded", which, "training.packing=false"),
        train("stock", which, "training.packing=false", "training.loss_head=stock", *cut),
    ]
    wanted = [line["loss"] for line in read_steps(runs[0])]
    assert wanted[-1] < 0.8 * wanted[0]
    for folder in runs[1:]:
        lines = read_steps(folder)
        assert [line["loss"] for line in lines] == pytest.approx(wanted, rel=2e-3, abs=1e-4)
        assert lines[0]["grad_norm"] == pytest.approx(read_steps(runs[0])[0]["grad_norm"], rel=1e-4)


STREAMED = ("data.streaming=true", "data.shuffle_buffer=4")


@pytest.mark.parametrize(
    ("how", "objective", "more"),
    [
        ("kill", "dpo", ()),
        ("signal", "dpo", ()),
        ("kill", "simpo", ()),
        ("signal", "cpo", STREAMED),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bytes(
    how: str, objective: str, more: tuple[str, ...], train, monkeypatch
) -> None:
    """Records are of two steps, so that one is cut through; dropout draws numbers."""
    given = (
        f"objective={objective}", *more,
        "training.logging_steps=2", "lora.lora_dropout=0.2", "data.eval_rows=2", "training.keep=last",
        "training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=2",
        "training.max_steps=7", "training.save_steps=3", "training.packing=false",
    )  # fmt: skip
    whole = train("whole", *given)
    stopped = runs.stop_once(train, given, how, monkeypatch)
    assert read_adapter(stopped) == read_adapter(whole)
    assert read_metrics(stopped) == read_metrics(whole)
    names = {f"eval_{name}" for name in PREFERENCE_METRICS}
    assert names <= read_metrics(whole)[-2].keys()


def test_no_reference_is_asked_where_none_is_needed(train, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reference, "find_reference", None)
    folder = train("run", "objective=orpo", "training.max_steps=2")
    assert read_steps(folder)[0]["loss"] > read_steps(folder)[1]["loss"]
    assert not reference.find_folder().exists()
    assert "of the start it is" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "strategy"),
    [
        ("dpo", "ddp"),
        ("orpo", "fsdp"),
        pytest.param("orpo", "ddp", marks=pytest.mark.slow),
        pytest.param("dpo", "fsdp", marks=pytest.mark.slow),
        pytest.param("cpo", "deepspeed-zero3", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_same_run(
    objective: str, strategy: str, train, tiny: Path, tmp_path: Path
) -> None:
    """Of seven pairs and three to evaluate on, a sequence each, one process has more passes than
    the other: where a base is sharded, both have to come to each."""
    given = [
        "data.eval_rows=3", "training.max_steps=5", f"objective={objective}",
        "training.packed_length=1",
    ]  # fmt: skip
    alone = train("alone", *given)
    make_recipe(tmp_path, tiny, "both", *given)
    runs.train_by_two(tmp_path / "both.yaml", strategy, given)
    names = ("loss", "eval_loss", "rewards_margin", "eval_rewards_margin", "logps_chosen")
    runs.compare_metrics(alone, tmp_path / "both", names, near=1e-4)


def test_the_empty_row_of_a_process_is_no_pair() -> None:
    empty = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}
    for collate in (pair_batches.PairSteps(8), pair_batches.PaddedPairs(0)):
        batch = collate([empty])
        assert batch[pair_batches.ANSWERS] == [[]]
        assert batch[pair_batches.REFERENCE].shape == (1, 0)
        assert pair_batches.count_pairs(batch) == 0
