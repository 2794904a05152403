"""What is a secret, and what only looks like one; the home folder at the beginning of paths alone.

Hermetic. Alone: pytest tests/common/test_privacy.py
"""

from __future__ import annotations

import json
import random
import string
import urllib.parse

import pytest

from lora_cli.common import privacy

LETTERS = string.ascii_letters + string.digits
MADE = random.Random(0)


def letters(count: int) -> str:
    return "".join(MADE.choices(LETTERS, k=count))


# Lengths and alphabets as the makers give them, with letters of chance
TOKENS = {
    **{f"hf{n}": f"{start}{letters(34)}" for n, start in enumerate(("hf_", "api_org_"))},
    "openai": f"sk-proj-{letters(48)}",
    "openai, before": f"sk-{letters(48)}",
    "anthropic": f"sk-ant-api03-{letters(40)}-{letters(40)}",
    **{f"github {kind}": f"gh{kind}_{letters(36)}" for kind in "pousr"},
    "github fine": f"github_pat_{letters(22)}_{letters(59)}",
    "gitlab": f"glpat-{letters(20)}",
    "aws": "AKIA" + "".join(MADE.choices(string.ascii_uppercase + string.digits, k=16)),
    "google": f"AIza{letters(35)}",
    **{f"slack {kind}": f"xox{kind}-{letters(12)}-{letters(24)}" for kind in "abprs"},
    **{f"stripe {kind}": f"{kind}_live_{letters(24)}" for kind in ("sk", "rk")},
    "wandb": f"wandb_v1_{letters(40)}",
    "npm": f"npm_{letters(36)}",
    "pypi": f"pypi-AgEIcHlwaS5vcmc{letters(60)}",
    "sendgrid": f"SG.{letters(22)}.{letters(43)}",
    "digitalocean": "dop_v1_" + "".join(MADE.choices("0123456789abcdef", k=64)),
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{letters(43)}",
}
# A text, and the part of it that may not be seen
WITH_CREDENTIALS = [
    ("https://me:hunter2@host/x", "hunter2"),
    ("postgresql+psycopg2://app:p%40ss/w0rd@db:5432/x", "w0rd"),
    ("mongodb+srv://me%40corp.example:hunter2@db/x", "hunter2"),
    ("https://abcdefghij0123456789@github.com/x", "abcdefghij"),
    ("Server=db;Uid=app;Pwd=hunter2;", "hunter2"),
    ("host=db user=app password=hunter2 dbname=x", "hunter2"),
    ("PGPASSWORD=hunter2 psql", "hunter2"),
    ("https://h/x?token=abc123&y=1", "abc123"),
    ("https://h/x?y=1&api_key=abc123", "abc123"),
    ("https://h/x?sv=1&sig=abc%2B123", "abc"),
    ("https://h/x?X-Amz-Signature=abc123", "abc123"),
    ("https://h/x?X-Amz-Security-Token=abc123", "abc123"),
    ("DefaultEndpointsProtocol=https;AccountKey=abcd1234efgh==;", "abcd1234"),
    ("Authorization: Bearer abcdefghij0123456789", "abcdefghij"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\nzaC1rZXk\n-----END OPENSSH PRIVATE KEY-----", "zaC1"),
    ("-----BEGIN PRIVATE KEY-----\nMIIEvQ", "MIIE"),
]  # fmt: skip
HARMLESS = [
    "TOKENIZERS_PARALLELISM=false", "eos_token: <|im_end|>", "a" * 64, "0123456789abcdef" * 4, "sha256:" + "0f" * 32,
    "/home/user/models/hf_datasets_cache_folder", "sk-learn-based-text-classification", "task-specific-model-name",
    "PWD=/home/user", "OLDPWD=/x", "http://host:8080/x?y=1@z", "abfss://container@account.dfs.core.windows.net/x",
    "abfs://a-container-of-some-length@account.dfs.core.windows.net/x",
    "ssh://git@github.com/x", "git@github.com:owner/name", "s3://bucket/key", "owner/hf_model", "max_new_tokens=512",
    "model.layers.0.self_attn.k_proj", "https://h/x?revision=main&download=true", "the password is asked for",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_token_is_known_wherever_it_stands(token: str) -> None:
    around = (
        "{}", "x={}", "run_{}", "a {}, b", "'{}'", "/data/{}/x", "https://h/{}", "\n{}", "\\n{}", "%3D{}",
        "\\x1b{}", "\\u003d{}",
    )  # fmt: skip
    for form in around:
        said = privacy.mask_secrets(form.format(token))
        assert token[:12] not in said, form
        assert privacy.MASK in said
        assert privacy.find_held_secret({"a": [{"b": form.format(token)}]}), form
    assert privacy.find_held_secret({"a": {token: 1}})
    for split in ("\x1b[31m", "\u200b", "\r", "\x00"):
        said = privacy.mask_secrets(f"{token[:9]}{split}{token[9:]}")
        assert token[9:] not in said, repr(split)


@pytest.mark.parametrize(("text", "secret"), WITH_CREDENTIALS)
def test_credentials_in_addresses_and_settings_are_masked(text: str, secret: str) -> None:
    forms = [text, json.dumps(text), f"x {text} y"]
    forms += [urllib.parse.quote(text, safe="")] if "://" in text and "?" not in text else []
    for form in forms:
        assert secret not in privacy.mask_secrets(form), form
    assert privacy.find_held_secret([text])
    assert privacy.find_held_secret([urllib.parse.quote(text, safe="")])


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert privacy.mask_secrets(text) == text
    assert privacy.find_held_secret({text: text}) is None


NAMED = (
    "HF_TOKEN", "GH_PAT", "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "DATABASE_URL", "SENTRY_DSN", "SESSION_COOKIE", "PROXY_AUTH",
    "AZURE_STORAGE_CONNECTION_STRING", "SSH_PRIVATE_KEY", "COMET_API_KEY", "NEPTUNE_API_TOKEN", "OPENAI_KEY", "MY_SECRETS",
)  # fmt: skip
NOT_NAMED = (
    "PATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "SSH_AUTH_SOCK", "LS_COLORS", "HF_HOME", "KEYBOARD", "XAUTHORITY",
    "COMPATIBILITY", "MAX_NEW_TOKENS", "GIT_AUTHOR_NAME", "PASSENGERS",
)  # fmt: skip


def test_values_of_the_environment_are_secrets_by_their_names(monkeypatch, tmp_path) -> None:
    values = {name: f"v{n}-{letters(9)}" for n, name in enumerate(NAMED)}
    found = privacy.find_secrets(values | dict.fromkeys(NOT_NAMED, "some-long-value"), [])
    assert dict(found) == {f"${name}": value for name, value in values.items()}
    # a path is where a secret is, and none itself
    assert not list(privacy.find_secrets({"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path)}, []))
    proxy = {"HTTPS_PROXY": "http://me:long-password@proxy:3128"}
    assert list(privacy.find_secrets(proxy, [])) == [("$HTTPS_PROXY", "long-password")]


def test_a_known_secret_is_masked_as_others_spell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'p@ss "w\'ord"\n\x1b/é+line two of it'
    monkeypatch.setenv("PGPASSWORD", secret)
    spelt = [secret, repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False)]
    spelt += [urllib.parse.quote(secret), urllib.parse.quote_plus(secret)]
    spelt += [f"{secret[:5]}\x1b[0m{secret[5:]}", secret.split("\n")[1]]
    for text in spelt:
        assert "line" not in privacy.mask_secrets(f"x {text} y"), text
    assert privacy.find_held_secret({"a": {"b": f"x{secret}"}}) == (
        ("a", "b"),
        "the value of $PGPASSWORD",
    )


def test_masking_takes_a_time_that_grows_with_the_text_alone(benchmark_seconds=10) -> None:
    import time

    for text in ("a://b:" * 150_000, "password" * 100_000, "eyJ" * 300_000, "?token" * 150_000, "SG." * 300_000,
                 "-----BEGIN PRIVATE KEY-----" * 40_000, "hf_" * 300_000, "a" * 900_000, "\x1b[" * 300_000):  # fmt: skip
        began = time.process_time()
        privacy.mask_secrets(text)
        assert time.process_time() - began < benchmark_seconds, text[:20]


def test_settings_of_many_texts_take_little_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is looked through once, not for each text: a tokenizer has 100,000."""
    import time

    for number in range(300):
        monkeypatch.setenv(f"SOME_PATH_{number}", "/usr/bin/env")
    monkeypatch.setenv("PGPASSWORD", "long-password")
    data = {f"<t{n}>": {"content": f"<t{n}>", "special": True} for n in range(20_000)}
    for change in (privacy.make_portable, privacy.mask_each):
        began = time.process_time()
        assert change(data | {"x": ["a long-password"]}) == data | {"x": ["a ***"]}
        assert time.process_time() - began < 5


HOMES = [
    ("/home/user", "~"), ("/home/user/x", "~/x"), ("in /home/user/x, and", "in ~/x, and"), ('"/home/user/x"', '"~/x"'),
    ("file:///home/user/x", "file://~/x"), ("it is in /home/user.", "it is in ~."), ("(/home/user/a:/home/user/b)", "(~/a:~/b)"),
    *((same, same) for same in ("/home/user2/x", "/mnt/backup/home/user/x", "/home/user.old/x", "/home/user-x", "x/home/user/y")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), HOMES)
def test_the_home_folder_is_replaced_where_a_path_begins_with_it(
    text: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert privacy.replace_home(text) == wanted
    portable = privacy.make_portable(text)
    assert privacy.expand_home(portable) == text
    assert portable == (wanted if text.startswith("/home/user/x") or text == "/home/user" else text)
