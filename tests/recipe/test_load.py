"""Recipes: what loads, what is refused and with which words, `extends`, `--set`, and the shipped
recipes.

Hermetic: temporary files. Alone: pytest tests/recipe/test_load.py
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lora_cli.common.errors import UsageError
from lora_cli.plan import auto, configurations, hardware
from lora_cli.recipe import keys, strict_yaml, upstream
from lora_cli.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent.parent
MINIMAL = "model: {name_or_path: base}\ndata: {path: rows.jsonl}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> keys.Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    """What is said, the temporary folder left out of the paths."""
    with pytest.raises(UsageError) as caught:
        configurations.try_configurations(load(tmp_path, text, *overrides))
    return f"{caught.value} | {caught.value.hint}".replace(f"{tmp_path}/", "")


def test_a_minimal_recipe_gets_defaults_and_a_folder_of_its_own(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL)
    assert (loaded.method, loaded.lora.r, loaded.output_dir) == ("lora", 16, "runs/r")


def test_upstream_fields_are_taken_over_only_where_set(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "training: {weight_decay: 0.1}\nlora: {use_rslora: true}\n")
    assert loaded.training.collect_values()["weight_decay"] == 0.1
    assert "adam_beta1" not in loaded.training.collect_values()
    settled, _ = auto.settle(loaded)
    assert upstream.build_training_arguments(settled).weight_decay == 0.1
    assert upstream.build_lora_config(settled).use_rslora is True


@pytest.mark.parametrize(
    ("metric", "mode"), [("loss", "min"), ("perplexity", "min"), ("accuracy", "max")]
)
def test_a_schedule_goes_by_metrics_the_way_they_are_better(
    metric: str, mode: str, tmp_path: Path
) -> None:
    """transformers' schedules take every metric for one that is to fall."""
    text = MINIMAL.replace("data: {", "data: {eval_rows: 2, ")
    text += f"training: {{lr_scheduler_type: reduce_lr_on_plateau, metric_for_best_model: {metric}"
    settled, _ = auto.settle(load(tmp_path, text + ", keep: last}\n"))
    assert upstream.build_training_arguments(settled).lr_scheduler_kwargs == {"mode": mode}
    settled, _ = auto.settle(load(tmp_path, text + ", lr_scheduler_kwargs: {patience: 3}}\n"))
    found = upstream.build_training_arguments(settled).lr_scheduler_kwargs
    assert found == {"mode": mode, "patience": 3}


def test_the_resolved_recipe_loads_to_itself(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "method: qdora\ntraining: {max_steps: 3, adam_beta2: 0.95}\n")
    (tmp_path / "again.yaml").write_text(strict_yaml.dump(loaded.to_data()))
    assert load_recipe(tmp_path / "again.yaml").to_data() == loaded.to_data()


def test_extends_joins_sections_and_keeps_each_value_s_source(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "training:\n  max_steps: 5\n  seed: 3\n")
    loaded = load(tmp_path, "extends: base.yaml\ntraining:\n  seed: 4\n", "lora.r=8")
    assert (loaded.training.max_steps, loaded.training.seed, loaded.lora.r) == (5, 4, 8)
    assert loaded.where("training", "max_steps") == f"{tmp_path}/base.yaml:4: training.max_steps"
    assert loaded.where("training", "seed") == f"{tmp_path}/r.yaml:3: training.seed"
    assert loaded.where("lora", "r") == "--set lora.r=8: lora.r"


