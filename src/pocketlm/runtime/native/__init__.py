"""The C part of decoding on a CPU: compiled once for this processor, kept in the user's cache.

Wants a C compiler (`cc`) on Linux; without one, PyTorch's kernels serve, and it is said. OpenMP's
functions are left to those that PyTorch has loaded, so that both use one pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch  # brings OpenMP, whose functions the library leaves open

from pocketlm.engine.machine import cache_directory

FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-fPIC",
    "-std=gnu11",
)  # fmt: skip
PLAIN_FLAGS = tuple(flag for flag in FLAGS if flag != "-mprefer-vector-width=512")  # not on ARM
SECONDS = 120  # more than a compilation of this size takes anywhere


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The compiled functions, or why there are none."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return "it is built on Linux only, for a PyTorch with OpenMP"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "there is no C compiler (cc)"
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"it cannot be built or loaded here ({said.strip().splitlines()[-1]})"


def _built(compiler: str) -> Path:
    """The shared library; compiled where this source, compiler and processor are new."""
    source = resources.files("pocketlm.runtime.native").joinpath("step.c").read_bytes()
    flags = FLAGS if platform.machine() == "x86_64" else PLAIN_FLAGS
    version = subprocess.run(
        [compiler, "-v", *flags, "-E", "-", "-o", os.devnull],
        input="", capture_output=True, text=True, check=True, timeout=SECONDS,
    ).stderr  # names the processor that `native` stands for  # fmt: skip
    key = hashlib.sha256(source + version.encode()).hexdigest()[:16]
    kept = cache_directory("native") / f"step-{key}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            code, made, done = (Path(folder) / name for name in ("step.c", "step.o", "step.so"))
            code.write_bytes(source)
            for command in (
                [compiler, *flags, "-c", code, "-o", made],
                [compiler, "-shared", made, "-o", done, "-lm"],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
            os.replace(done, kept)  # whole, or not at all: others may be loading it
    return kept
