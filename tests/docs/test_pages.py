"""README and tutorials, followed by a reader that types every command: on the tiny model in place of
the one they name, each command ends as they say; on that one (slow), outputs are those they show.

Hermetic: a hub of this machine serves the models; every page in an empty folder. Alone: pytest
tests/docs/test_pages.py [-m slow]. To see or write what commands print: python -m tests.docs.follow
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.docs import follow, pages, test_pip_lines

ROOT = pages.ROOT
READ = test_pip_lines.PAGES
FOLLOWED = [path for path in READ if any(s.kind == "run" for s in pages.read_page(path))]
EVERY = [ROOT / "README.md", *ROOT.glob("docs/*/*.md"), ROOT / "CONTRIBUTING.md"]


COMMAND = re.compile(r"(?m)^(?:\$ )?(?:lora|pip|python3?|make|ollama|head|cat|grep) [\w'./-]")
"""How a line begins that a reader would type."""


def find_unrun(paths: list[Path]) -> list[str]:
    """The commands of pages that no test types, and that quote none that one does; and fences of
    commands which are not marked as such."""
    wrong = []
    for path in paths:
        steps = pages.read_page(path)
        shown = {step.output for step in steps} | {s.text for s in steps if s.kind == "file"}
        for step in steps:
            if step.kind == "alone":
                wrong += [each for each in step.commands if each not in test_pip_lines.LINES]
            if step.kind == "quoted":
                wrong += pages.find_misquoted(step, pages.read_page(ROOT / step.why))
        for info, body in re.findall(r"(?ms)^ *```(.*?)\n(.*?)^ *```$", path.read_text()):
            if info != "sh" and body not in shown and COMMAND.search(body):
                wrong.append(body)
    return wrong


def test_all_commands_are_run() -> None:
    """`run` by the two tests below, `alone` by test_pip_lines.py, and what quotes a command that is
    run. There is no other kind: a fence that is not run has nothing to say that by."""
    steps = [step for path in READ for step in pages.read_page(path) if step.commands]
    typed = [s for s in steps if s.kind != "file"]
    count = Counter(step.kind for step in typed for _ in step.commands)
    print(f"{count.total()} commands: {dict(count)}")
    assert {*count} == {"run", "alone", "quoted"}
    assert count["run"] >= 37
    assert count["alone"] == 2
    assert count["quoted"] >= 4
    assert len(READ) >= 6
    assert not find_unrun(READ)


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("```sh\nlora doctor\n```\n", False),
        ("```sh\nlora --version\n```\n\n```text\nlora on x\n```\n", False),
        ("```\nlora doctor\n```\n", True),
        ("```bash\n$ ollama run x\n```\n", True),
        ("- so:\n\n  ```console\npip install x\n  ```\n", True),
        ("<!-- alone: it installs -->\n```sh\npip install other\n```\n", True),
        ("<!-- quoted from: README.md -->\n```sh\nlora dance\n```\n", True),
    ],
)
def test_a_command_that_is_not_run_is_found(page: str, wrong: bool, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(page)
    assert bool(find_unrun([tmp_path / "page.md"])) == wrong


def test_what_the_readme_quotes_is_on_the_pages_that_are_run() -> None:
    for path in READ:
        for step in pages.read_page(path):
            if step.kind == "quoted":
                source = pages.read_page(ROOT / step.why)
                assert step.output
                assert not pages.find_misquoted(step, source), f"{path.name}:{step.line}"


def test_a_wrong_quotation_is_found() -> None:
    there = [pages.Step("run", 1, "lora x\n", "one\ntwo  2\nthree\n")]
    quoted = pages.Step("quoted", 1, "lora x\n", "one\n…\nthree\n")
    assert not pages.find_misquoted(quoted, there)
    assert pages.find_misquoted(quoted._replace(output="three\none\n"), there) == ["one"]
    assert pages.find_misquoted(quoted._replace(output="two 3\n"), there) == ["two 3"]
    assert pages.find_misquoted(quoted._replace(text="lora y\n"), there)[0] == "lora y"


def list_groups() -> list[list[Path]]:
    """The pages that are followed, those of one folder together, in order."""
    groups: dict[Path, list[Path]] = {}
    for path in FOLLOWED:
        chain = pages.find_chain(path)
        group = groups.setdefault(chain[0], [])
        group += [each for each in chain if each not in group]
    return list(groups.values())


GROUPS = list_groups()
NAMES = ["-".join(path.stem for path in group) for group in GROUPS]


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_each_command_ends_as_the_page_says(group: list[Path], tiny: Path) -> None:
    with follow.open_machine(tiny / "model") as machine:
        for path in group:
            assert not follow.find_problems(machine, pages.read_page(path), exact=False), path.name


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_each_command_prints_what_the_page_shows(group: list[Path], real: Path) -> None:
    with follow.open_machine(real, is_new=True) as machine:
        for path in group:
            assert not follow.find_problems(machine, pages.read_page(path), exact=True), path.name


def test_extras_and_targets_that_pages_name_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(path.read_text() for path in EVERY)
    named = [n for group in re.findall(r"lora-cli\[([\w,]+)\]", text) for n in group.split(",")]
    assert {"gguf"} <= set(named) <= set(extras["optional-dependencies"])
    targets = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)(?=[`,;]|  +#|$)", text, re.M))
    assert {"demo", "test"} <= targets
    assert not [name for name in targets if not re.search(rf"(?m)^{name}:", makefile)]


PAGE = """# A page

