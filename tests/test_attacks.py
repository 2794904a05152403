"""The short form of `tests/torture/attack.py`: the first cases of each kind; and that it reports a
fault of each kind where one is planted.

Hermetic: a random model, no network. Alone: pytest tests/test_attacks.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by /proc")
ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "torture" / "attack.py"
CASES = 10

PLANTED = {
    "an escape": ("print('\\x1b[2J')", "raw '\\x1b'"),
    "a bidi character": ("print('\\u202e')", "raw"),
    "a C1 character in bytes": ("import os; os.write(2, b'\\x9b2J')", "raw"),
    "a carriage return": ("print('a\\rb')", "raw"),
    "a forged line": ("print('base x\\nerror: forged')", "a forged line"),
    "a traceback": ("import traceback\ntry: 1/0\nexcept Exception: traceback.print_exc()", "ZeroDivisionError"),
    "a bug's exit": ("raise SystemExit(70)", "exit 70"),
    "another exit": ("raise SystemExit(3)", "exit 3"),
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "processor time": ("while True: pass", "s of processor time"),
    "standing still": ("import time; time.sleep(60)", "hangs"),
    "memory": ("x = b'x' * 700_000_000", "MiB of memory"),
    "memory of a child": ("import os\nif not os.fork():\n    x = b'x' * 700_000_000\n    os._exit(0)\nos.wait()", "MiB of memory"),
    "a file of the neighbour's": ("open('../victim/secret.txt', 'a').write('x')", "changed victim/secret.txt"),
    "a new file beside it": ("open('../victim/folder/new', 'w')", "left victim/folder/new"),
    "a mode of the neighbour's": ("import os; os.chmod('../victim/folder', 0o777)", "changed victim/folder"),
    "a file in the home folder": ("open('../home/.x', 'w')", "left home/.x"),
    "a scratch folder": ("import tempfile; tempfile.mkdtemp()", "left tmp/"),
    "a staging folder": ("import os; os.mkdir('.out.1-0.tmp')", "left work/.out.1-0.tmp"),
    "a half-made output": ("import os; os.mkdir('out'); raise SystemExit(1)", "failed, and left out"),
    "a child process": ("import os, time\nif not os.fork(): time.sleep(60)", "left 1 processes"),
    "a child in a session of its own": ("import os, time\nif not os.fork():\n    os.setsid(); time.sleep(60)", "left 1 processes"),
    "a secret on the screen": ("print('hf_planted')", "a secret on the screen"),
    "a secret in a file": ("open('x', 'w').write('see hf_planted')", "a secret in work/x"),
    "a secret in the cache": ("open('../cache/x', 'w').write('see hf_planted')", "a secret in cache/x"),
    "what a link led to": ("open('x', 'w').write(open('../victim/secret.txt').read())", "what a link led to in work/x"),
    "a link out": ("import os; os.symlink('../victim', 'x')", "made a link out of the folder"),
    "a command of a stranger's": ("import sys; print('hint: rm -r a; touch pwned', file=sys.stderr)", "is a word of a shown command"),
    "code that ran": ("open('pwned', 'w')", "pwned was made"),
    "a word of a file's language": ("open('Modelfile', 'w').write('FROM x\\nFROM evil')", "the Modelfile says FROM 'evil'"),
    "a quotation that is left open": (
        "open('Modelfile', 'w').write('SYSTEM \"\"\"x\"\\nFROM ./y')",
        "an open quotation",
    ),
    "two winners": ("pass", "2 of 2 won, not 1"),
    "a silence": ("pass", "does not say why"),
    "nothing": ("print('fine: error: forged', 'é 🦙')", None),
}  # fmt: skip
"""What a command does instead of lora's, and the fault that is to be reported."""

TRY = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.torture import attack
from tests.torture.attacks import Attack
limits = attack.measure_baseline(attack.warm_up())._replace(memory=2**29, idle=5.0, seconds=2.0)
found = {{}}
for number, (name, (program, _)) in enumerate(json.loads({planted!r}).items()):
    root = Path({folder!r}) / f"planted-{{number}}"
    attack.make_folders(root, "0")
    more = {{"winners": 1, "together": [["x"]]}} if name == "two winners" else {{"said": "why"}} if name == "a silence" else {{}}
    planted = Attack(["x"], program=program, secrets=["hf_planted"], output="out", unquoted=["touch"], modelfile="Modelfile", **more)
    found[name] = attack.try_case(name, planted, root, Path("/nowhere"), limits).faults
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is reported of each planted fault, all by one process."""
    folder = tmp_path_factory.mktemp("planted")
    code = TRY.format(root=str(ROOT), planted=json.dumps(PLANTED), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_reported(name: str, found: dict[str, list[str]]) -> None:
    wanted = PLANTED[name][1]
    if wanted is None:
        assert found[name] == []
    else:
        assert any(wanted in each for each in found[name]), found[name]


@pytest.mark.slow
def test_the_first_attacks_of_each_kind_are_held_off(tiny: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--short", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{12 * CASES} cases, 0 faults" in done.stdout
