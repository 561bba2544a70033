"""A decoding step of a plain decoder in one call of C: what few tokens on a CPU want.

It reads the weights where PyTorch's kernels hold them (int4 in blocks, int8 and floats by rows) and
the static cache in place. Which models and weights it takes, `native_step` says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketlm.runtime.kernels.cpu import block_rows
from pocketlm.runtime.linear import PackedLinear
from pocketlm.runtime.native import library
from pocketlm.runtime.native.pages import settle

if TYPE_CHECKING:
    from pocketlm.models.decoder_parts import Block, Norm, Parts
    from pocketlm.models.static_cache import StaticCache

ROWS = 4  # from more on, PyTorch's kernels decode a weight once for all rows
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3
ACTIVATIONS = (F.silu, lambda x: F.gelu(x, approximate="tanh"))


class _Linear(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "rows", "columns", "groups", "block")),
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
    )


class _Block(Structure):
    _fields_ = (
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")),
        *((name, c_int64) for name in ("row_stride", "head_stride", "window")),
        *((name, c_float) for name in ("norm_epsilon", "mlp_epsilon", "head_epsilon", "unused")),
    )


class _Model(Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                "blocks", "hidden", "inner", "heads", "kv_heads", "width", "rotated",
                "cache_kind", "activation", "capacity",
            )
        ),
        ("block", POINTER(_Block)),
        *((name, c_void_p) for name in ("norm", "cos", "sin")),
        ("head", _Linear),
        *((name, c_float) for name in ("epsilon", "scale")),
    )  # fmt: skip


class _NotTaken(Exception):
    """Says what the C code does not do."""


class NativeStep:
    """A step over the static cache of one decoder.

    Args:
        function: The compiled step.
        parts: Of the model.
        cache: Whose tensors are read and written.

    Raises:
        _NotTaken: If a part is of a kind that the code does not know.
    """

    name = "the step in C"
    kernels = None  # of Triton: none

    def __init__(self, function: Any, parts: Parts, cache: StaticCache) -> None:
        self._function = function
        function.argtypes = (POINTER(_Model), c_int64, c_void_p, c_int64, c_void_p, c_void_p)
        function.restype = c_int
        self._embedding = parts.embedding
        self._kept: list[Tensor] = []  # what C points to
        like = cache.parts[0].keys  # a prompt has filled it
        if like.dtype not in KINDS:
            raise _NotTaken(f"keys are {like.dtype}")
        settle(_packed(parts))
        cos_ND, sin_ND = parts.angles(cache.capacity, torch.empty(0))
        self._blocks = (_Block * len(parts.blocks))(
            *(
                self._block(block, part.keys, part.values)
                for block, part in zip(parts.blocks, cache.parts, strict=True)
            )
        )
        first = self._blocks[0]
        self._head = self._linear(parts.head)
        self._model = _Model(
            blocks=len(parts.blocks),
            hidden=first.q.columns,
            inner=first.gate.rows,
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            width=parts.head_dim,
            rotated=cos_ND.shape[-1],
            cache_kind=KINDS[like.dtype],
            activation=_activation(parts.activation),
            capacity=cache.capacity,
            block=self._blocks,
            norm=self._floats(parts.norm.weight),
            cos=self._floats(cos_ND),
            sin=self._floats(sin_ND),
            head=self._head,
            epsilon=parts.norm.epsilon,
            scale=parts.scale,
        )
        self._dtype = parts.norm.weight.dtype

    def at(self, ids_B: Tensor, length: int, pad_B: Tensor | None) -> Tensor:
        """Logits [B, V], float32, of ids at position `length`.

        Raises:
            MemoryError: If there is none for what a step holds.
        """
        x_BC = self._embedding(ids_B).float().contiguous()
        pads = torch.zeros(len(ids_B), dtype=torch.long) if pad_B is None else pad_B
        logits_BV = torch.empty(len(ids_B), self._head.rows)
        failed = self._function(
            ctypes.byref(self._model), len(ids_B), x_BC.data_ptr(), length, pads.data_ptr(),
            logits_BV.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError
        return logits_BV

    def _block(self, block: Block, keys: Tensor, values: Tensor) -> _Block:
        self._kept += (keys, values)
        q, k, v = (self._linear(linear) for linear in block.qkv)
        gate, up = (self._linear(linear) for linear in block.gate_up)
        q_norm, k_norm = block.head_norms or (None, None)
        return _Block(
            q, k, v, self._linear(block.output), gate, up, self._linear(block.down),
            self._floats(block.attention_norm.weight), self._floats(block.mlp_norm.weight),
            self._norm(q_norm), self._norm(k_norm), keys.data_ptr(), values.data_ptr(),
            keys.stride(0), keys.stride(1), block.window or 0,
            block.attention_norm.epsilon, block.mlp_norm.epsilon,
            0.0 if q_norm is None else q_norm.epsilon, 0.0,
        )  # fmt: skip

    def _linear(self, linear: nn.Module) -> _Linear:
        bias = None if linear.bias is None else self._floats(linear.bias)  # type: ignore[arg-type]
        if type(linear) is nn.Linear:
            weight = linear.weight.data
            if type(weight) is not Tensor or weight.dtype not in KINDS or weight.stride(-1) != 1:
                raise _NotTaken(f"a weight is {type(weight).__name__} of {weight.dtype}")
            self._kept.append(weight)
            rows, columns = weight.shape
            return _Linear(KINDS[weight.dtype], rows, columns, 1, 1, weight.data_ptr(), None, bias)
        if not isinstance(linear, PackedLinear) or linear.quantizer is not None:
            raise _NotTaken(f"a linear is a {type(linear).__name__}")
        name, grid = linear.choice.kernel.name, linear.grid
        if name == "cpu-int4" and grid.rows % block_rows() == 0:
            codes, scale = linear.get_buffer("packed"), linear.get_buffer("scale_zero_GO2")
            self._kept += (codes, scale)
            return _Linear(
                INT4, grid.rows, grid.columns, scale.shape[0], block_rows(), codes.data_ptr(),
                scale.data_ptr(), bias,
            )  # fmt: skip
        if name == "cpu-int8":
            codes, scale = linear.get_buffer("codes_OI"), linear.get_buffer("scale_O")
            self._kept += (codes, scale)
            return _Linear(
                INT8, grid.rows, grid.columns, 1, 1, codes.data_ptr(), scale.data_ptr(), bias
            )
        raise _NotTaken(f"a linear of {grid.rows} rows runs on {name}")

    def _norm(self, norm: Norm | None) -> int | None:
        return None if norm is None else self._floats(norm.weight)

    def _floats(self, tensor: Tensor) -> int:
        """The address of a float32 copy that lives as long as this."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()


