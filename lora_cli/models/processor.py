"""What reads a model's input: the tokenizer of its base, or, of a model of pictures, its image
processor, which makes each picture a tensor of one shape.

transformers has such processors by torchvision, too, which make other numbers: here it is always
Pillow's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, library_errors, remote_code
from lora_cli.models import names, settings, tokenizer
from lora_cli.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_cli.models.base import Base
    from lora_cli.models.parent import Parent

FILE = "preprocessor_config.json"
SIZES = ("size", "crop_size", "pad_size")
LARGEST = 4096
"""Pixels of a side that a picture is made into at most."""
LEAST_CROP = 0.1
"""Of a picture's side, what is cut out at least: a smaller share is one of a far larger picture."""
WIDE, TALL = (64, 48), (48, 64)
"""Two pictures that must come out alike."""


class PictureProcessor:
    """An image processor. It stands where a tokenizer does for texts: it is loaded by the base's
    name, and saved beside adapter and model."""

    chat_template = None
    eos_token_id = None

    def __init__(self, loaded: Any, name: str) -> None:
        self.loaded, self.name = loaded, name
        self.refuse_unusable()

    def __len__(self) -> int:
        """It has no words."""
        return 0

    def __call__(self, pictures: Sequence[Image]) -> dict[str, torch.Tensor]:
        """Return what the model takes of RGB pictures: `pixel_values` (pictures, channels, height,
        width) in float32, and whatever else the processor makes."""
        made = self.loaded(images=list(pictures), return_tensors="pt")
        return {name: torch.as_tensor(value) for name, value in made.items()}

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Height and width of what it makes of any picture."""
        height, width = self([_make_blank(WIDE)])["pixel_values"].shape[-2:]
        return int(height), int(width)

    @property
    def blank(self) -> Image:
        """A picture of nothing."""
        return _make_blank(self.shape[::-1])

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write preprocessor_config.json, as transformers' Trainer asks of what it was given."""
        self.loaded.save_pretrained(folder)

    def refuse_unusable(self) -> None:
        """Raise LoraError where pictures do not all come out alike, or as numbers."""
        mend = f"set size to {{height: N, width: N}} in {FILE} of a copy of {self.name}"
        file = f"{self.name}/{FILE}"
        refusal = library_errors.translate_file_errors(f"transformers cannot use {file}", mend)
        with refusal, np.errstate(all="ignore"):
            made = [self([_make_blank(size)])["pixel_values"] for size in (WIDE, TALL)]
            noise = self([make_picture("noise", (64, 64))])["pixel_values"]
        shapes = [tuple(each.shape[-2:]) for each in made]
        if shapes[0] != shapes[1]:
            said = " and ".join(
                f"one of {before[0]}x{before[1]} {after[1]}x{after[0]}"
                for before, after in zip((WIDE, TALL), shapes)
            )
            raise LoraError(
                f"{file} leaves pictures of different sizes (it makes {said}): no batch holds them",
                mend,
            )
        if made[0].dim() != 4 or not torch.isfinite(noise).all():
            raise LoraError(
                f"{file} makes a picture {tuple(made[0].shape)} numbers, or such as are not finite",
                "copy it again",
            )


Reader: TypeAlias = PreTrainedTokenizerBase | PictureProcessor
"""What reads a model's input."""


def load_processor(name: str, revision: str | None = None) -> PictureProcessor:
    """Load the image processor of a model on the hub or in a folder. Raises LoraError where it has
    none, or one that Pillow alone does not serve."""
    if find_spec("PIL") is None:
        raise LoraError("pictures are read by the package pillow", "pip install pillow")
    from transformers import AutoImageProcessor

    with names.explain_hub_failure(name):
        written = settings.read_settings(name, revision, FILE)
        if not written:
            raise LoraError(
                f"{name} has no {FILE}, which says how pictures are made ready for it",
                "copy the file from where the model is from",
            )
        _refuse_impossible(f"{name}/{FILE}", written)
        _refuse_unknown_kind(f"{name}/{FILE}", written)
        refused = f"transformers cannot read {name}/{FILE}"
        with library_errors.translate_file_errors(refused, "copy it again"):
            loaded = AutoImageProcessor.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=remote_code.is_allowed(),
                backend="pil",
            )
    if getattr(loaded, "backend", "pil") != "pil":
        raise LoraError(
            f"transformers has no {type(loaded).__name__} by Pillow",
            "take a base of another family",
        )
    return PictureProcessor(loaded, name)


