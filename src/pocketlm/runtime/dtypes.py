"""What a model computes in when nobody says: decided by what the processor can do, never guessed.

bfloat16 halves the bytes of what is not packed. On x86 PyTorch's int4 product is vectorised for
bfloat16 only, with AVX-512 or AVX2 and float32 inside, so packed models of at most 4 bits run
fastest in it on any such CPU. Dense bfloat16 products without AVX512-BF16 or AMX are several times
slower than float32 ones: what is not packed so is loaded in float32 there.
"""

from __future__ import annotations

import torch


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def default_dtype(device: torch.device | str, *, int4: bool) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why.

    Args:
        device: Where the model will run.
        int4: Whether most linears have codes of at most 4 bits.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return torch.bfloat16, f"bfloat16 is what {device.type} devices multiply fastest"
    if has_bfloat16_units():
        return torch.bfloat16, "this CPU multiplies bfloat16 in hardware"
    if int4 and torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2"):
        return torch.bfloat16, "the int4 product of PyTorch is vectorised for bfloat16"
    return torch.float32, "this CPU has no bfloat16 units"
