"""What produced an artefact: the run's record, and what a saved adapter says of itself.

`record.json` in a run's folder holds the resolved recipe, the choices `auto` made, versions, base, data and results;
a copy, `lora_record.json`, travels inside the adapter and names the parent of whatever is made from it.
"""

from __future__ import annotations

import platform
import re
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lora_cli import __version__
from lora_cli.common import privacy as private
from lora_cli.common import remote_code as trust
from lora_cli.common import ui
from lora_cli.common.errors import LoraError, UsageError
from lora_cli.common.files import read_json, refuse_link, refuse_occupied, write_json, write_text
from lora_cli.models import adapter_config as claims
from lora_cli.recipe import strict_yaml as yamlfile

RUN_RECORD, ARTEFACT_RECORD, RESOLVED_RECIPE = "record.json", "lora_record.json", "recipe.yaml"
METRICS = "metrics.jsonl"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def new(command: str, **contents: Any) -> dict[str, Any]:
    """A record of `command`, started now, with the versions at work."""
    return {
        "command": command,
        "started": _now(),
        "versions": {"lora-cli": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        **({"trusted_remote_code": True} if trust.allowed() else {}),
        **private.portable(contents),
    }


# Keys of a recipe that leave the steps before a checkpoint as they were: they may change when a run is resumed
LOGGING = (
    "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "save_steps", "save_strategy",
    "save_total_limit", "on_oom", "stop_on_loss_above",
)  # fmt: skip
EXTENDING = (
    "training.max_steps", "training.num_train_epochs", "training.eval_strategy", "training.eval_steps",
    "training.per_device_eval_batch_size", "training.dataloader_num_workers", "training.load_best_model_at_end",
    "training.max_grad_norm", "data.eval_path", "data.eval_split",
    *(f"training.{name}" for name in LOGGING),
)  # fmt: skip


def check_place(folder: Path) -> None:
    """LoraError where `folder` holds something that is not a run of ours; what a kill left of one's start may stay."""
    refuse_link(folder)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if RUN_RECORD in names or (names and all(re.fullmatch(r"\.lock|\..+\.tmp", name) for name in names)):
            return
    refuse_occupied(folder)


def begin(
    folder: Path, recipe: dict[str, Any], contents: dict[str, Any], resume: bool, allowed: Sequence[str] = ()
) -> dict[str, Any]:
    """Claim `folder`, which is locked, for a run of the resolved `recipe` and write its record with status `running`.

    LoraError when the folder holds another run, or, with `resume`, a run of a recipe that differs in more than the
    `allowed` keys.
    """
    refuse_link(folder)
    recipe, contents = private.portable(recipe), private.portable(contents)
    path, kept = folder / RUN_RECORD, dict[str, Any]()
    if not resume and path.is_file() and _nothing_came_of(folder):
        for name in (RUN_RECORD, RESOLVED_RECIPE, METRICS):
            (folder / name).unlink(missing_ok=True)
    if resume:
        if not path.is_file():
            raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
        before = _read_record(path)
        changes = _differences(before["recipe"], recipe)
        extended = changes and all(change.key in EXTENDING for change in changes)
        if before["status"] == "finished" and not (extended or allowed):
            raise LoraError(f"the run in {folder} is finished", f"lora merge {folder / 'adapter'} OUT")
        _check_changes(folder, changes, allowed)
        if "fingerprint" in before["base"] and (others := _differences(before["base"], contents["base"], "base.")):
            raise LoraError(
                f"the base differs from that of the run in {folder}: {'; '.join(map(str, others[:3]))}",
                f"give the same base, or rm -r {folder} to start again",
            )
        if others := _differences(before["versions"], new("train")["versions"]):
            ui.warn(f"the run began with other versions and may end otherwise: {'; '.join(map(str, others))}")
        kept = {key: before[key] for key in ("id", "started", "data", "choices", "reduced") if key in before}
        kept["resumed"] = [*before.get("resumed", []), _now()]
        if changes:
            kept["changed"] = [*before.get("changed", []), *map(str, changes)]
    elif path.is_file():
        status = _read_record(path)["status"]
        hint = f"--resume continues it, --set output_dir=… starts another, rm -r {folder} removes it"
        if status == "finished":
            hint = f"--set output_dir=… starts another, rm -r {folder} removes it"
        raise LoraError(f"{folder} already holds a run ({status})", hint)
    record = new("train", id=uuid.uuid4().hex, status="running", recipe=recipe, **contents) | kept
    write_json(path, record)
    write_text(folder / RESOLVED_RECIPE, yamlfile.dump(recipe))
    return record


def _check_changes(folder: Path, changes: list[Change], allowed: Sequence[str]) -> None:
    """LoraError unless every change is allowed, and may be."""
    if fixed := sorted(set(allowed) - set(EXTENDING)):
        raise LoraError(
            f"--allow-changes {fixed[0]}: a resumed run cannot change it", f"it may change {', '.join(EXTENDING)}"
        )
    refused = [change for change in changes if change.key not in allowed]
    if not refused:
        return
    hint = "undo the change, or --set output_dir=… starts another run"
    if all(change.key in EXTENDING for change in refused):
        hint = "undo the change, or allow it: " + " ".join(f"--allow-changes {change.key}" for change in refused)
    more = [f"and {len(refused) - 4} more"] if len(refused) > 4 else []
    said = "; ".join([*map(str, refused[:4]), *more])
    raise LoraError(f"the recipe differs from the run in {folder}: {said}", hint)


def _nothing_came_of(folder: Path) -> bool:
    """Whether the run in `folder` failed before it saved anything: its recipe may be mended and run again."""
    kept = {RUN_RECORD, RESOLVED_RECIPE, METRICS, ".lock"}
    return _read_record(folder / RUN_RECORD)["status"] == "failed" and {p.name for p in folder.iterdir()} <= kept


def _read_record(path: Path) -> dict[str, Any]:
    """A record of ours; LoraError if the file is none."""
    record = read_json(path)
    kinds = {"recipe": dict, "base": dict, "status": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise LoraError(f"{path} is no record of a run", f"remove it: rm {path}")
    return record


def update(folder: Path, record: dict[str, Any], **contents: Any) -> None:
    """Add to a run's record and write it."""
    record |= {**private.portable(contents), "updated": _now()}
    write_json(folder / RUN_RECORD, record)


class Change(NamedTuple):
    """A value that differs from the one a run began with."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Change]:
    """`training.learning_rate 0.0002 -> 0.0001` for each value that differs."""
    changes: list[Change] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(Change(f"{prefix}{key}", before, after))
    return changes


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Adapter(NamedTuple):
    """A saved adapter folder: the base it names, and how that base was loaded if we trained it (else None)."""

    folder: Path
    base: str
    revision: str | None
    record: dict[str, Any] | None
    shares_base: bool

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe it was trained with; empty for an adapter made elsewhere."""
        return self.record["recipe"] if self.record else {}

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The 4-bit storage of the base it was trained on."""
        return self.recipe.get("quantization")

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that the trained answers ended with."""
        return list(self.record.get("data", {}).get("stop_token_ids", [])) if self.record else []

    @property
    def dtype(self) -> str | None:
        """The type of the base weights it was trained on."""
        return self.recipe.get("model", {}).get("dtype")


def read_adapter(folder: Path, base: str | None = None) -> Adapter:
    """What the adapter in `folder` says of itself; `base` overrides the base it names. LoraError if it is none."""
    if base is not None and not base.strip():
        raise UsageError("--base is empty", "leave it out, or --base MODEL")
    if folder.is_file():
        raise LoraError(f"{folder} is a file, and an adapter is a folder", f"ls {folder.parent}")
    if not folder.is_dir():
        raise LoraError(f"{folder} does not exist", f"ls {folder.parent}")
    if not (folder / "adapter_config.json").is_file():
        inside = folder / "adapter"
        hint = f"did you mean {inside}?" if (inside / "adapter_config.json").is_file() else "give the adapter's folder"
        raise LoraError(f"{folder} is no adapter: it has no adapter_config.json", hint)
    shapes = _check_weights(folder)
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise LoraError(f"{folder / 'adapter_config.json'} is no adapter configuration", "copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise LoraError(f"{folder} holds a {config.get('peft_type')} adapter, not LoRA or DoRA", "use PEFT itself")
    claims.check(folder / "adapter_config.json", config)
    claims.refuse_other_task(folder, config.get("task_type"))
    claims.refuse_other_ranks(folder, config, shapes)
    # a checkpoint of a run has its record one folder up
    places = [
        folder / ARTEFACT_RECORD,
        *([folder.parent / RUN_RECORD] if folder.name.startswith("checkpoint-") else []),
    ]
    record = next((_read_record(place) for place in places if place.is_file()), None)
    named = config.get("base_model_name_or_path")
    if record and base is None:
        claims.refuse_other_base(folder, private.portable(named), private.portable(record["base"].get("name")))
    name = private.expanded(base or named or "")
    if not name:
        raise LoraError(f"{folder} does not name its base model", "--base MODEL")
    revision = None
    if base is None:
        revision = (record["base"]["commit"] if record else None) or config.get("revision")
    if record and base is None and record["base"]["commit"] is None and not Path(name).is_dir():
        raise LoraError(
            f"the base of {folder}, the folder {name}, is not here", "--base MODEL, or run this where it is"
        )
    if not _may_be_model(name):
        raise LoraError(f"the base of {folder}, {name}, is no model", "--base MODEL")
    if record is None and base is None:
        claims.announce(folder, name, revision)
    # these change the base's own weights or size while they are on it, so another adapter must not share it
    changes_base = config.get("bias", "none") != "none" or isinstance(config.get("init_lora_weights"), str)
    changes_base |= bool(config.get("trainable_token_indices"))
    return Adapter(folder, name, revision, record, not changes_base)


def _check_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's tensors; LoraError unless its weights are there, whole, and not pickled."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = next((file for kind in PICKLED for file in sorted(folder.glob(f"*{kind}"))), None)
        hint = (
            f"{pickled.name} is a pickle, which may run code when it is loaded: have it converted to safetensors"
            if (pickled)
            else "copy it again"
        )
        raise LoraError(f"{folder} has no adapter_model.safetensors", hint)
    try:
        with safe_open(weights, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            whole = [name for name, each in slices.items() if "F" not in each.get_dtype()]
    except SafetensorError as error:
        raise LoraError(f"{weights} is damaged or cut off: {error}", "copy it again") from error
    if not shapes:
        raise LoraError(f"{weights} holds no tensors", "copy it again, or train again")
    if whole:
        raise LoraError(f"{weights}: {whole[0]} holds whole numbers, as no adapter does", "copy it again")
    return shapes


def _may_be_model(name: str) -> bool:
    """Whether `name` is a model's folder, or may be a name on the hub: no other folder, no file, no longer path."""
    path = Path(name)
    if path.exists():
        return (path / "config.json").is_file()
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def kind(path: str) -> str:
    """`gguf`, `adapter`, `model` (a folder) or `hub` for what a path on the command line is; LoraError if nothing."""
    local = Path(path)
    if not path.strip():
        raise UsageError("an empty name is no model", "give a folder, a .gguf file or a model on the hub")
    if local.suffix == ".gguf":
        if not local.is_file():
            raise LoraError(f"{path} does not exist", f"ls {local.parent}")
        return "gguf"
    if local.is_dir():
        if (local / "adapter_config.json").is_file():
            return "adapter"
        if (local / "config.json").is_file():
            return "model"
        inside = local / "adapter"
        hint = f"did you mean {inside}?" if inside.is_dir() else "give a folder with config.json or adapter_config.json"
        raise LoraError(f"{path} is neither a model nor an adapter", hint)
    if local.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise LoraError(f"{path} does not exist or is no model", "give a folder, a .gguf file or a model on the hub")
    return "hub"