@cache
def find_picture_shape(name: str, revision: str | None = None) -> tuple[int, int]:
    """Return height and width of the pictures that a base on the hub or in a folder takes."""
    return load_processor(name, revision).shape


def load_recipe_reader(
    recipe: Recipe, base: Base, parent: Parent | None = None
) -> tuple[Reader, list[int], str]:
    """Return what reads the input of a recipe's model, the ids of the tokens that the recipe adds,
    and the chat template in words; of pictures there are none of these."""
    if not base.task.reads_pictures:
        return tokenizer.load_recipe_tokenizer(recipe, base, parent)
    return (parent.adapter if parent else base).load_reader(), [], ""


def save_reader(reader: Reader, folder: Path, base: str, revision: str | None) -> None:
    """Save beside an adapter or a model what reads its input."""
    if isinstance(reader, PictureProcessor):
        reader.save_pretrained(str(folder))
    else:
        tokenizer.save_tokenizer(reader, folder, base, revision)


def _refuse_unknown_kind(file: str, written: Mapping[str, Any]) -> None:
    """Raise LoraError for a processor that transformers does not have; a file need not name one."""
    import transformers

    kind = written.get("image_processor_type")
    names = {str(kind), str(kind).removesuffix("Fast")}  # a name of older versions
    if kind is not None and names.isdisjoint(dir(transformers)):
        raise LoraError(
            f"{file}: transformers knows no image processor {str(kind)[:80]!r}", "copy it again"
        )


def _refuse_impossible(file: str, written: Mapping[str, Any]) -> None:
    """Raise LoraError for settings that would make pictures of a size that fills the memory."""
    numbers: list[tuple[str, Any]] = []
    for key in SIZES:
        given = written.get(key)
        inside = given.items() if isinstance(given, dict) else [("", given)]
        numbers += [(f"{key}.{side}".rstrip("."), value) for side, value in inside]
    for key, value in numbers:
        if isinstance(value, (int, float)) and not 0 < value <= LARGEST:
            raise LoraError(
                f"{file}: {key} is {value:,}, and at most {LARGEST:,} pixels are made",
                "copy the file again",
            )
    share = written.get("crop_pct")
    if isinstance(share, (int, float)) and not LEAST_CROP <= share <= 1:
        raise LoraError(f"{file}: crop_pct is {share}, no share of a side", "copy the file again")


KINDS = ("noise", "ramp", "stripes", "rings")
"""The pictures by which two forms of a model are compared."""


def make_picture(kind: str, size: tuple[int, int]) -> Image:
    """Return one of KINDS, of `size` (width, height), the same on any machine: no numbers are drawn
    from a generator, which another version may draw otherwise."""
    from PIL import Image as pillow

    width, height = size
    down, across = np.mgrid[0:height, 0:width]
    if kind == "noise":
        drawn = hashlib.shake_256(b"lora").digest(3 * width * height)
        return pillow.fromarray(np.frombuffer(drawn, np.uint8).reshape(height, width, 3))
    if kind == "ramp":
        red, green = 255 * across // max(width - 1, 1), 255 * down // max(height - 1, 1)
        blue = 255 - red
    elif kind == "stripes":
        red, green = 255 * (across // 4 % 2), 255 * (down // 8 % 2)
        blue = 255 * ((across + down) // 6 % 2)
    else:
        squares = (2 * across - width) ** 2 + (2 * down - height) ** 2
        red = squares * 8 // max(width, height) % 256
        green, blue = 255 - red, squares * 3 // max(width, height) % 256
    return pillow.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def _make_blank(size: tuple[int, int]) -> Image:
    from PIL import Image as pillow

    return pillow.new("RGB", size)
