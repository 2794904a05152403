"""A conversation as the chat template renders it, as token ids, and which of them carry loss.

The whole conversation is rendered and tokenised as one text, as inference does it, so the ids
trained on are those that inference feeds. An answer begins where the template's generation prompt
ends, and ends with the token that ends its turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError
from lora_cli.data.formats import BadRow, Conversation, Tokens
from lora_cli.models import IGNORED, adds_bos, chat_template

Span = tuple[int, int]
NDArray = np.ndarray[Any, Any]
Batch = list[tuple[str, Conversation | Tokens | str]]
"""Rows with their places."""


class Encoded(NamedTuple):
    """Ids and labels (int32), whether control tokens stood in what the row's author wrote, and
    whether an answer begins inside a token, which inference, not knowing the answer, would
    split."""

    input_ids: NDArray
    labels: NDArray
    control_in_text: bool
    begins_inside: bool = False


class Piece(NamedTuple):
    """A text to tokenise, the character spans in it that carry loss, and the row it belongs to."""

    row: int
    text: str
    spans: list[Span]
    control_in_text: bool


class Renderer:
    """Renders and encodes rows for one tokenizer with its chat template; `train_on` says which
    answers carry loss, and `day` what a template that asks for the date is told (today)."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: str, day: date | None = None
    ) -> None:
        self.tokenizer, self.train_on, self.day = tokenizer, train_on, day or date.today()
        self.marks, self.templates = dict(tokenizer.special_tokens_map), dict[bool, Any]()
        self.given = dict[str, Any]()
        self.adds_bos = adds_bos(tokenizer)
        special = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        special = sorted({*special, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.backend = tokenizer.backend_tokenizer
        self.lengths = _measure_tokens(tokenizer)
        self.ends_turn = re.compile(f"(?:{self.control.pattern})\\Z")
        self.next_control = re.compile(rf"\s*(?:{self.control.pattern})")
        self.added = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Compiled templates cannot be copied; `datasets` copies what its streams are made from."""
        return Renderer, (self.tokenizer, self.train_on, self.day)

    def encode(
        self, batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, list[list[Encoded] | BadRow]]]:
        """Each batch of rows with each row's ids and labels, or why it has none. Mostly one item a
        row; one for each answer of a conversation whose earlier turns the template renders
        otherwise once others follow.

        One batch is tokenised, which needs no Python, while the next is rendered.
        """
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[Batch, list[list[Encoded] | BadRow], list[Piece], Future[Any]] | None = (
                None
            )
            for batch in batches:
                made, pieces = self._rendered([row for _, row in batch])
                texts = [piece.text for piece in pieces]
                tokenised = pool.submit(
                    self.backend.encode_batch_fast, texts, add_special_tokens=False
                )
                if waiting:
                    yield waiting[0], self._labelled(*waiting[1:])
                waiting = (batch, made, pieces, tokenised)
            if waiting:
                yield waiting[0], self._labelled(*waiting[1:])

    def _rendered(
        self, rows: list[Conversation | Tokens | str]
    ) -> tuple[list[list[Encoded] | BadRow], list[Piece]]:
        """What needs no tokenising, by row, and the pieces of text that do."""
        made: list[list[Encoded] | BadRow] = [[] for _ in rows]
        pieces: list[Piece] = []
        with chat_template.Limits() as limits:
            for number, row in enumerate(rows):
                limits.begin()
                try:
                    if isinstance(row, Tokens):
                        made[number] = [self._checked(row)]
                    else:
                        pieces += [
                            self._piece(number, row, text, spans)
                            for text, spans in self._texts(row)
                        ]
                except BadRow as bad:
                    made[number] = bad
        return made, pieces

    def _texts(self, row: Conversation | str) -> list[tuple[str, list[Span]]]:
        if not isinstance(row, str):
            return self.conversation(row)
        text = self.document(row)
        return [(text, [(0, len(text))])]

    def _piece(self, number: int, row: Conversation | str, text: str, spans: list[Span]) -> Piece:
        """BadRow for halves of characters, which JSON can spell and no encoding can."""
        written = [row] if isinstance(row, str) else _walk_message_texts(row)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise BadRow(
                    "half a character", f"its text has {half}, which is half a character"
                ) from None
        return Piece(number, text, spans, any(map(self._has_control, written)))

    def _labelled(
        self, made: list[list[Encoded] | BadRow], pieces: list[Piece], tokenised: Future[Any]
    ) -> list[list[Encoded] | BadRow]:
        for piece, encoding in zip(pieces, tokenised.result()):
            found = made[piece.row]
            assert isinstance(found, list)
            ids = np.array(encoding.ids, np.int32)
            starts, ends = self._offsets(piece.text, ids)
            labels, begins_inside = np.full(len(ids), IGNORED, np.int32), False
            for start, end in piece.spans:
                first, last = np.searchsorted(starts, [start, end])
                begins_inside |= bool(first and ends[first - 1] > start)
                # a control token may have swallowed the space after it; others that reach beyond
                # are not the answer's
                if last > first and ends[last - 1] > end and ids[last - 1] not in self.added:
                    last -= 1
                labels[first:last] = ids[first:last]
            found.append(Encoded(ids, labels, piece.control_in_text, begins_inside))
        return made

    def _offsets(self, text: str, ids: NDArray) -> tuple[NDArray, NDArray]:
        """Where each token begins and ends in the text, in characters.

        The tokenizer can say, at half again the time. Where it leaves the text as it is, the
        tokens' own lengths do: in bytes they add up to the text.
        """
        normalizer = self.backend.normalizer
        unchanged = normalizer is None or normalizer.normalize_str(text) == text
        ends = self.lengths[ids].cumsum() if unchanged else np.zeros(0, np.int64)
        if text.isascii():
            if len(ends) and ends[-1] == len(text):
                return ends - self.lengths[ids], ends
        elif len(ends) and ends[-1] == len(raw := text.encode()):
            # bytes to characters: those that continue a character (10xxxxxx) count for the one
            # before
            beginnings = np.cumsum((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80)
            counted = np.concatenate([[0], beginnings])
            whole = counted[
                ends
            ]  # a token that ends inside a character ends with it, as the tokenizer counts
            return np.concatenate([[0], counted[ends[:-1] + 1] - 1]), whole
        offsets = np.array(
            self.backend.encode(text, add_special_tokens=False).offsets, np.int64
        ).reshape(-1, 2)
        return offsets[:, 0], offsets[:, 1]

    def conversation(self, row: Conversation) -> list[tuple[str, list[Span]]]:
        """The conversation as text with the character spans that carry loss; or one text for each
        answer, ending with it, where the template renders the beginning of a conversation otherwise
        than the whole."""
        text = self._ended(row, self._text(row.messages, row.tools))
        answers = [
            turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"
        ]
        if self.train_on == "all":
            return [
                (
                    text,
                    self._all_but(row, [turn for turn in answers if not row.trained[turn]], text),
                )
            ]
        answers = [
            turn
            for turn in answers[-1 if self.train_on == "completion" else 0 :]
            if row.trained[turn]
        ]
        spans = [self._answer(row, turn, text) for turn in answers]
        if all(spans):
            return [(text, [span for span in spans if span])]
        alone = []
        for turn in answers:
            until = row._replace(messages=row.messages[: turn + 1])
            ending = self._ended(until, self._text(until.messages, row.tools))
            span = self._answer(until, turn, ending)
            if span is None:
                raise LoraError(
                    "the chat template's generation prompt is not how it begins an answer (some "
                    "open a thought first), "
                    "so what inference feeds is not what would be trained",
                    "give the answers their reasoning_content, or --set model.chat_template=chatml",
                )
            alone.append((ending, [span]))
        return alone

    def _all_but(self, row: Conversation, left_out: list[int], text: str) -> list[Span]:
        """What lies around the answers of some turns."""
        spans, begins = list[Span](), 0
        for turn in left_out:
            answer = self._answer(row, turn, text)
            if answer is None:
                raise BadRow("a turn without loss changes as others follow it")
            spans, begins = [*spans, (begins, answer[0])], answer[1]
        return [*spans, (begins, len(text))]

    def _ended(self, row: Conversation, text: str) -> str:
        """The text with eos_token at its end, where an answer stands there that nothing ends."""
        stripped, eos = text.rstrip(), self.tokenizer.eos_token
        if (
            row.messages[-1]["role"] != "assistant"
            or self.ends_turn.search(stripped)
            or eos is None
        ):
            return text
        return stripped + eos

    def document(self, text: str) -> str:
        """A plain text with one BOS where the tokenizer puts one, and one EOS."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if eos is None:
            raise LoraError(
                "the tokenizer has no token that ends a text", "--set training.eos_token=TOKEN"
            )
        if self.adds_bos and not text.startswith(bos):
            text = bos + text
        return text if text.endswith(eos) else text + eos

    def _answer(self, row: Conversation, turn: int, text: str) -> Span | None:
        """Where the answer of `turn` stands in the conversation's text, with the token that stops
        generation: the one that ends the turn, or begins the next. None where the turns up to there
        are rendered otherwise alone."""
        before = self._text(row.messages[:turn], row.tools, add_generation_prompt=True)
        if turn + 1 == len(row.messages):
            end = len(text.rstrip())
            return (len(before), end) if text.startswith(before) else None
        after = self._text(row.messages[: turn + 1], row.tools).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            return None
        following = (
            None if self.ends_turn.search(after) else self.next_control.match(text, len(after))
        )
        return len(before), following.end() if following else len(after)

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        """As `apply_chat_template(tokenize=False)`, which spends most of its time around the
        template."""
        template = self.templates.get(bool(tools))
        if template is None:
            source = self.tokenizer.get_chat_template(tools=tools)
            template = self.templates[bool(tools)] = chat_template.compile_template(source)
            self.given = {
                **template.globals,
                "documents": None,
                **self.marks,
                "strftime_now": self.day.strftime,
            }
        given = {
            **self.given,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": False,
            **options,
        }
        try:
            # what template.render does, but for merging its globals into the variables each time
            return chat_template.join_output(
                template.root_render_func(template.new_context(given, shared=True))
            )
        except LoraError:  # over a limit
            raise
        except (
            Exception
        ) as error:  # a template is a program of someone else's: whatever it raises is its refusal
            said = " ".join(str(error).split())[:200] or type(error).__name__
            said = "it calls itself without end" if isinstance(error, RecursionError) else said
            raise BadRow(
                "the chat template refuses it", f"the chat template refuses it: {said}"
            ) from None

    def _has_control(self, text: str) -> bool:
        return self.control.search(text) is not None

    def _checked(self, row: Tokens) -> Encoded:
        size = len(self.tokenizer)
        wrong = next((number for number in row.input_ids if not 0 <= number < size), None)
        if wrong is not None:
            raise BadRow(
                "input_ids are not the tokenizer's",
                f"input_ids has {wrong}, but the tokenizer has {size} tokens",
            )
        if any(label not in (IGNORED, number) for number, label in zip(row.input_ids, row.labels)):
            raise BadRow(
                "labels are not input_ids", f"labels must be those of input_ids, or {IGNORED}"
            )
        return Encoded(np.array(row.input_ids, np.int32), np.array(row.labels, np.int32), False)


def _walk_message_texts(row: Conversation) -> Iterator[str]:
    """Every text in the messages and tools, but for the roles."""
    for message in row.messages:
        for key, value in message.items():
            if key != "role":
                yield from [value] if isinstance(value, str) else _walk_texts(value)
    yield from _walk_texts(row.tools)


def _walk_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _walk_texts(inner)


def _measure_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray:
    """How many bytes of text each token stands for: of byte-level vocabularies one a letter, of
    SentencePiece's the piece's with spaces for ▁, or one for a single byte (`<0x0A>`)."""
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    lengths = np.zeros(len(tokenizer), np.int64)
    for token, number in tokenizer.get_vocab().items():
        plain = (
            1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
        )
        lengths[number] = len(token) if byte_level else plain
    for number, added in tokenizer.added_tokens_decoder.items():
        lengths[number] = len(added.content.encode())
    return lengths
