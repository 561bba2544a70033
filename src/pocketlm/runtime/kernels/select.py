"""Which kernel multiplies what: one explicit table, read from the top; the first row that fits.

The products are PyTorch's own but not part of its public interface, so each is tried once on a
small weight before it is trusted. What no fast row takes goes to `reference`, and that is said: as
the returned reason, and once for each reason as a warning of the logger ``pocketlm.runtime``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ConfigError
from pocketlm.core.scales import Scale
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.runtime.kernels.bags import Bags
from pocketlm.runtime.kernels.base import CodeKernel, Grid, Kernel
from pocketlm.runtime.kernels.codes import Float8Codes, Int8Codes
from pocketlm.runtime.kernels.cpu import Int4Cpu, Int8Cpu
from pocketlm.runtime.kernels.cuda import Int4Cuda
from pocketlm.runtime.kernels.reference import Reference
from pocketlm.runtime.kernels.triton.kernel import TritonWeights

log = logging.getLogger("pocketlm.runtime")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kernel: What multiplies.
        device: Device type; None for any.
        dtypes: Of the activations.
        bits: Bits of a code it may be given.
        tiles_from: Rows of activations from which it decodes whole tiles first; None for never.
        reason: Why it stands here.
    """

    kernel: Kernel
    device: str | None
    dtypes: tuple[torch.dtype, ...]
    bits: range
    tiles_from: int | None
    reason: str


# Where `tiles_from` is a number it was measured: Xeon (Cascade Lake, AVX-512, no bfloat16 units),
# one thread, torch 2.13, 2026-11-22, weights of 576 x 576 to 4096 x 4096, groups of 64 and 128; on
# CUDA an H200, weights of 14336 x 4096 and 4096 x 14336 (benchmarks/RESULTS.md).
TABLE = (
    Row(Int4Cpu(), "cpu", (BF16,), range(2, 5), 192, "int4 product of PyTorch, float32 inside"),
    Row(
        Int8Cpu(),
        "cpu",
        (BF16,),
        range(5, 9),
        None,
        "int8 product of PyTorch, a scale for each row",
    ),
    Row(
        Bags(),
        "cpu",
        (FP32, BF16, FP16),
        range(2, 9),
        12,
        "embedding bags of PyTorch (FBGEMM), exact float32",
    ),
    Row(
        TritonWeights(),
        "cuda",
        (BF16, FP16),
        range(2, 9),
        4096,
        "our Triton products: unpacked in registers, 5 to 7 bits in bytes",
    ),
    Row(Int4Cuda(), "cuda", (BF16,), range(2, 5), None, "int4 product of PyTorch (tinygemm)"),
    Row(
        Reference(),
        None,
        (FP32, BF16, FP16),
        range(2, 9),
        None,
        "plain torch: decodes tile by tile, slow with few tokens",
    ),
)


# For rounded activations, before the table above: both sides as codes. Where none fits, the table
# above multiplies the activations as decoded from their codes, with the same result up to rounding.
CODE_TABLE: tuple[tuple[CodeKernel, str], ...] = (
    (Int8Codes(), "int8 product of PyTorch, whole numbers throughout"),
    (Float8Codes(), "FP8 product of PyTorch on tensor cores"),
)


@dataclass(frozen=True)
class Choice:
    """The kernel a weight got.

    Attributes:
        kernel: What multiplies.
        tiles_from: Rows of activations from which it decodes tiles first; None for never.
        reason: Why this one.
        refused: Kernel name → why it was passed over, of the rows above.
    """

    kernel: Kernel | CodeKernel
    tiles_from: int | None
    reason: str
    refused: dict[str, str]

    @property
    def is_fallback(self) -> bool:
        """Whether no fast kernel took the weight."""
        return self.kernel.name == "reference"


def kernel_for(grid: Grid, dtype: torch.dtype, device: torch.device | str = "cpu") -> Choice:
    """Picks the kernel for a packed weight.

    Args:
        grid: Shape and number format of the weight.
        dtype: Of the activations.
        device: Where it will run.

    Returns:
        The choice, with the reasons of those passed over.

    Raises:
        ConfigError: If nothing multiplies with the dtype.
    """
    device = torch.device(device)
    refused: dict[str, str] = {}
    for code_kernel, why in CODE_TABLE if grid.inputs is not None else ():
        reason = code_kernel.refuses(grid, dtype, device) or probe(code_kernel, dtype, device)
        if reason is None:
            return Choice(code_kernel, None, why, refused)
        refused[code_kernel.name] = reason
    for row in TABLE:
        if row.device not in (None, device.type) or dtype not in row.dtypes:
            continue
        name = row.kernel.name
        if grid.spec is not None and not isinstance(row.kernel, Reference):
            refused[name] = "takes integers only"
            continue
        if grid.bits not in row.bits:
            refused[name] = f"takes {row.bits.start} to {row.bits.stop - 1} bits"
            continue
        reason = row.kernel.refuses(grid, dtype, device)
        reason = reason or probe(row.kernel, dtype, device, grid.bits, grid.symmetric)
        if reason is None:
            return Choice(row.kernel, row.tiles_from, row.reason, refused)
        refused[name] = reason
    raise ConfigError(
        f"no kernel multiplies with {dtype}.",
        where="dtype",
        remedy="Compute in float32, bfloat16 or float16.",
    )


