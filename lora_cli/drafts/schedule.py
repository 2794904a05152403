"""How long a recipe trains: what is held out, rows of a step, passes, and the time they take."""

from __future__ import annotations

import math

from lora_cli.common import LoraError, spell_count, ui
from lora_cli.drafts import data_here
from lora_cli.drafts.draft import Draft
from lora_cli.drafts.questions import Questions
from lora_cli.drafts.rows import Seen
from lora_cli.recipe import Recipe
from lora_cli.scoring import measures
from lora_cli.train import measure

FEWEST = 20
"""Different rows from which some are held out."""
BY_SHARE = 100
"""Different rows from which a share is held out, and not a number: of fewer, a share may hold out
none."""
SHARES = ((1_000, 0.1), (10_000, 0.05), (100_000, 0.01), (math.inf, 0.001))
"""Up to so many rows, the share that is held out."""
STEP_ROWS = ((64, 4), (2_000, 8), (20_000, 16), (math.inf, 32))
"""Up to so many rows, how many a step has."""
PASSES = ((100, 10), (500, 5), (10_000, 3), (50_000, 2), (math.inf, 1))
"""Up to so many rows, how often each is seen."""
MOST_PASSES = 3
"""Over pairs of answers, which are soon told apart."""
LARGEST_PASS = 8
"""Rows of a forward pass at most."""
SMALL, LARGE = 5e-4, 2e-4
"""Learning rates for bases of under a thousand million parameters, and of more."""
OF_PAIRS = 1e-3
LONG = 3600
"""Seconds of a run, from which a shorter one is suggested, of half the time."""
EPOCHS = "training.num_train_epochs"
LOGGED = 10
"""Steps between two records of the loss, where a recipe does not say."""
EVALUATIONS = ("eval_path", "eval_split", "eval_fraction", "eval_rows")
METRICS = ("f1_macro", "f1")
"""By what the best step is known, the first that is measured of such labels; else by the loss. Of
tags, by the second: that is of what they mark."""


def _choose(table: tuple[tuple[float, float], ...], number: int) -> float:
    return next(value for most, value in table if number < most)


def settle_holdout(draft: Draft, seen: Seen, path: str, questions: Questions) -> None:
    """Put into the draft what is evaluated on: a file beside the rows, or some of them."""
    if any(draft.is_given(f"data.{key}") for key in (*EVALUATIONS, "streaming")):
        return
    if draft.read("training.eval_strategy") in ("no", False):
        return
    beside = data_here.find_evaluation(path)
    if beside and questions.confirm(f"evaluate on {beside}"):
        draft.put("data.eval_path", beside, "evaluated on, never trained on")
        ui.say(f"  evaluation: {beside}, which lies beside it")
        return
    if seen.different < FEWEST:
        ui.say(f"  evaluation: none, of {spell_count(seen.different, 'different row')}")
        return
    if seen.different < BY_SHARE:
        held = seen.different // 10
        draft.put("data.eval_rows", held, "rows held out, to evaluate on")
        return
    share = _ask_share(questions, _choose(SHARES, seen.different))
    if share:
        rows = round(seen.usable * share)
        draft.put(
            "data.eval_fraction",
            share,
            f"about {spell_count(format(rows, ','), 'row is', 'rows are')} held out, to evaluate "
            "on",
        )


def _ask_share(questions: Questions, default: float) -> float:
    def read(text: str) -> float:
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise LoraError("a number below 1, or 0 for none")
        return share

    return questions.ask("share of the rows to hold out, to evaluate on", default, read)


def settle_steps(draft: Draft, seen: Seen) -> None:
    """Put the rows of a step and the passes into the draft."""
    rows = int(_choose(STEP_ROWS, seen.usable))
    size = min(rows, LARGEST_PASS)
    more = rows // size
    passes = int(_choose(PASSES, seen.usable))
    compares = draft.build().objective_row.compares
    draft.put(EPOCHS, min(passes, MOST_PASSES) if compares else passes, "passes")
    draft.put("training.learning_rate", LARGE)
    draft.put("training.per_device_train_batch_size", size, "rows, in one pass")
    draft.put("training.gradient_accumulation_steps", more if more > 1 else None, f"{rows} a step")


def settle_rate(draft: Draft, recipe: Recipe, parameters: int) -> None:
    """Put the learning rate of a settled recipe into the draft, and by what its best step is
    known."""
    task = recipe.task_row
    rate = SMALL if parameters < 1e9 else LARGE
    rate = OF_PAIRS if task.has_targets else rate / recipe.objective_row.slower
    draft.put("training.learning_rate", rate)
    known = measures.list_metrics(task, recipe.model.problem_type)
    wanted = METRICS[1:] if task.places_labels else METRICS
    best = next((name for name in wanted if name in known), None)
    evaluates = draft.build().data.evaluates
    if best is not None and evaluates and not draft.is_given("training.keep"):
        draft.put("training.metric_for_best_model", best, "by which the best step is kept")


def time_steps(draft: Draft, questions: Questions) -> None:
    """Train two steps to say how long all take, and ask for how many passes."""
    ui.say("  trying two steps …")
    recipe = draft.build()
    found = measure.measure_steps(recipe)
    unit, rows = recipe.task_row.unit, recipe.count_step_rows()
    _say_rows_left(found)
    ui.say(
        f"  one step of {spell_count(rows, 'row')} ({found.units:,} {unit}) took "
        f"{found.seconds:.2f} s"
    )
    steps = found.steps.steps
    if not draft.is_given("training.max_steps"):
        steps = _settle_passes(draft, found, questions)
    ui.say(f"  {_describe(found, steps)}")
    if (seconds := found.estimate_seconds(steps)) > LONG:
        fewer = max(1, round(steps * LONG / 2 / seconds))
        ui.say(f"  half an hour is enough for --set training.max_steps={fewer}")
    if (each := max(1, steps // 20)) < LOGGED:
        draft.put("training.logging_steps", each, "steps between two records of the loss")


def _settle_passes(draft: Draft, found: measure.Measured, questions: Questions) -> int:
    """Put the passes that are wanted into the draft, and return how many steps they are."""
    passes = float(draft.read(EPOCHS))
    each = found.steps.steps_per_epoch
    if not draft.is_given(EPOCHS):
        asked = f"passes over the rows (one: {_describe(found, each)})"
        passes = questions.ask(asked, passes, _read_passes)
    steps = math.ceil(each * passes)
    note = f"passes: {_describe(found, steps)}; one took {found.seconds:.2f} s"
    draft.put(EPOCHS, int(passes) if passes.is_integer() else passes, note)
    return steps


def _say_rows_left(found: measure.Measured) -> None:
    """Say what became of the rows as they were prepared."""
    ui.say(f"  data: {found.train_rows.summarise()}")
    if found.eval_rows is not None:
        ui.say(f"  evaluation: {found.eval_rows.summarise()}")


def _describe(found: measure.Measured, steps: int) -> str:
    duration = ui.format_duration(found.estimate_seconds(steps))
    return f"{spell_count(format(steps, ','), 'step')}, about {duration} here"


def _read_passes(text: str) -> float:
    try:
        passes = float(text)
    except ValueError:
        passes = 0.0
    if not 0 < passes < 10_000:
        raise LoraError("a number above 0")
    return passes
