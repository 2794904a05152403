"""The head of a model that does not write text: what its class has and the base's files lack.

transformers fills what files lack with random numbers, and says so in a log. PEFT trains and saves
heads by names of its own, which miss those of many families: the adapter that is saved is then not
the one that was trained. What is missing is told here by loading the files without their content.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lora_cli.common import LoraError, files
from lora_cli.models import quantised
from lora_cli.recipe import Task, recognise_task

CONFIG = "config.json"


class HeadSettings(NamedTuple):
    """What a head has to know that its base's configuration does not say."""

    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    """transformers' name of what the labels are: one for each text, several, or numbers."""
    pad_token_id: int | None = None
    """The token that fills short rows: by it, decoders find where a text ends."""

    def write_into(self, config: PretrainedConfig) -> None:
        """Set the fields of a model's configuration."""
        if self.labels:
            config.num_labels = len(self.labels)
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: number for number, name in enumerate(self.labels)}
        if self.problem_type is not None:
            config.problem_type = self.problem_type
        for each in {id(part): part for part in (config, config.get_text_config())}.values():
            if self.pad_token_id is not None:
                each.pad_token_id = self.pad_token_id
            elif getattr(each, "pad_token_id", None) is None:
                ends = getattr(each, "eos_token_id", None)
                each.pad_token_id = ends[0] if isinstance(ends, list) else ends

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> HeadSettings:
        """Return those that a config.json has."""
        names = config.get("id2label") or {}
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        return cls(labels, config.get("problem_type"), config.get("pad_token_id"))


class Head(NamedTuple):
    """What a model's class has beyond its base's files."""

    modules: tuple[str, ...]
    """The outermost modules that the files lack, or that PEFT trains whole in any case."""
    left_over: tuple[str, ...]
    """Tensors of the files that the model has no place for: the head of another task."""


def find_head(network: PreTrainedModel, report: Mapping[str, Any], task: Task, name: str) -> Head:
    """Return the head of a model of `task`, of which transformers reports what it did not find in
    the files of the base `name`. Raises LoraError where these lack what is the base's own."""
    parameters = [key for key, _ in network.named_parameters()]
    missing = {_name_key(key) for what in LACKING for key in report[what]} & set(parameters)
    modules = _find_outermost(network, missing, parameters)
    _refuse_lack(network, modules, missing, name)
    _refuse_lack_of_statistics(network, modules, report, name)
    left_over = tuple(sorted(map(_name_key, report["unexpected_keys"])))
    _refuse_foreign(network, left_over, name)
    taken = [
        path
        for path, module in network.named_modules()
        if _is_head(path, network, task)
        and not _is_inside(path, modules)
        and any(True for _ in module.parameters())
    ]
    return Head((*modules, *taken), left_over)


def _is_head(path: str, network: PreTrainedModel, task: Task) -> bool:
    """Return whether a module is trained whole in any case: what PEFT calls a head or, for a task
    that it has no name for, what stands beside the base and has an output for each label."""
    if task.peft_type is not None:
        return path.rpartition(".")[2] in task.peft_heads
    if not path or "." in path or path == _name_base(network):
        return False
    weights = network.get_submodule(path).parameters()
    return any(each.dim() > 1 and len(each) == network.config.num_labels for each in weights)


def _name_base(network: PreTrainedModel) -> str:
    """Return the child that is the base, by transformers' name for it or, where that is another
    one, by its size."""
    children = dict(network.named_children())
    if network.base_model_prefix in children:
        return network.base_model_prefix
    return max(children, key=lambda name: sum(each.numel() for each in children[name].parameters()))


def find_statistics(network: nn.Module) -> list[str]:
    """Return the modules that keep a mean and a variance of what has passed through them, such as
    BatchNorm's: training changes these, and they are no parameters."""
    return [
        path
        for path, module in network.named_modules()
        if STATISTICS in dict(module.named_buffers(recurse=False))
    ]


STATISTICS = "running_mean"
"""What torch calls such a mean; running_var is beside it."""


def shorten_names(network: nn.Module, modules: Iterable[str]) -> list[str]:
    """Return how modules are named together: by the shortest ends of their names that no other
    module has, nor that a longer step ends in, which PEFT takes for the same."""
    wanted = set(modules)
    names = [path for path, _ in network.named_modules() if path]
    found: dict[str, None] = {}
    for path in sorted(wanted):
        steps = path.split(".")
        ends = (".".join(steps[at:]) for at in range(len(steps) - 1, 0, -1))
        found[next((end for end in ends if _means_only(end, wanted, names)), path)] = None
    return list(found)


def find_alike(network: nn.Module, head: Iterable[str]) -> list[str]:
    """Return the norms that PEFT trains whole because their names end as that of a head's module
    does: it does not look where a step begins."""
    found = [
        path
        for path, _ in network.named_modules()
        if path.endswith(tuple(head)) and not _is_inside(path, head)
    ]
    sizes = {
        path: [each.dim() for each in network.get_submodule(path).parameters()] for path in found
    }
    return [path for path, dimensions in sizes.items() if dimensions and max(dimensions) == 1]


def _means_only(end: str, wanted: set[str], names: Iterable[str]) -> bool:
    return all(
        name in wanted and (name == end or name.endswith(f".{end}"))
        for name in names
        if name.endswith(end)
    )


