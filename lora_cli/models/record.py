"""What the record of a run, or of an adapter, holds: `record.json` and `lora_record.json`."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from lora_cli.common import privacy, provenance, stored
from lora_cli.recipe import DType, Quantization

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]


class Fingerprint(stored.Stored):
    """What tells a base from another: see `fingerprint.py`."""

    config: dict[str, Any]
    tensors: dict[str, str]


class GGUFSource(stored.Stored):
    """The GGUF file that a base was dequantised from."""

    file: Name
    """Its absolute path, the home folder as ~."""
    sha256: stored.Sha256
    type: Name
    """How it keeps most of its weights, as ggml calls it."""
    dtype: Name
    """The type that they were written in, as torch calls it."""

    def __str__(self) -> str:
        return f"dequantised from {Path(self.file).name} ({self.type})"


class RecordedBase(stored.Stored):
    """The base that was trained on."""

    name: Name
    commit: stored.Commit | None = None
    """On the hub; None for a folder."""
    fingerprint: Fingerprint | None = None
    """None where the record is older than fingerprints."""
    made_from: GGUFSource | None = None
    """None for a base that was a model's folder, or a name on the hub."""

    @property
    def place(self) -> str:
        """The base's folder or its name on the hub."""
        return privacy.expand_home(self.name)


class RecordedModel(stored.Stored):
    """The `model` section of a resolved recipe."""

    dtype: DType | None = None
    labels: list[str] | str | None = None
    """What the model tells apart; `auto` where it tells nothing apart."""
    problem_type: str | None = None


class RecordedTraining(stored.Stored):
    """The `training` section of a resolved recipe."""

    max_length: Positive | None = None


class RecordedQuantization(Quantization):
    """The `quantization` section of a resolved recipe."""

    model_config = ConfigDict(extra="ignore")

    bnb_4bit_compute_dtype: DType = "float32"


class RecordedRecipe(stored.Stored):
    """A resolved recipe, of this version or an earlier one: what merging needs is checked, and of
    the rest that it is sections."""

    model: RecordedModel = RecordedModel()
    quantization: RecordedQuantization | None = None
    lora: dict[str, Any] = {}
    data: dict[str, Any] = {}
    training: RecordedTraining = RecordedTraining()
    objective: Any = None

    @property
    def source_prefix(self) -> str:
        """What each source begins with; empty for nothing, and for other tasks."""
        given = self.data.get("source_prefix")
        return given if isinstance(given, str) else ""


class RecordedData(stored.Stored):
    """The rows that were trained on."""

    fingerprint: str | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = []
    """The tokens that the trained answers ended with."""


class RecordedDevice(stored.Stored):
    """What was trained on: its kind as torch names it, and its name."""

    kind: Annotated[str, Field(pattern=r"^[a-z]{1,20}\z")]
    name: str = ""


class RecordedChoice(stored.Stored):
    """What `auto` became, and why."""

    name: str
    value: Any
    reason: str


class RecordedPieces(stored.Stored):
    """The pieces of a step that a run went on with when memory had run out."""

    model_config = ConfigDict(extra="forbid")

    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    sequence: Positive


class Reduction(stored.Stored):
    """A time when memory ran out: after which step, and what a step was made of from then on."""

    step: stored.Count
    pieces: RecordedPieces


class RecordedHoldout(stored.Stored):
    """The rows that are held out of those that were read, to evaluate on."""

    rows: stored.Count
    fingerprint: str


class RecordedKept(stored.Stored):
    """Which step became the adapter, and what the evaluations said of it and of the last step."""

    which: Literal["best", "last"]
    step: stored.Count
    metric: str
    value: float | None = None
    """None where that step was not evaluated."""
    last_step: stored.Count
    last_value: float | None = None
    why: str = ""
    """Why the run ended before its steps were done."""


class RecordedResults(stored.Stored):
    """How a run ended."""

    steps: stored.Count
    train_loss: float | None = None
    duration_s: float | None = None
    """Of what this process trained, in seconds."""


class RecordedParent(stored.Stored):
    """The adapter that was trained on from."""

    name: Name
    sha256: stored.Sha256
    base: dict[str, Any] = {}
    id: str | None = None
    parent: RecordedParent | None = None


class MadeRecord(provenance.Record):
    """The record of what was made from an adapter, such as a merged model."""

    parent: dict[str, Any] | None = None
    """The adapter's own."""


class TrainingRecord(provenance.Record):
    """The record of a run, or of an adapter that was made from others: JSON values without secrets
    or the home folder."""

    id: Name | None = None
    """The name by which checkpoints and adapters know their run."""
    status: Literal["running", "interrupted", "failed", "finished"]
    recipe: RecordedRecipe
    choices: list[RecordedChoice] = []
    base: RecordedBase
    parent: RecordedParent | None = None
    device: RecordedDevice | None = None
    processes: Positive = 1
    """How many trained together."""
    data: RecordedData | None = None
    """The rows the run trains on; None until they are prepared."""
    reduced: list[Reduction] = []
    holdout: RecordedHoldout | None = None
    kept: RecordedKept | None = None
    planned_memory_gb: float | None = None
    """The most memory that the plan foresaw, as results have the most there was; in 10^9 bytes."""
    results: RecordedResults | None = None
    resumed: list[str] = []
    changed: list[str] = []

    @property
    def day(self) -> date:
        """The day on which the run began, also of one that was resumed later."""
        return date.fromisoformat(self.started[:10])


def read_merged_recipe(folder: Path) -> RecordedRecipe:
    """Return the recipe by which the adapter in a merged model was trained; an empty one where its
    folder has no record, or one of other models."""
    file = folder / provenance.ARTEFACT_RECORD
    parent = MadeRecord.read(file).parent if file.is_file() else None
    if parent is None:
        return RecordedRecipe()
    with stored.explain_misfits(file, "parent"):
        return TrainingRecord.model_validate(parent).recipe
