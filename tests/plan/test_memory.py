"""The memory plan: a step rehearsed without storage against the allocator's own record of a real
one, and what follows.

Hermetic: small random Llamas, the tiny model. Alone: pytest tests/plan/test_memory.py
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from lora_cli.models import attach, leave_out_cache
from lora_cli.models.base import Base
from lora_cli.plan import auto, auto_choices, flops, hardware, memory, outlook, show
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.plan.live_bytes import ACTIVATIONS, ADAPTERS, OPTIMIZER, WEIGHTS, Peaks
from lora_cli.plan.rehearsal import MOST_BY_MODULE, Batch, Rehearsal
from lora_cli.plan.weightless import Unforeseen, build_adapted
from lora_cli.recipe import keys, load, upstream
from lora_cli.scoring.texts import TextScorer
from lora_cli.speed import install, loss_head
from tests import quantised

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LARGE_CPU = Hardware("cpu", "a processor", 64 * GIB)


def config(**values: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024, dtype="float32", **{**CONFIG, "num_key_value_heads": 2, **values}
    )


def settled(
    method: str = "lora", lora: dict[str, Any] | None = None, **training: Any
) -> keys.Recipe:
    made = keys.Recipe(
        method=method,
        model=keys.Model(name_or_path="x", dtype="float32"),
        lora=keys.Lora(**(lora or {})),
        data=keys.Data(path="x"),
        training=keys.Training(**{"gradient_checkpointing": False, "packing": False, **training}),
        output_dir="x",
    )
    return auto.settle(made, device=LARGE_CPU)[0]


def real(chosen: keys.Recipe, folder: Path) -> PeftModel:
    """The recipe's network with weights."""
    if not (folder / "config.json").is_file():
        LlamaForCausalLM(config()).save_pretrained(folder)
    base = Base(str(folder)).load(torch.float32, upstream.build_quantization_config(chosen))
    adapted = get_peft_model(base, upstream.build_lora_config(chosen))
    install.install(adapted, "cpu")
    if chosen.training.gradient_checkpointing:
        base.activation_checkpointing_enable()
        adapted.enable_input_require_grads()
    return adapted.train()


