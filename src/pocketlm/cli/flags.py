"""What flags mean together: contradictions are errors before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocketlm.cli.units import parse_bytes
from pocketlm.core.errors import ConfigError, nearest
from pocketlm.core.spec import Recipe
from pocketlm.core.stored import SparsitySpec
from pocketlm.recipes import scheme_bits

TARGETS = ("transformers", "vllm", "llama.cpp", "gguf", "pocketlm")
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


def names(text: str | None) -> list[str]:
    """The names in a list that is separated by commas, such as that of ``--tasks``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def parse_bits(text: str | None) -> int | float | None:
    """What ``--bits`` says: a whole number is a code's width, a decimal an average to keep to.

    Args:
        text: Of ``--bits``.

    Returns:
        An int, or a float where there is a decimal point.

    Raises:
        ConfigError: If it is no number.
    """
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(
            f"'{text}' is no number.", where="--bits", remedy="Write 4, or 3.5 for an average."
        ) from None


def read(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the flags that `plan` and `compress` share stand for.

    Args:
        given: Parameter → value, of either verb.

    Returns:
        The arguments of `api.build_recipe`, and those of `api.plan` and `api.compress`.

    Raises:
        ConfigError: If a value is unknown or two flags contradict each other.
    """
    settings = model_flags(given)
    bits = parse_bits(given["bits"])
    budget = budget_flags(
        bits=bits, **_some(given, "size", "scheme", "search_minutes", "search_dir")
    )
    wanted = recipe_flags(
        bits=bits,
        **_some(given, "recipe", "method", "scheme", "group_size", "sym", "asym", "sparsity"),
    )
    settings |= _some(given, "samples", "seq_len")
    settings["activation_budget_bytes"] = parse_bytes(
        given["activation_budget"], "--activation-budget"
    )
    return wanted, {**settings, **budget}


def model_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `plan`, `compress` and `search` of the API share, checked.

    Args:
        given: Parameter → value, of one of these verbs.

    Raises:
        ConfigError: If a value is unknown.
    """
    check_machine(given["device"], given["dtype"], given["target"])
    settings = _some(
        given, "target", "calibration", "seed", "device", "dtype", "threads", "revision",
        "trust_remote_code",
    )  # fmt: skip
    return {**settings, "ignore": tuple(given["ignore"] or ())}


def _some(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names}


def budget_flags(
    *,
    bits: int | float | None,
    size: str | None,
    scheme: str | None,
    search_minutes: float | None,
    search_dir: Path | None,
) -> dict[str, Any]:
    """The arguments of the API that the flags of a budget stand for.

    Args:
        bits: What `parse_bits` gave; a whole number is no budget.
        size: Of ``--size``.
        scheme: Of ``--scheme``.
        search_minutes: Of ``--search-minutes``.
        search_dir: Of ``--search-dir``.

    Returns:
        Keyword arguments; none where no budget is given.

    Raises:
        ConfigError: If two flags contradict each other.
    """
    average = bits if isinstance(bits, float) else None
    if size is not None and bits is not None:
        what = "are two budgets" if average else "contradict each other: --size chooses the bits"
        raise ConfigError(f"they {what}.", where="--bits and --size", remedy="Give one of them.")
    if average is None and size is None:
        if search_minutes is not None or search_dir is not None:
            raise ConfigError(
                "nothing is searched without a budget.",
                where="--search-minutes and --search-dir",
                remedy="Give --size, or --bits with a decimal point.",
            )
        return {}
    if scheme is not None:
        flag = "--size" if average is None else "--bits"
        raise ConfigError(
            f"the scheme {scheme} sets the bits of every linear, {flag} chooses them.",
            where=f"--scheme and {flag}",
            remedy="Give one of them.",
        )
    return {
        "bits": average,
        "size": parse_bytes(size, "--size"),
        **({} if search_minutes is None else {"search_minutes": search_minutes}),
        **({} if search_dir is None else {"search_dir": search_dir}),
    }


def recipe_flags(
    *,
    recipe: str | None,
    method: str | None,
    scheme: str | None,
    bits: int | float | None,
    group_size: int | None,
    sym: bool,
    asym: bool,
    sparsity: str | None = None,
) -> dict[str, Any]:
    """The arguments of `api.build_recipe` that the flags stand for.

    Args:
        recipe: Of ``--recipe``.
        method: Of ``--method``.
        scheme: Of ``--scheme``.
        bits: What `parse_bits` gave; an average is no part of a recipe.
        group_size: Of ``--group-size``; -1 is the whole row.
        sym: Of ``--sym``.
        asym: Of ``--asym``.
        sparsity: Of ``--sparsity``.

    Returns:
        Keyword arguments.

    Raises:
        ConfigError: If two flags contradict each other or a value is out of range.
    """
    if scheme is not None and ":" in scheme:  # 2:4 is a scheme too
        if sparsity not in (None, scheme):
            raise ConfigError("they contradict each other.", where="--scheme and --sparsity")
        scheme, sparsity = None, scheme
    if sparsity is not None:
        SparsitySpec.read(sparsity, "--sparsity")
    if sym and asym:
        raise ConfigError("they contradict each other.", where="--sym and --asym")
    bits = bits if isinstance(bits, int) else None
    if bits is not None and not 2 <= bits <= 8:
        raise ConfigError(f"{bits} is not from 2 to 8.", where="--bits")
    known = None if scheme is None else scheme_bits(scheme)
    if bits is not None and known not in (None, bits):
        raise ConfigError(
            f"the scheme {scheme} has {known} bits, --bits says {bits}.",
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
    return {
        "recipe": recipe,
        "method": method,
        "scheme": scheme,
        "bits": bits,
        "group_size": group_size,
        "symmetric": False if asym else True if sym else None,
        "sparsity": sparsity,
    }


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Writes a recipe that was found; a file that says something else is left alone.

    Args:
        path: A YAML file.
        recipe: What it gets.

    Raises:
        ConfigError: If the file exists and says something else.
    """
    import yaml

    from pocketlm.formats.shards import write_file

    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if path.exists() and path.read_text("utf-8") != text:
        raise ConfigError(
            "exists and says something else.",
            where=f"--output {path}",
            remedy="Give another name; the findings are kept, the search is quick now.",
        )
    write_file(path, text.encode())
