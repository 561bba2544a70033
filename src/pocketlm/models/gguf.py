"""GGUF files as a source: dequantized tensor by tensor, under Hugging Face names and shapes.

Block types become float16, stored floats keep their dtype. Names, permutations and the
configuration come from transformers' own GGUF tables; a tensor that they do not know is an error.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pocketlm.core.errors import ConfigError, SourceError, UnsupportedModel
from pocketlm.core.views import TensorInfo
from pocketlm.models.bytes import PositionalFile, byte_view, require_finite
from pocketlm.models.gguf_experts import as_mixture, checkpoint_name, expert_name, is_stack
from pocketlm.models.gguf_header import (
    GgufHeader,
    GgufTensor,
    damaged,
    read_header,
    write_small_header,
)
from pocketlm.models.gguf_metadata import complete
from pocketlm.models.gguf_rope import rope_parameters

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's types that hold values
PIECE_ELEMENTS = 4 << 20  # dequantized at a time: the library's temporaries are float32
LARGE_KEYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
LARGE_KEYS += ("tokenizer.ggml.merges", "tokenizer.ggml.precompiled_charsmap")
TABLES = ("token_embd.weight", "output.weight")  # read by rows; no converter reorders them
ROPE_TABLE = "rope_freqs.weight"


def require_library() -> None:
    """Says how to install the gguf library where it is missing.

    Raises:
        ConfigError: If it is.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "reading a GGUF file needs the package gguf.",
            remedy="Run: pip install 'pocketlm[gguf]'",
        ) from error


class GgufFile:
    """A GGUF file: its header, and the configuration that transformers makes of it.

    Args:
        path: The file.

    Raises:
        SourceError: If it is no GGUF file, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        require_library()
        self.path = path
        self.file = PositionalFile(path)
        self.header: GgufHeader = read_header(self.file)
        self.architecture = str(self.header.metadata.get("general.architecture", ""))
        for tensor in self.header.tensors:
            if tensor.offset + stored_bytes(self.file, tensor) > self.file.bytes_total:
                raise damaged(self.file, f"ends before tensor '{tensor.name}' does")
        blocks = self.header.metadata.get(f"{self.architecture}.block_count", 0)
        if not isinstance(blocks, int) or blocks > len(self.header.tensors):
            raise damaged(self.file, f"states {blocks} blocks, more than it has tensors")

    def config(self) -> tuple[PretrainedConfig, dict[str, Any]]:
        """Transformers' configuration, and the parsed dictionary that its converters want.

        Raises:
            UnsupportedModel: If transformers does not know the architecture as GGUF.
        """
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        tokens = len(self.header.metadata.get("tokenizer.ggml.tokens", ()))
        key = f"{self.architecture}.vocab_size"
        with tempfile.TemporaryDirectory() as directory:
            small = Path(directory) / "header.gguf"
            write_small_header(self.header, small, LARGE_KEYS, {key: tokens} if tokens else {})
            try:
                parsed = load_gguf_checkpoint(str(small))["config"]
                config = AutoConfig.from_pretrained(directory, gguf_file=small.name)
            except Exception as error:  # its code checks no value of a file
                what = f"transformers cannot read '{self.architecture}' from GGUF: {error}"
                raise UnsupportedModel(what, where=str(self.path)) from error
        if "vocab_size" not in parsed and tokens:
            config.vocab_size = parsed["vocab_size"] = tokens
        config = as_mixture(config, self.header.metadata, self.architecture)
        parsed.update(complete(config, self.header.metadata, self.architecture))
        self._scale_rope(config)
        return config, parsed

    def _scale_rope(self, config: PretrainedConfig) -> None:
        """Takes over what the file says of scaled rotary frequencies, which transformers does not.

        Raises:
            UnsupportedModel: If transformers has no parameters for it.
        """
        remedy = "Start from the model's Hugging Face directory instead."
        stated = self.header.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        known = getattr(config, "rope_parameters", None) or {}
        if stated != "none" and known.get("rope_type", "default") == "default":
            what = (
                f"scales rotary frequencies ({stated}), which transformers ignores in GGUF files."
            )
            raise UnsupportedModel(what, where=str(self.path), remedy=remedy)
        table = next((t for t in self.header.tensors if t.name == ROPE_TABLE), None)
        if table is None:
            return
        scaled = None
        if table.kind in PLAIN and "rope_theta" in known:
            factors_F = torch.empty(table.elements, dtype=PLAIN[table.kind])
            self.file.read_into(byte_view(factors_F), table.offset)
            scaled = rope_parameters(factors_F, config)
        if scaled is None:
            raise UnsupportedModel(
                f"scales rotary frequencies by a table ({ROPE_TABLE}) that is none of Llama 3.1's "
                "kind; transformers has no parameters for it.",
                where=str(self.path),
                remedy=remedy,
            )
        config.rope_parameters = scaled


def stored_bytes(file: PositionalFile, tensor: GgufTensor, elements: int | None = None) -> int:
    """Bytes of a tensor, or of some of its elements, in the file.

    Raises:
        SourceError: If the type is unknown or does not divide the tensor.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError) as error:
        raise damaged(
            file, f"gives tensor '{tensor.name}' the unknown type {tensor.kind}"
        ) from error
    count = tensor.elements if elements is None else elements
    if count % block or (tensor.shape and tensor.shape[-1] % block):
        raise damaged(file, f"gives tensor '{tensor.name}' a width that its type does not divide")
    return count // block * size


