"""What is checked of each file of an export, and what is reported of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_cli.common import LoraError, ui
from lora_cli.gguf import llama_api, parity, quantize, tensor_check
from lora_cli.gguf.tools import EXACT, Found, convert
from lora_cli.models import (
    Base,
    compute_logits,
    convert_to_float32,
    count_text_parameters,
    passages,
)


class Checker:
    """Compares the files of an export with the Hugging Face model, and tensor by tensor with the
    exact GGUF that they were rounded from."""

    def __init__(self, model: Base, exact: Path, exact_type: str) -> None:
        """Compute what the model says, and compare the exact GGUF with it. Raises LoraError where
        that says something else."""
        weights, tokenizer = (
            convert_to_float32(model.load_plain(model.exact_dtype)),
            model.load_tokenizer(),
        )
        source = parity.Source(model.config, tokenizer, count_text_parameters(weights))
        self._reference = parity.make_reference(weights, model.config, tokenizer, source)
        self._exact_type = exact_type
        self._likeness = {exact_type: parity.compare_gguf(exact, exact_type, self._reference)}
        self._base: dict[str, passages.Likeness] = {}

    def measure_base(
        self,
        base: Base,
        types: Sequence[str],
        converter: Found,
        scratch: Path,
        matrix: Path | None,
    ) -> None:
        """Measure what each of `types` costs the base, for the reports to name beside what it costs
        the model.

        Nothing is measured where the base lacks tokens of the model. A base that cannot be measured
        is said, and does not keep the model's own files back.
        """
        rows = base.config.get_text_config().vocab_size
        ids = {number for passage in self._reference.passages for number in passage.ids}
        if max(ids) >= rows:
            return
        try:
            self._measure_base(base, types, converter, scratch, matrix)
        except LoraError as error:
            ui.warn(f"what these types cost the base {base} was not measured: {error.message}")

    def _measure_base(
        self,
        base: Base,
        types: Sequence[str],
        converter: Found,
        scratch: Path,
        matrix: Path | None,
    ) -> None:
        made = self._reference.passages
        logits = compute_logits(convert_to_float32(base.load_plain(base.exact_dtype)), made)
        exact = scratch / "base" / "base.gguf"
        convert(
            base.download(), exact, EXACT[str(base.exact_dtype).removeprefix("torch.")], converter
        )
        for name in types:
            file = exact.with_name(f"{name}.gguf")
            quantize.quantize(exact, file, name.upper(), matrix, announced=False)
            given = llama_api.compute_logits(file, [passage.ids for passage in made])
            self._base[name] = passages.compare_passages(made, logits, list(given))
            file.unlink()
        exact.unlink()

    def check(self, file: Path, name: str, digests: Mapping[str, str], exact: Path) -> str:
        """Check a file of type `name` and report in words; `digests` are those of the tensors that
        our quantiser made. Raises LoraError for a file that may not be handed over."""
        said = ""
        if name != self._exact_type:
            said = f"{tensor_check.compare_tensors(file, exact, digests)}; "
            self._likeness[name] = parity.compare_gguf(file, name, self._reference)
        said += f"in llama.cpp: {self._likeness[name]}"
        if cost := self._base.get(name):
            said += f" (the base as {name}: mean KL {cost.mean_kl:.1e}, top-1 {cost.top1:.1%})"
        return said

    def list_figures(self, name: str) -> dict[str, dict[str, float] | None]:
        """Return the figures of a checked file of type `name`: its `likeness` to the model, and
        that of the base's to the base, None where that was not measured."""
        cost = self._base.get(name)
        return {"likeness": self._likeness[name]._asdict(), "base": cost and cost._asdict()}
