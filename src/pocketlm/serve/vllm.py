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
TRIAL = 120.0  # seconds for it to tell its version
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
    program = _program()
    if program is None:
        return "vLLM is not installed."
    return _cannot_load(source) or _broken(program)


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


def _broken(program: str) -> str | None:
    """Why the command does not run at all; its version is the least that it must tell."""
    try:
        subprocess.run([program, "--version"], check=True, capture_output=True, timeout=TRIAL)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        return f"{program} fails: {lines[-1]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} fails: {error}"
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
    flags = ["--trust-remote-code"] if trust_remote_code else []
    return Command(
        (_program() or "vllm", "serve", str(source), *given, *flags),
        {} if api_key is None else {"VLLM_API_KEY": api_key},
    )


def replace_process(command: Command) -> None:
    """Becomes vLLM; does not come back."""
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def _program() -> str | None:
    """The one of this environment, or any on the path: vLLM often has an environment of its own."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
