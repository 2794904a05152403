"""Time answers of a DoRA adapter: `python scripts/bench_answers.py ADAPTER [TOKENS]`.

One side computes PEFT's norms, for each token anew from the whole product; the other lora's, once
an answer. Both in one process, by turns; the best of three. Prints their times, the ratio, and
whether the answers are the same.
"""

from __future__ import annotations

import sys
import time

from peft.tuners.lora.dora import DoraLinearLayer

from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.speed import dora_norms


def main() -> None:
    """Print both sides."""
    adapter, tokens = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 16
    (answerer,) = open_models([adapter]).values()
    layers = dora_norms.find_layers(answerer.bases.loaded[answerer.key])
    asked = [Asked([{"role": "user", "content": "Tell me a story about a fox."}])]
    times: dict[str, list[float]] = {"PEFT": [], "lora": []}
    answers = {}
    for _ in range(3):
        for side, kind in (("PEFT", DoraLinearLayer), ("lora", dora_norms.FactoredDora)):
            for layer in layers:
                layer.__class__ = kind
            began = time.perf_counter()
            answers[side] = answerer.answer(asked, Sampling(tokens, 0.0))
            times[side].append(time.perf_counter() - began)
    best = {side: min(each) for side, each in times.items()}
    peft, ours = best["PEFT"], best["lora"]
    print(f"{len(layers)} layers, {tokens} tokens: PEFT {peft:.2f} s, lora {ours:.2f} s")
    same = answers["PEFT"] == answers["lora"]
    print(f"ratio {peft / ours:.1f}; the same answer: {same}")


if __name__ == "__main__":
    main()
