"""Models of pictures: what trained is what PEFT loads again by itself, what merges, and what resumes;
the means and variances of a base with it.

Hermetic: random bases of two layers and pictures made here, CPU. Alone:
pytest tests/train/test_image_classification.py; with -m slow scikit-learn's digits too.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from lora_cli.common import LoraError, UsageError
from lora_cli.evaluate.verify import verify
from lora_cli.merge import streaming_plan
from lora_cli.merge.merge import merge
from lora_cli.models import Base, make_probes, read_adapter
from lora_cli.models.head import find_statistics, shorten_names
from lora_cli.models.probes import TRAINED, compute_logits
from lora_cli.onnx_export import export
from lora_cli.plan import settled, show, sizes, spread
from lora_cli.recipe import load_recipe
from lora_cli.train import run
from tests import pictures
from tests.train.test_tasks import load_as_peft_does, resume_from_two

WEIGHTS = "adapter_model.safetensors"
METHODS = ["lora", "dora", "qlora", "qdora"]
TABLE = list(itertools.product(pictures.FAMILIES, METHODS))
QUICK = [("vit", "lora"), ("vit", "qdora"), ("convnext", "dora"), ("resnet", "lora"),
         ("resnet", "dora"), ("resnet", "qlora")]  # fmt: skip


def measure_apart(adapter: Path, network: nn.Module) -> float:
    """How far a model's logits on the probe pictures lie from those that training left, per unit of
    their spread."""
    kept = load_file(adapter / TRAINED)["logits"]
    given = torch.cat(compute_logits(network, make_probes(read_adapter(adapter).load_reader())))
    assert given.shape == kept.shape == (4, 3)
    return (given - kept).abs().max().item() / kept.std().item()


def load_merged(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def judge(folder: Path, family: str, method: str, patch: pytest.MonkeyPatch) -> None:
    """One line of the table."""
    base = pictures.make_base(folder / "base", family)
    recipe = pictures.write_recipe(folder, base, method)
    if family == "resnet" and method.startswith("q"):
        with pytest.raises(UsageError, match="has none but its head: bitsandbytes does not store"):
            run.train(load_recipe(recipe))
        return
    adapter = run.train(load_recipe(recipe))
    reloaded = measure_apart(adapter, load_as_peft_does(adapter))
    assert reloaded <= (1e-6 if "dora" in method else 0)
    merge(adapter, folder / "merged", None, None, False)
    merged = load_merged(folder / "merged")
    assert measure_apart(adapter, merged) < (2e-4 if method.startswith("q") else 2e-5)
    assert merged.config.id2label == {0: "blue", 1: "green", 2: "red"}
    for made in (adapter, folder / "merged"):
        AutoImageProcessor.from_pretrained(made, backend="pil")
    again = resume_from_two(recipe, folder / "again", patch)
    assert (adapter / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("family", "method"), QUICK)
def test_what_trained_is_loaded_merged_and_resumed(
    tmp_path: Path, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(tmp_path, family, method, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [each for each in TABLE if each not in QUICK])
def test_the_whole_table(
    tmp_path: Path, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(tmp_path, family, method, monkeypatch)


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """An adapter of a ResNet, whose base was saved with a head of other labels."""
    folder = tmp_path_factory.mktemp("resnet")
    base = pictures.make_base(folder / "base", "resnet")
    network = AutoModelForImageClassification.from_pretrained(base, num_labels=5)
    network.save_pretrained(base)
    recipe = pictures.write_recipe(folder, base, request.param)
    return run.train(load_recipe(recipe))


def test_means_and_variances_are_trained_saved_and_merged(trained: Path) -> None:
    """As PEFT merges them, by tensors and with the whole model."""
    adapter = read_adapter(trained)
    carried = load_file(trained / WEIGHTS)
    before = load_file(Path(adapter.base.name) / "model.safetensors")
    names = [name for name in before if name.endswith("running_mean")]
    assert len(names) == 6
    unloaded = load_as_peft_does(trained).merge_and_unload().state_dict()
    for stream in (True, False):
        out = trained.parent / f"merged-{stream}"
        merge(trained, out, None, stream, False)
        after = load_file(out / "model.safetensors")
        assert after.keys() == unloaded.keys()
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, unloaded[name], rtol=0, atol=1e-7)
        for name in names:
            counted = name.replace("running_mean", "num_batches_tracked")
            assert not torch.equal(after[name], before[name])
            assert torch.equal(after[name], carried[f"base_model.model.{name}"])
            assert after[counted] == before[counted] + 4
    assert "6 of 6" not in verify(str(trained), str(trained.parent / "merged-True"), None)


def test_a_resnet_is_merged_tensor_by_tensor(trained: Path) -> None:
    """The convolutions whole, each by PEFT's own layer."""
    adapter = read_adapter(trained)
    plan, _ = streaming_plan.make_plan(adapter, torch.float32, None)
    assert len(plan.layers) == 6
    assert not any(changed.by_rows for changed in plan.layers.values())
    assert sum(name.endswith("running_var") for name in plan.weights.replaced) == 6


