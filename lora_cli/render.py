"""A conversation as the chat template renders it, as token ids, and which of them carry loss.

The whole conversation is rendered and tokenised as one text, as inference does it, so the ids trained on are those
that inference feeds. An answer begins where the template's generation prompt ends, and ends with the token that ends
its turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli.errors import LoraError
from lora_cli.formats import BadRow, Conversation, Tokens

IGNORED = -100
"""The label that cross entropy skips."""
Span = tuple[int, int]


class Encoded(NamedTuple):
    """Ids and labels, and whether control tokens stood in what the row's author wrote."""

    input_ids: list[int]
    labels: list[int]
    control_in_text: bool


class Piece(NamedTuple):
    """A text to tokenise, the character spans in it that carry loss, and the row it belongs to."""

    row: int
    text: str
    spans: list[Span]
    control_in_text: bool


class Renderer:
    """Renders and encodes rows for one tokenizer with its chat template; `train_on` says which answers carry loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        bos = tokenizer.bos_token_id
        self.adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*special, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.ends_turn = re.compile(f"(?:{self.control.pattern})\\Z")

    def encode(self, rows: Sequence[Conversation | Tokens | str]) -> list[list[Encoded] | BadRow]:
        """Each row's ids and labels, or why it has none. Mostly one item; one for each answer of a conversation whose
        earlier turns the template renders otherwise once others follow."""
        made: list[list[Encoded] | BadRow] = [[] for _ in rows]
        pieces: list[Piece] = []
        for number, row in enumerate(rows):
            try:
                if isinstance(row, Tokens):
                    made[number] = [self._checked(row)]
                elif isinstance(row, str):
                    text = self.document(row)
                    pieces.append(Piece(number, text, [(0, len(text))], self._has_control(row)))
                else:
                    written = any(self._has_control(str(message.get("content"))) for message in row.messages)
                    pieces += [Piece(number, *piece, written) for piece in self.conversation(row)]
            except BadRow as bad:
                made[number] = bad
        texts = [piece.text for piece in pieces]
        for piece, encoding in zip(
            pieces, self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        ):
            labels = _labels(encoding, piece.spans, len(piece.text))
            found = made[piece.row]
            assert isinstance(found, list)
            found.append(Encoded(encoding.ids, labels, piece.control_in_text))
        return made

    def conversation(self, row: Conversation) -> list[tuple[str, list[Span]]]:
        """The conversation as text with the character spans that carry loss; or one text for each answer, ending with
        it, where the template renders the beginning of a conversation otherwise than the whole."""
        text = self._ended(row, self._text(row.messages, row.tools))
        if self.train_on == "all":
            return [(text, [(0, len(text))])]
        answers = [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]
        answers = [turn for turn in answers[-1 if self.train_on == "completion" else 0 :] if row.trained[turn]]
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
                    "the chat template's generation prompt is not how it begins an answer (some open a thought first), "
                    "so what inference feeds is not what would be trained",
                    "give the answers their reasoning_content, or --set model.chat_template=chatml",
                )
            alone.append((ending, [span]))
        return alone

    def _ended(self, row: Conversation, text: str) -> str:
        """The text with eos_token at its end, where an answer stands there that nothing ends."""
        stripped, eos = text.rstrip(), self.tokenizer.eos_token
        if row.messages[-1]["role"] != "assistant" or self.ends_turn.search(stripped) or eos is None:
            return text
        return stripped + eos

    def document(self, text: str) -> str:
        """A plain text with one BOS where the tokenizer puts one, and one EOS."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if eos is None:
            raise LoraError("the tokenizer has no token that ends a text", "--set training.eos_token=TOKEN")
        if self.adds_bos and not text.startswith(bos):
            text = bos + text
        return text if text.endswith(eos) else text + eos

    def _answer(self, row: Conversation, turn: int, text: str) -> Span | None:
        """Where the answer of `turn` stands in the conversation's text, with the token that stops generation: the one
        that ends the turn, or begins the next. None where the turns up to there are rendered otherwise alone."""
        before = self._text(row.messages[:turn], row.tools, add_generation_prompt=True)
        if turn + 1 == len(row.messages):
            end = len(text.rstrip())
            return (len(before), end) if text.startswith(before) else None
        after = self._text(row.messages[: turn + 1], row.tools).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            return None
        following = None if self.ends_turn.search(after) else self.control.match(text, len(after))
        return len(before), following.end() if following else len(after)

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            texts, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                **options,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise BadRow("the chat template refuses it", f"the chat template refuses it: {said}") from None
        return str(texts[0])

    def _has_control(self, text: str) -> bool:
        return self.control.search(text) is not None

    def _checked(self, row: Tokens) -> Encoded:
        size = len(self.tokenizer)
        wrong = next((number for number in row.input_ids if not 0 <= number < size), None)
        if wrong is not None:
            raise BadRow(
                "input_ids are not the tokenizer's", f"input_ids has {wrong}, but the tokenizer has {size} tokens"
            )
        if any(label not in (IGNORED, number) for number, label in zip(row.input_ids, row.labels)):
            raise BadRow("labels are not input_ids", f"labels must be those of input_ids, or {IGNORED}")
        return Encoded(row.input_ids, row.labels, False)


def _labels(encoding: Any, spans: list[Span], length: int) -> list[int]:
    """The ids that lie wholly inside one of the character `spans`; IGNORED for the others."""
    ids = encoding.ids
    if spans == [(0, length)]:
        return list(ids)
    labels, offsets = [IGNORED] * len(ids), None
    for start, end in spans:
        first = encoding.char_to_token(start) if start < end else None
        last = encoding.char_to_token(end - 1) if start < end else None
        if first is None or last is None:  # a character that the tokenizer leaves out: look at every token
            offsets = offsets or encoding.offsets
            inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
        else:
            first += encoding.token_to_chars(first)[0] < start  # a token that begins before the answer is not its own
            while (
                last + 1 < len(ids)
                and (chars := encoding.token_to_chars(last + 1))
                and chars[1] <= end
                and chars[0] < chars[1]
            ):
                last += 1
            last -= encoding.token_to_chars(last)[1] > end
            inside = list(range(first, last + 1))
        for i in inside:
            labels[i] = ids[i]
    return labels