<!-- exit: 3 -->
```sh
echo one; exit 3
```

```text
one
```

```json title="a/b.json"
{}
```

<!-- typed: so -->
```sh
# a comment
cat a/b.json -
```

<!-- varies: 7 in 1..9; so like \\w+ -->
```text
7
so
```

Prose.

<!-- alone: it installs -->
```sh
pip install x
```

```text
shown alone
```
"""


def test_a_page_is_read_as_its_reader_would(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    first, file, second, alone = pages.read_page(tmp_path / "page.md")
    assert (first.kind, first.commands, first.output, first.status) == ("run", ["echo one; exit 3"], "one\n", 3)  # fmt: skip
    assert (file.kind, file.name, file.text) == ("file", "a/b.json", "{}\n")
    assert (second.commands, second.typed, second.output) == (["cat a/b.json -"], "so", "7\nso\n")
    assert [each.shown for each in second.varies] == ["7", "so"]
    assert (alone.kind, alone.why, alone.output) == ("alone", "it installs", "shown alone\n")


def test_a_comment_that_says_nothing_known_is_refused(tmp_path: Path) -> None:
    for said in ("vary: 7 in 1..9", "not run: no time"):
        (tmp_path / "page.md").write_text(f"<!-- {said} -->\n```sh\nls\n```\n")
        with pytest.raises(ValueError, match="none of varies"):
            pages.read_page(tmp_path / "page.md")


SHOWN = "step 20/20  loss 0.0041  142 tokens/s\n…\ntrained in 1m23s; adapter in runs/orders …\n"
PRINTED = "step 20/20   loss 0.0052  90 tokens/s\nmore\nyet more\ntrained in 59s; adapter in runs/orders/adapter\n"  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        ("", "", ""),
        ("0.0052", "0.52", "0.52 is not within 0.001..0.1"),
        ("step 20/20", "step 19/20", "first line that is not there: step 20/20"),
        ("trained in", "trained on", "first line that is not there: trained in"),
        ("59s", "soon", "first line that is not there: trained in"),
        ("runs/orders", "runs/order", "first line that is not there: trained in"),
    ],
)
def test_an_output_is_compared(before: str, after: str, wrong: str) -> None:
    varies = pages.read_varying({"varies": "0.0041 in 0.001..0.1"})
    step = pages.Step("run", 1, "lora train x", output=SHOWN, varies=varies)
    found = pages.compare(step, PRINTED.replace(before, after))
    assert (wrong in found) if wrong else not found


def test_what_is_said_to_vary_must_be_shown() -> None:
    varies = pages.read_varying({"varies": "0.7 in 0..1"})
    step = pages.Step("run", 1, "x", output="0.8\n", varies=varies)
    assert pages.compare(step, "0.8\n") == "the page shows no 0.7, which it says varies"


def test_what_varies_may_be_the_number_of_another_that_does() -> None:
    """Each is held under a number, which is no text of the page's."""
    said = "one thing like .*; two thing like .*; third one like .*; fourth like .*; 3 in 1..9"
    step = pages.Step("run", 1, "x", varies=pages.read_varying({"varies": said}))
    shown = "one thing\ntwo thing\nthird one\nfourth\nleft: 3\n"
    assert not pages.compare(step._replace(output=shown), "a b\nc d\ne f\ng\nleft: 5\n")


def test_a_page_with_a_wrong_output_or_status_is_found(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "page.md").write_text("```sh\nlora --version\n```\n\n```text\nlora 0.0\n```\n")
    (tmp_path / "ends.md").write_text("<!-- exit: 2 -->\n```sh\nlora --version\n```\n")
    with follow.open_machine(tiny / "model") as machine:
        wrong = pages.read_page(tmp_path / "page.md")
        assert not follow.find_problems(machine, wrong, exact=False)
        assert "first line that is not there: lora 0.0" in follow.find_problems(machine, wrong, exact=True)[0]  # fmt: skip
        assert "exit 0" in follow.find_problems(machine, pages.read_page(tmp_path / "ends.md"), exact=False)[0]  # fmt: skip
