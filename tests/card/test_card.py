"""The card: what it says is in the record, it names no place of this machine, others' text stays
text, and what a person wrote stays.

Hermetic: adapters that PEFT saved, records written here. Alone: pytest tests/card
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_cli.card import is_edited, make_card, read_evaluation, read_facts, trim_paths, write_card
from lora_cli.card.evaluations import find_evaluations
from lora_cli.common import LoraError
from lora_cli.recipe import load_recipe, strict_yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = {
    "method": "lora",
    "model": {"name_or_path": "org/base", "dtype": "bfloat16", "system_prompt": None},
    "lora": {"r": 4, "lora_alpha": 8},
    "data": {"path": "/home/canary/rows.jsonl"},
    "training": {"max_steps": 3, "report_to": "none"},
    "output_dir": "/home/canary/runs/mine",
}


def record(**changed) -> dict:
    return {
        "command": "train",
        "started": "2026-11-27T10:00:00+00:00",
        "versions": {"lora-cli": "0.1.0", "peft": "0.21.2"},
        "id": "abc",
        "status": "finished",
        "recipe": RECIPE,
        "base": {"name": "org/base", "commit": COMMIT},
        "data": {"fingerprint": "f00d", "rows": 4000, "tokens": 88038},
        "results": {"steps": 3, "train_loss": 1.25},
        "kept": {
            "which": "best",
            "step": 2,
            "metric": "eval_loss",
            "value": 0.75,
            "last_step": 3,
            "last_value": 0.875,
        },
    } | changed


@pytest.fixture
def saved(tiny: Path, tmp_path: Path):
    """`saved(record, **options)`: an adapter's folder with a record."""

    def save(data: dict | None, name: str = "adapter", **options) -> Path:
        base = AutoModelForCausalLM.from_pretrained(tiny / "model")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        for key, value in options.items():
            setattr(adapted.peft_config["default"], key, value)
        adapted.peft_config["default"].base_model_name_or_path = "org/base"
        folder = tmp_path / "run" / name
        adapted.save_pretrained(folder, save_embedding_layers=False)  # asks no hub
        if data is not None:
            (folder / "lora_record.json").write_text(json.dumps(data))
        return folder

    return save


def test_the_card_says_what_the_record_says(saved) -> None:
    text = make_card(read_facts(saved(record()))).text
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-cli"],
    }
    for said in ("4,000 rows, 88,038 tokens", "f00d", COMMIT, "| 1.25 |", "| 0.75 |", "| 0.875 |"):
        assert said in text, said
    assert "/home" not in text
    assert "--max-lora-rank 8" in text


def test_the_card_says_how_answers_were_compared(saved) -> None:
    told = {"loss": "simpo", "beta": 2.0, "gamma": 1.0, "sft_weight": 0.0}
    compared = RECIPE | {"objective": "simpo", "preference": told}
    text = make_card(read_facts(saved(record(recipe=compared)))).text
    assert "| Objective | `simpo`, loss `simpo`, beta `2.0`, gamma `1.0` |" in text
    votes = {"loss": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 2.0}
    for objective, given in (("kto", votes), ("simpo", told | {"desirable_weight": 1.0})):
        compared = RECIPE | {"objective": objective, "preference": given}
        text = make_card(read_facts(saved(record(recipe=compared), objective))).text
        # a weight of KTO's has no effect with others
        assert ("desirable\\_weight `1.0`" in text) == (objective == "kto")
    assert "Objective" not in make_card(read_facts(saved(record(), "other"))).text


