"""Proof that an artifact is whole and is what its ledger says: named checks, each with its outcome.

Nothing is believed: files are hashed again, headers parsed again, every compressed linear decoded,
bits recounted, and in the end a process that knows nothing of this one loads the artifact by plain
transformers and must give the same float32 logits, bit for bit. With an engine, that one loads it
in its own environment and is compared with our run. A bad artifact fails its check by name; only a
path that is no artifact at all raises.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from pydantic import computed_field

from pocketlm.core.errors import ConfigError, EngineMissing, PocketLMError
from pocketlm.evaluate.engines.find import Engine
from pocketlm.evaluate.results import Result
from pocketlm.evaluate.verify_engine import EngineRun, Export
from pocketlm.evaluate.verify_files import LEDGER, Artifact, Named, NotChecked
from pocketlm.evaluate.verify_files import checks as file_checks
from pocketlm.evaluate.verify_logits import check_logits
from pocketlm.evaluate.verify_rules import Rules
from pocketlm.models import open_model
from pocketlm.models.adapter import Model

Status = Literal["passed", "failed", "not checked"]


class Check(Result):
    """One check and its outcome.

    Attributes:
        name: What was checked.
        status: The outcome.
        message: What was found; for a check that was not made, why and how to have it made.
    """

    name: str
    status: Status
    message: str


class VerifyReport(Result):
    """All checks of one artifact.

    Attributes:
        path: The artifact.
        checks: In the order in which they ran.
    """

    path: str
    checks: tuple[Check, ...]

    @computed_field
    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")


def verify_artifact(
    path: Path | str,
    against_source: Path | str | None = None,
    on_check: Callable[[Check], None] | None = None,
    engine: Engine | None = None,
    *,
    split: int = 1,
    export: Export | None = None,
) -> VerifyReport:
    """Checks an artifact; with an engine also what that makes of it.

    Args:
        path: Its directory; with an engine also what `export` wrote, another tool's model or, for
            llama.cpp, a GGUF file.
        against_source: The model it was made from; its tensors are then compared with the ledger's.
        on_check: Called after each check.
        engine: Loads the files and is compared with our own run of them; None: plain transformers
            is asked for the logits of a few tokens.
        split: Over how many GPUs the engine is to split it.
        export: Writes an artifact as llama.cpp and ONNX Runtime load it.

    Returns:
        Every check by name; `ok` where none failed.

    Raises:
        ArtifactError: If the path is no artifact: no directory, or nothing of one in it.
        EngineMissing: If the engine is not installed where it was said to be.
        ConfigError: If it takes no such file.
    """
    path = Path(path)
    done: list[Check] = []

    def run(checks: Iterable[Named]) -> None:
        for name, needs, function in checks:
            check = _run(name, needs, function, artifact, done)
            done.append(check)
            if on_check is not None:
                on_check(check)

    if engine is None:
        artifact = Artifact.open(path)
        run((*file_checks(against_source), LOGITS))
        return VerifyReport(path=str(path), checks=tuple(done))
    if path.is_file():
        if engine.name != "llama.cpp":
            raise ConfigError(
                f"{engine.name} is given a directory here.", where=str(path), remedy=TO_DIRECTORY
            )
        artifact = Artifact(path)
        run(EngineRun(engine, path, open_model(path)).checks())
        return VerifyReport(path=str(path), checks=tuple(done))
    artifact = Artifact.open(path)
    files = file_checks(against_source)
    run(files if (path / LEDGER).is_file() else (c for c in files if c[0] in WITHOUT_LEDGER))
    if all(check.status == "passed" for check in done if check.name in WITHOUT_LEDGER):
        view = open_model(path, allow_compressed=True)
        run(Rules(view, engine.target, split, against_source).checks())
        with tempfile.TemporaryDirectory() as scratch:
            run(_engine_run(engine, path, view, Path(scratch), export).checks())
    return VerifyReport(path=str(path), checks=tuple(done))


WITHOUT_LEDGER = ("config.json", "shards", "compressed weights", "tied weights")
TO_DIRECTORY = "Give the directory of an artifact or export, or choose --engine llama.cpp."


def _engine_run(
    engine: Engine, path: Path, view: Model, scratch: Path, export: Export | None
) -> EngineRun:
    """What an engine is asked about; llama.cpp and ONNX Runtime get the artifact in their form.

    Raises:
        PocketLMError: If the artifact cannot be written so.
    """
    form = OWN_FORMS.get(engine.name)
    if form is None or export is None:
        return EngineRun(engine, path, view)
    place = scratch / f"{path.name}.{form}"
    lost = export(path, place, form)
    if form == "onnx":  # its codes were compared with ours; roundings of inputs are dropped
        view.quantizers = {}
    elif lost:  # the file is compared with itself: what writing it cost is said beside
        view = open_model(place)
    return EngineRun(engine, place, view, notes=[f"written by `export --to {form}`.", *lost])


OWN_FORMS = {"llama.cpp": "gguf", "onnxruntime": "onnx"}
LOGITS = ("transformers logits", ("config.json", "shards", "compressed weights"), check_logits)


def _run(
    name: str,
    needs: tuple[str, ...],
    function: Callable[[Artifact], str],
    artifact: Artifact,
    done: list[Check],
) -> Check:
    unmet = [check.name for check in done if check.name in needs and check.status != "passed"]
    if unmet:
        return Check(
            name=name, status="not checked", message=f"needs '{unmet[0]}', which did not pass."
        )
    try:
        return Check(name=name, status="passed", message=function(artifact))
    except NotChecked as reason:
        return Check(name=name, status="not checked", message=str(reason))
    except EngineMissing:
        raise
    except PocketLMError as error:
        return Check(name=name, status="failed", message=str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
        return Check(name=name, status="failed", message=message)
