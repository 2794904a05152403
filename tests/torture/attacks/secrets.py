"""Kind 7: secrets that are told, and the home folder that is not."""

from __future__ import annotations

import json
import os
import random
import string

from tests.torture.attacks import Attack, Place, change
from tests.torture.attacks.verbs import SHORT, use_adapter


def draw_secret(chance: random.Random) -> str:
    """A token of a shape that is known."""

    def letters(count: int, of: str = string.ascii_letters + string.digits) -> str:
        return "".join(chance.choice(of) for _ in range(count))

    upper, digits, hexes = string.ascii_uppercase + string.digits, string.digits, "0123456789abcdef"
    return chance.choice([
        f"hf_{letters(34)}", f"sk-{letters(48)}", f"sk-ant-api03-{letters(40)}-{letters(8)}AA", f"sk-proj-{letters(40)}", f"ghp_{letters(36)}", f"gho_{letters(36)}", f"ghs_{letters(36)}",
        f"github_pat_{letters(22)}_{letters(59)}", f"AKIA{letters(16, upper)}", f"ASIA{letters(16, upper)}", f"xoxb-{letters(12, digits)}-{letters(12, digits)}-{letters(24)}",
        f"glpat-{letters(20)}", f"AIza{letters(35)}", f"npm_{letters(36)}", f"pypi-AgEIcHlwaS5vcmc{letters(60)}", f"SG.{letters(22)}.{letters(43)}", f"hf_oauth_{letters(40)}",
        f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(40)}", f"sk_live_{letters(24)}", f"rk_live_{letters(24)}", f"ya29.{letters(60)}", f"dop_v1_{letters(64, hexes)}", f"r8_{letters(37)}", f"gsk_{letters(52)}", f"xai-{letters(60)}",
    ])  # fmt: skip


def draw_address(chance: random.Random) -> tuple[str, str]:
    """An address with a password in it, and the password."""
    secret = "".join(chance.choice(string.ascii_letters + string.digits) for _ in range(20))
    scheme = chance.choice(
        [
            "https",
            "http",
            "s3",
            "postgres",
            "postgresql",
            "mysql",
            "redis",
            "mongodb+srv",
            "amqp",
            "ftp",
        ]
    )
    user = chance.choice(
        ["me", "oauth2", "", "x-token-auth", "me@corp.example".replace("@", "%40")]
    )
    return f"{scheme}://{user}:{secret}@host.example/x", secret


def in_recipe(place: Place, chance: random.Random) -> Attack:
    """In a recipe: refused before it is copied anywhere."""
    secret = draw_secret(chance)
    text = chance.choice([secret, f"see {secret}", f"https://host.example/?token={secret}"])
    if chance.random() < 0.35:
        text, secret = draw_address(chance)
    value = json.dumps(text)
    written = chance.choice([
        f"training: {{run_name: {value}}}\n", f"model: {{system_prompt: {value}}}\n", f"model: {{add_tokens: [{value}]}}\n", f"training: {{hub_token: {value}}}\n",
        f"training: {{project: {value}}}\n", f"lora: {{target_modules: [{value}]}}\n", f"data: {{path: {value}}}\n", f"training: {{hub_model_id: {value}}}\n",
        f"model: {{name_or_path: {value}}}\n", f"training: {{logging_dir: {value}}}\n", f"model: {{revision: {value}}}\n", f"data: {{name: {value}}}\n",
        f"training: {{optim_args: {value}}}\n", f"training: {{lr_scheduler_kwargs: {{x: {value}}}}}\n", f"extends: {value}\n", f"unknown: {value}\n", f"training: {{push_to_hub_token: {value}}}\n",
    ])  # fmt: skip
    path = place.recipe(written)
    if written.startswith("extends"):
        path.write_text(written)
    return Attack(
        [chance.choice(["train", "train", "check", "plan"]), "recipe.yaml"], secrets=[secret]
    )


