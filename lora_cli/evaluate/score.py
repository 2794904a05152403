"""`lora evaluate`: score models on held-out rows, side by side: the base against an adapter, a
merged model, a GGUF file.

What is computed of each model is kept under a fingerprint of the model, the rows and how answers
are drawn, so an evaluation that was killed goes on, and a finished one is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import (
    UsageError,
    find_nearest,
    lock,
    privacy,
    provenance,
    quote,
    spell_count,
    ui,
)
from lora_cli.evaluate import (
    compute_scores,
    forgetting,
    harness,
    held_out,
    kept_scores,
    own_rows,
    scoreboard,
    scored_models,
)
from lora_cli.evaluate.answerers import Sampling
from lora_cli.evaluate.computing import Computing, Wanted, is_known
from lora_cli.evaluate.held_out import HeldOut, HeldRow
from lora_cli.evaluate.input_rows import parse_columns
from lora_cli.evaluate.kept_scores import GENERAL, Finished, Kept
from lora_cli.evaluate.scored_models import Scored, Shelf
from lora_cli.scoring import answer_metrics, regexes

Known = dict[str, Mapping[int, Mapping[str, Any]]]
"""What is known of the rows of each model, by its label."""


class Request(NamedTuple):
    """What is asked for on the command line."""

    data: str | None
    metrics: Sequence[str] = ()
    """Names; none: by the data."""
    pattern: str | None = None
    out: Path | None = None
    base: str | None = None
    adds_base: bool = True
    sampling: Sampling = Sampling(256, 0.0)
    batch_size: int = 8
    max_rows: int | None = None
    columns: Sequence[str] = ()
    skips_bad: bool = False
    general: bool = True
    """Whether the loss on the general text is measured."""
    tasks: Sequence[str] = ()
    tasks_path: Path | None = None
    show: int = 3
    as_json: bool = False
    fresh: bool = False


def evaluate(paths: Sequence[str], request: Request) -> None:
    """Score each model, print the table, and write evaluation.json and answers.jsonl. Raises
    LoraError for the first row that cannot be scored, unless these are skipped."""
    _refuse_contradictions(request)
    scored = scored_models.list_scored(paths, request.base, request.adds_base, request.data)
    held = _read_rows(request, scored)
    choice = _choose_metrics(request, held)
    tasks = harness.find_tasks(request.tasks, request.tasks_path) if request.tasks else None
    folder = request.out or _choose_folder(scored, request)
    kept_scores.refuse_other_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold_folder(folder):
        run = Run(request, scored, held, choice, folder)
        run.compute(tasks)
        evaluation = run.finish()
    if request.as_json:
        ui.report_json(evaluation)
    else:
        scoreboard.report(evaluation, choice.names)
        run.show_differing()
    ui.say(f"evaluation: {folder / kept_scores.EVALUATION}, {folder / kept_scores.ANSWERS}")


def _refuse_contradictions(request: Request) -> None:
    """Raise UsageError for options that cannot be together, or that are missing."""
    for name in request.metrics:
        if name not in answer_metrics.METRICS:
            guess = find_nearest(name, answer_metrics.METRICS)
            known = ", ".join(answer_metrics.METRICS)
            raise UsageError(
                f"--metrics {name}: there is no such metric",
                f"did you mean {guess}?" if guess else f"they are {known}",
            )
    _refuse_pattern(request)
    if request.tasks_path is not None and not request.tasks:
        raise UsageError("--tasks-path is for --tasks", "--tasks NAME")


def _refuse_pattern(request: Request) -> None:
    """Raise UsageError for a metric without its pattern, and a pattern without its metric."""
    if "regex" in request.metrics and request.pattern is None:
        raise UsageError("--metrics regex needs a pattern", "--regex PATTERN")
    if request.pattern is None:
        return
    if request.metrics and "regex" not in request.metrics:
        named = ",".join([*request.metrics, "regex"])
        raise UsageError("--regex is for the metric regex", f"--metrics {named}")
    regexes.refuse_pattern(request.pattern)


def _read_rows(request: Request, scored: Sequence[Scored]) -> HeldOut | None:
    given = parse_columns(request.columns)
    if request.data is not None:
        columns = scored_models.find_columns(scored)
        objective = scored_models.find_objective(scored)
        held = held_out.read_held_out(request.data, given, columns, request.max_rows, objective)
    elif not request.tasks:
        held = own_rows.read_own_rows(scored, given, request.max_rows)
    else:
        return None
    held_out.refuse_bad(held, request.skips_bad)
    return held


def _choose_metrics(request: Request, held: HeldOut | None) -> answer_metrics.Choice:
    """Return the metrics that are measured, and say which and why where nobody named them."""
    if held is None:
        return answer_metrics.Choice((), "there are no rows")
    if request.metrics:
        return answer_metrics.Choice(tuple(dict.fromkeys(request.metrics)), "named")
    chosen = answer_metrics.choose_metrics(held.expected)
    learnt = any(row.has_answer for row in held.rows)
    names = (
        *(answer_metrics.OF_LOSS if learnt else ()),
        *chosen.names,
        *(("regex",) if request.pattern else ()),
    )
    rows = spell_count(len(held.rows), "row")
    why = f"{rows}, {len(held.expected)} with an expected answer; {chosen.why}"
    ui.say(f"metrics: {', '.join(names) or 'none'} ({why}); --metrics names others")
    return answer_metrics.Choice(names, chosen.why)


def _choose_folder(scored: Sequence[Scored], request: Request) -> Path:
    """Return where results are put by default: in the run of the first adapter, else here.

    Those of its first rows, or of a checkpoint, do not take the place of the others.
    """
    own = "tasks" if request.tasks else "held-out"
    name = Path(request.data).name.partition(".")[0] or "rows" if request.data else own
    if request.max_rows is not None:
        name += f"-first-{request.max_rows}"
    for each in scored:
        folder = Path(each.path).resolve()
        run = folder.parent
        if each.kind == "adapter" and (run / provenance.RUN_RECORD).is_file():
            beside = Path(each.path).parent if Path(each.path).name else run
            of = "" if folder.name == "adapter" else f"-{folder.name}"
            return beside / "evaluations" / f"{name}{of}"
    return Path("evaluation")


class Run:
    """An evaluation at work in its folder."""

    def __init__(
        self,
        request: Request,
        scored: Sequence[Scored],
        held: HeldOut | None,
        choice: answer_metrics.Choice,
        folder: Path,
    ) -> None:
        self.request, self.scored, self.held = request, scored, held
        self.names, self.folder = choice.names, folder
        self.record = provenance.new_record("evaluate")
        self.rows: Sequence[HeldRow] = held.rows if held else []
        self.finished = Finished(folder)
        self.kept: dict[str, Kept] = {}
        self.tasks: dict[str, Any] = {}
        reader = scored_models.find_reader(scored)
        self.wanted = Wanted(
            self.rows,
            any(name in answer_metrics.OF_LOSS for name in choice.names),
            any(name not in answer_metrics.OF_LOSS for name in choice.names) or not choice.names,
            request.general,
            request.sampling,
            request.batch_size,
            str(reader.recipe.data.get("train_on") or "assistant") if reader else "assistant",
            request.skips_bad,
            reader.tokenizer if reader else None,
        )

    def compute(self, tasks: harness.Tasks | None) -> None:
        """Compute what is not known of each model, one after the other."""
        shelf = Shelf()
        try:
            for scored in self.scored:
                kept = self.kept[scored.label] = self._open_kept(scored)
                if kept.begun:
                    ui.say(
                        f"{scored.label}: goes on; "
                        f"{spell_count(kept.begun, 'row was', 'rows were')} begun "
                        "before"
                    )
                if not is_known(self.wanted, kept):
                    answerer = shelf.open(scored)
                    compute_scores.compute(Computing(scored, answerer, self.wanted, kept))
                if tasks is not None:
                    self._run_tasks(tasks, scored, shelf)
        finally:
            shelf.close()

    def _open_kept(self, scored: Scored) -> Kept:
        """Return what is known of a model, from a finished evaluation or a killed one."""
        reader = None
        if scored.kind == "gguf" and self.wanted.reader is not None:
            reader = scored_models.hash_reader(self.wanted.reader)
        fingerprint = scored_models.make_key(
            {
                "model": scored.identity,
                "reader": reader,
                "data": self.held.key if self.held else None,
                "train_on": self.wanted.train_on,
                "sampling": list(self.request.sampling),
                "general": forgetting.read_passages(),
            }
        )
        known = {} if self.request.fresh else self.finished.by_model.get(fingerprint, {})
        kept = Kept(self.folder, fingerprint, known, self.request.fresh)
        if not self.wanted.skips_bad:
            kept.forget_errors()
        if known and is_known(self.wanted, kept):
            ui.say(f"{scored.label}: as computed before (--fresh computes again)")
        return kept

    def _run_tasks(self, tasks: harness.Tasks, scored: Scored, shelf: Shelf) -> None:
        key = scored_models.make_key([scored.identity, tasks.key, self.request.batch_size])
        before = None if self.request.fresh else self.finished.find_tasks(key)
        if before is not None:
            self.tasks[scored.label] = before
            return
        results = harness.run_tasks(
            tasks, scored.label, shelf.open(scored), self.request.batch_size
        )
        if results is not None:
            self.tasks[scored.label] = {"key": key, "results": results}

    def finish(self) -> dict[str, Any]:
        """Return the evaluation, after writing it and every answer; what is only for a process that
        is killed is removed."""
        self.known: Known = {label: kept.rows for label, kept in self.kept.items()}
        self.scores = {
            label: scoreboard.score_rows(self.rows, known, self.names, self.request.pattern)
            for label, known in self.known.items()
        }
        self.differing = scoreboard.find_differing(self.rows, self.known)
        evaluation = self._describe()
        kept_scores.write_finished(self.folder, evaluation, self._list_lines())
        for kept in self.kept.values():
            kept.remove()
        return evaluation

    def _describe(self) -> dict[str, Any]:
        held, sampling = self.held, self.request.sampling
        first = next((each for each in self.scored if each.kind == "base"), self.scored[0])
        counted = {
            label: {
                name: scoreboard.count_metric(name, self.rows, known, self.scores[label])
                for name in self.names
            }
            for label, known in self.known.items()
        }
        data = {"name": held.name, "sha256": held.sha256, "rows": len(held.rows)} if held else None
        return self.record | {
            "data": data,
            "sampling": sampling._asdict() | {"train_on": self.wanted.train_on},
            "metrics": list(self.names),
            **({"regex": self.request.pattern} if self.request.pattern else {}),
            "against": first.label,
            "models": privacy.make_portable(
                [self._describe_model(each, first, counted) for each in self.scored]
            ),
            "differing": len(self.differing),
        }

    def _describe_model(
        self,
        scored: Scored,
        first: Scored,
        counted: Mapping[str, Mapping[str, scoreboard.Counted]],
    ) -> dict[str, Any]:
        label, kept = scored.label, self.kept[scored.label]
        own, others = counted[label], counted[first.label]
        of_base = self.kept[first.label].get(GENERAL).get("general")
        differences = {
            name: found
            for name in self.names
            if label != first.label
            and (found := scoreboard.compare(name, others[name], own[name])) is not None
        }
        return {
            "label": label,
            "kind": scored.kind,
            "path": scored.path,
            "fingerprint": kept.fingerprint,
            "metrics": {name: scoreboard.measure(name, own[name]) for name in self.names},
            "differences": differences,
            "unended": compute_scores.warn_of_answers(scored, self.wanted, kept),
            "forgetting": forgetting.describe(kept.get(GENERAL).get("general"), of_base),
            "tasks": self.tasks.get(label),
        }

    def _list_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of answers.jsonl: each row with each model."""
        for row in self.rows:
            for label, known in self.known.items():
                found = known.get(row.number, {})
                yield {
                    "row": row.number,
                    "place": held_out.shorten_place(row.place, self.request.data or ""),
                    "model": privacy.make_portable(label),
                    "prompt": row.question.text if row.question else None,
                    "expected": row.expected,
                    "answer": found.get("answer"),
                    "scores": self.scores[label][row.number],
                    **{
                        key: found[key]
                        for key in ("ended", "foreseen", "tokens", "no_loss", "error")
                        if key in found
                    },
                }

    def show_differing(self) -> None:
        """Print the rows in which models differ, as many as are asked for."""
        if len(self.scored) < 2 or not self.wanted.answers or not self.rows:
            return
        ui.report(
            "",
            f"{len(self.differing)} of {spell_count(len(self.rows), 'row')} "
            f"{'is' if len(self.differing) == 1 else 'are'} answered "
            "differently",
        )
        shown = self.differing[: self.request.show]
        scoreboard.show_rows(shown, self.known, self.scores, self.names)
        if len(self.differing) > len(shown):
            ui.report("", f"{len(self.differing) - len(shown)} more are in {quote(self.folder)}")
