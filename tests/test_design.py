"""The design's rules, read from the source: imports go downward, the start-up path is light,
commands are documented.

Hermetic: reads this repository, starts Python. Alone: pytest tests/test_design.py
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_cli import cli
from lora_cli.recipe import schema
from tests.report import written

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_cli"

# A room imports only rooms before it; those of one line do not know each other.
ORDER = [
    {"common"},
    {"recipe", "distributed"},
    {"models", "translate"},
    {"data", "speed"},
    {"scoring", "card"},
    {"plan"},
    {"merge"},
    {"gguf", "onnx_export"},
    {"train"},
    {"evaluate", "drafts"},
    {"report"},
    {"serve"},
    {"publish"},
    {"doctor"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """One name that a file of ours imports from another place of ours."""

    path: str
    room: str
    source: str
    name: str


def room_of(module: str) -> str:
    """The room of a module's dotted name below `lora_cli`; the package's own files belong to the
    command line."""
    first = module.partition(".")[0]
    return first if first in FLOOR else "cli"


def imports(path: Path) -> list[Import]:
    """Everything of ours that the file imports, anywhere in it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_cli":
            source = (node.module or "").partition(".")[2]
            for alias in node.names:
                found.append(Import("/".join(parts), room_of(".".join(parts)), source, alias.name))
    return found


EVERY = [each for path in FILES for each in imports(path) if each.name != "__version__"]


def test_rooms_import_only_rooms_before_them() -> None:
    assert len(EVERY) > 300
    arrows = {(each.room, room_of(each.source), each.path) for each in EVERY}
    upward = {
        (*rooms, path)
        for *rooms, path in arrows
        if rooms[0] != rooms[1] and FLOOR[rooms[1]] >= FLOOR[rooms[0]]
    }
    assert not upward