def test_onnx_says_of_pictures_what_peft_says(trained: Path) -> None:
    """In batches of another size than those that it was written with."""
    onnxruntime = pytest.importorskip("onnxruntime")
    merge(trained, trained.parent / "whole", None, None, False)
    export.export(str(trained.parent / "whole"), trained.parent / "onnx")
    torch.manual_seed(1)
    shown = torch.rand(7, 3, pictures.SIDE, pictures.SIDE)
    session = onnxruntime.InferenceSession(trained.parent / "onnx" / "model.onnx")
    assert [each.shape[0] for each in session.get_inputs()] == ["batch"]
    [given] = session.run(["logits"], {"pixel_values": shown.numpy()})
    with torch.no_grad():
        wanted = load_as_peft_does(trained)(pixel_values=shown).logits
    torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=0, atol=1e-5)
    assert wanted.std(0).min() > 1e-3
    AutoImageProcessor.from_pretrained(trained.parent / "onnx", backend="pil")


@pytest.mark.parametrize("what", ["running_mean", "running_var"])
def test_a_merge_that_loses_a_mean_is_found(trained: Path, what: str) -> None:
    out = trained.parent / f"lost-{what}"
    merge(trained, out, None, True, False)
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if name.endswith(what))
    adapter = read_adapter(trained)
    weights[name] = load_file(Path(adapter.base.name) / "model.safetensors")[name]
    from safetensors.torch import save_file

    save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraError, match=rf"not the same function|{what}"):
        verify(str(trained), str(out), None)


def test_another_image_processor_is_told(trained: Path) -> None:
    out = trained.parent / "other"
    merge(trained, out, None, True, False)
    file = out / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    with pytest.raises(
        LoraError, match="the image processors differ: .*other makes something else"
    ):
        verify(str(trained), str(out), None)


def test_an_adapter_made_elsewhere_is_read_as_one_of_pictures(
    trained: Path, tmp_path: Path
) -> None:
    """PEFT names no task: the class of the base tells it, and the tensors how many labels."""
    made = tmp_path / "elsewhere"
    load_as_peft_does(trained).save_pretrained(made)
    found = read_adapter(made)
    assert found.base.task.name == "image_classification"
    assert found.base.head_settings is not None
    assert found.base.head_settings.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    merge(made, tmp_path / "merged", None, None, False)
    assert measure_apart(trained, load_merged(tmp_path / "merged")) < 1e-5


def settle(tmp_path: Path, family: str, **more: str) -> settled.Settled:
    base = pictures.make_base(tmp_path / "base", family)
    return settled.settle_recipe(load_recipe(pictures.write_recipe(tmp_path, base, **more)))


def test_convolutions_are_adapted_where_nothing_is_linear(tmp_path: Path) -> None:
    found = settle(tmp_path, "resnet")
    assert found.recipe.lora.target_modules == ["convolution"]
    assert found.recipe.lora.modules_to_save == ["classifier", "normalization"]
    said = "\n".join(map(str, found.choices))
    assert "all-linear: its 6 convolutions; but its head nothing is linear" in said
    assert "and 6 modules with means and variances, which training changes" in said
    size = sizes.measure_adapter(found.recipe, found.base, found.base.load_reader(), [])
    assert size.modules == 6


def test_linear_modules_are_adapted_where_there_are_some(tmp_path: Path) -> None:
    found = settle(tmp_path, "convnext")
    assert found.recipe.lora.target_modules == "all-linear"
    size = sizes.measure_adapter(found.recipe, found.base, found.base.load_reader(), [])
    assert size.modules == 4


