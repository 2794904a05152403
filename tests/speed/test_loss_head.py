"""The loss at labelled tokens: the model's own loss and gradients, for every kind of head, without
all the logits.

Against transformers' own loss on random models of several families. Hermetic. Alone:
pytest tests/speed/test_loss_head.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_cli.data.load import load_rows
from lora_cli.recipe import load
from lora_cli.speed import loss_head
from lora_cli.train import run
from tests import architectures, networks

VOCABULARY = 307
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "phi": {},  # its head has a bias
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "mixtral": {},
}


def random_model(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """Of a family, with what its head has, and weights far from their small beginnings."""
    made = networks.random_model(family, vocab_size=VOCABULARY, **FAMILIES[family], **more)
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.to(dtype)


def batch() -> dict[str, torch.Tensor]:
    """Three rows, a third of the tokens with a label, the first of a row among them; one row
    without."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 40))
    labels = torch.where(torch.rand(ids.shape) < 0.35, ids, -100)
    labels[0, 0], labels[2] = ids[0, 0], -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model: torch.nn.Module, **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    found = model(**batch(), use_cache=False, **more).loss
    (found * 3).backward()
    return found.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


HEADS: dict[str, dict[str, Any]] = {
    "frozen": {"target_modules": "all-linear"},
    "trained": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("items", [None, 17])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_kind_of_head_has_the_stock_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, family: str, head: str, items: int | None
) -> None:
    check(monkeypatch, random_model(family, tie_word_embeddings=False), HEADS[head], items)


SLOW = pytest.mark.slow  # its state space is computed step by step here: 13 s
EACH = [pytest.param(name, marks=SLOW if name == "falcon_h1" else ()) for name in FAMILIES]


@pytest.mark.parametrize("family", EACH)
def test_every_family_has_the_stock_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    check(monkeypatch, random_model(family), {"target_modules": ["q_proj"]}, None)


