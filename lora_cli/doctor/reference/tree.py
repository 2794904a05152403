"""Adapt a whole module tree; save its adapter, swap it for another, or merge it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.doctor.reference import layers

LORA = {nn.Linear: layers.LoRALinear, nn.Embedding: layers.LoRAEmbedding}
LORA |= {nn.Conv2d: layers.LoRAConv2d}
DORA = {nn.Linear: layers.DoRALinear, nn.Embedding: layers.DoRAEmbedding}
DORA |= {nn.Conv2d: layers.DoRAConv2d}
BIASES = {"none": (), "all": ("bias",), "lora_only": (".base.bias",)}
"""How the names of the biases end that each value of `bias` trains."""
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
NAMES |= {"magnitude": "lora_magnitude_vector"}
NAMES_IN_EMBEDDING = NAMES | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
"""What PEFT's files call a layer's tensors."""


class LoraModel(nn.Module):
    """`model` with LoRA or DoRA layers in place of the modules whose names, or last parts of names,
    are among `targets`.

    All else is frozen, but for the biases that `bias` names: `none`, `all`, or those of the adapted
    modules (`lora_only`). `settings` go to each layer: r, lora_alpha, lora_dropout, use_rslora.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], **settings: Any) -> None:
        super().__init__()
        self.model = model
        self.adapt(targets, **settings)

    def adapt(
        self, targets: Sequence[str], bias: str = "none", use_dora: bool = False, **settings: Any
    ) -> None:
        """Put a fresh adapter on the bare base. Raises ValueError where nothing matches."""
        self.settings = {"target_modules": [*targets], "bias": bias, "use_dora": use_dora}
        self.settings |= settings
        self.model.requires_grad_(False)
        kinds: dict[Any, Any] = DORA if use_dora else LORA
        self.layers: dict[str, layers.LoRALayer] = {
            path: kinds[type(module)](module, **settings).train(self.model.training)
            for path, module in self.model.named_modules()
            if any(f".{path}".endswith(f".{target}") for target in targets)
        }
        if not self.layers:
            raise ValueError(f"no module matches {targets}")
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer)
        self.biases = {n: p for n, p in self.model.named_parameters() if n.endswith(BIASES[bias])}
        self.base_biases = {n: p.detach().clone() for n, p in self.biases.items()}
        for bias_of_base in self.biases.values():
            bias_of_base.requires_grad_()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its names in PEFT's files."""
        tensors = {}
        for name, tensor in self.model.named_parameters():
            path, _, last = name.rpartition(".")
            if path in self.layers:
                embedding = isinstance(self.layers[path].base, nn.Embedding)
                name = f"{path}.{(NAMES_IN_EMBEDDING if embedding else NAMES)[last]}"
            if tensor.requires_grad:
                tensors["base_model.model." + name.replace(".base.", ".base_layer.")] = tensor
        return tensors

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter's two files as PEFT reads them."""
        folder.mkdir()
        tensors = {n: t.detach().contiguous() for n, t in self.adapter_tensors().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", **self.settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    @torch.no_grad()
    def remove_adapter(self) -> nn.Module:
        """Return the base as it was before."""
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer.base)
        for name, tensor in self.biases.items():
            tensor.copy_(self.base_biases[name])
        return self.model.requires_grad_(False)

    @torch.no_grad()
    def swap_adapter(self, folder: Path) -> None:
        """Take this adapter off and put that of `folder` on, ours or PEFT's. Raises ValueError
        where the names or shapes of its tensors are not those of its configuration."""
        config = json.loads((folder / "adapter_config.json").read_text())
        stored = load_file(folder / "adapter_model.safetensors")
        self.remove_adapter()
        keys = ("bias", "use_dora", "r", "lora_alpha", "lora_dropout", "use_rslora")
        self.adapt(config["target_modules"], **{k: config[k] for k in keys if k in config})
        tensors = self.adapter_tensors()
        shapes = [{n: t.shape for n, t in side.items()} for side in (tensors, stored)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the tensors of {folder} are not those its configuration describes")
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])

    def merge(self) -> nn.Module:
        """Return the plain model with the adapter merged into its weights; this object is then used
        up."""
        for path, layer in self.layers.items():
            layer.merge()
            self.model.set_submodule(path, layer.base)
        return self.model.requires_grad_(False)