def real_step(adapted: PeftModel, ids: torch.Tensor) -> None:
    base: Any = adapted.get_base_model()
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0  # as in a padded batch
    hidden = base.get_decoder()(
        input_ids=ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    where = torch.zeros(ids.numel() - len(ids), dtype=torch.long)
    rows = hidden.flatten(0, 1)[where]
    loss_head.sum_loss(
        rows, base.get_output_embeddings(), where, loss_head.find_shape(base)
    ).backward()


def allocated(adapted: PeftModel, ids: torch.Tensor) -> int:
    """The highest sum of what torch's allocator gave out and took back in a step."""
    return record(adapted, lambda: real_step(adapted, ids))


def record(adapted: PeftModel, step: Callable[[], None]) -> int:
    """The same, by the allocator's own record."""
    step()  # the first also makes what DoRA keeps
    for parameter in adapted.parameters():
        parameter.grad = None
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    assert len(changes) > 100
    return max(accumulate(size for _, size in changes))


def lasting(peaks: Peaks) -> int:
    return sum(peaks.all[name] for name in (WEIGHTS, ADAPTERS, OPTIMIZER))


@pytest.mark.parametrize(
    ("method", "lora", "training"),
    [
        ("lora", {"lora_dropout": 0.1, "r": 64}, {}),
        ("lora", {}, {"gradient_checkpointing": True}),
        ("dora", {}, {}),
        ("qlora", {}, {}),
        ("qdora", {}, {"gradient_checkpointing": True}),
    ],
)
def test_a_rehearsed_step_is_what_the_allocator_records(
    tmp_path: Path, method: str, lora: dict[str, Any], training: dict[str, Any]
) -> None:
    chosen = settled(method, lora, **training)
    rehearsal = Rehearsal(chosen, build_adapted(chosen, config()))
    peaks = rehearsal.step(Batch(2, 512, waiting=False))
    measured = allocated(real(chosen, tmp_path), torch.zeros(2, 512, dtype=torch.long))
    assert peaks.all.total() - lasting(peaks) == pytest.approx(
        measured, rel=0.1
    )  # kernels take some inside


@pytest.mark.parametrize(("vocabulary", "length"), [(49_152, 3), (49_152, 4001), (260_000, 701)])
def test_some_rows_of_a_head_need_what_all_do(
    vocabulary: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step takes 4 GB here: all rows are gone through as the plan went through them at first."""
    chosen, batch = settled(), Batch(1, length, waiting=False)
    wide = LlamaConfig(**CONFIG, vocab_size=vocabulary)
    fast = Rehearsal(chosen, build_adapted(chosen, wide)).step(batch)
    own, asked = loss_head.sum_loss, []

    def go_through_all(*given, rehearsed):
        asked.append(rehearsed)
        return own(*given)

    monkeypatch.setattr(loss_head, "sum_loss", go_through_all)
    whole = Rehearsal(chosen, build_adapted(chosen, wide)).step(batch)
    assert asked == [True]
    assert fast == whole


def storages(tensors: list[torch.Tensor]) -> int:
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
        }.values()
    )


@pytest.mark.parametrize("double", [True, False])
def test_weights_of_4_bits_take_what_bitsandbytes_takes(tmp_path: Path, double: bool) -> None:
    chosen = settled("qlora")
    chosen = chosen.model_copy(
        update={
            "quantization": chosen.quantization.model_copy(
                update={"bnb_4bit_use_double_quant": double}
            )
        }
    )
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    base = Base(str(tmp_path)).load(torch.float32, quantization)
    tensors = [*base.parameters(), *base.buffers()]
    for parameter in base.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [] if state is None else [state.absmax, state.code]
        tensors += [state.state2.absmax, state.offset] if state is not None and state.nested else []
    rehearsal = Rehearsal(chosen, build_adapted(chosen, config()))
    assert rehearsal.live.now.all[WEIGHTS] == pytest.approx(storages(tensors), rel=0.01)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit"])
def test_optimizers_state_is_their_own(tmp_path: Path, name: str) -> None:
    chosen = settled(optim=name)
    rehearsal = Rehearsal(chosen, build_adapted(chosen, config()))
    adapted = real(chosen, tmp_path)
    learned = [parameter for _, parameter in attach.walk_trainable(adapted)]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(
        upstream.build_training_arguments(chosen), adapted
    )
    optimizer = kind(learned, **options)
    for parameter in learned:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [
        value
        for kept in optimizer.state.values()
        for value in kept.values()
        if isinstance(value, torch.Tensor)
    ]
    found = rehearsal.live.now.all[OPTIMIZER]
    assert found == pytest.approx(
        storages([tensor for tensor in state if tensor.numel() > 1]), rel=0.02, abs=4096
    )


def test_a_rehearsal_leaves_no_trace(tiny: Path, tmp_path: Path, write_recipe) -> None:
    """Libraries keep tables for the whole process; none may be one without content."""
    text = "method: qdora\nmodel: {dtype: float32}\ntraining: {max_steps: 2, gradient_checkpointing: false}\n"
    path, adapters = write_recipe(text), []
    for rehearsed in (False, True):
        out = tmp_path / f"run-{rehearsed}"
        before = (
            "from lora_cli.models import config as configs\nfrom lora_cli.plan import auto, "
            "hardware, memory\n"
            "config = configs.load_config(recipe.model.name_or_path)\n"
            "settled, _ = auto.settle(recipe)\n"
            "memory.make_forecast(settled, config, "
            "hardware.detect_device()).need(memory.largest_batch(settled))\n"
        )
        code = "from pathlib import Path\nfrom lora_cli.recipe import load\n"
        code += f"recipe = load.load_recipe(Path({str(path)!r}), ['output_dir={out}'])\n"
        code += f"{before if rehearsed else ''}from lora_cli.train import run\nrun.train(recipe)\n"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        adapters.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"packing": "step"}, Batch(1, 100, waiting=True)),
        ({"packing": "step", "max_length": 4000}, Batch(1, 4000, waiting=True)),
        (
            {"packing": "step", "max_length": 4000, "per_device_train_batch_size": 1},
            Batch(1, 4000, waiting=False),
        ),
        ({"packing": False, "gradient_accumulation_steps": 2}, Batch(8, 100, waiting=True)),
        ({"packing": "dataset"}, Batch(1, 800, waiting=False)),
        ({"packing": False, "padding_free": True}, Batch(1, 800, waiting=False)),
    ],
)
def test_the_largest_forward_pass_of_a_recipe(training: dict[str, Any], expected: Batch) -> None:
    assert memory.largest_batch(settled(**{"max_length": 100, **training})) == expected


def pairs(**changed: Any) -> keys.Recipe:
    """A recipe for models that read a text and write another."""
    return settled(**changed).model_copy(update={"task": "seq2seq_lm"})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_an_encoder_and_a_decoder_is_rehearsed(
    tmp_path: Path, checkpointing: bool
) -> None:
    shape = T5Config(
        vocab_size=1024, d_model=256, d_kv=64, d_ff=512, num_layers=3, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, dtype="float32",
    )  # fmt: skip
    chosen = pairs(gradient_checkpointing=checkpointing, loss_head="stock")
    rehearsal = Rehearsal(chosen, build_adapted(chosen, shape))
    peaks = rehearsal.step(Batch(2, 512, waiting=False, targets=128))
    adapted = get_peft_model(T5ForConditionalGeneration(shape), upstream.build_lora_config(chosen))
    install.install(adapted, "cpu")
    leave_out_cache(adapted.get_base_model())
    if checkpointing:
        adapted.get_base_model().activation_checkpointing_enable()
        adapted.enable_input_require_grads()
    adapted.train()
    sources, targets = (torch.zeros(2, length, dtype=torch.long) for length in (512, 128))
    mask = torch.ones_like(sources)
    mask[-1, -1] = 0  # as in a padded batch

    def step() -> None:
        given = {"input_ids": sources, "attention_mask": mask}
        logits = adapted(**given, decoder_input_ids=targets).logits
        TextScorer().sum_loss(logits, targets, None).backward()

    measured = record(adapted, step)
    assert peaks.all.total() - lasting(peaks) == pytest.approx(measured, rel=0.1)
    shorter = rehearsal.step(Batch(2, 512, waiting=False, targets=32))
    assert shorter.all.total() < peaks.all.total()


def test_the_largest_pair_is_as_long_as_its_limits() -> None:
    chosen = pairs(max_length=300)
    assert memory.largest_batch(chosen) == Batch(8, 300, waiting=False, targets=300)
    data = chosen.data.model_copy(update={"max_target_length": 40})
    limited = chosen.model_copy(update={"data": data})
    assert memory.largest_batch(limited) == Batch(8, 300, waiting=False, targets=40)


def test_the_largest_that_fits_is_the_last_that_does() -> None:
    plan = memory.make_forecast(settled(), config(num_hidden_layers=1), LARGE_CPU)
    room = plan.need(Batch(2, 128, waiting=False)).total
    fixed = plan.need(Batch(1, 1, waiting=False)).total
    for share in (0.3, 6.0):
        plan.device = LARGE_CPU._replace(memory=round(fixed + share * (room - fixed)))
        found = plan.largest(lambda n: Batch(2, n, waiting=False), 128, 100_000)
        assert plan.fits(Batch(2, found, waiting=False))
        assert not plan.fits(Batch(2, found + max(2, found // 32), waiting=False))
    assert plan.largest(lambda n: Batch(2, n, waiting=False), 128, 5) == 5
    plan.device = LARGE_CPU._replace(memory=fixed - 1)
    assert plan.largest(lambda n: Batch(2, n, waiting=False), 128, 1000) == 0
    assert plan.rest < fixed
    assert tuple(map(Counter.total, plan.rehearsal.resting)) == tuple(
        map(Counter.total, plan.rehearsal.live.now)
    )  # what steps leave behind
    plan.known.clear()
    plan.device = LARGE_CPU._replace(memory=plan.rest - 1)
    assert plan.largest(lambda n: Batch(2, n, waiting=False), 128, 1000) == 0
    assert not plan.known  # a step of 80 layers takes seconds, and none would fit


@pytest.mark.parametrize("limit", [2048, 131_072])
@pytest.mark.parametrize(
    "grow",
    [lambda n: 400_000 * n, lambda n: 300_000 * n + 40 * n * n]
    + [lambda n: 400_000 * -(-n // 64) * 64, lambda n: max(2 * 10**9, 500_000 * n)],
    ids=["line", "parabola", "stairs", "the head's level"],
)
def test_more_memory_never_offers_less(monkeypatch, grow, limit: int) -> None:
    """By stairs the search ended after ten small steps, and offered as little as a 63rd; where all
    fits, it then halved its way to the limit, in up to 23."""
    plan = memory.make_forecast(settled(), config(num_hidden_layers=1), LARGE_CPU)
    tried: list[int] = []
    monkeypatch.setattr(plan, "need", lambda n: tried.append(n) or memory.Need({"all": grow(n)}))
    for gigabytes in range(1, 60, 4):
        plan.device = LARGE_CPU._replace(memory=gigabytes * 10**9)
        tried.clear()
        found = plan.largest(lambda n: n, 500, limit)  # type: ignore[arg-type, return-value]
        fit = [0, *(n for n in range(1, limit + 1) if grow(n) <= plan.device.memory)]
        assert found == fit[-1]
        assert len(tried) <= (6 if found == limit else 35), tried


def test_checkpointing_is_on_where_the_plan_without_it_does_not_fit() -> None:
    chosen = settled(packing="step", optim="adamw_torch_fused")
    need = (
        memory.make_forecast(chosen, config(), LARGE_CPU).need(memory.largest_batch(chosen)).total
    )
    still_open = chosen.replace("sft", {"training": {"gradient_checkpointing": "auto"}})
    for room, expected in ((need, False), (need - 1, True)):
        device = LARGE_CPU._replace(memory=room)
        foreseen = outlook.foresee_memory(auto_choices.Situation(still_open, device, config()))
        assert foreseen.checkpointing is expected
        assert "MiB" in foreseen.reason
    foreseen = outlook.foresee_memory(auto_choices.Situation(still_open, LARGE_CPU, config()))
    assert foreseen == outlook.Outlook(False, "needs a small part of a processor, 64.0 GiB")


def test_an_eight_bit_optimizer_is_taken_where_it_makes_the_difference() -> None:
    big = config(num_hidden_layers=1)
    chosen = settled(packing="step", lora={"r": 512})
    with_it = chosen.replace("sft", {"training": {"gradient_checkpointing": True}})
    gpu = Hardware("cuda", "a GPU", 0, bf16=True)
    need = memory.make_forecast(with_it, big, gpu).need(memory.largest_batch(chosen))
    missing = need.items[OPTIMIZER] // 2
    both_open = chosen.replace(
        "sft", {"training": {"gradient_checkpointing": "auto", "optim": "auto"}}
    )
    decided, choices = auto.settle(both_open, big, gpu._replace(memory=need.total - missing))
    assert decided.training.optim == "paged_adamw_8bit"
    assert decided.training.gradient_checkpointing is True
    assert [choice.name for choice in choices] == [
        "training.optim",
        "training.gradient_checkpointing",
    ]


def test_activations_that_are_offloaded_are_not_on_the_gpu() -> None:
    gpu, batch = Hardware("cuda", "a GPU", 64 * GIB, bf16=True), Batch(1, 512, waiting=False)
    plain, kept, again = (
        memory.make_forecast(settled(**options), config(num_hidden_layers=4), gpu).need(batch).items
        for options in ({}, {"activation_offloading": True}, {"gradient_checkpointing": True})
    )
    assert kept[ACTIVATIONS] < plain[ACTIVATIONS] / 2
    assert kept[ADAPTERS] == plain[ADAPTERS]
    assert sum(kept.values()) < sum(again.values()) < sum(plain.values())


def test_the_out_of_memory_advice_names_what_fits(tiny: Path) -> None:
    chosen = settled(packing="step").model_copy(
        update={"model": keys.Model(name_or_path=str(tiny / "model"), dtype="float32")}
    )
    said = memory.suggest_what_fits(chosen, Hardware("cuda", "a GPU", GIB + (20 << 20)))
    assert said.startswith("it was expected to need ")
    assert "--set training.gradient_checkpointing=true needs" in said
    assert "--set method=qlora needs" in said


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_operations_are_those_that_torch_counts(tmp_path: Path, method: str) -> None:
    """Torch's counter sees attention that is not causal, twice the work, hence twice the context.

    It does not know bitsandbytes' products and those that add in place.
    """
    chosen, length = settled(method), 64
    adapted = real(chosen, tmp_path)
    base: Any = adapted.get_base_model()
    base.set_attn_implementation("eager")
    adapted.enable_input_require_grads()  # else the first layer's input needs no gradient
    products = {
        torch.ops.bitsandbytes.gemm_4bit: lambda a, b, shape, *args, **kwargs: (
            2 * a[:-1].numel() * shape[0] * shape[1]
        ),
        torch.ops.aten.addmm_: lambda c, a, b, *args, **kwargs: 2 * c[0] * c[1] * a[1],
    }
    ids = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert flops.count_per_token(adapted, 2 * length) * ids.numel() == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_experts_count_as_far_as_they_work() -> None:
    sparse = config(num_local_experts=8, num_experts_per_tok=2)
    assert flops._active_share(torch.nn.Parameter(torch.zeros(8, 4, 4)), sparse) == 0.25


def test_plan_needs_no_weights(tiny: Path, lora, write_recipe, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny / "model", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    path = write_recipe(f"model: {{name_or_path: {bare}}}\nmethod: dora\n")
    done = lora("plan", path, "--json", "--tokens-per-second", "1000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["memory"]["items"].values()) == found["memory"]["total"]
    assert found["memory"]["fits"] is True
    kinds = found["parameters"]["trained_by_kind"]
    assert sum(number for _, number in kinds.values()) == found["parameters"]["trained"]
    assert found["steps"]["steps"] == 3
    assert found["time"]["source"] == "--tokens-per-second"
    assert not (tmp_path / "run").exists()


def test_plan_says_what_does_not_fit(write_recipe, capsys) -> None:
    loaded = load.load_recipe(
        write_recipe("training: {packing: false, gradient_checkpointing: true}\n")
    )
    show.show_plan(loaded, "1GB", None, read_data=False, as_json=False)
    said = capsys.readouterr().out
    assert "DOES NOT FIT: 1.0 of 1GB, 1.0 GiB" in said
    assert (
        "largest that fits: training.max_length none; or training.per_device_train_batch_size none"
        in said
    )
    assert "time: no speed is known" in said


def test_speed_and_memory_are_logged_and_recorded(
    tiny: Path, lora, write_recipe, tmp_path: Path
) -> None:
    done = lora("train", write_recipe("training: {logging_steps: 1}\n"))
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    results = json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    for found in [*(line for line in lines if "loss" in line), results]:
        assert found["tokens_per_second"] > 0
        assert 0.1 < found["peak_memory_gb"] < 64
        assert ("mfu" in found) is torch.cuda.is_available()


def test_the_share_of_the_peak_is_known_where_the_device_is() -> None:
    assert flops.Work(4e9, flops.find_peak("NVIDIA H100 80GB HBM3", "bfloat16")).used(
        1e5
    ) == pytest.approx(4e14 / 989e12)
    assert flops.Work(4e9, flops.find_peak("a processor", "bfloat16")).used(1e5) is None
    assert (
        hardware.detect_device().kind == "cuda"
        or flops.find_peak(hardware.detect_device().name, "float32") is None
    )


@pytest.mark.parametrize(
    "settings",
    [quantised.DOUBLY, {**quantised.NF4, "llm_int8_skip_modules": ["lm_head", "up_proj"]}],
    ids=str,
)
def test_the_weights_of_a_4bit_base_are_those_of_its_files(
    tiny: Path, tmp_path: Path, write_recipe, settings: dict[str, Any]
) -> None:
    """Nothing is quantised on the way, so that no 16-bit source is kept beside them."""
    folder = quantised.save_bitsandbytes(tiny / "model", tmp_path / "base", **settings)
    text = f"method: qlora\nmodel: {{name_or_path: {folder}, dtype: bfloat16}}\n"
    recipe = load.load_recipe(write_recipe(text))
    base = Base.of_recipe(recipe)
    chosen, _ = auto.settle(recipe, base.config)
    forecast = memory.make_forecast(chosen, base.config, hardware.detect_device())
    assert base.stored is not None
    stored = sum(
        entry.dtype.itemsize * math.prod(entry.shape)
        for name, entry in base.stored.entries.items()
        if "quant_state" not in name
    )
    assert forecast.rehearsal.live.now.all[WEIGHTS] == pytest.approx(stored, rel=0.02)
    assert memory.MAPPED not in forecast.need(memory.largest_batch(chosen)).items


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_large_vocabulary_is_no_network_that_goes_token_by_token(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a CPU the loss is made some rows at a time, and of 128 000 words of two
    shape = LlamaConfig(
        vocab_size=128_256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )  # fmt: skip
    recipe = settled(packing="step")
    rehearsal = Rehearsal(recipe, build_adapted(recipe, shape), kind)
    kinds: list[str] = []
    sum_loss = loss_head.sum_loss
    monkeypatch.setattr(
        loss_head,
        "sum_loss",
        lambda *given, **how: [kinds.append(given[-1]), sum_loss(*given, **how)][1],
    )
    for length in (64, 256):
        rehearsal.step(Batch(1, length, waiting=True))
    assert not rehearsal.by_token
    assert kinds == [kind] * 2  # so that a GPU's whole chunks are counted on the CPU
    assert loss_head.count_rows(128_256, "cuda") > loss_head.count_rows(128_256, "cpu")


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora"])
def test_dropout_and_checkpointing_are_foreseen_together_on_a_gpu(method: str) -> None:
    # a layer goes through PEFT's dropout again in the backward pass, with inputs of the same type
    recipe = settled(method, lora={"lora_dropout": 0.05}).replace(
        "sft", {"training": {"gradient_checkpointing": True, "bf16": True}}
    )
    made = Rehearsal(recipe, build_adapted(recipe, config()), "cuda")
    assert sum(made.step(Batch(1, 64, waiting=True)).all.values()) > 0


def test_as_many_operations_are_followed_as_a_deep_network_takes() -> None:
    # QDoRA of 32 layers with checkpointing takes 102 000
    recipe = settled("qdora", gradient_checkpointing=True)
    made = Rehearsal(recipe, build_adapted(recipe, config()), "cuda")
    made.step(Batch(1, 64, waiting=True))
    assert made.live.operations < made.most
    modules = len(list(made.adapted.modules()))
    assert made.live.operations / modules < 0.7 * MOST_BY_MODULE
    made.most = made.live.operations // 2
    with pytest.raises(Unforeseen, match="operations are not yet a step"):
        made.step(Batch(1, 64, waiting=True))
