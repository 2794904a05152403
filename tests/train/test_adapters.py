"""The whole of PEFT's LoRA from a recipe: each row trains 3 steps on a tiny model and leaves
exactly these tensors.

What was trained is then put on a fresh base by PEFT alone, and merged, and both must be the
function training left. Hermetic: tiny models made here, CPU. Alone: pytest
tests/train/test_adapters.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    Qwen2Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.doctor import oracle
from lora_cli.merge.merge import merge
from lora_cli.models import (
    adapter_folder,
    four_bit,
    init_weights,
    patterns,
    peft_matching,
    token_rows,
)
from lora_cli.models.base import Base
from lora_cli.models.probes import (
    FAR,
    TRAINED,
    TRAINED_KL,
    compare_logits,
    compute_logits,
    make_probes,
)
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.plan import hardware
from lora_cli.recipe import keys, load
from lora_cli.train import run, trial
from lora_cli.train.progress import Watch

H, MLP, KV, VOCAB = 256, 512, 128, 512
ATTENTION = {"q_proj": (H, H), "k_proj": (H, KV), "v_proj": (H, KV), "o_proj": (H, H)}
LINEARS = ATTENTION | {"gate_proj": (H, MLP), "up_proj": (H, MLP), "down_proj": (MLP, H)}
Shapes = dict[str, tuple[int, ...]]


def pairs(
    names: dict[str, tuple[int, int]],
    r: int = 4,
    layers: tuple[int, ...] = (0, 1),
    dora: bool = False,
) -> Shapes:
    """lora_A (r, in) and lora_B (out, r) of each module in each layer of the tiny Llama."""
    shapes: Shapes = {}
    for layer in layers:
        for name, (inputs, outputs) in names.items():
            module = f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            shapes |= {
                f"{module}.lora_A.weight": (r, inputs),
                f"{module}.lora_B.weight": (outputs, r),
            }
            if dora:
                shapes[f"{module}.lora_magnitude_vector"] = (outputs,)
    return shapes


def only(*names: str) -> dict[str, tuple[int, int]]:
    return {name: LINEARS[name] for name in names}


QV = pairs(only("q_proj", "v_proj"))
EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": (4, VOCAB),
    "model.embed_tokens.lora_embedding_B": (H, 4),
}
HEAD = {"lm_head.lora_A.weight": (4, H), "lm_head.lora_B.weight": (VOCAB, 4)}
ROWS = "token_adapter.trainable_tokens_delta"


class Row(NamedTuple):
    """A recipe's lora section (with r: 4), further text, and the tensors its adapter must hold."""

    lora: str
    tensors: Shapes
    more: str = ""
    base: str = "tiny"
    limit: float = 1e-3
    """Largest |Δlogit| between training's end and the merged model, in float32."""


