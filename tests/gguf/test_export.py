"""Export: an adapter alone runs in llama.cpp at its true strength; what is wrong is found before
and after converting.

Hermetic: the tiny model, adapters with B ≠ 0 made by PEFT, the managed converter. Alone:
pytest tests/gguf/test_export.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.gguf import adapter as export_adapter
from lora_cli.gguf import check, imatrix, parity, preflight, quantize, tools
from lora_cli.gguf.export import export
from lora_cli.gguf.modelfile import find_pieces, say_how, write_modelfile
from lora_cli.models import adapter_folder, attach, empty, names
from lora_cli.models.base import Base
from lora_cli.models.config import load_config
from lora_cli.models.tokenizer import set_chat_template
from lora_cli.recipe import DEFAULT_TASK
from tests import quantised

SCALED = {
    "lora_alpha": 8,
    "use_rslora": True,
    "alpha_pattern": {"q_proj": 1, "down_proj": 32},
    "rank_pattern": {"v_proj": 2},
}


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is published: its own SentencePiece file lies beside it."""
    return Path(shutil.copytree(tiny / "model", tmp_path_factory.mktemp("base") / "base"))


def make_adapter(base: Path, folder: Path, **options) -> Path:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(network, LoraConfig(**options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_alone_runs_at_its_true_strength(base: Path, tmp_path: Path, capfd) -> None:
    adapter = make_adapter(base, tmp_path / "scaled", **SCALED)
    files = export_adapter.export_adapter(adapter, ["f16"], tmp_path / "out", None, None)
    assert [file.name for file in files] == ["scaled-lora-f16.gguf"]
    said = capfd.readouterr().err
    effect = float(re.search(r"does to the base here: .* mean KL (\S+),", said)[1])
    kls = [float(kl) for kl in re.findall(r"base with adapter in llama.cpp: mean KL (\S+),", said)]
    assert len(kls) == 1
    assert (
        kls[0] <= 1e-3 * effect
    )  # at a strength that is p % off it would be some (p / 100)² of the effect, or more
    assert json.loads((tmp_path / "out" / "scaled-lora-f16.gguf.json").read_text())["type"] == "f16"


def test_the_scale_that_the_converter_would_write_is_noticed(
    base: Path, tmp_path: Path, monkeypatch
) -> None:
    adapter = make_adapter(base, tmp_path / "scaled", **SCALED)

    def as_it_is(given, folder: Path) -> None:
        shutil.copytree(given.folder, folder)

    monkeypatch.setattr(export_adapter, "_write_scaled", as_it_is)
    with pytest.raises(
        LoraError, match="scaled-lora-f16.gguf differs from the model it was made from"
    ):
        export_adapter.export_adapter(adapter, ["f16"], tmp_path / "out", None, None)
    assert not (tmp_path / "out").exists()


def test_a_plain_adapter_is_converted_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "plain", lora_alpha=16)
    export_adapter._write_scaled(adapter_folder.read_adapter(adapter), tmp_path / "scaled")
    given, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("scaled", "plain")
    )
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("options", "said", "hint"), [
    ({"use_dora": True}, "DoRA magnitudes", "lora convert "),
    ({"modules_to_save": ["lm_head"]}, "modules trained whole", "merge it instead"),
    ({"trainable_token_indices": [5]}, "embedding rows", "merge it instead"),
    ({"lora_bias": True}, "biases in the adapter", "merge it instead"),
    ({"kasa_config": {"beta": 1e-4}}, "takes out of the base's weights", "merge it instead"),
    ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}, "target_modules": ["q_proj"]},
     "blocks in A or B", "lora convert "),
    ({"alora_invocation_tokens": [5, 6]}, "tokens from which on alone it applies", "PEFT runs it"),
    ({"layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}, "layers of the base",
     "PEFT runs it"),
])  # fmt: skip
def test_what_llama_cpp_cannot_hold_is_refused_with_the_way_out(
    base: Path, tmp_path: Path, options: dict, said: str, hint: str
) -> None:
    with attach.quiet_peft():
        adapter = make_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(LoraError, match=said) as caught:
        export_adapter.export_adapter(adapter, ["f16"], tmp_path / "out", None, None)
    assert str(caught.value.hint).startswith(hint)
    assert not (tmp_path / "out").exists()


