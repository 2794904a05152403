"""Compute what is not yet known of a model's rows: losses, answers, and the loss on the general
text. Each batch is written down as it comes.

Batches are made of all rows, or of all whose answers have to be written, whatever is known already,
and one of which a row lacks is computed whole: so what a killed evaluation goes on with is what it
would have computed. A drawn answer (with a temperature) is computed alone, from a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import set_seed

from lora_cli.common import spell_count, ui
from lora_cli.evaluate import read_rows, token_losses
from lora_cli.evaluate.computing import Computing, Wanted
from lora_cli.evaluate.generate import warn_of_unread_tools
from lora_cli.evaluate.held_out import HeldRow, list_numbers
from lora_cli.evaluate.kept_scores import GENERAL, Kept
from lora_cli.evaluate.scored_models import Scored


def compute(computing: Computing) -> None:
    """Compute all that is wanted and not known."""
    reader, wanted = read_rows.find_reader(computing), computing.wanted
    if reader is not None:
        if wanted.losses:
            read_rows.compute_losses(computing, reader)
        if wanted.general and computing.kept.get(GENERAL).get("general") is None:
            read_rows.compute_general(computing, reader)
    elif wanted.losses or wanted.general:
        ui.say(f"{computing.scored.label}: no loss: {computing.why_no_loss}")
    if wanted.answers:
        _compute_answers(computing)
    computing.progress.clear()


def _compute_answers(computing: Computing) -> None:
    wanted, kept, answerer = computing.wanted, computing.kept, computing.answerer
    rows = [row for row in wanted.rows if row.question and not computing.is_bad(row)]
    total = len(rows)
    # not those alone that are left after a kill: batches are of the same rows each time
    rows = [row for row in rows if not kept.get(row.number).get("foreseen")]
    if len(rows) < total:
        ui.say(
            f"{computing.scored.label}: {total - len(rows)} of {total} answers are the expected "
            "ones, by one pass over each; the others are written"
        )
    if not kept.lacks([row.number for row in rows], "answer"):
        return
    questions = [row.question for row in rows if row.question]
    asked = [question.asked(answerer.chat_template) for question in questions]
    warn_of_unread_tools(computing.scored.label, answerer, asked)
    alone = not wanted.sampling.is_greedy
    batches, done = _batch_answers(computing, rows), 0
    for batch in batches:
        done += len(batch)
        if kept.lacks([row.number for row in batch], "answer"):
            if alone:
                set_seed(batch[0].number)
            asked = [row.question.asked(answerer.chat_template) for row in batch if row.question]
            written = answerer.write(asked, wanted.sampling)
            kept.add(
                [
                    {"row": row.number, "answer": each.text, "ended": each.is_whole}
                    for row, each in zip(batch, written)
                    if kept.lacks([row.number], "answer")
                ]
            )
        computing.tell("answers", done, sum(map(len, batches)))


def _batch_answers(computing: Computing, rows: Sequence[HeldRow]) -> list[list[HeldRow]]:
    """Return rows in batches of prompts of about one length. A row after which the model has less
    than room for a whole answer is alone: the room would be that of the batch's longest."""
    answerer, wanted = computing.answerer, computing.wanted
    positions = answerer.positions
    fitting, alone, lengths = [], [], []
    for row in rows:
        assert row.question is not None
        length = len(answerer.encode(row.question.asked(answerer.chat_template)))
        room = None if positions is None else positions - length
        if room is not None and room < 1:
            label = computing.scored.label
            computing.refuse(
                row, f"{label} reads {positions} tokens, and the prompt alone has {length}"
            )
        elif room is not None and room < wanted.sampling.max_new_tokens:
            alone.append([row])
        else:
            fitting.append(row)
            lengths.append(length)
    size = wanted.batch_size if wanted.sampling.is_greedy else 1
    batches = token_losses.make_batches(lengths, size)
    return [*alone, *([fitting[at] for at in places] for places in batches)]


def warn_of_answers(scored: Scored, wanted: Wanted, kept: Kept) -> int:
    """Warn of what is odd in a model's answers and losses; return how many answers did not end."""
    numbers = [row.number for row in wanted.rows]
    cut = [n for n in numbers if kept.get(n).get("ended") is False]
    most = wanted.sampling.max_new_tokens
    told = {
        f"answers did not end within {spell_count(most, 'token')} (--max-new-tokens)": cut,
        "answers are empty": [n for n in numbers if not kept.get(n).get("answer", "-").strip()],
        "rows have a loss that is not finite": [
            n for n in numbers if kept.get(n).get("loss", 0.0) is None
        ],
        "rows are left out": [n for n in numbers if "error" in kept.get(n)],
    }
    for what, found in told.items():
        if found:
            if len(found) == 1:
                what = what.replace(" are ", " is ").replace(" have ", " has ")
            ui.warn(
                f"{scored.label}: {len(found)} of {len(numbers)} {what}: "
                f"{list_numbers(wanted.rows, found)}"
            )
    general = kept.get(GENERAL).get("general") or []
    if any(total is None for total, _ in general):
        ui.warn(f"{scored.label}: its loss on the general text is not finite")
    return len(cut)
