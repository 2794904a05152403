"""Tell the part of a base that texts pass through from its towers for pictures and sound."""

from __future__ import annotations

from transformers import PreTrainedModel

from lora_cli.models.head import find_task_of


def find_text_part(model: PreTrainedModel) -> str:
    """Return what the names of the text model's modules begin with, such as
    `model.language_model.`; empty where all of the model is for its task's input."""
    if find_task_of(model).reads_pictures:
        return ""
    if model.config.get_text_config() is model.config:
        return ""
    text = model.get_decoder()
    inside = [name for name, module in model.named_modules() if module is text and name]
    return f"{inside[0]}." if inside else ""


def count_text_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of the text model and its head, each once."""
    text, head = find_text_part(model), model.get_output_embeddings()
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(text) or id(parameter) in own
    )
