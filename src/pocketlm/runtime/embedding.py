"""An embedding that holds its rows packed: what `load` puts in place of a compressed Embedding.

Only the rows that are looked up are decoded, each distinct one once; the layer's own forward does
the rest, so that a scaled embedding stays one.

Legend: U distinct ids, W words, B bytes, G groups, D hidden width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.scales import Scale
from pocketlm.core.tensors import PackedFloat, PackedInt, WeightTensor, decode_rows
from pocketlm.formats.packing import unpack, unpack_bytes
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.reference import SCALE_BUFFERS, Reference


class PackedEmbedding(nn.Module):
    """Looks rows up in packed codes.

    Args:
        weight: Codes and scales [V, D], on the CPU, each row by itself (`QuantSpec.by_rows`).
        layer: The layer that it stands for; its weight is not used.
        dtype: Of what it gives.
        device: Where it runs.

    Raises:
        UnsupportedLayer: If the weight is stored as anything else than codes.
    """

    def __init__(
        self, weight: WeightTensor, layer: nn.Embedding, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        if not isinstance(weight, PackedInt | PackedFloat):
            raise UnsupportedLayer(f"an embedding is stored as {type(weight).__name__}.")
        self.grid, self.dtype = Grid.of(weight), dtype
        layer = copy.copy(layer)
        layer.padding_idx = None  # a row of all, not of those looked up; only training asks
        self._layer = [layer]  # in a list: its weight is no parameter of the model
        for name, buffer in Reference().pack(weight, dtype, device).items():
            self.register_buffer(name, buffer)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of some ids, [..., D]."""
        distinct_U, position = torch.unique(ids, return_inverse=True)
        rows_UD = self._rows(distinct_U)
        return functional_call(self._layer[0], {"weight": rows_UD}, (position,))

    def _rows(self, ids_U: Tensor) -> Tensor:
        grid, buffers = self.grid, dict(self.named_buffers())
        if grid.spec is None:
            words_UW, scale_UG = buffers["words_OW"][ids_U], buffers["scale_OG"][ids_U]
            codes_UD = unpack(words_UW, grid.bits, grid.columns)
            return PackedInt(codes_UD, scale_UG, None, grid.bits).dequantize(self.dtype)
        codes_UD = unpack_bytes(buffers["bytes_OB"][ids_U], grid.spec.bits)
        rest = [
            None if (kept := buffers.get(name)) is None else kept[ids_U]
            for name in list(SCALE_BUFFERS)[1:]
        ]
        scale = Scale(grid.spec.scale, buffers["scale_RG"][ids_U], *rest)
        return decode_rows(codes_UD, 0, scale, grid.spec, self.dtype, len(ids_U))

    def extra_repr(self) -> str:
        """Shape and grid."""
        return f"{self.grid.rows}, {self.grid.columns}, {self.grid.name}"
