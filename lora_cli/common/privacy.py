"""Keep secrets and the path of the home folder out of files and messages. Standard library only."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lora_cli.common.shown import HIDDEN, escape

MASK = "***"
SHORTEST = 8
"""The fewest characters of a secret: shorter values are words that occur elsewhere too."""
# Matched as whole parts of a name, so that TOKENIZERS_PARALLELISM does not count
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:TOKEN|PAT|JWT|(?:API|ACCESS|SECRET|PRIVATE|SIGNING|ENCRYPTION|MASTER|ACCOUNT|LICENSE)_?KEY"
    r"|SECRETS?|PASS|PASSPHRASE|CREDENTIALS?|COOKIES?|DSN|CONN(?:ECTION)?_?STR(?:ING)?"
    r"|(?:DATABASE|DB|REDIS|MONGO(?:DB)?|POSTGRES|AMQP|BROKER|WEBHOOK)_UR[IL])(?:$|[_-])"
    r"|PASSWORD|PASSWD|[_-](?:PWD|AUTH|KEY)$",
    re.IGNORECASE,
)
# Names of special tokens, which look like names of secrets
NO_SECRETS = re.compile(r"(?:^|[._-])(?:eos|bos|pad|unk|stop)[_-]?token", re.IGNORECASE)
# A mark, or where a word begins, also one after an escape of JSON (\n), of a text (\x1b) or of an
# address (%3D)
START = (
    r"(?:(?=[?&%\\-])|(?<![A-Za-z0-9])|(?<=\\[abfnrtv])|(?<=%[0-9A-Fa-f]{2})|(?<=\\x..)|(?<=\\u....)"
    r"|(?<=\\U.{8}))"
)
EQUALS = r"(?:=|%3[Dd]|\\u003[Dd])"
COLON, AT = "(?::|%3[Aa])", "(?:@|%40)"
SLASHES = "(?:://?|%3[Aa]%2[Ff]%2[Ff])"  # an address that went through a path has lost one
SHAPES = {
    "a token of Hugging Face": r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}",
    "a key of OpenAI, Anthropic or OpenRouter": (
        r"sk-(?:proj|ant|or|svcacct|admin|None)-[\w-]{12,}|sk-[A-Za-z0-9]{16,}"
    ),
    "a key of Stripe": r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/]{16,}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    "a token of GitLab": r"gl(?:pat|oas|dt|rt|cbt|ptt|ft|imt|agent|soat|ffct)-[\w-]{16,}",
    "a key of AWS": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}",
    "a key of Google": r"AIza[\w-]{30,}|GOCSPX-[\w-]{16,}|ya29\.[\w-]{16,}",
    "a token of Slack": (
        r"xox[a-z]-[\w-]{10,}|xapp-\d-[\w-]{10,}|hooks\.slack\.com/services/[\w/]{16,}"
    ),
    "a key of Weights & Biases": r"wandb_v\d_\w{16,}",
    "a token of Neptune": r"eyJhcGlf[\w+/=-]{16,}",
    "a token of npm": r"npm_[A-Za-z0-9]{16,}",
    "a token of PyPI": r"pypi-[A-Za-z0-9][\w-]{30,}",
    "a key of SendGrid": r"SG\.[\w-]{16,}\.[\w-]{16,}",
    "a token of DigitalOcean": r"do[opr]_v1_[A-Za-z0-9]{16,}",
    "a token of a service": (
        r"hvs\.[\w-]{16,}|dckr_pat_[\w-]{16,}|nvapi-[\w-]{16,}|gsk_[A-Za-z0-9]{16,}"
        r"|r8_[A-Za-z0-9]{16,}|xai-[A-Za-z0-9]{16,}|dapi[0-9a-f]{32}|glsa_\w{16,}|pplx-\w{16,}"
        r"|shp(?:at|ca|pa|ss)_[A-Za-z0-9]{16,}|lin_api_\w{16,}|ntn_\w{16,}|AGE-SECRET-KEY-1\w{16,}"
    ),
    "a JSON web token": r"eyJ[\w-]{6,}\.eyJ[\w-]{4,}\.[\w-]*",
    "a private key": (
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
        r"[\s\S]*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    ),
    "a key of Azure": rf"(?:AccountKey|SharedAccessKey|SharedSecretKey){EQUALS}[\w+/=%]{{8,}}",
    "a password": (
        rf"(?i:\w{{0,20}}?(?:password|passwd|passphrase|pwd){EQUALS})"
        r"(?P<secret>(?![/*$~])[^\s;&\"'<>()\[\]{},\\]{3,})"
    ),
    "credentials in a request": (
        r"(?i:bearer|basic) (?P<secret>(?=[\w.~+/-]*[0-9])[\w.~+/-]{16,}=*)"
    ),
    "credentials in an address": (
        r"(?i:(?:[?&]|%3F|%26|\\u0026)(?:[\w.%-]{0,40}"
        r"(?:token|secret|signature|credential|password|passwd|api_?-?key)"
        rf"|sig|pwd|auth|access_?key|key){EQUALS})(?P<secret>(?!\*)[^\s&#\"'<>\\]{{3,}})"
    ),
    "a name and password in an address": (  # an Azure container stands before @ too
        rf"[A-Za-z][\w+.-]{{1,30}}{SLASHES}"
        rf"(?P<secret>(?:[^\s/@%:\"']|%[0-9A-Fa-f]{{2}}){{0,100}}{COLON}(?!\d+[/?#])"
        rf"[^\s@\"']{{1,200}}?|(?<!abfs://)(?<!abfss://)(?<!az://)[\w-]{{20,}}){AT}"
    ),
}
"""What secrets of known makers look like, as these describe them. Where a part of it is named
`secret`, the rest of it is none."""
KINDS = {name: re.compile(f"{START}(?:{shape})") for name, shape in SHAPES.items()}
# A part of a terminal's language, which hides itself as the characters of HIDDEN do
SEQUENCE = re.compile(rf"\x1b\[[0-?]*[ -/]*[@-~]|{HIDDEN.pattern}")


def find_secrets(
    environment: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (where it was given, value) of every value that the environment or command line names
    as a secret.

    Arguments count as `--token VALUE`, `--token=VALUE` and `--set section.some_token=VALUE`. The
    path of a file is none: what is secret is in it.
    """
    for name, value in (os.environ if environment is None else environment).items():
        is_file = value.startswith(os.sep) and os.path.exists(value)  # noqa: PTH110 - any text
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not is_file:
            yield f"${name}", value
        elif "://" in value and (password := _find_password(value)):
            yield f"${name}", password
    given = sys.argv[1:] if arguments is None else arguments
    for argument, following in zip(given, [*given[1:], ""]):
        name, equals, value = argument.partition("=")
        last = name.rpartition(".")[2].lstrip("-")
        value = value if equals else following if name.startswith("--") else ""
        if SECRET_NAME.search(last) and not NO_SECRETS.search(name) and len(value) >= SHORTEST:
            yield name, value