def test_an_adapter_has_no_k_quants(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an adapter cannot be written as Q4_K_M"):
        export_adapter.export_adapter(tmp_path, ["Q4_K_M"], None, None, None)


def damaged(base: Path, folder: Path, **changes) -> Path:
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_what_the_converter_would_refuse_or_get_wrong_is_said_before(
    base: Path, tmp_path: Path
) -> None:
    def said(folder: Path) -> str:
        with pytest.raises(LoraError) as caught:
            export(folder, ["f16"], None, None, None)
        assert not [
            path
            for path in folder.iterdir()
            if "gguf" in path.name or path.name.startswith(".lora")
        ]
        return caught.value.message

    few = damaged(base, tmp_path / "few", vocab_size=500)
    assert "has token 511 " in said(few)
    tied = damaged(base, tmp_path / "tied", tie_word_embeddings=True)
    assert "ties the head to the embeddings" in said(tied)
    bpe = damaged(base, tmp_path / "bpe")
    (bpe / "tokenizer.model").unlink()
    bytes_only = Tokenizer(
        models.BPE(
            vocab={c: n for n, c in enumerate([*ByteLevel.alphabet(), "<|end|>"])}, merges=[]
        )
    )
    bytes_only.pre_tokenizer = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>").save_pretrained(bpe)
    assert "llama.cpp does not know this tokenizer" in said(bpe)
    other = damaged(base, tmp_path / "other", architectures=["MadeUpForCausalLM"])
    assert "llama.cpp's converter does not know the architecture MadeUpForCausalLM" in said(other)


def test_a_disk_that_is_too_small_is_said_in_megabytes(
    base: Path, tmp_path: Path, monkeypatch
) -> None:
    config = load_config(str(base))
    parameters = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    free = 3 * 2**20
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    needed = int(1.02 * parameters * (16 + 32 + 32) / 8)
    with pytest.raises(
        LoraError,
        match=rf"about {(needed >> 20) + 1} MB in .*, {(needed - free >> 20) + 1} MB more than",
    ):
        preflight.check_disk(tmp_path, config, ["f16", "f32"], merged=torch.float32)
    preflight.check_disk(tmp_path, config, ["Q2_K"], merged=None)
    assert preflight.estimate_bits_per_weight("Q4_K_M") == 5.5


SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM2 |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("kind", "megabytes"), [("Q4_K_M", 105.5), ("q8_0", 144.8), ("f16", 270.9)]
)
def test_the_room_for_rows_that_no_block_divides_is_foreseen(kind: str, megabytes: float) -> None:
    """The sizes are those of SmolLM2-135M's files."""
    config = LlamaConfig(**SMOLLM2, tie_word_embeddings=True)
    network = empty.build_empty(config, DEFAULT_TASK)
    foreseen = preflight.estimate_bits(network, kind) / 8e6
    assert 0.98 * megabytes < foreseen < 1.15 * megabytes


def test_a_gguf_that_lost_something_is_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    source = parity.Source(network.config, tokenizer, network.num_parameters())
    reference = parity.make_reference(network, network.config, tokenizer, source)
    converter = tools.find_converter()
    # NaN, which the converter writes with exit 0
    weights = load_file(base / "model.safetensors")
    nan = Path(shutil.copytree(base, tmp_path / "nan"))
    save_file(
        {
            **weights,
            "lm_head.weight": weights["lm_head.weight"].index_fill(
                0, torch.tensor([7]), float("nan")
            ),
        },
        nan / "model.safetensors",
        metadata={"format": "pt"},
    )
    tools.convert(nan, tmp_path / "nan.gguf", "f16", converter)
    with pytest.raises(LoraError, match=r"cannot load .*nan.gguf"):
        parity.compare_gguf(tmp_path / "nan.gguf", "f16", reference)
    # another context length, end token and template
    other = damaged(base, tmp_path / "other", max_position_embeddings=64)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tools.convert(other, tmp_path / "other.gguf", "f16", converter)
    with pytest.raises(LoraError, match=r"its chat template is .*; its context length is 64, not"):
        parity.compare_gguf(tmp_path / "other.gguf", "f16", reference)


