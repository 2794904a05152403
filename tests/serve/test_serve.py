"""`lora serve` as OpenAI's own client sees it: the answers of `lora generate`, whole and streamed,
by several adapters of one base at a time; what it refuses, and how it ends.

Hermetic: the tiny model, adapters with random weights, processes on free ports of this machine.
Alone: pytest tests/serve/test_serve.py
"""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.evaluate import answerers, open_answerers
from tests.serve.serving import KEY, Served, make_adapter, make_endless

PROMPTS = ["Reverse: red dog", "Copy: map bus gas ice zoo mud red", "Sort: zoo cat", "café ☃ 🙂"]
MOST = 24
NAMES = ("plain", "dora", "model")


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "plain": make_adapter(tiny / "model", folder / "plain", 1),
        "dora": make_adapter(tiny / "model", folder / "dora", 2, dora=True),
        "model": tiny / "model",
    }


@pytest.fixture(scope="module")
def served(paths: dict[str, Path]) -> Iterator[Served]:
    made = Served(paths["plain"], "--adapter", f"dora={paths['dora']}", "--max-new-tokens", 400)
    yield made
    assert made.end(signal.SIGINT) == 130
    assert "Traceback" not in made.said


@pytest.fixture(scope="module")
def answers(paths: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What `lora generate` says to each prompt alone."""
    opened = open_answerers.open_models([str(path) for path in paths.values()])
    sampling = answerers.Sampling(MOST, 0.0)
    found = {
        (name, prompt): opened[str(path)].answer([answerers.Asked(ask(prompt))], sampling)[0]
        for name, path in paths.items()
        for prompt in PROMPTS
    }
    assert len(set(found.values())) > 2 * len(PROMPTS)  # the adapters change them
    return found


def ask(prompt: str) -> list:
    return [{"role": "user", "content": prompt}]


def complete(served: Served, name: str, prompt: str, **more):
    given = {"temperature": 0, "max_tokens": MOST} | more
    return served.client.chat.completions.create(model=name, messages=ask(prompt), **given)


def join(chunks) -> tuple[str, str | None, list]:
    """The text of a stream, why it ended, and its log-probabilities."""
    text, reason, told = "", None, []
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            told += choice.logprobs.content if choice.logprobs else []
    return text, reason, told


def test_models_are_listed(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["plain", "dora", "model"]
    assert served.client.models.retrieve("dora").owned_by == "lora"


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_lora_generate(served: Served, answers, name: str) -> None:
    for prompt in PROMPTS:
        assert complete(served, name, prompt).choices[0].message.content == answers[name, prompt]


def test_an_answer_is_that_of_the_command_line(served: Served, paths, lora) -> None:
    done = lora("generate", paths["dora"], "-p", PROMPTS[0], "--json", "--max-new-tokens", MOST)
    said = json.loads(done.stdout)["answer"]
    assert complete(served, "dora", PROMPTS[0]).choices[0].message.content == said


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_the_whole_answer(served: Served, name: str) -> None:
    for prompt in PROMPTS:
        whole = complete(served, name, prompt, logprobs=True, top_logprobs=3)
        given = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(complete(served, name, prompt, logprobs=True, top_logprobs=3, **given))
        choice = whole.choices[0]
        assert join(chunks) == (
            choice.message.content, choice.finish_reason, choice.logprobs.content
        )  # fmt: skip
        assert chunks[-1].usage == whole.usage
        ended = choice.finish_reason == "stop"
        assert whole.usage.completion_tokens == len(choice.logprobs.content) + ended


def test_log_probabilities_are_those_of_a_plain_forward(served: Served, paths) -> None:
    base = AutoModelForCausalLM.from_pretrained(paths["model"])
    model = PeftModel.from_pretrained(base, paths["dora"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    given = complete(served, "dora", PROMPTS[2], logprobs=True, top_logprobs=5)
    ids = tokenizer.apply_chat_template(ask(PROMPTS[2]), add_generation_prompt=True)["input_ids"]
    told = given.choices[0].logprobs.content
    assert len(told) > 5
    for token in told:
        with torch.no_grad():
            row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
        best = torch.topk(row, 5)
        assert [each.token for each in token.top_logprobs] == [
            tokenizer.decode([each]) for each in best.indices
        ]
        for each, expected in zip(token.top_logprobs, best.values):
            assert each.logprob == pytest.approx(float(expected), abs=1e-4)
        assert token.logprob == token.top_logprobs[0].logprob
        ids.append(int(best.indices[0]))


def test_an_answer_ends_before_a_stop_string(served: Served, answers) -> None:
    """Also where that begins amid a token and ends amid another."""
    text = answers["dora", PROMPTS[2]]
    spanning = 0
    for start in range(2, len(text) - 4, 3):
        stop = text[start : start + 4]
        whole = complete(served, "dora", PROMPTS[2], stop=[stop, "never said"], logprobs=True)
        expected = text.partition(stop)[0]
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "stop"
        told = whole.choices[0].logprobs.content
        assert "".join(token.token for token in told).startswith(expected)
        assert "".join(token.token for token in told[:-1]) in expected
        spanning += "".join(token.token for token in told) != expected
        chunks = complete(served, "dora", PROMPTS[2], stop=stop, logprobs=True, stream=True)
        assert join(chunks) == (expected, "stop", told)
    assert spanning > 1


def test_text_completions(served: Served, paths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    create = served.client.completions.create
    given = {"model": "plain", "max_tokens": 12, "temperature": 0}
    text = create(prompt="red dog sun", **given)
    ids = create(prompt=tokenizer("red dog sun")["input_ids"], logprobs=2, **given)
    assert text.choices[0].text == ids.choices[0].text != ""
    told = ids.choices[0].logprobs
    assert "".join(told.tokens) == text.choices[0].text
    assert all(len(top) == 2 for top in told.top_logprobs)
    stream = create(prompt=["red dog sun"], stream=True, **given)
    assert "".join(chunk.choices[0].text for chunk in stream) == text.choices[0].text
    assert text.usage.prompt_tokens == len(tokenizer("red dog sun")["input_ids"])


def test_a_seed_repeats_an_answer(served: Served) -> None:
    def draw(seed: int, **more) -> str:
        given = {"temperature": 1.5, "seed": seed} | more
        return complete(served, "plain", PROMPTS[0], **given).choices[0].message.content

    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(6, top_p=0.0) == draw(7, top_p=0.0)  # the likeliest token alone is left


def test_many_at_a_time_get_their_own_answers(served: Served, answers) -> None:
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES] * 2
    assert len(asked) == 24

    def get(pair: tuple[str, str]) -> str:
        if len(pair[1]) % 2:
            return join(complete(served, *pair, stream=True))[0]
        return complete(served, *pair).choices[0].message.content

    with ThreadPoolExecutor(len(asked)) as pool:
        given = list(pool.map(get, asked))
    assert given == [answers[pair] for pair in asked]


# What is refused ----------------------------------------------------------------------------------

REFUSED = {
    "n": ({"n": 2}, "n is not supported here but for 1, null"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    "audio": ({"modalities": ["audio"]}, "modalities is not supported"),
    "effort": ({"reasoning_effort": "low"}, "reasoning_effort is not supported here but for null"),
    "unknown": ({"temprature": 0}, "temprature is not known here; did you mean temperature?"),
    "hot": ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "text": ({"temperature": "0"}, "temperature: Input should be a valid number"),
    "none": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "two": ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens and max_completion_tokens"),
    "stops": ({"stop": list("abcde")}, "stop: Value should have at most 4 items"),
    "empty": ({"stop": ""}, "stop.0: String should have at least 1 character"),
    "top": ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    "forced": ({"tool_choice": "required"}, "tool_choice can be auto or none"),
    "options": ({"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
    "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
    "role": ({"messages": [{"role": "king", "content": "a"}]}, "the role 'king' is not known"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "has a part of the type 'image_url'",
    ),
    "answered": (
        {"messages": [*ask("a"), {"role": "assistant", "content": "b"}]},
        "the last message is the assistant's",
    ),
    "long": ({"messages": ask("dog " * 600)}, "prompt and answer together may have 512"),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "the chat template of plain does not read tools: they would be left out",
    ),
    "very long": ({"messages": ask("dog " * 10**6)}, "the prompt has at least"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_ignored_is_refused(served: Served, case: str) -> None:
    given, said = REFUSED[case]
    body = {"model": "plain", "messages": ask("a"), **given}
    status, reply, _ = post(served, json.dumps(body).encode())
    assert status == 400
    assert said in reply["error"]["message"]
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["code"]


@pytest.mark.parametrize("times", [600, 10**6])
def test_the_field_that_is_too_long_is_named(served: Served, times: int) -> None:
    text = "dog " * times
    for given in ({"prompt": text}, {"messages": ask(text)}):
        path = "/v1/completions" if "prompt" in given else "/v1/chat/completions"
        _, reply, _ = post(served, json.dumps({"model": "plain", **given}).encode(), path)
        assert reply["error"]["code"] == "context_length_exceeded"
        assert [reply["error"]["param"]] == list(given)


@pytest.mark.parametrize("prompt", [5, None, {}, [], [1, "a"]])
def test_a_prompt_that_is_none_is_named_as_the_field_it_is(served: Served, prompt) -> None:
    body = json.dumps({"model": "plain", "prompt": prompt}).encode()
    status, reply, _ = post(served, body, "/v1/completions")
    assert status == 400
    assert reply["error"]["param"] == "prompt", "not prompt.str"
    assert reply["error"]["message"] == "a prompt is a text, or a list of token ids"


def post(served: Served, body: bytes, path: str = "/v1/chat/completions", **headers):
    given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = urllib.request.Request(served.url + path, body, given)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


RAW = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', 400, "it is not UTF-8"),
    "half a character": (b'{"a": "\\ud800"}', 400, "the body is not JSON"),
    "NaN": (b'{"temperature": NaN}', 400, "NaN is no number of JSON"),
    "deep": (b"[" * 100_000, 400, "nested too deeply"),
    "a list": (b"[]", 400, "not a JSON object"),
    "no model": (b'{"messages": [{"role": "user", "content": "a"}]}', 400, "model: Field required"),
    "too large": (b'{"a": "' + b"x" * 10**7 + b'"}', 413, "the body has over 8,000,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_a_body_that_is_none(served: Served, case: str) -> None:
    body, expected, said = RAW[case]
    status, reply, _ = post(served, body)
    assert (status, said in reply["error"]["message"]) == (expected, True), reply


def test_who_may_not_ask(served: Served) -> None:
    body = json.dumps({"model": "plain", "messages": ask("a")}).encode()
    for given, expected, code in (
        ({"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"Authorization": ""}, 401, "invalid_api_key"),
        ({"Authorization": KEY}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer \xfc"}, 401, "invalid_api_key"),
        ({"Host": "evil.example"}, 403, "unknown_host"),
        ({"Content_Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content_Encoding": "gzip"}, 415, "unsupported_media_type"),
    ):
        status, reply, headers = post(served, body, **given)
        assert (status, reply["error"]["code"]) == (expected, code), given
        assert "access-control-allow-origin" not in headers
    with pytest.raises(openai.AuthenticationError):
        served.client.with_options(api_key="wrong").models.list()
    with urllib.request.urlopen(f"{served.url}/health") as reply:
        assert json.load(reply) == {"status": "ok"}


def test_what_there_is_not(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="the model plane does not exist; did you mean"):
        complete(served, "plane", "a")
    assert post(served, b"{}", "/v1/embeddings")[1]["error"]["code"] == "unknown_url"
    assert post(served, b"{}", "/v1/models")[0] == 405
    # without /v1: a body on its way is read, or its client would not see the reply
    for _ in range(5):
        status, reply, headers = post(served, b"x" * 2**23, "/chat/completions")
        assert (status, reply["error"]["code"]) == (404, "unknown_url")
        assert headers["Connection"] == "close"


FIELDS = (
    "model messages max_tokens temperature top_p seed stop n stream stream_options logprobs user "
    "top_logprobs tools tool_choice response_format logit_bias prompt echo suffix best_of audio x"
).split()
VALUES = [
    *(None, True, False, 0, 1, -1, 2**70, -(2**63), 1e308, 0.5, "", "a", "\0", "dog " * 600),
    *([], {}, [None], ["a"], [["a"]], [1, 2], [[1, 2]], [10**9], {"a": 1}, ["a"] * 5),
    *({"type": "text"}, {"include_usage": True}, [{"type": "function", "function": {"name": "f"}}]),
    [{"role": "user"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "a", "tool_calls": [1]}],
    [{"role": "system", "content": "<|end|>"}],
    [{"role": "tool", "content": "a"}],
]


def test_whatever_is_asked_has_an_answer_or_a_reason(served: Served) -> None:
    random, statuses = Random(3), []
    for _ in range(150):
        path, name = random.choice([("/chat/completions", "messages"), ("/completions", "prompt")])
        body = {"model": "plain", name: ask("a") if name == "messages" else "a", "max_tokens": 3}
        body |= {random.choice(FIELDS): random.choice(VALUES) for _ in range(random.choice([1, 2]))}
        try:
            status, reply, _ = post(served, json.dumps(body).encode(), f"/v1{path}")
        except json.JSONDecodeError:  # a stream
            continue
        statuses.append(status)
        assert status in (200, 400, 404), (body, reply)
        assert status == 200 or reply["error"]["message"]
    assert statuses.count(200) > 3
    assert statuses.count(400) > 50


# The end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless(tiny / "model", tmp_path_factory.mktemp("endless") / "endless")


def test_a_client_that_goes_away_frees_its_place_and_a_signal_ends_an_answer(
    endless: Path,
) -> None:
    served = Served(
        endless, "--max-requests", 1, "--grace", 0.5, "--max-new-tokens", 50_000, key=None
    )
    key = served.said.partition("this time: ")[2].split()[0]
    client = served.client.with_options(api_key=key)
    given = {"model": "endless", "messages": ask("red"), "temperature": 0}

    def begin():
        stream = client.chat.completions.create(**given, max_tokens=50_000, stream=True)
        next(stream)
        return stream

    for _ in range(3):
        stream = begin()
        with pytest.raises(openai.InternalServerError, match="wait already") as caught:
            client.chat.completions.create(**given, max_tokens=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        stream.close()
        retrying = client.with_options(max_retries=5)
        reply = retrying.chat.completions.create(**given, max_tokens=2)
        assert reply.usage.completion_tokens == 2
        assert reply.choices[0].finish_reason == "length"
    stream = begin()
    served.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server has ended"):
        list(stream)
    assert served.process.wait(30) == 143
    served.heard.join(10)
    assert "Traceback" not in served.said
    assert served.said.endswith("terminated\n")
