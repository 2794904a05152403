"""What a model that writes is fed to answer, where its answer ends, and how long that may be: the
same where adapters are tried, and amid their training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.common import LoraError
from lora_cli.models import chat_template

ONE_TEXT: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None,
}  # fmt: skip
"""Options of `generate` by which it returns token ids, a row for each prompt, written one after the
other, whatever a model's generation config asks for: beams cannot be shown as they come, and of two
texts of a prompt one would stand in the place of the next prompt's."""


class TooLongError(LoraError):
    """A conversation that leaves no room for an answer in what the model can read: its prompt has
    `length` tokens."""

    def __init__(self, message: str, hint: str, length: int) -> None:
        super().__init__(message, hint)
        self.length = length


def limit_answer(longest: int, positions: int | None, wanted: int) -> int:
    """Return how many tokens an answer may have, `wanted` at most, after a prompt of `longest`
    tokens: beyond its `positions` a model answers at random, and does not say so.

    Raises TooLongError where the prompt fills them.
    """
    if positions is None:
        return wanted
    if longest >= positions:
        raise TooLongError(
            f"the prompt has {longest} tokens, and prompt and answer together may have {positions}",
            "shorten it, or take a model that reads more",
            longest,
        )
    return min(wanted, positions - longest)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
) -> list[int]:
    """Return the tokens after which the model is to answer: of the conversation in its chat
    template, with the roles that training gives it, or without one of the last message."""
    if chat_template.find_template(tokenizer) is None:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    source = chat_template.find_template(tokenizer, tools) or ""
    fitted = chat_template.fit_roles(source, messages)
    text = chat_template.render(tokenizer, fitted, tools, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def find_ends(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, those of training (`stops`), and those
    of the generation config."""
    configured = network.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    every = [tokenizer.eos_token_id, *stops, *more]
    return sorted({token for token in every if token is not None})


def find_padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills short prompts and answers; any will do, since they are masked."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def write_answer(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    most: int,
    stops: Sequence[int],
) -> str:
    """Return what a model in eval mode answers to one prompt, greedily, in `most` tokens at most;
    "" where the prompt leaves no room. Nothing is padded."""
    ids = encode_conversation(tokenizer, [{"role": "user", "content": prompt}])
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    try:
        room = limit_answer(len(ids), positions, most)
    except TooLongError:
        return ""
    given = torch.tensor([ids], device=network.device)
    made = network.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=room,
        eos_token_id=find_ends(network, tokenizer, stops),
        pad_token_id=find_padding(tokenizer),
        do_sample=False,
        use_cache=True,
        tokenizer=tokenizer,  # by which a generation config's stop strings are found
        **ONE_TEXT,
    )
    return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