def doors(room: str) -> set[str]:
    """What the room's `__init__` names."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    named = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    return set(ast.literal_eval(named))


def test_others_enter_a_room_by_its_doors() -> None:
    """They import what the room's `__init__` names, and neither its files nor what nobody outside
    needs."""
    entered = {
        (each.source, each.name, each.path) for each in EVERY if each.room != room_of(each.source)
    }
    assert len(entered) > 150
    assert not {(source, name, path) for source, name, path in entered if name not in doors(source)}
    used = {(source, name) for source, name, _ in entered}
    assert not {
        (room, name)
        for room in FLOOR.keys() - {"cli"}
        for name in doors(room)
        if (room, name) not in used
    }


def test_no_file_reaches_into_another_s_private_parts() -> None:
    private = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in ours if (node.module or "").startswith("lora_cli")]
        modules = {
            alias.asname or alias.name
            for node in ours
            for alias in node.names
            if alias.name.islower()
        }
        asked = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        ]
        private += [
            f"{path.stem}: {ast.unparse(node)}"
            for node in asked
            if node.value.id in modules and node.attr[0] == "_"
        ]
    assert not private


def test_the_reference_is_only_for_comparing() -> None:
    reference = [path for path in FILES if path.parent.name == "reference"]
    users = {
        each.path
        for each in EVERY
        if "doctor.reference" in each.source and "/reference/" not in each.path
    }
    assert users == {"doctor/oracle"}
    assert packages(reference) == {"torch", "safetensors"}


def test_what_is_made_for_a_while_is_made_by_files_alone() -> None:
    """`tempfile` makes a folder before anybody is responsible for it: a signal between leaves
    it."""
    makers = r"\b(TemporaryDirectory|NamedTemporaryFile|mkdtemp|mkstemp)\b"
    assert not [path for path in FILES if re.search(makers, path.read_text())]


def packages(paths: list[Path]) -> set[str]:
    """What these files import beside this package and the standard library, anywhere in them."""
    imports = {
        name.split(".")[0]
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    return imports - set(sys.stdlib_module_names) - {"lora_cli"}


def test_what_is_imported_is_asked_for() -> None:
    asked = {
        Requirement(line).name.replace("-", "_")
        for line in importlib.metadata.requires("lora-cli") or []
    }
    used = packages(FILES)
    assert {"torch", "numpy", "yaml", "PIL"} < used
    named = {"yaml": "pyyaml", "PIL": "pillow"}
    assert {named.get(name, name) for name in used} - asked == set()


def list_what_is_installed_for(
    name: str, extras: frozenset[str], found: dict[str, set[str]]
) -> None:
    """Add to `found` the distribution `name` and all that it asks for with these extras, each with
    the extras it was looked at with."""
    key = canonicalize_name(name)
    if extras | {""} <= found.get(key, set()):
        return
    found.setdefault(key, set()).update(extras, {""})
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires(name) or []]
    except importlib.metadata.PackageNotFoundError:  # of another system, or of an extra
        return
    for each in asked:
        if not each.marker or any(each.marker.evaluate({"extra": e}) for e in extras | {""}):
            list_what_is_installed_for(each.name, frozenset(each.extras), found)


def test_what_the_tests_import_is_installed_with_them() -> None:
    """httpx was imported, and was there for another project's sake: CI could not collect a file."""
    found: dict[str, set[str]] = {}
    list_what_is_installed_for("lora-cli", frozenset({"gguf", "dev"}), found)
    ours = [path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    owners = importlib.metadata.packages_distributions()
    on_a_gpu = {"liger_kernel", "cut_cross_entropy"}  # what scripts/gpu_parts/head.py compares with
    beside = {"tests", *(part for path in ours for part in (path.stem, path.parent.name))}
    assert not [
        name
        for name in packages(ours) - beside - on_a_gpu
        if not any(canonicalize_name(owner) in found for owner in owners.get(name, []))
    ]


def modules_after(arguments: list[str]) -> tuple[int, set[str], str]:
    """Exit status, what was imported, and stderr of the command line run with `arguments`."""
    code = f"import sys; sys.argv = ['lora', *{arguments!r}]\nfrom lora_cli.cli import main\n"
    code += "try:\n    main()\nfinally:\n    print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, set(done.stdout.rpartition("MODULES")[2].split()), done.stderr


def test_no_function_is_over_forty_lines() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 40:
                long.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert not long


SHOWN_COMMAND = re.compile(
    r"(?:\b(?:rm|ls|sed|jq|kill|gzip|mkdir|cp|mv|chmod|pip install|vllm serve|ollama create|llama-server"
    r"|lora (?:train|init|check|plan|merge|combine|extract|convert|verify|export-gguf|export-onnx|generate|chat|predict|evaluate"
    r"|serve|push|card|runs|report|recipes|schema|import))"
    r"|(?:^|, |: )(?:head|cat|less)|(?<![\w-])--(?:set|base|prompt|file|imatrix|llama-cpp)| >)"
    r"(?: [^,;:()⟦\n]*| ?[\w.]*=)?⟦([^⟧]*)⟧(?!:| does not exist)"
)
"""A command, and a value in it that is put there as it is, between ⟦ and ⟧."""
OF_OURS = {
    "field",
    "line", "length", "package", "version", "INDEX", "remedy", "option", "described", "wanted", "column", "guess",
    "convert", "made", "named", "wide", "1 << (rank - 1).bit_length()", "max(counts.lengths)", "positions.number",
    "max(counts.target_lengths)", "fewer",
    "max(1, int(size) // 2)", "smaller.per_device_train_batch_size", "smaller.gradient_accumulation_steps",
    "args.learning_rate / 10",
}  # fmt: skip
"""What is a number, a key, or a package of ours, or is quoted as a whole."""


def test_what_others_named_is_quoted_in_a_command_that_is_shown() -> None:
    seen, bare = 0, []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.JoinedStr):
                continue
            text = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    text += str(part.value)
                else:
                    called = isinstance(part.value, ast.Call) and ast.unparse(part.value.func)
                    quoted = called in ("quote", "quote_words")
                    seen += quoted
                    text += "\0" if quoted else f"⟦{ast.unparse(part.value)}⟧"
            for found in SHOWN_COMMAND.finditer(text):
                if found[1] not in OF_OURS and not text.startswith("--"):
                    bare.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {found[1]}")
    assert seen > 60
    assert not bare


WRITERS = re.compile(
    r"(?:builtins\.)?print|(?:typer|click)\.s?echo|sys\.(?:__)?std(?:out|err)(?:__)?(?:\.buffer)?\.write(?:lines)?"
    r"|os\.write|traceback\.print_\w+|pprint\.\w+|rich\..+|faulthandler\..+"
)
PROGRAMS = {"gguf/imatrix_writer.py", "gguf/opening.py"}
"""Run in processes of their own, whose output another of ours reads."""


