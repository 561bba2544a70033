"""Our Triton products as a kernel of the table: weights of 2 to 8 bits, 16-bit activations.

Needs Triton's explicit layouts (Gluon, from Triton 3.6) and an NVIDIA card from compute capability
8.0; the tensor-core product for many rows needs Hopper. What is missing is said, and other rows of
the table serve.

Legend as in layout.py; M rows of activations, I input columns, O output rows.
"""

# A jitted function is launched by its index.
# pyright: reportIndexIssue=false
from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pocketlm.core.tensors import Packed, PackedInt
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.triton.launches import Launch, launch_for
from pocketlm.runtime.kernels.triton.layout import (
    TILE_ROWS,
    lane_bits,
    pack_groups,
    pack_planes,
    unit_columns,
)

CODES = ("codes", "high_bits")
LEAST_STAGES = 3  # of the ring of "prefill"
WIDE_COLUMNS, WIDE_TILES = 64, 8  # of a step of "wide": columns, tiles of 16 rows
WIDE_TOKENS = 256  # of a tile, for which "wide" wins even where it is not said to, in a graph
# Each launch of "wide" has the host make tensor maps, for longer than smaller products gain by it:
# a forward of 8B-shaped blocks waits for the host alone then (docs/experiments.md). In a graph they
# are made once.
WIDE_OPERATIONS = 1 << 38
SHARING_STEPS = 10  # that a program of "wide" could take in the time that sharing tiles costs it
EXPANDED_BYTES = 64 << 20  # of the weights that are unpacked at once for a product with many rows


_in_graphs = False


@contextmanager
def replayed() -> Generator[None]:
    """Products within will be replayed: what a launch costs the host does not count."""
    global _in_graphs
    before, _in_graphs = _in_graphs, True
    try:
        yield
    finally:
        _in_graphs = before


@lru_cache(maxsize=1)
def missing() -> str | None:
    """What is missing to compile the kernels here; None if nothing."""
    try:
        from pocketlm.runtime.kernels.triton import decode, expand, prefill, wide  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"needs Triton 3.6 or later ({error})"
    return None


class Card(NamedTuple):
    """What a launch depends on.

    Attributes:
        name: As CUDA spells it.
        hopper: Whether it is one.
        processors: Multiprocessors.
        shared_bytes: Shared memory that a program can have.
    """

    name: str
    hopper: bool
    processors: int
    shared_bytes: int


@lru_cache(maxsize=16)
def card(index: int) -> Card:
    """The card of that number."""
    found = torch.cuda.get_device_properties(index)
    return Card(
        found.name,
        found.major == 9,
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
    )


