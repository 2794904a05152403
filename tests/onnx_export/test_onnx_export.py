"""Models that classify and tag as ONNX: what onnxruntime makes of the file is what PEFT's own model
says; what is another function is refused.

Hermetic: random BERTs of two layers, CPU, no network. Alone: pytest tests/onnx_export. All families:
pytest -m slow tests/onnx_export; as text: python -m tests.onnx_export.test_onnx_export
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from lora_cli.common import LoraError, RejectedError, ui
from lora_cli.merge.merge import merge
from lora_cli.models import Base, attach
from lora_cli.onnx_export import compare, export, graph
from lora_cli.onnx_export.feeds import make_feeds
from lora_cli.recipe.tasks import Task
from tests import tasks

KINDS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
TABLE = list(itertools.product(KINDS, tasks.FAMILIES))
NO_CLASS = {("token_classification", "bart")}
"""What transformers has no class for."""
OUTPUTS = {"question_answering": {"start_logits", "end_logits"}}
LABELS = ["good", "bad", "neutral"]
TEXTS = ["good house", "table river ugly stone paper glass , tree", "nice"]
FAR = 1e-5
"""Ten times what sums in another order come to here."""


def make_network(base: Path, task: str) -> PreTrainedModel:
    """A network of a task with a head that is as large as a trained one's."""
    torch.manual_seed(3)
    labels = {} if task == "question_answering" else {"id2label": dict(enumerate(LABELS))}
    network = getattr(transformers, KINDS[task]).from_pretrained(base, **labels)
    for name, weight in network.named_parameters():
        if weight.dim() > 1 and re.search(r"classifi|score|pooler|head\.|qa_outputs", name):
            weight.data.normal_(0, 0.3)
    return network.eval()


def make_model(folder: Path, family: str, task: str, **options: Any) -> Path:
    """A whole model of a task, as transformers saves one."""
    base = tasks.make_base(folder / "base", family)
    network = make_network(base, task)
    network.to(options.get("dtype", torch.float32)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "model")
    return folder / "model"


