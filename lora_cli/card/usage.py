"""How an artefact is used: programs to paste, for what really loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_cli.card.facts import Facts
from lora_cli.card.markdown import fence, listed
from lora_cli.common import name_in_ollama, quote, quote_words

ASKED = "What is LoRA?"


def list_usage(facts: Facts) -> list[str]:
    """Return the parts of the card that say how the artefact is used, each a Markdown text."""
    parts = []
    if facts.kind == "adapter":
        parts += ["### PEFT", fence("python", _write_adapter_program(facts))]
    if facts.kind == "merged":
        parts += ["### transformers", fence("python", _write_merged_program(facts))]
    if facts.ggufs:
        parts += _list_gguf_usage(facts)
    if facts.task.writes_next_tokens and facts.kind != "gguf":
        parts += _list_server_usage(facts)
    return parts


def _write_adapter_program(facts: Facts) -> str:
    """Return a program that puts the adapter on its base and asks it something."""
    recipe, task = facts.recipe, facts.task
    settings = recipe.get("quantization")
    source = {} if isinstance(settings, dict) else facts.source
    reader = "AutoImageProcessor" if task.reads_pictures else "AutoTokenizer"
    imports = [task.auto_class, reader] + ["AutoConfig"] * task.counts_labels
    imports += ["GgufConfig"] * bool(source)
    arguments = _list_arguments(facts, source)
    if task.counts_labels:
        arguments.append("config=AutoConfig.from_pretrained(name)")
    lines = []
    if isinstance(settings, dict):
        imports.append("BitsAndBytesConfig")
        lines += ["# trained on a base in 4 bits, and right on that one only", "four_bits = ("]
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        lines += [f"    BitsAndBytesConfig(load_in_4bit=True, {given})", ")"]
        arguments.append("quantization_config=four_bits")
    program = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        f"name, base = {facts.place!r}, {('base' if source else facts.base)!r}{_note_base(facts)}",
        *lines,
        f"reader = {reader}.from_pretrained(name)",
        f"model = {task.auto_class}.from_pretrained(",
        "    base,",
        *(f"    {each}," for each in arguments),
        ")",
    ]
    if _adds_tokens(recipe):
        program.append("model.resize_token_embeddings(len(reader))  # it was trained with more")
    program += ["model = PeftModel.from_pretrained(model, name).eval()", *_write_question(facts)]
    return "\n".join(program)


def _list_arguments(facts: Facts, source: dict[str, str]) -> list[str]:
    """Return what the base is loaded with, which may be a GGUF file."""
    if source:
        return [
            f"gguf_file={_name_for_transformers(source)!r}",
            f"dtype={source.get('dtype')!r}",
            "quantization_config=GgufConfig(dequantize=True)",
        ]
    commit = [f"revision={facts.base_commit!r}"] if facts.base_commit else []
    return [f"dtype={_find_dtype(facts.recipe)!r}", *commit]


def _name_for_transformers(source: dict[str, str]) -> str:
    """Return what a GGUF file has to be called: transformers asks for the ending."""
    name = source["file"]
    return name if name.endswith(".gguf") else f"{Path(name).stem}.gguf"


def _note_base(facts: Facts) -> str:
    """Return the comment beside a base that is no name on the hub."""
    if facts.is_on_hub:
        return ""
    if not facts.source:
        return "  # a folder of whoever trained it: put yours here"
    made = facts.source["file"]
    if isinstance(facts.recipe.get("quantization"), dict):
        return f"  # the folder that lora dequantised {made} into: lora cache shows it"
    return f"  # a folder with {_name_for_transformers(facts.source)} and nothing else"


def _find_dtype(recipe: dict[str, Any]) -> str:
    model = recipe.get("model")
    return str((model if isinstance(model, dict) else {}).get("dtype") or "auto")


def _adds_tokens(recipe: dict[str, Any]) -> bool:
    model = recipe.get("model")
    return isinstance(model, dict) and bool(
        model.get("add_tokens") or model.get("add_special_tokens")
    )


def _write_merged_program(facts: Facts) -> str:
    """Return a program that loads the merged model and asks it something."""
    task = facts.task
    reader = "AutoImageProcessor" if task.reads_pictures else "AutoTokenizer"
    return "\n".join(
        [
            f"from transformers import {', '.join(sorted([task.auto_class, reader]))}",
            "",
            f"name = {facts.place!r}",
            f"reader = {reader}.from_pretrained(name)",
            f"model = {task.auto_class}.from_pretrained(name, dtype='auto').eval()",
            *_write_question(facts),
        ]
    )


def _write_question(facts: Facts) -> list[str]:
    """Return the lines that ask `model` what it was trained for, and print the answer."""
    task = facts.task
    if task.writes_next_tokens:
        return _write_prompt(facts)
    if task.has_targets:
        return [
            f"inputs = reader({_prefix(facts)!r}, return_tensors='pt').to(model.device)",
            "written = model.generate(**inputs, max_new_tokens=100)",
            "print(reader.decode(written[0], skip_special_tokens=True))",
        ]
    if task.reads_pictures:
        asked = ["from PIL import Image", "", "inputs = reader(Image.open('picture.png').convert("]
        asked[-1] += "'RGB'), return_tensors='pt').to(model.device)"
    elif task.name == "question_answering":
        asked = ["inputs = reader('Who wrote it?', 'Ada wrote it.', return_tensors='pt')"]
        return [*asked, "found = model(**inputs.to(model.device))", *_ANSWER]
    else:
        asked = [f"inputs = reader({ASKED!r}, return_tensors='pt').to(model.device)"]
    where = "[0].argmax(-1).tolist()" if task.places_labels else "[0].tolist()"
    return [*asked, f"print(model.config.id2label, model(**inputs).logits{where})"]


_ANSWER = (
    "first, last = found.start_logits.argmax(), found.end_logits.argmax()",
    "print(reader.decode(inputs['input_ids'][0, first : last + 1]))",
)


def _prefix(facts: Facts) -> str:
    data = facts.recipe.get("data")
    prefix = data.get("source_prefix") if isinstance(data, dict) else None
    return f"{prefix or ''}{ASKED}"


def _write_prompt(facts: Facts) -> list[str]:
    if facts.has_template:
        asked = [
            f"messages = [{{'role': 'user', 'content': {ASKED!r}}}]",
            "inputs = reader.apply_chat_template(",
            "    messages, add_generation_prompt=True, return_dict=True, return_tensors='pt'",
            ").to(model.device)",
        ]
    else:
        asked = [f"inputs = reader({ASKED!r}, return_tensors='pt').to(model.device)"]
    return [
        *asked,
        "written = model.generate(**inputs, max_new_tokens=100)",
        "print(reader.decode(written[0, inputs['input_ids'].shape[1] :], "
        "skip_special_tokens=True))",
    ]


def _list_gguf_usage(facts: Facts) -> list[str]:
    """Return how llama.cpp and Ollama run the GGUF files."""
    first = facts.ggufs[0].name
    local = facts.place == "."
    served = (
        ["llama-server", "-m", first]
        if local
        else ["llama-server", "-hf", facts.place, "-hff", first]
    )
    asked = ["### llama.cpp", fence("sh", quote_words(served)), "### Ollama"]
    fetch = (
        ""
        if local
        else f"hf download {quote(facts.place)} {quote(first)} Modelfile --local-dir .\n"
    )
    create = f"{fetch}ollama create {quote(name_in_ollama(Path(first).stem))} -f Modelfile"
    return [*asked, fence("sh", create)]


def _list_server_usage(facts: Facts) -> list[str]:
    """Return how vLLM serves it, and what does not load it."""
    if facts.kind == "merged":
        return ["### vLLM", fence("sh", f"vllm serve {quote(facts.place)}")]
    merging = f"lora merge {quote(facts.place)} merged"
    unloaded = listed(facts.beyond)
    if facts.source:
        merging += f" --base {quote(facts.source['file'])}"
        unloaded = unloaded or "its base is a GGUF file, dequantised"
    if unloaded:
        return [
            "### vLLM, llama.cpp, Ollama",
            f"They do not load this adapter ({unloaded}). Merged into its base, it is "
            "a plain model:",
            fence("sh", f"{merging}\nvllm serve merged\nlora export-gguf merged -q Q4_K_M"),
        ]
    served = ["vllm", "serve", facts.base or "BASE", "--enable-lora", *_list_rank(facts)]
    adapter = quote_words(["--lora-modules", f"mine={facts.place}"])
    said = [_explain_patterns(facts)] if _explain_patterns(facts) else []
    exported = f"{merging}\nlora export-gguf merged -q Q4_K_M"
    return [
        "### vLLM",
        fence("sh", f"{quote_words(served)} \\\n  {adapter}"),
        *said,
        "### llama.cpp, Ollama",
        "They read GGUF files, which are made of the merged model where llama.cpp knows its kind:",
        fence("sh", exported),
    ]


def _list_rank(facts: Facts) -> list[str]:
    """Return vLLM's option for the largest rank, of which it allows powers of two from 8."""
    ranks = facts.config.get("rank_pattern")
    every = [facts.config.get("r"), *(ranks.values() if isinstance(ranks, dict) else [])]
    rank = max([8, *(each for each in every if isinstance(each, int))])
    return ["--max-lora-rank", str(1 << (rank - 1).bit_length())]


def _explain_patterns(facts: Facts) -> str:
    said = []
    if facts.config.get("rank_pattern") or facts.config.get("alpha_pattern"):
        said.append(
            "vLLM scales every module by lora_alpha / r, whatever rank_pattern and alpha_pattern "
            f"say: `lora convert {quote(facts.place)} plain`, and serve that."
        )
    if facts.recipe.get("quantization"):
        said.append(
            "This serves the base's own weights; it was trained on them in 4 bits, which "
            "`lora merge` keeps."
        )
    return "\n\n".join(said)
