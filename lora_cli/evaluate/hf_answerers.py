"""Models in transformers that answer: one that goes on with a conversation, and one that reads a
text and writes another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lora_cli.common import LoraError, quote, ui
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.loaded_bases import Bases, Stored
from lora_cli.models import answering, chat_template, decoder
from lora_cli.speed import dora_norms

BATCH = 16
HARMLESS = frozenset(
    "bos_token_id cache_implementation decoder_start_token_id do_sample eos_token_id "
    "_from_model_config max_length max_new_tokens min_p num_beams num_return_sequences "
    "output_attentions output_hidden_states output_logits output_scores pad_token_id "
    "prompt_lookup_num_tokens return_dict_in_generate return_legacy_cache temperature top_k top_p "
    "transformers_version use_cache".split()
)
"""Settings of a generation config that leave a greedy answer the likeliest token each time."""


class _Streamer(TextStreamer):
    """Shows the words of an answer as they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **given: Any) -> None:
        super().__init__(tokenizer, **given)
        self.shown = ui.Answer()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece."""
        self.shown.add(text)
        if stream_end:
            self.shown.end()


class HFAnswerer:
    """A transformers model, with one of its adapters switched on, or none."""

    def __init__(
        self,
        bases: Bases,
        key: Stored,
        adapter: str | None,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int] = (),
    ) -> None:
        self.bases, self.key, self.adapter, self.tokenizer, self.stops = (
            bases,
            key,
            adapter,
            tokenizer,
            stops,
        )

    @property
    def chat_template(self) -> str | None:
        """That of the tokenizer."""
        return chat_template.find_template(self.tokenizer)

    @property
    def reads_tools(self) -> bool:
        """By the template for conversations with tools."""
        return chat_template.reads_tools(chat_template.find_template(self.tokenizer, [{}]))

    def answer(self, conversations: Sequence[Asked], sampling: Sampling) -> list[str]:
        """Greedy or sampled answers, `BATCH` conversations at a time."""
        answers: list[str] = []
        for batch in self._make_batches(conversations, sampling):
            answers += [each.text for each in self.write(batch, sampling)]
        return answers

    def _make_batches(
        self, conversations: Sequence[Asked], sampling: Sampling
    ) -> Iterator[list[Asked]]:
        """Yield the conversations in their order. One that leaves less than room for a whole answer
        is alone: the others of a batch would have no more than it."""
        batch = list[Asked]()
        for each in conversations:
            is_cramped = self._is_cramped(each, sampling)
            if batch and (is_cramped or len(batch) == BATCH):
                yield batch
                batch = []
            batch.append(each)
            if is_cramped:
                yield batch
                batch = []
        if batch:
            yield batch

    def _is_cramped(self, conversation: Asked, sampling: Sampling) -> bool:
        if self.positions is None:
            return False
        return len(self.encode(conversation)) + sampling.max_new_tokens > self.positions

    def write(self, conversations: Sequence[Asked], sampling: Sampling) -> list[decoder.Written]:
        """Answers with whether each ended by itself; all that are given are one batch."""
        return self._generate([self.encode(asked) for asked in conversations], sampling)

    def read(self, ids: Sequence[int]) -> str:
        """As the tokenizer has it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def takes_likeliest(self) -> bool:
        """By the generation config, since a penalty, beams or the like have their way also in
        greedy answers; and only where positions turn by the same angles in a text of any length."""
        asked = self.network.generation_config.to_diff_dict().keys()
        return asked <= HARMLESS and not self._has_angles_by_length()

    def _has_angles_by_length(self) -> bool:
        config = self.network.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        every = [rope, *(each for each in rope.values() if isinstance(each, dict))]
        return any(each.get("rope_type") in ("dynamic", "longrope") for each in every)

    def list_special(self) -> frozenset[int]:
        """List the tokens that are left out of a text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {
            number for number, token in added if token.special
        }

    @property
    def network(self) -> PreTrainedModel | PeftModel:
        """The model with its adapters."""
        return self.bases.loaded[self.key]

    @property
    def positions(self) -> int | None:
        """Those of its configuration."""
        config = self.network.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def stream(self, conversation: Asked, sampling: Sampling) -> str:
        """One answer, printed as it comes."""
        streamer = _Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        [written] = self._generate([self.encode(conversation)], sampling, streamer=streamer)
        return written.text

    def encode(self, asked: Asked) -> list[int]:
        """Return the prompt of a conversation as token ids. Raises LoraError where the model holds
        no conversation."""
        messages = asked.messages
        if self.chat_template is None and len(messages) > 1:
            name = self.key.base.name
            raise LoraError(
                f"{name} has no chat template: it cannot hold a conversation",
                f"lora generate {quote(name)} --prompt TEXT",
            )
        return answering.encode_conversation(self.tokenizer, messages, asked.tools)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **kwargs: Any
    ) -> list[decoder.Written]:
        """Return the texts of what is written, and whether each ended by itself."""
        ends = set(self.list_ends())
        written = self.write_ids(prompts, sampling, **kwargs).tolist()
        return [decoder.Written(self.read(row), not ends.isdisjoint(row)) for row in written]

    def write_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **kwargs: Any
    ) -> torch.Tensor:
        """Return the token ids (prompts × longest answer) that are written after prompts, each up
        to one that ends an answer, filled with padding after it.

        The prompts are padded on the left, with the pads masked. `kwargs` are generate's. Raises
        TooLongError.
        """
        weights, pad = self.network, answering.find_padding(self.tokenizer)
        width = max(map(len, prompts))
        room = answering.limit_answer(width, self.positions, sampling.max_new_tokens)
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts],
            device=weights.device,
        )
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=weights.device
        )
        drawing = (
            {"do_sample": False}
            if sampling.is_greedy
            else {"do_sample": True, "temperature": sampling.temperature}
        )
        # a token is computed with the same norms as the one before
        norms = dora_norms.keep_norms(dora_norms.find_layers(weights))
        with torch.inference_mode(), self.switched(), norms:
            output = weights.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room,
                eos_token_id=self.list_ends(),
                pad_token_id=pad,
                tokenizer=self.tokenizer,  # it finds a generation config's stop strings
                **answering.ONE_TEXT,
                **drawing,
                **kwargs,
            )
        return output[:, width:]

    def list_ends(self) -> list[int]:
        """List the tokens that end an answer: the tokenizer's, those of training, and those of
        the generation config."""
        return answering.find_ends(self.bases.loaded[self.key], self.tokenizer, self.stops)

    def switched(self) -> AbstractContextManager[None]:
        """Its own adapter on inside, or none."""
        weights = self.network
        if not isinstance(weights, PeftModel):
            return nullcontext()
        if self.adapter is None:
            return weights.disable_adapter()
        weights.set_adapter(self.adapter)
        return nullcontext()


class PairAnswerer(HFAnswerer):
    """A model that reads a text and writes another: one question is its source."""

    prefix = ""
    """What each source began with in training."""

    @property
    def chat_template(self) -> str | None:
        """None: it reads texts."""
        return None

    @property
    def reads_tools(self) -> bool:
        """Never: it reads texts."""
        return False

    def _is_cramped(self, conversation: Asked, sampling: Sampling) -> bool:
        return False  # an answer has positions of its own

    def encode(self, asked: Asked) -> list[int]:
        """Return a source as token ids, after what each began with in training."""
        if len(asked.messages) > 1:
            raise LoraError(
                "this model reads a text and writes another: it holds no conversation",
                "lora generate PATH --prompt TEXT",
            )
        ids = self.tokenizer(self.prefix + asked.messages[0]["content"])["input_ids"]
        return list(ids)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **kwargs: Any
    ) -> list[decoder.Written]:
        """Generate from sources that are padded at their ends, as in training."""
        weights = self.network
        positions = decoder.find_room(weights.config, of_target=False)
        longest = max(map(len, prompts))
        if positions is not None and longest > positions:
            raise answering.TooLongError(
                f"the text has {longest} tokens, and the model reads {positions}",
                "shorten it, or take a model that reads more",
                longest,
            )
        sources = decoder.pad_sources(self.tokenizer, prompts, weights.device)
        if not sampling.is_greedy:
            kwargs |= {"do_sample": True, "temperature": sampling.temperature}
        norms = dora_norms.keep_norms(dora_norms.find_layers(weights))
        with self.switched(), norms:
            return decoder.write_targets(
                weights, self.tokenizer, sources, sampling.max_new_tokens, **kwargs
            )