def in_override(place: Place, chance: random.Random) -> Attack:
    """On the command line."""
    place.recipe()
    secret = draw_secret(chance)
    text = secret
    if chance.random() < 0.3:
        text, secret = draw_address(chance)
    words = chance.choice([
        ["train", "recipe.yaml", "--set", f"training.run_name={text}"], ["check", "recipe.yaml", "--set", f"data.path={text}"], ["generate", text, "--prompt", "x", *SHORT],
        ["merge", text, "out"], ["plan", "recipe.yaml", "--set", f"model.name_or_path={text}"], ["plan", "recipe.yaml", "--gpu", text], ["check", text], ["train", "recipe.yaml", "--set", text],
        ["merge", str(place.stage / "adapter"), "out", "--base", text], ["export-gguf", text], ["combine", str(place.stage / "adapter"), text, "out"], ["recipes", "copy", text], ["train", "recipe.yaml", f"--{text}"],
    ])  # fmt: skip
    return Attack(words, secrets=[secret])


def in_environment(place: Place, chance: random.Random) -> Attack:
    """In the environment, by a name or by a shape; it is quoted by what a stranger's file says."""
    secret = chance.choice(
        [
            draw_secret(chance),
            "".join(chance.choice(string.ascii_letters + string.digits + "_+/") for _ in range(24)),
        ]
    )
    named = ["HF_TOKEN", "GH_PAT", "PGPASSWORD", "MYSQL_PWD", "AWS_SECRET_ACCESS_KEY", "DB_PASS", "SSHPASS", "REDIS_AUTH", "NPM_AUTH", "OPENAI_API_KEY", "HF_HUB_TOKEN", "WANDB_API_KEY",
             "AZURE_CLIENT_SECRET", "SIGNING_KEY", "VAULT_TOKEN", "API_PASSPHRASE", "HUGGING_FACE_HUB_TOKEN", "GITLAB_PRIVATE_TOKEN", "TWINE_PASSWORD", "CI_JOB_TOKEN", "MY_PASSPHRASE", "PRIVATE_KEY", "BEARER", "SECRET_1"]  # fmt: skip
    shaped = ["DATABASE_URL", "WHATEVER", "BUILD_INFO", "PIP_INDEX_URL", "HTTPS_PROXY_X"]
    name = chance.choice(named)
    value = secret
    if chance.random() < 0.3:
        name = chance.choice(shaped)
        value, secret = (
            draw_address(chance) if chance.random() < 0.6 else (made := draw_secret(chance), made)
        )
    environment = {name: value}
    how = chance.randrange(4)
    if how == 0:  # a bug's traceback, or an error that quotes the value
        adapter = place.adapter()
        change(adapter / "adapter_config.json", peft_type=value)
        return use_adapter(place, chance, adapter, environment=environment, secrets=[secret])
    if how == 1:
        place.recipe(f"training: {{run_name: {json.dumps(value)}}}\n")
        return Attack(["train", "recipe.yaml"], environment=environment, secrets=[secret])
    if how == 2:
        return Attack(
            ["doctor", *chance.choice([[], ["--json"]])],
            environment=environment,
            secrets=[secret],
            codes=(0, 1),
        )
    rows = place.rows(rows=[{"prompt": value, "nonsense": value}])
    place.recipe(data=rows)
    return Attack(["check", "recipe.yaml"], environment=environment, secrets=[secret])


def link_to_environment(place: Place, chance: random.Random) -> Attack:
    """A stranger's file that is a link to the process's own environment."""
    secret = draw_secret(chance)
    base = place.copy("base")
    path = base / chance.choice(
        [
            "chat_template.jinja",
            "config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "tokenizer.json",
        ]
    )
    path.unlink()
    path.symlink_to(
        f"/proc/{chance.choice(['self', os.getpid()])}/environ"
        if chance.random() < 0.5
        else "/proc/self/environ"
    )
    place.recipe(base=base)
    words = chance.choice(
        [
            ["check", "recipe.yaml"],
            ["merge", str(place.stage / "adapter"), "out", "--base", str(base)],
            ["generate", str(base), "--prompt", "x", *SHORT],
        ]
    )
    return Attack(words, environment={"PLAIN_NAME": secret}, fresh=True, secrets=[secret])


def made_files(place: Place, chance: random.Random) -> Attack:
    """A good command beside secrets: they are in no file that is made."""
    secret = draw_secret(chance)
    environment = {chance.choice(["HF_TOKEN", "WANDB_API_KEY", "GH_TOKEN", "NAME"]): secret}
    adapter = place.adapter(kind="run/adapter")
    place.recipe("training: {save_strategy: steps, save_steps: 1}\n")
    words = chance.choice(
        [
            ["train", "recipe.yaml"],
            ["merge", str(adapter), "out"],
            ["convert", str(adapter), "out", "--r", "1"],
            ["combine", str(adapter), str(place.stage / "second"), "out"],
        ]
    )
    return Attack(words, environment=environment, secrets=[secret], codes=(0,))


