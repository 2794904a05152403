"""The whole pipeline on the tiny model, as a user types it: train, merge, export, generate, chat,
for each method.

The merged model is opened by transformers, the adapter by PEFT, the GGUF files by llama.cpp,
K-quants among them. Hermetic: the tiny model; llama.cpp's converter and quantiser are the managed
copy that `make test` has set up. Alone: pytest tests/cli/test_pipeline.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.gguf.engine import GGUFModel
from tests.networks import greedy

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Reverse: red dog sun"
SYSTEM = 'Words, in "order".'
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("qlora", "dora", "qdora")]
"""Methods whose adapters and merged models other tests open too."""


class Runs(dict[str, Path]):
    """A smoke run of each method, made when it is first asked for: its folder, with adapter/ and merged/."""

    def __init__(self, lora, parent: Path) -> None:
        super().__init__()
        self.lora, self.parent = lora, parent

    def __missing__(self, method: str) -> Path:
        run = self.parent / method
        options = ["--set", f"method={method}", "--set", f"output_dir={run}"]
        options += ["--set", f"model.system_prompt={SYSTEM}"] if method == "dora" else []
        trained = self.lora("train", "configs/smoke.yaml", *options, cwd=ROOT)
        assert trained.returncode == 0, trained.stderr
        assert "eval_loss" in trained.stderr
        merged = self.lora("merge", run / "adapter", run / "merged", cwd=ROOT)
        assert merged.returncode == 0, merged.stderr
        assert "14 of 14 modules merged" in merged.stderr
        self[method] = run
        return run


@pytest.fixture(scope="module")
def runs(lora, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(lora, tmp_path_factory.mktemp("pipeline"))


def ids_of(tokenizer) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )["input_ids"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_and_transformers_open_what_was_made(runs, method: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipe names the base relative to here
    run = runs[method]
    ids = torch.tensor([ids_of(AutoTokenizer.from_pretrained(run / "merged"))])
    with torch.no_grad():
        adapted = (
            AutoPeftModelForCausalLM.from_pretrained(run / "adapter").eval()(input_ids=ids).logits
        )
        merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained("build/tiny/model").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 0.1  # something was learned, so agreeing means something


@pytest.mark.parametrize("method", ["lora", *SLOW])
def test_the_gguf_files_answer_in_llama_cpp(runs, lora, method: str) -> None:
    run = runs[method]
    done = lora("export-gguf", run / "merged", "-q", "f16", "-q", "Q4_K_M", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert [file.name for file in files] == [f"{method}-f16.gguf", f"{method}-Q4_K_M.gguf"]
    assert done.stderr.count("in llama.cpp: mean KL") == 2
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    ids = ids_of(tokenizer)
    weights = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    wanted = tokenizer.decode(greedy(weights, ids, 24, apart=0.1), skip_special_tokens=True)
    for file in files:
        with GGUFModel(file) as model:
            rendered = model.render([{"role": "user", "content": PROMPT}])
            assert model.tokenize(rendered) == ids
            assert (SYSTEM in rendered) == (method == "dora")
            answer = model.complete(rendered, 24)
        assert answer
        if "f16" in file.name:
            assert answer.startswith(wanted)
        record = json.loads(file.with_name(f"{file.name}.json").read_text())
        assert record["parent"]["parent"]["recipe"]["method"] == method
        likeness = record["figures"]["likeness"]
        said = f"mean KL {likeness['mean_kl']:.1e}, top-1 {likeness['top1']:.1%}"
        assert f"in llama.cpp: {said}, perplexity" in record["checked"]
        assert (record["figures"]["base"] is None) == ("f16" in file.name)
    assert "mean KL" in record["parent"]["checked"]["trained"]
    done = lora("report", run, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [reported] = json.loads((run / "report.json").read_text())["runs"]
    parity = {each["name"]: each["figures"] for each in reported["parity"]}
    assert parity.keys() == {"merged", *(file.name for file in files)}
    assert parity[file.name][0]["mean_kl"] == likeness["mean_kl"]
    assert len(parity["merged"]) == 1  # of a float32 base nothing is rounded


def test_an_adapter_is_exported_by_merging_it_on_the_way(runs, lora, tmp_path: Path) -> None:
    run = runs["lora"]
    done = lora("export-gguf", run / "adapter", "-q", "q8_0", "-o", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == ["Modelfile", "lora-q8_0.gguf", "lora-q8_0.gguf.json"]


def test_the_newest_result_is_exported_and_named_first(runs, lora) -> None:
    done = lora(
        "export-gguf", "-q", "q8_0", cwd=runs["dora"], env={"LLAMA_CPP_DIR": "/nonexistent"}
    )
    assert done.returncode == 1
    assert done.stderr.startswith("the newest result here is merged\n")
    assert "LLAMA_CPP_DIR /nonexistent has no convert_hf_to_gguf.py" in done.stderr


def test_generate_puts_all_forms_side_by_side(runs, lora, tiny: Path) -> None:
    run = runs["lora"]
    forms = ["build/tiny/model", run / "adapter", run / "merged"]
    rows = (tiny / "eval.jsonl").read_text().splitlines()[:6]
    (run / "rows.jsonl").write_text("\n".join(rows) + "\n")
    done = lora(
        "generate",
        *forms,
        "--file",
        run / "rows.jsonl",
        "--json",
        "--max-new-tokens",
        "32",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["model"] for answer in answers[:3]] == [str(form) for form in forms]
    by_form = {
        str(form): [a["answer"] for a in answers if a["model"] == str(form)] for form in forms
    }
    assert by_form[str(run / "adapter")] == by_form[str(run / "merged")]
    assert len(by_form["build/tiny/model"]) == 6
    assert "exact match" in done.stderr


def test_chat_keeps_the_conversation(runs, lora) -> None:
    talk = "Reverse: red dog\n/reset\nReverse: red dog\n/quit\n"
    done = lora(
        "chat",
        runs["lora"] / "adapter",
        "--temperature",
        "0",
        "--max-new-tokens",
        "16",
        cwd=ROOT,
        input=talk,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second != ""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["train", "nothing.yaml"], 2, "error: nothing.yaml does not exist"),
        (["train"], 2, "error: lora train needs a recipe\n\nhint: lora recipes"),
        (["frobnicate"], 2, "error: lora has no command frobnicate"),
        (["merge", "nothing", "out"], 1, "error: nothing does not exist"),
        (["merge", "build/tiny/model", "out"], 1, "error: build/tiny/model is not an adapter"),
        (
            ["export-gguf", "build/tiny/model", "-q", "Q4_K_X"],
            2,
            "error: unknown GGUF type 'Q4_K_X'; did you mean Q4_K",
        ),
        (["generate", "build/tiny/model"], 2, "error: no prompt was given"),
        (["generate", "nothing.gguf", "-p", "x"], 1, "error: nothing.gguf does not exist"),
        (["chat", "./nothing"], 1, "error: ./nothing does not exist or is not a model"),
    ],
)
def test_mistakes_get_a_message_and_a_status(
    lora, arguments: list[str], status: int, said: str
) -> None:
    done = lora(*arguments, cwd=ROOT)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
