"""`lora generate` and `lora chat`: answers of a base, adapters, merged models and GGUF files, side by side.

Adapters of one base share it: it is loaded once, and the adapters are switched on it, or off for the base itself. Each
prompt is rendered by the chat template saved with the model that answers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from lora_cli import data, fold, model, record, ui
from lora_cli.errors import UsageError
from lora_cli.gguf import GGUFModel

Messages = list[dict[str, str]]
BATCH = 16


class Question(NamedTuple):
    """A conversation that waits for an answer, and the answer hoped for, where the file gives one."""

    messages: Messages
    expected: str | None

    @property
    def text(self) -> str:
        """The last message, as a person would recognise it."""
        return self.messages[-1]["content"]


class Sampling(NamedTuple):
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float


class Answerer(Protocol):
    """Anything that answers conversations."""

    def answer(self, conversations: Sequence[Messages], sampling: Sampling) -> list[str]:
        """One answer each."""

    def stream(self, conversation: Messages, sampling: Sampling) -> str:
        """Print one answer to stdout as it comes, and return it."""


class Bases:
    """Base models loaded so far, by name, revision, type and quantisation; each at most once."""

    def __init__(self) -> None:
        self.loaded: dict[str, PreTrainedModel | PeftModel] = {}

    @staticmethod
    def key(adapter: record.Adapter) -> str:
        """What two adapters must agree in to share a base."""
        return json.dumps([adapter.base, adapter.revision, adapter.dtype, adapter.quantization])

    def with_adapter(self, adapter: record.Adapter, name: str) -> str:
        """The adapter loaded on its base under `name`; returns the base's key."""
        key = self.key(adapter)
        base = self.loaded.get(key) or fold.load_base(adapter)
        if isinstance(base, PeftModel):
            base.load_adapter(str(adapter.folder), adapter_name=name)
            model.check_adapter_complete(base, adapter.folder, name)
        else:
            base = model.load_adapter(base, adapter.folder, name)
        self.loaded[key] = base.eval()
        return key

    def plain(self, name: str) -> str:
        """A model without adapter: a base that is there already in its own type, or loaded now; returns its key."""
        for key in self.loaded:
            base, _, dtype, quantization = json.loads(key)
            if base == name and quantization is None and dtype in (None, self._on_disk(name)):
                return key
        key = json.dumps([name, None, None, None])
        dtype = model.checkpoint_dtype(model.load_config(name))
        self.loaded[key] = model.load_base(name, None, dtype).eval()
        return key

    @staticmethod
    def _on_disk(name: str) -> str:
        return str(model.checkpoint_dtype(model.load_config(name))).removeprefix("torch.")


class HFAnswerer:
    """A transformers model, with one of its adapters switched on, or none."""

    def __init__(self, bases: Bases, key: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bases, self.key, self.adapter, self.tokenizer = bases, key, adapter, tokenizer

    def answer(self, conversations: Sequence[Messages], sampling: Sampling) -> list[str]:
        """Greedy or sampled answers, `BATCH` conversations at a time."""
        prompts = [self._ids(messages) for messages in conversations]
        answers: list[str] = []
        for start in range(0, len(prompts), BATCH):
            answers += self._generate(prompts[start : start + BATCH], sampling)
        return answers

    def stream(self, conversation: Messages, sampling: Sampling) -> str:
        """One answer, printed as it comes."""
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self._generate([self._ids(conversation)], sampling, streamer=streamer)[0]

    def _ids(self, messages: Messages) -> list[int]:
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(self, prompts: list[list[int]], sampling: Sampling, **kwargs: Any) -> list[str]:
        """Left-padded, with the pads masked; cut at the token that ends a turn."""
        weights, tokenizer = self.bases.loaded[self.key], self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=weights.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=weights.device)
        drawing = (
            {"do_sample": True, "temperature": sampling.temperature} if sampling.temperature else {"do_sample": False}
        )
        with torch.inference_mode(), self._switched(weights):
            output = weights.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self._ends(weights),
                pad_token_id=pad,
                **drawing,
                **kwargs,
            )
        return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in output]

    def _ends(self, weights: PreTrainedModel) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those the model's generation config adds."""
        configured = weights.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        return sorted({token for token in [self.tokenizer.eos_token_id, *more] if token is not None})

    def _switched(self, weights: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
        if not isinstance(weights, PeftModel):
            return nullcontext()
        if self.adapter is None:
            return weights.disable_adapter()
        weights.set_adapter(self.adapter)
        return nullcontext()


class GGUFAnswerer:
    """A GGUF file in llama.cpp, with the chat template embedded in the file."""

    def __init__(self, path: Path) -> None:
        self.model = GGUFModel(path)

    def answer(self, conversations: Sequence[Messages], sampling: Sampling) -> list[str]:
        """One after the other."""
        return [
            self.model.complete(self.model.render(messages), sampling.max_new_tokens, sampling.temperature)
            for messages in conversations
        ]

    def stream(self, conversation: Messages, sampling: Sampling) -> str:
        """One answer, printed as it comes."""
        pieces = []
        prompt = self.model.render(conversation)
        for piece in self.model.stream(prompt, sampling.max_new_tokens, sampling.temperature):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces)


