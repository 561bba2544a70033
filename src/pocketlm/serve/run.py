"""`pocketlm serve`: picks the engine, takes the port, loads the model, answers until a
signal.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pocketlm.core.errors import ConfigError, UnsupportedModel
from pocketlm.serve import vllm

log = logging.getLogger("pocketlm.serve")
ENGINES = ("auto", "vllm", "pocketlm")
EXTRA = ("starlette", "uvicorn")


@dataclass(frozen=True)
class ServeOptions:
    """What may be chosen.

    Attributes:
        host: To listen on.
        port: The same; 0 for a free one.
        engine: ``auto``, ``vllm`` or ``pocketlm``.
        name: What clients call the model; None: its directory's name.
        api_key: What clients must bring; None: nothing.
        concurrency: Answers written at once; None: as memory allows.
        context: Positions of a prompt and its answer; None: as model and memory allow.
        queue: Requests that may wait.
        seconds: That one request may take.
        device: Where the model runs.
        dtype: What it computes in; None: as the machine likes.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a hub id.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"
    name: str | None = None
    api_key: str | None = None
    concurrency: int | None = None
    context: int | None = None
    queue: int = 128
    seconds: float = 600.0
    device: str = "auto"
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    revision: str | None = None


def serve(source: str | Path, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serves a model; returns after it was told to stop by a signal.

    Args:
        source: What `load` takes.
        options: The rest.
        say: Told which engine serves, why, and where.

    Raises:
        ConfigError: If the port is taken, the extra is not installed, or an option is wrong.
        UnsupportedModel: If vLLM was asked for and cannot.
        PocketLMError: If the model cannot be loaded.
    """
    from pocketlm.models.opening import resolve

    path = resolve(source, revision=options.revision)
    given = Path(source)  # a hub id's directory has a commit for a name
    name = options.name or (given.resolve().name if given.exists() else str(source))
    if options.engine != "pocketlm":
        reason = vllm.refused(path)
        if reason is None:
            wanted = vllm.command(
                path,
                name=name,
                host=options.host,
                port=options.port,
                api_key=options.api_key,
                concurrency=options.concurrency,
                context=options.context,
                dtype=None if options.dtype is None else str(options.dtype).split(".")[-1],
                trust_remote_code=options.trust_remote_code,
            )
            say(f"vLLM serves it: {' '.join(wanted.arguments)}")
            vllm.replace_process(wanted)
        if options.engine == "vllm":
            raise UnsupportedModel(
                reason or "", where="--engine vllm", remedy="Give --engine pocketlm."
            )
        say(f"pocketlm's own runtime serves it: {reason}")
    require_extra()
    own_server(path, name, options, say)


def require_extra() -> None:
    """Refuses to begin without the packages of the extra `serve`.

    Raises:
        ConfigError: Naming the command that installs them.
    """
    missing = [package for package in EXTRA if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed.",
            where="serve",
            remedy="Run: pip install 'pocketlm[serve]'",
        )


def own_server(path: Path, name: str, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serves from our own runtime."""
    import uvicorn

    from pocketlm.runtime.load import load
    from pocketlm.serve.app import GRACE, make_app
    from pocketlm.serve.limits import Limits, fitting
    from pocketlm.serve.service import Service

    with _listening(options.host, options.port) as listener:  # before the model takes minutes
        model, tokenizer = load(
            path,
            device=options.device,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
        concurrency, positions = fitting(model, options.concurrency, options.context)
        limits = Limits(concurrency, positions, options.queue, options.seconds)
        service = Service(model, tokenizer, name, limits)
        loopback = is_loopback(options.host)
        app = make_app(service, api_key=options.api_key, loopback=loopback)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"'{name}' at http://{shown}:{port}/v1, a page to chat at http://{shown}:{port}/")
        say(f"{concurrency} answers at once, {positions:,} tokens each; stop with Ctrl-C")
        if not loopback and options.api_key is None:
            say("anybody who reaches this machine can use it: give --api-key to change that")
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=4 * (options.queue + concurrency),  # connections, idle ones too
            timeout_graceful_shutdown=int(GRACE),
        )
        with _signals_end_it():
            uvicorn.Server(config).run(sockets=[listener])
        say("stopped")


@contextmanager
def _signals_end_it() -> Generator[None]:
    """Being told to stop is how a server ends well: uvicorn's repeat of the signal is ignored."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen there: {error}.",
            where=f"--host {host} --port {port}",
            remedy="Give another --port; 0 takes any that is free.",
        ) from error