def test_the_recipe_in_it_is_a_recipe(saved, tmp_path: Path) -> None:
    text = make_card(read_facts(saved(record()))).text
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(found[1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.model.revision == COMMIT
    assert (recipe.data.path, recipe.output_dir) == ("rows.jsonl", "mine")


def test_vllm_does_not_load_dora(saved) -> None:
    text = make_card(read_facts(saved(record(), use_dora=True))).text
    assert "They do not load this adapter (DoRA magnitudes)" in text
    assert "--enable-lora" not in text


def test_a_base_in_4_bits_is_loaded_so(saved) -> None:
    recipe = {**RECIPE, "method": "qlora", "quantization": {"bnb_4bit_quant_type": "nf4"}}
    text = make_card(read_facts(saved(record(recipe=recipe)))).text
    assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')" in text
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")


def test_an_adapter_made_elsewhere_gets_what_is_known(saved) -> None:
    text = make_card(read_facts(saved(None))).text
    assert ModelCard(text).data.base_model == "org/base"
    assert "q\\_proj" in text or "q_proj" in text
    assert "recipe in full" not in text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": ["/home/canary/a.jsonl", "b/c.jsonl"]}, "`a.jsonl`, `c.jsonl`, 4,000 rows"),
        ({"mix": [{"path": ["a.json", "b.json"]}, {"path": "c.json"}]}, "`a.json`, `b.json`, `c.json`"),
        ({"path": [f"{number}.csv" for number in range(10)]}, "`7.csv`, 2 more, 4,000 rows"),
    ],
)  # fmt: skip
def test_every_file_of_the_data_is_named(saved, data: dict, said: str) -> None:
    text = make_card(read_facts(saved(record(recipe=RECIPE | {"data": data})))).text
    assert said in next(line for line in text.splitlines() if line.startswith("| Data |"))


ONE, OTHER = "c" * 40, "d" * 40