def test_the_quick_typo(tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL + "training:\n  learning_rat: 1e-4\n")
    assert (
        said
        == "r.yaml:4: training.learning_rat is not a known key | did you mean training.learning_rate?"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {path: x}\n", "r.yaml:1: model is missing | add model"),
        ("[1, 2]\n", "r.yaml: a recipe has sections such as model: and data: | lora schema"),
        (
            MINIMAL + "training: {max_steps: 0}\n",
            "r.yaml:3: training.max_steps is 0, but must be -1 or greater than or equal to 1 | "
            "leave it out for its default, -1",
        ),
        (
            MINIMAL + "training: {train_sampling_strategy: zzz}\n",
            "r.yaml:3: training.train_sampling_strategy is 'zzz', but must be "
            "'random', 'sequential', 'group_by_length' or 'batch_rebalance' | leave it out for its default, 'random'",
        ),
        (
            MINIMAL + "training: {fp16: true}\n",
            "r.yaml:3: training.fp16: float16 training needs a GPU | --set training.fp16=false",
        ),
        (
            MINIMAL + "lora: {init_lora_weights: evil}\n",
            "r.yaml:3: lora.init_lora_weights is 'evil', but must be true or false or text matching "
            r"^(gaussian|orthogonal|mica|eva|loftq|olora|pissa|corda|lora_ga|pissa_niter_[1-9]\d*)$ | "
            "leave it out for its default, true",
        ),
        (
            MINIMAL + "method: qlora\nlora: {init_lora_weights: olora}\n",
            "r.yaml:4: lora.init_lora_weights needs the base's weights, which qlora stores in 4 bits | "
            "use method: lora or dora",
        ),
        (
            MINIMAL + "lora: {init_lora_weights: loftq}\n",
            "r.yaml:3: lora.init_lora_weights makes up for 4-bit storage, which lora does not have | "
            "use method: qlora or qdora",
        ),
        (
            MINIMAL + "method: dora\nlora: {init_lora_weights: mica}\n",
            "r.yaml:4: lora.init_lora_weights is not defined for DoRA | use method: lora",
        ),
        (
            MINIMAL + "lora: {init_lora_weights: pissa, lora_bias: true}\n",
            "r.yaml:3: lora.lora_bias works only with init_lora_weights: true or false | remove one of them",
        ),
        (
            MINIMAL + "lora: {eva_config: {rho: 1.5}}\n",
            "r.yaml:3: lora.eva_config has no effect | add lora.init_lora_weights: eva, or remove it",
        ),
        (
            MINIMAL + "lora: {init_lora_weights: eva, eva_config: {rhoo: 1.5}}\n",
            "r.yaml:3: lora.eva_config.rhoo is not a known key | did you mean rho?",
        ),
        (
            MINIMAL + "lora: {init_lora_weights: lora_ga, lora_ga_config: {scale: huge}}\n",
            "r.yaml:3: lora.lora_ga_config.scale: Input should be 'stable', 'weight_svd', 'gd_scale' or 'unit' | "
            "lora schema --markdown",
        ),
        (
            MINIMAL + "lora: {init_lora_weights: eva, eva_config: {rho: 0.5}}\n",
            "r.yaml:3: lora.eva_config: Value error, `rho` must be >= 1.0 | lora schema --markdown",
        ),
        (
            MINIMAL + "lora: {use_bdlora: true}\n",
            "r.yaml:3: lora.use_bdlora must be a mapping | "
            "its keys: match_strict, nblocks, target_modules_bd_a, target_modules_bd_b",
        ),
        (
            MINIMAL + "lora: {use_qalora: true}\n",
            "r.yaml:3: lora.use_qalora cannot be set | it works on GPTQ bases only, which lora does not load",
        ),
        (
            MINIMAL + "lora: {rank_pattern: {q_proj: 0}}\n",
            "r.yaml:3: lora.rank_pattern.q_proj is 0, but must be greater than or equal to 1 | "
            "lora schema --markdown describes every key",
        ),
        (
            MINIMAL + "lora: {layers_to_transform: [0, -1], target_modules: [q_proj]}\n",
            "r.yaml:3: lora.layers_to_transform.1 is -1, but must be greater than or equal to 0 | "
            "lora schema --markdown describes every key",
        ),
        (
            MINIMAL + "lora: {lora_alpha: .inf}\n",
            "r.yaml:3: lora.lora_alpha is inf, but must be a finite number | "
            "leave it out for its default, 32",
        ),
        (
            MINIMAL + "training: {lr_scheduler_type: constant, warmup_steps: 10}\n",
            "r.yaml:3: training.warmup_steps has no effect with lr_scheduler_type: constant | "
            "warmup_steps: 0, or lr_scheduler_type: constant_with_warmup",
        ),
        (
            MINIMAL + "training: {lr_scheduler_type: greedy}\n",
            "r.yaml:3: training.lr_scheduler_type needs evaluation data | "
            "set data.eval_fraction, data.eval_path or data.eval_split",
        ),
        (
            MINIMAL + "training: {loraplus_lr_embedding: 1e-5}\n",
            "r.yaml:3: training.loraplus_lr_embedding has no effect | add training.loraplus_lr_ratio, or remove it",
        ),
        (
            "model: {name_or_path: base}\ndata: {split: train}\n",
            "r.yaml:2: data does not say what to train on | add data.path, or data.mix",
        ),
        (
            "model: {name_or_path: base}\ndata: {path: a, mix: [{path: b}]}\n",
            "r.yaml:2: data.path and data.mix exclude each other | give path within data.mix",
        ),
        (
            "model: {name_or_path: base}\ndata: {mix: [{path: b, wieght: 2}]}\n",
            "r.yaml:2: data.mix.0.wieght is not a known key | did you mean data.mix.0.weight?",
        ),
        (
            "model: {name_or_path: base}\ndata: {mix: [{path: b}], eval_split: test}\n",
            "r.yaml:2: data.eval_split needs data.eval_path beside data.mix | add data.eval_path",
        ),
        (
            MINIMAL + "trainer: sft\nlora: {target_modules: [lm_head]}\n",
            "r.yaml:3: trainer: SFTTrainer cannot adapt the output head | trainer: auto",
        ),
        (
            MINIMAL + "lora: {trainable_token_indices: [3]}\ntraining: {padding_free: true}\n",
            "r.yaml:4: training.padding_free works only with trainer: sft | "
            "SFTTrainer cannot adapt the output head: remove it",
        ),
        (
            MINIMAL + "output_dir: .\n",
            "r.yaml:3: output_dir must not be the current folder or one above it | output_dir: runs/NAME",
        ),
        (
            MINIMAL + "training: {model_init_kwargs: {num_hidden_layers: 1}}\n",
            "r.yaml:3: training.model_init_kwargs cannot be set | "
            "use model.revision, model.dtype and model.attn_implementation: merging loads the same base",
        ),
        (
            "a: " + "[" * 3000,
            "r.yaml: nested too deeply | a recipe has sections of keys, no deeper",
        ),
        ("", "r.yaml: a recipe has sections such as model: and data: | lora schema"),
        (MINIMAL + "methd: lora\n", "r.yaml:3: methd is not a known key | did you mean method?"),
        (
            MINIMAL + "learning_rate: 1\n",
            "r.yaml:3: learning_rate is not a known key | learning_rate belongs in the section training",
        ),
        (
            MINIMAL + "training: {max_seq_length: 9}\n",
            "r.yaml:3: training.max_seq_length is not a known key | it is called training.max_length",
        ),
        (
            MINIMAL + "training: {hub_token: x}\n",
            "r.yaml:3: training.hub_token cannot be set | "
            "keep secrets out of recipes: set HF_TOKEN in the environment",
        ),
        (
            MINIMAL + "lora: {r: 0}\n",
            "r.yaml:3: lora.r is 0, but must be greater than or equal to 1 | leave it out for its default, 16",
        ),
        (
            MINIMAL + "lora: {r: '16'}\n",
            "r.yaml:3: lora.r is '16', but must be a whole number | write lora.r: 16",
        ),
        (
            MINIMAL + "lora: {lora_dropout: 7}\n",
            "r.yaml:3: lora.lora_dropout is 7, but must be less than 1 | leave it out for its default, 0.0",
        ),
        (
            MINIMAL + "lora: {bias: nonsense}\n",
            "r.yaml:3: lora.bias is 'nonsense', but must be 'none', 'all' or 'lora_only' | did you mean none?",
        ),
        (
            MINIMAL + "training: {learning_rate: abc}\n",
            "r.yaml:3: training.learning_rate is 'abc', but must be a number | leave it out for its default, 0.0002",
        ),
        (
            MINIMAL + "training: {adam_beta1: hello}\n",
            "r.yaml:3: training.adam_beta1 is 'hello', but must be a number | leave it out for its default, 0.9",
        ),
        (
            MINIMAL + "training: {max_length: -5}\n",
            "r.yaml:3: training.max_length is -5, but must be greater than or equal to 2 | "
            "leave it out for its default, 1024",
        ),
        (
            MINIMAL + "training: {gradient_checkpointing: 3}\n",
            "r.yaml:3: training.gradient_checkpointing is 3, but must be 'auto' or true or false | "
            "leave it out for its default, 'auto'",
        ),
        (
            MINIMAL + "method: qlora\nlora: {use_dora: true}\n",
            "r.yaml:4: lora.use_dora is true, but method is qlora | change one of them",
        ),
        (
            MINIMAL + "quantization: {bnb_4bit_quant_type: fp4}\n",
            "r.yaml:3: quantization has no effect with method: lora | use method: qlora, or remove the section",
        ),
        (
            MINIMAL + "preference: {beta: 0.2}\n",
            "r.yaml:3: preference has no effect | add objective: dpo, or remove it",
        ),
        (
            MINIMAL + "objective: dpo\npreference: {beta: 0}\n",
            "r.yaml:4: preference.beta is 0, but must be greater than 0 | "
            "leave it out for its default, 0.1",
        ),
        (
            MINIMAL + "objective: dpo\npreference: {loss: ipo, label_smoothing: 0.1}\n",
            "r.yaml:4: preference.label_smoothing has no effect with loss: ipo | loss: robust",
        ),
        (
            MINIMAL + "objective: orpo\npreference: {loss: ipo}\n",
            "r.yaml:4: preference.loss: ipo is not for objective: orpo | objective: dpo, or leave it out",
        ),
        (
            MINIMAL + "objective: dpo\npreference: {loss: simpo}\n",
            "r.yaml:4: preference.loss: simpo is not for objective: dpo | objective: simpo, or leave it out",
        ),
        (
            MINIMAL + "objective: simpo\npreference: {loss: sigmoid}\n",
            "r.yaml:4: preference.loss: sigmoid is not for objective: simpo | objective: dpo, or leave it out",
        ),
        (
            MINIMAL + "objective: cpo\npreference: {loss: hinge, label_smoothing: 0.1}\n",
            "r.yaml:4: preference.label_smoothing has no effect with loss: hinge | loss: sigmoid",
        ),
        (
            MINIMAL + "objective: orpo\npreference: {gamma: 0.5}\n",
            "r.yaml:4: preference.gamma has no effect with loss: odds_ratio | leave it out",
        ),
        (
            MINIMAL + "objective: dpo\npreference: {desirable_weight: 2}\n",
            "r.yaml:4: preference.desirable_weight has no effect with loss: sigmoid | leave it out",
        ),
        (
            MINIMAL + "objective: kto\npreference: {sft_weight: 0.1}\n",
            "r.yaml:4: preference.sft_weight has no effect with loss: kto | leave it out",
        ),
        (
            MINIMAL + "objective: kto\npreference: {loss: ipo}\n",
            "r.yaml:4: preference.loss: ipo is not for objective: kto | objective: dpo, or leave it out",
        ),
        (
            "model: {name_or_path: base}\nobjective: kto\ndata: {path: x, format: preference}\n",
            "r.yaml:3: data.format: preference is for objective: dpo | add objective: dpo",
        ),
        (
            "model: {name_or_path: base}\nobjective: dpo\ndata: {path: x, format: unpaired}\n",
            "r.yaml:3: data.format: unpaired is for objective: kto | add objective: kto",
        ),
        (
            "model: {name_or_path: base}\ndata: {path: x, format: unpaired}\n",
            "r.yaml:2: data.format: unpaired is for objective: kto | add objective: kto",
        ),
        (
            MINIMAL + "objective: simpo\npreference: {beta: 0}\n",
            "r.yaml:4: preference.beta is 0, but must be greater than 0 | "
            "leave it out for its default, 2.0",
        ),
        (
            MINIMAL + "objective: simpo\npreference: 3\n",
            "r.yaml:4: preference is 3, but must be a section of keys | "
            "lora schema --markdown describes every key",
        ),
        (
            MINIMAL + "objective: dpo\ntrainer: sft\n",
            "r.yaml:4: trainer: SFTTrainer does not compare answers | trainer: auto",
        ),
        (
            MINIMAL + "objective: dpo\ntask: sequence_classification\n",
            "r.yaml:3: objective: dpo is for task: causal_lm, not sequence_classification | leave it out",
        ),
        (
            MINIMAL + "objective: sft\ntask: sequence_classification\n",
            "r.yaml:3: objective: sft is for task: causal_lm, not sequence_classification | leave it out",
        ),
        (
            MINIMAL + "objective: dpo\ntraining: {packing: dataset}\n",
            "r.yaml:4: training.packing: dataset is not for objective: dpo | packing: auto or step or false",
        ),
        (
            MINIMAL + "objective: dpo\ntraining: {label_smoothing_factor: 0.1}\n",
            "r.yaml:4: training.label_smoothing_factor is not for objective: dpo | leave it out",
        ),
        (
            MINIMAL + "objective: dpo\ntraining: {loss_type: dft}\n",
            "r.yaml:4: training.loss_type is not for objective: dpo | leave it out",
        ),
        (
            "model: {name_or_path: base}\nobjective: dpo\n"
            "data: {path: rows.jsonl, on_long_row: truncate}\n",
            "r.yaml:3: data.on_long_row: truncate is not for objective: dpo | on_long_row: drop or error",
        ),
        (
            "model: {name_or_path: base}\nobjective: dpo\n"
            "data: {path: rows.jsonl, streaming: true}\ntraining: {max_steps: 3}\n",
            "r.yaml:3: data.streaming: how likely each answer is at the start is computed before the "
            "first step | leave it out, or take objective: orpo",
        ),
        (
            "model: {name_or_path: base}\ndata: {path: rows.jsonl, format: preference}\n",
            "r.yaml:2: data.format: preference is for objective: dpo | add objective: dpo",
        ),
        (
            MINIMAL + "trainer: trainer\ntraining: {packing: true}\n",
            "r.yaml:4: training.packing: packing the whole data set works only with trainer: sft | packing: step",
        ),
        (
            MINIMAL + "training: {eval_strategy: epoch}\n",
            "r.yaml:3: training.eval_strategy needs evaluation data | set data.eval_fraction, data.eval_path or data.eval_split",
        ),
        (
            MINIMAL + "training: {lr_scheduler_type: cosin}\n",
            "r.yaml:3: training.lr_scheduler_type: cosin is not a valid SchedulerType | did you mean cosine?",
        ),
        (
            MINIMAL + "training: {optim: adamw_touch}\n",
            "r.yaml:3: training.optim: adamw_touch is not a valid OptimizerNames | did you mean adamw_torch?",
        ),
        (
            MINIMAL + "training: {report_to: wandbx}\n",
            "r.yaml:3: training.report_to: there is no wandbx | did you mean wandb?",
        ),
        (
            MINIMAL + "training: {bf16: true, fp16: true}\n",
            "r.yaml:3: training: At most one of fp16 and bf16 can be True, but not both | "
            "change or remove training.bf16 or training.fp16",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_the_fix(
    tmp_path: Path, text: str, said: str
) -> None:
    assert refusal(tmp_path, text) == said


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL + "lora: {r: 0}\ntraining:\n  bf16: maybe\n  foo: 1\n")
    assert said.splitlines()[0] == "3 problems in r.yaml"
    assert [line.split(":")[1] for line in said.splitlines()[1:4]] == ["3", "5", "6"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.learning_rat=1",
            "--set training.learning_rat=1: training.learning_rat is not a known key | did you",
        ),
        ("extends=x.yaml", "--set extends=x.yaml: extends belongs in the file"),
        (
            "data.columns={prompt: a, completion: a}",
            "--set data.columns={prompt: a, completion: a}: data.columns gives a two",
        ),
        ("data.columns={zzz: a}", "--set data.columns={zzz: a}: data.columns.zzz"),
        ("lora.r=" + "9" * 5000, "--set lora.r=999"),
        ("foo", "--set foo: expected section.key=value | --set training.learning_rate=1e-4"),
        ("=1", "--set =1: expected section.key=value"),
        ("lora.r=[", "--set lora.r=[: "),
        ("lora.r=x", "--set lora.r=x: lora.r is 'x', but must be a whole number"),
        ("lora=3", "--set lora=3: lora is 3, but must be a section of keys"),
    ],
)
def test_overrides_are_checked_like_the_file(tmp_path: Path, override: str, said: str) -> None:
    assert refusal(tmp_path, MINIMAL, override).startswith(said)