def run_file(folder: Path, texts: list[str], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What onnxruntime makes of texts in one batch, and where they are text."""
    tokens = AutoTokenizer.from_pretrained(folder, **options)(
        texts, padding=True, return_tensors="np"
    )
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    taken = {each.name for each in session.get_inputs()}
    assert taken <= set(tokens)
    [logits] = session.run(["logits"], {name: tokens[name] for name in taken})
    return torch.from_numpy(logits), torch.from_numpy(tokens["attention_mask"]).bool()


def run_alone(network: torch.nn.Module, folder: Path, texts: list[str]) -> list[torch.Tensor]:
    """What a model says of each text by itself, where there is no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [network(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]


def read_record(folder: Path) -> Any:
    return json.loads((folder / "model.onnx.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole BERT that classifies."""
    return make_model(tmp_path_factory.mktemp("whole"), "bert", "sequence_classification")


def test_a_merged_classifier_says_in_onnxruntime_what_peft_says(tmp_path: Path, lora) -> None:
    base = tasks.make_base(tmp_path / "base", "bert")
    network = make_network(base, "sequence_classification")
    whole = ["classifier", "bert.pooler"]
    config = LoraConfig(
        r=4, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=whole
    )
    with attach.quiet_peft():
        adapted = get_peft_model(network, config).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    network.config.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")

    done = lora("export-onnx", tmp_path / "merged", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    exporting, compared, made = done.stderr.splitlines()  # and nothing of the exporter's
    assert exporting == f"exporting {tmp_path / 'merged'} (BertForSequenceClassification)"
    assert re.search(
        r"largest difference of logits \d\.\d\de-0[67] \(limit 1\.\d\de-04\)", compared
    )
    assert re.search(r"out: model\.onnx 0\.\d MiB, \d+s$", made)

    out = tmp_path / "out"
    names = ("model.onnx", "model.onnx.json", "tokenizer.json", "tokenizer_config.json")
    assert {file.name for file in out.iterdir()} == {"config.json", *names}
    alone = torch.stack(run_alone(adapted, base, TEXTS))
    assert alone.std() > 0.3
    given, _ = run_file(out, TEXTS)
    assert (given - alone).abs().max() < FAR
    settings = json.loads((out / "config.json").read_text())
    assert settings["id2label"] == {str(n): name for n, name in enumerate(LABELS)}
    assert settings["architectures"] == ["BertForSequenceClassification"]
    record = read_record(out)
    assert record["command"] == "export-onnx"
    assert record["versions"]["onnxruntime"] == onnxruntime.__version__
    assert 0 < record["checked"]["logits"]["largest"] < FAR
    assert record["parent"]["command"] == "merge"
    assert record["parent"]["base"] == str(base)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [each.shape for each in session.get_inputs()] == [["batch", "sequence"]] * 3
    # which lines of Python a node is from would be paths of this machine
    assert b".py" not in (out / "model.onnx").read_bytes()


def test_a_tagger_of_16_bits_says_the_same_of_every_token(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert", "token_classification", dtype=torch.bfloat16)
    export.export(str(model), tmp_path / "out")
    given, text = run_file(tmp_path / "out", TEXTS)
    kind = transformers.AutoModelForTokenClassification
    alone = run_alone(kind.from_pretrained(model, dtype=torch.float32).eval(), model, TEXTS)
    assert torch.cat(alone).std() > 0.3
    assert (given[text] - torch.cat(alone)).abs().max() < FAR
    record = read_record(tmp_path / "out")
    assert record["weights"] == {"stored": "bfloat16", "written": "float32"}
    assert record["parent"] is None


def test_weights_beyond_the_limit_stand_beside_the_graph(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "LARGEST", 1000)
    export.export(str(whole), tmp_path / "out")
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("model.onnx*")}
    assert files["model.onnx"] < files["model.onnx.data"]
    (tmp_path / "out").rename(tmp_path / "moved")  # the graph names its weights' file as beside it
    given, _ = run_file(tmp_path / "moved", TEXTS)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(whole)
    assert (given - torch.stack(run_alone(network, whole, TEXTS))).abs().max() < FAR


def test_a_graph_without_the_mask_is_refused_with_the_figure(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = graph.Plain.forward

    def unmasked(self: graph.Plain, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        place = self.inputs.index("attention_mask")
        return forward(self, *tensors[:place], 1 - 0 * tensors[place], *tensors[place + 1 :])

    monkeypatch.setattr(graph.Plain, "forward", unmasked)
    with pytest.raises(RejectedError) as refused:
        export.export(str(whole), tmp_path / "out")
    assert re.search(
        r"in torch: logits by \d\.\d\de-0[12] \(limit .*\); left in .*out\.rejected$",
        refused.value.message,
    )
    assert (tmp_path / "out.rejected" / "model.onnx").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["out.rejected"]


@pytest.mark.parametrize(
    ("after", "is_kept"),
    [([1.0, 2.0, 3.0], True), ([1.0, 2.0, 3.00005], True), ([1.0, 2.0, 3.001], False)]
    + [([1.0, 2.0, float("nan")], False), ([1.0, 2.0], False)],
)
def test_what_differs_or_is_no_number_is_a_difference(after: list[float], is_kept: bool) -> None:
    feeds = [compare.Feed({"input_ids": torch.zeros(1, 7)})]
    runs = [[{"logits": torch.tensor([row])}] for row in ([1.0, 2.0, 3.0], after)]
    distances = compare.measure(feeds, *runs)
    assert distances["logits"].is_kept == is_kept
    if is_kept:
        compare.refuse_different(distances, "model", "1")
    else:
        with pytest.raises(RejectedError):
            compare.refuse_different(distances, "model", "1")


def test_padding_does_not_count_where_each_token_has_an_output() -> None:
    mask = torch.tensor([[1, 1, 0]])
    feeds = [compare.Feed({"input_ids": mask, "attention_mask": mask})]
    before = torch.randn(1, 3, 3)
    after = before.clone()
    after[0, 2] = float("nan")
    kept = compare.measure(feeds, [{"logits": before}], [{"logits": after}])
    assert kept["logits"].largest == 0
    after[0, 1, 1] += 1
    assert not compare.measure(feeds, [{"logits": before}], [{"logits": after}])["logits"].is_kept


def test_a_model_is_fed_padding_on_both_sides_a_pair_and_a_long_text(whole: Path) -> None:
    model = Base.of_model(str(whole))
    right, left, *single = make_feeds(model, model.load())
    for feed, column in ((right, 0), (left, -1)):
        assert feed.text[:, column].all()
        assert not feed.text[:, -1 - column].all()
        assert set(feed.inputs["input_ids"][~feed.text].tolist()) == {tasks.PAD}
    assert all(feed.text.all() for feed in single)
    assert sorted({len(feed.text[0]) for feed in single})[-1] == 64  # the tokenizer's own limit
    assert [feed.inputs["token_type_ids"].any().item() for feed in single] == [
        *[False] * 4,
        True,
        False,
    ]


def test_the_side_counts_that_the_model_itself_does_not_tell_apart(
    tmp_path: Path, whole: Path
) -> None:
    """BERT's positions begin with the padding, and Llama finds the last token by its padding."""
    llama = make_model(tmp_path, "llama", "sequence_classification")
    for path, either in ((whole, False), (llama, True)):
        model = Base.of_model(str(path))
        network = model.load()
        feeds = make_feeds(model, network)
        expected = compare.run_torch(network, feeds, str(path))
        assert compare.is_same_on_either_side(feeds, expected) == either


def fail_to_write(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "write_graph", fail_to_write)
    with pytest.raises(OSError):
        export.export(str(whole), tmp_path / "out" / "deeper")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(LoraError, match=r"out needs about 1 MB, 1 MB more than are free"):
        export.export(str(whole), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_does_not_know_is_refused_in_its_words(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pooler = transformers.models.bert.modeling_bert.BertPooler
    forward = pooler.forward
    # torch prints the whole graph where a branch hangs on numbers
    monkeypatch.setattr(pooler, "forward", lambda self, x: forward(self, x if x.sum() > 0 else -x))
    with pytest.raises(LoraError) as refused:
        export.export(str(whole), tmp_path / "out")
    assert "\n" not in refused.value.message
    assert re.search(
        r"cannot write BertForSequenceClassification \(.*\) as ONNX: GuardOnDataDependentSymNode: "
        "Could not guard on data-dependent expression",
        refused.value.message,
    )
    assert not list(tmp_path.iterdir())
    out, err = capfd.readouterr()
    assert not out
    said = [line for line in err.splitlines() if line and "it/s]" not in line]
    assert said == [f"exporting {whole} (BertForSequenceClassification)"]


def test_what_onnxruntime_does_not_run_is_refused(tmp_path: Path, whole: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"\x08\x0a")
    model = Base.of_model(str(whole))
    with pytest.raises(RejectedError, match=r"onnxruntime [\d.]+ does not run model\.onnx: "):
        compare.run_onnx(broken, make_feeds(model, model.load()), ["logits"])


def make_adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def make_writer(folder: Path) -> Path:
    return tasks.make_base(folder / "llama", "llama")


def make_masked(folder: Path) -> Path:
    return tasks.make_base(folder / "bert", "bert")


def make_gguf(folder: Path) -> Path:
    (folder / "a.gguf").write_text("")
    return folder / "a.gguf"


def make_quantised(folder: Path) -> Path:
    settings = json.loads((folder / "model" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    return folder / "model"


def make_nan(folder: Path) -> Path:
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"][1] = float("nan")
    save_file(weights, file, {"format": "pt"})
    return folder / "model"


REFUSED: list[tuple[Callable[[Path], Path], str, str | None]] = [
    (make_adapter, "DIR is an adapter, and ONNX has whole models", "lora merge DIR MODEL, then lora export-onnx MODEL OUT"),
    (make_writer, "DIR/llama writes text, token by token, and one ONNX file holds a single pass", "lora export-gguf DIR/llama"),
    (make_masked, "DIR/bert is BertForMaskedLM, and has no answers of a task", "train an adapter of a task on it, merge that, and export what comes of it"),
    (make_gguf, "DIR/a.gguf is a GGUF file", "give the folder of the model it was made from"),
    (make_quantised, "DIR/model is already quantised (bitsandbytes FP4), which is not written as ONNX", "export the model it was made from"),
    (make_nan, "the base DIR/model holds values that are not finite, in 1 tensor, the first classifier.bias", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message", "hint"), REFUSED, ids=lambda each: getattr(each, "__name__", "")
)
def test_what_cannot_be_written_is_refused_with_another_way(
    tmp_path: Path, whole: Path, make: Callable[[Path], Path], message: str, hint: str | None
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    made = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoraError) as refused:
        export.export(str(made), tmp_path / "out")
    assert refused.value.message == message.replace("DIR", str(tmp_path))
    assert hint is None or refused.value.hint == hint.replace("DIR", str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_writes_what_it_reads_is_no_single_pass(tmp_path: Path) -> None:
    """By what transformers says of the class: the row of the task need say nothing."""
    base = tasks.make_base(tmp_path / "t5", "t5")
    row = Task(
        "any", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "write", ("ForConditionalGeneration",)
    )
    with pytest.raises(LoraError) as refused:
        export.refuse_unanswering(Base(str(base), task=row))
    assert (
        refused.value.message
        == f"{base} writes text, token by token, and one ONNX file holds a single pass"
    )
    assert refused.value.hint == f"transformers runs {base} as it is"


def test_what_is_there_is_not_written_over(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx.json").write_text("{}")
    with pytest.raises(LoraError) as refused:
        export.export(str(whole), out)
    assert refused.value.message == f"{out} already exists"
    assert refused.value.hint == f"choose another output, or remove it: rm -r {out}"


def test_missing_packages_are_named_with_the_extra(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = graph.find_spec
    gone = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(graph, "find_spec", lambda name: None if name in gone else found(name))
    with pytest.raises(LoraError) as refused:
        export.export(str(whole), tmp_path / "out")
    assert (
        refused.value.message
        == "writing ONNX needs onnxscript and onnxruntime, which are not installed"
    )
    assert refused.value.hint == "pip install 'lora-cli[onnx]'"


def try_one(folder: Path, task: str, family: str) -> str:
    """A line of the table of families: the largest difference, or why it is refused."""
    model = make_model(folder, family, task)
    try:
        with ui.hush():
            export.export(str(model), folder / "out")
    except LoraError as error:
        return error.message
    found = read_record(folder / "out")["checked"]
    assert found.keys() == OUTPUTS.get(task, {"logits"})
    return f"{max(each['largest'] for each in found.values()):.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family"), TABLE)
def test_every_family_says_the_same(tmp_path: Path, task: str, family: str) -> None:
    if (task, family) in NO_CLASS:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            make_model(tmp_path, family, task)
        return
    assert float(try_one(tmp_path, task, family)) < FAR


if __name__ == "__main__":
    for row in TABLE:
        if row not in NO_CLASS:
            with tempfile.TemporaryDirectory() as made:
                print(*row, try_one(Path(made), *row), file=sys.stdout, flush=True)