def _find_password(address: str) -> str | None:
    """Return the password in an address, where it is long enough to be told from a word."""
    found = re.search(r"://[^\s/@:]*:(?!\d+[/?#])([^\s@]+)@", address)
    return found[1] if found and len(found[1]) >= SHORTEST else None


def mask_secrets(text: str) -> str:
    """Return the text with *** in place of every known secret, and of all that has the shape of
    one, also where characters that a terminal does not show stand in it."""
    return _mask(text, _know_secrets())


def _know_secrets() -> re.Pattern[str] | None:
    """Return what finds any secret that the environment or command line has now."""
    return _compile_known(tuple(dict.fromkeys(value for _, value in find_secrets())))


def _mask(text: str, known: re.Pattern[str] | None) -> str:
    spans = list(_find_spans(text, known))
    if SEQUENCE.search(text):
        bare, places = _uncover(text)
        spans += [(places[start], places[end - 1] + 1) for start, end in _find_spans(bare, known)]
    parts, done = [], 0
    for start, end in sorted(spans):
        if start >= done:
            parts += [text[done:start], MASK]
        done = max(done, end)
    return "".join([*parts, text[done:]])


def _uncover(text: str) -> tuple[str, list[int]]:
    """Return what a text shows, and where each character of that stands in it."""
    places: list[int] = []
    end = 0
    for found in SEQUENCE.finditer(text):
        places += range(end, found.start())
        end = found.end()
    places += range(end, len(text))
    return "".join(text[place] for place in places), places


