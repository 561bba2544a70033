"""A conversation on the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from pocketlm.cli import flags
from pocketlm.cli.generate import stream
from pocketlm.cli.options import (
    Device,
    DrawSeed,
    Json,
    MaxNewTokens,
    Model,
    Temperature,
    TrustRemoteCode,
)
from pocketlm.cli.output import Answer

LEAVE = ("/quit", "/exit", "/bye")


def run(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told first.")
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: DrawSeed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Answer:
    """Talk to a model; one line is one message. Leave with Ctrl-D or /quit.

    With --json, messages are read from standard input and the conversation is printed at its end.

    Example: [bold]pocketlm chat out[/bold]
    """
    flags.check_machine(device, None)
    from pocketlm import api
    from pocketlm.runtime.chat import Conversation

    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    conversation = Conversation(loaded, tokenizer, system)
    for message in _messages(prompt="" if json or not sys.stdin.isatty() else "> "):
        conversation.send(
            message,
            on_text=None if json else stream,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        if not json:
            stream("\n")
    return Answer({"messages": conversation.messages}, _end)


def _messages(prompt: str) -> Iterator[str]:
    """Lines of standard input until its end, empty ones left out."""
    while True:
        try:
            line = input(prompt) if prompt else next(sys.stdin).strip()
        except (EOFError, StopIteration):
            return
        if line.strip() in LEAVE:
            return
        if line.strip():
            yield line


def _end(console: Console) -> None:
    console.print()
