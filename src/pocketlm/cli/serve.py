"""A model behind an OpenAI-compatible API and a chat page."""

from __future__ import annotations

from typing import Annotated

import typer

from pocketlm.cli import flags
from pocketlm.cli.options import Device, Dtype, Json, Model, Revision, TrustRemoteCode
from pocketlm.cli.output import Answer, stderr

_LIMITS = "Limits"


def run(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; the default: this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    engine: Annotated[
        str,
        typer.Option("--engine", help="vllm, pocketlm, or auto: vLLM where it can."),
    ] = "auto",
    name: Annotated[
        str | None,
        typer.Option("--name", help="What clients call the model; default: its directory's name."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="POCKETLM_API_KEY",
            help="What clients must bring. Other users of this machine see arguments: use the "
            "variable.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            min=1,
            help="Answers written at once; default: as memory allows, up to 64.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Tokens of a prompt and its answer; default: the model's, as memory allows.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    queue: Annotated[
        int,
        typer.Option("--queue", min=1, help="Requests that may wait.", rich_help_panel=_LIMITS),
    ] = 128,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=1.0,
            help="Seconds that a request may take; then its answer ends.",
            rich_help_panel=_LIMITS,
        ),
    ] = 600.0,
    device: Device = "auto",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json: Json = False,
) -> Answer:
    """Serve a model to OpenAI's clients, with a page to chat at /.

    By vLLM where it is installed and can load the artifact, else by pocketlm's own runtime.

    Example: [bold]pocketlm serve out[/bold]
    """
    flags.check_machine(device, dtype)
    import torch

    from pocketlm.serve.run import ENGINES, ServeOptions, serve

    flags.one_of(engine, ENGINES, "--engine")
    console = stderr()
    options = ServeOptions(
        host=host,
        port=port,
        engine=engine,
        name=name,
        api_key=api_key or None,
        concurrency=concurrency,
        context=context,
        queue=queue,
        seconds=timeout,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    serve(model, options, lambda text: console.print(text, soft_wrap=True))
    return Answer({"served": model}, lambda console: None)