LACKING = ("missing_keys", "mismatched_keys")


def list_lacking(network: PreTrainedModel, report: Mapping[str, Any]) -> list[str]:
    """Return the parameters of a model that transformers did not find in its files."""
    missing = {_name_key(key) for what in LACKING for key in report[what]}
    return sorted(missing.intersection(key for key, _ in network.named_parameters()))


def _name_key(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _find_outermost(
    network: PreTrainedModel, missing: set[str], parameters: Iterable[str]
) -> tuple[str, ...]:
    """Return the largest modules of which every parameter is missing, the base itself excepted."""
    there = [key for key in parameters if key not in missing]
    whole = {network.base_model_prefix, ""}
    found: dict[str, None] = {}
    for key in sorted(missing):
        module = key.rpartition(".")[0]
        while (parent := module.rpartition(".")[0]) not in whole and not any(
            key.startswith(f"{parent}.") for key in there
        ):
            module = parent
        found[module] = None
    return tuple(found)


def _refuse_lack(
    network: PreTrainedModel, modules: Iterable[str], missing: set[str], name: str
) -> None:
    """Raise LoraError where a layer or the embeddings are missing: the base's, and no head's."""
    inside = f"{network.base_model_prefix}."
    for path in modules:
        module = network.get_submodule(path)
        own = [
            *(part for part in path.split(".") if part.isdigit()),
            *(each for each in module.modules() if isinstance(each, (nn.Embedding, nn.ModuleList))),
        ]
        if path.startswith(inside) and own:
            key = next(key for key in sorted(missing) if _is_inside(key, [path]))
            kind = type(network).__name__
            raise LoraError(
                f"the weights of {name} do not fit {kind}: {len(missing)} are missing, such as "
                f"{key}",
                "take a base whose files have them: transformers would fill them with random "
                "numbers",
            )


def _refuse_lack_of_statistics(
    network: PreTrainedModel, head: Iterable[str], report: Mapping[str, Any], name: str
) -> None:
    """Raise LoraError where a mean or variance of the base is missing, which transformers fills
    with 0 or 1."""
    missing = {_name_key(key) for what in LACKING for key in report[what]}
    own = [path for path in find_statistics(network) if not _is_inside(path, head)]
    kept = [f"{path}.{what}" for path in own for what in KEPT]
    if lost := sorted(missing.intersection(kept)):
        raise LoraError(
            f"the weights of {name} do not fit {type(network).__name__}: {len(lost)} of the means "
            f"and variances that it keeps are missing, such as {lost[0]}",
            "take a base whose files have them",
        )


KEPT = (STATISTICS, "running_var")


def _refuse_foreign(network: PreTrainedModel, left_over: Iterable[str], name: str) -> None:
    """Raise LoraError where files have layers that the model has not."""
    prefix = f"{network.base_model_prefix}."
    children = {path for path, _ in network.base_model.named_children()}
    for key in left_over:
        steps = key.removeprefix(prefix).split(".")
        if steps[0] in children and any(step.isdigit() for step in steps):
            raise LoraError(
                f"the weights of {name} do not fit its configuration: it has no place for {key}",
                "config.json and the weights must be of one model",
            )


def save_head_config(network: PreTrainedModel, folder: Path) -> None:
    """Write config.json beside an adapter of a task that has a head: its labels, what they are, and
    the class that loads it. PEFT writes none, and would take the number of labels from the base."""
    if find_task_of(network).writes_text:
        return
    config = quantised.without_quantisation(copy.deepcopy(network.config))
    config.architectures = [type(network).__name__]
    config.save_pretrained(str(folder))


def find_task_of(model: nn.Module) -> Task:
    """Return the task of a model, adapted or not, by its class."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    return recognise_task([type(network).__name__])


def read_settings(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], task: Task
) -> HeadSettings | None:
    """Return what the head of the adapter in a folder has to know: from the config.json beside it,
    else, for one made elsewhere, the number of outputs that its tensors of these shapes have."""
    if task.writes_text:
        return None
    if (folder / CONFIG).is_file():
        config = files.read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise LoraError(f"{folder / CONFIG} is no configuration", "copy it again")
        try:
            found = HeadSettings.of_config(config)
            return found if task.counts_labels else found._replace(labels=())
        except (ValueError, TypeError, AttributeError) as error:
            raise LoraError(
                f"{folder / CONFIG}: id2label does not number the labels", "copy it again"
            ) from error
    if not task.counts_labels:
        return HeadSettings()
    sizes = [shape[0] for key, shape in shapes.items() if _is_last_of_head(key, len(shape), task)]
    return HeadSettings(tuple(f"LABEL_{number}" for number in range(sizes[-1])) if sizes else ())


def _is_last_of_head(key: str, dimensions: int, task: Task) -> bool:
    """Return whether a tensor is the weight of the module that has an output for each label."""
    steps = key.split(".")
    if task.peft_type is None:  # whose heads have names of their own
        return steps[-1] == "weight" and dimensions == 2 and "lora_" not in key
    ends = (*task.peft_heads, "out_proj")
    return steps[-1] == "weight" and "lora_A" not in key and any(end in steps for end in ends)