def check(
    monkeypatch: pytest.MonkeyPatch, base: PreTrainedModel, options: dict, items: int | None
) -> None:
    monkeypatch.setattr(
        loss_head, "CHUNK", 5 * VOCABULARY
    )  # so that there are several, and a last one that is not full
    monkeypatch.setattr(loss_head, "BLOCK", 2 * VOCABULARY)
    adapted = get_peft_model(base, LoraConfig(r=4, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    stock = copy.deepcopy(adapted)
    assert loss_head.install(adapted.get_base_model()) is None
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    (theirs, wanted), (ours, found) = gradients(stock, **more), gradients(adapted, **more)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert found.keys() == wanted.keys()
    assert len(found) >= 4
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-9
        )
    torch.testing.assert_close(
        adapted(input_ids=batch()["input_ids"]).logits, stock(**batch()).logits
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_float64_as_the_stock_one(dtype: torch.dtype) -> None:
    base = random_model("llama", dtype)
    ours, stock, exact = copy.deepcopy(base), base, copy.deepcopy(base).double()
    assert loss_head.install(ours) is None
    for model in (ours, stock, exact):
        model.get_output_embeddings().requires_grad_(requires_grad=False)
    (_, found), (_, theirs), (_, wanted) = gradients(ours), gradients(stock), gradients(exact)

    def distance(some: dict[str, torch.Tensor]) -> float:
        return sum((some[n].double() - wanted[n]).norm().item() for n in wanted) / sum(
            gradient.norm().item() for gradient in wanted.values()
        )

    assert distance(found) < 1.25 * distance(theirs) < 0.1


class _Largest(TorchDispatchMode):
    """The largest tensor of logits that any operation makes; not the head's own weight, the other
    way round."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (
                VOCABULARY,
            ) != tensor.shape[:1] != (64,):
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("options", [HEADS["frozen"], HEADS["adapted"]])
def test_all_logits_are_never_alive(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", 5 * VOCABULARY)
    adapted = get_peft_model(random_model("llama"), LoraConfig(r=4, **options))
    with _Largest() as seen:
        gradients(adapted)
    assert seen.largest >= 3 * 40 * VOCABULARY
    assert loss_head.install(adapted.get_base_model()) is None
    with _Largest() as seen:
        gradients(adapted)
    assert 0 < seen.largest <= 5 * VOCABULARY


def test_a_batch_without_labels_has_the_loss_zero() -> None:
    adapted = get_peft_model(random_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    assert loss_head.install(adapted.get_base_model()) is None
    given = batch()
    given["labels"][:] = -100
    found = adapted(**given).loss
    found.backward()
    assert found.item() == 0
    assert all(
        p.grad is not None and not p.grad.any() for p in adapted.parameters() if p.requires_grad
    )


def test_a_model_with_another_loss_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("gemma2")
    # as if it were a family whose cap lora does not know
    monkeypatch.setattr(loss_head, "find_shape", lambda model: loss_head.Shape(1.0, None))
    own = model.forward
    assert "its own loss differs" in str(loss_head.install(model))
    assert model.forward == own
    model = random_model("mixtral")
    model.config.output_router_logits = True
    assert "also balances experts" in str(loss_head.install(model))


@pytest.mark.parametrize("trainer", ["sft", "trainer"])
@pytest.mark.parametrize("more", ["", "packing: true, "])
def test_training_is_the_same_with_either_head(
    write_recipe, tmp_path: Path, trainer: str, more: str
) -> None:
    if trainer == "trainer" and more:
        more = "bf16: true, "
    found = {}
    for head in ("stock", "trained_tokens"):
        text = (
            f"trainer: {trainer}\noutput_dir: {tmp_path / head}\ndata: "
            f"{{eval_path: build/tiny/eval.jsonl}}\n"
            f"training: {{{more}loss_head: {head}, logging_steps: 1, gradient_accumulation_steps: "
            f"2}}\n"
        )
        run.train(load.load_recipe(write_recipe(text)))
        lines = [
            json.loads(line)
            for line in (tmp_path / head / "metrics.jsonl").read_text().splitlines()
        ]
        found[head] = [
            line.get("loss", line.get("eval_loss"))
            for line in lines
            if {"loss", "eval_loss"} & line.keys()
        ]
    assert len(found["stock"]) >= 4
    assert found["trained_tokens"] == pytest.approx(
        found["stock"], rel=2e-2 if "bf16" in more else 1e-5
    )


ODD = {
    # its head transforms what comes in, which TRL's skips
    "bert": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert-decoder": {},  # … and its decoder is not what its head comes after
    "bart": {"dropout": 0.0},  # its own loss compares each token with itself
    "llama": {},
}


@pytest.mark.parametrize("trainer", ["sft", "trainer"])
@pytest.mark.parametrize("head", ["stock", "trained_tokens"])
@pytest.mark.parametrize("family", ODD)
def test_the_loss_is_that_of_the_next_tokens_by_the_models_own_logits(
    write_recipe, tmp_path: Path, tiny: Path, family: str, head: str, trainer: str
) -> None:
    base = architectures.make_folder(family, tmp_path / "base", tiny / "model", **ODD[family])
    text = (
        f"trainer: {trainer}\nmodel: {{name_or_path: {base}}}\ndata: {{max_rows: 8}}\n"
        f"training: {{loss_head: {head}, max_steps: 1, logging_steps: 1, "
        "per_device_train_batch_size: 4, gradient_accumulation_steps: 2}\n"
    )
    recipe = load.load_recipe(write_recipe(text))
    run.train(recipe)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    logged = next(line["loss"] for line in lines if "loss" in line)
    network = AutoModelForCausalLM.from_pretrained(base).eval()
    rows, _ = load_rows(recipe, AutoTokenizer.from_pretrained(base))
    total, count = 0.0, 0
    for row in rows.rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    assert logged == pytest.approx(total / count, rel=2e-5)


def test_float16_s_gradient_is_formed_before_it_is_too_small_or_too_large() -> None:
    # the loss scale comes from above: 2^16 over one label, or over many
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).half().requires_grad_(False)
    hidden = (0.01 * torch.randn(64, 8)).half().requires_grad_()
    targets = torch.randint(50, (64,))
    shape = loss_head.Shape(1e-4, None)  # small gradients: under 2^-24 without the scale
    for scale in (1.0, 2.0**16):
        hidden.grad = None
        (loss_head.sum_loss(hidden, head, targets, shape) * scale).backward()
        exact = hidden.detach().double().requires_grad_()
        logits = 1e-4 * exact @ head.weight.double().T
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").mul(scale).backward()
        assert torch.isfinite(hidden.grad).all()
        if scale > 1:
            torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=5e-3, atol=1e-3)


def test_a_gpu_is_given_whole_tiles_of_rows() -> None:
    assert loss_head.count_rows(128_256, "cpu") == 130
    assert loss_head.count_rows(1 << 25, "cpu") == 1
    assert loss_head.count_rows(262_144, "cuda") == loss_head.count_rows(128_256, "cuda") == 1024
    assert loss_head.count_rows(5000, "cuda") == 3328
    assert loss_head.count_rows(5000, "mps") % 128 == 0


def test_a_loss_that_ignores_the_number_it_is_told_is_not_taken(tiny: Path) -> None:
    """As of Qwen3-VL's experts, whose forward takes the number and does not hand it on."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    assert loss_head.try_stock(model).own
    own = model.loss_function
    model.loss_function = lambda **given: own(**{**given, "num_items_in_batch": None})
    assert not loss_head.try_stock(model).own
