"""Read pictures: what strangers made is looked at, and decoded once, before it is trained on.

By Pillow alone, and by its decoders of a few formats: others of its formats start programs.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.common import LoraError, plain_files
from lora_cli.data.formats import BadRow

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
"""Of the names of such files."""
LARGEST = 2**26
"""Bytes of a file."""
MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"),
    *("CMYK", "YCbCr", "LAB", "HSV"),
)
"""Pillow's names of what it makes RGB of. Of 16 bits (I, I;16) and of F it cuts off what is over
255, so that such a picture is white."""


class Seen(NamedTuple):
    """What a picture is."""

    width: int
    height: int
    kind: str
    """Such as `PNG, RGB`."""


def is_picture(file: Path) -> bool:
    """Return whether a file is a picture by its name."""
    return file.suffix.lower() in ENDINGS


def read_file(folder: Path, name: str) -> bytes:
    """Return the content of the file that a table in `folder` calls so.

    Raises BadRow for one that is not there, that lies outside of the folder, or is no plain file.
    """
    if "://" in name:
        said = f"the picture {name} is an address"
        raise BadRow("a picture is an address", said, "fetch it, and name the file")
    file = folder / name
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a link to itself, a null character
        inside = False
    if not inside:
        raise BadRow(
            "a picture lies outside of the folder",
            f"the picture {name} is not in {folder}, where the rows are",
            "name it from there (photos/1.png), without a link that leads out",
        )
    try:
        with open(file, "rb", opener=plain_files.open_plain) as opened:
            content = opened.read(LARGEST + 1)
    except FileNotFoundError:
        raise BadRow("a picture is not there", f"there is no picture {file}") from None
    except (LoraError, OSError) as error:
        said = error.message if isinstance(error, LoraError) else f"{file}: {error.strerror}"
        raise BadRow("a picture cannot be read", f"the picture cannot be read: {said}") from None
    return content


def hash_files(named: Iterable[tuple[Path, str]]) -> str:
    """Return a hash of the content of files, each in a folder by its name; of one that cannot be
    read, of why."""
    total = hashlib.sha256()
    for folder, name in named:
        try:
            content = read_file(folder, name)
        except BadRow as bad:
            content = bad.said.encode("utf-8", "surrogatepass")
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()[:32]


def look(content: bytes, name: str) -> Seen:
    """Return what a picture is, after decoding it whole. Raises BadRow for what is none, is damaged
    or of a kind that does not become RGB; LoraError for one that would fill the memory."""
    if len(content) > LARGEST:
        raise BadRow("a picture is too large", f"the picture {name} has over {LARGEST >> 20} MiB")
    if not content:
        raise BadRow("a picture is empty", f"the picture {name} is an empty file")
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(content), formats=FORMATS) as opened:
                seen = Seen(*opened.size, f"{opened.format}, {opened.mode}")
                if opened.mode in MODES:
                    _convert(opened)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise LoraError(
            f"{name} is a decompression bomb, or a picture too large to train on: {error}",
            "make it smaller, or take it out of the data",
        ) from None
    except UnidentifiedImageError:
        raise BadRow(
            "a file is no picture",
            f"{name} is no picture: none of {', '.join(FORMATS)}",
        ) from None
    except Exception as error:  # of any type: a decoder's answer to somebody's file
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise BadRow("a picture is damaged", f"the picture {name} is damaged: {said}") from None
    if opened.mode not in MODES:
        raise BadRow(
            "a picture has more than 8 bits",
            f"the picture {name} is of Pillow's mode {opened.mode}, of which RGB keeps only the "
            "values up to 255",
            "save it with 8 bits, its values scaled",
        )
    return seen


def decode(content: bytes) -> Image:
    """Return a picture that was looked at, in RGB, as it is meant to be held."""
    from PIL import Image as pillow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pillow.open(io.BytesIO(content), formats=FORMATS) as opened:
            return _convert(opened)


def _convert(opened: Image) -> Image:
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(opened)
    return turned.convert("RGB")
