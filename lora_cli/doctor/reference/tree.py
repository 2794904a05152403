"""A whole module tree adapted: which modules, which biases train, merging, saving, several adapters
on one base."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.doctor.reference import layers
from lora_cli.doctor.reference.layers import DoRA, LoRALayer

Bias = Literal["none", "all", "lora_only"]
Rule = str | Sequence[str]
LORA = {
    nn.Linear: layers.LoRALinear,
    nn.Embedding: layers.LoRAEmbedding,
    nn.Conv2d: layers.LoRAConv2d,
}
DORA = {
    nn.Linear: layers.DoRALinear,
    nn.Embedding: layers.DoRAEmbedding,
    nn.Conv2d: layers.DoRAConv2d,
}
PREFIX = "base_model.model."
"""What PEFT puts before module names in adapter files."""

BEYOND = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "target_parameters",
    "fan_in_fan_out",
)
"""Fields of PEFT's configuration that change what an adapter is, and that the reference does not
have."""


def matches(name: str, rule: Rule) -> bool:
    """Whether a module's full name is meant: one of a list of names or endings of names, or a
    regular expression."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in rule)


class LoraModel(nn.Module):
    """`model` with LoRA or DoRA on the modules that `include` names and `exclude` does not.

    The modules are replaced in the tree, in place, by layers around them; every other parameter is
    frozen, but for the biases that `bias` frees: `none`, `all`, or those of the adapted modules
    (`lora_only`). `settings` go to each layer: r, lora_alpha, lora_dropout, use_rslora, init.
    Further adapters are added on the same base; one of them, or none, is in use at a time, and
    brings its own biases.

    Raises ValueError when nothing matches, or something that matches is no Linear, Embedding or
    Conv2d, or shares its weight with another module.
    """

    def __init__(
        self, model: nn.Module, include: Rule, exclude: Rule = (), **settings: Any
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.adapters: dict[str, dict[str, LoRALayer]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.biases: dict[str | None, dict[str, Tensor]] = {}
        """Values of the biases each adapter trains, and those of the base (None), of all that are
        not in use."""
        self.active: str | None = None
        self.add("default", include, exclude, **settings)

    def add(
        self,
        name: str,
        include: Rule,
        exclude: Rule = (),
        use_dora: bool = False,
        bias: Bias = "none",
        **settings: Any,
    ) -> None:
        """One more adapter, fresh, and put it to use. ValueError for a name that is taken, or an
        unknown `bias`."""
        if name in self.adapters or bias not in ("none", "all", "lora_only"):
            raise ValueError(
                f"the adapter {name} is there already, or bias {bias} is not none, all or lora_only"
            )
        using = self.active
        self.use(None)
        try:
            self.adapters[name] = self._layers(
                include, exclude, DORA if use_dora else LORA, settings
            )
            self.settings[name] = {"use_dora": use_dora, "bias": bias, **settings}
            self.biases[name] = {
                path: tensor.detach().clone() for path, tensor in self.trained_biases(name).items()
            }
            using = name
        finally:
            self.use(using)

    def _layers(
        self,
        include: Rule,
        exclude: Rule,
        adapted: Mapping[Any, type[LoRALayer]],
        settings: Mapping[str, Any],
    ) -> dict[str, LoRALayer]:
        """A fresh layer around each module that is meant, by its path in the bare base."""
        owners = Counter(
            id(tensor) for _, tensor in self.model.named_parameters(remove_duplicate=False)
        )
        layers = dict[str, LoRALayer]()
        for path, module in self.model.named_modules():
            if matches(path, include) and not matches(path, exclude):
                if type(module) not in adapted:
                    raise ValueError(
                        f"{path} is a {type(module).__name__}: no Linear, Embedding or Conv2d"
                    )
                if owners[id(module.weight)] > 1:
                    raise ValueError(
                        f"the weight of {path} serves another module too: both would change on "
                        "merging"
                    )
                layers[path] = adapted[type(module)](module, **settings)
        if not layers:
            raise ValueError(f"no module matches {include}")
        return layers

    def trained_biases(self, name: str) -> dict[str, nn.Parameter]:
        """The base's biases that adapter `name` trains, by path in the bare base (which must be
        bare)."""
        adapted, bias = self.adapters[name], self.settings[name]["bias"]
        biases = {
            path: tensor
            for path, tensor in self.model.named_parameters()
            if path.split(".")[-1] == "bias"
        }
        return {
            path: tensor
            for path, tensor in biases.items()
            if bias == "all" or (bias == "lora_only" and path.rpartition(".")[0] in adapted)
        }

    def use(self, name: str | None) -> None:
        """Put adapter `name` into the tree, or take out the one that is in (None: the bare base).
        KeyError, and nothing changed, for a name that is not there."""
        adding = self.adapters[name] if name is not None else {}
        if self.active is not None:
            for path, layer in self.adapters[self.active].items():
                layer.unmerge()
                self.model.set_submodule(path, layer.base)
            self.swap_biases(self.active, None)
        self.active = name
        if name is not None:
            self.swap_biases(None, name)
            for path, layer in adding.items():
                self.model.set_submodule(path, layer.train(self.model.training))

    @torch.no_grad()
    def swap_biases(self, out: str | None, into: str | None) -> None:
        """Keep the biases in the tree as those of `out`, and put those of `into` in their place."""
        adapter = out if out is not None else into
        assert adapter is not None
        parameters = self.trained_biases(adapter)
        self.biases[out] = {path: tensor.detach().clone() for path, tensor in parameters.items()}
        for path, tensor in parameters.items():
            tensor.copy_(self.biases[into][path])
            tensor.requires_grad_(into is not None)
            tensor.grad = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def summary(self) -> str:
        """`trainable: 1,024 of 9,216 parameters (11.11 %) in 2 modules`."""
        trainable = sum(tensor.numel() for tensor in self.parameters() if tensor.requires_grad)
        total = sum(tensor.numel() for tensor in self.parameters())
        modules = len(self.adapters[self.active]) if self.active else 0
        share = f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"
        return f"trainable: {share} in {modules} modules"

    def merge(self) -> nn.Module:
        """The plain model, with the adapter in use merged into its weights; this object is of no
        further use."""
        layers = self.adapters[self.active] if self.active else {}
        for path, layer in layers.items():
            layer.merge()
            self.model.set_submodule(path, layer.base)
        self.active = None
        return self.model.requires_grad_(False)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What the adapter in use trains, by its names in PEFT's files; ValueError when none is in
        use."""
        if self.active is None:
            raise ValueError("no adapter is in use")
        layers, tensors = self.adapters[self.active], dict[str, nn.Parameter]()
        for path, layer in layers.items():
            embedding = isinstance(layer.base, nn.Embedding)
            names = (
                ("lora_embedding_A", "lora_embedding_B")
                if embedding
                else ("lora_A.weight", "lora_B.weight")
            )
            tensors |= {f"{path}.{names[0]}": layer.lora_A, f"{path}.{names[1]}": layer.lora_B}
            if isinstance(layer, DoRA):
                tensors[f"{path}.lora_magnitude_vector"] = layer.magnitude
        for path in self.biases[self.active]:
            owner = path.removesuffix("bias").removesuffix(".")
            adapted = owner in layers
            name = f"{owner}.base_layer.bias" if adapted else path
            tensors[name] = layers[owner].base.bias if adapted else self.model.get_parameter(path)
        return {PREFIX + path: tensor for path, tensor in tensors.items()}

    def save_adapter(self, folder: Path) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them, of the
        adapter in use."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().contiguous() for name, tensor in self.adapter_tensors().items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = dict(self.settings[str(self.active)])
        config = {
            "peft_type": "LORA",
            "target_modules": "|".join(map(re.escape, self.adapters[str(self.active)])),
            **{key: settings[key] for key in ("r", "lora_alpha", "use_dora", "bias")},
            "lora_dropout": settings.get("lora_dropout", 0.0),
            "use_rslora": settings.get("use_rslora", False),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))

    @torch.no_grad()
    def load_adapter(self, folder: Path, name: str) -> None:
        """Add the adapter of `folder`, ours or PEFT's, as `name` and put it to use.

        ValueError, and the adapter in use stays, for one that trained what the reference does not
        have.
        """
        config = json.loads((folder / "adapter_config.json").read_text())
        beyond = [field for field in BEYOND if config.get(field)]
        if beyond or not isinstance(config.get("init_lora_weights", True), bool):
            raise ValueError(
                f"{folder} has {', '.join(beyond) or config['init_lora_weights']}: not covered"
            )
        keys = ("use_dora", "bias", "r", "lora_alpha", "lora_dropout", "use_rslora")
        before, stored = self.active, load_file(folder / "adapter_model.safetensors")
        self.add(
            name,
            config["target_modules"],
            config.get("exclude_modules") or (),
            **{k: config[k] for k in keys},
        )
        tensors = self.adapter_tensors()
        if {path: tensor.shape for path, tensor in tensors.items()} != {
            path: t.shape for path, t in stored.items()
        }:
            self.use(before)
            del self.adapters[name], self.settings[name], self.biases[name]
            raise ValueError(f"the tensors of {folder} are not those its configuration describes")
        for path, tensor in tensors.items():
            tensor.copy_(stored[path])

    def save_merged(self, path: Path) -> None:
        """Write the merged model's tensors as safetensors; the model in memory stays as it is."""
        merged = copy.deepcopy(self).merge().state_dict()
        save_file(
            {name: tensor.clone() for name, tensor in merged.items()},
            path,
            metadata={"format": "pt"},
        )
