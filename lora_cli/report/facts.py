"""Gather all that a report says, as plain data: report.json holds it, and the page shows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

from lora_cli import __version__
from lora_cli.common import escape, privacy, provenance
from lora_cli.recipe import TASKS
from lora_cli.report import answers, differences, outcome, verdict
from lora_cli.report.history import (
    Evaluation,
    History,
    Made,
    describe_path,
    name_runs,
    write_command,
)
from lora_cli.report.metrics import Metrics
from lora_cli.report.seen import number, parse_time

MOST_EVALUATIONS = 40
"""Evaluations that stand in a table; of more, the first, the last, the best, and some between."""
LOSSES = {"loss": "Training loss", "eval_loss": "Evaluation loss"}
CURVES = {
    **{name: (title, "nats per trained token") for name, title in LOSSES.items()},
    "rewards_margin": ("Margin of rewards", "better answers above worse ones"),
    "kl": ("Likelier by training", "nats, answers to other prompts"),
    "rewards_accuracy": ("Pairs told apart right", "share"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Tokens per second", "since the run was started"),
    "images_per_second": ("Images per second", "since the run was started"),
    "peak_memory_gb": ("Peak memory", "GB"),
    "mfu": ("Share of the card's peak", "MFU"),
}
"""The metrics that are drawn: title and unit."""


def gather(runs: Sequence[History]) -> dict[str, Any]:
    """Return what the report of these runs says: without secrets, the home folder or characters
    that hide."""
    found = {
        "command": "report",
        "made": show_time(provenance.now()),
        "version": __version__,
        "runs": [gather_run(run, name) for run, name in zip(runs, name_runs(runs), strict=True)],
        "differences": differences.compare([run.record for run in runs]) if len(runs) > 1 else [],
    }
    made: dict[str, Any] = privacy.make_portable(found)
    return privacy.map_texts(made, lambda text: escape(text, "\n\t"))


def gather_run(run: History, name: str) -> dict[str, Any]:
    """Return what a report says of one run, which is called `name` there."""
    evaluations = run.metrics.list_evaluations()
    return {
        "name": answers.show(name),
        "folder": describe_path(run.folder),
        "state": answers.show(run.state),
        "verdict": [sentence._asdict() for sentence in verdict.judge(run)],
        "summary": summarise(run, evaluations),
        "recipe": differences.list_own(run.record),
        "chosen": differences.list_chosen(run.record),
        "data": _gather_data(run),
        "curves": _gather_curves(run.metrics, run.record.recipe),
        "lines": {"read": run.metrics.lines, **_count("unreadable", run.metrics.unreadable)},
        "evaluations": _gather_evaluations(run, evaluations),
        "samples": _gather_samples(run),
        "scores": [_gather_scores(folder.name, each) for folder, each in run.evaluations],
        "rows": _gather_rows(run),
        "parity": [_gather_parity(made) for made in run.made],
        "provenance": _gather_provenance(run),
        "repeat": _list_commands(run),
    }


def summarise(run: History, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a run in a few values; those that are not known are left out."""
    record, results = run.record, run.record.results or {}
    best = outcome.find_best(record, evaluations)
    fall = outcome.measure_fall(run.metrics.get("loss"))
    data, parameters = record.data or {}, record.parameters
    found = {
        "base": answers.show(record.short_base),
        "base_made_from": answers.show(record.base.source) or None,
        "method": answers.show(record.method),
        "task": differences.plain(record.recipe.get("task")),
        "started": show_time(record.started),
        "duration_s": record.duration,
        "duration_of": "since it was resumed" if record.is_timed_in_part else None,
        "steps": verdict.count_steps(run),
        "loss_first": fall and fall.first,
        "loss_last": fall and fall.last,
        "train_loss": results.get("train_loss"),
        "judged_by": best and best.metric,
        "evaluation_best": best and best.value,
        "evaluation_best_step": best and best.step,
        "evaluation_last": best and best.last,
        "kept_step": outcome.find_kept_step(record),
        "exact": outcome.find_exact([each for _, each in run.evaluations]),
        "rows": data.get("rows"),
        "trained_tokens": data.get("trained_tokens"),
        "parameters_trained": parameters.get("trainable"),
        "tokens_per_second": results.get("tokens_per_second"),
        "images_per_second": results.get("images_per_second"),
        "peak_memory_gb": results.get("peak_memory_gb"),
        "processes": record.processes,
    }
    return {
        name: value
        for name, value in found.items()
        if value is not None and (isinstance(value, str) or number(value) is not None)
    }


def show_time(text: str) -> str:
    """Return a time of a record such as `2026-11-27 11:10 UTC`, or as it is where it is none."""
    found = parse_time(text)
    return f"{found.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if found else answers.show(text)


