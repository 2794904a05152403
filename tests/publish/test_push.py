"""`lora push`: what is sent to the hub, byte for byte; what comes back is the same model; what the
hub refuses is one message.

Hermetic: the loopback hub of tests/hub.py, which takes uploads. Alone: pytest tests/publish
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lora_cli.common import LoraError
from lora_cli.models.hub import HINT, check_answer
from lora_cli.publish import outgoing, private, remote
from lora_cli.recipe import load_recipe
from tests.hub import Commit, File, LoopbackHub, Refusal, Reply
from tests.publish.conftest import BASE, KEY, ROW, TOKEN, Place

ADAPTER, MERGED = "runs/canary/adapter", "runs/canary/merged"
GGUF = "runs/canary/merged/canary-f16.gguf"
LOGITS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, merged = sys.argv[1:]
ids = torch.arange(8, 40)[None]
with torch.no_grad():
    whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
print(json.dumps([each.flatten().tolist() for each in (whole, tuned, plain)]))
"""
CHANGED = """
import os, sys
import huggingface_hub
from lora_cli.cli import main
changes = eval(sys.argv[1])
for name, value in changes.items():
    os.environ.pop(name, None) if value is None else os.environ.update({name: value})
huggingface_hub.constants.HF_HUB_OFFLINE = "HF_HUB_OFFLINE" in changes
huggingface_hub.constants.ENDPOINT = changes.get("HF_ENDPOINT", huggingface_hub.constants.ENDPOINT)
sys.argv = ["lora", *sys.argv[2:]]
main()
"""


@pytest.fixture
def hub(place: Place) -> Iterator[LoopbackHub]:
    """The hub as it is to everybody, with nothing sent yet."""
    place.hub.sent.clear()
    yield place.hub
    place.hub.hostile = place.hub.refusing = None
    place.hub.role = "write"


def unpacked(hub: LoopbackHub) -> bytes:
    """Every byte that was sent; small files stand in the commit in base64, and here as they are."""
    parts = []
    for _, target, body in hub.sent:
        parts.append(target.encode() + b"\n" + body)
        if "/commit/" in target:
            for line in body.splitlines():
                content = json.loads(line)["value"].get("content", "")
                parts.append(base64.b64decode(content))
        elif "/preupload/" in target:
            parts += [base64.b64decode(each["sample"]) for each in json.loads(body)["files"]]
    return b"\n".join(parts)


@pytest.mark.parametrize("path", [ADAPTER, MERGED, GGUF])
def test_nothing_private_is_sent(place: Place, hub: LoopbackHub, path: str) -> None:
    done = place.run(
        "push", path, f"loopback/private-{Path(path).suffix or Path(path).name}", "--yes"
    )
    assert done.returncode == 0, done.stderr
    sent = unpacked(hub)
    weights = place.folder / path
    weights = weights if weights.is_file() else next(weights.glob("*model.safetensors"))
    assert weights.read_bytes() in sent  # what is looked through is what was sent
    assert b"rows.jsonl" in sent
    for canary in (TOKEN, KEY, ROW, str(place.folder), str(place.folder.parent), "private/rows"):
        assert canary.encode() not in sent, canary
    assert not hub.strays


def test_what_was_listed_is_what_is_there_and_nothing_else(
    place: Place, hub: LoopbackHub, tmp_path: Path
) -> None:
    folder = shutil.copytree(place.folder / ADAPTER, tmp_path / "mine")
    for name in ("optimizer.pt", "training_args.bin", "notes.txt", "samples.jsonl"):
        (folder / name).write_text("mine")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "adapter_model.safetensors").write_text("mine")
    done = place.run("push", folder, "loopback/listed", "--yes")
    assert done.returncode == 0, done.stderr
    there = hub.files_of("loopback/listed")
    assert set(there) == {
        *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("chat_template.jinja", "lora_probes.safetensors", "lora_record.json", "tokenizer.json"),
        *("tokenizer.model", "tokenizer_config.json"),
    }
    listed = re.findall(r"^  (\S+) +[\d.,]+ (?:B|MiB)$", done.stderr, re.MULTILINE)
    assert {*listed} == {*there} - {".gitattributes"}
    left = "checkpoint-3, notes.txt, optimizer.pt, samples.jsonl, training_args.bin"
    assert f"not uploaded: {left}" in done.stderr
    assert "9 of 9 files are there as here" in done.stderr
    assert done.stdout.startswith(f"{hub.url}/loopback/listed/commit/")
    assert not hub.is_private("loopback/listed")