class TritonWeights:
    """One layout, and three products from it: few rows, many rows, very many rows."""

    name = "triton"

    def refuses(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> str | None:
        """Wants integers, bfloat16 or float16, groups by 32, an NVIDIA card from Ampere on."""
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return "takes bfloat16 and float16 activations on CUDA only"
        if _unit(grid) == 0:
            return f"groups of {grid.group_size} are no multiple of 32"
        if torch.version.cuda is None:
            return "is built for NVIDIA cards"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0"
        return missing()

    def pack(self, weight: Packed, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Planes of codes int16 [T, C, 32, words], scales [T, G, 16], zero points [T, G, 16]."""
        assert isinstance(weight, PackedInt)
        width = lane_bits(weight.bits, weight.group_size)
        unit = unit_columns(width, weight.group_size)
        planes = pack_planes(weight.codes_OI.to(device), width, unit)
        buffers = {"codes": planes[0].view(torch.int16)}
        if width == 3:
            buffers["high_bits"] = planes[1].view(torch.int16)
        buffers["scale"] = pack_groups(weight.scale_OG.to(device))
        if weight.zero_OG is not None:
            buffers["zero"] = pack_groups(weight.zero_OG.to(device))
        # A product may read its weights before the kernel in front of it has ended (decode.py).
        torch.cuda.current_stream(device).synchronize()
        return buffers

    def matmul(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]: unpacked in registers."""
        name, hopper, *_ = card(x_MI.device.index or 0)
        width = lane_bits(grid.bits, grid.group_size)
        launch = launch_for(name, width, grid.rows, grid.columns, x_MI.shape[0])
        if launch.product == "decode":
            return decode_product(x_MI, buffers, grid, launch, early=hopper and launch.early)
        wide = launch.product == "wide" or (_in_graphs and launch.tokens == WIDE_TOKENS)
        if hopper and wide and goes_wide(grid, x_MI.shape[0]):
            return wide_product(x_MI, buffers, grid, launch)
        if hopper:
            return prefill_product(x_MI, buffers, grid, launch)
        return self.matmul_tiles(x_MI, buffers, grid)

    def matmul_tiles(self, x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The product [M, O]: rows unpacked into a buffer, then the card's own product."""
        y_MO = x_MI.new_empty(x_MI.shape[0], grid.rows)
        step = max(1, EXPANDED_BYTES // (2 * TILE_ROWS * grid.columns)) * TILE_ROWS
        for start in range(0, grid.rows, step):
            tile_oI = expand(buffers, grid, start, min(start + step, grid.rows), x_MI.dtype)
            torch.mm(x_MI, tile_oI.T, out=y_MO[:, start : start + step])
        return y_MO


def _unit(grid: Grid) -> int:
    return unit_columns(lane_bits(grid.bits, grid.group_size), grid.group_size)


def _readable(x_MI: Tensor) -> Tensor:
    """The activations so that they can be read 16 bytes at a time.

    Triton knows that a number is a multiple of 16, and of nothing less.
    """
    if x_MI.stride(1) == 1 and x_MI.stride(0) % 16 == 0 and x_MI.data_ptr() % 16 == 0:
        return x_MI
    return x_MI.clone(memory_format=torch.contiguous_format)


def decode_product(
    x_MI: Tensor,
    buffers: Mapping[str, Tensor],
    grid: Grid,
    launch: Launch,
    *,
    early: bool = False,
) -> Tensor:
    """The product [M, O] of few rows; see decode.py.

    Args:
        x_MI: Activations.
        buffers: What `TritonWeights.pack` made.
        grid: The weight's.
        launch: Tile sizes.
        early: Whether it starts before the kernel before it has ended; on Hopper only.
    """
    from pocketlm.runtime.kernels.triton.decode import decode_kernel

    x_MI = _readable(x_MI) if launch.shared or x_MI.stride(1) != 1 else x_MI
    tokens, unit = x_MI.shape[0], _unit(grid)
    taken = launch.units(unit, grid.group_size, grid.columns)
    y_MO = torch.empty(tokens, grid.rows, dtype=x_MI.dtype, device=x_MI.device)
    words = {name: buffers[name].view(torch.int32) for name in CODES if name in buffers}
    codes, scale = words["codes"], buffers["scale"]
    tiles, units = -(-grid.rows // TILE_ROWS), grid.columns // unit
    steps, ahead = -(-units // (taken * launch.warps)), launch.ahead
    while steps % ahead:
        ahead //= 2
    programs = -(-tiles // launch.row_tiles)
    if launch.resident:
        programs = min(programs, launch.resident * card(x_MI.device.index or 0).processors)
    decode_kernel[(programs,)](
        x_MI, codes, words.get("high_bits", codes), scale, buffers.get("zero", scale), y_MO,
        tokens, grid.columns, grid.rows, units, grid.groups, x_MI.stride(0), grid.rows,
        STEPS=grid.group_size // (taken * unit), WIDTH=lane_bits(grid.bits, grid.group_size),
        UNIT=unit, ZEROS="zero" in buffers, EVEN=units % (taken * launch.warps) == 0,
        R=launch.row_tiles, C=taken, W=launch.warps, N=max(8, 1 << (tokens - 1).bit_length()),
        AHEAD=ahead, SHARED=launch.shared, PDL=early, num_warps=launch.warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y_MO


def prefill_product(
    x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid, launch: Launch
) -> Tensor:
    """The product [M, O] of many rows; see prefill.py.

    Args:
        x_MI: Activations.
        buffers: What `TritonWeights.pack` made.
        grid: The weight's.
        launch: Tile sizes.
    """
    from pocketlm.runtime.kernels.triton.prefill import add_parts_kernel, prefill_kernel

    x_MI = _readable(x_MI)
    rows, unit, splits = x_MI.shape[0], _unit(grid), launch.splits
    width = lane_bits(grid.bits, grid.group_size)
    taken = launch.units(unit, grid.group_size, grid.columns)
    room = card(x_MI.device.index or 0).shared_bytes
    while taken > 1 and room < LEAST_STAGES * _stage_bytes(launch, width, taken * unit):
        taken //= 2
    y_MO = torch.empty(rows, grid.rows, dtype=x_MI.dtype, device=x_MI.device)
    target = y_MO
    if splits > 1:
        target = torch.empty(splits, *y_MO.shape, dtype=torch.float32, device=x_MI.device)
    codes, scale = buffers["codes"], buffers["scale"]
    # Where it was measured; two steps are taken together, so that each part has an even number.
    deep = width == 4 and taken * unit == 64 and grid.columns % (2 * splits * 64) == 0
    blocks = -(-grid.rows // (TILE_ROWS * launch.warps)), -(-rows // launch.tokens), splits
    prefill_kernel[blocks](
        x_MI, codes, buffers.get("high_bits", codes), scale, buffers.get("zero", scale), target,
        rows, grid.rows, grid.columns // unit, grid.groups, x_MI.stride(0), grid.rows,
        STEPS=grid.group_size // (taken * unit), WIDTH=width, UNIT=unit, ZEROS="zero" in buffers,
        C=taken, W=launch.warps, N=launch.tokens, SPLITS=splits,
        STAGES=min(launch.stages, room // _stage_bytes(launch, width, taken * unit)),
        DEEP=deep, num_warps=launch.warps,
    )  # fmt: skip
    if splits > 1:
        count = y_MO.numel()
        add_parts_kernel[(-(-count // 1024),)](target, y_MO, count, SPLITS=splits, num_warps=4)
    return y_MO


def wide_product(x_MI: Tensor, buffers: Mapping[str, Tensor], grid: Grid, launch: Launch) -> Tensor:
    """The product [M, O] of very many rows; see wide.py.

    Args:
        x_MI: Activations.
        buffers: What `TritonWeights.pack` made.
        grid: The weight's, of whose steps of 64 columns an even number make a row.
        launch: Tile sizes.
    """
    from pocketlm.runtime.kernels.triton.wide import in_tiles, wide_kernel

    rows, unit = x_MI.shape[0], _unit(grid)
    width, taken = lane_bits(grid.bits, grid.group_size), WIDE_COLUMNS // unit
    codes = in_tiles(buffers["codes"].view(torch.int32), [WIDE_TILES, WIDE_COLUMNS * width // 2])
    scale = in_tiles(buffers["scale"], [WIDE_TILES, TILE_ROWS])
    zero = in_tiles(buffers["zero"], [WIDE_TILES, TILE_ROWS]) if "zero" in buffers else scale
    steps, token_tiles = grid.columns // WIDE_COLUMNS, -(-rows // launch.tokens)
    x = _readable(x_MI)
    if rows % launch.tokens:  # the copy engine takes longer over rows that are not there
        x = x_MI.new_empty(token_tiles * launch.tokens, grid.columns)
        x[:rows] = x_MI
    x = in_tiles(x, [launch.tokens, WIDE_COLUMNS], swizzle=128)
    tiles = -(-grid.rows // (WIDE_TILES * TILE_ROWS)) * token_tiles
    _, _, processors, room = card(x_MI.device.index or 0)
    shared = tiles * steps / processors + SHARING_STEPS < -(-tiles // processors) * steps
    programs = min(processors, tiles * steps // 2 if shared else tiles)
    y_MO = torch.empty(rows, grid.rows, dtype=x_MI.dtype, device=x_MI.device)
    parts, flags = y_MO, y_MO  # not used
    if shared:
        parts = x_MI.new_empty(programs, 128, launch.tokens, dtype=torch.float32)
        flags = x_MI.new_zeros(programs, 2, dtype=torch.int32)
    wide_kernel[(programs,)](
        x, codes, scale, zero, y_MO, parts, flags, rows, grid.rows, steps, token_tiles,
        2 if shared else steps, grid.rows, SHARED=shared,
        STEPS=grid.group_size // WIDE_COLUMNS, WIDTH=width, UNIT=unit, ZEROS="zero" in buffers,
        C=taken, N=launch.tokens,
        STAGES=min(launch.stages, room // _stage_bytes(launch, width, WIDE_COLUMNS)), num_warps=4,
    )  # fmt: skip
    return y_MO


def goes_wide(grid: Grid, rows: int) -> bool:
    """Whether steps of 64 columns make up groups, an even number of them a row, and it pays."""
    return (
        (_in_graphs or 2 * rows * grid.rows * grid.columns >= WIDE_OPERATIONS)
        and lane_bits(grid.bits, grid.group_size) in (4, 8)
        and grid.group_size % WIDE_COLUMNS == 0
        and grid.columns % (2 * WIDE_COLUMNS) == 0
    )


def _stage_bytes(launch: Launch, width: int, columns: int) -> int:
    """Shared memory of a stage of the ring: activations, codes, scales and zero points."""
    codes = 2 * columns * width * launch.warps  # of 16 rows a warp
    return 2 * columns * launch.tokens + codes + 2 * 4 * TILE_ROWS * launch.warps


def expand(
    buffers: Mapping[str, Tensor], grid: Grid, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Rows of the weight as floats.

    Args:
        buffers: What `TritonWeights.pack` made.
        grid: The weight's.
        start: The first row; a multiple of 16.
        stop: After the last row.
        dtype: Of the values, bfloat16 or float16.

    Returns:
        The values [stop - start, I].
    """
    from pocketlm.runtime.kernels.triton.expand import expand_kernel

    unit, warps = _unit(grid), 4
    codes, scale = buffers["codes"], buffers["scale"]
    rows_oI = torch.empty(stop - start, grid.columns, dtype=dtype, device=codes.device)
    units = grid.columns // unit
    expand_kernel[(-(-(stop - start) // TILE_ROWS), -(-units // warps))](
        codes, buffers.get("high_bits", codes), scale, buffers.get("zero", scale), rows_oI,
        start // TILE_ROWS, stop, grid.columns, units, grid.groups,
        STEPS=grid.group_size // unit, WIDTH=lane_bits(grid.bits, grid.group_size), UNIT=unit,
        ZEROS="zero" in buffers, C=1, W=warps, num_warps=warps,
    )  # fmt: skip
    return rows_oI