def test_ollama_gets_a_template_only_where_it_is_certain(base: Path, tmp_path: Path, capfd) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = find_pieces(tokenizer)
    assert found is not None
    assert found.go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>\n{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}<|assistant|>\n{{ .Content }}<|end|>{{ end }}{{ end '
        "}}<|assistant|>\n"
    )
    set_chat_template(tokenizer, "alpaca")
    alpaca = find_pieces(tokenizer)
    assert alpaca is not None
    assert alpaca.system is not None
    assert alpaca.system.startswith("Below is an instruction")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos_token", "loop.index ~ eos_token"
    )
    assert find_pieces(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert find_pieces(tokenizer) is None
    write_modelfile(tmp_path, [tmp_path / "x-f16.gguf", tmp_path / "x-q8_0.gguf"], base)
    modelfile = (tmp_path / "Modelfile").read_text()
    assert modelfile == (
        "# made by lora export-gguf\nFROM ./x-f16.gguf\n# FROM ./x-q8_0.gguf\n"
        f'TEMPLATE """{found.go()}"""\nPARAMETER stop "<|end|>"\n'
    )
    (tmp_path / "Modelfile").write_text("FROM mine\n")
    write_modelfile(tmp_path, [tmp_path / "x-f16.gguf"], base)
    assert (tmp_path / "Modelfile").read_text() == "FROM mine\n"
    assert "is not ours" in capfd.readouterr().err
    (tmp_path / "Modelfile").unlink()
    padded = damaged(base, tmp_path / "padded")
    settings = {"eos_token_id": [2, 700, -1]}  # rows without a token, and none at all
    (padded / "generation_config.json").write_text(json.dumps(settings))
    write_modelfile(tmp_path, [tmp_path / "x-f16.gguf", tmp_path / "x-q8_0.gguf"], padded)
    assert (tmp_path / "Modelfile").read_text() == modelfile


def test_how_to_run_it_names_what_a_server_cannot_load(base: Path, tmp_path: Path, capfd) -> None:
    cases = {
        "plain": {},
        "dora": {"use_dora": True},
        "scaled": SCALED,
        "wide": {"rank_pattern": {"q_proj": 33}},
        "bare": {"r": 8},
    }
    for name, options in cases.items():
        folder = make_adapter(base, tmp_path / name, **options)
        if name == "bare":  # of a tool that leaves out what is PEFT's default
            file = folder / "adapter_config.json"
            kept = {key: each for key, each in json.loads(file.read_text()).items() if key != "r"}
            file.write_text(json.dumps(kept))
        adapter = adapter_folder.read_adapter(folder)
        say_how([tmp_path / "x-f16.gguf"], None, adapter)
    said = capfd.readouterr().err
    assert f"llama-server -m {tmp_path / 'x-f16.gguf'}" in said
    for name, rank in (("plain", 8), ("wide", 64), ("bare", 8)):
        assert (
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules "
            f"{name}={tmp_path / name}" in said
        )
    assert f"vLLM and llama-server cannot load {tmp_path / 'dora'}: DoRA magnitudes; merge" in said
    assert f"lora convert {tmp_path / 'scaled'} OUT" in said
    assert f"lora convert {tmp_path / 'plain'} OUT" not in said


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("mine-Q4_K_M", "mine-q4_k_m"),
        ("My Run (2)-f16", "my-run-2--f16"),
        ("_Größe-f16", "gr-e-f16"),
        ("日本", "model"),
        (f"{'a' * 90}-f16", f"{'a' * 76}-f16"),
    ],
)
def test_ollama_is_given_a_name_that_it_takes(tmp_path: Path, capfd, stem: str, name: str) -> None:
    (tmp_path / "Modelfile").touch()
    say_how([tmp_path / f"{stem}.gguf"], None, None)
    assert f"ollama create {name} -f " in capfd.readouterr().err