def test_named_convolutions_stay(tmp_path: Path) -> None:
    found = settle(tmp_path, "resnet", lora=", target_modules: [layer.0.convolution]")
    assert found.recipe.lora.target_modules == ["layer.0.convolution"]


def test_names_are_as_short_as_they_mean_the_same() -> None:
    network = nn.ModuleDict(
        {
            "stem": nn.ModuleDict({"norm": nn.BatchNorm2d(1), "conv": nn.Conv2d(1, 1, 1)}),
            "first": nn.ModuleDict({"norm": nn.BatchNorm2d(1), "bn": nn.BatchNorm2d(1)}),
            "last": nn.ModuleDict({"norm": nn.GroupNorm(1, 1), "own_bn": nn.BatchNorm2d(1)}),
        }
    )
    statistics = find_statistics(network)
    assert statistics == ["stem.norm", "first.norm", "first.bn", "last.own_bn"]
    # PEFT takes `bn` for `own_bn`, too
    assert shorten_names(network, statistics) == ["first.bn", "first.norm", "own_bn", "stem.norm"]


def test_several_processes_would_train_another_run(tmp_path: Path) -> None:
    base = Base(str(pictures.make_base(tmp_path / "base", "resnet")))
    found = settle(tmp_path / "x", "resnet") if (tmp_path / "x").mkdir() is None else None
    assert found is not None
    network = found.base.build_empty()
    spread.refuse_statistics(network, 1)
    with pytest.raises(LoraError, match="6 modules of the base, such as resnet.embedder") as error:
        spread.refuse_statistics(network, 2)
    assert error.value.hint == "--nproc 1"
    assert base


def test_the_plan_speaks_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = pictures.make_base(tmp_path / "base", "vit")
    recipe = load_recipe(pictures.write_recipe(tmp_path, base))
    show.show_plan(recipe, None, 100.0, True, False)
    said = capsys.readouterr().out
    assert "memory at the peak of a step: 4 pictures of 32x32 in one forward pass" in said
    assert "largest that fits: training.per_device_train_batch_size" in said
    assert "steps: 4 (5 an epoch)" in said
    assert "at 100 pictures/s (--tokens-per-second)" in said


def test_training_counts_pictures(tmp_path: Path) -> None:
    base = pictures.make_base(tmp_path / "base", "vit")
    recipe = pictures.write_recipe(
        tmp_path, base, data=f", eval_path: {pictures.write_folder(tmp_path / 'more', 2)}"
    )
    run.train(load_recipe(recipe))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["num_input_tokens_seen"] == 4
    assert lines[0]["pictures_per_second"] > 0
    assert any("eval_accuracy" in line for line in lines)


def test_several_labels_and_numbers_train(tmp_path: Path) -> None:
    base = pictures.make_base(tmp_path / "base", "vit")
    folder = pictures.write_folder(tmp_path / "photos", 6)
    for kind, value in (("several", [["a"], ["a", "b"], []]), ("numbers", [0.5, 1.5, 2.0])):
        rows = [
            {"image": f"{file.parent.name}/{file.name}", "label": value[at % 3]}
            for at, file in enumerate(sorted(folder.rglob("*.png")))
        ]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = load_recipe(
            pictures.write_recipe(tmp_path, base),
            [f"data.path={folder}/{kind}.jsonl", f"output_dir={tmp_path / kind}"],
        )
        adapter = run.train(recipe)
        kept = load_file(adapter / TRAINED)["logits"]
        given = torch.cat(
            compute_logits(
                load_as_peft_does(adapter), make_probes(read_adapter(adapter).load_reader())
            )
        )
        assert torch.equal(given, kept)


def test_an_adapter_of_pictures_is_trained_on(tmp_path: Path) -> None:
    base = pictures.make_base(tmp_path / "base", "resnet")
    recipe = pictures.write_recipe(tmp_path, base)
    first = run.train(load_recipe(recipe))
    second = run.train(
        load_recipe(
            recipe,
            ["model.name_or_path=auto", f"model.adapter={first}", f"output_dir={tmp_path / 'two'}"],
        )
    )
    counted = [
        load_file(folder / WEIGHTS)[
            "base_model.model.resnet.embedder.embedder.normalization.num_batches_tracked"
        ]
        for folder in (first, second)
    ]
    assert counted[1] == counted[0] + 4
    assert measure_apart(second, load_as_peft_does(second)) == 0


