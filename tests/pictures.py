"""Small bases of three families that see pictures, and pictures that are told apart by their
colours."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 32
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "ViTModel",
        {"image_size": SIDE, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 128},
    ),
    "convnext": (
        "ConvNextModel",
        {"hidden_sizes": [64, 64], "depths": [1, 1], "num_stages": 2, "image_size": SIDE},
    ),
    "resnet": (
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}  # fmt: skip


def make_base(folder: Path, family: str, **changed: Any) -> Path:
    """Write a random base of a family, without a head, and its image processor. Means and variances
    are those of some noise, not 0 and 1."""
    name, shape = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    network = kind(kind.config_class(**{**shape, **changed}))
    with torch.no_grad():
        for _ in range(3):
            network.train()(pixel_values=torch.randn(8, 3, SIDE, SIDE))
    network.save_pretrained(folder)
    save_processor(folder)
    return folder


def save_processor(folder: Path, side: int = SIDE, **changed: Any) -> None:
    size = {"height": side, "width": side}
    ViTImageProcessorPil(**{"size": size, **changed}).save_pretrained(folder)


def draw(label: str, number: int) -> Image.Image:
    """A picture of about the colour that its label says, with some noise."""
    drawn = random.Random(f"{label} {number}")
    shades = [
        tuple(max(0, min(255, shade + drawn.randint(-40, 40))) for shade in COLOURS[label])
        for _ in range(16)
    ]
    small = Image.new("RGB", (4, 4))
    small.putdata(shades)
    return small.resize((40, 24))


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def write_folder(folder: Path, count: int) -> Path:
    """Write so many pictures of each label, in a folder of its name."""
    for label in COLOURS:
        (folder / label).mkdir(parents=True)
        for number in range(count):
            draw(label, number).save(folder / label / f"{number}.png")
    return folder


def write_recipe(folder: Path, base: Path, method: str = "lora", **more: str) -> Path:
    """Write a recipe that trains four steps on eighteen pictures, and saves after two."""
    rows = folder / "photos"
    if not rows.is_dir():
        write_folder(rows, 6)
    training = "learning_rate: 0.01, max_steps: 4, save_strategy: steps, save_steps: 2, " + (
        f"per_device_train_batch_size: 4, logging_steps: 1{more.get('training', '')}"
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"task: image_classification\nmethod: {method}\n"
        f"model: {{name_or_path: {base}, dtype: float32{more.get('model', '')}}}\n"
        f"lora: {{r: 4, lora_alpha: 8{more.get('lora', '')}}}\n"
        f"data: {{path: {rows}{more.get('data', '')}}}\n"
        f"training: {{{training}}}\noutput_dir: {folder / 'run'}\n"
    )
    return recipe
