"""The verb that serves models: serve."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lora_cli.cli.options import (
    ApiKey,
    BaseModel,
    Grace,
    Host,
    LongestContext,
    MaxBody,
    MaxNewTokens,
    MaxRequests,
    MoreAdapters,
    NoApiKey,
    OtherEngine,
    Port,
    RequestTime,
    TrustRemoteCode,
)
from lora_cli.cli.start import quiet_libraries

verbs = typer.Typer()


@verbs.command()
def serve(
    path: Annotated[str, typer.Argument(help="Base, adapter, merged folder or .gguf file.")],
    adapter: MoreAdapters = None,
    base: BaseModel = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    no_api_key: NoApiKey = False,
    max_new_tokens: MaxNewTokens = 1024,
    max_context: LongestContext = None,
    max_body: MaxBody = 8.0,
    max_requests: MaxRequests = 64,
    timeout: RequestTime = 600.0,
    grace: Grace = 10.0,
    show: Annotated[
        Optional[OtherEngine],
        typer.Option("--print", help="Print the command of another engine, and serve nothing."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer OpenAI's API (chat completions, completions, models) on this machine."""
    quiet_libraries()
    if show is not None:
        from lora_cli.serve import commands

        commands.show(path, adapter or [], base, show.value)
        return
    from lora_cli.serve import serve

    address = serve.settle_address(host, port, api_key, no_api_key)
    sizes = serve.Sizes(max_body, max_new_tokens, max_context, timeout, max_requests, grace)
    serve.serve(path, adapter or [], base, address, sizes)
