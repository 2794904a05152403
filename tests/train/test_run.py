"""What training must keep to: 4-bit gradients exact whatever came before, adapters in float32, runs
that repeat.

Hermetic: the tiny model and its data, CPU. Alone: pytest tests/train/test_run.py
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from lora_cli.common.errors import LoraError
from lora_cli.data.load import load_rows
from lora_cli.merge.merge import merge
from lora_cli.models import attach
from lora_cli.models.base import Base
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.plan import show
from lora_cli.recipe import keys, load
from lora_cli.speed.fused_layer import FusedLinear
from lora_cli.train import objectives
from lora_cli.train import run as train
from lora_cli.train.progress import Watch
from tests import architectures
from tests.units import STEADY_ADAM, assert_same_training

METHODS = ["lora", "qlora", "dora", "qdora"]


def adapter_bytes(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_an_evaluation_in_the_middle_changes_nothing(
    write_recipe, tiny: Path, tmp_path: Path, method: str
) -> None:
    # bitsandbytes repacks 4-bit weights at the first forward in eval mode; training after it then
    # went wrong silently
    evaluated = f"data: {{eval_path: {tiny / 'eval.jsonl'}}}\ntraining: {{eval_strategy: steps, eval_steps: 2}}\n"
    plain = train.train(
        load.load_recipe(write_recipe(f"method: {method}\noutput_dir: {tmp_path / 'a'}\n"))
    )
    between = train.train(
        load.load_recipe(
            write_recipe(f"method: {method}\noutput_dir: {tmp_path / 'b'}\n{evaluated}")
        )
    )
    assert "eval_loss" in (tmp_path / "b" / "metrics.jsonl").read_text()
    assert adapter_bytes(plain) == adapter_bytes(between)


def test_4bit_gradients_after_an_evaluation_are_those_of_the_dequantised_weights(
    tiny: Path,
) -> None:
    quantization = keys.Quantization(bnb_4bit_compute_dtype="float32").collect_values()
    config = BitsAndBytesConfig(load_in_4bit=True, **quantization)
    ids = torch.arange(40).reshape(1, -1) + 10

    def gradient(network: torch.nn.Module) -> torch.Tensor:
        network.eval()
        with torch.no_grad():
            network(input_ids=ids)
        network.train()
        hidden = network.get_input_embeddings()(ids).detach().requires_grad_()
        network(inputs_embeds=hidden, labels=ids).loss.backward()
        return hidden.grad

    quantised = gradient(Base(str(tiny / "model")).load(torch.float32, config))
    plain = gradient(Base(str(tiny / "model")).load(torch.float32, config).dequantize())
    torch.testing.assert_close(quantised, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainer", ["sft", "trainer"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_float32_adapters_and_leaves_a_complete_folder(
    write_recipe, tmp_path: Path, method: str, trainer: str
) -> None:
    adapter = train.train(load.load_recipe(write_recipe(f"method: {method}\ntrainer: {trainer}\n")))
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any("lora_magnitude_vector" in name for name in tensors) == (method in ("dora", "qdora"))
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    for name in (
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "lora_record.json",
    ):
        assert (adapter / name).is_file(), name
    run = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (run["status"], run["recipe"]["method"], run["results"]["steps"]) == (
        "finished",
        method,
        3,
    )
    assert run["data"]["rows"] == 64
    resolved = load.load_recipe(tmp_path / "run" / "recipe.yaml")
    assert resolved.to_data() == run["recipe"]
    assert "auto" not in (resolved.model.dtype, resolved.training.optim)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == 3
    assert not list(tmp_path.glob("**/*.tmp"))


def test_rows_of_embeddings_train_under_autocast(write_recipe, tmp_path: Path, capsys) -> None:
    """PEFT's helper that leaves out casts fails on layers that cast nothing."""
    given = "model: {dtype: bfloat16, add_tokens: [lighthouse]}\ntraining: {bf16: true}\n"
    path = write_recipe(given)
    show.show_plan(load.load_recipe(path), None, None, False, False)
    assert "of them trained" in capsys.readouterr().out
    tensors = load_file(train.train(load.load_recipe(path)) / "adapter_model.safetensors")
    assert sum("trainable_tokens_delta" in name for name in tensors) == 2


