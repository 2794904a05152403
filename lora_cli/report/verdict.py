"""Say in short sentences whether a run worked, and what of that nobody has looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lora_cli.common import spell_count
from lora_cli.report import answers, outcome
from lora_cli.report.history import History, Made, write_command
from lora_cli.report.seen import number

FORGOTTEN = 1.05
"""Loss on general text over the base's, from where on it is pointed at, where its interval lies
above."""
DROPPED = 0.1
"""The share of rows left out from where on it is pointed at."""


class Sentence(NamedTuple):
    """A part of the verdict. `kind`: `yes`, `look` (it may not have worked) or `open` (nobody has
    looked); `command`: what would tell."""

    kind: str
    text: str
    command: str | None = None


def judge(run: History) -> list[Sentence]:
    """Return what there is to say of a run, the most important first."""
    parts: list[Callable[[History], Iterator[Sentence]]] = [
        _judge_ending,
        _judge_loss,
        _judge_evaluation,
        _judge_scores,
        _judge_forgetting,
        _judge_merge,
        _judge_gguf,
        _judge_rows,
        _judge_reading,
    ]
    return [sentence for part in parts for sentence in part(run)]


def _judge_ending(run: History) -> Iterator[Sentence]:
    steps = count_steps(run)
    after = (
        f"after {spell_count(format(steps, ','), 'step')}"
        if steps
        else "before its first logged step"
    )
    resume = write_command("lora", "train", f"{run.folder}/recipe.yaml", "--resume")
    if run.state == "finished":
        joined = "," if run.record.is_timed_in_part else " in"
        took = f"{joined} {run.record.took}" if run.record.duration else ""
        why = answers.show(str((run.record.kept or {}).get("why") or ""))
        early = f" It ended before its steps were done: {why}." if why else ""
        yield Sentence(
            "yes", f"The run finished: {spell_count(format(steps, ','), 'step')}{took}.{early}"
        )
    elif run.state == "died":
        text = f"The run died {after}: its record says running, but no process holds its folder."
        yield Sentence("look", text, resume)
    elif run.state == "running":
        yield Sentence("open", f"The run goes on, by {run.owner}: this page shows it {after}.")
    elif run.state == "interrupted":
        yield Sentence("look", f"The run was interrupted {after}.", resume)
    elif run.state == "failed":
        yield Sentence("look", f"The run failed {after}.")
    else:
        yield Sentence("open", f"How the run ended is not recorded (status: {run.state}).")


def count_steps(run: History) -> int:
    """Return how many steps a run is known to have done."""
    done = number((run.record.results or {}).get("steps"))
    return int(done) if done is not None else run.metrics.last_step


def _judge_loss(run: History) -> Iterator[Sentence]:
    losses = run.metrics.get("loss")
    fall = outcome.measure_fall(losses)
    if fall is None:
        was = "finite" if losses.gaps else "logged"
        yield Sentence(
            "open", f"Whether the training loss fell is not known: it was {was} once at most."
        )
    else:
        yield _compare_ends(fall)
    if losses.gaps:
        steps = spell_count(format(losses.gaps, ","), "logged step")
        yield Sentence("look", f"The loss was not finite at {steps}.")


def _compare_ends(fall: outcome.Fall) -> Sentence:
    of = (
        "first and last logged step"
        if fall.points == 1
        else f"{fall.points} logged steps at each end"
    )
    said = f"from {fall.first:.4f} to {fall.last:.4f} ({of})"
    if fall.last < fall.first:
        return Sentence("yes", f"The training loss fell {said}.")
    return Sentence("look", f"The training loss did not fall: {said}.")


def _judge_evaluation(run: History) -> Iterator[Sentence]:
    evaluations = run.metrics.list_evaluations()
    best = outcome.find_best(run.record, evaluations)
    if best is None:
        unknown = "whether it learnt more than its own rows is not known."
        if evaluations:
            yield Sentence("look", f"{_count_gaps(len(evaluations))}: {unknown}")
        else:
            yield Sentence("open", f"Not evaluated during the run: {unknown}")
        return
    name = best.metric
    if len(evaluations) == 1:
        text = f"Evaluated once, at step {best.step:,}: {name} {best.value:.4f}."
        yield Sentence("open", f"{text} Whether it was better before is not known.")
    elif best.is_last:
        text = f"Evaluation was best where it stopped: {name} {best.value:.4f} at step"
        yield Sentence("yes", f"{text} {best.last_step:,}.")
    else:
        last = "not finite" if best.last is None else f"{best.last:.4f}"
        both = (
            f"Evaluation was best at step {best.step:,} ({name} {best.value:.4f}), not where it "
            f"stopped (step {best.last_step:,}: {last})"
        )
        kept = outcome.keeps_best(run.record)
        which = "the best step is what was kept" if kept else "the last step is what was kept"
        yield Sentence("yes" if kept else "look", f"{both}; {which}.")
    if best.gaps:
        yield Sentence("look", f"{_count_gaps(best.gaps)}.")


def _count_gaps(number: int) -> str:
    return f"{spell_count(format(number, ','), 'evaluation was', 'evaluations were')} not finite"


def _judge_scores(run: History) -> Iterator[Sentence]:
    base, adapter = outcome.find_pair(run)
    pairs = [
        (name, before, after)
        for name in outcome.list_metrics(adapter)
        if (before := outcome.find_value(base, name))
        and (after := outcome.find_value(adapter, name))
    ]
    if not pairs:
        text = "Not compared with its base on held-out rows."
        folder = run.folder / "adapter"
        command = f"{write_command('lora', 'evaluate', str(folder))} --data FILE"
        is_there = run.state == "finished" or folder.is_dir()
        yield Sentence("open", text, command if is_there else None)
        return
    for name, before, after in sorted(pairs, key=lambda each: each[0] not in ("exact", "loss"))[:2]:
        yield _compare_scores(name, before, after, outcome.find_difference(run, name))


def _compare_scores(
    name: str,
    before: dict[str, float],
    after: dict[str, float],
    difference: dict[str, float] | None,
) -> Sentence:
    """Say how a metric of the base became the adapter's; `difference`: that of the same rows."""
    change = after["value"] - before["value"]
    better = -change if outcome.is_better_less(name) else change
    count = format(int(after.get("count") or 0), ",")
    rows = f" of {spell_count(count, 'held-out row')}" if "count" in after else ""
    said = f"{name}{rows}: {before['value']:.4g} before, {after['value']:.4g} after"
    clear = None
    if difference and {"low", "high"} <= difference.keys():
        low, high = difference["low"], difference["high"]
        clear, said = (
            not low <= 0 <= high,
            f"{said}; the difference lies in {low:.4g} to {high:.4g}",
        )
    elif {"low", "high"} <= before.keys() & after.keys():
        clear = after["low"] > before["high"] or after["high"] < before["low"]
        said += f"; the intervals {'do not overlap' if clear else 'overlap'}"
    if clear is False:
        return Sentence("look", f"No clear difference in {said}.")
    word = "Better" if better > 0 else "Worse" if better < 0 else "The same"
    return Sentence("yes" if better > 0 else "look", f"{word} in {said}.")