def test_nothing_but_ui_writes_to_the_screen() -> None:
    writers = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and WRITERS.fullmatch(ast.unparse(node.func)):
                writers.add(str(path.relative_to(PACKAGE)))
            if isinstance(node, ast.keyword) and node.arg == "file":
                assert "sys.std" not in ast.unparse(node.value)
    assert writers - {"common/ui.py"} == PROGRAMS


def test_rich_is_for_pictures_alone() -> None:
    """Which come from ui, and are no part of what is imported elsewhere than on a terminal."""
    users = [str(path.relative_to(PACKAGE)) for path in FILES if "rich" in packages([path])]
    assert users == ["common/screen.py"]
    importers = [each.path for each in EVERY if "screen" in (each.name, each.source[-6:])]
    assert {*importers} == {"common/ui"}


HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy"}
LIGHT = [
    "--help",
    "train --help",
    "--version",
    "schema",
    "recipes",
    "recipes copy --help",
    "launch alpaca --slurm",
]


@pytest.mark.parametrize("arguments", map(str.split, LIGHT), ids=LIGHT)
def test_help_is_answered_without_torch(arguments: list[str]) -> None:
    status, modules, _ = modules_after(arguments)
    assert status == 0
    assert "typer" in modules
    assert not modules & HEAVY


def test_a_typo_is_answered_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\ntraining:\n  learning_rat: 1e-4\n")
    status, modules, stderr = modules_after(["train", str(path)])
    assert status == 2
    assert stderr == (
        f"error: {path}:4: training.learning_rat is not a known key\n\nhint: did you mean "
        "training.learning_rate?\n"
    )
    assert "pydantic" in modules
    assert not modules & HEAVY


def test_a_missing_file_of_rows_is_answered_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: own-data\ndata:\n  path: gone.jsonl\n")
    status, modules, stderr = modules_after(["train", str(path)])
    assert status == 1
    assert stderr == (
        f"error: {path}:3: data.path: gone.jsonl does not exist\n\nhint: put it there, or --set "
        "data.path=FILE\n"
    )
    assert not modules & (HEAVY - {"numpy"})  # the rows are shuffled by numpy


@pytest.mark.parametrize("verb", ["runs", "report"])
def test_runs_are_looked_at_without_torch(verb: str, tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    status, modules, _ = modules_after([verb, str(run)])
    assert status == 0
    assert ("jinja2" in modules) == (verb == "report")
    assert not modules & HEAVY


def test_typer_is_refused_where_it_has_no_usage_error() -> None:
    assert cli.USAGE_ERROR.__name__ == "UsageError"
    assert issubclass(typer.BadParameter, cli.USAGE_ERROR)
    with pytest.raises(
        ImportError, match=r"BadParameter is no Mistake: lora does not know this typer"
    ):
        cli._find_base(typer.BadParameter, "Mistake")


def test_generated_documents_are_fresh() -> None:
    assert (ROOT / "configs" / "schema.json").read_text() == schema.make_json(), "make docs"
    assert (ROOT / "docs" / "reference" / "recipe.md").read_text() == schema.make_markdown(), (
        "make docs"
    )


def test_the_pages_document_every_command_file_and_recipe() -> None:
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*/*.md")])
    files = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    pattern = r"@(verbs|recipes)\.command\((?:\"([\w-]+)\")?\)\ndef (\w+)"
    found = [path.read_text() for path in sorted((PACKAGE / "cli").glob("*_verbs.py"))]
    commands = [command for text in found for command in re.findall(pattern, text)]
    names = [
        f"{'recipes ' * (group == 'recipes')}{given or function}"
        for group, given, function in commands
    ]
    assert len(names) >= 16
    assert "recipes copy" in names
    assert not [name for name in names if f"lora {name}" not in pages]
    assert not [path.name for path in FILES if path.stem[0] != "_" and path.name not in files]
    assert not [
        path.stem
        for path in (ROOT / "configs").glob("*.yaml")
        if not re.search(rf"[`/]{path.stem}[`.]", pages)
    ]