def test_both_trainers_compute_the_same_loss(write_recipe, tmp_path: Path) -> None:
    losses = {}
    for trainer in ("sft", "trainer"):
        train.train(
            load.load_recipe(
                write_recipe(f"trainer: {trainer}\noutput_dir: {tmp_path / trainer}\n")
            )
        )
        losses[trainer] = json.loads((tmp_path / trainer / "record.json").read_text())["results"][
            "train_loss"
        ]
    assert losses["sft"] == pytest.approx(losses["trainer"], rel=1e-4)


def test_the_same_recipe_and_seed_give_the_same_bytes(write_recipe, tmp_path: Path) -> None:
    runs = {
        name: adapter_bytes(
            train.train(
                load.load_recipe(
                    write_recipe(
                        f"lora: {{lora_dropout: 0.1}}\noutput_dir: {tmp_path / name}\ntraining: {{seed: {seed}}}\n"
                    )
                )
            )
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    }
    assert runs["a"] == runs["b"] != runs["c"]


@pytest.mark.parametrize(
    "more", ["", "data: {streaming: true, shuffle_buffer: 16, max_rows: 10}\n"], ids=["", "stream"]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    write_recipe, tmp_path: Path, monkeypatch, capsys, more: str
) -> None:
    steps = (
        f"training: {{max_steps: 6, save_strategy: steps, save_steps: 2, logging_steps: 1}}\n{more}"
    )
    whole = train.train(load.load_recipe(write_recipe(f"{steps}output_dir: {tmp_path / 'a'}\n")))
    path = write_recipe(f"{steps}output_dir: {tmp_path / 'b'}\n")
    ended = Watch.on_step_end

    def interrupted(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
        ended(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(load.load_recipe(path))
    monkeypatch.undo()
    with pytest.raises(LoraError, match=r"already holds a run \(interrupted\)"):
        train.train(load.load_recipe(path))
    with pytest.raises(LoraError, match="the recipe differs from the run"):
        train.train(load.load_recipe(path, ["training.learning_rate=2e-3"]), resume=True)
    (tmp_path / "b" / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = train.train(load.load_recipe(path), resume=True)
    assert "checkpoint-4 skipped: optimizer.pt is missing\n" in capsys.readouterr().err
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    steps_logged = [
        json.loads(line)["step"]
        for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps_logged == [1, 2, 3, 4, 5, 6, 6]


def test_the_recipe_s_own_end_token_is_trained_and_saved(write_recipe, tmp_path: Path) -> None:
    path = write_recipe("training: {eos_token: '<|user|>'}\n")
    adapter = train.train(load.load_recipe(path))
    tokenizer = load_tokenizer(str(adapter))
    assert tokenizer.eos_token == "<|user|>"
    rows = load_rows(load.load_recipe(path), tokenizer)[0].rows
    assert all(labels[-1] == tokenizer.eos_token_id for labels in rows["labels"])
    merge(adapter, tmp_path / "out")
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert ends[0] == tokenizer.eos_token_id
    with pytest.raises(
        LoraError, match=r"training.eos_token: the tokenizer of .* has no token '<\|usr\|>'"
    ) as caught:
        train.train(
            load.load_recipe(
                path, ["training.eos_token=<|usr|>", f"output_dir={tmp_path / 'other'}"]
            )
        )
    assert caught.value.hint == "did you mean <|user|>?"


def test_no_step_at_all_is_an_error(write_recipe) -> None:
    path = write_recipe(
        "training: {dataloader_drop_last: true, per_device_train_batch_size: 128, max_steps: -1}\n"
    )
    with pytest.raises(LoraError, match="there is no full batch to train on"):
        train.train(load.load_recipe(path))


def test_a_run_that_failed_before_saving_does_not_keep_its_folder(
    write_recipe, tmp_path: Path
) -> None:
    path = write_recipe("")
    with pytest.raises(LoraError, match=r"data.path: .*nope.jsonl does not exist"):
        train.train(load.load_recipe(path, [f"data.path={tmp_path / 'nope.jsonl'}"]))
    assert train.train(load.load_recipe(path)).is_dir()
    with pytest.raises(LoraError, match=r"already holds a run \(finished\)"):
        train.train(load.load_recipe(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {attn_implementation: zzz}", "attn_implementation: there is no zzz"),
        ("trainer: sft\nlora: {target_modules: '.*(q_proj|m_head)'}", "`lm_head`"),
        ("data: {split: 'train[:0]'}", "split train[:0] of "),
        ("data: {split: 'train[bad'}", "data.split: "),
    ],
)
def test_what_upstream_refuses_is_an_error_of_ours(write_recipe, text: str, said: str) -> None:
    with pytest.raises(LoraError) as caught:
        train.train(load.load_recipe(write_recipe(f"{text}\n")))
    assert said in caught.value.message
    assert caught.value.hint


def test_what_never_had_a_gradient_is_named(
    write_recipe, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As where a model reads a module's weight itself, past the adapter on it (Jamba's dt_proj)."""
    linear = FusedLinear.forward

    def past_the_adapter(self, x, *args, **kwargs):
        return self.base_layer(x) if self.out_features == 512 else linear(self, x, *args, **kwargs)

    monkeypatch.setattr(FusedLinear, "forward", past_the_adapter)
    train.train(load.load_recipe(write_recipe("")))
    assert (
        "warning: 8 trained tensors never had a gradient and are as they started, such as "
        "base_model.model.model.layers.0.mlp.gate_proj.lora_A.default.weight; leave"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_compiled_one_by_one_train_the_same(
    write_recipe, tmp_path: Path, checkpointing: bool, capsys
) -> None:
    """With dynamo's own backend, which needs no compiler."""
    found = {}
    for backend in ("null", "eager"):
        path = write_recipe(
            f"output_dir: {tmp_path / backend}\ntraining: {{max_steps: 2, {STEADY_ADAM}, "
            f"torch_compile_backend: {backend}, "
            f"gradient_checkpointing: {checkpointing}}}\n"
        )
        found[backend] = load_file(
            train.train(load.load_recipe(path)) / "adapter_model.safetensors"
        )
        assert ("2 layers are compiled" in capsys.readouterr().err) == (backend == "eager")
    assert_same_training(found["eager"], found["null"])
    assert any(tensor.any() for name, tensor in found["eager"].items() if "lora_B" in name)


@pytest.mark.parametrize("trainer", ["sft", "trainer"])
def test_the_evaluation_loss_is_the_mean_over_tokens(
    write_recipe, tiny: Path, tmp_path: Path, trainer: str
) -> None:
    """Whatever the batch size, and equal to a loop of our own over the same rows."""
    found = {}
    for size in (1, 5, 16):
        path = write_recipe(
            f"trainer: {trainer}\noutput_dir: {tmp_path / str(size)}\n"
            f"data: {{eval_path: {tiny / 'eval.jsonl'}, max_rows: 37}}\n"
            f"training: {{eval_strategy: steps, eval_steps: 3, per_device_eval_batch_size: {size}}}\n"
        )
        adapter = train.train(load.load_recipe(path))
        lines = [
            json.loads(line)
            for line in (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()
        ]
        found[size] = next(line for line in lines if "eval_loss" in line)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    adapted = attach.load_adapter(base, adapter).eval()
    rows = load_rows(load.load_recipe(path), load_tokenizer(str(adapter)))[1].rows
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = adapted(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, labels, ignore_index=-100, reduction="none"
                )[labels != -100]
            )
    expected = torch.cat(losses).mean().item()
    for line in found.values():
        assert line["eval_loss"] == pytest.approx(expected, rel=1e-4)
        assert line["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)
    assert len({len(loss) for loss in losses}) > 1  # else it would be the mean of the rows' means


ATTENTIONS = ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("joined", ["packing", "padding_free"])
def test_joined_documents_do_not_see_each_other(
    write_recipe, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys, joined: str, attention: str
) -> None:
    """The logits of a joined batch, as SFTTrainer builds it, are those of its rows one by one."""
    batches = []
    step = objectives.WatchedSFTTrainer.compute_loss

    def keep(self, network, inputs, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        batches.append(
            {name: value.cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        )
        return step(self, network, inputs, *args, **kwargs)

    monkeypatch.setattr(objectives.WatchedSFTTrainer, "compute_loss", keep)
    text = f"model: {{attn_implementation: {attention}}}\ntraining: {{{joined}: true, max_steps: 1, max_length: 128}}\n"
    recipe = load.load_recipe(write_recipe(text))
    train.train(recipe)
    assert ("  packed: 64 rows in " in capsys.readouterr().err) == (joined == "packing")
    dtype, device = (torch.float32, "cpu") if attention == "sdpa" else (torch.bfloat16, "cuda")
    base = AutoModelForCausalLM.from_pretrained(
        tiny / "model", attn_implementation=attention, dtype=dtype
    )
    base = base.eval().to(device)
    rows = {
        tuple(row)
        for row in load_rows(recipe, load_tokenizer(str(tiny / "model")))[0].rows["input_ids"]
    }
    batch = {name: tensor.to(device) for name, tensor in batches[-1].items()}
    assert "attention_mask" not in batch  # with one, position_ids would not keep them apart
    with torch.no_grad():
        together = base(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        contaminated = base(input_ids=batch["input_ids"], use_cache=False).logits
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 3
    near = 1e-4 if attention == "sdpa" else 5e-2
    for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]]):
        ids = batch["input_ids"][:, start:end]
        if tuple(ids[0].tolist()) in rows:  # the last may be padding
            with torch.no_grad():
                alone = base(input_ids=ids).logits
            torch.testing.assert_close(together[:, start:end], alone, rtol=near, atol=near)
            assert start == 0 or (contaminated[:, start:end] - alone).abs().max() > 10 * near


def test_a_mix_is_trained_recorded_and_resolved_again(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\noutput_dir: {tmp_path / 'run'}\n"
        f"data:\n  mix:\n    - {{path: {tiny / 'train.jsonl'}, max_rows: 20, weight: 2}}\n"
        f"    - {{path: {tiny / 'eval.jsonl'}, max_rows: 10}}\n"
        "training: {max_steps: 2, save_strategy: 'no'}\n"
    )
    train.train(load.load_recipe(path))
    run = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (run["data"]["read"], run["data"]["rows"]) == (30, 50)
    assert load.load_recipe(tmp_path / "run" / "recipe.yaml").to_data() == run["recipe"]


def test_a_stream_trains_on_the_rows_in_their_order_again_and_again(
    write_recipe, tmp_path: Path
) -> None:
    steps = "training: {max_steps: 7, per_device_train_batch_size: 4, save_strategy: 'no'"
    kept = write_recipe(f"{steps}, train_sampling_strategy: sequential}}\ndata: {{max_rows: 12}}\n")
    whole = train.train(load.load_recipe(kept))
    (tmp_path / "run").rename(tmp_path / "kept")
    streamed = write_recipe(
        f"{steps}}}\ndata: {{max_rows: 12, streaming: true, shuffle_buffer: 1}}\n"
    )
    again = train.train(load.load_recipe(streamed))
    assert adapter_bytes(again) == adapter_bytes(tmp_path / "kept" / whole.name)
    run = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (run["data"]["streamed"], run["data"]["rows"]) == (True, 12)


def test_streams_are_mixed_by_weight(tiny: Path, tmp_path: Path) -> None:
    for name in "ab":
        rows = [{"prompt": f"{name}{number}", "completion": name} for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mix.yaml"
    path.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\ntraining: {{max_steps: 2}}\n"
        f"data:\n  streaming: true\n  mix:\n    - {{path: {tmp_path / 'a.jsonl'}, weight: 3}}\n"
        f"    - {{path: {tmp_path / 'b.jsonl'}}}\n"
    )
    tokenizer = load_tokenizer(str(tiny / "model"))
    drawn = []
    for _ in range(2):
        stream = load_rows(load.load_recipe(path), tokenizer)[0].stream
        assert stream is not None
        texts = [
            tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in stream.take(400)
        ]
        drawn.append([text.rstrip()[-1] for text in texts])
    assert drawn[0] == drawn[1]
    assert 0.7 < drawn[0].count("a") / 400 < 0.8
    assert drawn[0][:200] != sorted(drawn[0][:200])


def test_a_bad_row_far_down_a_stream_stops_the_run_there(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    good = (tiny / "train.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "rows.jsonl").write_text(good * 11_000 + '{"prompt": "x"}\n')
    text = f"data: {{path: {tmp_path / 'rows.jsonl'}, streaming: true, shuffle_buffer: 12000, max_rows: 20000}}\n"
    with pytest.raises(LoraError, match=r"rows.jsonl:11001: there is no completion"):
        train.train(load.load_recipe(write_recipe(text)))


def test_other_rows_are_not_resumed_with(
    write_recipe, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    rows = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:40]))
    path = write_recipe(
        f"data: {{path: {tmp_path / 'rows.jsonl'}}}\ntraining: {{save_strategy: steps, save_steps: 1}}\n"
    )

    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(load.load_recipe(path))
    monkeypatch.undo()
    (tmp_path / "rows.jsonl").write_text("".join(rows[1:41]))
    written = [tmp_path / "run" / name for name in ("record.json", "recipe.yaml")]
    before = [file.read_bytes() for file in written]
    with pytest.raises(LoraError, match="began with other rows"):
        train.train(load.load_recipe(path, ["training.save_steps=2"]), resume=True)
    assert [file.read_bytes() for file in written] == before
    (tmp_path / "rows.jsonl").write_text("".join(rows[:40]))
    train.train(load.load_recipe(path), resume=True)
    run = json.loads((tmp_path / "run" / "record.json").read_text())
    assert len(run["resumed"]) == 1
    assert run["started"] <= run["resumed"][0]


@pytest.mark.parametrize(
    ("family", "head"),
    [("mixtral", "trained_tokens"), ("mixtral", "stock"), ("qwen3_vl_moe", "trained_tokens")],
)
def test_experts_are_balanced_once_in_a_step(
    write_recipe, tiny: Path, tmp_path: Path, family: str, head: str
) -> None:
    """However many passes a step has: its loss is the same but for the parts' own balance."""
    base = architectures.make_folder(family, tmp_path / "base", tiny / "model")
    ways = {
        "one": "packing: false, per_device_train_batch_size: 8, gradient_accumulation_steps: 1",
        "batches": "packing: false, per_device_train_batch_size: 2, gradient_accumulation_steps: 4",
        "sequences": "packing: step, packed_length: 64, per_device_train_batch_size: 8, "
        "gradient_accumulation_steps: 1",
    }
    losses = {}
    for name, way in ways.items():
        text = (
            f"model: {{name_or_path: {base}}}\nlora: {{target_modules: [q_proj]}}\n"
            f"output_dir: {tmp_path}/run-{name}\n"
            f"training: {{max_steps: 1, max_length: 64, logging_steps: 1, loss_head: {head}, {way}}}\n"
        )
        train.train(load.load_recipe(write_recipe(text, name)))
        line = (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()[0]
        losses[name] = json.loads(line)["loss"]
    assert max(losses.values()) - min(losses.values()) < 3e-4, losses