def test_an_importance_matrix_weighs_what_the_model_is_for(
    base: Path, tiny: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((tiny / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    batches = list(imatrix.read_rows(str(rows), tokenizer))
    assert 20 <= len(batches) <= 40
    sums, num_tokens = imatrix.measure_inputs(network, batches)
    assert num_tokens == sum(map(len, batches))
    # what goes into the first attention and into the head, taken from transformers' own hidden
    # states
    first, last = torch.zeros(256), torch.zeros(256)
    for ids in batches:
        with torch.no_grad():
            states = network.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            first += network.model.layers[0].input_layernorm(states[0])[0].square().sum(0)
            last += states[-1][0].square().sum(0)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        torch.testing.assert_close(sums[name], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["lm_head"], last, rtol=1e-4, atol=1e-4)
    # llama.cpp reads it, and writes the types that need it, as it does from the same matrix in a
    # file
    export(base, ["Q2_K", "Q2_K_S"], tmp_path / "with", None, None, str(rows))
    assert (
        b"quantize.imatrix.entries_count" in (tmp_path / "with" / "base-Q2_K_S.gguf").read_bytes()
    )
    exact, matrix, converter = (
        tmp_path / "exact.gguf",
        tmp_path / "matrix.gguf",
        tools.find_converter(),
    )
    tools.convert(base, exact, "f32", converter)
    imatrix.make_imatrix(str(rows), base, exact, matrix, converter)
    quantize.quantize(exact, tmp_path / "given.gguf", "Q2_K", matrix)
    given, wanted = stored(tmp_path / "given.gguf"), stored(tmp_path / "with" / "base-Q2_K.gguf")
    assert given.keys() == wanted.keys()
    assert all(
        given[name].data.tobytes() == tensor.data.tobytes() for name, tensor in wanted.items()
    )


def test_the_quantiser_keeps_nearer_what_the_matrix_says_matters(
    base: Path, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    """Every fourth column, ten thousand times as much as the others, which lie in the same
    blocks."""
    network = Base(str(base)).load(torch.float32)
    inputs = {
        name: each.in_features
        for name, each in network.named_modules()
        if isinstance(each, torch.nn.Linear)
    }
    heavy = {
        name: 1 + 9999 * (torch.arange(size) % 4 == 0).float() for name, size in inputs.items()
    }
    monkeypatch.setattr(
        imatrix, "measure_inputs", lambda network, batches: (heavy, sum(map(len, batches)))
    )
    exact, matrix, converter = (
        tmp_path / "exact.gguf",
        tmp_path / "matrix.gguf",
        tools.find_converter(),
    )
    tools.convert(base, exact, "f32", converter)
    imatrix.make_imatrix(str(tiny / "eval.jsonl"), base, exact, matrix, converter)
    wanted, errors = stored(exact), []
    for file, weights in ((tmp_path / "with.gguf", matrix), (tmp_path / "without.gguf", None)):
        quantize.quantize(exact, file, "Q2_K", weights)
        errors.append({
            name: float((dequantize(tensor.data, tensor.tensor_type) - wanted[name].data)[:, ::4].var())
            for name, tensor in stored(file).items()
            if name.startswith("blk.") and tensor.tensor_type in (GGMLQuantizationType.Q2_K, GGMLQuantizationType.Q3_K)
        })  # fmt: skip
    assert len(errors[0]) == len(errors[1]) >= 10
    assert all(errors[0][name] < errors[1][name] for name in errors[1]), errors


def stored(file: Path) -> dict[str, ReaderTensor]:
    """The tensors of a GGUF file."""
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def test_a_base_that_cannot_be_measured_keeps_nothing_back(
    base: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    adapter = make_adapter(base, tmp_path / "plain")

    def refuse(*given) -> None:
        raise LoraError("the base cannot be read", "")

    monkeypatch.setattr(check.Checker, "_measure_base", refuse)
    (file,) = export(adapter, ["q8_0"], tmp_path / "out", None, None)
    assert file.is_file()
    said = capfd.readouterr().err
    assert "what these types cost the base" in said
    assert "was not measured: the base cannot be read" in said


def test_a_quantised_folder_is_refused_before_the_converter_is_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "run_command", None)  # nothing may be converted
    kinds = {
        "bitsandbytes NF4": {"quant_method": "bitsandbytes", "load_in_4bit": True, **quantised.NF4},
        "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "GPTQ, 4 bits": {"quant_method": "gptq", "bits": 4},
        "AWQ, 4 bits": {"quant_method": "awq", "bits": 4},
        "compressed-tensors": {"quant_method": "compressed-tensors"},
    }
    for number, (words, settings) in enumerate(kinds.items()):
        folder = quantised.save_configured(tiny / "model", tmp_path / str(number), settings)
        adapter = make_adapter(tiny / "model", tmp_path / f"adapter-{number}")
        match = rf"already quantised \({words}\), which is not converted to GGUF"
        with pytest.raises(LoraError, match=match):
            export(folder, ["f16"], None, None, None)
        with pytest.raises(LoraError, match=match):
            export_adapter.export_adapter(adapter, ["f16"], None, str(folder), None)
        if "NF4" not in words:
            with pytest.raises(LoraError, match="an adapter cannot be merged into it"):
                export(adapter, ["f16"], None, str(folder), None)


def test_an_fp8_model_is_converted_to_the_values_that_transformers_dequantises(
    tiny: Path, tmp_path: Path
) -> None:
    folder = quantised.save_fp8(tiny / "model", tmp_path / "base", (32, 32))
    made = export(folder, ["f32"], tmp_path / "out", None, None)
    tensor = next(
        each for each in GGUFReader(made[0]).tensors if each.name == "blk.1.ffn_up.weight"
    )
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = network.get_submodule("model.layers.1.mlp.up_proj").weight
    given = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(given, wanted.detach())


@pytest.mark.slow
def test_the_base_s_own_cost_may_be_left_out(
    base: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    adapter = make_adapter(base, tmp_path / "unmerged")  # as a folder on the way is called
    asked: list[list[str]] = []
    monkeypatch.setattr(
        preflight, "check_disk", lambda folder, config, types, merged: asked.append([*types])
    )
    for base_cost in (True, False):
        export(adapter, ["q8_0"], tmp_path / f"{base_cost}", None, None, base_cost=base_cost)
        said = capfd.readouterr().err
        assert "in llama.cpp: mean KL" in said
        assert ("the base as q8_0" in said) == base_cost
    assert asked == [["q8_0", "f32", "f32", "q8_0"], ["q8_0", "f32"]], "room on the disk"


@pytest.mark.parametrize("name", ["merged", "./merged", "runs/d/merged", "/gone/merged"])
def test_a_folder_that_is_not_there_is_told_from_one_that_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))} is not a folder here") as caught:
        export(path, ["f16"], tmp_path / "out", None, None)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"lora merge ADAPTER {path} makes one")


def test_owner_and_name_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, where it has a model of that name, are said to be none of its adapters."""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(names, "classify", lambda name: (asked.append(name), "hub")[1])
    with pytest.raises(UsageError, match="^runs/merged is not a folder here"):
        export(Path("runs/merged"), ["f16"], tmp_path / "out", None, None)
    assert asked == ["runs/merged"]
