"""Find what an adapter holds beside updates of linear weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from lora_cli.common import LoraError, files, quote
from lora_cli.recipe import find_initialisation

DORA = "DoRA magnitudes"
BLOCKS = "blocks in A or B (use_bdlora)"
UNMERGEABLE = {
    "alora_invocation_tokens": "tokens from which on alone it applies (alora_invocation_tokens)",
    "layer_replication": "layers of the base that it repeats (layer_replication)",
}
"""What no plain model can be made of, by the field of the configuration: a model's weights apply to
every token, and repeated layers share theirs, so that each one's change would fall to all."""
AS_IT_IS = "PEFT runs it as it is: lora generate"


def refuse_unmergeable(folder: Path) -> None:
    """Raise LoraError where no plain model can be made of the adapter in `folder` and its base."""
    config = files.read_json(folder / "adapter_config.json")
    for field, words in UNMERGEABLE.items():
        if config.get(field):
            raise LoraError(f"{folder} cannot be merged: it has {words}", AS_IT_IS)


def list_beyond(folder: Path) -> list[str]:
    """Name what the adapter in `folder` holds beside updates B·A of linear weights; empty for plain
    LoRA."""
    config = files.read_json(folder / "adapter_config.json")
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as stored:
        keys = list(stored.keys())
    whole = [key for key in keys if not any(part.startswith("lora_") for part in key.split("."))]
    start = find_initialisation(config.get("init_lora_weights"))
    found = {
        **{words: config.get(field) for field, words in UNMERGEABLE.items()},
        BLOCKS: config.get("use_bdlora"),
        "what it takes out of the base's weights (kasa_config)": config.get("kasa_config"),
        DORA: config.get("use_dora") or any("lora_magnitude_vector" in key for key in keys),
        "modules trained whole (modules_to_save)": config.get("modules_to_save"),
        "embedding rows (trainable_token_indices)": config.get("trainable_token_indices"),
        "adapted embeddings": any("lora_embedding_A" in key for key in keys),
        "adapted parameters (target_parameters)": config.get("target_parameters"),
        "biases in the adapter (lora_bias)": config.get("lora_bias"),
        "trained biases of the base": config.get("bias", "none") != "none",
        "a start that PEFT takes out of the base again (init_lora_weights)": start
        and start.changes_base_at_load,
    }
    words = [name for name, there in found.items() if there]
    return words or ([f"whole tensors, such as {whole[0]}"] if whole else [])


def refuse_beyond(folder: Path, accepted: Sequence[str] = ()) -> None:
    """Raise LoraError where the adapter holds more than updates of linear weights and what is
    `accepted`."""
    more = [what for what in list_beyond(folder) if what not in accepted]
    if more:
        hint = f"merge it instead: lora merge {quote(folder)} OUT"
        if {*more} <= {DORA, BLOCKS}:
            hint = f"lora convert {quote(folder)} OUT"
        elif {*more} & {*UNMERGEABLE.values()}:
            hint = AS_IT_IS
        raise LoraError(f"{folder} holds more than LoRA on linear weights: {', '.join(more)}", hint)
