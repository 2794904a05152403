"""A tiny random model of every causal architecture that this transformers builds: checked, trained
by a step of LoRA, merged, verified and asked, and exported where llama.cpp's converter knows it; or
refused, with the reason.

Merging is held against plain PEFT, GGUFs against the model in llama.cpp. What cannot be built small, or does not run in transformers
itself, is named in `tests/architectures.py`. Hermetic, minutes. Alone: pytest -m slow
tests/cli/test_architectures.py; `python -m tests.cli.test_architectures` prints the table.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_cli.common import LoraError
from lora_cli.evaluate import verify
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.gguf import export, tools
from lora_cli.merge import merge
from lora_cli.models import Base
from lora_cli.plan import check
from lora_cli.recipe import load
from lora_cli.train import run
from tests import architectures
from tests.units import same_sum
from tests.warm import WarmCLI

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
SENTENCEPIECE = ("ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma4_text")
"""Families whose converter wants a tokenizer.model."""
QWEN = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families that split texts as Qwen 2 does, whatever their files say."""
ASKED_FOR = ("[gMASK]", "<sop>", "<|user|>", "<|observation|>", "<unk>", "<|startoftext|>")
"""Tokens that the converters of GLM and Solar look for."""
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TENSORS = "Can not map tensor"
NOT_EXPORTED = {
    "bamba": "differs from the model it was made from",  # half of a head is turned, all is permuted
    "bitnet": "tokenizer.model",
    "deepseek_v32": "Change value of add_bos_token",
    "deepseek_v4": "KeyError: 'compress_ratios'",
    "gemma3n_text": "only supports 4 altup inputs",
    "glm_moe_dsa": "GGML_ASSERT(ggml_can_mul_mat(a, b)) failed",
    "hunyuan_v1_dense": "its end-of-sequence token is",
    "hunyuan_v1_moe": "has no attribute mergeable_ranks",
    "hy_v4": TENSORS,
    "jamba": "Cannot find Llama BPE tokenizer",
    "kimi_linear": "differs from the model it was made from",
    "minicpm3": "tokenizer.model",
    "mellum": "differs from the model it was made from",  # one rotary base for all of its layers
    "mimo_v2_flash": "KeyError: 'partial_rotary_factor'",
    "nemotron": "tokenizer.model",
}
"""Families that the converter knows and that are not exported: what is said."""


def go_through(family: str, tokenizer: Path, folder: Path, is_known: bool) -> str:
    """Take a family through the verbs; return in words what was merged and exported. Raises
    LoraError where one refuses, AssertionError where one is wrong. `is_known`: the converter knows
    the family."""
    base = architectures.make_folder(family, folder / "base", tokenizer)
    tiny = architectures.ROOT / "build/tiny"
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
    said = compare_with_peft(base, adapter, merged)
    return f"{said}; {export_merged(family, merged)}" if is_known else said


def export_merged(family: str, merged: Path) -> str:
    """Export a merged model; return how its file was checked, or why it is refused."""
    try:
        (file,) = export.export(merged, ["f32"], merged.with_name("gguf"), None, None)
    except LoraError as error:
        if NOT_EXPORTED.get(family, "no refusal") not in error.message:
            raise
        return f"not exported: {error.message}"
    assert family not in NOT_EXPORTED
    checked = json.loads(file.with_name(f"{file.name}.json").read_text())["checked"]
    assert "in llama.cpp: mean KL" in checked
    return f"exported: {checked}"


class Exports(NamedTuple):
    """What exporting a family needs: the architectures that the converter knows, and tokenizers."""

    known: frozenset[str]
    tokenizers: dict[str, Path]

    def knows(self, family: str) -> bool:
        """Whether the converter knows the family's class of models."""
        named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        return bool(self.known & {named} if isinstance(named, str) else self.known & {*named})

    def find_tokenizer(self, family: str) -> Path:
        """Find the tokenizer that a family's model is made with: one that llama.cpp recognises."""
        if not self.knows(family) or family in SENTENCEPIECE:
            return self.tokenizers["tiny"]
        return self.tokenizers["qwen2" if family in QWEN else "gpt-2"]


def prepare_exports(vocabularies: Path, folder: Path) -> Exports:
    """Ask the converter what it knows, and make folders of tokenizers."""
    tiny = architectures.ROOT / "build/tiny/model"
    tokenizers = {"tiny": tiny}
    for name in ("gpt-2", "qwen2"):
        tokenizer = AutoTokenizer.from_pretrained(vocabularies, gguf_file=f"ggml-vocab-{name}.gguf")
        tokenizer.add_special_tokens({"additional_special_tokens": list(ASKED_FOR)})
        tokenizer.chat_template = TEMPLATE
        tokenizers[name] = folder / name
        tokenizer.save_pretrained(tokenizers[name])
    command = [sys.executable, tools.find_converter().path, "--print-supported-models"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return Exports(frozenset(re.findall(r"- (\w+)", said.stdout + said.stderr)), tokenizers)


@pytest.fixture(scope="module")
def exports(vocabularies: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return prepare_exports(vocabularies, tmp_path_factory.mktemp("tokenizers"))


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


@pytest.fixture(scope="module", autouse=True)
def warm_converter() -> Iterator[None]:
    """Run the converter without its imports, two seconds of three, each time."""
    warm = WarmCLI()

    def run_command(command: list[str], *_: object) -> tuple[int, list[str]]:
        done = warm.run(command[2:], program=command[1])
        return done.returncode, (done.stdout + done.stderr).splitlines()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "run_command", run_command)
        yield
    warm.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", architectures.list_buildable())
def test_every_architecture_goes_through_the_verbs_or_is_refused(
    family: str, exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, is_known = exports.find_tokenizer(family), exports.knows(family)
    if family not in REFUSED:
        go_through(family, tokenizer, tmp_path, is_known)
        return
    with pytest.raises(LoraError) as refused:
        go_through(family, tokenizer, tmp_path, is_known)
    assert REFUSED[family] in refused.value.message


def main() -> None:
    """Print what becomes of each family."""
    folder = Path(tempfile.mkdtemp())
    exports = prepare_exports(architectures.ROOT / "build/vocabularies", folder)
    for family in sys.argv[1:] or architectures.list_buildable():
        tried = folder / family
        tried.mkdir()
        try:
            said = go_through(family, exports.find_tokenizer(family), tried, exports.knows(family))
        except LoraError as error:
            said = f"refused: {error.message}"
        except Exception as error:  # noqa: BLE001 – a survey: whatever is wrong is what it prints
            said = f"WRONG {type(error).__name__}: {error}"
        print(f"{family:26} {' '.join(said.split())[:260]}", file=sys.__stdout__, flush=True)
        shutil.rmtree(tried)


if __name__ == "__main__":
    main()
