"""What a block is made of, before any weight is read: its linears, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pocketlm.core.views import Fold
from pocketlm.models.experts import PerExpert, holds_fused_experts
from pocketlm.models.linear import is_linear, linear_shape
from pocketlm.models.names import NameMap
from pocketlm.models.shortcut import REASON, SHORTCUT


@dataclass(frozen=True)
class Layout:
    """One block; paths are relative to it unless said otherwise.

    Attributes:
        path: The block's path, as the checkpoint spells it.
        linears: Path → (O, I) of each linear to compress.
        names: Path → full module path, as the checkpoint spells it.
        tensors: Path → the checkpoint tensor of its weight.
        skipped: Full module path → why it is left alone.
        key: Equal for blocks that can share one observation.
    """

    path: str
    linears: Mapping[str, tuple[int, int]]
    names: Mapping[str, str]
    tensors: Mapping[str, str]
    skipped: Mapping[str, str]
    key: Any

    def spell(self, fold: Fold | None) -> Fold | None:
        """A fold with its producer's full path, as the checkpoint spells it."""
        if fold is None:
            return None
        return replace(fold, producer=self.spell_path(fold.producer))

    def spell_path(self, inner: str) -> str:
        """The full path of a module of the block, as the checkpoint spells it."""
        return self.names.get(inner, f"{self.path}.{inner}")


def lay_out(block: nn.Module, path: str, names: NameMap, fused: Mapping[str, str]) -> Layout:
    """Lists a block's linears under the checkpoint's names.

    Args:
        block: On the meta device.
        path: The block's path in the model.
        names: The checkpoint's names.
        fused: Modules of fused experts that stay → why.

    Returns:
        The layout.
    """
    linears: dict[str, tuple[int, int]] = {}
    spelled: dict[str, str] = {}
    tensors: dict[str, str] = {}
    skipped: dict[str, str] = {}
    routers = router_paths(block)
    for inner, module in block.named_modules():
        if not any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            continue
        if not is_linear(module):
            full = f"{path}.{inner}"
            skipped[_spelled(full, module, names)] = fused.get(full) or _why_not(module)
            continue
        binding = names.bindings[f"{path}.{inner}.weight"]
        name = binding.tensors[0].removesuffix(".weight")
        if not binding.plain:
            skipped[name] = "the checkpoint stores it fused or permuted"
        elif inner == SHORTCUT:
            skipped[name] = REASON
        elif inner in routers:
            skipped[name] = "router"
        else:
            linears[inner], spelled[inner] = linear_shape(module), name
            tensors[inner] = binding.tensors[0]
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return Layout(
        path=spelled_path(block, path, names),
        linears=linears,
        names=spelled,
        tensors=tensors,
        skipped=skipped,
        key=(type(block), shapes),
    )


def _why_not(module: nn.Module) -> str:
    if "router" in type(module).__name__.lower():
        return "router"
    return f"{type(module).__name__} is no plain linear"


def _spelled(path: str, module: nn.Module, names: NameMap) -> str:
    """A module's path as the checkpoint spells it, where its first parameter is stored plainly."""
    leaf = next(name for name, _ in module.named_parameters(recurse=False))
    binding = names.bindings[f"{path}.{leaf}"]
    tensor = binding.tensors[0]
    return (
        tensor.removesuffix(f".{leaf}") if binding.plain and tensor.endswith(f".{leaf}") else path
    )


def router_paths(block: nn.Module) -> set[str]:
    """Linears beside a module that holds experts: they choose or weigh them."""
    found = set()
    for path, module in block.named_modules():
        children = dict(module.named_children())
        if any(_holds_experts(child) for child in children.values()):
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{name}" for name, child in children.items() if is_linear(child)}
    return found


def _holds_experts(module: nn.Module) -> bool:
    return isinstance(module, PerExpert | nn.ModuleList) or holds_fused_experts(module)


def spelled_path(block: nn.Module, path: str, names: NameMap) -> str:
    """A block's path as the checkpoint spells it: GPT-2's is often without "transformer."."""
    for inner, _ in block.named_parameters():
        binding = names.bindings[f"{path}.{inner}"]
        if binding.plain and binding.tensors[0].endswith(f".{inner}"):
            return binding.tensors[0].removesuffix(f".{inner}")
    return path
