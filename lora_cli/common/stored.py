"""Read back what lora wrote itself, through a model of it that its writer uses too.

Somebody else may have changed the file, or made it: nothing of it is used before it passed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_cli.common import files, plain_files
from lora_cli.common.errors import LoraError
from lora_cli.common.shown import quote

SHOWN = 80
"""How many characters of a field's path are shown."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}\z")]
"""A commit on the hub: folders are named by it."""


class DamagedError(LoraError):
    """A file of ours that does not hold what we write into such a file."""


class Stored(BaseModel):
    """What a file of ours holds, or a part of it. Keys that a later version adds are kept."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        validate_assignment=True,
        protected_namespaces=(),
    )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what the JSON file holds; raise LoraError where it is none, DamagedError naming
        the field where it is another's, or was changed."""
        text = plain_files.read_small(path)
        files.parse_json(text, path)
        with explain_misfits(path):
            return cls.model_validate_json(text, strict=True)

    def to_data(self) -> dict[str, Any]:
        """Return what was read or set, as JSON holds it."""
        return self.model_dump(exclude_unset=True)


@contextmanager
def explain_misfits(path: Path, *within: str) -> Iterator[None]:
    """Turn pydantic's refusal of what stands in a file of ours, or `within` a field of it, into a
    DamagedError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise explain_damage(path, first["msg"], (*within, *first["loc"])) from None


def explain_damage(path: Path, said: str, field: tuple[str | int, ...] = ()) -> DamagedError:
    """Return the error that says what is wrong with a file of ours, or with a field of it."""
    place = ".".join(map(str, field))
    place = place if len(place) <= SHOWN else f"{place[:SHOWN]}…"
    said = f"{place}: {said[:1].lower()}{said[1:]}" if place else said
    return DamagedError(
        f"{path} is damaged or not ours: {said}", f"copy it again; less {quote(path)} shows it"
    )