def test_what_was_pushed_is_the_same_model(place: Place, hub: LoopbackHub, tmp_path: Path) -> None:
    for path, name in ((ADAPTER, "loopback/same"), (MERGED, "org/same-merged")):
        done = place.run("push", path, name, "--yes", "--private")
        assert done.returncode == 0, done.stderr
    assert hub.is_private("org/same-merged")
    program = tmp_path / "logits.py"
    program.write_text(LOGITS)
    here, there = (
        json.loads(place.run(BASE, *paths, program=str(program)).stdout)
        for paths in ((ADAPTER, MERGED), ("loopback/same", "org/same-merged"))
    )
    assert here == there
    assert here[1] != here[2]  # the adapter changes something
    made = place.run("merge", "loopback/same", tmp_path / "again")
    assert made.returncode == 0, made.stderr
    again = load_file(tmp_path / "again" / "model.safetensors")
    before = load_file(place.folder / MERGED / "model.safetensors")
    assert all(again[name].equal(tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("path", "relation"), [(ADAPTER, "adapter"), (MERGED, "finetune"), (GGUF, "quantized")]
)
def test_the_card_on_the_hub_says_what_is_true(
    place: Place, hub: LoopbackHub, tmp_path: Path, path: str, relation: str
) -> None:
    done = place.run("push", path, f"loopback/card-{relation}", "--yes")
    assert done.returncode == 0, done.stderr
    card = ModelCard(hub.files_of(f"loopback/card-{relation}")["README.md"].decode())
    assert card.data.base_model == BASE
    assert card.data.to_dict()["base_model_relation"] == relation
    assert card.data.license == "apache-2.0"
    assert card.data.language is None
    assert "More Information Needed" not in card.content
    assert "`rows.jsonl`, 8 rows" in card.text
    (tmp_path / "recipe.yaml").write_text(fenced(card.text, "yaml"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.training.max_steps, recipe.model.name_or_path) == (3, BASE)
    if relation != "quantized":
        program = tmp_path / "program.py"
        program.write_text(fenced(card.text, "python"))
        asked = place.run(program=str(program))
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.strip()


def fenced(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def test_what_the_hub_has_is_not_sent_again(place: Place, hub: LoopbackHub, tmp_path: Path) -> None:
    folder = retrained(place.folder / ADAPTER, tmp_path / "other")
    hub.refusing = refusing("/commit/", 413)
    done = place.run("push", folder, "loopback/again", "--yes")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "error: the hub takes no file of this size: no\n\n"
        "hint: lora export-gguf -q Q4_K_M makes smaller ones\n"
    )
    sent = [target for method, target, _ in hub.sent if method == "PUT"]
    assert sent
    hub.refusing = None
    done = place.run("push", folder, "loopback/again", "--yes")
    assert done.returncode == 0, done.stderr
    assert [target for method, target, _ in hub.sent if method == "PUT"] == sent
    third = place.run("push", folder, "loopback/again", "--yes")
    assert third.stdout == done.stdout  # the same commit: nothing had changed


def retrained(adapter: Path, folder: Path) -> Path:
    """A copy with other weights, that no hub has."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    changed = {name: tensor * 1.01 for name, tensor in weights.items()}
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def refusing(part: str, status: int):
    """A hub that refuses what is posted to an address with `part` in it."""
    return lambda method, target: (
        Refusal(status, "", "no") if part in target and method == "POST" else None
    )


def plant(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text((folder / name).read_text() + text)


PLANTED = {
    "a secret of the environment": (
        lambda folder: plant(folder, "chat_template.jinja", "\n{# " + KEY + " #}"),
        "chat_template.jinja:14 holds the value of $SERVICE_API_KEY",
    ),
    "the shape of a token": (
        lambda folder: plant(folder, "chat_template.jinja", "\n\n{# ghp_" + "a1B2" * 9 + " #}"),
        "chat_template.jinja:15 holds what looks like a token of GitHub",
    ),
    "a secret of the environment among words": (
        lambda folder: plant(folder, "tokenizer.json", "\n\n" + KEY),
        "tokenizer.json:",
    ),
    "a secret before weights": (
        lambda folder: save_file(
            load_file(folder / "adapter_model.safetensors"),
            folder / "adapter_model.safetensors",
            {"format": "pt", "note": KEY},
        ),
        "adapter_model.safetensors holds the value of $SERVICE_API_KEY",
    ),
    "the home folder in what was written by hand": (
        lambda folder: plant(folder, "README.md", f"\nsee {folder.parent}/log\n"),
        "holds a folder of this machine",
    ),
}


SPELT = {
    "after a line's end in JSON": json.dumps({"chat_template": "hello\n/home/ada/notes"}),
    "after a tab of a template in JSON": json.dumps({"chat_template": "{{ '\\t/home/ada/x' }}"}),
    "slashes of JSON": '{"a": "\\/home\\/ada\\/notes"}',
    "an address": "see file:///home/ada/notes",
    "an address with a machine": "see file://localhost/home/ada/notes",
    "an address's spelling": "see %2Fhome%2Fada%2Fnotes",
}


@pytest.mark.parametrize("how", SPELT)
def test_a_place_is_found_however_it_is_spelt(how: str) -> None:
    sent = outgoing.Outgoing("tokenizer_config.json", SPELT[how].encode())
    with pytest.raises(LoraError, match="holds a folder of this machine, /home/ada"):
        private.refuse_private([sent], ["/home/ada"])
    other = outgoing.Outgoing("tokenizer_config.json", b"https://a.example/home/ada, x/home/ada")
    private.refuse_private([other], ["/home/ada"])


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_private_stops_the_push(place: Place, hub: LoopbackHub, what: str) -> None:
    change, said = PLANTED[what]
    folder = place.folder / "planted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.folder / ADAPTER, folder)
    change(folder)
    done = place.run("push", folder, "loopback/planted", "--yes")
    if what.endswith("among words"):  # such a file is refused before, as it is no JSON
        assert done.returncode == 1
    else:
        assert said in done.stderr
        assert "nothing was uploaded" in done.stderr
    assert (KEY not in done.stderr) and done.returncode == 1
    assert not [target for _, target, _ in hub.sent if "/api/models/" in target]


def test_a_base_in_a_folder_is_named_or_refused(
    place: Place, hub: LoopbackHub, tmp_path: Path, tiny: Path
) -> None:
    recipe = (place.folder / "recipe.yaml").read_text().replace(BASE, str(tiny / "model"))
    (place.folder / "local.yaml").write_text(recipe.replace("runs/canary", "runs/local"))
    done = place.run("train", "local.yaml")
    assert done.returncode == 0, done.stderr
    refused = place.run("push", "runs/local/adapter", "loopback/local", "--yes")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: the base of runs/local/adapter, model, is a folder of this machine: nobody else "
        "could load the adapter\n\n"
        "hint: --base-name OWNER/NAME, what the base is called on the hub\n"
    )
    done = place.run("push", "runs/local/adapter", "loopback/local", "--yes", "--base-name", BASE)
    assert done.returncode == 0, done.stderr
    assert str(tiny).encode() not in unpacked(hub)
    there = hub.files_of("loopback/local")
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert ModelCard(there["README.md"].decode()).data.base_model == BASE
    made = place.run("merge", "loopback/local", tmp_path / "merged")
    assert made.returncode == 0, made.stderr
    assert "warning" not in done.stderr
    other = tmp_path / "other"
    shutil.copytree(tiny / "model", other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    hub.add_model("org/other", {"main": other})
    done = place.run(
        "push", "runs/local/adapter", "loopback/o", "--dry-run", "--base-name", "org/other"
    )
    assert "warning: org/other does not have the same files of weights as" in done.stderr


def test_what_a_person_wrote_in_the_card_stays(place: Place, hub: LoopbackHub) -> None:
    folder = place.folder / "mine"
    shutil.copytree(place.folder / ADAPTER, folder)
    card = (folder / "README.md").read_text()
    mine = card.replace("library_name: peft", "language: de\nlibrary_name: peft") + "\n## By hand\n"
    (folder / "README.md").write_text(mine)
    done = place.run("push", folder, "loopback/mine", "--yes")
    assert done.returncode == 0, done.stderr
    assert "README.md: kept what you have written: metadata and text" in done.stderr
    there = hub.files_of("loopback/mine")["README.md"].decode()
    assert "\n## By hand\n" in there
    assert ModelCard(there).data.to_dict()["language"] == "de"
    assert "'loopback/mine'" in there  # ours was made anew
    (folder / "README.md").write_text("# Mine alone\n")
    done = place.run("push", folder, "loopback/mine", "--yes")
    assert (
        "README.md was written by hand here and on the hub: the one on the hub stays" in done.stderr
    )
    assert hub.files_of("loopback/mine")["README.md"].decode() == there


def test_the_card_is_printed_or_written(place: Place, tmp_path: Path) -> None:
    printed = place.run("card", MERGED)
    assert printed.returncode == 0, printed.stderr
    assert ModelCard(printed.stdout).data.base_model == BASE
    out = tmp_path / "card.md"
    assert place.run("card", MERGED, "-o", out).stdout == f"{out}\n"
    assert out.read_text() == printed.stdout
    plant(tmp_path, "card.md", "\nBy hand.\n")
    done = place.run("card", ADAPTER, "-o", out)
    assert done.stderr == f"{out}: kept what you have written: text\n"
    assert ModelCard(out.read_text()).data.library_name == "peft"
    assert "\nBy hand.\n" in out.read_text()
    for wrong in ("runs/canary", "private/rows.jsonl", "gone"):
        done = place.run("card", wrong)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 3


def test_a_branch_is_made(place: Place, hub: LoopbackHub) -> None:
    done = place.run("push", ADAPTER, "loopback/branched", "--yes", "--branch", "v2")
    assert done.returncode == 0, done.stderr
    assert set(hub.files_of("loopback/branched")) == {".gitattributes"}
    assert "adapter_model.safetensors" in hub.files_of("loopback/branched", "v2")


def test_gguf_files_go_along(place: Place, hub: LoopbackHub) -> None:
    done = place.run("push", ADAPTER, "loopback/both", "--yes", "--gguf", GGUF)
    assert done.returncode == 0, done.stderr
    there = hub.files_of("loopback/both")
    assert {"canary-f16.gguf", "canary-f16.gguf.json", "Modelfile"} <= set(there)
    card = there["README.md"].decode()
    assert "llama-server -hf loopback/both -hff canary-f16.gguf" in card
    assert "mean KL" in card
    assert "gguf" in ModelCard(card).data.tags


def test_a_dry_run_and_nobody_to_ask_send_nothing(place: Place, hub: LoopbackHub) -> None:
    before = len(hub.requests)
    done = place.run("push", ADAPTER, "loopback/dry", "--dry-run")
    assert done.returncode == 0
    assert "adapter_model.safetensors" in done.stderr
    assert "nothing was uploaded" in done.stderr
    done = place.run("push", ADAPTER, "loopback/dry")
    assert done.returncode == 2
    assert done.stderr == (
        "error: nobody is there to be asked\n\nhint: --yes uploads, --dry-run lists\n"
    )
    assert not [each for each in hub.requests[before:] if "dry" in each[1]]
    assert not hub.sent


ANSWERS = """
import io, sys
from lora_cli.cli import main
class Terminal(io.StringIO):
    def isatty(self):
        return True
sys.stdin = Terminal(sys.argv[1])
sys.argv = ["lora", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(
    ("answer", "sent"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_a_person_is_asked(
    place: Place, hub: LoopbackHub, tmp_path: Path, answer: str, sent: bool
) -> None:
    program = tmp_path / "answers.py"
    program.write_text(ANSWERS)
    name = f"loopback/asked-{len(answer)}{answer[:1].strip()}"
    done = place.run(answer, "push", ADAPTER, name, program=str(program))
    assert done.returncode == 0, done.stderr
    listed, _, after = done.stderr.partition("upload? [y/N] ")
    assert "adapter_model.safetensors" in listed
    assert ("nothing was uploaded" in after) is not sent
    assert any("/commit/" in target for _, target, _ in hub.sent) is sent
    assert any(target == "/api/repos/create" for _, target, _ in hub.sent) is sent


def test_an_altered_file_on_the_hub_is_noticed(place: Place, hub: LoopbackHub) -> None:
    def answer(method: str, target: str, reply: Reply) -> Reply:
        if "/tree/" not in target:
            return reply
        entries = json.loads(reply.body)
        entries[0 if "lfs" in entries[0] else 1]["oid"] = "0" * 40
        for entry in entries:
            entry.get("lfs", {}).update(oid="0" * 64)
        return reply._replace(body=json.dumps(entries).encode())

    hub.hostile = answer
    done = place.run("push", ADAPTER, "loopback/altered", "--yes")
    assert done.returncode == 1
    assert "does not hold" in done.stderr
    assert "adapter_model.safetensors" in done.stderr


LOGIN = "hint: hf auth login, with a token that may write"
AGAIN = "hint: run it again: what the hub has already is not sent again"
WRONG: dict[str, tuple[list[str], dict, str, str]] = {
    "no owner": ([ADAPTER, "tuned"], {}, "tuned is no name on the hub", "hint: give OWNER/NAME"),
    "three parts": ([ADAPTER, "a/b/c"], {}, "a/b/c is no name on the hub", "hint: give OWNER/NAME"),
    "no artefact": (["private", "a/b"], {}, "private is neither a model nor an adapter", "hint: "),
    "nothing there": (["gone", "a/b"], {}, "gone is no adapter, merged model or GGUF", "hint: "),
    "no token": ([ADAPTER, "a/b"], {"HF_TOKEN": None}, "there is no token to upload with", LOGIN),
    "offline": ([ADAPTER, "a/b"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "hint: unset"),
    "nobody answers": (
        [ADAPTER, "a/b"],
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "the hub cannot be reached: no connection",
        AGAIN,
    ),
    "another's": ([ADAPTER, "strange/b"], {}, "the token may not write to strange/b", LOGIN),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_message_and_a_fix(place: Place, hub: LoopbackHub, tmp_path: Path, what: str) -> None:
    words, changes, said, hint = WRONG[what]
    program = tmp_path / "changed.py"
    program.write_text(CHANGED)
    done = place.run(repr(changes), "push", *words, "--yes", program=str(program))
    error = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert done.returncode in (1, 2)
    assert error[0].startswith(f"error: {said}")
    assert error[2].startswith(hint)
    assert len(error) == 3
    assert not [target for _, target, _ in hub.sent if "/commit/" in target]


def fail_at(error: Exception):
    def fail(*given: object, **named: object):
        raise error

    return fail


NONSENSE = {  # what huggingface_hub makes of them, seen with a server that answered so
    "a list": lambda *given: [1],
    "nothing": lambda *given: None,
    "a login page": fail_at(json.JSONDecodeError("Expecting value", "<html>", 0)),
    "an object without its parts": fail_at(KeyError("id")),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_what_answers_as_no_hub_does_is_one_message(monkeypatch, what: str) -> None:
    monkeypatch.setattr(remote, "get_token", lambda: TOKEN)
    monkeypatch.setattr(remote.HfApi, "whoami", NONSENSE[what])
    with pytest.raises(LoraError, match="does not answer as a hub does") as caught:
        remote.find_account()
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_a_login_page_in_place_of_the_hub_is_no_file_to_look_into() -> None:
    request = httpx2.Request("GET", "https://hub.example/api/whoami-v2")
    page = httpx2.ByteStream(b"<html>log in</html>")
    with pytest.raises(LoraError, match="not valid JSON") as caught:
        check_answer(httpx2.Response(200, request=request, stream=page))
    assert caught.value.hint == HINT, "it was `less` of an address"


ANSWERED = {
    429: "the hub has had too many requests: no",
    413: "the hub takes no file of this size: no",
    403: "the token may not write to loopback/answered: no",
    409: "loopback/answered is being changed by somebody else: no",
    412: "loopback/answered has changed meanwhile: no",
    422: "the hub refuses what was sent to loopback/answered: no",
}


@pytest.mark.parametrize("status", ANSWERED)
def test_what_the_hub_refuses_is_one_message(place: Place, hub: LoopbackHub, status: int) -> None:
    hub.refusing = refusing("/commit/", status)
    done = place.run("push", ADAPTER, "loopback/answered", "--yes")
    assert done.returncode == 1
    assert f"error: {ANSWERED[status]}\n\nhint: " in done.stderr


def test_a_token_that_reads_and_a_public_repository(place: Place, hub: LoopbackHub) -> None:
    done = place.run("push", ADAPTER, "loopback/public", "--yes")
    assert done.returncode == 0, done.stderr
    done = place.run("push", ADAPTER, "loopback/public", "--yes", "--private")
    assert "error: loopback/public is there already, and public" in done.stderr
    hub.role = "read"
    done = place.run("push", ADAPTER, "loopback/public", "--yes")
    assert f"error: the token only reads\n\n{LOGIN}\n" in done.stderr


def test_a_token_that_the_hub_does_not_know(place: Place, hub: LoopbackHub) -> None:
    hub.refusing = lambda method, target: (
        Refusal(401, "", "Invalid credentials in Authorization header")
        if "whoami" in target
        else None
    )
    done = place.run("push", ADAPTER, "loopback/unknown", "--yes")
    said = "the hub does not know this token: Invalid credentials in Authorization header"
    assert done.stderr.endswith(f"error: {said}\n\n{LOGIN}\n")
    assert TOKEN not in done.stderr


def test_two_pushes_at_once_lose_nothing(place: Place, hub: LoopbackHub) -> None:
    """Another's commit between the look and ours."""
    assert place.run("push", MERGED, "loopback/two", "--yes").returncode == 0
    theirs = []

    def commit(method: str, target: str) -> None:
        if "/preupload/" in target and not theirs:
            repository = hub._repositories["model", "loopback/two"]
            files = {**repository.at("main").files, "theirs.txt": File.of("theirs.txt", b"mine")}
            repository.add("main", Commit("theirs", files))
            theirs.append(target)

    hub.refusing = commit
    done = place.run("push", ADAPTER, "loopback/two", "--yes")
    assert done.returncode == 1
    assert "error: loopback/two has changed meanwhile: A commit has happened since" in done.stderr
    again = place.run("push", ADAPTER, "loopback/two", "--yes")
    assert again.returncode == 0, again.stderr
    assert hub.files_of("loopback/two")["theirs.txt"] == b"mine"


def test_a_damaged_adapter_is_not_pushed(place: Place, hub: LoopbackHub, tmp_path: Path) -> None:
    folder = shutil.copytree(place.folder / ADAPTER, tmp_path / "cut")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = place.run("push", folder, "loopback/cut", "--yes")
    assert done.returncode == 1
    assert "is damaged or cut off" in done.stderr
    assert not hub.sent
