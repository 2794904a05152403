"""Models that read a text and write another: the loss against their own, what they write at an
evaluation, what they learn, tied weights, and every family that is known.

Hermetic: random bases of two layers, and one that is taught to repeat its source, CPU. Alone:
pytest tests/train/test_seq2seq.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from lora_cli.common import LoraError, UsageError
from lora_cli.data.collate import PairCollator
from lora_cli.merge import compare_weights
from lora_cli.merge.combine import combine
from lora_cli.merge.extract import extract
from lora_cli.merge.merge import choose_way, merge
from lora_cli.models import Base, decoder, read_adapter, ties, token_rows
from lora_cli.models.probes import make_probes
from lora_cli.recipe import load_recipe
from lora_cli.recipe.tasks import ENCODER_DECODERS, name_task, recognise_task
from lora_cli.scoring import text_metrics
from lora_cli.scoring.texts import TextScorer
from lora_cli.train import run
from tests import tasks
from tests.train import test_tasks as table

TASK = "seq2seq_lm"
WORDS = len(tasks.VOCABULARY)
TWO = tasks.TWO_SIDES
T5 = {**tasks.FAMILIES["t5"][1], "num_decoder_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mbart": ("MBartForConditionalGeneration", TWO),
    "pegasus": ("PegasusForConditionalGeneration", TWO),
    "pegasus_x": (
        "PegasusXForConditionalGeneration", {**TWO, "num_global_tokens": 2, "block_size": 4},
    ),
    "marian": ("MarianMTModel", {**TWO, "decoder_vocab_size": WORDS}),
    "m2m_100": ("M2M100ForConditionalGeneration", TWO),
    "plbart": ("PLBartForConditionalGeneration", TWO),
    "mvp": ("MvpForConditionalGeneration", TWO),
    "blenderbot": ("BlenderbotForConditionalGeneration", TWO),
    "blenderbot_small": ("BlenderbotSmallForConditionalGeneration", TWO),
    "led": (
        "LEDForConditionalGeneration",
        {**TWO, "attention_window": 8, "max_encoder_position_embeddings": 64,
         "max_decoder_position_embeddings": 64},
    ),
    "bigbird_pegasus": (
        "BigBirdPegasusForConditionalGeneration", {**TWO, "attention_type": "original_full"},
    ),
    "nllb_moe": (
        "NllbMoeForConditionalGeneration",
        {**TWO, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    ),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "longt5": ("LongT5ForConditionalGeneration", T5),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
}  # fmt: skip


@pytest.fixture
def bases(tmp_path: Path):
    """`bases(family)` writes a random base."""
    return lambda family, **changed: tasks.make_base(tmp_path / family, family, **changed)


def train(folder: Path, base: Path, *overrides: str, method: str = "lora", **more: str) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = tasks.write_recipe(folder, TASK, base, method, **more)
    return run.train(load_recipe(recipe, list(overrides)))


def read_metrics(adapter: Path) -> list[dict[str, Any]]:
    lines = (adapter.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_is_the_model_s_own_over_all_labels(bases, family: str) -> None:
    network = AutoModelForSeq2SeqLM.from_pretrained(bases(family)).eval()
    tokenizer = tasks.make_tokenizer()
    rows = [
        {"input_ids": [2, *range(5, 5 + source), 3], "labels": [2, *range(6, 6 + target), 3]}
        for source, target in ((5, 2), (9, 6), (3, 1))
    ]

    def collate(some: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return PairCollator(tokenizer, lambda labels: decoder.shift_labels(network, labels))(some)

    batch = collate(rows)
    with torch.no_grad():
        whole = network(**batch)
        total = TextScorer().sum_loss(whole.logits, batch["labels"], None)
        count = int((batch["labels"] != -100).sum())
        assert total.item() / count == pytest.approx(whole.loss.item(), rel=1e-6)
        alone = [collate([row]) for row in rows]  # neither padding nor the batch counts
        parts = [
            TextScorer().sum_loss(network(**each).logits, each["labels"], None) for each in alone
        ]
        assert sum(parts).item() == pytest.approx(total.item(), rel=1e-5)
        smooth = TextScorer().sum_loss(whole.logits, batch["labels"], None, 0.1)
        chances = whole.logits.log_softmax(-1)[batch["labels"] != -100]
        assert smooth.item() == pytest.approx(
            0.9 * total.item() - 0.1 * chances.mean(-1).sum().item(), rel=1e-5
        )


def test_a_step_is_the_same_in_one_pass_and_in_several(bases, tmp_path: Path) -> None:
    base = bases("t5", dropout_rate=0.0)
    one, two = (
        train(tmp_path / name, base, *options, "training.save_strategy=no")
        for name, options in (
            ("one", ("training.per_device_train_batch_size=8",)),
            (
                "two",
                (
                    "training.per_device_train_batch_size=2",
                    "training.gradient_accumulation_steps=4",
                ),
            ),
        )
    )
    losses = [
        [each["loss"] for each in read_metrics(adapter) if "loss" in each] for adapter in (one, two)
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# What is written at an evaluation -----------------------------------------------------------------


@pytest.fixture(scope="module")
def repeater(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 that repeats its source, after some seconds of training."""
    folder = tmp_path_factory.mktemp("repeater")
    tokenizer = tasks.make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(T5Config(**{**T5, "dropout_rate": 0.0}))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(250):
        words = torch.randint(5, WORDS - 1, (64, 3))
        ends = [torch.full((64, 1), number) for number in (tasks.CLS, tasks.SEP)]
        ids = torch.cat([ends[0], words, ends[1]], dim=1)
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int, seed: int) -> Path:
    """Rows of three words, and the same backwards."""
    drawn = torch.Generator().manual_seed(seed)
    numbers = torch.randint(5, WORDS - 1, (count, 3), generator=drawn).tolist()
    texts = [[tasks.VOCABULARY[number] for number in row] for row in numbers]
    rows = [{"source": " ".join(words), "target": " ".join(words[::-1])} for words in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_it_learns_to_write_and_is_scored_by_what_it_writes(repeater: Path, tmp_path: Path) -> None:
    rows, others = write_rows(tmp_path / "a.jsonl", 256, 0), write_rows(tmp_path / "b.jsonl", 24, 1)
    adapter = train(
        tmp_path, repeater, f"data.path={rows}", f"data.eval_path={others}",
        "training.max_steps=120", "training.per_device_train_batch_size=16", "lora.r=8",
        "training.eval_strategy=steps", "training.eval_steps=60", "training.eval_on_start=true",
        "training.generate_at_evaluation=true", "training.metric_for_best_model=exact",
        "training.keep=best", "training.save_steps=60",
    )  # fmt: skip
    found = [each for each in read_metrics(adapter) if "eval_loss" in each]
    assert found[0]["eval_exact"] < 0.2  # some read the same backwards
    assert found[-1]["eval_exact"] > 0.5
    assert found[-1]["eval_perplexity"] < found[0]["eval_perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    network = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(repeater), str(adapter)
    ).eval()
    pairs = [json.loads(line) for line in others.read_text().splitlines()]
    said = []
    for pair in pairs:
        given = tokenizer(pair["source"], return_tensors="pt")
        made = network.generate(**given, max_new_tokens=12, do_sample=False, num_beams=1)
        said.append(tokenizer.decode(made[0], skip_special_tokens=True))
    wanted = text_metrics.score_texts(said, [pair["target"] for pair in pairs]).values
    assert {name: found[-1][f"eval_{name}"] for name in wanted} == pytest.approx(wanted)


def test_nothing_is_written_unless_it_is_asked_for(bases, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "b.jsonl", 4, 1)
    adapter = train(tmp_path / "run", bases("t5"), f"data.eval_path={rows}")
    [last] = [each for each in read_metrics(adapter) if "eval_loss" in each]
    assert {"eval_loss", "eval_perplexity"} < last.keys()
    assert not {"eval_rougeL", "eval_exact"} & last.keys()


def test_no_more_is_written_than_there_are_positions(bases) -> None:
    network = AutoModelForSeq2SeqLM.from_pretrained(bases("bart", max_position_embeddings=8))
    network.generation_config.eos_token_id = network.config.eos_token_id = None
    network.generation_config.forced_eos_token_id = None
    tokenizer = tasks.make_tokenizer()
    given = dict(tokenizer(["glass tree"], return_tensors="pt", return_token_type_ids=False))
    assert len(decoder.write_targets(network.eval(), tokenizer, given, 100)) == 1


# Tied weights -------------------------------------------------------------------------------------

SHARED = {
    "t5": ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    "bart": ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["shared", "embed_tokens", "lm_head"])
def test_what_would_merge_wrongly_is_refused(
    bases, tmp_path: Path, family: str, field: str, name: str
) -> None:
    listed = f"{', '.join(SHARED[family][:3])} and lm_head"
    said = rf"lora\.{field}.*{name} shares its weight \({listed}\)"
    with pytest.raises(UsageError, match=said):
        train(tmp_path / "run", bases(family), f"lora.{field}=[{name}]")
    assert not (tmp_path / "run" / "run" / "adapter").exists()


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"target_modules": ["shared", "q", "q_proj"]}, "the adapter changes .*shared"),
        ({"target_modules": ["lm_head"]}, "the adapter changes lm_head"),
        ({"target_modules": ["q", "q_proj"], "modules_to_save": ["shared"]}, "changes .*shared"),
    ],
)
@pytest.mark.parametrize("stream", [None, False])
def test_such_adapters_made_elsewhere_are_not_merged(
    bases, tmp_path: Path, family: str, what: dict[str, Any], said: str, stream: bool | None
) -> None:
    network = AutoModelForSeq2SeqLM.from_pretrained(base := bases(family))
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", init_lora_weights=False, **what)
    get_peft_model(network, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraError, match=f"uses one weight for {', '.join(SHARED[family])}.*{said}"):
        merge(tmp_path / "adapter", tmp_path / "out", str(base), stream)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", SHARED)
