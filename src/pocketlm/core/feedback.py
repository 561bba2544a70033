"""The sweep over columns with error feedback that GPTQ and SparseGPT share.

With H⁻¹ = UᵀU, for each column i in turn: it settles on a value v_i, and later columns make up for
what that costs (arXiv:2210.17323, eq. 2-3; arXiv:2301.00774):
    e = (w_i - v_i) / U_ii,   w_j -= e U_ij  for all j > i.
Blocks of columns are finished (`columns.feed_back`) before the rest of the weight is updated, by
one product.

Legend: O output rows, I input columns, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.columns import Rounding, feed_back

Choose = Callable[[Tensor, Tensor], Tensor]
"""From a block's weights as they are by then [C, O] and its part of U [C, C], to its mask [C, O]"""


def sweep(
    weight_OI: Float[Tensor, "o i"],
    upper_II: Float[Tensor, "i i"],
    order_I: Tensor | None = None,
    block_columns: int = 128,
    rounding: Rounding | None = None,
    mask_IO: Tensor | None = None,
    choose: Choose | None = None,
) -> Tensor:
    """Settles column after column.

    Args:
        weight_OI: The weight, float32.
        upper_II: U, its columns already in `order_I`.
        order_I: The order of the columns; None as stored.
        block_columns: Columns between two updates of the rest.
        rounding: The grid to round to, its columns already in `order_I`; None: values stay floats.
        mask_IO: Bool, in `order_I`: which weights stay; None: all do.
        choose: Decides the mask of each block before it begins, and puts it into `mask_IO`.

    Returns:
        The settled levels, without a grid the values, [O, I] in the stored order.
    """
    columns = weight_OI.shape[1]
    # Columns are taken one at a time: as rows of the transpose they lie together in memory.
    rest_IO = (weight_OI.T if order_I is None else weight_OI.T[order_I]).contiguous()
    if rest_IO.data_ptr() == weight_OI.data_ptr():
        rest_IO = rest_IO.clone()
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        upper_CC, rest_CO = upper_II[start:stop, start:stop], rest_IO[start:stop]
        if choose is not None and mask_IO is not None:
            mask_IO[start:stop] = choose(rest_CO, upper_CC)
        settled_CO, errors_CO = feed_back(
            rest_CO,
            upper_CC,
            None if rounding is None else rounding.part(start, stop),
            None if mask_IO is None else mask_IO[start:stop],
        )
        rest_IO[start:stop] = settled_CO
        rest_IO[stop:].addmm_(upper_II[start:stop, stop:].T, errors_CO, alpha=-1)
    if order_I is None:
        return rest_IO.T.contiguous()
    settled_OI = torch.empty_like(weight_OI)
    settled_OI[:, order_I] = rest_IO.T
    return settled_OI