def _packed(parts: Parts) -> list[Tensor]:
    """What packed linears hold, in the order of a step; codes of one input side by side."""
    groups: list[Sequence[nn.Module]] = []
    for block in parts.blocks:
        groups += (block.qkv, (block.output,), block.gate_up, (block.down,))
    groups.append((parts.head,))
    found: list[Tensor] = []
    for group in groups:
        held = [dict(one.named_buffers()) for one in group if isinstance(one, PackedLinear)]
        for name in dict.fromkeys(name for buffers in held for name in buffers):
            found += [buffers[name] for buffers in held if name in buffers]
    return found


def native_step(parts: Parts, cache: StaticCache, rows: int) -> NativeStep | str:
    """The step in C, or why there is none."""
    if rows > ROWS:
        return f"it takes at most {ROWS} rows"
    compiled = library()
    if isinstance(compiled, str):
        return compiled
    try:
        return NativeStep(compiled.pocketlm_step, parts, cache)
    except _NotTaken as reason:
        return str(reason)


def _activation(function: Any) -> int:
    """Which of the known ones it is, found by trying."""
    x = torch.linspace(-6, 6, 64)
    for index, known in enumerate(ACTIVATIONS):
        if torch.allclose(function(x), known(x), atol=1e-6):
            return index
    raise _NotTaken("its activation is neither SiLU nor GELU by tanh")