# Real digits --------------------------------------------------------------------------------------


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits, of 8x8, as files of 32x32: the last 360, by other hands, as test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (shades, digit) in enumerate(zip(found.images, found.target)):
        place = folder / ("train" if number < 1437 else "test") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((shades / 16 * 255).astype(np.uint8))
        picture.resize((32, 32), Image.Resampling.BILINEAR).save(place / f"{number}.png")
    return folder


def read_pictures(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures below a folder as a model takes them, and the digits that they show."""
    files = sorted(folder.rglob("*.png"))
    shown = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    numbers = torch.tensor([int(file.parent.name) for file in files])
    return torch.tensor(shown).permute(0, 3, 1, 2) / 127.5 - 1, numbers


def pretrain(base: Path, digits: Path, network: Any, steps: int, rate: float) -> None:
    """Teach a model the digits below 5, and save it as a base."""
    shown, numbers = read_pictures(digits / "train")
    shown, numbers = shown[numbers < 5], numbers[numbers < 5]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    drawn = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(numbers), (64,), generator=drawn)
        network(pixel_values=shown[rows], labels=numbers[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(base)
    pictures.save_processor(base)


def measure_accuracy(adapter: Path, digits: Path) -> float:
    """Of digits by other hands, by PEFT and transformers alone."""
    shown, numbers = read_pictures(digits / "test")
    torch.manual_seed(7)
    network = AutoModelForImageClassification.from_pretrained(
        read_adapter(adapter).base.name,
        config=AutoConfig.from_pretrained(adapter),
        ignore_mismatched_sizes=True,
    )
    with torch.no_grad():
        said = PeftModel.from_pretrained(network, str(adapter)).eval()(pixel_values=shown).logits
    return (said.argmax(-1) == numbers).float().mean().item()


def last_accuracy(folder: Path) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval_accuracy"] for line in lines if "eval_accuracy" in line][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "steps", "rate", "epochs", "least"),
    [("resnet", 150, 3e-3, 12, 0.965), ("vit", 300, 2e-3, 20, 0.8)],
)
def test_digits_of_which_the_base_knows_half(
    tmp_path: Path, family: str, steps: int, rate: float, epochs: int, least: float
) -> None:
    """ResNet (LoRA on its convolutions): 97.8 % of digits by other hands, and 97.8 % after loading
    again; with its means and variances left out of the adapter 48 %, kept as they were 89 %."""
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    digits = write_digits(tmp_path / "digits")
    torch.manual_seed(0)
    network = (
        ResNetForImageClassification(
            ResNetConfig(embedding_size=24, hidden_sizes=[24, 48], depths=[1, 1],
                         layer_type="basic", num_labels=5)
        )
        if family == "resnet"
        else ViTForImageClassification(
            ViTConfig(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2,
                      num_attention_heads=4, intermediate_size=128, num_labels=5)
        )
    )  # fmt: skip
    pretrain(tmp_path / "base", digits, network, steps, rate)
    (tmp_path / "r.yaml").write_text(
        f"task: image_classification\nmodel: {{name_or_path: {tmp_path / 'base'}}}\n"
        f"data: {{path: {digits}, eval_split: test}}\nlora: {{r: 16}}\n"
        f"training: {{num_train_epochs: {epochs}, per_device_train_batch_size: 64, "
        f'learning_rate: 4.0e-3, save_strategy: "no"}}\noutput_dir: {tmp_path / "run"}\n'
    )
    adapter = run.train(load_recipe(tmp_path / "r.yaml"))
    reached = last_accuracy(tmp_path / "run")
    assert reached >= least
    assert measure_accuracy(adapter, digits) == pytest.approx(reached, abs=1e-6)
    merge(adapter, tmp_path / "merged", None, None, False)
    shown, numbers = read_pictures(digits / "test")
    with torch.no_grad():
        said = load_merged(tmp_path / "merged")(pixel_values=shown).logits.argmax(-1)
    assert (said == numbers).float().mean().item() == pytest.approx(reached, abs=1e-6)
