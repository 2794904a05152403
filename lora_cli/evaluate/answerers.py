"""Answer conversations with a base, an adapter, a merged model or a GGUF file.

Adapters of one base share it: it is loaded once, and the adapters are switched on it, or off for
the base itself. Each conversation is rendered by the chat template saved with the model that
answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lora_cli.common import LoraError, quote, ui
from lora_cli.gguf import engine
from lora_cli.models import (
    Adapter,
    Base,
    answering,
    attach,
    chat_template,
    decoder,
    load_tokenizer,
    names,
    read_adapter,
    read_merged_recipe,
    to_accelerator,
)
from lora_cli.recipe import Task
from lora_cli.speed import dora_norms

TooLongError, limit_answer = answering.TooLongError, answering.limit_answer
Messages = list[dict[str, Any]]
BATCH = 16
COLDEST = 1e-9
"""The least temperature that differs from 0: below it even logits that lie one step of float32
apart, 1e-7 about 1, are e^-100 in probability, and the others overflow."""

HARMLESS = frozenset(
    "bos_token_id cache_implementation decoder_start_token_id do_sample eos_token_id "
    "_from_model_config max_length max_new_tokens min_p output_attentions output_hidden_states "
    "output_logits output_scores pad_token_id return_dict_in_generate return_legacy_cache "
    "temperature top_k top_p transformers_version use_cache".split()
)
"""Settings of a generation config that leave a greedy answer the likeliest token each time."""


class Asked(NamedTuple):
    """A conversation that waits for an answer, and the tools that may be called in it."""

    messages: Messages
    tools: list[Any] | None = None


class Sampling(NamedTuple):
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < COLDEST


class Answerer(Protocol):
    """Anything that answers conversations by its `chat_template`."""

    @property
    def chat_template(self) -> str | None:
        """The template, as text."""

    def answer(self, conversations: Sequence[Asked], sampling: Sampling) -> list[str]:
        """One answer each."""

    def write(self, conversations: Sequence[Asked], sampling: Sampling) -> list[decoder.Written]:
        """One answer each, with whether it ended by itself; all that are given are one batch."""

    def encode(self, asked: Asked) -> list[int]:
        """The tokens that the model reads before it answers."""

    def read(self, ids: Sequence[int]) -> str:
        """The text of a whole answer that has these tokens, the last of which ends it."""

    @property
    def takes_likeliest(self) -> bool:
        """Whether a greedy answer is the likeliest token each time, and nothing weighs it first."""

    @property
    def positions(self) -> int | None:
        """How many tokens prompt and answer may have together; None where nothing limits it."""

    def stream(self, conversation: Asked, sampling: Sampling) -> str:
        """Print one answer to stdout as it comes, and return it."""


class Stored(NamedTuple):
    """What two answerers must agree in to share the weights of one loaded base."""

    base: Base
    dtype: torch.dtype
    quantization: str | None = None
    """The settings of its 4-bit storage, as text."""
    alone: Path | None = None
    """The adapter that changes the base's own weights, and so has it for itself."""


