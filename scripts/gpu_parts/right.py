"""Whether each way to train runs on this device and computes what the processor computes.

The tiny model, some steps each, from the same numbers with B not zero: losses, and the gradients of
the first and the last step, against the same run in float32 on this machine's processor (the part
`reference`, which does not see the GPU). Then what was trained is merged, verified and asked.
"""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_parts import models, runs
from gpu_parts.part import Bench, Case, Figures, NotHereError
from gpu_parts.report import Column

TITLE = "Is it right: the tiny model, 6 steps, against float32 on the processor"
COLUMNS = (
    Column("largest loss difference", "loss", 5),
    Column("gradient off, step 1", "first", 2, 100, "%"),
    Column("gradient off, step 6", "last", 2, 100, "%"),
    Column("kind", "kind"),
    Column("as the limits say", "right"),
)
STEPS = 6
METHODS = ("lora", "dora", "qlora", "qdora")
LIMITS = {"float32": (2e-3, 5e-3), "bfloat16": (0.05, 0.15), "float16": (0.02, 0.05)}
"""What a loss, and the first gradient as a share of its length, may be off, by type. On a processor
(`--device cpu`) bfloat16 is off by 0.03 and 0.06; what is wrong is off by its whole length."""
DROPPED = (0.3, 0.8)
"""The same with dropout, whose numbers are other ones on each device."""
CHANGES: dict[str, Figures] = {
    **{name: {"method": name} for name in METHODS},
    "lora, float32": {"model": {"dtype": "float32"}},
    "lora, float16": {"model": {"dtype": "float16"}},
    "lora, dropout": {"lora": {"lora_dropout": 0.1}},
    "dora, dropout": {"method": "dora", "lora": {"lora_dropout": 0.1}},
    "lora, checkpointing": {"training": {"gradient_checkpointing": True}},
    "qlora, checkpointing": {"method": "qlora", "training": {"gradient_checkpointing": True}},
    "lora, trainer: trainer": {"trainer": "trainer"},
    "lora, packing: false": {"training": {"packing": False}},
    "lora, loss_head: stock": {"training": {"loss_head": "stock"}},
    "lora, eager attention": {"model": {"attn_implementation": "eager"}},
    "lora, torch_compile": {"training": {"torch_compile": True}},
}
"""What each case changes in the recipe."""


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    cases = {name: Case(_compare(name), 40) for name in CHANGES if "compile" not in name}
    cases |= {
        "merge and verify lora": Case(_merge("lora")),
        "merge and verify qlora": Case(_merge("qlora")),
        "merge and verify dora": Case(_merge("dora")),
        "memory runs out": Case(run_out_of_memory, 60),
        "lora, torch_compile": Case(_compare("lora, torch_compile"), 90),
    }
    return cases


def _make_recipe(bench: Bench, name: str, changes: Figures) -> Any:
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "max_length": 128,
        "max_grad_norm": 1e9,  # so that no gradient is clipped
    }
    basis: Figures = {
        "data": {"max_rows": 64},
        "model": {"dtype": "bfloat16"},
        "training": training,
    }
    for section, values in changes.items():
        basis[section] = basis.get(section, {}) | values if isinstance(values, dict) else values
    folder = runs.make_folder(bench, name)
    return runs.write_recipe(folder, bench.tiny / "model", bench.tiny / "train.jsonl", basis)


def train_reference(bench: Bench, method: str) -> Figures:
    """Train in float32 on the processor, and keep losses and gradients for `right`."""
    changes = {"method": method, "model": {"dtype": "float32"}}
    recipe = _make_recipe(bench, f"reference {method}", changes)
    seen = runs.Observer(bench.clock, starts_given=True, kept=(1, STEPS))
    losses = [line["loss"] for line in runs.train(recipe, seen)]
    folder = bench.scratch / "reference"
    folder.mkdir(exist_ok=True)
    kept = {
        f"{step}:{key}": tensor
        for step, gradients in seen.gradients.items()
        for key, tensor in gradients.items()
    }
    save_file(kept, folder / f"{method}.safetensors")
    (folder / f"{method}.json").write_text(json.dumps(losses))
    return {"first_loss": losses[0], "last_loss": losses[-1], "tensors": len(kept)}