def _judge_forgetting(run: History) -> Iterator[Sentence]:
    base, adapter = map(_read_forgetting, outcome.find_pair(run))
    before, after = number(base.get("loss")), number(adapter.get("loss"))
    if before is None or after is None:
        return
    said = f"loss on general text: {before:.4f} before, {after:.4f} after"
    difference = adapter.get("difference")
    ends = difference if isinstance(difference, dict) else {}
    low, high = number(ends.get("low")), number(ends.get("high"))
    much = (FORGOTTEN - 1) * before
    if low is None or high is None:
        low = high = after - before
    else:
        said += f"; the difference lies in {low:.4g} to {high:.4g}"
    if low > much:
        yield Sentence("look", f"It has forgotten something: {said}.")
    elif high <= much:
        yield Sentence("yes", f"It has forgotten little or nothing: {said}.")
    else:
        yield Sentence("open", f"Whether it has forgotten something is not clear: {said}.")


def _read_forgetting(model: dict[str, Any] | None) -> dict[str, Any]:
    given = (model or {}).get("forgetting")
    return given if isinstance(given, dict) else {}


def _judge_merge(run: History) -> Iterator[Sentence]:
    merged = [made for made in run.made if made.kind == "merged"]
    if not merged:
        if run.state == "finished":
            command = write_command("lora", "merge", f"{run.folder}/adapter", "OUT")
            yield Sentence("open", "Not merged, as far as can be seen from here.", command)
        return
    for made in merged:
        checked = made.record.checked
        name = made.path.resolve().name
        if not isinstance(checked, dict):
            yield Sentence(
                "open", f"{name} is merged; that it is what was trained is not verified."
            )
            continue
        yield Sentence(
            "yes", f"What was merged is what was trained: {name}, {_say_merged(checked)}."
        )


def _say_merged(checked: dict[str, Any]) -> str:
    """Return the figure that shows most of how a merge was checked."""
    for name, when in (("before_rounding", "before rounding"), ("rounded", "as written")):
        figures = checked.get(name)
        if isinstance(figures, dict) and (far := number(figures.get("max_abs"))) is not None:
            return f"largest difference of a logit {far:.1e} {when}"
    return "weight by weight; its logits were not compared"


def _judge_gguf(run: History) -> Iterator[Sentence]:
    for made in run.made:
        if made.kind == "gguf":
            yield _judge_file(made)


def _judge_file(made: Made) -> Sentence:
    name, checked = made.path.name, made.record.checked
    if not checked or (isinstance(checked, str) and checked.startswith("not compared")):
        return Sentence("open", f"{name} is not verified: there was no llama.cpp to open it.")
    likeness = (made.record.figures or {}).get("likeness")
    top1 = number(likeness.get("top1")) if isinstance(likeness, dict) else None
    if top1 is None:
        return Sentence("yes", f"{name} was opened in llama.cpp and compared with the model.")
    text = f"{name}, in llama.cpp: the model's likeliest token at {top1:.1%} of the positions."
    return Sentence("yes" if top1 > 0.9 else "look", text)


def _judge_rows(run: History) -> Iterator[Sentence]:
    data = run.record.data or {}
    read, rows = number(data.get("read")), number(data.get("rows"))
    left_out = data.get("left_out")
    if not read or rows is None or not isinstance(left_out, dict):
        return
    dropped = sum(
        number(count) or 0 for why, count in left_out.items() if why.startswith("dropped")
    )
    if dropped > DROPPED * read:
        of = spell_count(format(int(read), ","), "row")
        were = "was" if int(dropped) == 1 else "were"
        text = f"{int(dropped):,} of {of} {were} left out ({dropped / read:.0%})."
        yield Sentence("look", text)


def _judge_reading(run: History) -> Iterator[Sentence]:
    if unreadable := run.metrics.unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable:,} lines"
        yield Sentence("look", f"{lines} of metrics.jsonl could not be read, as after a crash.")
    for problem in run.problems:
        yield Sentence("look", f"Not on this page: {answers.show(problem)}.")
