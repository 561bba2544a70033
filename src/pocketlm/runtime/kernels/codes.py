"""Products of rounded inputs with rounded weights, code by code: PyTorch's int8 and FP8 products.

With x̂ = a (c - z) for each row of inputs and w = s d for each row of the weight,
    y = x̂ wᵀ = a s (c dᵀ - z Σ d),
and c dᵀ is a sum of whole numbers in int32: exact, where multiplying the decoded x̂ and w rounds.
Outliers, which stay as they came (LLM.int8()), are multiplied in float32 with the few columns of
the weight that they meet, decoded for the call, and added.
FP8 products are summed in float32 by the card. One scale for each row of the weight, one for each
row of inputs, or one for all of either; groups go to the weight-only kernels.

Legend: M rows of activations, I input columns, O output rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.core.activations import Codes
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.runtime.kernels.base import Grid

LEAST_ROWS_CUDA = 17  # torch._int_mm on CUDA takes no fewer rows of activations


class Int8Codes:
    """aten::_int_mm: int8 by int8 into int32."""

    name = "int8-codes"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants integers on both sides, symmetric weights, a scale a row; on CUDA sizes by 8."""
        inputs = grid.inputs
        if inputs is None or inputs.type != "int" or inputs.group_size is not None:
            return "takes integer inputs with a scale for each row"
        if grid.spec is not None or not grid.symmetric or grid.groups != 1:
            return "takes symmetric integer weights with one scale a row only"
        if grid.bits <= 4:
            return "would hold narrow codes in 8 bits"
        if device.type == "cuda" and (grid.rows % 8 or grid.columns % 8):
            return f"{grid.rows} x {grid.columns} is no multiple of 8 x 8"
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Codes int8 [O, I], float32 scales [O], and Σ d [O]."""
        assert isinstance(weight, PackedInt)
        codes_OI = weight.codes_OI.to(device)
        return {
            "codes_OI": codes_OI,
            "scale_O": weight.scale_OG[:, 0].float().to(device),
            "sum_O": codes_OI.sum(1, dtype=torch.int32).float(),
        }

    def matmul_codes(self, x: Codes, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The product [M, O] in `dtype`."""
        codes_MI, rows = x.levels.to(torch.int8), x.levels.shape[0]
        if codes_MI.is_cuda and rows < LEAST_ROWS_CUDA:
            codes_MI = torch.nn.functional.pad(codes_MI, (0, 0, 0, LEAST_ROWS_CUDA - rows))
        y_MO = torch.ops.aten._int_mm(codes_MI, buffers["codes_OI"].T)[:rows].float()
        if x.zero is not None:
            y_MO -= x.zero * buffers["sum_O"]
        y_MO *= x.scale
        if x.outliers is not None:
            columns = x.outliers.any(0).nonzero()[:, 0]
            y_MO += x.outliers[:, columns] @ buffers["codes_OI"][:, columns].float().T
        return (y_MO * buffers["scale_O"]).to(dtype)


class Float8Codes:
    """aten::_scaled_mm: E4M3 by E4M3 on tensor cores, a scale for each row of both."""

    name = "cuda-float8-codes"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants FP8 on both sides, scales by row or tensor, bfloat16 results, sizes by 16, sm90."""
        inputs = grid.inputs
        if inputs is None or inputs.type != "float" or inputs.group_size is not None:
            return "takes FP8 inputs with a scale for each row"
        if grid.spec is None or grid.spec.name not in ("FP8_TENSOR", "FP8_CHANNEL"):
            return "takes FP8 weights with a scale for each row or one"
        if device.type != "cuda" or dtype is not torch.bfloat16:
            return "gives bfloat16 on CUDA only"
        if grid.rows % 16 or grid.columns % 16:
            return f"{grid.rows} x {grid.columns} is no multiple of 16 x 16"
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
            return "needs an NVIDIA card of compute capability 9.0"
        return None

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Codes float8_e4m3fn [O, I] and float32 scales [1, O]."""
        assert isinstance(weight, PackedFloat)
        rows = weight.shape[0]
        scale_O = weight.scale.values_OG(rows, weight.spec)[:, 0]
        return {
            "codes_OI": weight.codes_OI.view(torch.float8_e4m3fn).to(device),
            "scale_1O": scale_O.reshape(1, rows).contiguous().to(device),
        }

    def matmul_codes(self, x: Codes, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The product [M, O] in `dtype`."""
        codes_MI = x.levels.to(torch.float8_e4m3fn)
        scale_M1 = x.scale.expand(codes_MI.shape[0], 1).contiguous()
        return torch.ops.aten._scaled_mm(
            codes_MI,
            buffers["codes_OI"].T,
            scale_a=scale_M1,
            scale_b=buffers["scale_1O"],
            out_dtype=dtype,
        )
