"""Time and memory of merging: plain PEFT, ours in constant memory, ours with its checks, and
copying the folder.

    python scripts/bench_merge.py [--gigabytes 2] [--half] [--repeat 3]

The base is a random bfloat16 Llama of about that size in four shards, the adapters a LoRA and a
DoRA of rank 16 on every linear module. Each side runs in a process of its own, one after the other,
`--repeat` times round. Of each the best wall time counts, from after the imports, also until
everything is on the disk; and the highest resident memory, over that after the imports. `--half`
does the same for a base of half the size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HIDDEN, MLP, VOCABULARY, SHARDS = 2048, 8192, 32000, 4
SIDES = ("plain PEFT", "lora merge, unchecked", "lora merge", "copying the folder")


def make(folder: Path, gigabytes: float) -> None:
    """The base and both adapters, B ≠ 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    layer = HIDDEN * HIDDEN * 5 // 2 + 3 * HIDDEN * MLP
    layers = max(1, round((gigabytes * 5e8 - 2 * VOCABULARY * HIDDEN) / layer))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    base = LlamaForCausalLM(config)
    base.save_pretrained(
        folder / "base", max_shard_size=f"{int(base.num_parameters() * 2 / SHARDS / 2**20) + 64}MB"
    )
    AutoTokenizer.from_pretrained(ROOT / "build" / "tiny" / "model").save_pretrained(
        folder / "base"
    )
    torch.set_default_dtype(torch.float32)
    for name, dora in (("LoRA", False), ("DoRA", True)):
        adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", use_dora=dora))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01 * torch.randn_like(parameter)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / name)
        base = adapted.unload()


def run(side: str, folder: Path, name: str) -> None:
    """One side, in this process: prints its wall time (s), its peak memory and that of the imports
    (MiB) as JSON."""
    out = folder / "out"
    if side == "plain PEFT":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def work() -> None:
            base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
            PeftModel.from_pretrained(base, folder / name).merge_and_unload().save_pretrained(out)
    elif side == "copying the folder":

        def work() -> None:
            shutil.copytree(folder / "base", out)
    else:
        from lora_cli.merge import merge
        from lora_cli.models import adapter_folder

        def work() -> None:
            merge.merge_adapter(
                adapter_folder.read_adapter(folder / name),
                out,
                stream=True,
                check=side == "lora merge",
            )

    before = memory()
    os.sync()
    started = time.perf_counter()
    work()
    wall, peak = time.perf_counter() - started, memory()
    os.sync()
    print(
        json.dumps(
            {"wall": wall, "disk": time.perf_counter() - started, "peak": peak, "imports": before}
        )
    )


def memory() -> float:
    """The most memory this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def bench(folder: Path, gigabytes: float, repeat: int) -> None:
    """Make the models and print the table."""
    subprocess.run([sys.executable, __file__, "--make", str(gigabytes), str(folder)], check=True)
    size = sum(file.stat().st_size for file in (folder / "base").iterdir()) / 1e9
    shards = len(list((folder / "base").glob("*.safetensors")))
    print(f"\nbase of {size:.2f} GB in {shards} shards")
    print(
        "adapter  side                    wall s  of PEFT  of copy  to disk s  of PEFT  of copy   "
        " MiB"
    )
    for name in ("LoRA", "DoRA"):
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(repeat):
            for side in SIDES:
                done = subprocess.run(
                    [sys.executable, __file__, "--run", side, name, str(folder)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    check=True,
                )
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(folder / "out")
        best = {
            side: {until: min(run[until] for run in runs) for until in ("wall", "disk")}
            for side, runs in found.items()
        }
        for side, runs in found.items():
            cells = [f"{name:7}", f"{side:22}"]
            for until, width in (("wall", 6), ("disk", 9)):
                seconds = best[side][until]
                cells.append(f"{seconds:{width}.2f}")
                cells += [f"{seconds / best[other][until]:7.2f}" for other in (SIDES[0], SIDES[-1])]
            cells.append(f"{max(run['peak'] - run['imports'] for run in runs):+5.0f}")
            print("  ".join(cells), flush=True)


def main() -> None:
    """All of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(Path(arguments.make[1]), float(arguments.make[0]))
    elif arguments.run:
        run(arguments.run[0], Path(arguments.run[2]), arguments.run[1])
    else:
        for gigabytes in [
            arguments.gigabytes,
            *([arguments.gigabytes / 2] if arguments.half else []),
        ]:
            with tempfile.TemporaryDirectory() as folder:
                bench(Path(folder), gigabytes, arguments.repeat)


if __name__ == "__main__":
    main()
