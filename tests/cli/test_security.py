"""What SECURITY.md promises, that messages alone do not show: no code runs, no link is followed, no
shell is used.

Hermetic: small random models, repositories as folders. Alone: pytest tests/cli/test_security.py
"""

from __future__ import annotations

import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lora_cli.common import files, privacy, provenance, remote_code, ui
from lora_cli.common.errors import LoraError, UsageError
from lora_cli.merge.merge import merge, merge_adapter
from lora_cli.models import adapter_folder, attach, chat_template, config, patterns
from lora_cli.models.base import Base
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.train import run_folder
from tests.cli.test_bad_artefacts import adapter, base, changed, named

ROOT = Path(__file__).parent.parent.parent
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")
class Mine(LlamaConfig):
    model_type = "mine"
class Net(LlamaForCausalLM):
    config_class = Mine
"""


@pytest.fixture
def untrusted():
    """Whatever a test allows is forbidden again after it."""
    yield
    remote_code.set_allowed(False)


def with_code(folder: Path) -> tuple[Path, Path]:
    """A base with code of its own, and the file that this code leaves when it runs."""
    made, mark = base(folder), folder / "ran"
    (made / "code.py").write_text(CODE.format(mark=str(mark)))
    auto_map = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Net"}
    changed(made / "config.json", model_type="mine", architectures=["Net"], auto_map=auto_map)
    return made, mark


def test_code_of_a_model_runs_only_with_the_flag(tmp_path: Path, untrusted: None) -> None:
    made, mark = with_code(tmp_path)
    for load in (
        lambda: config.load_config(str(made)),
        lambda: Base(str(made)).load(torch.float32),
        lambda: Base(str(made)).build_empty(),
    ):
        with pytest.raises((ValueError, LoraError), match="custom code"):
            load()
    assert not mark.exists()
    remote_code.set_allowed(True)
    loaded = Base(str(made)).load(torch.float32)
    assert mark.exists()
    assert type(loaded).__name__ == "Net"
    assert provenance.new_record("merge")["trusted_remote_code"] is True


def test_only_the_command_line_allows_code() -> None:
    """`set_allowed` is called in options.py alone, and nothing else says trust_remote_code=True."""
    calls, literals = [], []
    for path in (ROOT / "lora_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "set_allowed":
                calls.append(path.name)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                literals.append(ast.unparse(node.value))
    assert calls == ["options.py"]
    assert len(literals) >= 5
    assert set(literals) == {"remote_code.is_allowed()", "False"}


def test_every_loading_call_says_whether_code_may_run() -> None:
    """transformers asks the user in the middle of a run where it is told neither."""
    wanted = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
    found = []
    for path in (ROOT / "lora_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if (
                called.partition(".from_")[0] in wanted
                or "find_auto_class(" in called
                and ".from_" in called
            ):
                found.append((path.name, {keyword.arg for keyword in node.keywords}))
    assert len(found) >= 5
    assert all("trust_remote_code" in keywords for _, keywords in found)


def test_a_pickled_base_is_not_loaded(tmp_path: Path) -> None:
    made, mark = base(tmp_path), tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.write_text, (mark, "ran")

    (made / "model.safetensors").unlink()
    (made / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LoraError, match="it has pickled ones"):
        Base(str(made)).load(torch.float32)
    assert not mark.exists()
    pickle.loads((made / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # it would have


def test_nothing_unpickles() -> None:
    for path in [*(ROOT / "lora_cli").rglob("*.py")]:
        assert not re.search(
            r"torch\.load\(|pickle\.load|import pickle|allow_pickle=True|joblib|\bmarshal\b",
            _code(path),
        ), path


def _code(path: Path) -> str:
    """Without docstrings and comments, and without texts."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_subprocesses_get_lists_and_no_shell() -> None:
    found = []
    for path in [*(ROOT / "lora_cli").rglob("*.py")]:
        code = _code(path)
        assert not re.search(r"shell=True|os\.system|os\.popen|subprocess\.getoutput", code), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "subprocess.run",
                "subprocess.Popen",
            ):
                found.append(node.args[0])
    assert found  # it looks in the right place
    for command in found:
        assert not isinstance(command, ast.Constant | ast.JoinedStr), ast.unparse(command)
    assert all(isinstance(first, (ast.List, ast.Name)) for first in found)


