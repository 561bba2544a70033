"""Texts by name: the halves of builtin, files of every kind, and what is refused."""

import json
import sys
import types
from pathlib import Path

import pytest

from pocketlm.calibration.texts import load_text
from pocketlm.core.errors import CalibrationError


class RoleTokenizer:
    """Only what data with roles asks of a tokenizer."""

    chat_template = "<{role}>{content}"

    def __call__(self, text, *, add_special_tokens, verbose):
        raise NotImplementedError

    def apply_chat_template(self, conversation, *, tokenize):
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)


def test_builtin_halves_are_stable_and_disjoint() -> None:
    calibration, evaluation = load_text("builtin"), load_text("builtin", "evaluation")
    assert calibration.sha256 == load_text("builtin").sha256
    stripped = [{text.strip() for text in half.documents} for half in (calibration, evaluation)]
    assert not stripped[0] & stripped[1]
    assert min(len(calibration.joined), len(evaluation.joined)) > 100_000


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes(b"\xef\xbb\xbfOne line.\r\n\r\nAnother.\n")
    assert load_text(path).documents == ("One line.\n\nAnother.\n",)


def test_jsonl_takes_texts_and_counts_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "first"}\n\n{"text": "  "}\n{"text": "second", "id": 3}\n')
    text = load_text(path)
    assert text.documents == ("first", "second")
    assert text.joined == "first\n\nsecond"
    assert "1 empty" in text.notes[0]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
)
def test_roles_go_through_the_template(tmp_path: Path, record: dict) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps(record) + "\n") * 2)
    text = load_text(path, tokenizer=RoleTokenizer())
    assert text.joined == "<user>a<assistant>b" * 2
    with pytest.raises(CalibrationError, match="no chat template"):
        load_text(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x", "answer": "y"}', r"found: prompt, answer"),
        ("a.jsonl", b'{"text": "x"}\n{"text', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1, 2]", "a list, not an object"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\n", "empty"),
        ("a.txt", b"GGUF\x00\x00\x01", "binary"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.json", b"[]", "not read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_text(path)


def test_bad_turns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "parts": []}]}')
    with pytest.raises(CalibrationError, match=r"chat\.jsonl:1: a turn lacks .* role, parts"):
        load_text(path, tokenizer=RoleTokenizer())


def test_unknown_names_offer_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "wikitext.txt").write_text("words")
    with pytest.raises(CalibrationError, match=r"wikitext\.txt"):
        load_text(tmp_path / "wikitxt.txt")
    with pytest.raises(CalibrationError, match="'builtin'"):
        load_text("biultin")
    with pytest.raises(CalibrationError, match="for calibration alone"):
        load_text("self")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("pyarrow.parquet", "a.parquet", "pyarrow"), ("datasets", "hf:org/name", "datasets")],
)
def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=f"pip install {package}"):
        load_text(name)


def test_hub_datasets_are_streamed_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(repository, config, *, split, streaming):
        calls.append((repository, config, split, streaming))
        if repository != "org/name":
            raise FileNotFoundError(repository)
        return iter([{"text": "first"}, {"text": "second"}])

    fake = types.ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_text("hf:org/name").documents == ("first", "second")
    assert load_text("hf:org/name:small", "evaluation").name == "hf:org/name:small (test)"
    assert calls == [("org/name", None, "train", True), ("org/name", "small", "test", True)]
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_text("hf:org/nothing")
