"""Fused experts become one linear each, under the checkpoint's names.

transformers keeps the experts of a layer in two 3-D parameters; checkpoints mostly hold a matrix
per expert. Where they do, the fused module is replaced by per-expert linears and a plain loop over
the experts that are hit. The replacement must give the fused module's output on random input in
float64; where it does not, the fused module stays and is left out of compression.
Legend: E experts, N tokens, K experts per token, D hidden width, F width inside an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pocketlm.models.names import Binding, NameMap
from pocketlm.models.skeleton import Skeleton

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PROBE_E, PROBE_N, PROBE_K, PROBE_D, PROBE_F = 5, 7, 2, 24, 20
PROBE_TOLERANCE = 1e-12  # relative, in float64


class Expert(nn.Module):
    """One gated expert: down(act(gate(x)) * up(x))."""

    def __init__(
        self, width: int, inner: int, act_fn: Callable[[Tensor], Tensor], like: Tensor
    ) -> None:
        super().__init__()
        kind = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.gate = nn.Linear(width, inner, **kind)
        self.up = nn.Linear(width, inner, **kind)
        self.down = nn.Linear(inner, width, **kind)
        self.act_fn = act_fn

    def forward(self, x_ND: Tensor) -> Tensor:
        """The expert's output [N, D]."""
        return self.down(self.act_fn(self.gate(x_ND)) * self.up(x_ND))


class PerExpert(nn.Module):
    """Experts as separate modules, called like transformers' fused ones.

    Args:
        fused: The module replaced; its activation is taken over.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        gate_up, down = fused.get_parameter(GATE_UP), fused.get_parameter(DOWN)
        count, width, inner = down.shape
        act_fn = fused.act_fn
        assert callable(act_fn)
        self.experts = nn.ModuleList(Expert(width, inner, act_fn, gate_up) for _ in range(count))
        self.run_all = False  # while observing, so that every linear is seen
        self.watch: Callable[[int, Tensor, Tensor], None] | None = None

    def forward(self, hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """The weighted sum of each token's experts [N, D]; experts without a token are not run."""
        total_ND = torch.zeros_like(hidden_ND)
        hit = range(len(self.experts)) if self.run_all else torch.unique(index_NK).tolist()
        for expert in hit:
            if expert == len(self.experts):  # transformers' mark for "no expert here"
                continue
            token, place = torch.where(index_NK == expert)
            out_nD = self.experts[expert](hidden_ND[token]) * weight_NK[token, place, None]
            if self.watch is not None:
                self.watch(expert, weight_NK[token, place], out_nD.norm(dim=-1))
            total_ND.index_add_(0, token, out_nD.to(total_ND.dtype))
        return total_ND


def split_experts(skeleton: Skeleton, names: NameMap) -> tuple[NameMap, Mapping[str, str]]:
    """Replaces fused experts inside blocks, where the checkpoint holds one matrix per expert.

    Args:
        skeleton: Its blocks are changed in place.
        names: The checkpoint's names for the fused parameters.

    Returns:
        The names for the replaced modules, and module path → reason of the fused ones that stay.
    """
    bindings = dict(names.bindings)
    refused: dict[str, str] = {}
    verdicts: dict[type, str | None] = {}
    for block, block_path in zip(skeleton.blocks, skeleton.block_paths, strict=True):
        for inner, module in list(block.named_modules()):
            if not holds_fused_experts(module):
                continue
            path = f"{block_path}.{inner}"
            reason = _why_not(module, path, names)
            if reason is None:
                if type(module) not in verdicts:
                    verdicts[type(module)] = probe(module)
                reason = verdicts[type(module)]
            if reason is not None:
                refused[path] = reason
                continue
            parent, _, leaf = inner.rpartition(".")
            setattr(block.get_submodule(parent), leaf, PerExpert(module))
            bindings.update(_expert_bindings(path, bindings))
            del bindings[f"{path}.{GATE_UP}"], bindings[f"{path}.{DOWN}"]
    return replace(names, bindings=bindings), refused


def split_like(blocks: Sequence[nn.Module], like: Sequence[nn.Module]) -> None:
    """Replaces fused experts in place where they are replaced in other blocks of that model."""
    for block, other in zip(blocks, like, strict=False):
        for inner, module in other.named_modules():
            if isinstance(module, PerExpert):
                parent, _, leaf = inner.rpartition(".")
                owner = block.get_submodule(parent)
                setattr(owner, leaf, PerExpert(owner.get_submodule(leaf)))


