"""2:4 weights on sparse tensor cores, through PyTorch's semi-structured tensors.

Such a linear holds half the values and 2 bits of index for each, and its product runs on units
that skip the zeros. They exist on CUDA from compute capability 8.0, for 16-bit floats; PyTorch
wants rows and columns in whole tiles.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from pocketlm.core.tensors import Dense, Sparse

ROWS, COLUMNS = 32, 64  # of a tile
log = logging.getLogger("pocketlm.runtime")


def refuses(weight: Sparse, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a sparse weight does not run on sparse tensor cores here; None where it does."""
    rows, columns = weight.shape
    if weight.pattern != (2, 4):
        return "no kernel skips zeros of this pattern"
    if not isinstance(weight.values, Dense):
        return "its values are quantized, and PyTorch multiplies 2:4 of floats only"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sparse tensor cores are on CUDA from compute capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"sparse tensor cores take 16-bit floats, not {dtype}"
    if rows % ROWS or columns % COLUMNS:
        return f"{rows} x {columns} are no whole tiles of {ROWS} x {COLUMNS}"
    return None


def make_sparse(linear: nn.Linear) -> nn.Linear:
    """The linear with its 2:4 weight compressed for sparse tensor cores, in place."""
    with warnings.catch_warnings():  # that its interface may change: not the user's concern
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructured")
        compressed = to_sparse_semi_structured(linear.weight.data)
    linear.weight = nn.Parameter(compressed, requires_grad=False)
    return linear
