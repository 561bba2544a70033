"""Made-up checkpoints: any Llama shape with random weights, streamed to disk.

Weights are normal(0, 0.02) numbers from one pool of four million, read from another offset for each
tensor: real enough for memory, time and bytes, useless for quality. The tokenizer is one token for
each byte. Needs numpy and tokenizers, and never more memory than the pool and a chunk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

POOL = (1 << 22) + 17  # no width divides it, so rows differ
SHARD_BYTES = 5_000_000_000
ONE_BF16 = 0x3F80


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; the defaults are Llama-3-8B's.

    `dead_norm` names a norm whose weights are zero: no input reaches the linears behind it, which
    a run must announce in the middle of its way.
    """

    blocks: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 128256
    context: int = 8192
    dead_norm: str | None = None

    def config(self) -> dict[str, Any]:
        """config.json: an untied bfloat16 LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which they lie on disk."""
        head = self.hidden // self.heads
        narrow = self.key_value_heads * head
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index in range(self.blocks):
            block = f"model.layers.{index}"
            yield f"{block}.input_layernorm.weight", (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", narrow), ("v", narrow)):
                yield f"{block}.self_attn.{name}_proj.weight", (rows, self.hidden)
            yield f"{block}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{block}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{block}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{block}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{block}.mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def bytes_stored(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return sum(2 * int(np.prod(shape)) for _, shape in self.tensors())


TINY = Shape(
    blocks=8,
    hidden=192,  # not divisible by 128: another warning that a resumed run must not lose
    inner=320,
    heads=4,
    key_value_heads=2,
    vocabulary=512,
    dead_norm="model.layers.1.post_attention_layernorm.weight",
)


def write_llama(directory: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes the checkpoint, its config and tokenizer; one of the same shape is left as it is.

    Args:
        directory: Made if absent.
        shape: The model's sizes.
        seed: Of the weights.

    Returns:
        The directory.
    """
    stamp, wanted = directory / "shape.json", {"seed": seed, **asdict(shape)}
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    random = np.random.default_rng(seed)
    bits = (random.standard_normal(POOL, dtype=np.float32) * 0.02).view(np.uint32)
    pool = ((bits + 0x8000) >> 16).astype(np.uint16)  # bfloat16, rounded half up
    shards = list(_shards(shape))
    names = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, tensors, shape.dead_norm, pool, random)
        names.update({name: file for name, _ in tensors})
    index = {"metadata": {"total_size": shape.bytes_stored()}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    (directory / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    _write_tokenizer(directory)
    stamp.write_text(json.dumps(wanted))
    return directory


def write_tiny(directory: Path) -> Path:
    """A checkpoint of 8 small blocks."""
    return write_llama(directory, TINY)


def _shards(shape: Shape) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    tensors, size = [], 0
    for name, sides in shape.tensors():
        bytes_stored = 2 * int(np.prod(sides))
        if tensors and size + bytes_stored > SHARD_BYTES:
            yield tensors
            tensors, size = [], 0
        tensors.append((name, sides))
        size += bytes_stored
    yield tensors


def _write_shard(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    dead_norm: str | None,
    pool: np.ndarray,
    random: np.random.Generator,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, sides in tensors:
        end = position + 2 * int(np.prod(sides))
        header[name] = {"dtype": "BF16", "shape": sides, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, sides in tensors:
            count = int(np.prod(sides))
            if len(sides) == 1:  # a norm
                file.write(
                    np.full(count, 0 if name == dead_norm else ONE_BF16, np.uint16).tobytes()
                )
                continue
            start = int(random.integers(POOL))
            while count:
                part = pool[start : start + count]
                file.write(memoryview(part).cast("B"))
                count, start = count - len(part), 0


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 8192,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
