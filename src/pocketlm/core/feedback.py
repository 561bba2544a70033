"""The sweep over columns with error feedback that GPTQ and SparseGPT share.

With H⁻¹ = UᵀU, for each column i in turn: it settles on a value v_i, and later columns make up for
what that costs (arXiv:2210.17323, eq. 2-3; arXiv:2301.00774, eq. 3):
    e = (w_i - v_i) / U_ii,   w_j -= e U_ij  for all j > i.
Blocks of columns are finished before the rest of the weight is updated, by one product.

Legend: O output rows, I input columns, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Settle = Callable[[int, Tensor], Tensor]
"""From a column's place in the order and its weights [O], to the values that it will have."""


def sweep(
    weight_OI: Float[Tensor, "o i"],
    upper_II: Float[Tensor, "i i"],
    settle: Settle,
    order_I: Tensor | None = None,
    block_columns: int = 128,
    begin: Callable[[int, Tensor, Tensor], None] = lambda start, rest_CO, upper_CC: None,
) -> Tensor:
    """Settles column after column.

    Args:
        weight_OI: The weight, float32.
        upper_II: U, its columns already in `order_I`.
        settle: Decides a column's values.
        order_I: The order of the columns; None as stored.
        block_columns: Columns between two updates of the rest.
        begin: Told of each block before it begins: its first place, its weights as they are by then
            [C, O], and its part of U [C, C].

    Returns:
        The settled values [O, I] in the stored order.
    """
    columns = weight_OI.shape[1]
    # Columns are taken one at a time: as rows of the transpose they lie together in memory.
    rest_IO = (weight_OI.T if order_I is None else weight_OI.T[order_I]).contiguous()
    if rest_IO.data_ptr() == weight_OI.data_ptr():
        rest_IO = rest_IO.clone()
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        upper_CC = upper_II[start:stop, start:stop]
        begin(start, rest_IO[start:stop], upper_CC)
        errors_CO = torch.empty_like(rest_IO[start:stop])
        for i in range(start, stop):
            value_O = settle(i, rest_IO[i])
            row_C = upper_CC[i - start]
            error_O = (rest_IO[i] - value_O) / row_C[i - start]
            rest_IO[i] = value_O
            errors_CO[i - start] = error_O
            rest_IO[i + 1 : stop].addr_(row_C[i - start + 1 :], error_O, alpha=-1)
        rest_IO[stop:].addmm_(upper_II[start:stop, stop:].T, errors_CO, alpha=-1)
    if order_I is None:
        return rest_IO.T.contiguous()
    value_OI = torch.empty_like(weight_OI)
    value_OI[:, order_I] = rest_IO.T
    return value_OI