def parameter_names(gguf: GgufFile, model: PreTrainedModel, processor: Any) -> dict[str, str]:
    """The file's tensor names → the model's parameters.

    Args:
        gguf: The file.
        model: The model without weights.
        processor: transformers' rules for this architecture.

    Raises:
        UnsupportedModel: If the gguf library does not know the architecture.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(
        (key for key, value in MODEL_ARCH_NAMES.items() if value == gguf.architecture), None
    )
    if arch is None:
        what = f"has architecture '{gguf.architecture}', which the gguf library does not know."
        raise UnsupportedModel(what, where=str(gguf.path))
    table = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    names: dict[str, str] = {}
    for own in model.state_dict(keep_vars=True):
        asked = processor.preprocess_name(own)
        base, dot, leaf = asked.rpartition(".")
        if leaf not in ("weight", "bias"):
            base, dot, leaf = asked, "", ""
        # Some converters start from the model without its outer prefix.
        bare = base.removeprefix(f"{model.base_model_prefix}.")
        spelled = table.get_name(base) or table.get_name(bare)
        if spelled is None and base.endswith(".gate_up_proj"):  # two stacks of a file
            for part in ("gate_proj", "up_proj"):
                names[f"{table.get_name(base.replace('gate_up_proj', part))}.weight"] = own
        elif spelled is None:
            processor.perform_fallback_tensor_mapping(names, dot + leaf, "", asked)
        else:
            names[spelled + dot + leaf] = own
    return names


class GgufSource:
    """A TensorSource over a GGUF file.

    Args:
        gguf: The file.
        parsed: The dictionary that `GgufFile.config` gave.
        model: The model without weights, for names and shapes.

    Raises:
        UnsupportedModel: If a tensor of the file is not known to transformers.
    """

    def __init__(self, gguf: GgufFile, parsed: Mapping[str, Any], model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._gguf = gguf
        self._processor = TENSOR_PROCESSORS.get(gguf.architecture, TensorProcessor)(
            config=dict(parsed)
        )
        names = parameter_names(gguf, model, self._processor)
        self._model_type = model.config.model_type
        self._stored: dict[str, tuple[GgufTensor, int | None]] = {}  # expert index in a stack
        self._infos: dict[str, TensorInfo] = {}
        shapes = {
            name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()
        }
        for tensor in gguf.header.tensors:
            if tensor.name != ROPE_TABLE:  # the configuration says the same
                self._add(tensor, names, shapes)

    def _add(
        self, tensor: GgufTensor, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        dtype = PLAIN.get(tensor.kind, torch.float16)
        if name is not None and name in shapes and is_stack(tensor.name):
            self._require_stack(tensor, shapes[name])
            for expert in range(tensor.shape[0]):
                own = expert_name(name, tensor.name, expert, self._model_type)
                self._stored[own] = (tensor, expert)
                self._infos[own] = TensorInfo(own, dtype, tensor.shape[1:])
            return
        if name is None or name not in shapes:
            raise UnsupportedModel(
                f"transformers does not know what tensor '{tensor.name}' is for.",
                where=str(self._gguf.path),
                remedy="Start from the model's Hugging Face directory instead.",
            )
        own = checkpoint_name(name, self._model_type)
        self._stored[own] = (tensor, None)
        self._infos[own] = TensorInfo(own, dtype, shapes[name])

    def _require_stack(self, tensor: GgufTensor, fused: tuple[int, ...]) -> None:
        """Refuses a stack of other experts than the model has.

        Args:
            tensor: Gate, up or down matrices of a block's experts.
            fused: Shape of the parameter that they are part of; gate and up lie in one.
        """
        experts, rows, columns = fused
        rows = rows if "down" in tensor.name else rows // 2
        if tensor.shape != (experts, rows, columns):
            stated = f"{list(tensor.shape)}, but its metadata says {[experts, rows, columns]}"
            raise damaged(self._gguf.file, f"holds '{tensor.name}' as {stated}")

    def kinds(self) -> dict[str, int]:
        """Tensor name → ggml's number of the type it is stored in."""
        return {name: tensor.kind for name, (tensor, _) in self._stored.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order of the file."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """The whole tensor, dequantized; the caller owns the memory.

        Raises:
            SourceError: If it is absent, cut off, or not finite.
        """
        tensor, expert = self._get(name)
        if expert is not None:
            rows = tensor.shape[1]
            value = self._dequantize(tensor, expert * rows, (expert + 1) * rows)
            return self._checked(name, value.view(tensor.shape[1:]))
        value = self._dequantize(tensor, 0, tensor.elements // max(1, tensor.shape[-1]))
        return self._checked(name, self._processed(tensor, value.view(tensor.shape), name))

    def _processed(self, tensor: GgufTensor, value: Tensor, name: str) -> Tensor:
        """Undoes what llama.cpp's converter did, as transformers does."""
        if tensor.name in TABLES:
            return value
        dtype = value.dtype
        if dtype == torch.bfloat16:  # numpy has none
            value = value.float()
        done = self._processor.process(
            weights=value.numpy(), name=tensor.name, tensor_key_mapping={}, parsed_parameters={}
        )
        array = torch.from_numpy(
            done.weights.copy() if not done.weights.flags.c_contiguous else done.weights
        )
        return array.to(dtype).reshape(self._infos[name].shape).contiguous()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop, dequantized.

        Raises:
            SourceError: If they are cut off or not finite.
        """
        tensor, _ = self._get(name)
        if tensor.name not in TABLES:
            return self.read(name)[start:stop].clone()
        value = self._dequantize(tensor, start, stop)
        return self._checked(name, value.view(stop - start, tensor.shape[-1]))

    def chunks(self, name: str, bytes_at_once: int) -> Iterator[memoryview]:
        """The dequantized tensor's raw bytes, in order."""
        tensor, _ = self._get(name)
        info = self._infos[name]
        if tensor.name not in TABLES:
            view = byte_view(self.read(name))
            for start in range(0, len(view), max(8, bytes_at_once // 8 * 8)):
                yield view[start : start + max(8, bytes_at_once // 8 * 8)]
            return
        step = max(1, bytes_at_once // (info.bytes_stored // info.shape[0]))
        for start in range(0, info.shape[0], step):
            yield byte_view(self.rows(name, start, min(start + step, info.shape[0])))

    def fingerprint(self) -> str:
        """A digest of the whole file."""
        digest = hashlib.sha256()
        buffer = bytearray(8 << 20)
        total = self._gguf.file.bytes_total
        for start in range(0, total, len(buffer)):
            piece = memoryview(buffer)[: min(len(buffer), total - start)]
            self._gguf.file.read_into(piece, start)
            digest.update(piece)
        return digest.hexdigest()

    def _get(self, name: str) -> tuple[GgufTensor, int | None]:
        found = self._stored.get(name)
        if found is None:
            raise SourceError(f"holds no tensor '{name}'.", where=str(self._gguf.path))
        return found

    def _checked(self, name: str, value: Tensor) -> Tensor:
        require_finite(name, value, str(self._gguf.path))
        return value

    def _dequantize(self, tensor: GgufTensor, start: int, stop: int) -> Tensor:
        """Rows (of the last axis) start to stop, flat, a few at a time."""
        width = tensor.shape[-1] if tensor.shape else 1
        out = torch.empty((stop - start) * width, dtype=PLAIN.get(tensor.kind, torch.float16))
        step = max(1, PIECE_ELEMENTS // max(1, width))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            piece = out[(first - start) * width : (last - start) * width]
            self._dequantize_into(tensor, first * width, last * width, piece)
        return out

    def _dequantize_into(self, tensor: GgufTensor, first: int, last: int, out: Tensor) -> None:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        file = self._gguf.file
        offset = tensor.offset + stored_bytes(file, tensor, first)
        if tensor.kind in PLAIN:
            file.read_into(byte_view(out), offset)
            return
        raw = torch.empty(stored_bytes(file, tensor, last - first), dtype=torch.uint8)
        file.read_into(byte_view(raw), offset)
        try:
            values = dequantize(raw.numpy(), GGMLQuantizationType(tensor.kind))
        except NotImplementedError as error:
            kind = GGMLQuantizationType(tensor.kind).name
            what = f"tensor '{tensor.name}' is {kind}, which the gguf library cannot decode."
            remedy = "Start from a file of other types, or the model's Hugging Face directory."
            raise SourceError(what, where=str(file.path), remedy=remedy) from error
        out.copy_(torch.from_numpy(values).view(-1))
