"""Answers of transformers models: a base and the adapters on it, one answer at a time.

It goes through the same `generate` as `lora generate` does, with a batch of one, so that a greedy
answer is the same to the letter; in a batch the sums would be others, and a near tie could fall the
other way.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_cli.evaluate import answerers, hf_answerers
from lora_cli.models import answering
from lora_cli.serve.pieces import Assembler, Drawing, Emit, End, Token, name_token

UNLIMITED = 2**15
"""Tokens of prompt and answer for a model that has no limit of its own: memory has one."""
NO_CUTS = {"top_k": 0} | dict.fromkeys(
    ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
)
"""Options of `generate` by which no unlikely token is left out but by top_p, whatever a model's
generation config asks for."""


class _Look(LogitsProcessor):
    """Keeps the log-probabilities of the next token; changes nothing."""

    def __init__(self) -> None:
        self.row = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep those of the only row, (vocabulary) in float32."""
        self.row = torch.log_softmax(scores[0].float(), -1)
        return scores


class _Watch(StoppingCriteria):
    """Sees each token as it comes, and ends the answer at one of `ends`, at a stop string or when
    nobody waits."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        drawing: Drawing,
        assembler: Assembler,
        is_wanted: Callable[[], bool],
    ) -> None:
        self.tokenizer, self.drawing, self.assembler = tokenizer, drawing, assembler
        self.is_wanted, self.look, self.ends = is_wanted, _Look(), ends
        self.num_tokens = 0
        self.stopped = False
        self.at_stop = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether the only row is done, (1) bool."""
        token = int(input_ids[0, -1])
        self.num_tokens += 1
        if token in self.ends:  # it has no text, also where a request named it
            self.stopped = True
        elif self.assembler.add(token, self._tell(token)):
            self.stopped = self.at_stop = True
        done = self.stopped or not self.is_wanted()
        return torch.tensor([done], device=input_ids.device)

    def _tell(self, token: int) -> Token | None:
        """Return the token with its log-probability and those of the likeliest."""
        if self.drawing.top_logprobs is None:
            return None
        row = self.look.row
        best = torch.topk(row, min(self.drawing.top_logprobs, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist())
        before = next(reversed(self.assembler.ids), None)
        top = [name_token(self.tokenizer, each, logprob, before) for each, logprob in pairs]
        return Token(name_token(self.tokenizer, token, float(row[token]), before), top)


class TorchEngine:
    """A base and adapters on it, by the names that requests ask for."""

    def __init__(
        self, models: Mapping[str, hf_answerers.HFAnswerer], context: int | None = None
    ) -> None:
        """`context`: tokens of prompt and answer together, where fewer than the positions of a
        model."""
        self.models, self.context = models, context
        self.longest = dict[str, int]()
        self.readers = {name: copy.copy(model) for name, model in models.items()}
        for reader in self.readers.values():  # prompts are made while another thread decodes
            reader.tokenizer = copy.deepcopy(reader.tokenizer)

    def get_template(self, name: str) -> str | None:
        """Return the model's chat template."""
        return self.models[name].chat_template

    def reads_tools(self, name: str) -> bool:
        """Return whether the model's chat template shows tools."""
        return self.models[name].reads_tools

    def find_positions(self, name: str) -> int | None:
        """Return how many tokens prompt and answer may have together, None: any."""
        limits = [self.models[name].positions, self.context]
        return min((each for each in limits if each is not None), default=UNLIMITED)

    def measure_longest_token(self, name: str) -> int:
        """Return how many characters the longest token has."""
        if name not in self.longest:  # of 49,152 tokens it takes 60 ms
            self.longest[name] = max(map(len, self.readers[name].tokenizer.get_vocab()))
        return self.longest[name]

    def render(self, name: str, asked: answerers.Asked) -> list[int]:
        """Return the prompt of a conversation, as token ids."""
        return self.readers[name].encode(asked)

    def tokenize(self, name: str, text: str) -> list[int]:
        """Return a text as token ids, as `lora generate` asks a model without a template."""
        return list(self.readers[name].tokenizer(text)["input_ids"])

    def count_tokens(self, name: str) -> int:
        """Return how many token ids there are."""
        weights: Any = self.models[name].bases.loaded[self.models[name].key]
        return int(weights.get_input_embeddings().weight.shape[0])

    def write(
        self,
        name: str,
        prompt: list[int],
        drawing: Drawing,
        emit: Emit,
        is_wanted: Callable[[], bool],
    ) -> End:
        """Write the answer to a prompt, a piece at a time. Raises TooLongError."""
        model = self.models[name]
        assembler = Assembler(model.tokenizer, drawing.stop, emit)
        ends = {*model.list_ends(), *_find_special(model, drawing.stop)}
        watch = _Watch(model.tokenizer, ends, drawing, assembler, is_wanted)
        room = answering.limit_answer(len(prompt), self.find_positions(name), drawing.max_tokens)
        sampling = answerers.Sampling(room, drawing.temperature)
        options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([watch])}
        if drawing.top_logprobs is not None:
            options["logits_processor"] = LogitsProcessorList([watch.look])
        if not sampling.is_greedy:
            options |= {"top_p": drawing.top_p, **NO_CUTS}
        torch.manual_seed(secrets.randbits(63) if drawing.seed is None else drawing.seed)
        model.write_ids([prompt], sampling, **options)
        assembler.end(watch.at_stop)
        stopped = watch.stopped or watch.num_tokens < room  # by the model's own stop strings
        return End("stop" if stopped else "length", watch.num_tokens, assembler.text)


def _find_special(model: hf_answerers.HFAnswerer, stops: Sequence[str]) -> list[int]:
    """Return the special tokens that stop strings name: no text of an answer shows them."""
    names = {model.tokenizer.convert_ids_to_tokens(each): each for each in model.list_special()}
    return [names[stop] for stop in stops if stop in names]
