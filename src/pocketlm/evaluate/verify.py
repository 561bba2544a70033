"""Proof that an artifact is whole and is what its ledger says: named checks, each with its outcome.

Nothing is believed: files are hashed again, headers parsed again, every compressed linear decoded,
bits recounted, and in the end a process that knows nothing of this one loads the artifact by plain
transformers and must give the same float32 logits, bit for bit. A bad artifact fails its check by
name; only a path that is no artifact at all raises.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import computed_field

from pocketlm.core.errors import ArtifactError, PocketLMError
from pocketlm.evaluate.results import Result
from pocketlm.evaluate.verify_files import Artifact, NotChecked
from pocketlm.evaluate.verify_files import checks as file_checks
from pocketlm.evaluate.verify_logits import check_logits

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

    def raise_for_failures(self) -> None:
        """Turns a failed report into an error.

        Raises:
            ArtifactError: Naming what failed.
        """
        failed = self.failures()
        if failed:
            listed = "; ".join(f"{check.name}: {check.message}" for check in failed)
            raise ArtifactError(f"verification failed: {listed}", where=self.path)


def verify_artifact(
    path: Path | str,
    against_source: Path | str | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> VerifyReport:
    """Checks an artifact.

    Args:
        path: Its directory.
        against_source: The model it was made from; its tensors are then compared with the ledger's.
        on_check: Called after each check.

    Returns:
        Every check by name; `ok` where none failed.

    Raises:
        ArtifactError: If the path is no artifact: no directory, or nothing of one in it.
    """
    artifact = Artifact.open(Path(path))
    done: list[Check] = []
    for name, needs, function in (*file_checks(against_source), LOGITS):
        check = _run(name, needs, function, artifact, done)
        done.append(check)
        if on_check is not None:
            on_check(check)
    return VerifyReport(path=str(path), checks=tuple(done))


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
    except PocketLMError as error:
        return Check(name=name, status="failed", message=str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
        return Check(name=name, status="failed", message=message)
