"""The endpoints: who may ask, what is asked, and the answers."""

from __future__ import annotations

import asyncio
import hmac
import re
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lora_cli.common import LoraError, find_nearest, privacy, ui
from lora_cli.models import answering
from lora_cli.serve import asked
from lora_cli.serve.desk import Desk, Engine, Job
from lora_cli.serve.errors import ApiError, refuse
from lora_cli.serve.limits import Bodies, Limits, drain
from lora_cli.serve.pieces import End, Piece, Token
from lora_cli.serve.replies import Reply, TextReply, write_event

UNREAD = frozenset({401, 403, 405, 415})
"""Statuses of requests whose body nobody has read."""
UNKNOWN = "unknown_url"
"""The code of such another one, whose status a model that there is not has too."""
Read = Callable[[Mapping[str, Any], int], asked.Wanted]


class Service:
    """The models that are served, to whom, and within which limits."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        limits: Limits,
        key: str | None,
        hosts: Collection[str],
    ) -> None:
        """`engines`: who writes, by the names of models. `hosts`: names that this machine may be
        called by, all where there are none."""
        self.engines, self.limits, self.key, self.hosts = engines, limits, key, hosts
        self.bodies = Bodies(limits)
        self.desk = Desk(_Chosen(engines), limits.places)
        self.preparing = ThreadPoolExecutor(1, "prompts")
        """One prompt is made at a time: that bounds what a long one takes."""

    def make_app(self) -> Starlette:
        """Return the ASGI application."""
        chat = partial(self.answer, asked.read_chat, Reply)
        text = partial(self.answer, asked.read_completion, TextReply)
        app = Starlette(
            routes=[
                Route("/health", self._wrap(self.tell_health, guarded=False)),
                Route("/v1/models", self._wrap(self.list_models)),
                Route("/v1/models/{name:path}", self._wrap(self.tell_model)),
                Route("/v1/chat/completions", self._wrap(chat), methods=["POST"]),
                Route("/v1/completions", self._wrap(text), methods=["POST"]),
            ],
            exception_handlers={404: _tell_unknown, 405: _tell_unknown},
        )
        app.router.redirect_slashes = False
        return app

    def _wrap(self, handle: Callable[[Request], Any], guarded: bool = True) -> Any:
        """Return an endpoint that lets in who may ask, and tells errors as OpenAI's API does."""

        async def endpoint(request: Request) -> Response:
            try:
                self._refuse_stranger(request, guarded)
                return await handle(request)
            except ApiError as error:
                return await _tell(request, error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # noqa: BLE001 – every error has a reply
                return await _tell(request, translate(error))

        return endpoint

    def _refuse_stranger(self, request: Request, guarded: bool) -> None:
        """Raise ApiError where a request comes by another name of this machine (DNS rebinding),
        without the key, or as a browser would send it for another page."""
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        if self.hosts and host not in self.hosts:
            raise ApiError(403, f"{host[:80]} is not served here", "unknown_host")
        if not guarded:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key is not None:
            right = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not right:
                said = "the key is wrong" if given else "there is no key: Authorization: Bearer KEY"
                raise ApiError(401, said, "invalid_api_key")
        if request.method != "POST":
            return
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Content-Type must be application/json", "unsupported_media_type")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "the body must not be compressed", "unsupported_media_type")

    async def tell_health(self, request: Request) -> Response:
        """Say that the server answers."""
        return JSONResponse({"status": "ok"})

    async def list_models(self, request: Request) -> Response:
        """List the names that `model` may have."""
        return JSONResponse({"object": "list", "data": [_describe(name) for name in self.engines]})

    async def tell_model(self, request: Request) -> Response:
        """Describe one of them."""
        return JSONResponse(_describe(self._find(request.path_params["name"])))

    def _find(self, name: str) -> str:
        if name in self.engines:
            return name
        guess = find_nearest(name[:200], self.engines)
        meant = f"did you mean {guess}?" if guess else f"there are {', '.join(self.engines)}"
        said = f"the model {name[:80]} does not exist; {meant}"
        raise ApiError(404, said, "model_not_found", "model")

    async def answer(self, read: Read, kind: type[Reply], request: Request) -> Response:
        """Answer a request, at once or as a stream. Raises ApiError."""
        body = await self.bodies.read(request)
        try:
            loop = asyncio.get_running_loop()
            wanted, prompt = await loop.run_in_executor(self.preparing, self._prepare, read, body)
        finally:
            self.bodies.release(body)
        del body
        job = Job(wanted.model, prompt, wanted.drawing, self.limits.seconds)
        reply = kind(wanted.model, len(prompt), wanted.drawing.top_logprobs is not None)
        self.desk.take(job)
        if wanted.streams:
            return await self._stream(request, job, reply, wanted.counts)
        return await self._answer_whole(request, job, reply)

    def _prepare(self, read: Read, body: bytes) -> tuple[asked.Wanted, list[int]]:
        """Return what is asked, and its prompt as token ids; in the thread for that."""
        wanted = read(asked.parse_body(body), self.limits.max_tokens)
        name = self._find(wanted.model)
        engine = self.engines[name]
        positions = engine.find_positions(name)
        prompt = self._make_prompt(engine, name, wanted)
        if positions is not None and len(prompt) >= positions:
            raise _refuse_long(f"{len(prompt):,}", positions, wanted.field)
        if not prompt:
            raise refuse("the prompt has no tokens", wanted.field)
        return wanted._replace(prompt=[]), prompt

    def _make_prompt(self, engine: Engine, name: str, wanted: asked.Wanted) -> list[int]:
        """Return the prompt as token ids, without a tokenizer for one that is too long in any."""
        given: Any = wanted.prompt
        if isinstance(given, list) and type(given[0]) is int:
            most = engine.count_tokens(name)
            if not all(0 <= each < most for each in given):
                raise refuse(f"token ids are 0 to {most - 1}", "prompt")
            return given
        texts = [given] if isinstance(given, str) else [_find_text(each) for each in given]
        positions, length = engine.find_positions(name), sum(map(len, texts))
        least = -(-length // engine.measure_longest_token(name))
        if positions is not None and least > positions:
            raise _refuse_long(f"at least {least:,}", positions, wanted.field)
        if isinstance(given, str):
            return engine.tokenize(name, given)
        return self._render(engine, name, wanted)

    def _render(self, engine: Engine, name: str, wanted: asked.Wanted) -> list[int]:
        """Return the prompt of a conversation. Raises ApiError where the template takes none."""
        conversation = asked.convert_messages(wanted)
        if engine.get_template(name) is None and len(conversation.messages) > 1:
            said = f"{name} has no chat template: it takes one message, or POST /v1/completions"
            raise refuse(said, "messages")
        if conversation.tools and not engine.reads_tools(name):
            said = f"the chat template of {name} does not read tools: they would be left out"
            raise refuse(said, "tools", "unsupported_value")
        try:
            return engine.render(name, conversation)
        except (TemplateError, LoraError) as error:
            raise refuse(f"the chat template refuses it: {error}", "messages") from None

    async def _answer_whole(self, request: Request, job: Job, reply: Reply) -> Response:
        watch = asyncio.create_task(self._watch(request, job))
        tokens: list[Token] = []
        end: End | None = None
        try:
            async for event in job.read():
                if isinstance(event, End):
                    end = event
                else:
                    tokens += event.tokens
        finally:
            self._end(job, watch)
        assert end is not None, "it is the last event"
        return JSONResponse(reply.write_whole(tokens, end))

    async def _stream(self, request: Request, job: Job, reply: Reply, counts: bool) -> Response:
        """Return a stream, once its first piece is there: until then an error has a status."""
        watch = asyncio.create_task(self._watch(request, job))
        events = job.read()
        try:
            first = await anext(events)
        except BaseException:
            self._end(job, watch)
            raise
        return StreamingResponse(
            self._write_stream(first, events, reply, counts, lambda: self._end(job, watch)),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    async def _write_stream(
        self,
        event: Piece | End,
        events: AsyncIterator[Piece | End],
        reply: Reply,
        counts: bool,
        end: Callable[[], None],
    ) -> AsyncIterator[bytes]:
        text = ""
        try:
            yield reply.write_first()
            while not isinstance(event, End):
                text += event.text
                yield reply.write_piece(event)
                event = await anext(events)
            if event.text != text:
                raise LoraError("the tokenizer changes a text that was sent already")
            end()  # whoever has read all of it may ask again
            yield reply.write_last(event, counts)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 – the status is out: it is told in the stream
            yield write_event(translate(error).to_data())
        finally:
            end()

    def _end(self, job: Job, watch: asyncio.Task[None]) -> None:
        self.desk.leave(job)
        watch.cancel()

    async def _watch(self, request: Request, job: Job) -> None:
        """Give a job's place back when its client goes away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.desk.leave(job)
        job.events.put_nowait(ClientDisconnect())


class _Chosen:
    """All engines as one, for the one thread that has them write."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines

    def write(self, name: str, *given: Any) -> End:
        """Write by the engine of a model."""
        return self.engines[name].write(name, *given)


def _describe(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lora"}


def _find_text(message: Mapping[str, Any]) -> str:
    """Return a message's text, as far as it has one: what is none is refused later."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _refuse_long(said: str, positions: int, field: str) -> ApiError:
    return refuse(
        f"the prompt has {said} tokens, and prompt and answer together may have {positions:,}",
        field,
        "context_length_exceeded",
    )


def translate(error: Exception) -> ApiError:
    """Return what is told of an exception; what nobody has thought of is said on stderr."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, answering.TooLongError):
        return refuse(error.message, None, "context_length_exceeded")
    if isinstance(error, LoraError):
        ui.warn(f"a request failed: {error.message}")
        return ApiError(500, privacy.replace_home(error.message), "failed")
    ui.say(*"".join(traceback.format_exception(error)).splitlines())
    return ApiError(500, "the server failed; its log says why", "internal_error")


async def _tell(request: Request, error: ApiError) -> Response:
    """Return the reply of an error. Where a body may be on its way still, the connection ends."""
    headers = error.list_headers()
    is_unread = error.status in UNREAD or error.code == UNKNOWN
    if request.method == "POST" and is_unread:
        await drain(request)
    if is_unread or error.status in {408, 413, 503}:
        headers["Connection"] = "close"
    return JSONResponse(error.to_data(), error.status, headers)


async def _tell_unknown(request: Request, error: Exception) -> Response:
    """Return the reply for a path or method that there is not."""
    assert isinstance(error, HTTPException), "the router's"
    said = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return await _tell(request, ApiError(error.status_code, said, UNKNOWN))