def test_one_made_elsewhere_is_merged(bases, tmp_path: Path, family: str) -> None:
    network = AutoModelForSeq2SeqLM.from_pretrained(base := bases(family)).eval()
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", init_lora_weights=False, target_modules="all-linear"
    )
    adapted = get_peft_model(network, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tasks.make_tokenizer().save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", str(base))
    given = {name: torch.tensor([[2, 7, 9, 3]]) for name in ("input_ids", "decoder_input_ids")}
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = adapted.eval()(**given).logits
        torch.testing.assert_close(merged(**given).logits, expected, rtol=1e-4, atol=1e-4)


def make_apart(folder: Path) -> Path:
    """A T5 whose files have a head of its own, as flan-T5's do, which its class ties."""
    tasks.make_base(folder, "t5")
    network = T5ForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(1)
    network.lm_head.weight = torch.nn.Parameter(torch.randn_like(network.lm_head.weight) / 8)
    network.all_tied_weights_keys.pop("lm_head.weight")
    network.save_pretrained(folder)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    return folder


def test_a_head_of_its_own_is_merged_in_constant_memory(tmp_path: Path, capfd) -> None:
    base = make_apart(tmp_path / "base")
    assert Base(str(base), task=name_task(TASK)).parted == ("lm_head.weight",)
    adapter = train(tmp_path, base, "lora.target_modules=[q, v, lm_head]")
    merge(adapter, tmp_path / "out", stream=True)
    assert "merged against base with adapter" in capfd.readouterr().err
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert merged.lm_head.weight is not merged.shared.weight
    assert table.measure_apart(adapter, table.load_as_peft_does(adapter)) == 0
    assert table.measure_apart(adapter, merged, scale=True) < 2e-5


def test_a_head_of_its_own_is_not_tied_as_tokens_are_added(tmp_path: Path) -> None:
    network = Base(str(make_apart(tmp_path)), task=name_task(TASK)).load()
    head = network.lm_head.weight.detach().clone()
    token_rows.grow_embeddings(network, WORDS + 1)
    assert torch.equal(network.lm_head.weight[:WORDS], head)
    assert network.encoder.embed_tokens.weight is network.shared.weight


def test_equal_copies_of_a_tied_weight_are_tied(tmp_path: Path) -> None:
    base = make_apart(tmp_path / "base")
    network = T5ForConditionalGeneration.from_pretrained(base)
    network.lm_head.weight.data.copy_(network.shared.weight.data)
    network.save_pretrained(base)
    found = Base(str(base), task=name_task(TASK))
    assert found.parted == ()
    assert ties.find_shared(found.build_empty()) == [SHARED["t5"]]


# Buffers, beginnings, families --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bias_of_bart_s_logits_is_merged_as_it_was_trained(tmp_path: Path, dtype: str) -> None:
    """Its files have one as a buffer. In 16 bits training rounds it."""
    base = tasks.make_base(tmp_path / "base", "bart")
    network = AutoModelForSeq2SeqLM.from_pretrained(base)
    network.final_logits_bias.normal_(std=9.0)
    network.save_pretrained(base)
    adapter = train(tmp_path, base, f"model.dtype={dtype}")
    read = read_adapter(adapter)
    probes = make_probes(read.load_tokenizer())
    streamed, whole = (
        choose_way(read, stream, False).compute_expected(probes) for stream in (True, False)
    )
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-4)
    merge(adapter, tmp_path / "out")
    kept = load_file(tmp_path / "out" / "model.safetensors")["final_logits_bias"]
    assert torch.equal(kept, network.final_logits_bias.to(getattr(torch, dtype)).float())
    assert compare_weights.compare_weights(read, Base.of_model(str(tmp_path / "out")))


