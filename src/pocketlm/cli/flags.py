"""What flags mean together: contradictions are errors before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec import parse_scheme

TARGETS = ("transformers", "vllm", "llama.cpp")
DTYPES = ("float32", "bfloat16", "float16")


def one_of(value: str, known: Iterable[str], flag: str) -> str:
    """The value, if it is a known one.

    Args:
        value: What the user wrote.
        known: What is accepted.
        flag: The flag to name in an error.

    Returns:
        The value.

    Raises:
        ConfigError: If it is unknown; names the nearest.
    """
    if value not in known:
        raise ConfigError(f"unknown value '{value}'.", where=flag, remedy=nearest(value, known))
    return value


def check_machine(device: str, dtype: str | None, target: str = "transformers") -> None:
    """Checks the flags that name a device, a dtype and an engine.

    Args:
        device: Of ``--device``.
        dtype: Of ``--dtype``.
        target: Of ``--target``.

    Raises:
        ConfigError: On an unknown value.
    """
    if re.fullmatch(r"cuda:\d+", device) is None:
        one_of(device, ("auto", "cpu", "cuda"), "--device")
    if dtype is not None:
        one_of(dtype, DTYPES, "--dtype")
    one_of(target, TARGETS, "--target")


def check_resume(resume: bool, restart: bool) -> None:
    """Refuses ``--resume`` beside ``--restart``.

    Args:
        resume: Of ``--resume``.
        restart: Of ``--restart``.

    Raises:
        ConfigError: If both are given.
    """
    if resume and restart:
        raise ConfigError("they contradict each other.", where="--resume and --restart")


def recipe_flags(
    *,
    recipe: str | None,
    method: str | None,
    scheme: str | None,
    bits: int | None,
    group_size: int | None,
    sym: bool,
    asym: bool,
) -> dict[str, Any]:
    """The arguments of `api.build_recipe` that the flags stand for.

    Args:
        recipe: Of ``--recipe``.
        method: Of ``--method``.
        scheme: Of ``--scheme``.
        bits: Of ``--bits``.
        group_size: Of ``--group-size``; -1 is the whole row.
        sym: Of ``--sym``.
        asym: Of ``--asym``.

    Returns:
        Keyword arguments.

    Raises:
        ConfigError: If two flags contradict each other or a value is out of range.
    """
    if sym and asym:
        raise ConfigError("they contradict each other.", where="--sym and --asym")
    if bits is not None and not 2 <= bits <= 8:
        raise ConfigError(f"{bits} is not from 2 to 8.", where="--bits")
    if scheme is not None and bits is not None and parse_scheme(scheme).bits != bits:
        raise ConfigError(
            f"the scheme {scheme} has {parse_scheme(scheme).bits} bits, --bits says {bits}.",
            where="--scheme and --bits",
            remedy="Give one of them.",
        )
    if group_size is not None and group_size != -1 and group_size < 8:
        raise ConfigError(
            f"{group_size} is too small.",
            where="--group-size",
            remedy="Give 32, 64 or 128, or -1 for the whole row.",
        )
    if (
        recipe is not None
        and Path(recipe).suffix in (".yaml", ".yml")
        and not Path(recipe).exists()
    ):
        raise ConfigError("no such file.", where=f"--recipe {recipe}")
    if scheme is not None:
        parse_scheme(scheme)
    return {
        "recipe": recipe,
        "method": method,
        "scheme": scheme,
        "bits": bits,
        "group_size": group_size,
        "symmetric": False if asym else True if sym else None,
    }
