"""`lora check`: show what a recipe would train on and how, without loading weights.

It goes through what training does before its first step (settle, tokenizer and template, targets,
rows) and refuses what training would refuse.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import files, spell_count, ui
from lora_cli.data import encoders, load, preferences, prepare, selection, unpaired
from lora_cli.models import IGNORED, PictureProcessor, Reader, load_recipe_reader
from lora_cli.plan import settled, sizes
from lora_cli.recipe import Recipe, Task

TRAINED = "\x1b[1;32m"
NOT_TRAINED = "\x1b[2m"
"""Bold green for what carries loss, faint for the rest; ⟦ ⟧ says the same without colour."""
SHOWN = 10
"""How many kinds of pictures are listed."""
BARS = 10
"""Of the histogram, up to the longest row that is within the limit."""


def show_check(recipe: Recipe, samples: int, as_json: bool) -> None:
    """Print what training would do with `recipe`; LoraError for what would waste the run."""
    files.refuse_unmakable(Path(recipe.output_dir))
    found = settled.settle_recipe(recipe)
    recipe, base, parent = found.recipe, found.base, found.parent
    sizes.refuse_lack_of_experts(recipe, base)
    reader, new_ids, template = load_recipe_reader(recipe, base, parent)
    adapter = sizes.measure_adapter(recipe, base, reader, new_ids, parent)
    train, evaluation = load.load_rows(recipe, reader)
    sizes.refuse_unknown_ids(recipe, base, train, reader, parent)
    beyond = sizes.check_positions(recipe, base, reader, [train, *filter(None, [evaluation])])
    steps = sizes.count_steps(recipe, train)
    encoder = load.make_encoder(recipe, reader)
    if as_json:
        report = {
            "base": base.describe(),
            "choices": [choice._asdict() for choice in found.choices],
            "parent": parent.to_record() if parent else None,
            "chat_template": template,
            "adapter": adapter._asdict(),
            "train": _count_numbers(train),
            "eval": _count_numbers(evaluation) if evaluation else None,
            "beyond_positions": beyond,
            "plan": steps._asdict(),
            "samples": _describe_samples(train.first[:samples], encoder, recipe.task_row),
        }
        ui.report_json(report)
        return
    lines = [
        *found.list_lines(),
        *([f"chat template: {template}"] if template else []),
        f"adapter: {adapter}",
        f"data: {train.summarise()}",
        *([f"evaluation: {evaluation.summarise()}"] if evaluation else []),
        *([beyond] if beyond else []),
    ]
    ui.report(f"{recipe.method} on {base.describe()}", *(f"  {each}" for each in lines))
    ui.report(*_format_rows(recipe, train, steps, reader))
    for row in train.first[:samples]:
        _print_sample(row, encoder, recipe.task_row)


def _format_rows(
    recipe: Recipe, train: prepare.Prepared, steps: sizes.Steps, reader: Reader
) -> Iterator[str]:
    """Yield what the rows are, and the steps they make."""
    if isinstance(reader, PictureProcessor):
        yield from _format_pictures(train, steps, reader)
    else:
        yield from _format_lengths(recipe, train, steps)


def _format_pictures(
    train: prepare.Prepared, steps: sizes.Steps, processor: PictureProcessor
) -> Iterator[str]:
    """Yield what the pictures are, what is made of them, and the steps that they make."""
    seen = train.counts.seen.most_common(SHOWN)
    lines = [[kind, f"{number:,}"] for kind, number in seen]
    yield ""
    yield from ui.format_table(["pictures", "rows"], lines)
    if more := len(train.counts.seen) - len(seen):
        yield f"and {more:,} other kinds or sizes"
    height, width = processor.shape
    yield ""
    yield f"each becomes {width}x{height}, by the base's image processor"
    epoch = (
        f"{spell_count(steps.steps_per_epoch, 'step')} an epoch, " if train.stream is None else ""
    )
    yield f"{epoch}{spell_count(steps.steps, 'step')} in all"


def _format_lengths(recipe: Recipe, train: prepare.Prepared, steps: sizes.Steps) -> Iterator[str]:
    """Yield how long the rows' texts are, and the steps they make."""
    counts = train.counts
    for limit, lengths in zip(
        selection.list_limits(recipe), (counts.lengths, counts.target_lengths)
    ):
        yield ""
        yield from _format_histogram(lengths, limit.total, limit.name)
        yield ""
        yield _format_quantiles(lengths, limit.name or "row")
    yield from _format_steps(steps, train)


