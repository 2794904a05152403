"""What libraries warn of is said once, in one line of ours, unless it is listed with a reason.

Hermetic: commands in processes of their own on small random models. Alone: pytest
tests/common/test_library_warnings.py
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_cli.common import library_warnings
from lora_cli.common.errors import UsageError
from lora_cli.models import attach
from lora_cli.plan import check
from lora_cli.recipe import load


@pytest.fixture
def heard(capsys: pytest.CaptureFixture[str]):
    """Listen, and afterwards no more; `heard()` is what was said."""
    logger, show = logging.getLogger(), warnings.showwarning
    with warnings.catch_warnings():
        library_warnings.listen()
        yield lambda: capsys.readouterr().err
    logger.removeHandler(library_warnings._handler)
    warnings.showwarning = show
    logging.StreamHandler.emit = library_warnings._own_emit


def test_a_warning_is_one_line_said_once(heard) -> None:
    for _ in range(2):
        logging.getLogger("bitsandbytes.cextension").warning("No prebuilt binary,\n  taken: 12.4")
        logging.getLogger("bitsandbytes").info("chatter")
        warnings.warn("that has no effect", stacklevel=1)
        warnings.warn("will be removed", FutureWarning, stacklevel=1)
    said = heard().splitlines()
    assert said[0] == "warning: bitsandbytes: No prebuilt binary, taken: 12.4"
    assert re.fullmatch(r"warning: \w+: that has no effect", said[1])
    assert len(said) == 2


def test_a_warning_whose_values_do_not_fit_ends_nothing(heard) -> None:
    """transformers has one: warning_once("…", FutureWarning). Not by way of a logger, on which
    pytest has a handler that raises."""
    for said, value in (("old", FutureWarning), ("%d rows", "x"), ("%(a)s is", 3)):
        record = {"name": "transformers.planted", "msg": said, "args": (value,)}
        library_warnings._handler.emit(logging.makeLogRecord(record))
    assert heard().splitlines() == [
        f"warning: transformers: {said}" for said in ("old", "%d rows", "%(a)s is")
    ]


def test_a_handler_of_a_library_s_own_writes_a_line_of_ours_too(heard, tmp_path: Path) -> None:
    logger, log = logging.getLogger("datasets.planted"), tmp_path / "log"
    logger.propagate = False
    for handler in (logging.StreamHandler(), logging.FileHandler(log)):
        logger.addHandler(handler)
    logger.error("Failed to load\nerror: see\x0bhere")
    logger.info("chatter")
    assert heard() == "warning: datasets: Failed to load error: see here\n"
    assert log.read_text() == "Failed to load\nerror: see\x0bhere\n"


def test_what_is_silenced_is_what_the_libraries_say() -> None:
    """Each entry of the list is found in the installed library's source: a warning that was
    rephrased is heard again."""
    sources = {
        "transformers": ["modeling_utils", "trainer_utils", "tokenization_utils_base",
                         "utils/loading_report"],
        "bitsandbytes": ["backends/cpu/ops"],
        "peft": ["tuners/lora/config"],
        "torch": ["cuda/__init__"],
    }  # fmt: skip
    text = ""
    for package, files in sources.items():
        folder = Path(str(find_spec(package).origin)).parent
        text += "".join((folder / f"{file}.py").read_text() for file in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", text).replace("{loss_type}", "None")
    joined += "CUDA initialization: "  # in libc10_cuda, which a CPU build of torch lacks
    missing = [each for each in library_warnings.SILENCED if not re.search(each, joined)]
    assert not missing


def test_a_model_s_own_faults_are_told(lora, write_recipe, tiny: Path, tmp_path: Path) -> None:
    """transformers says of an end token outside the vocabulary that it may behave unexpectedly."""
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 50256}))
    done = lora("check", write_recipe(), "--set", f"model.name_or_path={base}", env={})
    assert done.returncode == 0
    said = "warning: transformers: Model config: eos_token_id must be `None` or an integer within"
    assert done.stderr.count(said) == 1


def test_a_sound_run_is_not_talked_over(lora, write_recipe) -> None:
    done = lora("train", write_recipe("method: dora\n"), env={})
    assert done.returncode == 0
    assert not [line for line in done.stderr.splitlines() if re.match(r"warning: \w+: ", line)]


def test_weights_tied_in_vain_are_refused(write_recipe) -> None:
    path = write_recipe("lora: {ensure_weight_tying: true}\n")
    with pytest.raises(UsageError, match="lora.ensure_weight_tying has no effect: embeddings"):
        check.show_check(load.load_recipe(path), 0, False)


def test_what_peft_says_of_tied_weights_is_heard() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach.quiet_peft():
            warnings.warn("You have requested `ensure_weight_tying`, but …", stacklevel=1)
            warnings.warn("Model has `tie_word_embeddings=True` and a tied layer …", stacklevel=1)
    assert [str(each.message)[:8] for each in said] == ["You have"]


def test_label_smoothing_says_what_it_costs(write_recipe, capsys) -> None:
    for trainer, costs in (("sft", True), ("trainer", False)):
        path = write_recipe(f"trainer: {trainer}\ntraining: {{label_smoothing_factor: 0.1}}\n")
        check.show_check(load.load_recipe(path), 0, False)
        assert ("an extra forward pass in each step" in capsys.readouterr().out) == costs
