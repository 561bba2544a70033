"""A tokenizer as a GGUF file holds it: the other direction of `gguf_tokenizer`.

Byte-level BPE is written with its merges and the name of its pre-tokenizer, which is found by what
the tokenizer does before merging; one that has no name in llama.cpp is refused. BPE in the way of
SentencePiece (Llama 2, Mistral, Gemma, Phi-3) is written with a score for each token: llama.cpp
merges the pair of the highest score first, so minus the rank of a token's first merge does the
same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocketlm.core.errors import UnsupportedModel
from pocketlm.models.gguf_tokenizer import CONTROL, GPT4O, LLAMA3, QWEN2, TEKKEN, USER_DEFINED

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6  # llama.cpp's token types, beside the two above
PRE_TOKENIZERS = {LLAMA3: "llama-bpe", QWEN2: "qwen2", TEKKEN: "tekken", GPT4O: "gpt-4o"}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
WHERE = "tokenizer.json"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The keys of a tokenizer behind ``tokenizer.``, as plain values.

    Args:
        tokenizer: A fast tokenizer.
        rows: Rows of the embedding: ids beyond the vocabulary are filled up.

    Returns:
        Key → text, number, truth value or list.

    Raises:
        UnsupportedModel: If llama.cpp has no such tokenizer.
    """
    data = _data(tokenizer)
    model = data["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its kind is '{model.get('type')}'; written is BPE")
    tokens, kinds = _tokens(tokenizer, data, rows)
    keys: dict[str, Any]
    if model.get("byte_fallback"):
        keys = {
            "ggml.model": "llama", "ggml.pre": "default", "ggml.tokens": tokens,
            "ggml.scores": _scores(tokens, model), "ggml.token_type": kinds,
            "ggml.add_space_prefix": _adds_space(data),
        }  # fmt: skip
    else:
        keys = {
            "ggml.model": "gpt2", "ggml.pre": _pre_tokenizer(data), "ggml.tokens": tokens,
            "ggml.token_type": kinds, "ggml.merges": [_merge(pair) for pair in model["merges"]],
        }  # fmt: skip
    return keys | _special(tokenizer) | _templates(tokenizer)


def _data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it has no fast form, whose steps can be read")
    return json.loads(backend.to_str())


def _tokens(
    tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Text and llama.cpp's type of every id."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    unknown = data["model"].get("unk_token")
    pieces = bool(data["model"].get("byte_fallback"))
    if by_id and max(by_id) >= rows:
        raise _refused(f"id {max(by_id)} is beyond the {rows} rows of the embedding")
    tokens, kinds = [], []
    for index in range(rows):
        token, entry = by_id.get(index, f"[PAD{index}]"), added.get(index)
        if index not in by_id:
            kind = UNUSED
        elif pieces and token == unknown:
            kind = UNKNOWN
        elif entry is not None:
            kind = CONTROL if entry.get("special") else USER_DEFINED
            if kind == USER_DEFINED:  # llama.cpp looks for these in the text as it is
                token = token.replace(SPACE, " ")
        else:
            kind = BYTE if pieces and _BYTE.fullmatch(token) else NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: list[str], model: Mapping[str, Any]) -> list[float]:
    """Minus the rank of the first merge that makes each token; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault(_merge(pair).replace(" ", "", 1), rank)
    last = len(model["merges"])
    return [-float(ranks.get(token, last)) for token in tokens]


def _merge(pair: Any) -> str:
    """A merge as one text; tokenizers writes it as a pair or with a space between."""
    return pair if isinstance(pair, str) else " ".join(pair)


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in a row."""
    if step is None:
        return []
    return list(step[key]) if step.get("type") == "Sequence" else [step]


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    for step in _steps(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """llama.cpp's name of what is done before merging."""
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise _refused(f"what it does before merging ({', '.join(kinds) or 'nothing'}) has no name")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids of special tokens, and which of them every text gets."""
    found: dict[str, Any] = {}
    for own, theirs in ROLES.items():
        index = getattr(tokenizer, f"{own}_token_id", None)
        if index is not None:
            found[f"ggml.{theirs}_token_id"] = int(index)
    ids = list(tokenizer("a").input_ids)
    bos, eos = found.get("ggml.bos_token_id"), found.get("ggml.eos_token_id")
    found["ggml.add_bos_token"] = bool(ids) and bos is not None and ids[0] == bos
    found["ggml.add_eos_token"] = bool(ids) and eos is not None and ids[-1] == eos
    return found


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"chat_template": template}
    named = {name: value for name, value in template.items() if name != "default"}
    made: dict[str, Any] = {f"chat_template.{name}": value for name, value in named.items()}
    if named:
        made["chat_templates"] = list(named)
    if "default" in template:
        made["chat_template"] = template["default"]
    return made


def _refused(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the tokenizer cannot be written into a GGUF file: {what}.", where=WHERE
    )
