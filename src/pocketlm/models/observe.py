"""Which linears read one and the same value: found by running a block, not by class names.

A torch function mode keeps a reference to every tensor it sees and numbers values: views of all
elements and casts are the same value, in-place results are new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CASTS = frozenset(
    {
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "type_as",
        "contiguous",
        "detach",
        "clone",
    }
)


class ValueNumbers(TorchFunctionMode):
    """Numbers the values that flow through torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Tensor, int, int]] = {}
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        """The value's number; a tensor changed in place since is a new value."""
        with torch._C.DisableTorchFunction():
            known = self._seen.get(id(tensor))
            if known is not None and known[1] == tensor._version:
                return known[2]
            self._count += 1
            self._keep(tensor, self._count)
            return self._count

    def _keep(self, tensor: Tensor, number: int) -> None:
        # The reference keeps the id from being used again.
        self._seen[id(tensor)] = (tensor, tensor._version, number)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the function; a view of all elements or a cast inherits its argument's number."""
        if not (args and isinstance(args[0], Tensor)):
            return func(*args, **(kwargs or {}))
        before = self.number(args[0])
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result is not args[0]
            and _same_value(func, args[0], result)
        ):
            self._keep(result, before)
        return result


def _same_value(func: Any, before: Tensor, after: Tensor) -> bool:
    if before.numel() != after.numel():
        return False
    if getattr(func, "__name__", "") in CASTS and before.shape == after.shape:
        return True
    return (
        before.dtype == after.dtype
        and before.is_contiguous()
        and after.is_contiguous()
        and before.data_ptr() == after.data_ptr() != 0  # all empty tensors lie at 0
    )


@dataclass
class Observation:
    """What one run of a block showed; paths are relative to the block.

    Attributes:
        groups: Linears by the value they read, in order of execution.
        producers: For each group, the module whose output that value is, where one is.
        idle: Linears that never ran.
    """

    groups: list[list[str]] = field(default_factory=list)
    producers: list[str | None] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)


def observe(linears: Mapping[str, nn.Module], block: nn.Module, run: Any) -> Observation:
    """Runs a block once and groups its linears.

    Args:
        linears: The linears by path relative to the block.
        block: Holds them.
        run: Takes nothing; runs the block's forward.

    Returns:
        The groups, in order of execution.
    """
    seen = Observation()
    group_of_value: dict[int, int] = {}
    made_by: dict[int, str] = {}
    numbers = ValueNumbers()
    path_of = {id(module): path for path, module in linears.items()}
    ran: set[str] = set()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        path, value = path_of[id(module)], numbers.number(args[0])
        if path in ran:
            return
        ran.add(path)
        if value not in group_of_value:
            group_of_value[value] = len(seen.groups)
            seen.groups.append([])
            seen.producers.append(made_by.get(value))
        seen.groups[group_of_value[value]].append(path)

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made_by.setdefault(numbers.number(output), path)

        return hook

    handles = [module.register_forward_pre_hook(before) for module in linears.values()]
    for path, module in block.named_modules():
        if id(module) not in path_of and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(after(path)))
    try:
        with torch.no_grad(), numbers:
            run()
    finally:
        for handle in handles:
            handle.remove()
    seen.idle = [path for path in linears if path not in ran]
    return seen
