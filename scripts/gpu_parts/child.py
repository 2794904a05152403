"""What a part's process does: it imports what takes seconds, waits to be told, and goes through the
cases.

One line of JSON on stdin says which part, what is done already and until when. Each case that
begins or ends is a line in the file `lines`: what was measured stays, however this process ends.
After an error that has cost it the device it ends by itself, and the driver starts another.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LOST = 75
"""Exit status of a process whose device no longer computes."""
IMPORTED = ("train.run", "merge.merge", "evaluate.generate", "evaluate.verify", "plan.show")
LAST_WORDS = 1.0
"""Seconds before a case's end by force in which the log says where it is."""
LEAST = 3.0
"""Seconds that must be left for a case to begin."""


def serve() -> None:
    """Import, wait, work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in IMPORTED:
        importlib.import_module(f"lora_cli.{name}")
    gc.freeze()  # what was imported stays: looking through it takes a quarter of a second each time
    line = sys.stdin.readline()
    if not line:  # the driver has no more work
        return
    work = json.loads(line)
    sys.exit(go_through(work))


def go_through(work: dict[str, Any]) -> int:
    """Go through the cases of `work` that are not done; return the exit status."""
    from gpu_parts.clock import Clock
    from gpu_parts.part import Bench

    bench = Bench(
        Clock(work["device"]),
        Path(work["scratch"]),
        Path(work["tiny"]),
        work["small"],
        Path(work["report"]),
    )
    module = importlib.import_module(work["module"])
    cases = module.list_cases(bench)
    with Path(work["lines"]).open("a", encoding="utf-8") as file:

        def tell(**said: Any) -> None:
            file.write(json.dumps(said, default=str) + "\n")
            file.flush()

        listed = getattr(module, "LISTED", {})
        tell(cases=list(cases), title=module.TITLE, columns=module.COLUMNS, listed=listed)
        for name, case in cases.items():
            left = work["until"] - time.time()
            if name in work["done"]:
                continue
            if left < LEAST:
                tell(case=name, state="skipped", why=f"{max(0.0, left):.0f} s were left")
                continue
            tell(case=name, state="begun", limit=case.seconds * work["patience"])
            print(f"== {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            # so that the log says where it was; not earlier, as that may end an older Python
            until = min(left, case.seconds * work["patience"]) - LAST_WORDS
            faulthandler.dump_traceback_later(max(1.0, until))
            said = run_case(case, bench)
            faulthandler.cancel_dump_traceback_later()
            tell(case=name, seconds=round(time.monotonic() - began, 1), **said)
            if not bench.clock.is_sound():
                return LOST
    return 0


def run_case(case: Any, bench: Any) -> dict[str, Any]:
    """Return state and figures of a case, or what it raised."""
    from gpu_parts.part import NotHereError

    try:
        bench.clock.free()
        figures = case.measure(bench)
    except NotHereError as error:
        return {"state": "not here", "why": str(error)}
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # the next case goes on
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        return {"state": "failed", "why": said, "at": f"{where.filename}:{where.lineno}"}
    return {"state": "done", "figures": figures}