@pytest.mark.parametrize("family", SHARED)
def test_adapters_are_combined_and_taken_out_of_models(
    bases, tmp_path: Path, family: str, capfd
) -> None:
    """PEFT looks for the adapters' names in those of modules: T5's have numbers inside of numbers."""
    base = bases(family)
    one, two = (
        train(tmp_path / name, base, f"training.seed={seed}") for seed, name in enumerate("ab")
    )
    combine([one, two], tmp_path / "both", "0.5,0.5", "cat", None, None, None)
    found = re.search(r"sum of their updates: (\S+)", capfd.readouterr().err)
    assert found
    assert float(found[1]) < 1e-6
    merge(one, tmp_path / "merged")
    extract(str(base), str(tmp_path / "merged"), tmp_path / "extracted", 4)
    updates = [
        {name: tensor for name, tensor in load_file(each / "adapter_model.safetensors").items()}
        for each in (one, tmp_path / "extracted")
    ]
    for name in updates[1]:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            given, taken = (
                each[other] @ each[name] * scale for each, scale in zip(updates, (2, 1))
            )
            torch.testing.assert_close(taken, given, rtol=1e-3, atol=1e-5)


def test_what_a_decoder_begins_with_has_to_be_known(bases, tmp_path: Path) -> None:
    base = bases("t5")
    file = base / "config.json"
    config = json.loads(file.read_text())
    del config["decoder_start_token_id"]
    file.write_text(json.dumps(config))
    with pytest.raises(LoraError, match="has no decoder_start_token_id: what the decoder begins"):
        train(tmp_path / "run", base)