def _compare(name: str) -> Any:
    """Return the case that trains with the changes of this name and compares."""

    def measure(bench: Bench) -> Figures:
        changes = CHANGES[name]
        if "float16" in name and not bench.clock.on_gpu:
            raise NotHereError("float16 training needs a GPU")
        method = changes.get("method", "lora")
        folder = bench.scratch / "reference"
        if not (folder / f"{method}.json").is_file():
            raise NotHereError(f"the processor's {method} run is missing")
        recipe = _make_recipe(bench, name, changes)
        seen = runs.Observer(bench.clock, starts_given=True, kept=(1, STEPS))
        lines = runs.train(recipe, seen)
        losses = [line["loss"] for line in lines]
        wanted = json.loads((folder / f"{method}.json").read_text())
        kept = load_file(folder / f"{method}.safetensors")
        kind = changes.get("model", {}).get("dtype", "bfloat16")
        found = {
            "loss": max(abs(one - other) for one, other in zip(losses, wanted, strict=True)),
            "first": measure_distance(seen.gradients[1], kept, 1),
            "last": measure_distance(seen.gradients[STEPS], kept, STEPS),
            "kind": kind,
            "skipped": sum(line["grad_norm"] is None for line in lines),
            "losses": losses,
            "wanted": wanted,
        }
        return found | {"right": is_right(found, kind, "dropout" in name)}

    return measure


def measure_distance(found: dict[str, Tensor], kept: dict[str, Tensor], step: int) -> float:
    """Return the length of all gradients' difference as a share of the kept ones' length."""
    wanted = {
        key.partition(":")[2]: value for key, value in kept.items() if key.startswith(f"{step}:")
    }
    if wanted.keys() != found.keys():
        raise RuntimeError(f"{len(found)} tensors have gradients, not {len(wanted)}")
    off = sum(float((found[key] - wanted[key]).double().square().sum()) for key in wanted)
    length = sum(float(value.double().square().sum()) for value in wanted.values())
    return float((off / length) ** 0.5)


def is_right(found: Figures, kind: str, dropped: bool) -> bool:
    """Return whether losses and the first gradients are within what the type allows; of a run whose
    steps a loss scaler has skipped, which it goes behind by, only the first loss."""
    loss, gradient = DROPPED if dropped else LIMITS[kind]
    if found["skipped"]:
        return bool(abs(found["losses"][0] - found["wanted"][0]) <= loss)
    return bool(found["loss"] <= loss and found["first"] <= gradient)


def _merge(method: str) -> Any:
    """Return the case that merges what a method has trained, verifies that and asks both."""

    def measure(bench: Bench) -> Figures:
        folder = bench.scratch / "runs" / method
        adapter, merged = folder / "run/adapter", folder / "merged"
        if not adapter.is_dir():
            raise NotHereError(f"{method} has trained nothing")
        runs.call("merge", adapter, merged)
        said = runs.call("verify", adapter, merged)
        questions = bench.tiny / "eval.jsonl"
        few = folder / "questions.jsonl"
        few.write_text("\n".join(questions.read_text().splitlines()[:32]) + "\n")
        words = ("--file", few, "--max-new-tokens", 24, "--json")
        lines = runs.call("generate", adapter, merged, *words).splitlines()
        answers = [json.loads(line) for line in lines if line.startswith("{")]
        by_model = {
            path: [each["answer"] for each in answers if each["model"] == str(path)]
            for path in (adapter, merged)
        }
        same = sum(one == other for one, other in zip(*by_model.values(), strict=True))
        return {"verified": _leave_out_paths(said), "asked": 32, "same_answers": same}

    return measure


def _leave_out_paths(said: str) -> str:
    """Return what `lora verify` says of two forms, without their names."""
    return " ".join(said.split()).rpartition(": largest ")[2]


def run_out_of_memory(bench: Bench) -> Figures:
    """Train where a step does not fit, with on_oom: reduce; return what it came to."""
    if not bench.clock.on_gpu:
        raise NotHereError("a processor's memory has no such limit")
    model, rows = models.make_model(bench, "wide"), models.write_even_rows(bench, 128, 64)
    training = {"on_oom": "reduce", "max_steps": 3, "per_device_train_batch_size": 16}
    training |= {"max_length": 4096, "gradient_checkpointing": False}
    changes = {"training": training, "model": {"dtype": "bfloat16"}}
    losses, most = [], 0.0
    for name in ("with room", "without"):
        recipe = runs.write_recipe(runs.make_folder(bench, f"memory {name}"), model, rows, changes)
        bench.clock.free()
        # the second time, three quarters of what the first one took
        bench.clock.limit_memory(0.75 * most * 2**20 if most else float("inf"))
        try:
            losses.append([line["loss"] for line in runs.train(recipe, runs.Observer(bench.clock))])
        finally:
            bench.clock.limit_memory(float("inf"))
        most = most or bench.clock.read_memory()["reserved_mib"]
    record = json.loads((recipe.parent / "run/record.json").read_text())
    reduced = record.get("reduced", [])
    off = max(abs(one - other) for one, other in zip(*losses, strict=True))
    if not reduced:
        raise RuntimeError(f"nothing was made smaller below 75 % of {most:.0f} MiB")
    return {"reserved_mib": most, "reduced": [each["pieces"] for each in reduced], "loss": off}