@cache
def _compile_known(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """Compile what finds any of these secrets: as it is, as JSON, Python, an address or our own
    messages spell it, and each long line of it."""
    forms = set()
    for value in values:
        for each in (value, *(line for line in value.splitlines() if len(line) >= 2 * SHORTEST)):
            forms |= {each, repr(each)[1:-1], escape(each), json.dumps(each)[1:-1]}
            forms |= {json.dumps(each, ensure_ascii=False)[1:-1], each.replace("'", "'\"'\"'")}
            forms |= {urllib.parse.quote(each, safe=safe, errors="replace") for safe in ("", "/")}
            forms.add(urllib.parse.quote_plus(each, errors="replace"))
    ordered = sorted(forms, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if forms else None


def _find_spans(text: str, known: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """Yield where secrets stand in a text."""
    for pattern in filter(None, (known, *KINDS.values())):
        group = "secret" if "secret" in pattern.groupindex else 0
        yield from (found.span(group) for found in pattern.finditer(text))


def find_held_secret(data: Any) -> tuple[tuple[str | int, ...], str] | None:
    """Return the place of the first secret in `data` (dicts, lists, scalars), and what it is; None
    where there is none.

    The place is the path of keys to the text that it is in, which may be the last key itself.
    """
    values = dict(find_secrets(arguments=[]))
    known = {name: _compile_known((value,)) for name, value in values.items()}
    for place, text in _walk_texts(data, ()):
        for spelt in dict.fromkeys((text, urllib.parse.unquote(text), SEQUENCE.sub("", text))):
            for name, pattern in known.items():
                if pattern and pattern.search(spelt):
                    return place, f"the value of {name}"
            for name, shape in KINDS.items():
                if shape.search(spelt):
                    return place, f"what looks like {name}"
    return None


def _walk_texts(
    data: Any, place: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield every text in `data`, keys as well, with the path of keys to it."""
    if isinstance(data, str):
        yield place, data
    elif isinstance(data, (dict, list, tuple)):
        named = data.items() if isinstance(data, dict) else enumerate(data)
        for key, inner in named:
            yield from _walk_texts(key, (*place, key))
            yield from _walk_texts(inner, (*place, key))


def map_texts(data: Any, change: Callable[[str], str]) -> Any:
    """Return `data` (dicts, lists, scalars) with every text in it changed, keys as well."""
    if isinstance(data, dict):
        return {map_texts(key, change): map_texts(value, change) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [map_texts(value, change) for value in data]
    return change(data) if isinstance(data, str) else data


def make_portable(data: Any) -> Any:
    """Return `data` (dicts, lists, scalars) as it may be written to a file that travels: without
    secrets, and with ~ for the user's home folder in every text that is a path in it."""
    home, known = _find_home(), _know_secrets()

    @cache  # a tokenizer's settings say the same of thousands of tokens
    def change(text: str) -> str:
        inside = home and (text == home or text.startswith(f"{home}{os.sep}"))
        text = f"~{text[len(home) :]}" if home and inside else text
        # a file's name that is no text cannot be written as one
        return _mask(text.encode("utf-8", "backslashreplace").decode("utf-8"), known)

    return map_texts(data, change)


def mask_each(data: Any) -> Any:
    """Return `data` (dicts, lists, scalars) with every text in it as `mask_secrets` returns it."""
    known = _know_secrets()
    return map_texts(data, lambda text: _mask(text, known))


def replace_home(text: str) -> str:
    """Return prose with ~ for the user's home folder, wherever a path begins with it."""
    home = _find_home()
    if home is None:
        return text
    begins, ends = r"(?:(?<![\w./~@%+-])|(?<=://))", r"(?![\w@%+-]|\.\w)"
    return re.sub(f"{begins}{re.escape(home)}{ends}", "~", text)


def expand_home(path: str) -> str:
    """Return a path that begins with ~/ as the shell would expand it, and any other unchanged."""
    return str(Path(path).expanduser()) if path == "~" or path.startswith(f"~{os.sep}") else path


def _find_home() -> str | None:
    """Return the user's home folder, or None where the user does not have one of their own."""
    home = os.path.expanduser("~").rstrip(os.sep)  # noqa: PTH111 – Path.home() raises where there is none
    return home if home.startswith(os.sep) or ":" in home else None
