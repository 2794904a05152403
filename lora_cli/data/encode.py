"""Encode conversations and texts: render them by the chat template, tokenise, label the answers.

The whole conversation is rendered and tokenised as one text, as inference does it, so the ids
trained on are those that inference feeds. An answer begins where the template's generation prompt
ends, and ends with the token that ends its turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, spell_count
from lora_cli.data import formats
from lora_cli.data.formats import BadRow, Conversation, Tokens
from lora_cli.data.offsets import NDArray, OffsetFinder
from lora_cli.models import IGNORED, adds_bos, chat_template

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept

Span = tuple[int, int]
"""Where a piece of a text begins and ends, in characters."""
Texts = dict[tuple[int, bool], str | TemplateError]
"""What the template makes of so many messages of a conversation, with or without asking for an
answer."""
Batch = list[tuple[str, Any]]
"""Rows with their places."""
Made = list[list["Encoded"] | BadRow]
"""What each row of a batch became, or why it cannot be used."""


NOTHING: Mapping[str, NDArray] = MappingProxyType({})


class Encoded(NamedTuple):
    """One row's ids and labels (int32)."""

    input_ids: NDArray
    labels: NDArray
    control_in_text: bool
    """Whether the row's author wrote control tokens in its text."""
    begins_inside: bool = False
    """Whether an answer begins inside a token, which inference would split, since it does not know
    the answer."""
    unread: tuple[str, ...] = ()
    """What the row has for the chat template that this one does not read: keys of its turns,
    tools."""
    others: Mapping[str, NDArray] = NOTHING
    """Further columns of the row."""
    uncut: int = 0
    """How many tokens it had before it was cut to the limit; 0 where it was not."""
    notes: Sequence[str] = ()
    """What else became of the row that was read, to be counted."""
    dropped: str = ""
    """Why it is not trained on."""
    uncut_labels: int = 0
    """The same of its labels, where they are a text of their own."""
    seen: str | None = None
    """Of a picture, what it is, such as `PNG, RGB, 32x32`."""


class Piece(NamedTuple):
    """A text to tokenise, the spans in it that carry loss, and the row it belongs to."""

    row: int
    text: str
    spans: list[Span]
    control_in_text: bool
    unread: tuple[str, ...]


class Tokenising(NamedTuple):
    """A batch that is being tokenised in another thread."""

    batch: Batch
    made: Made
    pieces: list[Piece]
    result: Future[Any]


