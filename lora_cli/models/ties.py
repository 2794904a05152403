"""Find the weights that several modules have in common: embeddings of encoder, decoder and head."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_cli.models.tensors import Tensors, split_rows


def find_shared(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of the modules that share a weight with embeddings or head, those of each
    weight by themselves: of T5 all four, of a decoder with tied ends two."""
    head = model.get_output_embeddings()
    ends = [head]
    if model.config.is_encoder_decoder:
        sides = (model.get_encoder(), model.get_decoder())
        ends += [model.get_input_embeddings(), *(side.get_input_embeddings() for side in sides)]
    elif head is not None:
        ends.append(model.get_input_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    different = {id(weight): weight for weight in weights if isinstance(weight, torch.Tensor)}
    modules = dict(model.named_modules())
    found = [find_sharing(modules, weight) for weight in different.values()]
    return [names for names in found if len(names) > 1]


def list_shared(names: Sequence[str]) -> str:
    """Return modules that share a weight, in words."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def find_sharing(modules: Mapping[str, nn.Module], weight: torch.Tensor | None) -> list[str]:
    """Return the modules that have this very tensor as their weight."""
    if weight is None:
        return []
    return [name for name, module in modules.items() if getattr(module, "weight", None) is weight]


def find_parted(network: PreTrainedModel, stored: Tensors) -> tuple[str, ...]:
    """Return the parameters that a model's class ties to others and its files hold with values of
    their own, as the head of T5 v1.1: transformers leaves those alone."""
    both = [
        (target, source)
        for target, source in network.all_tied_weights_keys.items()
        if target in stored.entries and source in stored.entries
    ]
    return tuple(target for target, source in both if not _are_equal(stored, target, source))


def _are_equal(stored: Tensors, name: str, other: str) -> bool:
    shapes = [stored.entries[each].shape for each in (name, other)]
    if shapes[0] != shapes[1]:
        return False
    return all(
        torch.equal(stored.rows(name, start, stop), stored.rows(other, start, stop))
        for start, stop in split_rows(shapes[0])
    )


def part(network: PreTrainedModel, names: Iterable[str]) -> None:
    """Give these parameters of a model without weights a place of their own."""
    apart = list(names)
    for name in apart:
        module, _, leaf = name.rpartition(".")
        shared = network.get_parameter(name)
        own = nn.Parameter(torch.empty_like(shared), shared.requires_grad)
        setattr(network.get_submodule(module), leaf, own)
    keep_apart(network, apart)


def find_left_apart(network: PreTrainedModel) -> list[str]:
    """Return the parameters of a loaded model that its configuration ties and transformers has left
    as its files hold them."""
    meant = network.get_expanded_tied_weights_keys(all_submodels=True)
    return [name for name in meant if name not in network.all_tied_weights_keys]


def keep_apart(network: PreTrainedModel, names: Collection[str]) -> None:
    """Keep transformers from tying these parameters after all when the embeddings grow, or when the
    model is loaded from what it is saved as.

    With an encoder the configuration goes on to say that they are tied: T5 scales what goes into
    its head by that.
    """
    if not names:
        return
    meant = network.get_expanded_tied_weights_keys(all_submodels=True)
    kept = {target: source for target, source in meant.items() if target not in names}
    network._tied_weights_keys, network.all_tied_weights_keys = kept, dict(kept)
    if not network.config.is_encoder_decoder:
        for config in (network.config, network.config.get_text_config()):
            config.tie_word_embeddings = False
