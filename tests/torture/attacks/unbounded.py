"""Kind 3: patterns and programs of a stranger's run unbounded."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.torture.attacks import Attack, Place, change, read_tensors, write_tensors
from tests.torture.attacks.verbs import SHORT, use_adapter, use_base, use_rows


def draw_pattern(chance: random.Random) -> str:
    """A regular expression that takes for ever on some names, of one family or another."""
    n = chance.choice([12, 25, 40, 60])
    part = chance.choice(["a", "o", ".", r"\w", "[a-z]", r"[^x]", "(?:a|o|e)", r"\S"])
    return chance.choice([
        f"({part}+)+$x", f"({part}*)*x", f"({part}|{part})*x", f"{part}?" * n + f"{part}" * n + "!", f".*{part}" * n + "!",
        f"(?:{part}?){{{n}}}{part}{{{n}}}!", f"({part}{{1,{n}}}){{1,{n}}}!", f"(?=({part}+)+!)x", f"(.*)({part}*)(.*)({part}*)(.*)!",
        f"(?P<x>{part}+)+(?P=x)!", f"(?:{part}+?)+?!", f"({part}+|{part}{part})+!", "(" * n + part + ")*" * n + "!", f"(?:(?:{part}*)*)*!",
        f"({part}{{,{n}}})*!", f"(?<!{part})({part}+)+!", f"{part}{{{n * 10_000}}}", f"(?:{part}{{0,{n}}}){{0,65535}}!", f".?{'.?' * n}!", f"(?i)({part}+)+!",
        "(?:" * 80 + part + ")" * 80, f"(?:{part}|)+!" * 3, f"((?:{part}|b)+c?)+!", "|".join(f"{part}{i}" for i in range(5000)), f"\\Z|({part}*)+!",
    ])  # fmt: skip


def adapter_pattern(place: Place, chance: random.Random) -> Attack:
    """In the fields that PEFT takes as expressions; the first adapter's or the second's."""
    adapter, pattern = place.adapter(), draw_pattern(chance)
    field, value = chance.choice([
        ("target_modules", pattern), ("exclude_modules", pattern), ("rank_pattern", {pattern: 3}), ("alpha_pattern", {pattern: 3}),
        ("layers_pattern", pattern), ("target_parameters", [pattern]), ("modules_to_save", [pattern]), ("rank_pattern", {pattern + str(i): 3 for i in range(20)}),
    ])  # fmt: skip
    more: dict[str, Any] = {"layers_to_transform": [0, 1]} if field == "layers_pattern" else {}
    change(adapter / "adapter_config.json", **{field: value}, **more)
    if chance.random() < 0.4:
        words = chance.choice([["combine", str(place.stage / "second"), str(adapter), "out"], ["merge", str(place.stage / "second"), str(adapter), "out"],
                               ["generate", str(place.stage / "second"), str(adapter), "--prompt", "x", *SHORT],
                               ["verify", str(place.stage / "second"), str(adapter)]])  # fmt: skip
        return Attack(words, output="out")
    return use_adapter(place, chance, adapter)


def recipe_pattern(place: Place, chance: random.Random) -> Attack:
    pattern = json.dumps(draw_pattern(chance))
    written = chance.choice([f"lora: {{target_modules: {pattern}}}\n", f"lora: {{exclude_modules: {pattern}}}\n", f"lora: {{rank_pattern: {{{pattern}: 2}}}}\n",
                             f"lora: {{alpha_pattern: {{{pattern}: 2}}}}\n", f"lora: {{layers_pattern: {pattern}, layers_to_transform: [0]}}\n"])  # fmt: skip
    place.recipe(written)
    return Attack([chance.choice(["check", "plan", "train"]), "recipe.yaml"])


def tokenizer_pattern(place: Place, chance: random.Random) -> Attack:
    """The tokenizer's own expressions (Oniguruma's), and Python's in settings."""
    base = place.copy("base")
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    pattern = draw_pattern(chance)
    step = chance.choice([
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x" * chance.choice([0, 1, 1000])}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x" * 1000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 1_000_000}] * 20}},
    ])  # fmt: skip
    path.write_text(json.dumps({**value, **step}))
    return (
        use_rows(
            place,
            chance,
            place.rows(rows=[{"prompt": "a" * 200 + "!", "completion": "o" * 200 + "?"}] * 3),
            f"model: {{name_or_path: {str(base)!r}}}\n",
        )
        if chance.random() < 0.5
        else use_base(place, chance, base)
    )


