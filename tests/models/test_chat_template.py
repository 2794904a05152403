"""One truth: for the chat templates of the model families, what is trained is what inference feeds.

The templates are those that TRL ships, as the families publish them; the tokenizer is a small one
with their marks as special tokens. For every answer: the ids before it are those of the generation
prompt, it ends in the mark that ends the turn, which carries loss, and there is one BOS where the
template puts one. As a table: python tests/models/test_chat_template.py Hermetic: TRL's own files.
Alone: pytest tests/models/test_chat_template.py
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import trl
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_cli.common.errors import LoraError
from lora_cli.data.encode import Renderer
from lora_cli.data.formats import BadRow, find_converter
from lora_cli.models import chat_template
from lora_cli.models.tokenizer import IGNORED, TEMPLATES, set_chat_template, set_system_prompt

FOLDER = Path(trl.__file__).parent / "chat_templates"
# TRL's own variants for training are not what is published
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if "training" not in path.stem)
# Their generation prompt opens a thought, which the answers here do not have
THINKING = (
    "deepseek_r1_distill",
    "deepseekv3",
    *(name for name in NAMES if name.startswith("nemotron_3")),
)
PICTURES = ("idefics3", "llava_next", "smolvlm")
"""Templates that take contents in parts."""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OTHERS = {"mistral": MISTRAL, "chatml": (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")}
TRAINED = sorted({*NAMES, *OTHERS} - {*THINKING, *PICTURES})
MARKS = (
    r"<\|[^|<>\s]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|<｜[^｜<>]+｜>|</?[a-z_]+(?:_of_[a-z]+)?>"
    r"|\[/?[A-Z_]+\]|<s>|</s>|<bos>|<eos>"
)
MESSAGES = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "That is 6."},
]


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Bytes, and the template's marks as special tokens; `bos_token` and `eos_token` as its family
    has them."""
    marks = list(dict.fromkeys([*re.findall(MARKS, template), "<s>", "</s>"]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    ends = [
        mark
        for mark in ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<eos>")
        if mark in marks
    ]
    bos = next((mark for mark in ("<|begin_of_text|>", "<bos>") if mark in marks), "<s>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=bos, eos_token=ends[0] if ends else "</s>"
    )
    made.chat_template = template
    return made


def template(name: str) -> str:
    return (
        OTHERS[name] if name in OTHERS else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    )


class Seen(NamedTuple):
    """What became of the conversation under one template."""

    rows: int
    answers: int
    same_as_inference: bool
    stop: str
    bos: int


def seen(tokenizer: PreTrainedTokenizerBase) -> Seen:
    """Train on both answers, and ask for each as inference does."""
    conversation = find_converter("messages")({"messages": MESSAGES})
    [(_, [rows])] = Renderer(tokenizer, "assistant").encode([[("here", conversation)]])
    if isinstance(rows, BadRow):
        raise rows
    asked = [
        tokenizer.apply_chat_template(MESSAGES[:turn], add_generation_prompt=True)["input_ids"]
        for turn in (1, 3)
    ]
    answers, stops, same = [], set(), True
    for row in rows:
        ids, learned = row.input_ids.tolist(), (row.labels != IGNORED).tolist()
        starts = [i for i, now in enumerate(learned) if now and not (i and learned[i - 1])]
        for start in starts:
            end = next((i for i in range(start, len(learned)) if not learned[i]), len(learned))
            same &= ids[:start] in asked
            answers.append(tokenizer.decode(ids[start:end], skip_special_tokens=True).strip())
            stops.add(tokenizer.convert_ids_to_tokens(ids[end - 1]))
    assert ["4" in answers[0], "6" in answers[-1]] == [True, True], answers
    bos = max(row.input_ids.tolist().count(tokenizer.bos_token_id) for row in rows)
    return Seen(len(rows), len(answers), same, ", ".join(sorted(stops)), bos)


def test_the_families_are_there() -> None:
    assert len(TRAINED) >= 25
    assert {"llama3", "qwen3", "gemma", "mistral", "phi3", "chatml"} <= set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_is_what_inference_feeds(name: str) -> None:
    tokenizer = tokenizer_for(template(name))
    found = seen(tokenizer)
    assert (found.answers, found.same_as_inference) == (2, True)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert set(found.stop.split(", ")) <= special
    assert found.bos == (1 if "bos_token" in str(tokenizer.chat_template) else 0)


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_that_only_inference_opens_is_refused(name: str) -> None:
    with pytest.raises(
        LoraError, match="the chat template's generation prompt is not how it begins an answer"
    ):
        seen(tokenizer_for(template(name)))


REAL = {
    "qwen2": ("", "qwen3", "chatml", "alpaca"),
    "llama-bpe": ("llama3", "alpaca"),
    "phi-3": ("", "phi3"),
    "gpt-2": ("chatml", "alpaca"),
    "llama-spm": ("mistral", "alpaca"),
}
"""Vocabularies of published models, with the template in the file ("") or others."""


LARGE = ("qwen2", "llama-bpe")  # over 128,000 tokens: 10 s each
EACH = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in REAL]


@pytest.mark.parametrize("vocabulary", EACH)
def test_real_tokenizers_are_trained_as_inference_feeds_them(
    vocabulary: str, vocabularies: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        vocabularies, gguf_file=f"ggml-vocab-{vocabulary}.gguf"
    )
    own = tokenizer.chat_template
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name in REAL[vocabulary]:
        tokenizer.chat_template = own
        if name in ("chatml", "alpaca"):
            set_chat_template(tokenizer, name)
        elif name:
            tokenizer.chat_template = template(name)
        found = seen(tokenizer)
        assert (found.answers, found.same_as_inference) == (2, True), name
        assert set(found.stop.split(", ")) <= special, name
        if tokenizer.bos_token != tokenizer.eos_token:
            writes = "bos_token" in str(tokenizer.chat_template)
            assert found.bos == writes, name
            if name in ("chatml", "alpaca"):
                assert writes == Renderer(tokenizer, "assistant").adds_bos


def test_a_system_prompt_is_part_of_every_template_that_has_a_place_for_one() -> None:
    prompt, without = 'You are "terse".\nSay little: {{ no }} – 😀', []
    for name in TRAINED:
        tokenizer = tokenizer_for(template(name))
        try:
            set_system_prompt(tokenizer, prompt)
        except LoraError as error:
            assert "the chat template has no place for system messages" in error.message
            without.append(name)
            continue
        given = tokenizer_for(template(name))
        system = [{"role": "system", "content": prompt}]
        for messages in (
            MESSAGES[:1],
            MESSAGES,
            [{"role": "system", "content": "other"}, *MESSAGES],
        ):
            expected = messages if messages[0]["role"] == "system" else system + messages
            for asks in (False, True):
                shown = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asks
                )
                assert shown == given.apply_chat_template(
                    expected, tokenize=False, add_generation_prompt=asks
                )
        found = seen(tokenizer)
        assert (found.answers, found.same_as_inference) == (2, True), name
    assert "gemma" in without
    assert len(without) < len(TRAINED) / 3


