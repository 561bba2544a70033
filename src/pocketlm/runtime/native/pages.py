"""Weights side by side in large pages, in the order in which a step reads them.

A decoding step reads every weight once. In pages of 4 KiB the processor stops reading ahead at each
page's end and looks the next one up; in pages of 2 MiB one core read a third more bytes a second
(docs/experiments.md). A linear of a small model is less than such a page, so they share.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 2 << 20
LINE = 64  # bytes of a cache line, at which each tensor starts


def settle(tensors: Sequence[Tensor]) -> None:
    """Moves tensors, in place, into memory for which Linux is asked for large pages.

    What shares its storage with others stays where it is: it was moved before, or is a part of a
    joined weight. Memory is taken as it is filled and given back tensor by tensor, so that no more
    than one is held twice.

    Args:
        tensors: Contiguous, on the CPU, in the order of their use.
    """
    alone = [t for t in tensors if t.untyped_storage().nbytes() == t.nbytes]
    starts, end = [], 0
    for tensor in alone:
        starts.append(end)
        end += -(-tensor.nbytes // LINE) * LINE
    if end < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    memory = mmap.mmap(-1, end + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without large pages gives small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole = whole[-whole.data_ptr() % PAGE :]
    for tensor, start in zip(alone, starts, strict=True):
        place = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.set_(place.copy_(tensor))  # pyright: ignore[reportArgumentType]