def draw_template(chance: random.Random) -> str:
    """A template that takes for ever, or all there is."""
    n = chance.choice([2000, 20_000, 1_000_000, 99_999_999])
    fill = chance.choice(["x", "xy", "\\n"])
    return chance.choice([
        f"{{% for a in range(99999) %}}{{% for b in range({n}) %}}{{% endfor %}}{{% endfor %}}",
        "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = ns.x + [a] %}{% endfor %}{{ ns.x | length }}",
        f"{{% set ns = namespace(x='') %}}{{% for a in range(99999) %}}{{% set ns.x = ns.x ~ ('{fill}' * 999) %}}{{% endfor %}}x",
        f"{{{{ '{fill}' | center({n * 1000}) }}}}", f"{{{{ '%{n * 100}d' % 1 }}}}", f"{{{{ '{{:>{n * 100}}}'.format(1) }}}}", f"{{{{ '%.{n * 100}f' % 1.0 }}}}",
        f"{{{{ ('{fill}' * {min(n, 33_000_000)}) | replace('x', 'y' * 1000) }}}}", f"{{{{ ('{fill}' * {min(n, 33_000_000)}) | list | length }}}}",
        f"{{{{ ('{fill} ' * {min(n, 16_000_000)}) | wordwrap(1) | length }}}}", f"{{{{ ('x' * {min(n, 33_000_000)}) | urlize | length }}}}", f"{{{{ ([[1]] * {min(n, 33_000_000)}) | sum(start=[]) | length }}}}",
        f"{{{{ range({min(n, 99_999)}) | map('string') | join('{fill}' * 9999) | length }}}}", f"{{{{ ([1] * {min(n, 33_000_000)}) | tojson | length }}}}", f"{{{{ ('{fill}' * {min(n, 33_000_000)}) | pprint | length }}}}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "".join(f"{{% for a{i} in range(9) %}}" for i in range(100)) + "x" + "{% endfor %}" * 100,
        "{% if x %}" * 400 + "{% endif %}" * 400, "{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{{ " + "not " * 5000 + "x }}", "{{ " + "1 + " * 5000 + "1 }}", "{{ [" * 1 + "[" * 500 + "]" * 500 + "] }}",
        f"{{{{ 2 ** {n} }}}}", f"{{{{ (10 ** {n}) % 7 }}}}", f"{{{{ (7 ** {min(n, 1_000_000)}) | string | length }}}}", f"{{{{ ({'9' * 4000}) * ({'9' * 4000}) }}}}", "{{ 1 << 99 }}",
        f"{{{{ lipsum(n={min(n, 99_999)}) }}}}", f"{{{{ cycler(*range({min(n, 99_999)})) }}}}", f"{{{{ joiner('{fill}' * {min(n, 33_000_000)})() }}}}", f"{{{{ dict([('a' * {min(n, 33_000_000)}, 1)]) | tojson(indent=4) }}}}",
        "{% set ns = namespace(x='xy') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}", f"{{% set x = {list(range(200_000))} %}}x", "{{ x }}" * 60_000,
        f"{{{{ messages | batch({n * 100}, 'x') | list }}}}", f"{{{{ messages | slice({n * 10}) | list | length }}}}", f"{{{{ 'x' | indent({n * 100}, true) }}}}", f"{{{{ ('x\\n' * 9999) | indent({min(n, 9_999)}, true) | length }}}}",
        f"{{{{ ('a' * {min(n, 100_000)}).split('a') | groupby(0) | list }}}}", "{{ ('x' * 9999).translate({120: 'y' * 99999}) }}", f"{{{{ 'x'.ljust({n * 1000}) }}}}", f"{{{{ 'x'.zfill({n * 1000}) }}}}", f"{{{{ '\\t'.expandtabs({n * 1000}) }}}}",
        "{% call(x) m() %}{% endcall %}", "{{ self }}{{ loop }}", "{% block a %}{{ self.a() }}{% endblock %}", "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ])  # fmt: skip


def template(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    written = draw_template(chance)
    if chance.random() < 0.2:
        (base / "chat_template.jinja").unlink()
        change(base / "tokenizer_config.json", chat_template=written)
    else:
        (base / "chat_template.jinja").write_text(written)
    return use_base(place, chance, base)


def adapter_template(place: Place, chance: random.Random) -> Attack:
    """The template that travels with an adapter, or in a recipe."""
    written = draw_template(chance)
    if chance.random() < 0.3:
        place.recipe("model: {chat_template: template.jinja}\n")
        (place.work / "template.jinja").write_text(written)
        return Attack([chance.choice(["check", "train", "plan"]), "recipe.yaml"])
    adapter = place.adapter(kind="run/adapter")
    (adapter / "chat_template.jinja").write_text(written)
    return use_adapter(place, chance, adapter)


def many_names(place: Place, chance: random.Random) -> Attack:
    """Lists and mappings of very many names."""
    adapter, n = place.adapter(), chance.choice([20_000, 200_000, 600_000])
    names = [f"m{i}" for i in range(n)]
    field, value = chance.choice([
        ("target_modules", names), ("rank_pattern", dict.fromkeys(names, 1)), ("alpha_pattern", dict.fromkeys(names, 1)), ("modules_to_save", names),
        ("exclude_modules", names), ("target_parameters", names), ("layers_to_transform", list(range(n))), ("layers_pattern", names), ("trainable_token_indices", list(range(n))),
        ("target_modules", "|".join(names)), ("target_modules", "(" + "|".join(names) + ")*!"), ("auto_mapping", dict.fromkeys(names, 1)),
    ])  # fmt: skip
    change(adapter / "adapter_config.json", **{field: value})
    return use_adapter(place, chance, adapter)


def many_tensors(place: Place, chance: random.Random) -> Attack:
    """Very many small tensors."""
    import torch

    adapter = place.adapter()
    path = adapter / "adapter_model.safetensors"
    tensors, n = read_tensors(path), chance.choice([3_000, 20_000])
    for i in range(n):
        tensors[
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{chance.choice('AB')}.weight"
        ] = torch.zeros(1, 1)
    write_tensors(path, tensors)
    return use_adapter(place, chance, adapter)


def many_recipe_words(place: Place, chance: random.Random) -> Attack:
    """A recipe up to its largest size, of one thing over and over."""
    place.recipe()
    n = 12_000
    text = chance.choice([
        "lora: {rank_pattern: {" + ", ".join(f"m{i}: 1" for i in range(n // 2)) + "}}\n", "lora: {target_modules: [" + ", ".join(f"m{i}" for i in range(n)) + "]}\n",
        "".join(f"key{i}: 1\n" for i in range(n // 2)), "training: {" + ", ".join(f"key{i}: 1" for i in range(n // 2)) + "}\n", "data: {path: [" + ", ".join(f"f{i}.jsonl" for i in range(n // 2)) + "]}\n",
        "model: {add_tokens: [" + ", ".join(f"<t{i}>" for i in range(n // 2)) + "]}\n", "data: {mix: [" + ", ".join("{path: rows.jsonl}" for i in range(4000)) + "]}\n", "x: " + "[" * 3000 + "]" * 3000 + "\n", "? " * 3000, "{" * 9000,
        "data: {path: '" + "*" * 60 + "'}\n", "data: {path: '" + "**/" * 40 + "x.jsonl'}\n", "data: {path: '[" + "!" * 2000 + "]'}\n", "lora: {layers_to_transform: [" + ", ".join(map(str, range(n))) + "]}\n",
        'model: {system_prompt: "' + "x y " * 30_000 + '"}\n', "data: {split: 'train[" + "9" * 4000 + ":]'}\n", "data: {columns: {" + ", ".join(f"k{i}: 1" for i in range(4000)) + "}}\n", "training: {max_length: " + "9" * 4000 + "}\n",
    ])  # fmt: skip
    (place.work / "recipe.yaml").write_text(f"extends: sound.yaml\n{text}")
    return Attack([chance.choice(["check", "plan", "train"]), "recipe.yaml"])


def extends(place: Place, chance: random.Random) -> Attack:
    """Recipes that extend each other."""
    place.recipe()
    n = chance.choice([2, 60, 900])
    for i in range(n):
        (place.work / f"r{i}.yaml").write_text(
            f"extends: r{(i + 1) % n if chance.random() < 0.999 else i}.yaml\n"
        )
    return Attack(["check", "r0.yaml"])


ATTACKS = [
    adapter_pattern, template, recipe_pattern, adapter_template, many_names, template, tokenizer_pattern, many_tensors,
    template, many_recipe_words, adapter_pattern, extends,
]  # fmt: skip
