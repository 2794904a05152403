"""A machine on which pages are followed: a folder, a hub that has the models which pages name, and
the command line. What a page's commands print, printed or written into the page:

    python -m tests.docs.follow docs/tutorials/five-minutes.md … [--write]
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.docs.pages import ROOT, Step, compare, find_chain, read_page
from tests.hub import LoopbackHub
from tests.warm import WarmCLI

SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LARGE = "Qwen/Qwen3-8B-Base"
"""What pages call their models. Of the second there is the configuration alone."""
CONFIG_OF_LARGE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
SMALLER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""What the large one becomes where a page says that it does: of the same architecture, with
weights."""
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "all")]
PROXIES += [name.upper() for name in PROXIES]
FETCHING = "lora setup-llama-cpp"
"""The command that is let out to the package index; all others meet the hub of this machine."""
SHELL = re.compile(r"[|<>&;*$`]")


class Machine:
    """Runs the commands of a page in `folder`."""

    def __init__(
        self,
        folder: Path,
        warm: WarmCLI,
        environment: Mapping[str, str],
        shrink: Callable[[], object],
    ) -> None:
        """`shrink` puts a small model in the place of the large one."""
        self.folder = folder
        self.warm = warm
        self.shrink = shrink
        self.environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}

    def run(self, command: str, typed: str) -> tuple[int, str]:
        """Exit status, and stdout with stderr, of one command."""
        words = shlex.split(command)
        if words[0] == "lora" and not SHELL.search(command):
            outside = {name: os.environ.get(name, "") for name in PROXIES}
            own = outside if command == FETCHING else {}
            done = self.warm.run(words[1:], self.folder, typed, merged=True, environment=own)
            return done.returncode, done.stdout
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def follow(self, steps: list[Step]) -> Iterator[tuple[Step, int, str]]:
        """Each step that is run, with its last exit status and all that it printed. Ends where a
        command does not end as the page says."""
        for step in steps:
            if step.kind == "file":
                path = self.folder / step.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(step.text)
            if step.kind != "run":
                continue
            if step.is_small:
                self.shrink()
            printed, status = "", 0
            for command in step.commands:
                assert status == 0, f"{step.line}: before {command}: exit {status}\n{printed}"
                status, said = self.run(command, step.typed)
                printed += said
            yield step, status, printed
            if status != step.status:
                return


def find_problems(machine: Machine, steps: list[Step], exact: bool) -> list[str]:
    """What a reader would find otherwise than the page says; `exact`: in outputs too."""
    problems = []
    wanted = [step for step in steps if exact or not step.is_slow]
    for step, status, printed in machine.follow(wanted):
        where = f"line {step.line}: {step.commands[-1]}"
        if status != step.status:
            problems.append(f"{where}: exit {status}\n{printed}")
        elif exact and step.output is not None and (wrong := compare(step, printed)):
            problems.append(f"{where}: {wrong}")
    return problems


def make_small(model: Path, folder: Path) -> Path:
    """A small model of the large one's architecture, with the tokenizer of `model`."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    made = Qwen3ForCausalLM(Qwen3Config(**{**CONFIG_OF_LARGE, **SMALLER, **vocabulary}))
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_programs(folder: Path) -> None:
    """What is on the machine's PATH: this package's command line, Python, and a stand-in for
    Ollama."""
    folder.mkdir()
    programs = {"lora": "-m lora_cli", "python": "", "ollama": "-m tests.docs.ollama"}
    for name, words in programs.items():
        shim = folder / name
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)


@contextmanager
def open_machine(model: Path, is_new: bool = False) -> Iterator[Machine]:
    """A machine whose hub has `model` in place of the small one that pages name, and a large one
    without weights, with its tokenizer; the hub's cache is empty, and on a new machine lora's own
    too."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p-")))
        hub = stack.enter_context(LoopbackHub())
        large = home / "large"
        shutil.copytree(model, large, ignore=shutil.ignore_patterns("*.safetensors"))
        (large / "config.json").write_text(json.dumps(CONFIG_OF_LARGE))
        hub.add_model(SMALL, {"main": model})
        hub.add_model(LARGE, {"main": large})
        make_programs(home / "bin")
        environment = {
            **hub.environ(home / "hf"),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "110",
            "OLLAMA_MODELS": str(home / "ollama"),
            **({"LORA_CACHE_DIR": str(home / "cache")} if is_new else {}),
        }
        warm = WarmCLI(environment)
        stack.callback(warm.close)
        (home / "work").mkdir()

        def shrink() -> None:
            hub.add_model(LARGE, {"main": make_small(model, home / "small")})

        yield Machine(home / "work", warm, environment, shrink)


def write_outputs(path: Path, outputs: Mapping[int, str]) -> None:
    """Put what was printed into the page's output fences, by the line that the commands' fence
    begins on."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for line, printed in sorted(outputs.items(), reverse=True):
        end = next(n for n in range(line, len(lines)) if lines[n].startswith("```"))
        start = next(n for n in range(end + 1, len(lines)) if lines[n].startswith("```"))
        stop = next(n for n in range(start + 1, len(lines)) if lines[n].startswith("```"))
        lines[start + 1 : stop] = printed.rstrip("\n").split("\n")
    path.write_text("\n".join(lines), encoding="utf-8")


def main(pages: list[Path], write: bool) -> None:
    """Follow pages with the real model, and show or write what was printed otherwise."""
    chain = dict.fromkeys(path for page in pages for path in find_chain(page))
    with open_machine(ROOT / "build" / "smollm2" / "model", is_new=True) as machine:
        for path in chain:
            outputs = {}
            for step, status, printed in machine.follow(read_page(path)):
                print(f"--- {path.name}:{step.line}, exit {status}", *step.commands, sep="\n")
                print(printed, flush=True)
                if step.output is not None and (wrong := compare(step, printed)):
                    print(f"!!! {wrong.splitlines()[-1]}", flush=True)
                    outputs[step.line] = printed
            if write:
                write_outputs(path, outputs)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:] if word != "--write"], "--write" in sys.argv)
