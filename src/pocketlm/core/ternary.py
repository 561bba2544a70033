"""Weights of three levels: each block's scale that is best in the sense of squared errors.

Ternary Weight Networks (arXiv 1605.04711), section 2: with t in {-1, 0, 1}, ‖w - s t‖² is least
where t keeps the signs of the k largest |w|, s is their mean, and k maximises (Σ |w|)² / k over
them. Deviation: the paper takes 0.7 of the mean |w| for a threshold; a block is short enough to try
every k.

Legend: O output rows, I input columns, G blocks of a row, B weights of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketlm.core.tensors import PackedInt


def to_ternary(weight_OI: Tensor, block: int, dtype: torch.dtype) -> PackedInt:
    """A weight rounded to -s, 0 and s in every block.

    Args:
        weight_OI: Floats.
        block: Columns that share a scale; it divides I.
        dtype: Of the scales.
    """
    rows, columns = weight_OI.shape
    weight_OGB = weight_OI.float().view(rows, columns // block, block)
    size_OGB = weight_OGB.abs()
    sum_OGB = size_OGB.sort(dim=-1, descending=True).values.cumsum(-1)
    count_B = torch.arange(1, block + 1, device=weight_OI.device)
    best_OG1 = (sum_OGB.square() / count_B).argmax(-1, keepdim=True)
    scale_OG1 = (sum_OGB.gather(-1, best_OG1) / (best_OG1 + 1)).to(dtype)
    kept_OGB = 2 * size_OGB > scale_OG1.float()  # nearer to s than to 0
    codes_OI = (weight_OGB.sign() * kept_OGB).to(torch.int8).view(rows, columns)
    return PackedInt(codes_OI, scale_OG1[..., 0], None, 2)