def open_models(paths: Sequence[str], base: str | None = None) -> dict[str, Answerer]:
    """What answers for each path, by a short label. Adapters first, so that a base among the paths shares theirs."""
    bases = Bases()
    kinds = {path: record.kind(path) for path in paths}
    answerers: dict[str, Answerer] = {}
    for path in sorted(kinds, key=lambda path: kinds[path] != "adapter"):
        if kinds[path] == "gguf":
            answerers[path] = GGUFAnswerer(Path(path))
        elif kinds[path] == "adapter":
            adapter = record.read_adapter(Path(path), base)
            name = f"adapter_{len(answerers)}"
            answerers[path] = HFAnswerer(bases, bases.with_adapter(adapter, name), name, fold.load_tokenizer(adapter))
        else:
            tokenizer = _tokenizer_of_base(path, answerers.values(), bases)
            answerers[path] = HFAnswerer(bases, bases.plain(path), None, tokenizer)
    return {path: answerers[path] for path in paths}


def _tokenizer_of_base(name: str, others: Any, bases: Bases) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, with the template of an adapter on it where it has none, so that prompts compare."""
    tokenizer = model.load_tokenizer(name)
    if tokenizer.chat_template is not None:
        return tokenizer
    for other in others:
        if isinstance(other, HFAnswerer) and json.loads(other.key)[0] == name:
            tokenizer.chat_template = other.tokenizer.chat_template
            ui.say(f"{name} has no chat template: it gets that of the adapter on it")
            return tokenizer
    ui.say(f"{name} has no chat template: prompts are given as plain text")
    return tokenizer


def read_questions(prompts: Sequence[str], file: Path | None) -> list[Question]:
    """Prompts of the command line, then those of the file: rows of a known format in .jsonl, else lines of text."""
    questions = [Question([{"role": "user", "content": prompt}], None) for prompt in prompts]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}", f"ls -l {file}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                questions.append(_question(line, file, number))
    if not questions:
        raise UsageError("no prompt was given", "--prompt TEXT, or --file FILE")
    return questions


def _question(line: str, file: Path, number: int) -> Question:
    if file.suffix not in (".jsonl", ".json"):
        return Question([{"role": "user", "content": line}], None)
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}:{number}: not valid JSON: {error.msg}", "one JSON object a line") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and "completion" not in row:
        return Question([{"role": "user", "content": row["prompt"]}], None)
    for style, needed in data.FORMATS.items():
        if style != "text" and isinstance(row, dict) and all(column in row for column in needed):
            messages = data.to_messages(row, style, number - 1)
            return Question(messages[:-1], messages[-1]["content"])
    raise UsageError(f"{file}:{number}: a row needs prompt, instruction and output, or messages", '{"prompt": "…"}')


def generate(
    paths: Sequence[str],
    prompts: Sequence[str],
    file: Path | None,
    max_new_tokens: int,
    temperature: float,
    base: str | None,
    show: int | None,
    as_json: bool,
) -> None:
    """Print each prompt with every model's answer, then how many answers are exactly the ones expected."""
    questions = read_questions(prompts, file)
    set_seed(0)
    answers = {}
    for label, answerer in open_models(list(dict.fromkeys(paths)), base).items():
        conversations = [question.messages for question in questions]
        answers[label] = answerer.answer(conversations, Sampling(max_new_tokens, temperature))
    shown = questions if show is None else questions[:show]
    for index, question in enumerate(shown):
        if as_json:
            for label, given in answers.items():
                row = {"model": label, "prompt": question.text, "answer": given[index], "expected": question.expected}
                print(json.dumps(row, ensure_ascii=False))
        else:
            print(_side_by_side(question, {label: given[index] for label, given in answers.items()}))
    expected = [question.expected for question in questions]
    if any(answer is not None for answer in expected):
        rows = [[label, *_exact_match(given, expected)] for label, given in answers.items()]
        (ui.say if as_json else print)(ui.table(["exact match", "rows", "share"], rows))


def _side_by_side(question: Question, answers: dict[str, str]) -> str:
    lines = [f"prompt: {question.text}"]
    if question.expected is not None:
        lines.append(f"expected: {question.expected}")
    for label, answer in answers.items():
        text = answer.strip()
        lines.append(f"  {label}: {text}" if "\n" not in text else f"  {label}:\n    " + text.replace("\n", "\n    "))
    return "\n".join(lines) + "\n"


def _exact_match(given: Sequence[str], expected: Sequence[str | None]) -> tuple[str, str]:
    pairs = [(answer.strip(), wanted.strip()) for answer, wanted in zip(given, expected) if wanted is not None]
    hits = sum(answer == wanted for answer, wanted in pairs)
    return f"{hits}/{len(pairs)}", f"{100 * hits / len(pairs):.1f}%"


def chat(path: str, system: str | None, max_new_tokens: int, temperature: float, base: str | None) -> None:
    """Read lines from stdin, stream answers to stdout; the conversation so far is given back each time."""
    answerer = open_models([path], base)[path]
    opening = [{"role": "system", "content": system}] if system else []
    messages: Messages = list(opening)
    ui.say(f"{path}: /reset starts over, /quit leaves")
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = answerer.stream(messages, Sampling(max_new_tokens, temperature))
            messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Lines of stdin, with a prompt on stderr where a person types them."""
    asking = sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
