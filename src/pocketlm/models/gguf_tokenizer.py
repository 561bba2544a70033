"""The tokenizer inside a GGUF file, with the pre-tokenizer that the file names.

Byte-level BPE is built here: which way text is split before merging is part of the model, and
llama.cpp names it in `tokenizer.ggml.pre`. An unknown name is an error, never a default.
SentencePiece vocabularies are left to transformers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pocketlm.core.errors import SourceError, nearest
from pocketlm.models.gguf import GgufFile

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = f"{LETTERS}*{SMALL}+%s|{LETTERS}+{SMALL}*%s"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = CASED % ("", "") + r"|\p{N}" + REST
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = CASED % (SUFFIX, SUFFIX) + r"|\p{N}{1,3}" + REST

# How llama.cpp's names split text: a regular expression, or GPT-2's with or without single digits.
SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
    "tekken": TEKKEN,
}
GPT2_LIKE = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # skip merges on a hit


def load_gguf_tokenizer(gguf: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file.

    Raises:
        SourceError: If there is none, or its pre-tokenizer is not known.
    """
    kind = gguf.header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return byte_level_bpe(gguf.header.metadata, str(gguf.path))
    if kind == "llama":
        return AutoTokenizer.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name)
    raise SourceError(f"has a tokenizer of unknown kind '{kind}'.", where=str(gguf.path))


def pre_tokenizer(name: str | None, where: str) -> PreTokenizer:
    """What `tokenizer.ggml.pre` stands for.

    Raises:
        SourceError: If the name is unknown or missing.
    """
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in GPT2_LIKE:
        return plain
    if name in SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    if name is None:
        what = "does not name its pre-tokenizer (tokenizer.ggml.pre)."
        raise SourceError(
            what, where=where, remedy="Start from the Hugging Face directory instead."
        )
    known = (*GPT2_LIKE, *SINGLE_DIGITS, *SPLITS)
    raise SourceError(
        f"names the unknown pre-tokenizer '{name}'.", where=where, remedy=nearest(name, known)
    )


def byte_level_bpe(metadata: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """Builds a byte-level BPE tokenizer.

    Args:
        metadata: Of the file.
        where: The file, for messages.

    Returns:
        A fast tokenizer with special tokens and chat template.

    Raises:
        SourceError: If the vocabulary is damaged or the pre-tokenizer unknown.
    """
    name = metadata.get("tokenizer.ggml.pre")
    splitter = pre_tokenizer(name, where)
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not tokens or not merges or any(len(merge) != 2 for merge in merges):
        raise SourceError("has a damaged vocabulary or merge list.", where=where)
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=name in WHOLE_WORDS_FIRST))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    marked = list(zip(tokens, kinds, strict=True))
    control = [token for token, kind in marked if kind == CONTROL]
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    plain = [token for token, kind in marked if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    roles = special_tokens(metadata, tokens)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    begin, end = (
        metadata.get("tokenizer.ggml.add_bos_token"),
        metadata.get("tokenizer.ggml.add_eos_token"),
    )
    if (begin and "bos_token" in roles) or (end and "eos_token" in roles):
        steps.append(_template(roles, vocab, bool(begin), bool(end)))
    backend.post_processor = processors.Sequence(steps) if len(steps) > 1 else steps[0]
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    options = {"model_max_length": context} if context else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles, **options
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """Role → token, of those that the file names."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in keys.items()}
    return {role: tokens[i] for role, i in ids.items() if i is not None and 0 <= i < len(tokens)}


def _template(
    roles: Mapping[str, str], vocab: Mapping[str, int], begin: bool, end: bool
) -> processors.TemplateProcessing:
    first = [roles["bos_token"]] if begin and "bos_token" in roles else []
    last = [roles["eos_token"]] if end and "eos_token" in roles else []
    special = [(token, vocab[token]) for token in dict.fromkeys([*first, *last])]
    single = " ".join([*first, "$A", *last])
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)


def gguf_side_files(gguf: GgufFile, config: PretrainedConfig) -> Mapping[str, bytes]:
    """The files that a Hugging Face directory of this model would hold beside the weights."""
    tokenizer = load_gguf_tokenizer(gguf)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(directory)
        files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}
    # The name that every version of transformers knows.
    settings = json.loads(files["tokenizer_config.json"])
    if type(tokenizer) is PreTrainedTokenizerFast:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return files