@pytest.mark.parametrize(("value", "parsed"), [("1e-4", 1e-4), ("3", 3.0), ("0.5", 0.5)])
def test_override_values_are_yaml(tmp_path: Path, value: str, parsed: float) -> None:
    assert math.isclose(
        load(tmp_path, MINIMAL, f"training.learning_rate={value}").training.learning_rate, parsed
    )


def test_one_setting_under_its_two_names_is_a_contradiction(tmp_path: Path) -> None:
    said = refusal(
        tmp_path,
        MINIMAL + "training: {gradient_checkpointing: true, activation_checkpointing: false}\n",
    )
    known = (
        "activation_checkpointing" in keys.Training.model_fields
    )  # older transformers have one name only
    problem = (
        "and training.gradient_checkpointing are one setting" if known else "is not a known key"
    )
    assert said.startswith(f"r.yaml:3: training.activation_checkpointing {problem}")


def test_an_empty_file_with_an_override_is_answered(tmp_path: Path) -> None:
    assert "model is missing" in refusal(tmp_path, "", "method=lora")


def test_extends_in_a_circle_or_into_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: r.yaml\n")
    assert "extends goes in a circle" in refusal(tmp_path, "extends: a.yaml\n")
    assert refusal(tmp_path, "extends: b.yaml\n").startswith(
        "r.yaml:1: b.yaml, which it extends, does not exist"
    )


