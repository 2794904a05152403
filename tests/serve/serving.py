"""A server of ours in a process, and adapters that answer at length."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent.parent
KEY = "a-key-for-tests"


class Served:
    """`lora serve` with these words, once it listens; what it says is in `said`."""

    def __init__(self, *words: object, key: str | None = KEY, begin: str = "serving ") -> None:
        options = ["--port", "0", *(["--api-key", key] if key else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_cli", "serve", *map(str, words), *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.said = ""
        self.heard = threading.Thread(target=self._hear, daemon=True)
        self.heard.start()
        end = time.monotonic() + 120
        while not (found := re.search(r"at (http://\S+?:(\d+))/v1", self.said)):
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.02)
        self.url, self.port = found[1], int(found[2])
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)

    def _hear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; return its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.heard.join(10)
        return status


def make_adapter(base: Path, folder: Path, seed: int, dora: bool = False, r: int = 4) -> Path:
    """An adapter with random weights of both kinds: it changes every answer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=r,
        lora_alpha=8,
        target_modules="all-linear",
        use_dora=dora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data *= 1.3
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def make_endless(base: Path, folder: Path) -> Path:
    """A copy of a model that never ends an answer, and reads 60,000 tokens."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for token in set(tokenizer.all_special_ids) | set(range(8)):
        model.lm_head.weight.data[token] = 0
    model.config.max_position_embeddings = 60_000
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