def test_a_merged_model_begins_as_its_targets_did(bases, tmp_path: Path) -> None:
    """Whatever the base's generation_config.json says."""
    base = bases("t5")
    file = base / "generation_config.json"
    wrong = {**json.loads(file.read_text()), "decoder_start_token_id": 7}
    file.write_text(json.dumps(wrong))
    merge(train(tmp_path, base), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["decoder_start_token_id"] == tasks.PAD


def test_every_class_for_two_texts_is_known_by_its_name() -> None:
    """Those that listen, too, are called ForConditionalGeneration; three have a loss, or rows, of
    their own, and Gemma's nested configurations were not tried."""
    left_out = {"fsmt", "prophetnet", "seamless_m4t", "seamless_m4t_v2", "t5gemma", "t5gemma2"}
    listening = ("audio", "asr", "speech", "voxtral", "flamingo", "transcribe", "nemo")
    known = 0
    for kind, name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        wanted = kind not in left_out and not any(word in kind for word in listening)
        assert (recognise_task([name]).name == TASK) is wanted, kind
        known += wanted
    assert known >= 18
    assert len(ENCODER_DECODERS) >= 13


def try_family(folder: Path, family: str) -> dict[str, Any]:
    tasks.FAMILIES[family] = FAMILIES[family]
    try:
        return table.try_all(folder, TASK, "lora", family)
    finally:
        del tasks.FAMILIES[family]


@pytest.mark.parametrize("family", ["mbart", "m2m_100", "led"])
def test_families(tmp_path: Path, family: str) -> None:
    found = try_family(tmp_path, family)
    assert found["reloaded"] <= (1e-5 if family == "led" else 0)  # of logits of 60, in place
    assert found["merged"] < 2e-5
    assert found["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mbart", "m2m_100", "led"}))
def test_other_families(tmp_path: Path, family: str) -> None:
    table.judge(TASK, "lora", family, try_family(tmp_path, family))