class Bases:
    """Base models loaded so far; each at most once."""

    def __init__(self) -> None:
        self.loaded: dict[Stored, PreTrainedModel | PeftModel] = {}

    @staticmethod
    def key(adapter: Adapter) -> Stored:
        """Return what the adapter's base is loaded as."""
        quantization = str(adapter.quantization) if adapter.quantization else None
        alone = None if adapter.shares_base else adapter.folder
        return Stored(adapter.base, adapter.trained_dtype, quantization, alone)

    def with_adapter(self, adapter: Adapter, name: str) -> Stored:
        """Load the adapter on its base under `name`; return the base's key."""
        key = self.key(adapter)
        base = self.loaded.get(key)
        if base is None:
            base = adapter.load_base()
            base = base if adapter.quantization else to_accelerator(base)
        base = attach.load_adapter(base, adapter.folder, name)
        dora_norms.install(base)
        self.loaded[key] = base.eval()
        return key

    def bare(self, adapter: Adapter) -> Stored:
        """Load the base of an adapter as training did, shared with adapters on it; return its
        key."""
        key = self.key(adapter)._replace(alone=None)
        if key not in self.loaded:
            base = adapter.load_base()
            self.loaded[key] = (base if adapter.quantization else to_accelerator(base)).eval()
        return key

    def plain(self, name: str) -> Stored:
        """Load a model without adapter, or take a base that is loaded already in its own type;
        return its key."""
        base = Base.of_model(name)
        wanted = Stored(base, base.dtype)
        for key in self.loaded:
            if key.base.name == name and key[1:] == wanted[1:]:
                return key
        self.loaded[wanted] = to_accelerator(base.load()).eval()
        return wanted


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
            raise LoraError(
                "this model has no chat template: it cannot hold a conversation",
                "lora generate PATH",
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
        weights, tokenizer = self.network, self.tokenizer
        room = limit_answer(max(map(len, prompts)), self.positions, sampling.max_new_tokens)
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        width = max(map(len, prompts))
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
            raise TooLongError(
                f"the text has {longest} tokens, and the model reads {positions}",
                "shorten it, or take a model that reads more",
            )
        sources = decoder.pad_sources(self.tokenizer, prompts, weights.device)
        if not sampling.is_greedy:
            kwargs |= {"do_sample": True, "temperature": sampling.temperature}
        norms = dora_norms.keep_norms(dora_norms.find_layers(weights))
        with self.switched(), norms:
            return decoder.write_targets(
                weights, self.tokenizer, sources, sampling.max_new_tokens, **kwargs
            )


class GGUFAnswerer:
    """A GGUF file in llama.cpp, with the chat template embedded in the file."""

    def __init__(self, path: Path) -> None:
        self.model = engine.GGUFModel(path)

    @property
    def chat_template(self) -> str | None:
        """That embedded in the file."""
        return self.model.chat_template

    def answer(self, conversations: Sequence[Asked], sampling: Sampling) -> list[str]:
        """One after the other."""
        return [each.text for each in self.write(conversations, sampling)]

    def write(self, conversations: Sequence[Asked], sampling: Sampling) -> list[decoder.Written]:
        """One after the other."""
        return [
            decoder.Written(*self.model.write(*self._make_prompt(asked, sampling)))
            for asked in conversations
        ]

    def encode(self, asked: Asked) -> list[int]:
        """Return the prompt of a conversation as token ids."""
        return self.model.encode(self.model.render(*asked))

    def read(self, ids: Sequence[int]) -> str:
        """As llama.cpp has it, without the token that ends it."""
        return self.model.detokenize(ids[:-1])

    @property
    def takes_likeliest(self) -> bool:
        """By the settings that the file brings."""
        return self.model.takes_likeliest

    @property
    def positions(self) -> int | None:
        """Those of the model, and of the context that it is opened with."""
        return min(self.model.metadata["n_ctx_train"], engine.CONTEXT)

    def stream(self, conversation: Asked, sampling: Sampling) -> str:
        """One answer, printed as it comes."""
        pieces, shown = [], ui.Answer()
        for piece in self.model.stream(*self._make_prompt(conversation, sampling)):
            shown.add(piece)
            pieces.append(piece)
        shown.end()
        return "".join(pieces)

    def _make_prompt(self, asked: Asked, sampling: Sampling) -> tuple[list[int], int, float]:
        """Return the prompt's tokens, how many tokens its answer may have, and the temperature."""
        prompt = self.encode(asked)
        room = limit_answer(len(prompt), self.positions, sampling.max_new_tokens)
        return prompt, room, 0.0 if sampling.is_greedy else sampling.temperature


def open_models(paths: Sequence[str], base: str | None = None) -> dict[str, Answerer]:
    """Open what answers for each path, by a short label. Adapters come first, so that a base among
    the paths shares theirs."""
    bases = Bases()
    kinds = {path: names.classify(path) for path in paths}
    answerers: dict[str, Answerer] = {}
    for path in sorted(kinds, key=lambda path: kinds[path] != "adapter"):
        if kinds[path] == "gguf":
            answerers[path] = GGUFAnswerer(Path(path))
        elif kinds[path] == "adapter":
            answerers[path] = open_adapter(read_adapter(Path(path), base), bases, len(answerers))
        else:
            answerers[path] = _open_model(path, bases, answerers.values())
    return {path: answerers[path] for path in paths}


def open_adapter(adapter: Adapter, bases: Bases, number: int) -> HFAnswerer:
    """Open the adapter that is the so many-th that answers."""
    refuse_other_task(str(adapter), adapter.base.task)
    name = f"adapter_{number}"
    key, tokenizer = bases.with_adapter(adapter, name), adapter.load_tokenizer()
    if not adapter.base.task.has_targets:
        return HFAnswerer(bases, key, name, tokenizer, adapter.stop_token_ids)
    made = PairAnswerer(bases, key, name, tokenizer)
    made.prefix = adapter.recipe.source_prefix
    return made


def _open_model(path: str, bases: Bases, others: Iterable[Answerer]) -> HFAnswerer:
    """Open a base or a merged model. A base reads what the adapters on it do."""
    task = Base.of_model(path).task
    refuse_other_task(path, task)
    if not task.has_targets:
        return open_base(path, bases, others)
    made = PairAnswerer(bases, bases.plain(path), None, load_tokenizer(path))
    made.prefix = read_merged_recipe(Path(path)).source_prefix
    for other in others:
        if isinstance(other, PairAnswerer) and other.key.base.name == path:
            made.tokenizer, made.prefix = other.tokenizer, other.prefix
    return made


def open_base(path: str, bases: Bases, others: Iterable[Answerer]) -> HFAnswerer:
    """Open a causal model without an adapter, on the weights of adapters where they are its own."""
    tokenizer = _load_base_tokenizer(path, others)
    return HFAnswerer(bases, bases.plain(path), None, tokenizer)


def refuse_other_task(path: str, task: Task) -> None:
    """Raise LoraError for a model that writes no text."""
    if not task.writes_text:
        raise LoraError(
            f"{path} is for models that {task.does}, and writes no text",
            f"lora predict {quote(path)} --data FILE",
        )


def _load_base_tokenizer(name: str, others: Iterable[Answerer]) -> PreTrainedTokenizerBase:
    """Load the base's own tokenizer, with the template of an adapter on it where it has none, so
    that prompts compare."""
    tokenizer = load_tokenizer(name)
    if chat_template.find_template(tokenizer) is not None:
        return tokenizer
    for other in others:
        if isinstance(other, HFAnswerer) and other.key.base.name == name:
            tokenizer.chat_template = other.tokenizer.chat_template
            ui.say(f"{name} has no chat template: it gets that of the adapter on it")
            return tokenizer
    what = "no chat template"
    if tokenizer.chat_template is not None:
        what = f"the chat templates {', '.join(sorted(tokenizer.chat_template))} and no default"
    ui.say(f"{name} has {what}: prompts are given as plain text")
    return tokenizer
