"""Adapters made from others: what they can be made from, and what such an adapter's folder says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import resolve_revision
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from lora_cli.common import files, provenance
from lora_cli.common.errors import LoraError
from lora_cli.models import fingerprint as identity
from lora_cli.models import tokenizer as tokenizing
from lora_cli.models.adapter_folder import Adapter

DORA = "DoRA magnitudes"


def beyond(folder: Path) -> list[str]:
    """What the adapter in `folder` holds that is no update B·A of a linear weight, in words; empty for plain LoRA."""
    config = files.read_json(folder / "adapter_config.json")
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as stored:
        keys = list(stored.keys())
    whole = [key for key in keys if not any(part.startswith("lora_") for part in key.split("."))]
    found = {
        DORA: config.get("use_dora") or any("lora_magnitude_vector" in key for key in keys),
        "modules trained whole (modules_to_save)": config.get("modules_to_save"),
        "embedding rows (trainable_token_indices)": config.get("trainable_token_indices"),
        "adapted embeddings": any("lora_embedding_A" in key for key in keys),
        "adapted parameters (target_parameters)": config.get("target_parameters"),
        "biases in the adapter (lora_bias)": config.get("lora_bias"),
        "trained biases of the base": config.get("bias", "none") != "none",
        "a start that PEFT takes out of the base again (init_lora_weights)": _takes_from_base(config),
    }
    words = [name for name, there in found.items() if there]
    return words or ([f"whole tensors, such as {whole[0]}"] if whole else [])


def _takes_from_base(config: Mapping[str, Any]) -> bool:
    start = config.get("init_lora_weights")
    return isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq"))


def refuse_beyond(folder: Path, accepted: Sequence[str] = ()) -> None:
    """LoraError where the adapter holds anything but updates of linear weights, and what is `accepted`."""
    more = [what for what in beyond(folder) if what not in accepted]
    if more:
        hint = f"lora convert {folder} OUT" if more == [DORA] else f"merge it instead: lora merge {folder} OUT"
        raise LoraError(f"{folder} holds more than LoRA on linear weights: {', '.join(more)}", hint)


def finish(
    staging: Path, tokenizer: PreTrainedTokenizerBase, command: str, sources: Sequence[Adapter], **contents: Any
) -> None:
    """Tokenizer and record beside the adapter; the record names the parents, and says what merging needs to know."""
    first = sources[0]
    tokenizing.save_tokenizer(tokenizer, staging, first.base, first.revision)
    commit = first.revision
    if commit is None and not Path(first.base).is_dir():  # made elsewhere, and saying only the name
        commit = str(resolve_revision(first.base).resolved)
    stops = sorted({token for source in sources for token in source.stop_token_ids})
    made = provenance.new(
        command,
        status="finished",
        base={"name": first.base, "commit": commit, "fingerprint": identity.fingerprint(first.base, commit)},
        recipe={key: first.recipe[key] for key in ("model", "quantization") if key in first.recipe},
        data={"stop_token_ids": stops},
        **contents,
        parents=[{"folder": str(source.folder), "record": source.record} for source in sources if source.record],
    )
    files.write_json(staging / provenance.ARTEFACT_RECORD, made)
    files.leave_out_home(staging)
