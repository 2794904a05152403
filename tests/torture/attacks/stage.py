"""Sound artefacts, made by lora and PEFT, which the cases copy and spoil."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.torture.attacks import change

ROOT = Path(__file__).parent.parent.parent.parent


def make_stage(folder: Path, with_gguf: bool) -> None:
    """Sound artefacts, made by lora and PEFT, which the cases copy and spoil; and the seconds that
    sound commands take whose work is other processes', which import anew."""
    log = folder.with_name("stage.log")

    def make_models() -> None:
        sys.path.insert(0, str(ROOT / "tests" / "cli"))
        import test_bad_artefacts as made
        import torch

        torch.set_num_threads(1)
        base = made.base(folder)
        made.base(folder, "other", hidden_size=16)
        made.adapter(base)
        made.adapter(base, "second")
        made.adapter(base, "dora", use_dora=True)
        tuned = made.base(folder, "tuned")
        made.tensors(
            tuned, lambda each: {k: v + 0.01 * torch.randn_like(v) for k, v in each.items()},
            "model.safetensors",
        )  # fmt: skip
        for name in ("adapter", "second", "dora"):
            change(folder / name / "adapter_config.json", base_model_name_or_path=str(base))
        row = {"prompt": "Reverse: tea ice", "completion": "ice tea"}
        (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
        recipe = {
            "model": {"name_or_path": str(base)},
            "data": {"path": str(folder / "rows.jsonl")},
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
                         "max_length": 64, "save_strategy": "steps", "save_steps": 1},
            "output_dir": str(folder / "run"),
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(json.dumps(recipe))

    folder.mkdir(parents=True)
    commands = [
        ["train", str(folder / "recipe.yaml")],
        ["merge", str(folder / "run" / "adapter"), str(folder / "merged")],
        [
            "export-gguf",
            str(folder / "merged"),
            "-o",
            str(folder / "ggufs"),
            "--llama-cpp",
            str(find_llama_cpp()),
        ],
        ["generate", str(folder / "model.gguf"), "--prompt", "ask", "--max-new-tokens", "2"],
    ]
    if not with_gguf:
        commands = commands[:2]
    status, _ = forked(make_models, log)
    seconds = {}
    for words in commands:
        if status:
            break
        if words[0] == "generate":
            shutil.copy(next(folder.glob("ggufs/*.gguf")), folder / "model.gguf")
        status, seconds[words[0]] = forked(lambda words=words: be_lora(words, folder), log)
    if status:
        sys.exit(f"the stage cannot be made:\n{log.read_text()}")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def forked(work: Callable[[], object], log: Path | None = None) -> tuple[int, float]:
    """Run in a child, and return its exit status and seconds of processor time; what it says goes
    into a file."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if log is not None:
                for number in (1, 2):
                    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _, ended, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(ended), usage.ru_utime + usage.ru_stime


def find_llama_cpp() -> Path:
    """The converters that `lora setup-llama-cpp` has installed, or LLAMA_CPP_DIR's."""
    from lora_cli.gguf.tools import find_managed_home

    return Path(os.environ.get("LLAMA_CPP_DIR") or find_managed_home())


def be_lora(words: list[str], folder: Path) -> None:
    """In a child: run a command of lora's."""
    from lora_cli.cli import main

    os.environ |= {"LORA_CACHE_DIR": str(folder / "cache")}
    os.chdir(folder)
    sys.argv = ["lora", *words]
    main()