class Renderer:
    """Renders and encodes rows for one tokenizer with its chat template.

    `train_on` says which answers carry loss; `day` is the date for templates that ask for one (by
    default today).
    """

    row_formats: ClassVar[formats.Formats] = formats.FORMATS
    column_sets: ClassVar[formats.ColumnSets] = formats.COLUMN_SETS
    by_token: ClassVar[bool] = True
    marked: ClassVar[str] = "{} with loss,"
    names: Sequence[str] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    columns: Mapping[str, Any] = MappingProxyType({"input_ids": np.int32, "labels": np.int32})

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: str, day: date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.day = day or date.today()
        self.adds_bos = adds_bos(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.offsets = OffsetFinder(tokenizer)
        self.special_tokens = dict(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder
        self.added_ids = np.array(sorted(added), np.int64)
        self.control = match_control(tokenizer)
        self.ends = tuple(list_control(tokenizer))

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names a prompt and a completion among columns of other names."""
        if len(columns) == 1:
            return formats.suggest_columns(text=columns[0])
        likely = [at for at, name in enumerate(columns) if name in ("chosen", "answer", "response")]
        answer = likely[0] if likely else len(columns) - 1
        asked = 1 if answer == 0 else 0
        return formats.suggest_columns(prompt=columns[asked], completion=columns[answer])

    def find_converter(self, style: str) -> formats.Converter:
        """Return the function that makes a row of format `style` what is encoded here."""
        template = chat_template.find_template(self.tokenizer)
        return formats.find_converter(style, formats.uses_alpaca(template))

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return the row's text in parts, each with whether it carries loss; special tokens are
        spelt out."""
        runs: list[tuple[bool, list[int]]] = []
        for number, label in zip(row.input_ids.tolist(), row.labels.tolist()):
            learned = label != IGNORED
            if not runs or runs[-1][0] != learned:
                runs.append((learned, []))
            runs[-1][1].append(number)
        decode = self.tokenizer.decode
        return [(learned, decode(ids, skip_special_tokens=False)) for learned, ids in runs]

    def are_labels(self, ids: NDArray, labels: NDArray, lengths: NDArray) -> bool:
        """Return whether these may be the labels of rows with these ids, all rows one after
        another."""
        return len(ids) == len(labels) and bool(((labels == IGNORED) | (labels == ids)).all())

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with each row's ids and labels, or why it has none.

        A row mostly becomes one item. A conversation becomes one for each answer where the template
        renders its earlier turns differently once others follow.

        One batch is tokenised, which does not need Python, while the next is rendered.
        """
        with ThreadPoolExecutor(1) as pool:
            waiting: Tokenising | None = None
            for batch in batches:
                made, pieces = self._render_batch([row for _, row in batch])
                texts = [piece.text for piece in pieces]
                result = pool.submit(
                    self.backend.encode_batch_fast, texts, add_special_tokens=False
                )
                if waiting:
                    yield waiting.batch, self._label_pieces(waiting)
                waiting = Tokenising(batch, made, pieces, result)
            if waiting:
                yield waiting.batch, self._label_pieces(waiting)

    def _render_batch(self, rows: list[Conversation | Tokens | str]) -> tuple[Made, list[Piece]]:
        """Return what each row became that needs no tokenising, and the texts that do."""
        made: Made = [[] for _ in rows]
        pieces: list[Piece] = []
        rows = [self._fit_roles(row) if isinstance(row, Conversation) else row for row in rows]
        rendered = self._render_all([row for row in rows if isinstance(row, Conversation)])
        for number, row in enumerate(rows):
            try:
                if isinstance(row, Tokens):
                    made[number] = [self._check_tokens(row)]
                else:
                    texts = next(rendered) if isinstance(row, Conversation) else {}
                    pieces += self._cut_row(number, row, texts)
            except BadRow as bad:
                made[number] = bad
        return made, pieces

    def _render_all(self, rows: list[Conversation]) -> Iterator[Texts]:
        """Return what the template makes of each conversation, and of those beginnings of it whose
        ends tell where an answer stands."""
        wanted = [self._list_wanted(row) for row in rows]
        asked = [
            chat_template.Ask("tools" if row.tools else "plain", row.messages, row.tools, each)
            for row, each in zip(rows, wanted)
        ]
        templates = {
            name: chat_template.find_template(self.tokenizer, tools) or ""
            for name, tools in (("plain", None), ("tools", [{}]))
        }
        made = chat_template.render_all(templates, self.special_tokens, asked, self.day)
        return (dict(zip(each, texts)) for each, texts in zip(wanted, made))

    def _list_wanted(self, row: Conversation) -> list[tuple[int, bool]]:
        """List the whole conversation, and what comes before and with each answer that is looked
        for; of each the number of messages, and whether an answer is asked for."""
        looked_for = self._find_left_out(row) if self.train_on == "all" else self._find_trained(row)
        around = [each for turn in looked_for for each in ((turn, True), (turn + 1, False))]
        return list(dict.fromkeys([(len(row.messages), False), *around]))

    def _cut_row(self, number: int, row: Conversation | str, texts: Texts) -> list[Piece]:
        """Return the texts of a row with the spans in them that carry loss; `texts` are those that
        the template makes of a conversation."""
        if isinstance(row, str):
            text = self.render_text(row)
            rendered = [(text, [(0, len(text))])]
            control_in_text = self._has_control(row)
            unread: tuple[str, ...] = ()
        else:
            rendered, unread = self._cut_conversation(row, texts), self._find_unread(row)
            control_in_text = any(map(self._has_control, _walk_message_texts(row)))
        for text, _ in rendered:
            refuse_half_characters(text)
        return [Piece(number, text, spans, control_in_text, unread) for text, spans in rendered]

    def _fit_roles(self, row: Conversation) -> Conversation:
        """Return the conversation with `system` for `developer` where the template has no such
        role."""
        source = self._find_source(bool(row.tools))
        return row._replace(messages=chat_template.fit_roles(source, row.messages))

    def _find_unread(self, row: Conversation) -> tuple[str, ...]:
        """Return what the template does not read of the conversation: keys of turns, tools."""
        keys = {key for message in row.messages if len(message) > 2 for key in message}
        keys -= {"role", "content"}
        has_tools = bool(row.tools)
        if has_tools:
            keys.add("tools")
        return tuple(sorted(key for key in keys if not self._is_read(key, has_tools)))

    def _is_read(self, name: str, with_tools: bool) -> bool:
        """Return whether the template has this word."""
        return name in chat_template.list_words(self._find_source(with_tools))

    def _find_source(self, with_tools: bool) -> str:
        tools: list[Any] | None = [{}] if with_tools else None
        return chat_template.find_template(self.tokenizer, tools) or ""

    def _label_pieces(self, waiting: Tokenising) -> Made:
        """Return what the rows of a batch became, with its tokenised texts labelled."""
        for piece, encoding in zip(waiting.pieces, waiting.result.result()):
            found = waiting.made[piece.row]
            assert isinstance(found, list)
            ids = np.array(encoding.ids, np.int32)
            starts, ends = self.offsets.find(piece.text, ids)
            labels = np.full(len(ids), IGNORED, np.int32)
            begins_inside = False
            for start, end in piece.spans:
                first, last = np.searchsorted(starts, [start, end])
                begins_inside |= bool(first and ends[first - 1] > start)
                # the last token may reach beyond the answer: a control token that swallowed the
                # space after it still ends the answer, any other does not belong to it
                if last > first and ends[last - 1] > end and ids[last - 1] not in self.added_ids:
                    last -= 1
                labels[first:last] = ids[first:last]
            found.append(Encoded(ids, labels, piece.control_in_text, begins_inside, piece.unread))
        return waiting.made

    def render_conversation(self, row: Conversation) -> list[tuple[str, list[Span]]]:
        """Return the conversation as text, with the spans that carry loss.

        Where the template renders the beginning of a conversation differently than the whole,
        return a text for each answer instead, which ends with it.
        """
        [texts] = self._render_all([row])
        return self._cut_conversation(row, texts)

    def _cut_conversation(self, row: Conversation, texts: Texts) -> list[tuple[str, list[Span]]]:
        text = self._append_eos(row, _get_text(texts, len(row.messages)))
        if self.train_on == "all":
            return [(text, self._exclude_answers(row, texts, text))]
        answers = self._find_trained(row)
        spans = [self._find_answer(row, turn, texts, text) for turn in answers]
        if all(spans):
            return [(text, [span for span in spans if span])]
        return [self._cut_up_to(row, turn, texts) for turn in answers]

    def _find_trained(self, row: Conversation) -> list[int]:
        """Return the turns that are answers with loss."""
        answers = _find_answers(row)
        if self.train_on == "completion":
            answers = answers[-1:]
        return [turn for turn in answers if row.trained[turn]]

    def _find_left_out(self, row: Conversation) -> list[int]:
        """Return the turns that are answers without loss."""
        return [turn for turn in _find_answers(row) if not row.trained[turn]]

    def _cut_up_to(self, row: Conversation, turn: int, texts: Texts) -> tuple[str, list[Span]]:
        """Return the conversation up to the answer of `turn` as text, with that answer's span."""
        until = row._replace(messages=row.messages[: turn + 1])
        text = self._append_eos(until, _get_text(texts, turn + 1))
        span = self._find_answer(until, turn, texts, text)
        if span is None:
            raise LoraError(
                "the chat template's generation prompt is not how it begins an answer (some "
                "open a thought first), so inference would feed other tokens than training",
                "give the answers their reasoning_content, or --set model.chat_template=chatml",
            )
        return text, [span]

    def _exclude_answers(self, row: Conversation, texts: Texts, text: str) -> list[Span]:
        """Return the spans of the text around the answers without loss."""
        spans = list[Span]()
        begins = 0
        for turn in self._find_left_out(row):
            answer = self._find_answer(row, turn, texts, text)
            if answer is None:
                raise BadRow("a turn without loss changes as others follow it")
            spans.append((begins, answer[0]))
            begins = answer[1]
        return [*spans, (begins, len(text))]

    def _append_eos(self, row: Conversation, text: str) -> str:
        """Return the text, with eos_token appended where its last turn is an answer without an end
        token."""
        stripped, eos = text.rstrip(), self.tokenizer.eos_token
        is_answer = row.messages[-1]["role"] == "assistant"
        if not is_answer or eos is None or stripped.endswith(self.ends):
            return text
        return stripped + eos

    def render_text(self, text: str) -> str:
        """Return a plain text with one BOS where the tokenizer adds one, and one EOS."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if eos is None:
            raise LoraError(
                "the tokenizer has no token that ends a text", "--set training.eos_token=TOKEN"
            )
        if self.adds_bos and not text.startswith(bos):
            text = bos + text
        return text if text.endswith(eos) else text + eos

    def _find_answer(self, row: Conversation, turn: int, texts: Texts, text: str) -> Span | None:
        """Return where the answer of `turn` stands in the conversation's text.

        The span includes the token that stops generation: the one that ends the turn, or begins the
        next. None where the turns up to there are rendered differently alone.
        """
        before = _get_text(texts, turn, True)
        if turn + 1 == len(row.messages):
            end = len(text.rstrip())
            return (len(before), end) if text.startswith(before) else None
        after = _get_text(texts, turn + 1).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            return None
        if after.endswith(self.ends):
            return len(before), len(after)
        spaces = len(text) - len(text[len(after) :].lstrip()) - len(after)
        found = (self.control.match(text, len(after) + at) for at in range(spaces, -1, -1))
        following = next(filter(None, found), None)
        return len(before), following.end() if following else len(after)

    def _has_control(self, text: str) -> bool:
        return self.control.search(text) is not None

    def _check_tokens(self, row: Tokens) -> Encoded:
        """Return a row that is tokenised already; raise BadRow where its numbers are impossible."""
        size = len(self.offsets.lengths)
        wrong = next((number for number in row.input_ids if not 0 <= number < size), None)
        if wrong is not None:
            raise BadRow(
                "input_ids are not the tokenizer's",
                f"input_ids has {wrong}, but the tokenizer has {spell_count(size, 'token')}",
            )
        if any(label not in (IGNORED, number) for number, label in zip(row.input_ids, row.labels)):
            raise BadRow(
                "labels are not input_ids", f"labels must be those of input_ids, or {IGNORED}"
            )
        return Encoded(np.array(row.input_ids, np.int32), np.array(row.labels, np.int32), False)


def _find_answers(row: Conversation) -> list[int]:
    return [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]


def _get_text(texts: Texts, number: int, ask: bool = False) -> str:
    """Return what the template makes of the first messages. Raises BadRow where it refuses them."""
    text = texts[number, ask]
    if isinstance(text, str):
        return text
    said = " ".join(str(text).split())[:200]
    raise BadRow("the chat template refuses the row", f"the chat template refuses the row: {said}")


def list_control(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokenizer's control tokens as they are spelt."""
    special = {each.content for each in tokenizer.added_tokens_decoder.values() if each.special}
    return special | set(map(str, tokenizer.all_special_tokens))


def match_control(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds a control token in a text, the longest that begins there."""
    longest_first = sorted(list_control(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def refuse_half_characters(text: str) -> None:
    """Raise BadRow for halves of characters (surrogates), which JSON can spell and no encoding
    can."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(
            "half a character", f"its text has {half}, which is half a character"
        ) from None


def _walk_message_texts(row: Conversation) -> Iterator[str]:
    """Yield every text in the messages and tools, except the roles."""
    for message in row.messages:
        for key, value in message.items():
            if key != "role":
                yield from _walk_texts(value)
    yield from _walk_texts(row.tools)


def _walk_texts(value: Any) -> Iterator[str]:
    """Yield every text in a value (dicts, lists, scalars), at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _walk_texts(inner)