def announce(choice: Choice, grid: Grid) -> None:
    """Warns of a fallback, once for each reason."""
    if choice.is_fallback:
        why = "; ".join(f"{name} {reason}" for name, reason in choice.refused.items())
        _warn_once(f"{grid.name}: no fast kernel ({why or 'none for this device'}).")


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    log.warning("%s Weights are decoded tile by tile, which is slow.", message)


_PROBE_SHAPES = {"cpu-int8": (256, 256), "triton": (1024, 128)}  # columns, group; else 256, 64


def probe(
    kernel: Kernel | CodeKernel,
    dtype: torch.dtype,
    device: torch.device,
    bits: int = 8,
    symmetric: bool = True,
) -> str | None:
    """Tries a kernel on a small weight against the definition.

    Args:
        kernel: The kernel.
        dtype: Of the activations.
        device: Where it runs.
        bits: Of a code of the weight.
        symmetric: Whether the weight has no zero points.

    Returns:
        What is wrong with it on this machine; None if nothing.
    """
    if isinstance(kernel, Reference):
        return None
    if isinstance(kernel, CodeKernel):
        return _probe_codes(kernel.name, dtype, str(device))
    return _probe(kernel.name, bits, symmetric, dtype, str(device))


@lru_cache(maxsize=256)
def _probe(
    name: str, bits: int, symmetric: bool, dtype: torch.dtype, device_name: str
) -> str | None:
    kernel = next(row.kernel for row in TABLE if row.kernel.name == name)
    device = torch.device(device_name)
    columns, group = _PROBE_SHAPES.get(name, (256, 64))
    rows, half = 80, 1 << (bits - 1)
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)
    scale_OG = torch.randn(rows, columns // group, generator=generator).to(dtype)
    zero_OG = torch.randint(-half, half, scale_OG.shape, dtype=torch.int8, generator=generator)
    weight = PackedInt(codes_OI, scale_OG, None if symmetric else zero_OG, bits)
    x_MI = torch.randn(70, columns, generator=generator).to(device, dtype)
    grid = Grid.of(weight)
    try:
        buffers = kernel.pack(weight, dtype, device)
        found = [kernel.matmul(x_MI[:few], buffers, grid) for few in (3, 12, 70)]
        found.append(kernel.matmul_tiles(x_MI, buffers, grid))
    except Exception as error:  # compilers raise what they like
        return f"fails here: {(str(error) or type(error).__name__).splitlines()[0]}"
    truth_MO = x_MI.cpu().double() @ weight.dequantize(torch.float64).T
    for y_MO in found:
        expected_MO = truth_MO[: y_MO.shape[0]]
        error = (y_MO.cpu().double() - expected_MO).norm() / expected_MO.norm()
        if not error < 8 * torch.finfo(dtype).eps:
            return f"gives wrong numbers here (relative error {error:.1e})"
    return None


@lru_cache(maxsize=64)
def _probe_codes(name: str, dtype: torch.dtype, device_name: str) -> str | None:
    kernel = next(kernel for kernel, _ in CODE_TABLE if kernel.name == name)
    device, rows, columns = torch.device(device_name), 80, 256
    generator = torch.Generator().manual_seed(0)
    whole = isinstance(kernel, Int8Codes)
    codes_OI = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scale_O1 = torch.randn(rows, 1, generator=generator).to(dtype)
    weight: Packed = PackedInt(codes_OI, scale_O1, None, 8)
    kinds = [ActivationSpec(), ActivationSpec(symmetric=False), ActivationSpec(outliers=1.0)]
    if not whole:
        spec = QuantSpec(bits=8, type="float", group_size=None)
        codes_OI = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        weight = PackedFloat(codes_OI.view(torch.uint8), Scale("float", scale_O1.abs()), spec)
        kinds = [ActivationSpec(type="float")]
    x_MI = torch.randn(3, columns, generator=generator).to(device, dtype)
    for kind in kinds:
        codes = InputQuantizer(kind).encode(x_MI)
        try:
            y_MO = kernel.matmul_codes(codes, kernel.pack(weight, dtype, device), dtype)
        except (RuntimeError, AttributeError, TypeError) as error:
            return f"fails here: {str(error).splitlines()[0]}"
        truth_MO = codes.decode().cpu().double() @ weight.dequantize(torch.float64).T
        error = (y_MO.cpu().double() - truth_MO).norm() / truth_MO.norm()
        if not error < 8 * torch.finfo(dtype).eps:
            return f"gives wrong numbers here (relative error {error:.1e})"
    return None