def _gather_data(run: History) -> dict[str, Any]:
    """Return what is recorded of the rows."""
    data, names = run.record.data or {}, ("read", "rows", "tokens", "trained_tokens")
    found: dict[str, Any] = {
        name: count for name in names if (count := number(data.get(name))) is not None
    }
    if found.get("tokens") and "trained_tokens" in found:
        found["trained_share"] = found["trained_tokens"] / found["tokens"]
    if found.get("rows") and "tokens" in found:
        found["tokens_per_row"] = found["tokens"] / found["rows"]
    longest = number(run.record.get("training", "max_length"))
    found |= {} if longest is None else {"longest_allowed": longest}
    left_out = data.get("left_out")
    found["left_out"] = [
        {"reason": answers.show(str(reason)), "rows": int(count)}
        for reason, count in (left_out.items() if isinstance(left_out, dict) else ())
        if number(count)
    ]
    held = run.record.holdout or {}
    for name in ("rows", "of"):
        if (count := number(held.get(name))) is not None:
            found[f"held_out_{name}"] = count
    return found


def _gather_curves(metrics: Metrics, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return of each metric that is drawn where it began and ended, and its extremes."""
    found = []
    for name, (title, unit) in CURVES.items():
        series = metrics.get(name)
        finite = series.finite()
        if not series.steps:
            continue
        unit = find_loss_unit(recipe) if name in LOSSES else unit
        made: dict[str, Any] = {"name": name, "title": title, "unit": unit}
        made |= {"points": len(series.steps)} | _count("not_finite", series.gaps)
        if finite:
            least, most = (choose(finite, key=lambda each: each[1]) for choose in (min, max))
            made |= {"first": finite[0][1], "last": finite[-1][1]}
            made |= {"least": least[1], "least_step": least[0]}
            made |= {"most": most[1], "most_step": most[0]}
        found.append(made)
    return found


def find_loss_unit(recipe: Mapping[str, Any]) -> str:
    """Return what the loss of a run by this recipe is a mean over."""
    if recipe.get("objective", "sft") != "sft":
        return f"a mean over {'answers' if recipe['objective'] == 'kto' else 'pairs'}"
    others = {task.name for task in TASKS if not task.writes_text}
    return "a mean over labels" if recipe.get("task") in others else CURVES["loss"][1]


def _count(name: str, number: int) -> dict[str, int]:
    """Return a count by its name, nothing where that is 0: a page does not speak of it."""
    return {name: number} if number else {}


def _gather_evaluations(run: History, evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the evaluations during the run that stand in its table."""
    best = outcome.find_best(run.record, evaluations)
    every = -(-len(evaluations) // MOST_EVALUATIONS) or 1
    kept = [
        each
        for at, each in enumerate(evaluations)
        if at % every == 0 or at == len(evaluations) - 1 or (best and each["step"] == best.step)
    ]
    names = dict.fromkeys(name for each in evaluations for name in each if name != "step")
    return {
        "count": len(evaluations),
        "names": [answers.show(name) for name in list(names)[:12]],
        "shown": [
            {answers.show(name): value for name, value in each.items() if name in (*names, "step")}
            for each in kept
        ],
        **({"best_step": best.step} if best else {}),
    }


def _gather_samples(run: History) -> dict[str, Any]:
    """Return the sample prompts with their first answer, and that of the step that became the
    adapter, or else their last."""
    found, kept = [], outcome.find_kept_step(run.record)
    for prompt, given in run.samples.prompts.items():
        first, last = min(given), kept if kept in given else max(given)
        found.append(
            {
                "prompt": prompt,
                "first_step": first,
                "first": given[first],
                "last_step": last,
                "last": given[last],
            }
        )
    return {"prompts": found, **_count("unreadable", run.samples.unreadable)}


def _gather_scores(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Return what an evaluation on held-out rows measured of each model."""
    models = []
    for model in evaluation.models:
        differences = {"metrics": model.get("differences")}
        metrics, apart = (
            {
                answers.show(metric): value
                for metric in outcome.list_metrics(each)
                if (value := outcome.find_value(each, metric))
            }
            for each in (model, differences)
        )
        forgetting = model.get("forgetting")
        forgetting = forgetting if isinstance(forgetting, dict) else {}
        models.append(
            {
                "label": answers.show(str(model.get("label") or model.get("kind") or "model")),
                "kind": answers.show(str(model.get("kind") or "")),
                "metrics": metrics,
                "differences": {
                    name: {key: value[key] for key in ("value", "low", "high") if key in value}
                    for name, value in apart.items()
                    if name in metrics
                },
                "forgetting": {
                    key: count
                    for key in ("loss", "tokens")
                    if (count := number(forgetting.get(key))) is not None
                },
            }
        )
    data = evaluation.data
    said: dict[str, Any] = {"name": answers.show(name), "started": answers.show(evaluation.started)}
    said |= {"data": answers.show(str(data.get("name") or "")), "models": models}
    said |= {"against": answers.show(str(evaluation.to_data().get("against") or "the first"))}
    said |= {"sha256": answers.show(str(data.get("sha256") or ""))}
    counts = {"rows": data.get("rows"), "differing": evaluation.differing}
    return said | {key: value for key, value in counts.items() if number(value) is not None}


def _gather_rows(run: History) -> dict[str, Any]:
    """Return some rows of the newest evaluation that has answers, with each model's."""
    for folder, evaluation in reversed(run.evaluations):
        rows, unreadable = answers.read_rows(folder / "answers.jsonl")
        if rows:
            labels = dict.fromkeys(
                answers.show(str(each.get("label"))) for each in evaluation.models
            )
            return {
                "evaluation": answers.show(folder.name),
                "models": list(labels),
                "shown": [vars(row) | {"differs": row.differs} for row in rows],
                **_count("unreadable", unreadable),
            }
    return {"models": [], "shown": []}


def _gather_parity(made: Made) -> dict[str, Any]:
    """Return how a merged model or a GGUF file was compared with what it was made from."""
    record, checked = made.record, made.record.checked
    found: dict[str, Any] = {"kind": made.kind, "name": answers.show(made.path.resolve().name)}
    found["type"] = answers.show(record.type or "") or None
    found["figures"] = []
    if isinstance(checked, dict):
        for name, against in (
            ("before_rounding", "base with adapter, before rounding"),
            ("rounded", "base with adapter, as written"),
        ):
            found["figures"] += _list_figures(against, checked.get(name))
        said = [checked.get("weights"), _say_trained(checked.get("trained"))]
        found["said"] = [answers.show(each) for each in said if isinstance(each, str)]
    else:
        figures = record.figures or {}
        found["figures"] += _list_figures("the merged model", figures.get("likeness"))
        found["figures"] += _list_figures("the same type's cost to the base", figures.get("base"))
        found["said"] = [answers.show(checked)] if checked else ["not verified"]
    return found


def _say_trained(said: Any) -> str | None:
    return f"base with adapter against the end of training: {said}" if said else None


def _list_figures(against: str, given: Any) -> list[dict[str, Any]]:
    """Return a line of the table of parity, none where nothing was measured."""
    names = ("max_abs", "mean_kl", "top1", "perplexity", "other_perplexity", "num_positions")
    if not isinstance(given, dict):
        return []
    values = {name: found for name in names if (found := number(given.get(name))) is not None}
    return [{"against": against, **values}] if values else []


def _gather_provenance(run: History) -> dict[str, Any]:
    """Return what tells this run, its base and its rows from others."""
    record = run.record
    device = record.device or {}
    found = {
        "run": record.id,
        "base": record.base.name,
        "commit": record.base.commit,
        "base_made_from": record.base.source or None,
        "base_gguf_sha256": (record.base.made_from or {}).get("sha256"),
        "base_fingerprint_sha256": _digest_base(run),
        "data": (record.data or {}).get("fingerprint"),
        "held_out": (record.holdout or {}).get("fingerprint"),
        "trained_on_from": (record.parent or {}).get("name"),
        "parent_sha256": (record.parent or {}).get("sha256"),
        "device": " ".join(str(device[name]) for name in ("kind", "name") if device.get(name)),
        "started": show_time(record.started),
        "resumed": ", ".join(map(show_time, record.resumed)) or None,
        "changed": "; ".join(record.changed) or None,
    }
    named = {name: answers.show(str(value)) for name, value in found.items() if value}
    versions = {answers.show(name): answers.show(value) for name, value in record.versions.items()}
    return {"names": named, "versions": versions}


def _digest_base(run: History) -> str | None:
    """Return one digest of the base's fingerprint, which has one for each tensor."""
    given = run.record.base.fingerprint
    text = json.dumps(given, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest() if given else None


def _list_commands(run: History) -> list[dict[str, str]]:
    """Return the commands that repeat a run, or look further at it, in the folder it was started
    in."""
    given = run.record.recipe.get("output_dir")
    folder = given if isinstance(given, str) and given else str(run.folder)
    folder = answers.show(folder)
    version = run.record.versions.get("lora-cli")
    install = write_command("pip", "install", f"lora-cli=={answers.show(version or __version__)}")
    train = write_command("lora", "train", f"{folder}/recipe.yaml", "--set")
    commands = {
        "the same version of lora": install,
        "the same run, in another folder": f"{train} {write_command(f'output_dir={folder}-again')}",
        "a plain model of it": write_command(
            "lora", "merge", f"{folder}/adapter", f"{folder}-merged"
        ),
        "this page again": write_command("lora", "report", folder),
    }
    return [{"does": does, "command": command} for does, command in commands.items()]