def test_shipped_recipes_load_and_are_accepted_upstream() -> None:
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(recipes) >= 8
    for path in recipes:
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), path
        device = hardware.parse_gpu("T4") if "t4" in path.stem else None
        configurations.try_configurations(load_recipe(path), device)


def test_a_byte_order_mark_and_a_home_folder_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load(
        tmp_path, "\ufeffmodel: {name_or_path: ~/base}\ndata: {path: [~/a.jsonl, b~/c.jsonl]}\n"
    )
    assert loaded.model.name_or_path == f"{tmp_path}/base"
    assert loaded.data.path == [f"{tmp_path}/a.jsonl", "b~/c.jsonl"]
    assert (
        loaded.add_place("data.path: it is empty") == f"{tmp_path}/r.yaml:2: data.path: it is empty"
    )
    assert loaded.add_place("out of memory: 3 MB") == "out of memory: 3 MB"


def test_more_problems_than_six_lines_hold_are_counted(tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL + "lora: {r: 0, a: 1, b: 1, c: 1, d: 1, e: 1}\n")
    lines = said.splitlines()
    assert lines[0] == "6 problems in r.yaml"
    assert len(lines) == 5
    assert lines[4].startswith("  … and 3 more")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("lora: {use_rslora: yes}", "write lora.use_rslora: true"),
        ("lora: {use_rslora: 'False'}", "write lora.use_rslora: false"),
        ("training: {learning_rate: '1e-4'}", "write training.learning_rate: 0.0001"),
        ("lora: {r: '4'}", "write lora.r: 4"),
        ("lora: {r: many}", "leave it out for its default, 16"),
    ],
)
def test_a_value_that_is_meant_but_written_as_text_is_told(
    text: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{name_or_path: x}}\ndata: {{path: y}}\n{text}\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert caught.value.hint == hint


def test_a_set_without_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    with pytest.raises(UsageError, match=r"--set data.path=: the value is missing") as caught:
        load_recipe(path, ["data.path="])
    assert caught.value.hint == "--set data.path=null for none"


def test_a_length_of_sequences_is_for_packing_by_step(tmp_path: Path) -> None:
    base = "model: {name_or_path: x}\ndata: {path: y}\n"
    for other in ("packing: false", "packing: dataset", "padding_free: true"):
        text = f"{base}training: {{packed_length: 64, {other}}}\n"
        with pytest.raises(UsageError, match="packed_length has an effect with training.packing: "):
            load(tmp_path, text)
    assert load(tmp_path, f"{base}training: {{packed_length: 64}}\n").training.packed_length == 64