def test_the_base_of_a_foreign_adapter_is_named_before_it_is_opened(
    tmp_path: Path, monkeypatch
) -> None:
    made = adapter(base(tmp_path))
    heard: list[str] = []
    monkeypatch.setattr(ui, "say", heard.append)

    def opened(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_cli.models.base.load_config", opened)
    with pytest.raises(KeyboardInterrupt):
        merge(made, tmp_path / "out")
    assert heard[0] == f"{made} was made elsewhere; it names as its base {tmp_path / 'base'}"


def test_an_adapter_whose_files_contradict_each_other_is_refused(tmp_path: Path) -> None:
    made = adapter(base(tmp_path))
    claim = {
        "started": "2026-11-26T10:00:00+00:00",
        "recipe": {},
        "status": "finished",
        "base": {"name": str(tmp_path / "base"), "commit": None},
    }
    (made / provenance.ARTEFACT_RECORD).write_text(json.dumps(claim))
    assert adapter_folder.read_adapter(made).base.name == str(tmp_path / "base")
    named(made, base(tmp_path, "other"))
    with pytest.raises(LoraError, match="adapter_config.json names the base"):
        adapter_folder.read_adapter(made)
    assert adapter_folder.read_adapter(made, str(tmp_path / "other")).base.name == str(
        tmp_path / "other"
    )


SLOW = {
    "target_modules": "(.*)*(.*)*(.*)*(.*)*x",
    "exclude_modules": ".?" * 60 + "!",  # none of * + { (
    "rank_pattern": {".?" * 60 + "!": 2},
    "alpha_pattern": {"(.|.)+!": 2},
    "modules_to_save": ["(.*a?)*(.*a?)*!"],
}


@pytest.mark.parametrize("field", SLOW)
def test_regular_expressions_of_an_adapter_are_tried_in_another_process(
    field: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    evil = changed(adapter(base(tmp_path)) / "adapter_config.json", **{field: SLOW[field]}).parent
    network = Base(str(tmp_path / "base")).load(torch.float32)
    with pytest.raises(UsageError, match=f"{field}: .* takes over 0.5 s"):
        attach.load_adapter(network, evil)
    with pytest.raises(UsageError, match=f"{field}: .* takes over 0.5 s"):
        merge_adapter(adapter_folder.read_adapter(evil), tmp_path / "out", stream=True)


def test_the_expressions_of_a_second_adapter_are_tried_on_the_names_that_peft_asks_for(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    good = adapter(base(tmp_path))
    network = attach.load_adapter(Base(str(tmp_path / "base")).load(torch.float32), good)
    # it fails at once on base_model.model.model.layers…
    evil = changed(good / "adapter_config.json", target_modules="model\\.l(.*)*(.*)*(.*)*!").parent
    with pytest.raises(UsageError, match="takes over 0.5 s"):
        attach.load_adapter(network, evil, "second")


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save", "rank_pattern"])
def test_lists_of_more_names_than_the_model_has_are_refused(field: str, tmp_path: Path) -> None:
    names = [f"a{number}" for number in range(1001)]
    evil = changed(
        adapter(base(tmp_path)) / "adapter_config.json",
        **{field: dict.fromkeys(names, 1) if field == "rank_pattern" else names},
    ).parent
    network = Base(str(tmp_path / "base")).load(torch.float32)
    with pytest.raises(UsageError, match=f"{field} has 1,00[12] items"):
        attach.load_adapter(network, evil)


def templated(template: str) -> PreTrainedTokenizerFast:
    from test_bad_inputs import TINY

    tokenizer = load_tokenizer(str(TINY))
    tokenizer.chat_template = template
    return tokenizer


LOOP = "{% for a in range(99999) %}"
TOO_MUCH = {
    LOOP * 2 + "{% endfor %}" * 2: "takes over 0.3 s",
    "{{ 9 ** (9 ** (9 ** 9)) }}": "takes over 0.3 s",
    "{{ 1" + "+1" * 300_000 + " }}": "takes over 0.3 s",  # to compile
    "{% set n = namespace(x=[]) %}"
    + LOOP
    + "{% set n.x = n.x + [a] %}{% endfor %}": "takes over 0.3 s",
    LOOP + "{{ 'x' * 9999 }}{% endfor %}": "makes over 4,194,304 characters",
    "{{ 'x'.center(5 * 10 ** 7) }}": "makes over 4,194,304 characters",
    "{{ 'x'.center(10 ** 9) }}": "takes over 256 MiB",
    "{{ '%1000000000d' % 1 }}": "takes over 256 MiB",
    "{{ '{:>999999999}'.format('x') }}": "takes over 256 MiB",
    "{{ 10 ** 10 * [1] }}": "takes over 256 MiB",
    "{{ [1]|batch(10 ** 9, 0)|list }}": "takes over 256 MiB",
    "x" * (2**20 + 1): "has 1,048,577 characters",
}
FAILS = {
    "{% for a in range(9) %}" * 100 + "{% endfor %}" * 100: "too many levels",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "it recurses without end",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}": "it recurses without end",
    "{{ range(10 ** 9) }}": "Range too big",
    "{{ raise_exception('no system') }}": "no system",
    "{% set n = namespace(_x=1) %}": "begins with an underscore",
    "{% for %}": "Expected an expression",
}


@pytest.mark.parametrize(("template", "said"), TOO_MUCH.items(), ids=lambda text: text[:40])
def test_templates_are_stopped(template: str, said: str, monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "MEMORY", 2**28)
    with pytest.raises(chat_template.TemplateLimit, match=said):
        chat_template.render(templated(template), [{"role": "user", "content": "x"}])


@pytest.mark.parametrize(("template", "said"), FAILS.items(), ids=lambda text: text[:40])
def test_templates_that_fail_say_why(template: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        chat_template.render(templated(template), [{"role": "user", "content": "x"}])


def test_a_template_renders_as_transformers_renders_it() -> None:
    tokenizer = load_tokenizer(str(ROOT / "build" / "tiny" / "model"))
    turns = [
        {"role": "user", "content": "ask 3 * 4 ** 2"},
        {"role": "assistant", "content": "answer"},
    ]
    products = "{{ 3 * 4 }} {{ 2 ** 5 }} {{ 'ab' * 3 }} {{ [1] * 2 }} {{ 1.5 * 2 }}{% generation %}x{% endgeneration %}"
    for source in (tokenizer.chat_template, products):
        for ask in (True, False):
            theirs = tokenizer.apply_chat_template(
                turns, chat_template=source, tokenize=False, add_generation_prompt=ask
            )
            assert (
                chat_template.render(tokenizer, turns, add_generation_prompt=ask, source=source)
                == theirs
            )


def test_links_are_neither_followed_nor_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    (tmp_path / "link").symlink_to("mine")
    with pytest.raises(LoraError, match="is a link"):
        run_folder.draft_run(tmp_path / "link", {}, {"base": {}}, resume=False)
    with pytest.raises(LoraError, match="already exists"), files.staged_folder(tmp_path / "link"):
        pass
    (tmp_path / "record.json").symlink_to("mine/file")
    files.write_json(tmp_path / "record.json", {"new": True})
    assert not (tmp_path / "record.json").is_symlink()
    # the name that is written beside it first may be guessed
    staging = tmp_path / f".record.json.{__import__('os').getpid()}.tmp"
    staging.symlink_to("mine/file")
    files.write_json(tmp_path / "record.json", {"new": False})
    assert (tmp_path / "mine" / "file").read_text() == "keep"


def test_what_is_taken_for_a_secret() -> None:
    environment = {
        "HF_TOKEN": "a" * 20,
        "TOKENIZERS_PARALLELISM": "false-or-so",
        "MY_API_KEY": "b" * 20,
        "SHELL": "c" * 9,
    }
    assert dict(privacy.find_secrets(environment, [])) == {
        "$HF_TOKEN": "a" * 20,
        "$MY_API_KEY": "b" * 20,
    }
    arguments = [
        "train",
        "--set",
        "training.hub_token=d234567890",
        "--token",
        "e234567890",
        "training.eos_token=</s></s></s>",
    ]
    assert [value for _, value in privacy.find_secrets({}, arguments)] == [
        "d234567890",
        "e234567890",
    ]
    assert (
        privacy.mask_secrets("see hf_abcdefghijklmnop1234 at https://me:pw@hf.co/x")
        == "see *** at https://***@hf.co/x"
    )
    plain = "training.eos_token=</s>, TOKENIZERS_PARALLELISM"
    assert privacy.mask_secrets(plain) == plain


def test_merging_records_the_commit_of_a_base_that_names_none(tmp_path: Path, monkeypatch) -> None:
    """The hub's answer is recorded; a folder has no commit."""
    made = adapter(base(tmp_path))
    asked: list[Base] = []

    def resolve(self: Base) -> Base:
        asked.append(self)
        return self

    monkeypatch.setattr(Base, "resolve", resolve)
    merge(made, tmp_path / "out")
    assert asked == [Base(str(tmp_path / "base"))]


def test_trust_is_not_remembered_between_commands() -> None:
    """Each command's own default forbids again what the one before allowed, in one process too."""
    code = (
        "import sys\nfrom lora_cli import cli\nfrom lora_cli.common import remote_code\n"
        "for words in (['check', 'gone.yaml', '--trust-remote-code'], ['check', 'gone.yaml']):\n"
        "    sys.argv = ['lora', *words]\n    try:\n        cli.main()\n    except SystemExit:\n"
        "        print(remote_code.is_allowed())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "False"]