def holds_fused_experts(module: nn.Module) -> bool:
    """Whether a module of a model's own has a 3-D parameter (torch's convolutions have one too)."""
    if type(module).__module__.startswith("torch.nn"):
        return False
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _why_not(module: nn.Module, path: str, names: NameMap) -> str | None:
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {GATE_UP, DOWN}:
        return (
            f"{type(module).__name__} holds {', '.join(sorted(own))}, not just {GATE_UP} and {DOWN}"
        )
    for name, patterns in ((GATE_UP, 2), (DOWN, 1)):
        binding = names.bindings[f"{path}.{name}"]
        if binding.converter is None:
            return f"the checkpoint holds {binding.tensors[0]} as one fused tensor"
        operations = [type(op).__name__ for op in binding.converter.operations]
        if operations != ["MergeModulelist", "Concatenate"][:patterns]:
            return f"transformers converts {name} by {', '.join(operations)}"
        if len(binding.converter.source_patterns) != patterns:
            return f"transformers makes {name} of other parts than one matrix per expert"
    return None


def _expert_bindings(path: str, bindings: Mapping[str, Binding]) -> dict[str, Binding]:
    """A plain binding for every expert's linear; tensors come in order of their expert."""
    made = {}
    gate_up, down = bindings[f"{path}.{GATE_UP}"], bindings[f"{path}.{DOWN}"]
    for binding, parts in ((gate_up, ("gate", "up")), (down, ("down",))):
        assert binding.converter is not None
        for pattern, part in zip(binding.converter.source_patterns, parts, strict=True):
            pairs = zip(binding.tensors, binding.patterns, strict=True)
            mine = [tensor for tensor, matched in pairs if matched == pattern]
            for index, tensor in enumerate(mine):
                parameter = f"{path}.experts.{index}.{part}.weight"
                made[parameter] = Binding(parameter, (tensor,))
    return made


def probe(fused: nn.Module) -> str | None:
    """Compares a narrow copy of a fused module with its replacement on random input in float64.

    Args:
        fused: On the meta device, of any size.

    Returns:
        None where they agree, else why not.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    narrow = _narrow(fused)
    gate_up = nn.Parameter(draw(PROBE_E, 2 * PROBE_F, PROBE_D), requires_grad=False)
    down = nn.Parameter(draw(PROBE_E, PROBE_D, PROBE_F), requires_grad=False)
    narrow._parameters.update({GATE_UP: gate_up, DOWN: down})
    try:
        split = PerExpert(narrow)
        for expert, module in enumerate(split.experts):
            assert isinstance(module, Expert)
            module.gate.weight.data = gate_up[expert, :PROBE_F]
            module.up.weight.data = gate_up[expert, PROBE_F:]
            module.down.weight.data = down[expert]
        hidden = draw(PROBE_N, PROBE_D)
        weight, index = draw(PROBE_N, PROBE_E).softmax(-1).topk(PROBE_K)
        with torch.no_grad():
            expected = narrow(hidden, index, weight)
            error = float((split(hidden, index, weight) - expected).norm() / expected.norm())
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as failure:
        return f"{type(fused).__name__} could not be run alone ({failure})"
    if not error < PROBE_TOLERANCE:
        return f"{type(fused).__name__} computes something else (relative difference {error:.1e})"
    return None


def _narrow(fused: nn.Module) -> nn.Module:
    """A shallow copy whose whole-number attributes say the probe's sizes."""
    count, width, inner = fused.get_parameter(DOWN).shape
    sizes = {count: PROBE_E, width: PROBE_D, inner: PROBE_F, 2 * inner: 2 * PROBE_F}
    narrow = copy.copy(fused)
    narrow._parameters = dict(fused._parameters)
    for name, value in vars(fused).items():
        if type(value) is int and value in sizes:
            setattr(narrow, name, sizes[value])
    return narrow


def run_all_experts(block: nn.Module, on: bool) -> None:
    """Switches a block between running every expert and only those that are hit."""
    for module in block.modules():
        if isinstance(module, PerExpert):
            module.run_all = on