CASES: dict[str, Row] = {
    "all-linear": Row("", pairs(LINEARS)),
    "list": Row("target_modules: [q_proj, v_proj]", QV),
    "regex": Row(r"target_modules: '.*\.layers\.1\..*_proj'", pairs(LINEARS, layers=(1,))),
    "exclude list": Row("exclude_modules: [mlp.down_proj, layers.0.mlp.up_proj]", {
        **pairs(ATTENTION | only("gate_proj")), **pairs(only("up_proj"), layers=(1,))}),
    "exclude regex": Row(r"exclude_modules: '.*\.mlp\..*'", pairs(ATTENTION)),
    "embeddings": Row("target_modules: [embed_tokens, q_proj]", {**EMBEDDING, **pairs(only("q_proj"))}),
    "embeddings dora": Row("target_modules: [embed_tokens]",
                           {**EMBEDDING, "model.embed_tokens.lora_magnitude_vector": (H,)}, "method: dora"),
    "head": Row("target_modules: [lm_head, q_proj]", {**HEAD, **pairs(only("q_proj"))}),
    "layers": Row("target_modules: [q_proj, v_proj]\n  layers_to_transform: 1",
                  pairs(only("q_proj", "v_proj"), layers=(1,))),
    "layers pattern": Row("target_modules: [q_proj, v_proj]\n  layers_to_transform: [0]\n  layers_pattern: layers",
                          pairs(only("q_proj", "v_proj"), layers=(0,))),
    "rank pattern": Row(r"target_modules: [q_proj, v_proj]" "\n" r"  rank_pattern: {'.*\.0\..*q_proj': 7, v_proj: 2}", {
        **pairs(only("q_proj"), 7, (0,)), **pairs(only("q_proj"), 4, (1,)), **pairs(only("v_proj"), 2)}),
    "alpha pattern": Row("target_modules: [q_proj, v_proj]\n  alpha_pattern: {q_proj: 3, v_proj: 40}", QV),
    "bias all": Row("target_modules: [q_proj]\n  bias: all", {
        **pairs(only("q_proj")), **{f"model.layers.{i}.self_attn.{name}": (size,) for i in (0, 1) for name, size in
        (("q_proj.base_layer.bias", H), ("k_proj.bias", KV), ("v_proj.bias", KV))}}, base="qwen"),
    "bias lora_only": Row("target_modules: [q_proj]\n  bias: lora_only", {
        **pairs(only("q_proj")), **{f"model.layers.{i}.self_attn.q_proj.base_layer.bias": (H,) for i in (0, 1)}},
        base="qwen"),
    "lora_bias": Row("target_modules: [q_proj]\n  lora_bias: true", {
        **pairs(only("q_proj")), **{f"model.layers.{i}.self_attn.q_proj.lora_B.bias": (H,) for i in (0, 1)}},
        base="qwen"),
    "modules_to_save": Row("target_modules: [q_proj]\n  modules_to_save: [lm_head, model.norm]", {
        **pairs(only("q_proj")), "lm_head.weight": (VOCAB, H), "model.norm.weight": (H,)}),
    "modules_to_save on tied": Row("target_modules: [q_proj]\n  modules_to_save: [embed_tokens]", {
        **pairs(only("q_proj")), "model.embed_tokens.weight": (VOCAB, H)}, base="tied"),
    "token rows": Row("target_modules: [q_proj]\n  trainable_token_indices: [5, 300]", {
        **pairs(only("q_proj")), f"model.embed_tokens.{ROWS}": (2, H)}),
    "token rows by module": Row(
        "target_modules: [q_proj]\n  trainable_token_indices: {embed_tokens: [5], lm_head: [5, 6, 7]}", {
        **pairs(only("q_proj")), f"model.embed_tokens.{ROWS}": (1, H), f"lm_head.{ROWS}": (3, H)}),
    "token rows on tied": Row("target_modules: [q_proj]\n  trainable_token_indices: [5, 300]", {
        **pairs(only("q_proj")), f"model.embed_tokens.{ROWS}": (2, H)}, base="tied"),
    "experts": Row("target_modules: [q_proj]\n  target_parameters: [mlp.experts.gate_up_proj, experts.down_proj]", {
        **pairs({"q_proj": (64, 64)}),
        **{f"model.layers.{i}.mlp.experts.base_layer.lora_A.weight": (16, 64) for i in (0, 1)},
        **{f"model.layers.{i}.mlp.experts.base_layer.lora_B.weight": (96, 16) for i in (0, 1)},
        **{f"model.layers.{i}.mlp.experts.lora_A.weight": (16, 48) for i in (0, 1)},
        **{f"model.layers.{i}.mlp.experts.lora_B.weight": (64, 16) for i in (0, 1)}}, base="moe"),
    "ranks of experts": Row(
        "target_modules: []\n  target_parameters: [experts.down_proj]\n  rank_pattern: {mlp.experts.down_proj: 2}", {
        **{f"model.layers.{i}.mlp.experts.lora_A.weight": (8, 48) for i in (0, 1)},
        **{f"model.layers.{i}.mlp.experts.lora_B.weight": (64, 8) for i in (0, 1)}}, base="moe"),
    "rslora": Row("target_modules: [q_proj, v_proj]\n  use_rslora: true", QV),
    "dora": Row("", pairs(LINEARS, dora=True), "method: dora"),
    "random start": Row("target_modules: [q_proj, v_proj]\n  init_lora_weights: false", QV),
    "gaussian": Row("target_modules: [q_proj, v_proj]\n  init_lora_weights: gaussian", QV),
    "orthogonal": Row("target_modules: [q_proj, v_proj]\n  init_lora_weights: orthogonal", QV),
    "mica": Row("target_modules: [q_proj, v_proj]\n  init_lora_weights: mica", QV),
    "pissa": Row("target_modules: [q_proj, v_proj]\n  init_lora_weights: pissa", pairs(only("q_proj", "v_proj"), 8)),
    "pissa_niter": Row("init_lora_weights: pissa_niter_4", pairs(LINEARS, 8)),
    "pissa dora": Row("init_lora_weights: pissa", pairs(LINEARS, 8, dora=True), "method: dora"),
    "pissa and more": Row(
        "target_modules: [q_proj, v_proj, embed_tokens]\n  init_lora_weights: pissa\n  modules_to_save: [lm_head]\n"
        "  use_rslora: true\n  rank_pattern: {v_proj: 2}\n  alpha_pattern: {q_proj: 5}", {
        **pairs(only("q_proj"), 8), **pairs(only("v_proj"), 4), "lm_head.weight": (VOCAB, H),
        "model.embed_tokens.lora_embedding_A": (8, VOCAB), "model.embed_tokens.lora_embedding_B": (H, 8)}),
    "olora": Row("init_lora_weights: olora", pairs(LINEARS, 8)),
    "corda": Row("init_lora_weights: corda", pairs(LINEARS, 8)),
    "corda kpm": Row("init_lora_weights: corda\n  corda_config: {corda_method: kpm}", pairs(LINEARS, 8)),
    "lora_ga": Row("init_lora_weights: lora_ga", pairs(LINEARS, 8)),
    "lora_ga dora": Row("init_lora_weights: lora_ga\n  lora_ga_config: {direction: ArBr}", pairs(LINEARS, 8, dora=True),
                        "method: dora"),
    "eva": Row("init_lora_weights: eva\n  eva_config: {rho: 1.0}", pairs(LINEARS)),
    "eva qlora": Row("init_lora_weights: eva\n  eva_config: {rho: 1.0}", pairs(LINEARS), "method: qlora"),
    "loftq": Row("init_lora_weights: loftq", pairs(LINEARS), "method: qlora"),
    "loftq dora": Row("init_lora_weights: loftq", pairs(LINEARS, dora=True), "method: qdora"),
    "velora": Row("target_modules: [q_proj, v_proj]\n  velora_config: {num_groups: 32}", {
        **QV, **{f"model.layers.{i}.self_attn.{name}_proj.lora_velora_embed": (8,) for i in (0, 1) for name in "qv"}}),
    "loraplus": Row("", pairs(LINEARS), "training: {loraplus_lr_ratio: 16, weight_decay: 0.1}"),
    "added tokens": Row("target_modules: [q_proj]", {
        **pairs(only("q_proj")), f"model.embed_tokens.{ROWS}": (3, H), f"lm_head.{ROWS}": (3, H)},
        "model: {add_tokens: [lighthouse, '<tool>'], add_special_tokens: ['<|mark|>']}"),
    "added tokens on tied": Row("target_modules: [q_proj]", {
        **pairs(only("q_proj")), f"model.embed_tokens.{ROWS}": (2, H)}, "model: {add_tokens: [lighthouse, '<tool>']}",
        base="tied"),
    "added tokens, embeddings whole": Row("target_modules: [q_proj]\n  modules_to_save: [embed_tokens]", {
        **pairs(only("q_proj")), "model.embed_tokens.weight": (VOCAB + 1, H), f"lm_head.{ROWS}": (1, H)},
        "model: {add_tokens: [lighthouse]}"),
    "added tokens, all whole, tied": Row("target_modules: [q_proj]\n  modules_to_save: [embed_tokens, lm_head]", {
        **pairs(only("q_proj")), "model.embed_tokens.weight": (VOCAB + 1, H), "lm_head.weight": (VOCAB + 1, H)},
        "model: {add_tokens: [lighthouse]}", base="tied"),
    "added tokens on qlora": Row("", {
        **pairs(LINEARS), f"model.embed_tokens.{ROWS}": (1, H), f"lm_head.{ROWS}": (1, H)},
        "method: qlora\nmodel: {add_tokens: [lighthouse]}"),
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny Llama, and random models of other kinds with its tokenizer, each made once."""
    made: dict[str, Path] = {"tiny": tiny / "model"}
    common: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {"hidden_size": H, "intermediate_size": MLP, "num_key_value_heads": 2}
    small = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_key_value_heads": 4,
    }
    configs = {
        "qwen": lambda: Qwen2Config(**common, **llama),
        "tied": lambda: AutoConfig.from_pretrained(tiny / "model", tie_word_embeddings=True),
        "moe": lambda: Qwen3MoeConfig(
            **common, **small, head_dim=16, num_experts=4, num_experts_per_tok=2
        ),
        "bfloat16": lambda: AutoConfig.from_pretrained(tiny / "model"),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256
        ),
        "conv": lambda: RecurrentGemmaConfig(
            **common,
            hidden_size=64,
            intermediate_size=48,
            attention_window_size=32,
            head_dim=16,
            lru_width=64,
        ),
    }

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            kind = torch.bfloat16 if name == "bfloat16" else torch.float32
            network = AutoModelForCausalLM.from_config(configs[name](), dtype=kind)
            for parameter in network.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)  # biases start at zero
            folder = tmp_path_factory.mktemp("bases") / name
            network.save_pretrained(folder)
            for file in tiny.glob("model/*token*"):
                shutil.copy(file, folder)
            shutil.copy(tiny / "model" / "chat_template.jinja", folder)
            made[name] = folder
        return made[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_holds_exactly_these_tensors(
    write_recipe, bases, tmp_path: Path, name: str
) -> None:
    row = CASES[name]
    path = write_recipe(f"lora:\n  r: 4\n  {row.lora}\n{row.more}\n")
    overrides = [f"model.name_or_path={bases(row.base)}", "training.learning_rate=1e-2"]
    adapter = run.train(load.load_recipe(path, overrides))
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {
        key.removeprefix("base_model.model."): tuple(tensor.shape)
        for key, tensor in tensors.items()
    } == row.tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    trained = load_file(adapter / TRAINED)["logits"]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["inference_mode"]) == (True, True)

    info = adapter_folder.read_adapter(adapter)
    tokenizer = load_tokenizer(str(adapter))
    probes = make_probes(tokenizer)

    def last(network: torch.nn.Module) -> torch.Tensor:
        return torch.stack([rows[-1] for rows in compute_logits(network, probes)])

    base = info.load_base()
    if "added tokens" in name:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    start = last(base)
    assert (
        start - trained
    ).abs().max() > 0.01  # the adapter does something, or nothing below would be tested
    reloaded = PeftModel.from_pretrained(base, str(adapter))  # PEFT alone, on a fresh base
    torch.testing.assert_close(last(reloaded), trained, rtol=0, atol=row.limit)
    merge(adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(last(merged), trained, rtol=0, atol=row.limit)


WRONG: dict[str, tuple[str, str, str, str]] = {
    "one of several": ("target_modules: [q_proj, v_prj]", "tiny",
                       "lora.target_modules: no module of {base} is called v_prj", "did you mean v_proj?"),
    "regex": ("target_modules: 'q_proj'", "tiny",
              "lora.target_modules: no module of {base} matches 'q_proj'", "lora.target_modules: [q_proj]"),
    "the shorthand": ("target_modules: All-Linear", "tiny",
                      "lora.target_modules: no module of {base} matches 'All-Linear'", "did you mean all-linear?"),
    "part of a name": ("target_modules: '.*q_pro'", "tiny",
                       "lora.target_modules: no module of {base} matches '.*q_pro'",
                       "an expression must match the whole name"),
    "left out by layers": ("target_modules: [q_proj, embed_tokens]\n  layers_to_transform: [0]", "tiny",
                           "lora.target_modules: embed_tokens is left out again by layers_to_transform",
                           "remove it from one of them"),
    "left out by exclude": ("target_modules: [q_proj, v_proj]\n  exclude_modules: [v_proj]", "tiny",
                            "lora.target_modules: v_proj is left out again by exclude_modules",
                            "remove it from one of them"),
    "left out by modules_to_save": (
        "target_modules: [q_proj, lm_head]\n  modules_to_save: [lm_head]", "tiny",
        "lora.target_modules: lm_head is left out again by modules_to_save", "remove it from one of them"),
    "nothing left": ("target_modules: all-linear\n  exclude_modules: '.*'", "tiny",
                     "lora.target_modules: nothing is left to adapt",
                     "lora.target_modules: all-linear"),
    "no weight": ("target_modules: [mlp, q_proj]", "tiny",
                  "lora.target_modules: PEFT cannot adapt model.layers.0.mlp, a LlamaMLP (2 such modules)",
                  "leave it out of target_modules"),
    "no bias": ("bias: all", "tiny", "lora.bias is all, but there is no bias to train", "bias: none"),
    "no bias among the targets": ("target_modules: [o_proj]\n  bias: lora_only", "qwen",
                                  "lora.bias is lora_only, but there is no bias to train", "bias: none"),
    "one dimension": ("target_parameters: [norm.weight]\n  target_modules: [q_proj]", "tiny",
                      "lora.target_parameters: model.norm.weight has one dimension only", "leave it out"),
    "experts and dropout": (
        "lora_dropout: 0.1", "moe",
        "lora.lora_dropout: there is no dropout for parameters such as model.layers.0.mlp.experts.gate_up_proj",
        "lora_dropout: 0, or name target_modules"),
    "experts and eva": (
        "target_parameters: [experts.down_proj]\n  target_modules: [q_proj]\n  init_lora_weights: eva", "moe",
        "lora.init_lora_weights: eva is not defined for parameters such as model.layers.0.mlp.experts.down_proj",
        "init_lora_weights: true"),
    "eva and rows": ("init_lora_weights: eva\n  trainable_token_indices: [5]", "tiny",
                     "lora.init_lora_weights: eva does not go with trained rows of embeddings",
                     "init_lora_weights: true"),
    "pissa's rank": (
        "init_lora_weights: pissa\n  rank_pattern: {k_proj: 300}", "tiny",
        "lora.rank_pattern.k_proj: pissa allows a rank of at most 128 for model.layers.0.self_attn.k_proj, not 300",
        "lower it"),
    "lora_ga's rank by pattern": (
        "init_lora_weights: lora_ga\n  rank_pattern: {k_proj: 65, q_proj: 100}", "tiny",
        "lora.rank_pattern.k_proj: lora_ga allows a rank of at most 64 for model.layers.0.self_attn.k_proj, not 65",
        "lower it"),
    "an odd rank": ("init_lora_weights: orthogonal\n  r: 5", "tiny",
                    "lora.r: orthogonal needs an even rank, model.layers.0.self_attn.q_proj has 5", "6"),
    "whole and rows": (
        "modules_to_save: [embed_tokens]\n  trainable_token_indices: [5]", "tiny",
        "lora.modules_to_save: model.embed_tokens is trained whole, and its rows by themselves",
        "take it out of modules_to_save, or give every module with this weight there: model.embed_tokens"),
    "two names for one": ("trainable_token_indices: {embed_tokens: [1], model.embed_tokens: [2]}", "tiny",
                          "lora.trainable_token_indices: model.embed_tokens is named twice",
                          "give all its rows under one name"),
    "rows of no embedding": ("trainable_token_indices: {q_proj: [1]}", "tiny",
                             "lora.trainable_token_indices: no embedding or head is called q_proj", "leave it out"),
    "other rows of a tied head": (
        "trainable_token_indices: {embed_tokens: [5], lm_head: [6]}", "tied",
        "lora.trainable_token_indices: lm_head shares its weight (model.embed_tokens and lm_head)",
        "give the rows of embed_tokens"),
    "a tied parameter": (
        "target_parameters: [lm_head.weight]\n  target_modules: [q_proj]", "tied",
        "lora.target_parameters: lm_head shares its weight (model.embed_tokens and lm_head)",
        "use modules_to_save or trainable_token_indices, or leave them out"),
    "no regex": ("target_modules: '*q_proj'", "tiny",
                 "lora.target_modules: '*q_proj' is not a regular expression: nothing to repeat at position 3",
                 "lists take names"),
    "exclude": ("exclude_modules: [mlp.donw_proj]", "tiny",
                "lora.exclude_modules: no module of {base} is called mlp.donw_proj", "did you mean mlp.down_proj?"),
    "modules_to_save": ("modules_to_save: [lm_haed]", "tiny",
                        "lora.modules_to_save: no module of {base} is called lm_haed", "did you mean lm_head?"),
    "more than meant": ("modules_to_save: [norm]", "tiny",
                        "lora.modules_to_save: PEFT takes norm for model.layers.0.input_layernorm too",
                        "give the full name: model.norm"),
    "one layer of several": ("target_modules: [q_proj]\n  layers_to_transform: [0, 7]", "tiny",
                             "lora.layers_to_transform: no target_modules in layer 7", "the layers are 0 to 1"),
    "layers pattern": (
        "target_modules: [q_proj]\n  layers_to_transform: [0]\n  layers_pattern: [layers, h]", "tiny",
        "lora.layers_pattern: no target_modules under h", "one of layers"),
    "full name and layers": (
        "target_modules: [q_proj, model.layers.1.self_attn.v_proj]\n  layers_to_transform: [0]", "tiny",
        "lora.target_modules: model.layers.1.self_attn.v_proj is a full name: layers_to_transform does not apply to it",
        "give the end of the name"),
    "rank pattern": ("rank_pattern: {q_proj: 2, w_proj: 8}", "tiny",
                     "lora.rank_pattern.w_proj: no adapted module matches", "did you mean v_proj?"),
    "alpha pattern": ("target_modules: [q_proj]\n  alpha_pattern: {v_proj: 8}", "tiny",
                      "lora.alpha_pattern.v_proj: no adapted module matches", "did you mean q_proj?"),
    "two patterns for one": (
        "alpha_pattern: {q_proj: 16, layers.0.self_attn.q_proj: 2}", "tiny",
        "lora.alpha_pattern: q_proj and layers.0.self_attn.q_proj both match model.layers.0.self_attn.q_proj",
        "give each module one key"),
    "parameter": ("target_parameters: [experts.down_proj, experts.up_proj]\n  target_modules: []", "moe",
                  "lora.target_parameters: no parameter is called experts.up_proj",
                  "did you mean experts.gate_up_proj?"),
    "parameter and layers": (
        "target_parameters: [experts.down_proj]\n  target_modules: [q_proj]\n  layers_to_transform: 0", "moe",
        "lora.layers_to_transform does not apply to target_parameters",
        "name each parameter in full, and leave it out"),
    "parameter and pissa": (
        "target_parameters: [experts.down_proj]\n  target_modules: [q_proj]\n  init_lora_weights: pissa", "moe",
        "lora.init_lora_weights: pissa is not defined for parameters such as model.layers.0.mlp.experts.down_proj",
        "init_lora_weights: true"),
    "row": ("trainable_token_indices: [5, 512]", "tiny",
            "lora.trainable_token_indices: model.embed_tokens has no row 512", "its 512 rows count from 0"),
    "row twice": ("trainable_token_indices: {lm_head: [5, 5]}", "tiny",
                  "lora.trainable_token_indices: lm_head has a row twice", "give each row once"),
    "rows of nothing": ("trainable_token_indices: {embed_token: [5]}", "tiny",
                        "lora.trainable_token_indices: no embedding or head is called embed_token",
                        "did you mean embed_tokens?"),
    "rows of a target": ("target_modules: [embed_tokens]\n  trainable_token_indices: [5]", "tiny",
                         "lora.target_modules: model.embed_tokens trains rows of its own already",
                         "leave it out, or use modules_to_save for both"),
    "lora_bias": ("target_modules: [q_proj]\n  lora_bias: true", "tiny",
                  "lora.lora_bias: model.layers.0.self_attn.q_proj has no bias, so the adapter's could not be merged",
                  "lora_bias: false"),
    "tied embeddings": (
        "target_modules: [embed_tokens]", "tied",
        "lora.target_modules: model.embed_tokens shares its weight (model.embed_tokens and lm_head)",
        "use modules_to_save or trainable_token_indices, or leave them out"),
    "tied head": ("target_modules: '.*lm_head'", "tied",
                  "lora.target_modules: lm_head shares its weight (model.embed_tokens and lm_head)",
                  "use modules_to_save or trainable_token_indices, or leave them out"),
    "rows of a tied head": (
        "trainable_token_indices: {lm_head: [5]}", "tied",
        "lora.trainable_token_indices: lm_head shares its weight (model.embed_tokens and lm_head)",
        "give the rows of embed_tokens"),
    "convolution": ("target_modules: [conv_1d]\n  r: 64", "conv",
                    "lora.target_modules: PEFT cannot adapt model.layers.0.temporal_block.conv_1d, a convolution with "
                    "groups=64 (2 such modules)", "leave it out of target_modules"),
    "lora_ga's rank": ("init_lora_weights: lora_ga\n  r: 65", "tiny",
                       "lora.r: lora_ga allows a rank of at most 64 for model.layers.0.self_attn.k_proj, not 65",
                       "lower it"),
    "eva's rank": ("init_lora_weights: eva\n  r: 4000\n  target_modules: [q_proj]", "tiny",
                   "lora.init_lora_weights: eva needs 8000 trained tokens, more than the first 256 rows have",
                   "lower r"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_matches_nothing_or_cannot_be_merged_is_refused(
    write_recipe, bases, tmp_path: Path, name: str
) -> None:
    lora, base, message, hint = WRONG[name]
    path = write_recipe(f"lora:\n  {lora}\n")
    with pytest.raises(UsageError) as caught:
        run.train(load.load_recipe(path, [f"model.name_or_path={bases(base)}"]))
    where, _, said = caught.value.message.partition(": ")
    assert (said, caught.value.hint) == (message.format(base=bases(base)), hint)
    line = int(where.rpartition(":")[2])
    assert (
        path.read_text()
        .splitlines()[line - 1]
        .strip()
        .startswith(message.split(".")[1].split(":")[0].split(" ")[0])
    )


def test_every_problem_is_said_at_once(write_recipe) -> None:
    lora = "target_modules: [q_prj]\n  exclude_modules: [nothing]\n  modules_to_save: [haed]"
    with pytest.raises(UsageError) as caught:
        run.train(load.load_recipe(write_recipe(f"lora:\n  {lora}\n")))
    lines = [caught.value.message, *caught.value.details]
    assert lines[0].startswith("3 problems with lora on ")
    hints = ["did you mean q_proj?", "leave lora.exclude_modules out", "leave it out"]
    assert all(line.endswith(f"({hint})") for line, hint in zip(lines[1:], hints, strict=True)), (
        lines
    )


ENDLESS = "((([a-z_.0-9]+)*)*)*X"


@pytest.mark.parametrize(
    ("field", "lora"),
    [
        ("target_modules", f"target_modules: '{ENDLESS}'"),
        ("exclude_modules", f"exclude_modules: '{ENDLESS}'"),
        ("rank_pattern", f"rank_pattern: {{q_proj: 2, '{ENDLESS}': 8}}"),
        ("alpha_pattern", f"alpha_pattern: {{'{ENDLESS}': 8}}"),
        ("modules_to_save", f"modules_to_save: ['{ENDLESS}']"),
        (
            "layers_pattern",
            f"target_modules: [q_proj]\n  layers_to_transform: 0\n  layers_pattern: '{ENDLESS}'",
        ),
    ],
)
def test_a_regular_expression_that_never_ends_is_stopped(
    write_recipe, monkeypatch: pytest.MonkeyPatch, field: str, lora: str
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(UsageError, match=f"lora.{field}: '.*' takes over 0.5 s to match 32 names"):
        run.train(load.load_recipe(write_recipe(f"lora:\n  {lora}\n")))


@pytest.mark.parametrize("base", ["tiny", "qwen", "tied", "moe", "conv"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.0\..*proj", "exclude_modules": ["k_proj"]},
        {
            "target_modules": "all-linear",
            "modules_to_save": ["lm_head"],
            "exclude_modules": r".*v_proj",
        },
    ],
    ids=str,
)
def test_what_is_checked_is_what_peft_adapts(bases, base: str, settings: dict[str, Any]) -> None:
    network = AutoModelForCausalLM.from_pretrained(bases(base))
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    names = [name for name, _ in network.named_modules()]
    resolved = peft_matching.resolve_targets(network, config)
    expected = (
        peft_matching.find_targeted_modules(resolved, names),
        peft_matching.find_targeted_parameters(resolved, network),
    )
    if not expected[0]:
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(network, config)
        return
    adapted = get_peft_model(network, config)
    assert (adapted.targeted_module_names, sorted(adapted.targeted_parameter_names)) == (
        expected[0],
        sorted(expected[1]),
    )
    assert expected[0]


def test_a_token_the_tokenizer_has_is_refused(write_recipe) -> None:
    path = write_recipe("model: {add_tokens: ['<|user|>']}\n")
    with pytest.raises(
        UsageError, match=r"model.add_tokens: the tokenizer has '<\|user\|>' already"
    ):
        run.train(load.load_recipe(path))


def test_embeddings_never_shrink(tiny: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny / "model")
    token_rows.grow_embeddings(network, 100)
    assert network.get_input_embeddings().num_embeddings == VOCAB
    token_rows.grow_embeddings(network, VOCAB + 3)
    assert network.get_output_embeddings().weight.shape[0] == VOCAB + 3


def test_a_head_that_the_files_hold_apart_is_not_tied_as_tokens_are_added(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "apart"
    shutil.copytree(tiny / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base = Base(str(folder))
    assert base.parted == ("lm_head.weight",)
    before, network = AutoModelForCausalLM.from_pretrained(tiny / "model"), base.load()
    token_rows.grow_embeddings(network, VOCAB + 1)
    ids = torch.arange(9)[None]
    assert torch.equal(network(ids).logits[..., :VOCAB], before(ids).logits)
    for each in (network, base.build_empty()):  # so that the rows of both are trained
        given = LoraConfig()
        token_rows.train_rows(each, given, [VOCAB])
        assert given.trainable_token_indices == {"embed_tokens": [VOCAB], "lm_head": [VOCAB]}
        assert each.config.tie_word_embeddings is False


def test_added_tokens_are_read_trained_and_exported(
    write_recipe, tiny: Path, tmp_path: Path, lora
) -> None:
    rows = [{"prompt": "call the tool", "completion": "<tool> lighthouse <|mark|>"}] * 64
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe(
        f"data: {{path: {tmp_path / 'rows.jsonl'}}}\ntraining: {{max_steps: 200, learning_rate: 3e-3}}\n"
        "model: {add_tokens: [lighthouse, '<tool>'], add_special_tokens: ['<|mark|>']}\n"
    )
    adapter = run.train(load.load_recipe(path))
    tokenizer = load_tokenizer(str(adapter))
    assert (
        tokenizer("<tool> lighthouse <|mark|>", add_special_tokens=False)["input_ids"][0]
        == VOCAB + 1
    )
    assert tokenizer.decode([VOCAB, VOCAB + 2], skip_special_tokens=True).strip() == "lighthouse"
    done = lora("export-gguf", adapter, "-o", tmp_path / "gguf", "-q", "f16")
    assert done.returncode == 0, done.stderr
    answers = lora(
        "generate",
        adapter,
        done.stdout.strip(),
        "-p",
        "call the tool",
        "--json",
        "--max-new-tokens",
        "8",
    )
    said = [json.loads(line)["answer"] for line in answers.stdout.splitlines()]
    assert len(said) == 2
    assert all("<tool>" in answer and "lighthouse" in answer for answer in said), said


@pytest.mark.parametrize(
    ("lora", "base"),
    [
        ("init_lora_weights: pissa_niter_4", "tiny"),
        ("init_lora_weights: lora_ga", "tiny"),
        ("init_lora_weights: corda", "tiny"),
        ("init_lora_weights: eva", "tiny"),
        (
            "target_modules: all-linear",
            "moe",
        ),  # PEFT adds ranks for the experts to the configuration
        ("autocast_adapter_dtype: false", "bfloat16"),
        ("init_lora_weights: eva", "bfloat16"),
    ],
)
def test_a_resumed_run_is_the_same_run(
    write_recipe, bases, tmp_path: Path, monkeypatch, lora: str, base: str
) -> None:
    text = f"lora: {{r: 4, {lora}}}\ntraining: {{save_strategy: steps, save_steps: 1}}\n"
    model_override = [f"model.name_or_path={bases(base)}"]
    whole = run.train(
        load.load_recipe(write_recipe(f"{text}output_dir: {tmp_path / 'a'}\n"), model_override)
    )
    path = write_recipe(f"{text}output_dir: {tmp_path / 'b'}\n")
    ended = Watch.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(load.load_recipe(path, model_override))
    monkeypatch.undo()
    torch.manual_seed(99)  # nothing may hang on what the process drew before
    resumed = run.train(load.load_recipe(path, model_override), resume=True)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # autocast's adapters keep the base's type: bfloat16 only where the processor computes in it
    native = base == "bfloat16" and hardware.detect_device().bf16
    kind = torch.bfloat16 if lora.startswith("autocast") and native else torch.float32
    assert {tensor.dtype for tensor in one.values()} == {kind}


def test_eva_gets_batches_it_can_use(write_recipe) -> None:
    rows = [{"input_ids": [1] * 6, "labels": [-100] * 4 + [1] * 2}] * 40

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    for needed, sizes in ((10, [8] * 5), (50, [25])):
        batches = init_weights._batches(rows, collate, needed)
        assert [len(batch["labels"]) for batch in batches] == sizes
    path = write_recipe("lora: {init_lora_weights: eva}\ndata: {max_rows: 5}\n")
    with pytest.raises(UsageError, match="eva needs at least 8 rows, there are 5"):
        run.train(load.load_recipe(path))


def test_eva_counts_the_largest_rank(write_recipe) -> None:
    lora = (
        "lora: {r: 2, init_lora_weights: eva, rank_pattern: {q_proj: 200}, eva_config: {rho: 20.0}}"
    )
    with pytest.raises(UsageError, match="eva needs 4000 trained tokens"):
        run.train(load.load_recipe(write_recipe(f"{lora}\n")))


def test_conv1d_is_not_stored_in_4_bits(write_recipe, bases) -> None:
    path = write_recipe("method: qlora\n")
    with pytest.raises(LoraError, match=r"stores its weights transposed \(Conv1D\)"):
        run.train(load.load_recipe(path, [f"model.name_or_path={bases('gpt2')}"]))


def test_one_wrong_row_of_the_vocabulary_is_noticed() -> None:
    torch.manual_seed(0)
    before = [torch.randn(4, 512)]
    after = [before[0].clone()]
    after[0][:, 7] += 0.3
    difference = compare_logits(before, after)
    assert difference.mean_kl < TRAINED_KL[torch.float32]  # which would not
    assert difference.max_abs > 10 * FAR * difference.spread


def test_an_optimiser_that_is_not_there_is_an_error_of_ours(write_recipe) -> None:
    path = write_recipe("training: {loraplus_lr_ratio: 4, optim: galore_adamw}\n")
    with pytest.raises(LoraError, match=r"training\.optim was rejected .*galore_torch"):
        run.train(load.load_recipe(path))


def test_loftq_lies_nearer_the_base_than_plain_4bit_storage(
    write_recipe, tmp_path: Path, tiny: Path
) -> None:
    """In every weight: of what storage loses, its adapter is the best approximation of rank 32, of
    128 or 256."""
    original = load_file(tiny / "model" / "model.safetensors")
    errors: dict[str, dict[str, float]] = {}
    for init in ("true", "loftq"):
        lora = f"lora: {{r: 32, lora_alpha: 64, init_lora_weights: {init}}}"
        path = write_recipe(
            f"method: qlora\n{lora}\noutput_dir: {tmp_path / init}\ntraining: {{learning_rate: 1e-30}}\n"
        )
        merge(run.train(load.load_recipe(path)), tmp_path / f"{init}-merged")
        merged = load_file(tmp_path / f"{init}-merged" / "model.safetensors")
        errors[init] = {
            name: (merged[name] - original[name]).norm().item()
            for name in original
            if "_proj" in name
        }
    assert len(errors["true"]) == 14
    shares = {name: error / errors["true"][name] for name, error in errors["loftq"].items()}
    # the 32 largest of 256 directions hold an eighth of the squares, or more
    assert all(share < (1 - 32 / 256) ** 0.5 for share in shares.values()), shares


def test_loraplus_gives_b_its_own_rate(write_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(trial, "try_training", lambda recipe: None)  # it begins, too
    began = Watch.on_train_begin

    def look(self, args, state, control, **kwargs):
        names = {id(parameter): name for name, parameter in kwargs["model"].named_parameters()}
        for group in kwargs["optimizer"].param_groups:
            seen.extend(
                (names[id(p)], group["initial_lr"], group["weight_decay"]) for p in group["params"]
            )
        began(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watch, "on_train_begin", look)
    lora = "lora: {target_modules: [embed_tokens, q_proj]}"
    run.train(
        load.load_recipe(
            write_recipe(f"{lora}\ntraining: {{loraplus_lr_ratio: 16, weight_decay: 0.1}}\n")
        )
    )
    rates = {name: (rate, decay) for name, rate, decay in seen}
    assert len(rates) == len(seen) == 6
    for name, (rate, decay) in rates.items():
        expected = 1e-6 if "embed" in name else 1.6e-2 if "lora_B" in name else 1e-3
        assert (rate, decay) == (pytest.approx(expected), 0.1), name


def test_4bit_rows_that_bitsandbytes_misreads_are_refused(
    bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = keys.Quantization(bnb_4bit_compute_dtype="float32").collect_values()
    config = BitsAndBytesConfig(load_in_4bit=True, **config)
    monkeypatch.setattr(four_bit, "misreads_rows", lambda length, *rest: length == 512)
    with pytest.raises(
        LoraError, match="reads 4-bit rows of 512 weights wrongly .* in 2 modules, the first "
    ) as caught:
        Base(str(bases("tiny"))).load(torch.float32, config)
    assert caught.value.hint.endswith("'quantization.llm_int8_skip_modules=[lm_head, down_proj]'")


def test_misread_rows_are_found_by_what_they_are(bases) -> None:
    """The reference says which lengths bitsandbytes misreads on this processor; `misreads` must say
    the same."""
    for length in (16, 32, 48, 62, 64, 80, 96, 128, 144, 192, 200, 208):
        torch.manual_seed(0)
        wrong = oracle.compare_nf4(torch.randn(8, length))["values"] > 0
        assert four_bit.misreads_rows(length) == wrong, length
