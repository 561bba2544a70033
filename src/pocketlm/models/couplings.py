"""Which dimensions of a model change only together, found by building it with other sizes.

Couplings are observed, not listed: the model is built again with one key of its configuration
changed, on the meta device, and whatever changes its shape belongs together. That cutting these
slices is the same as zeroing them is then proved on a block (models/coupling_proof).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pocketlm.core.errors import UnsupportedLayer, UnsupportedModel
from pocketlm.core.transform import CHANNELS, EXPERTS, HEADS, HIDDEN, Cut, Structure
from pocketlm.models.adapter import Model
from pocketlm.models.coupling_proof import prove, prove_same
from pocketlm.models.edits import edits_of, plain_tensor, with_experts
from pocketlm.models.experts import PerExpert, split_like
from pocketlm.models.linear import is_linear
from pocketlm.models.skeleton import Skeleton, skeleton_like

CHANNEL_KEYS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "intermediate_size_mlp", "ffn_dim", "n_inner", "ffn_hidden_size",
)  # fmt: skip
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
HIDDEN_KEYS = ("hidden_size", "n_embd")


@dataclass(frozen=True)
class Trial:
    """A key of the configuration and the units that it counts.

    Attributes:
        dimension: "channels", "heads" or "experts".
        key: Of the configuration.
        units: Its value now.
    """

    dimension: str
    key: str
    units: int


class Couplings:
    """The structures of a model, by dimension.

    Args:
        model: The original; weights are read only to prove couplings.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        text = model.skeleton.model.config.get_text_config()
        self.config: Mapping[str, Any] = text.to_dict()
        self.shapes = shapes_of(model.skeleton)
        self._structures: dict[str, tuple[Structure, ...]] = {}
        self._loadable: dict[tuple[str, int, str], str | None] = {}

    def structures(self, dimension: str) -> Sequence[Structure]:
        """The structures of a dimension, block by block; proved on one block of each kind.

        Raises:
            UnsupportedModel: If the configuration has no such dimension.
            UnsupportedLayer: If cutting is not the same as zeroing, with the layer's name.
        """
        if dimension not in self._structures:
            found = self._propose(dimension)
            if not found:
                raise UnsupportedModel(
                    f"its configuration has no {dimension} that can be cut on their own.",
                    where=str(self.config.get("model_type")),
                    remedy="Prune another dimension, or whole blocks with depth.",
                )
            self._structures[dimension] = found
        return self._structures[dimension]

    def loadable(self, dimension: str, units: int, family: str = "") -> str | None:
        """Why the model cannot be built with so many units; None where it can."""
        key = (dimension, units, family)
        if key not in self._loadable:
            self._loadable[key] = self._why_unloadable(dimension, units, family)
        return self._loadable[key]

    def _why_unloadable(self, dimension: str, units: int, family: str) -> str | None:
        try:
            for trial in self.trials(dimension):
                if not family or trial.key == family:
                    skeleton_like(
                        self._model.skeleton.model, torch.float32, self.sizes(trial, units)
                    )
        except UnsupportedModel as error:
            return error.what
        return None

    def trials(self, dimension: str) -> list[Trial]:
        """The keys of the configuration that count units of a dimension."""
        if dimension == HEADS:
            heads = self.config.get("num_attention_heads")
            groups = self.config.get("num_key_value_heads") or heads
            if not isinstance(heads, int) or not isinstance(groups, int):
                return []
            return [Trial(HEADS, "num_key_value_heads", groups)]
        keys = {CHANNELS: CHANNEL_KEYS, EXPERTS: EXPERT_KEYS, HIDDEN: HIDDEN_KEYS}[dimension]
        values = {key: self.config.get(key) for key in keys}
        return [Trial(dimension, k, v) for k, v in values.items() if isinstance(v, int) and v > 1]

    def sizes(self, trial: Trial, units: int) -> dict[str, Any]:
        """Keys of the configuration for so many units."""
        changes: dict[str, Any] = {trial.key: units}
        if trial.dimension == HEADS:
            queries = int(self.config["num_attention_heads"]) // trial.units
            changes["num_attention_heads"] = queries * units
        if trial.dimension in (HEADS, HIDDEN):
            if isinstance(self.config.get("head_dim"), int):
                changes["head_dim"] = self.config["head_dim"]
            elif self.config.get("hidden_size"):
                changes["head_dim"] = int(self.config["hidden_size"]) // int(
                    self.config["num_attention_heads"]
                )
        return changes

    def _propose(self, dimension: str) -> tuple[Structure, ...]:
        found: list[Structure] = []
        for trial in self.trials(dimension):
            changed = self.changed(trial)
            for layout in ("copies", "width") if dimension == CHANNELS else ("width",):
                proposed = self._group(trial, changed, layout)
                if not proposed:
                    break
                try:
                    self._prove(trial, proposed)
                except UnsupportedLayer:
                    if layout == "width" or not any(c.copies > 1 for s in proposed for c in s.cuts):
                        raise
                    continue
                found += proposed
                break
        return tuple(found)

    def _with_readers(self, structure: Structure, home: str) -> Structure:
        """Adds the linears of a mixture's experts, expert after expert.

        Raises:
            UnsupportedLayer: If its experts are no linears of their own.
        """
        prefix = self._model.skeleton.block_paths[structure.block]
        for inner, mixture in self._model.skeleton.blocks[structure.block].named_modules():
            path = f"{prefix}.{inner}"
            if isinstance(mixture, PerExpert) and path.startswith(f"{home}."):
                names = [n for n, _ in mixture.named_parameters()]
                tensors = [plain_tensor(self._model, f"{path}.{name}") for name in names]
                linears = tuple(t.removesuffix(".weight") for t in tensors if t is not None)
                return replace(structure, readers=linears)
        raise UnsupportedLayer(
            "its experts are stored as one tensor, so none can be taken out or merged.",
            where=structure.path,
        )

    def changed(self, trial: Trial) -> dict[str, tuple[int, int]]:
        """Parameter → (axis, its size over the units), of those that the trial's key changes."""
        for units in range(trial.units - 1, 0, -1):
            try:
                skeleton = skeleton_like(
                    self._model.skeleton.model, torch.float32, self.sizes(trial, units)
                )
            except UnsupportedModel:
                continue
            split_like(skeleton.blocks, self._model.skeleton.blocks)
            bound = {n: s for n, s in self.shapes.items() if n in self._model.names.bindings}
            return _differences(bound, shapes_of(skeleton), trial.units, units)
        return {}

    def _group(
        self, trial: Trial, changed: Mapping[str, tuple[int, int]], layout: str
    ) -> list[Structure]:
        """Changed parameters by the module that holds them, as structures."""
        modules = dict(self._model.skeleton.model.named_modules())
        groups: dict[str, list[str]] = {}
        for name in changed:
            owner = name.rpartition(".")[0]
            leaf = not any(True for _ in modules[owner].children())
            home = owner.rpartition(".")[0] if leaf else owner
            groups.setdefault(home, []).append(name)
        return [self._structure(trial, home, names, changed, layout)
                for home, names in groups.items()]  # fmt: skip

    def _structure(
        self,
        trial: Trial,
        home: str,
        names: list[str],
        changed: Mapping[str, tuple[int, int]],
        layout: str,
    ) -> Structure:
        cuts: dict[str, Cut] = {}
        readers: list[str] = []
        for name in names:
            axis, ratio = changed[name]
            binding = self._model.names.bindings[name]
            if not binding.plain:
                raise UnsupportedLayer(
                    "the checkpoint stores it fused or permuted, so no part of it can be cut.",
                    where=binding.tensors[0],
                )
            tensor = binding.tensors[0]
            as_copies = layout == "copies" and ratio > 1
            cuts[tensor] = Cut(tensor, axis, 1, ratio) if as_copies else Cut(tensor, axis, ratio, 1)
            module = self._model.skeleton.model.get_submodule(name.rpartition(".")[0])
            columns = 0 if isinstance(module, Conv1D) else 1
            two = len(self.shapes[name]) == 2
            if is_linear(module) and two and axis == columns:
                readers.append(tensor.removesuffix(".weight"))
        paths = self._model.skeleton.block_paths
        block = next(i for i, p in enumerate(paths) if f"{home}.".startswith(f"{p}."))
        path = _common(list(cuts))
        found = Structure(
            trial.dimension, path, block, trial.units, tuple(cuts.values()), tuple(readers),
            trial.key,
        )  # fmt: skip
        return self._with_readers(found, home) if trial.dimension == EXPERTS else found

    def _prove(self, trial: Trial, structures: Sequence[Structure]) -> None:
        """Cuts some units of every structure and compares with zeroing them, in float64."""
        generator = torch.Generator().manual_seed(0)
        if trial.dimension == EXPERTS:  # what a router gives up goes to others: reorder instead
            orders = {s.path: torch.randperm(s.units, generator=generator) for s in structures}
            reordered = {p: [{i: 1.0} for i in order.tolist()] for p, order in orders.items()}
            changes = with_experts(self._model, structures, reordered, {})
            prove_same(self._model, structures, changes)
            return
        for units in range(max(1, trial.units // 2), trial.units):
            if self.loadable(trial.dimension, units, trial.key) is None:
                break
        else:
            raise UnsupportedLayer(
                f"no smaller number than {trial.units} can be loaded.", where=trial.key
            )
        kept = {
            s.path: torch.randperm(s.units, generator=generator)[:units].sort().values
            for s in structures
        }
        describe = partial(edits_of, self._model)
        prove(self._model, structures, kept, self.sizes(trial, units), describe)


def shapes_of(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer."""
    model: nn.Module = skeleton.model
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tuple(value.shape) for name, value in named}


def _differences(
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    units: int,
    fewer: int,
) -> dict[str, tuple[int, int]]:
    """Parameter → (axis, size over units) of those whose one axis shrank in proportion."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in before.items():
        other = after.get(name)
        if other is None or other == shape:
            continue
        axes = [
            axis for axis, pair in enumerate(zip(shape, other, strict=True)) if len(set(pair)) > 1
        ]
        old, new = shape[axes[0]], other[axes[0]]
        if len(axes) > 1 or old * fewer != new * units or old % units:
            raise UnsupportedLayer(
                f"goes from {list(shape)} to {list(other)} when {units} become {fewer}: it is not "
                "cut along one axis alone.",
                where=name.removesuffix(".weight"),
            )
        found[name] = (axes[0], old // units)
    return found


def _common(names: Sequence[str]) -> str:
    """The module path that all tensors lie in."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