def template_reads(place: Place, chance: random.Random) -> Attack:
    """A template that tries to get at the process's secrets."""
    base, secret = place.copy("base"), draw_secret(chance)
    reach = chance.choice([
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.environ }}", "{{ self._TemplateReference__context }}", "{{ namespace.__init__.__globals__ }}",
        "{{ ''.format.__self__ }}", "{{ '{0.__class__}'.format(messages) }}", "{{ messages | map(attribute='__class__') | list }}", "{{ strftime_now.__globals__ }}", "{{ raise_exception.__globals__['os'].environ }}",
        "{{ ('{0.__globals__}' | format)(strftime_now) }}", "{{ lipsum.__globals__['os'].environ }}", "{{ tojson.__globals__ }}", "{{ messages|attr('__init__') }}", "{{ ''['__class__'] }}", "{{ '{0.__init__.__globals__[os].environ}'.format(cycler) }}",
        "{{ '%s' % messages.__class__ }}", "{{ ''|attr('form'~'at')|attr('__self__') }}", "{{ messages.append.__self__ }}", "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    ])  # fmt: skip
    (base / "chat_template.jinja").write_text(reach + "{{ messages[0]['content'] }}")
    place.recipe(base=base)
    return Attack(
        [chance.choice(["check", "train"]), "recipe.yaml"],
        environment={"PLAIN": secret},
        secrets=[secret, "<class ", "environ({"],
    )


def home_in_names(place: Place, chance: random.Random) -> Attack:
    """A path that has the home folder's text in it, and is not below it, stays what it is."""
    home = str(place.work / "u")
    (place.work / "u").mkdir()
    name = chance.choice(["uu", "u2", "u-backup", "x/u", "u.d", "ux/u"])
    base = place.copy("base", name + "/base")
    place.recipe("training: {save_strategy: steps, save_steps: 1}\n", base=base)
    program = """
import os, sys
from pathlib import Path
from lora_cli.cli import main
child = os.fork()
if not child:
    main()
_, status = os.waitpid(child, 0)
if os.waitstatus_to_exitcode(status):
    sys.exit(os.waitstatus_to_exitcode(status))
sys.argv = ["lora", "merge", "run/adapter", "out"]
main()
"""
    return Attack(
        ["train", "recipe.yaml"],
        environment={"HOME": home},
        program=program,
        codes=(0,),
        files={"run/adapter/adapter_config.json": "~"},
    )


def home_in_files(place: Place, chance: random.Random) -> Attack:
    """What is below the home folder is written with ~ where it travels."""
    home = place.work
    base = place.copy("base")
    place.recipe("training: {save_strategy: steps, save_steps: 1}\n", base=base)
    files = {
        each: str(home)
        for each in (
            "run/adapter/adapter_config.json",
            "run/adapter/lora_record.json",
            "run/record.json",
            "run/recipe.yaml",
            "run/adapter/README.md",
            "run/metrics.jsonl",
        )
    }
    return Attack(
        ["train", "recipe.yaml"], environment={"HOME": str(home)}, codes=(0,), files=files
    )


def report_bug(place: Place, chance: random.Random) -> Attack:
    """A bug's traceback hides what it holds."""
    secret = draw_secret(chance)
    program = f"""
import sys
from lora_cli import cli
from lora_cli.recipe import load_recipe
def broken(*a, **k):
    raise RuntimeError("it was {secret}")
import lora_cli.recipe
lora_cli.recipe.load_recipe = broken
try:
    cli.main()
except SystemExit as error:
    sys.exit(0 if error.code == 70 else 3)
"""
    place.recipe()
    return Attack(
        ["check", "recipe.yaml"],
        environment={"WHATEVER": secret},
        program=program,
        secrets=[secret],
        bug=True,
    )


ATTACKS = [
    in_recipe, in_override, in_environment, link_to_environment, made_files, template_reads, home_in_names, home_in_files,
    in_recipe, report_bug, in_environment, in_override,
]  # fmt: skip