def _format_steps(steps: sizes.Steps, train: prepare.Prepared) -> Iterator[str]:
    tokens = spell_count(format(train.counts.tokens, ","), "token")
    epoch = f"{spell_count(steps.steps_per_epoch, 'step')} and {tokens} an epoch, "
    yield f"{'' if train.stream is not None else epoch}{spell_count(steps.steps, 'step')} in all"
    packed = " (packed)" if steps.packed else ""
    yield f"{steps.fill:.0%} of the batches is text, the rest padding{packed}"


def _format_histogram(lengths: Counter[int], limit: int, of: str = "") -> list[str]:
    """Rows by length: ten bars up to the longest within the limit, and one for the others."""
    inside = max((length for length in lengths if length <= limit), default=1)
    width = max(1, math.ceil(inside / BARS))
    bars = Counter(
        min((length - 1) // width, BARS) if length <= limit else BARS + 1
        for length in lengths.elements()
    )
    most = max(bars.values())
    lines = []
    for bar in range(min(bars), BARS + 2):
        if bar <= (inside - 1) // width or bars[bar]:
            name = f"{bar * width + 1}-{min((bar + 1) * width, limit)}"
            if bar > BARS:
                name = f"over {limit}"
            drawn = "#" * math.ceil(40 * bars[bar] / most)
            lines.append(f"{name:>14}  {bars[bar]:>8,}  {drawn}".rstrip())
    return [f"{f'{of} tokens'.strip():>14}  {'rows':>8}", *lines]


def _format_quantiles(lengths: Counter[int], what: str = "row") -> str:
    """Return what to choose training.max_length by.

    `half of the rows have up to 83 tokens, 95% up to 210, all up to 512`.
    """
    total = lengths.total()
    below = 0
    found: list[str] = []
    shares = [(0.5, f"half of the {what}s have"), (0.95, "95%"), (1.0, "all")]
    for length, number in sorted(lengths.items()):
        below += number
        while shares and below >= shares[0][0] * total:
            found.append(f"{shares.pop(0)[1]} up to {length}{' tokens' if not found else ''}")
    return ", ".join(found)


def _describe_samples(
    rows: Sequence[selection.Kept], encoder: encoders.Encoder, task: Task
) -> list[dict[str, Any]]:
    return [
        {
            "place": row.place,
            "tokens": _count_tokens(row, task),
            "runs": [
                {"trained": learned, "text": text, **({"of": name} if name else {})}
                for name, runs in _split_texts(row, encoder)
                for learned, text in runs
            ],
        }
        for row in rows
    ]


def _split_texts(
    row: selection.Kept, encoder: encoders.Encoder
) -> list[tuple[str, list[tuple[bool, str]]]]:
    """Return the texts of a row that are shown one by one, each with its name, which is empty where
    there is one."""
    if isinstance(encoder, preferences.PreferenceEncoder):
        return list(zip(("chosen", "rejected"), encoder.split_pair(row)))
    if isinstance(encoder, unpaired.UnpairedEncoder):
        wanted = bool(row.read(unpaired.DESIRABLE)[0])
        return [("desirable" if wanted else "undesirable", encoder.split_by_loss(row))]
    return [("", encoder.split_by_loss(row))]


def _count_tokens(row: selection.Kept, task: Task) -> int:
    return sum(len(row.read(column)) for column in task.text_columns)


def _print_sample(row: selection.Kept, encoder: encoders.Encoder, task: Task) -> None:
    trained = int((row.labels != IGNORED).sum())
    about = "" if task.reads_pictures else f"{spell_count(_count_tokens(row, task), 'token')}, "
    about += f"{encoder.marked.format(trained)} between ⟦ and ⟧"
    ui.report("", f"{row.place}: {about}")
    for name, parts in _split_texts(row, encoder):
        if name:
            ui.report(f"{name}:")
        runs = [
            (TRAINED, f"⟦{text}⟧") if learned else (NOT_TRAINED, text) for learned, text in parts
        ]
        for texts in [[each] for each in runs] if task.has_targets else [runs]:
            ui.report_texts(texts)


def _count_numbers(prepared: prepare.Prepared) -> dict[str, Any]:
    counts = prepared.counts
    return {
        "read": counts.read,
        "rows": len(prepared.rows),
        "windows": counts.windows,
        "tokens": counts.tokens,
        "trained_tokens": counts.trained_tokens,
        "left_out": dict(counts.left_out),
        "labels": {prepared.names[at]: number for at, number in sorted(counts.labels.items())},
        "bad": dict(counts.bad),
        "control_in_text": counts.control_in_text,
        "lengths": {str(length): number for length, number in sorted(counts.lengths.items())},
        "fingerprint": prepared.fingerprint,
        "commit": prepared.commit,
    }
