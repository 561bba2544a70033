"""What is done, so that an interrupted run goes on: one file a block, a fingerprint and a lock.

The work directory holds
    lock             held while a run lives, freed by the system when it dies
    run.json         the fingerprint: everything that the bytes depend on
    events.jsonl     every event of every attempt
    blocks/NNNNN.*   the compressed tensors of a finished block and its ledger entries
    activations/     boundary activations, where they are kept on disk
    gradients/       how large the loss's gradients are, where a step asks for them
and is deleted when the artifact is in place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load
from torch import Tensor

from pocketlm.core.errors import OutputBusy, ResumeError
from pocketlm.engine.ledger import Entry
from pocketlm.formats.shards import sync_directory, write_file, write_tensors


class Journal:
    """The record of one run in its work directory; `resumed` where an earlier attempt lies there.

    Args:
        directory: The work directory; made if absent.
        fingerprint: What the bytes depend on; plain JSON.
        restart: Forget an earlier run, whatever its fingerprint.

    Raises:
        OutputBusy: If another run holds the directory.
        ResumeError: If an earlier run there had another fingerprint.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any], *, restart: bool) -> None:
        self.directory, self.resumed = directory, False
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(directory / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputBusy(
                "another run is writing here.",
                where=str(directory),
                remedy="Wait for it, or give another -o or --work-dir.",
            ) from None
        try:
            if restart:
                self._forget()
            self._check(fingerprint)
            (directory / "blocks").mkdir(exist_ok=True)
        except BaseException:
            self.release()
            raise

    def _forget(self) -> None:
        for child in self.directory.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != "lock":
                child.unlink()

    def _check(self, fingerprint: dict[str, Any]) -> None:
        path = self.directory / "run.json"
        if not path.exists():
            strangers = [c.name for c in self.directory.iterdir() if not _is_ours(c.name)]
            if strangers:
                raise OutputBusy(
                    f"the work directory holds other files ({strangers[0]}).",
                    where=str(self.directory),
                    remedy="Give an empty --work-dir.",
                )
            write_file(path, json.dumps(fingerprint, indent=1, sort_keys=True).encode())
            return
        self.resumed = True
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            key for key in {**earlier, **fingerprint} if earlier.get(key) != fingerprint.get(key)
        ]
        if changed:
            key = sorted(changed)[0]
            raise ResumeError(
                f"an unfinished run here differs in {', '.join(sorted(changed))} "
                f"({key}: {_short(earlier.get(key))} there, {_short(fingerprint.get(key))} now).",
                where=str(self.directory),
                remedy="Run the earlier command to finish it, or add --restart to discard it.",
            )

    @property
    def events_path(self) -> Path:
        """The event log."""
        return self.directory / "events.jsonl"

    def _block_path(self, index: int) -> Path:
        return self.directory / "blocks" / f"{index:05d}.safetensors"

    def has_block(self, index: int) -> bool:
        """Whether a block lies whole in the work directory."""
        path = self._block_path(index)
        return path.exists() and path.with_suffix(".json").exists()

    def finished_blocks(self, total: int) -> int:
        """How many blocks, counted from the first, lie whole in the work directory."""
        for index in range(total):
            if not self.has_block(index):
                return index
        return total

    def write_block(
        self, index: int, tensors: dict[str, Tensor], entries: dict[str, Entry]
    ) -> None:
        """Keeps a finished block; the small file that is written last makes it count."""
        record = {
            "sha256": write_tensors(self._block_path(index), tensors),
            "entries": {name: entry.model_dump(mode="json") for name, entry in entries.items()},
        }
        write_file(self._block_path(index).with_suffix(".json"), json.dumps(record).encode())

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Entry]]:
        """The tensors and ledger entries of a finished block.

        Raises:
            ResumeError: If the file is not what was written.
        """
        data = self._block_path(index).read_bytes()
        record = json.loads(
            self._block_path(index).with_suffix(".json").read_text(encoding="utf-8")
        )
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ResumeError(
                "a finished block is damaged.",
                where=str(self._block_path(index)),
                remedy="Add --restart to begin anew.",
            )
        entries = {name: Entry.model_validate(value) for name, value in record["entries"].items()}
        return load(data), entries

    def block_files(self, index: int) -> tuple[Path, dict[str, Entry]]:
        """The file of a finished block's tensors, checked, and its ledger entries.

        Raises:
            ResumeError: If the file is not what was written.
        """
        return self._block_path(index), self.read_block(index)[1]

    def release(self) -> None:
        """Lets another run take the directory."""
        self._lock.release()

    def clear(self) -> None:
        """Deletes the work directory; the artifact is in place."""
        self._forget()
        self.release()
        shutil.rmtree(self.directory, ignore_errors=True)
        sync_directory(self.directory.parent)


def _is_ours(name: str) -> bool:
    return name in ("lock", "blocks", "activations", "events.jsonl", "run.json.part")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
