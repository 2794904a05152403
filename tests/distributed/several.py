"""Train several recipes, one after another, in one process of several:
`several.py FOLDER`, under torchrun or alone.

FOLDER holds NAME.yaml files; the run of each is FOLDER/COUNT-NAME, where COUNT is the number of
processes, and FOLDER/COUNT-NAME.rows.RANK lists the rows that this process has trained on, a line
for each pass.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402

from lora_cli.distributed import place, ranks  # noqa: E402
from lora_cli.models import host_blocks  # noqa: E402
from lora_cli.recipe import load  # noqa: E402
from lora_cli.train import run, sharding, trial, zero3  # noqa: E402
from lora_cli.train.trainers import Watched  # noqa: E402


def note_rows(path: Path, sharded: bool) -> Any:
    """Return a `training_step` that notes the ids it is given, without padding and empty rows, and
    checks in its first pass that a `sharded` base is one."""
    own, checked = Watched.training_step, list[Watched]()

    def training_step(trainer: Watched, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        assert trainer.args.world_size == ranks.count()
        assert ranks.count() == 1 or dist.get_world_size() == ranks.count()
        if sharded and trainer not in checked:
            checked.append(trainer)
            check_part(trainer.model, trainer.options.replicas)
        with path.open("a") as file:
            kept = inputs["input_ids"][inputs["labels"] != -100]
            file.write(" ".join(map(str, sorted(kept.tolist()))) + "\n")
        return own(trainer, model, inputs, *args)

    return training_step


def check_part(network: Any, replicas: int = 1) -> None:
    """Check that this process holds its part of a sharded base, and no more. What is trained, a
    seventh of the tiny model in 4 bits, DeepSpeed leaves whole."""
    own, whole = sharding.measure(network)
    trained = sum(each.nbytes for each in network.parameters() if each.requires_grad)
    assert own < trained + (0.05 + replicas / ranks.count()) * (whole - trained), (own, whole)


own_let_gather = zero3._let_gather


def check_passes(network: Any, allowed: bool) -> None:
    """Check it where each pass begins, too: but for evaluations, from which DeepSpeed keeps up to a
    billion of numbers for the pass that comes."""
    if allowed and network.training:
        check_part(network)
    own_let_gather(network, allowed)


def note_blocks(patch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list of networks whose blocks wait on the host from now on."""
    own, kept = host_blocks.keep, list[Any]()

    def keep(network: Any, device: Any) -> None:
        kept.append(network)
        own(network, device)

    patch.setattr(host_blocks, "keep", keep)
    return kept


def main() -> None:
    folder = Path(sys.argv[1])
    trial.try_training = lambda recipe: None  # it is for recipes of strangers
    with ranks.joined(place.take_place(os.environ)):
        for file in sorted(folder.glob("*.yaml")):
            out = folder / f"{ranks.count()}-{file.stem}"
            recipe = load.load_recipe(file, [f"output_dir={out}"])
            strategy = recipe.distributed.strategy
            sharded = ranks.count() > 1 and strategy in ("fsdp", "deepspeed-zero3")
            with pytest.MonkeyPatch.context() as patch:
                noting = note_rows(Path(f"{out}.rows.{ranks.number()}"), sharded)
                patch.setattr(Watched, "training_step", noting)
                if recipe.training.eval_strategy == "no":
                    patch.setattr(zero3, "_let_gather", check_passes)
                kept = note_blocks(patch)
                run.train(recipe)
            plain = not recipe.quantized and recipe.lora.init_lora_weights is True
            assert bool(kept) == (sharded and plain)
            assert not any(network in host_blocks._visits for network in kept)


if __name__ == "__main__":
    main()