if __name__ == "__main__":
    print(f"{'template':28} rows  answers  trained = inference  stop token            BOS")
    for each in TRAINED:
        f = seen(tokenizer_for(template(each)))
        print(
            f"{each:28} {f.rows:4}  {f.answers:7}  {f.same_as_inference!s:>19}  {f.stop:20}  "
            f"{f.bos:3}"
        )


def test_the_process_of_our_own_renders_what_transformers_does() -> None:
    """Of every template that TRL has and of ours, and of what jinja's environment decides."""
    tokenizer = tokenizer_for(template("chatml"))
    deep = {"type": "function", "function": {"name": "f", "parameters": {"é": [1, 2.5, None]}}}
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": "<b>"}}}]
    talks = [
        (MESSAGES, None),
        (MESSAGES[:2], None),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u\ud800é"}], None),
        ([MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": calls}], [deep]),
    ]
    files = [*FOLDER.glob("*.jinja"), *TEMPLATES.glob("*.jinja")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    sources += [
        "{{ 3 * 4 ** 2 }} {{ 'ab' * 3 }}{% generation %}x{% endgeneration %}",
        "{% for m in messages %}\n  {% if loop.last %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}",
        "{% set n = namespace(self=1, a=2) %}{% set n.b = dict(a=1) %}{{ n.b }}{{ tools | tojson(indent=2) }}",
        "{{ strftime_now('%Y') }}{{ documents }}{{ bos_token }}{{ nothing }}{{ '<&>' }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ raise_exception('no') }}",
        "{% set n = namespace(_a=1) %}",
        "{% for %}",
    ]
    assert len(sources) > 60
    rendered = 0
    for source in sources:
        for (messages, tools), ask in product(talks, [True, False]):
            try:
                theirs = tokenizer.apply_chat_template(
                    messages, tools, chat_template=source, tokenize=False, add_generation_prompt=ask
                )
            except Exception:
                with pytest.raises(TemplateError):
                    chat_template.render(tokenizer, messages, tools, ask, source)
                continue
            assert chat_template.render(tokenizer, messages, tools, ask, source) == theirs
            rendered += 1
    assert rendered > 300
