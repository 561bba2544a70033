"""Where text comes from: builtin, a file, a hub dataset. One name in, one `TextSet` out.

``builtin`` is English prose that every Python carries (pydoc_data.topics), its paragraphs dealt by
hash to a calibration and an evaluation half. Files and datasets are taken as they are: whoever
names two keeps them apart; `overlap` looks whether what was read of them was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pocketlm.calibration.templates import ROLE_KEYS, chat_text
from pocketlm.calibration.tokens import Tokenizer
from pocketlm.core.errors import CalibrationError

Part = Literal["calibration", "evaluation"]
HUB_CHARACTERS = 32_000_000  # of a hub dataset at most, read as a stream


@dataclass(frozen=True)
class TextSet:
    """A text, and what it needs to be named in a report.

    Attributes:
        name: As a report names it.
        documents: In order; one for a plain text file.
        separator: What stands between two documents when they are joined.
        notes: What a user must be told about it.
    """

    name: str
    documents: tuple[str, ...]
    separator: str = "\n\n"
    notes: tuple[str, ...] = ()

    @property
    def joined(self) -> str:
        """The whole text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the joined text."""
        return hashlib.sha256(self.joined.encode("utf-8", "surrogatepass")).hexdigest()


def load_text(
    name_or_path: str | Path, part: Part = "calibration", tokenizer: Tokenizer | None = None
) -> TextSet:
    """Loads a text by name.

    Args:
        name_or_path: ``builtin``, ``hf:org/name``, or a file: .jsonl, .parquet, else plain text.
        part: Which half of ``builtin``, or which split of a dataset (train, or test).
        tokenizer: The model's, for its chat template; needed only for data with roles.

    Returns:
        The text, never empty.

    Raises:
        CalibrationError: If it is missing, unreadable, binary, empty or of an unknown schema.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "builtin":
        return _builtin(part)
    if name == "self":
        raise CalibrationError(
            "text that the model writes itself is for calibration alone.",
            where="self",
            remedy="Give 'builtin' or a file here.",
        )
    if name.startswith("hf:"):
        return _hub(name, part, tokenizer)
    if not path.exists():
        raise _unknown(name, path)
    if path.suffix == ".jsonl":
        return _records(path.name, _jsonl(path), tokenizer)
    if path.suffix == ".parquet":
        return _records(path.name, _parquet(path), tokenizer)
    if path.suffix in (".json", ".gz", ".zst", ".zip", ".csv"):
        raise CalibrationError(
            f"'{path.suffix}' files are not read.",
            where=name,
            remedy="Give plain text, or .jsonl with one object a line.",
        )
    return _checked(TextSet(path.name, (_read(path),)), str(path))


def _builtin(part: Part) -> TextSet:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    kept: dict[str, None] = {}  # ordered, and a paragraph that stands in two topics counts once
    wanted = 0 if part == "calibration" else 1
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            text = paragraph.strip("\n")
            if text.strip() and hashlib.sha256(text.strip().encode()).digest()[0] % 2 == wanted:
                kept[text] = None
    name = f"builtin ({part} half; pydoc_data.topics of Python {platform.python_version()})"
    return TextSet(name, tuple(kept))


def _unknown(name: str, path: Path) -> CalibrationError:
    known = {"builtin": "builtin"}
    if path.parent.is_dir():  # stems: endings are alike, and so are folders
        known |= {other.stem: str(other) for other in islice(path.parent.iterdir(), 1000)}
    close = get_close_matches(path.stem, known, n=1)
    remedy = "Give 'builtin', a .txt, .jsonl or .parquet file, or 'hf:org/name'."
    if close:
        remedy = f"Did you mean '{known[close[0]]}'?"
    return CalibrationError("no such text.", where=name, remedy=remedy)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if b"\0" in raw[:65536]:
            raise CalibrationError(
                "this is a binary file.", where=str(path), remedy="Give UTF-8 text."
            )
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise CalibrationError(
            f"cannot be read: {error.strerror}.", where=str(path), remedy="Give a readable file."
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"not UTF-8 text (byte {error.start}).",
            where=str(path),
            remedy="Convert the file to UTF-8.",
        ) from error


def _jsonl(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"not JSON: {error.msg}.", where=where, remedy="One JSON object a line."
            ) from error
        if not isinstance(record, dict):
            raise CalibrationError(
                f"a {type(record).__name__}, not an object.",
                where=where,
                remedy="One JSON object a line, with a 'text' or 'messages' field.",
            )
        yield where, record


def _parquet(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise CalibrationError(
            "reading parquet needs pyarrow.", where=str(path), remedy="pip install pyarrow"
        ) from error
    try:
        table = parquet.ParquetFile(path)
        wanted = [key for key in ("text", *ROLE_KEYS) if key in table.schema_arrow.names]
        if not wanted:
            raise _no_schema(table.schema_arrow.names, str(path))
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted[:1]):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}:{row}", record
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise CalibrationError(
            f"cannot be read: {error}", where=str(path), remedy="Check that it is a parquet file."
        ) from error


def _hub(name: str, part: Part, tokenizer: Tokenizer | None) -> TextSet:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise CalibrationError(
            "hub datasets need the package datasets.",
            where=name,
            remedy="pip install datasets, or give a file.",
        ) from error
    split = "train" if part == "calibration" else "test"
    repository, _, config = name.removeprefix("hf:").partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
        taken, characters = [], 0
        for number, record in enumerate(rows, start=1):
            taken.append((f"{name}:{number}", record))
            characters += len(str(record))
            if characters > HUB_CHARACTERS:
                break
    except (OSError, ValueError, KeyError) as error:  # DatasetNotFoundError is an OSError
        raise CalibrationError(
            f"cannot be loaded (split '{split}'): {error}",
            where=name,
            remedy="Check the name; 'hf:org/name:config' picks a configuration.",
        ) from error
    note = f"{name}: the first {len(taken)} records of split '{split}'."
    found = _records(f"{name} ({split})", taken, tokenizer)
    return TextSet(found.name, found.documents, found.separator, (*found.notes, note))


def _records(
    name: str,
    records: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Tokenizer | None,
) -> TextSet:
    documents, empty, chats = [], 0, 0
    for where, record in records:
        if isinstance(record.get("text"), str):
            text = record["text"]
        elif any(key in record for key in ROLE_KEYS):
            text, chats = chat_text(record, tokenizer, where), chats + 1
        else:
            raise _no_schema(record, where)
        if text.strip():
            documents.append(text)
        else:
            empty += 1
    notes = (f"{name}: {empty} empty records left out.",) if empty else ()
    if chats:
        notes = (*notes, f"{name}: {chats} conversations through the model's chat template.")
    # a template ends its last turn itself: nothing may stand between two conversations
    separator = "" if chats == len(documents) else "\n\n"
    return _checked(TextSet(name, tuple(documents), separator, notes), name)


def _no_schema(keys: Iterable[str], where: str) -> CalibrationError:
    return CalibrationError(
        f"no 'text', 'messages' or 'conversations' field; found: {', '.join(keys) or 'nothing'}.",
        where=where,
        remedy="Rename the field that holds the text to 'text'.",
    )


def _checked(text: TextSet, where: str) -> TextSet:
    if not any(document.strip() for document in text.documents):
        raise CalibrationError("the text is empty.", where=where, remedy="Give a text with words.")
    return text
