"""A tiny random model of every causal architecture that this transformers builds: checked, trained
by a step of LoRA, merged, verified and asked; or refused, with the reason.

Merging is held against plain PEFT. What cannot be built small, or does not run in transformers
itself, is named in `tests/architectures.py`. Hermetic, minutes. Alone: pytest -m slow
tests/cli/test_architectures.py; `python -m tests.cli.test_architectures` prints the table.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_cli.common import LoraError
from lora_cli.evaluate import verify
from lora_cli.evaluate.answerers import Asked, Sampling, open_models
from lora_cli.merge import merge
from lora_cli.models import Base
from lora_cli.plan import check
from lora_cli.recipe import load
from lora_cli.train import run
from tests import architectures
from tests.units import same_sum

LOST = (".shared_expert.", "_sconv.weight_proj")
"""Tensors in Laguna and Inkling 2 whose adapters PEFT 0.21 saves and does not load: it takes their
names for older ones. lora loads them, and says so."""
ENCODER = "is an encoder, in which each token sees the next ones"
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie",
    "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm",
    "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
)  # fmt: skip
REFUSED = dict.fromkeys(ENCODERS, ENCODER) | {
    "reformer": "axial_pos_shape factors: (16, 16) multiply to sequence length",
}
"""By family: what is said."""


def go_through(family: str, tiny: Path, folder: Path) -> str:
    """Take a family through the verbs; return what was merged in words. Raises LoraError where one
    refuses, AssertionError where one is wrong."""
    base = architectures.make_folder(family, folder / "base", tiny / "model")
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {base}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 8}}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-2,"
        " lr_scheduler_type: constant, max_length: 64, save_strategy: 'no'}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    recipe = load.load_recipe(folder / "recipe.yaml")
    check.show_check(recipe, 0, as_json=True)
    adapter, merged = run.train(recipe), folder / "merged"
    merge.merge(adapter, merged)
    verify.verify(str(adapter), str(merged), None)
    (answerer,) = open_models([str(adapter)]).values()
    answerer.answer([Asked([{"role": "user", "content": "red"}])], Sampling(2, 0.0))
    return compare_with_peft(base, adapter, merged)


def is_same(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a tensor is the same sum, or, of whole numbers, the same."""
    if not wanted.is_floating_point():
        return torch.equal(given, wanted)
    return same_sum(given, wanted)


def compare_with_peft(base: Path, adapter: Path, merged: Path) -> str:
    """Hold a merged model against PEFT's; return how many tensors changed."""
    network = Base(str(base)).load(torch.float32)
    plain = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    plain.save_pretrained(merged.with_name("plain"))
    wanted, given, before = (
        {
            name: tensor
            for file in each.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for each in (merged.with_name("plain"), merged, base)
    )
    assert given.keys() == wanted.keys()
    wrong = {name for name, tensor in wanted.items() if not is_same(given[name], tensor)}
    lost = {name for name in wrong if any(part in name for part in LOST)}
    assert wrong == lost, sorted(wrong)[:3]
    changed = sum(not torch.equal(given[name], before[name]) for name in given)
    assert changed
    return f"{changed} of {len(given)} tensors merged"


@pytest.mark.slow
@pytest.mark.parametrize("family", architectures.list_buildable())
def test_every_architecture_goes_through_the_verbs_or_is_refused(
    family: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if family not in REFUSED:
        go_through(family, tiny, tmp_path)
        return
    with pytest.raises(LoraError) as refused:
        go_through(family, tiny, tmp_path)
    assert REFUSED[family] in refused.value.message


def main() -> None:
    """Print what becomes of each family."""
    tiny = architectures.ROOT / "build/tiny"
    for family in sys.argv[1:] or architectures.list_buildable():
        folder = Path(tempfile.mkdtemp())
        try:
            said = go_through(family, tiny, folder)
        except LoraError as error:
            said = f"refused: {error.message}"
        except Exception as error:  # noqa: BLE001 – a survey: whatever is wrong is what it prints
            said = f"WRONG {type(error).__name__}: {error}"
        print(f"{family:26} {' '.join(said.split())[:260]}", file=sys.__stdout__, flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