@pytest.mark.parametrize(
    ("data", "commit", "sets", "pinned"),
    [
        ({"path": "o/a"}, ONE, ["o/a"], {"path": "o/a", "revision": ONE}),
        ({"path": "o/a", "eval_path": "o/b"}, ONE, ["o/a"], {"path": "o/a", "eval_path": "o/b"}),
        ({"path": "o/a", "eval_path": "o/a"}, ONE, ["o/a"], {"path": "o/a", "eval_path": "o/a", "revision": ONE}),
        ({"mix": [{"path": "/home/canary/photos"}, {"path": "o/b"}]}, ONE, ["o/b"], {"mix": [{"path": "photos"}, {"path": "o/b", "revision": ONE}]}),
        ({"mix": [{"path": "o/a"}, {"path": "b"}]}, f"{ONE}, {OTHER}", ["o/a", "b"], {"mix": [{"path": "o/a", "revision": ONE}, {"path": "b", "revision": OTHER}]}),
        ({"mix": [{"path": "o/a"}, {"path": "o/b"}]}, ONE, [], {"mix": [{"path": "o/a"}, {"path": "o/b"}]}),
        ({"path": "/home/canary/photos"}, None, [], {"path": "photos"}),
    ],
)  # fmt: skip
def test_data_on_the_hub_is_pinned_and_no_other_is_said_to_be_there(
    saved, data: dict, commit: str | None, sets: list[str], pinned: dict
) -> None:
    said = {"fingerprint": "f00d", "rows": 4000, "commit": commit}
    facts = read_facts(saved(record(recipe=RECIPE | {"data": data}, data=said)))
    text = make_card(facts).text
    assert (ModelCard(text).data.to_dict().get("datasets") or []) == sets
    assert text.count("huggingface.co/datasets/") == len(sets)
    recipe = re.search(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert strict_yaml.parse(recipe[1], "recipe").data["data"] == pinned


def test_what_is_no_mapping_is_named(saved) -> None:
    folder = saved(record(recipe=RECIPE | {"lora": {"target_modules": ["q_proj", 1]}}))
    assert "target_modules `1, q_proj`" in make_card(read_facts(folder)).text
    (folder.parent / "record.json").write_text('{"id": "abc", "resumed": [1]}')
    with pytest.raises(LoraError, match=r"record\.json is damaged or not ours: resumed\.0"):
        find_evaluations(folder, record())
    for name in ("tokenizer_config.json", "adapter_config.json"):
        (folder / name).write_text("[]")
        with pytest.raises(LoraError, match=f"{name} is not a mapping"):
            read_facts(folder)


EVIL = "</details><script>alert(1)</script> ``` | `x` [a](javascript:b)\n# Head\n<!-- end -->"


def test_others_text_stays_text(saved) -> None:
    model = {**RECIPE["model"], "system_prompt": EVIL}
    evil = record(
        recipe={**RECIPE, "model": model, "data": {"path": f"rows {EVIL}"}},
        device={"kind": "cuda", "name": EVIL},
        parent={"name": EVIL, "sha256": "a" * 64},
    )
    text = make_card(read_facts(saved(evil))).text
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(text).text)
    assert "<script" not in html
    assert 'javascript:b"' not in html
    assert html.count("<h1>") == 1
    assert html.count("</details>") == 1
    found = re.search(r"^(````+)yaml\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert strict_yaml.parse(found[2], "recipe").data["model"]["system_prompt"] == EVIL


def test_places_of_this_machine_become_names(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/canary")
    monkeypatch.setenv("SERVICE_TOKEN", "canary-secret-77")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own").write_text("")
    trimmed = trim_paths(
        {
            "data": {"path": "secret/plan/rows.jsonl", "eval_path": "https://a:b@c.de/x.csv?sig=1"},
            "base": {"name": "~/models/base"},
            "windows": "C:\\Users\\canary\\x.txt",
            "reason": "found in /home/canary/x, canary-secret-77",
            "other": "sub/own",
            "amid": f"read {tiny / 'train.jsonl'}, and/or https://a.de/b/c",
            "prompt": "/no_think",
            "set": {"path": "org/rows"},
            "pattern": r".*\.(q|v)_proj",
        }
    )
    assert trimmed == {
        "data": {"path": "rows.jsonl", "eval_path": "x.csv"},
        "base": {"name": "base"},
        "windows": "x.txt",
        "reason": "found in ~/x, ***",
        "other": "own",
        "amid": "read train.jsonl, and/or https://a.de/b/c",
        "prompt": "/no_think",
        "set": {"path": "org/rows"},
        "pattern": r".*\.(q|v)_proj",
    }


def test_the_library_s_empty_template_is_replaced(saved) -> None:
    folder = saved(record())
    before = (folder / "README.md").read_text()
    assert "More Information Needed" in before
    assert not is_edited(before)
    made = make_card(read_facts(folder), before)
    assert "More Information Needed" not in made.text
    assert not made.kept
    filled = before.replace("[More Information Needed]", "Ada", 1)
    assert is_edited(filled)
    assert make_card(read_facts(folder), filled).text == filled


def test_what_was_written_into_the_library_s_template_stays(saved) -> None:
    facts = read_facts(saved(record()))
    theirs = str(ModelCard.from_template(ModelCardData()))
    body = theirs.split("---\n", 2)[-1] if theirs.startswith("---") else theirs
    front = "---\nbase_model: /home/ada/base\nlibrary_name: peft\nlicense: mit\n---\n"
    card = f"{front}{body}\n### Framework versions\n\n- PEFT 0.20.0\n"
    made = make_card(facts, card)
    assert ModelCard(made.text).data.license == "mit", "added by hand: PEFT writes none"
    assert "/home/ada" not in made.text
    assert made.kept and is_edited(card) and is_edited(made.text)
    assert not is_edited(card.replace("license: mit\n", ""))
    noted = f"{card}\n## What I found\n\nIt likes short questions.\n"
    assert make_card(facts, noted).text == noted
    assert is_edited(noted)


def test_what_was_written_around_it_stays(saved) -> None:
    folder = saved(record())
    facts = read_facts(folder)
    first = make_card(facts).text
    assert not is_edited(first)
    assert make_card(facts, first) == (first, "")
    mine = first.replace("tags:", "license: mit\ntags:") + "\nBy hand.\n"
    newer = replace(facts, training=record(results={"steps": 9}))
    made = make_card(newer, mine)
    assert "| steps | 9 |" in made.text
    assert "By hand." in made.text
    assert ModelCard(made.text).data.license == "mit"
    assert made.kept == "kept what you have written: metadata and text"
    assert make_card(newer, made.text).text == made.text
    inside = first.replace("## Training", "## My training")
    assert make_card(newer, inside).text == inside
    alone = str(
        ModelCard.from_template(ModelCardData(), template_str="---\n{{ card_data }}\n---\n# x")
    )
    assert make_card(newer, alone).text == alone


def test_a_base_s_card_that_is_none_costs_no_adapter(saved, tmp_path: Path, capsys) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: [mit\n---\n")
    folder = saved(record(base={"name": str(base)}))
    write_card(folder, "mine")
    assert "warning: the license of" in capsys.readouterr().err
    assert "license" not in ModelCard.load(folder / "README.md").data.to_dict()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    write_card(folder, "mine")
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_evaluations_are_a_table_of_the_card(saved) -> None:
    folder = saved(record())
    run = folder.parent
    (run / "record.json").write_text(json.dumps(record()))
    place = run / "evaluations" / "held-out"
    place.mkdir(parents=True)
    models = [
        {
            "label": label,
            "kind": kind,
            "path": f"/home/canary/{label}",
            "metrics": {
                "exact": {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 8}
            },
            "forgetting": {"loss": 2.5, "tokens": 100},
        }
        for label, kind, value in (
            ("org/base", "base", 0.25),
            ("runs/mine/adapter", "adapter", 0.75),
        )
    ]
    data = {"name": "held.jsonl", "sha256": "e" * 64, "rows": 8}
    (place / "evaluation.json").write_text(json.dumps({"data": data, "models": models}))
    files = find_evaluations(folder, {"id": "abc"})
    assert files == [place / "evaluation.json"]
    assert not find_evaluations(folder, {"id": "another"})
    facts = replace(read_facts(folder), evaluations=(read_evaluation(files[0]),))
    text = make_card(facts).text
    assert "|  | base `org/base` | adapter |" in text
    assert "| exact | 0.25 (0.15 to 0.35) | 0.75 (0.65 to 0.85) |" in text
    assert "| loss on general text | 2.5 | 2.5 |" in text
    assert "/home" not in text
    (place / "evaluation.json").write_text('{"data": 1}')
    with pytest.raises(LoraError, match=r"evaluation\.json is damaged or not ours"):
        read_evaluation(files[0])


def test_evaluations_of_another_adapter_of_the_run_are_left_out(saved) -> None:
    """A run that goes on makes another adapter, and moves the one before aside."""
    folder = saved(record())
    times = [f"2026-11-27T0{hour}:00:00+00:00" for hour in range(5)]
    (folder.parent / "record.json").write_text(json.dumps(record() | {"resumed": times[1::2]}))
    for number, time in enumerate(times):
        place = folder.parent / "evaluations" / str(number)
        place.mkdir(parents=True)
        (place / "evaluation.json").write_text(json.dumps({"started": time}))

    def find(*resumed: str) -> list[str]:
        found = find_evaluations(folder, {"id": "abc", "resumed": list(resumed)})
        return [each.parent.name for each in found]

    assert find() == ["0"]
    assert find(times[1]) == ["1", "2"]
    assert find(times[1], times[3]) == ["3", "4"]


@pytest.mark.parametrize("quantised", [False, True])
def test_a_base_that_was_a_gguf_file_is_told_with_how_to_get_it_again(saved, quantised) -> None:
    made = {"file": "/home/canary/x.gguf", "sha256": "ab" * 32, "type": "Q4_K", "dtype": "bfloat16"}
    base = {"name": "/home/canary/.cache/lora-cli/gguf/ab/x", "made_from": made}
    four = {"bnb_4bit_quant_type": "nf4"} if quantised else None
    folder = saved(record(base=base, recipe=RECIPE | {"quantization": four}))
    text = make_card(read_facts(folder)).text
    assert "canary" not in text
    assert "LoRA adapter for `x.gguf` (a GGUF file of whoever trained it)" in text
    assert f"`x.gguf`, most of it Q4\\_K, dequantised to bfloat16; sha256 `{'ab' * 32}`" in text
    assert "lora merge . merged --base x.gguf" in text
    program = re.search("```python\n(.*?)```", text, re.S)
    assert program
    compile(program[1], "card", "exec")
    if quantised:
        assert "# the folder that lora dequantised x.gguf into: lora cache shows it" in program[1]
    else:
        assert "gguf_file='x.gguf',\n    dtype='bfloat16',\n" in program[1]
        assert "# a folder with x.gguf and nothing else" in program[1]
    named = make_card(read_facts(folder, "org/base", COMMIT)).text
    assert "gguf_file" not in named
