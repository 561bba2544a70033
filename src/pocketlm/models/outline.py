"""A model's dimensions and how smaller ones are described.

Which dimensions are coupled is observed, not listed: the model is built again with one key of its
configuration changed, on the meta device, and whatever changes its shape belongs together. That
cutting these slices is the same as zeroing them is then proved on a block (models/coupling_proof).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketlm.core.changes import Add, Changes, Constant, Edit, Operation, Take
from pocketlm.core.errors import ConfigError, UnsupportedLayer, UnsupportedModel
from pocketlm.core.transform import CHANNELS, EXPERTS, HEADS, HIDDEN, Cut, Structure
from pocketlm.models.adapter import Model
from pocketlm.models.coupling_proof import prove, prove_same
from pocketlm.models.experts import PerExpert, split_like
from pocketlm.models.linear import is_linear
from pocketlm.models.rotation import Rotation
from pocketlm.models.skeleton import Skeleton, skeleton_like

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
INDEX_LISTS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices")
CHANNEL_KEYS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "intermediate_size_mlp", "ffn_dim", "n_inner", "ffn_hidden_size",
)  # fmt: skip
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
HIDDEN_KEYS = ("hidden_size", "n_embd")
BIAS_KEYS = ("mlp_bias", "attention_bias", "use_bias", "bias")
KEPT = "unchanged"


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


class ModelOutline:
    """An Outline (see core/transform.py) of a model.

    Args:
        model: The original; weights are read only to prove couplings.

    Raises:
        UnsupportedModel: If its blocks have bases of their own already.
    """

    def __init__(self, model: Model) -> None:
        if model.shortcuts:
            raise UnsupportedModel(
                "its blocks have bases of their own: it cannot be made smaller once more.",
                where=next(iter(model.shortcuts)),
                remedy="Give each block a basis of its own last, after other steps that make it "
                "smaller.",
            )
        self._model = model
        text = model.skeleton.model.config.get_text_config()
        self.config: Mapping[str, Any] = text.to_dict()
        self.blocks = len(model.block_paths)
        self.block_paths = model.block_paths
        self._parameters = _shapes(model.skeleton)
        self._structures: dict[str, tuple[Structure, ...]] = {}
        self._rotation: Rotation | None = None
        self._proved: set[bool] = set()  # of turning blocks alike, and apart
        self._loadable: dict[tuple[str, int, str], str | None] = {}

    # --- depth ---

    def keep_blocks(
        self, kept: Sequence[int], merged: Mapping[int, Mapping[int, float]] | None = None
    ) -> Changes:
        """The model with some of its blocks, renumbered; see core/transform.py.

        Raises:
            ConfigError: If none is kept, or the order is not ascending.
        """
        if not kept or list(kept) != sorted(set(kept)) or kept[-1] >= self.blocks:
            raise ConfigError(
                f"{len(kept)} of {self.blocks} blocks would be left.",
                where="depth",
                remedy="Remove fewer: at least one block has to stay.",
            )
        merged = merged or {}
        paths = self._model.block_paths
        infos = self._model.source.infos()
        gone = {i for i in range(self.blocks) if i not in kept}
        absorbed = {j for others in merged.values() for j in others}
        edits: list[Edit] = []
        dropped: dict[str, str] = {}
        stem = paths[0].removesuffix("0")
        for name in infos:
            index = next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), None)
            if name in self._model.repeated:
                dropped[name] = "repeats a tied tensor"
            elif index is None and name.startswith(stem):
                dropped[name] = "a draft layer after the last block, made for the full depth"
            elif index is None:
                edits.append(_copy(name))
            elif index in gone:
                home = next((k for k, others in merged.items() if index in others), None)
                dropped[name] = (
                    f"block {index} was merged into block {home}"
                    if index in absorbed
                    else f"block {index} was removed"
                )
            else:
                inner = name.removeprefix(f"{paths[index]}.")
                others = merged.get(index, {})
                parts = [(name, 1.0 + sum(-w for w in others.values()))]
                parts += [(f"{paths[j]}.{inner}", weight) for j, weight in others.items()]
                target = f"{paths[kept.index(index)]}.{inner}"
                account = "merged" if others else ""
                edits.append(Edit(target, tuple(parts) if others else parts_of(name), (), account))
        config = self._layer_config(list(kept))
        removed = sorted(gone)
        verb = "merged" if merged else "removed"
        summary = f"{len(removed)} of {self.blocks} blocks {verb}"
        return Changes(config, tuple(edits), dropped, summary, _listed(removed))

    def _layer_config(self, kept: list[int]) -> dict[str, Any]:
        """Keys that depend on the depth: the number, lists by block, and lists of blocks."""
        key = next((k for k in LAYER_KEYS if self.config.get(k) == self.blocks), None)
        if key is None:
            raise UnsupportedModel(
                f"no key of the configuration counts its {self.blocks} blocks.",
                where=str(self.config.get("model_type")),
            )
        changes: dict[str, Any] = {key: len(kept)}
        for name in LAYER_LISTS:
            listed = self.config.get(name)
            if isinstance(listed, list | tuple) and len(listed) == self.blocks:
                changes[name] = [listed[i] for i in kept]
        for name in INDEX_LISTS:
            listed = self.config.get(name)
            if isinstance(listed, list | tuple) and listed:
                changes[name] = [kept.index(i) for i in listed if i in kept]
        return changes

    # --- width ---

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
            for trial in self._trials(dimension):
                if not family or trial.key == family:
                    skeleton_like(
                        self._model.skeleton.model, torch.float32, self._sizes(trial, units)
                    )
        except UnsupportedModel as error:
            return error.what
        return None

    def _trials(self, dimension: str) -> list[Trial]:
        if dimension == HEADS:
            heads = self.config.get("num_attention_heads")
            groups = self.config.get("num_key_value_heads") or heads
            if not isinstance(heads, int) or not isinstance(groups, int):
                return []
            return [Trial(HEADS, "num_key_value_heads", groups)]
        keys = {CHANNELS: CHANNEL_KEYS, EXPERTS: EXPERT_KEYS, HIDDEN: HIDDEN_KEYS}[dimension]
        values = {key: self.config.get(key) for key in keys}
        return [Trial(dimension, k, v) for k, v in values.items() if isinstance(v, int) and v > 1]

    def _sizes(self, trial: Trial, units: int) -> dict[str, Any]:
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
        for trial in self._trials(dimension):
            changed = self._changed(trial)
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
                tensors = [self._tensor(f"{path}.{name}") for name in names]
                linears = tuple(t.removesuffix(".weight") for t in tensors if t is not None)
                return replace(structure, readers=linears)
        raise UnsupportedLayer(
            "its experts are stored as one tensor, so none can be taken out or merged.",
            where=structure.path,
        )

    def _changed(self, trial: Trial) -> dict[str, tuple[int, int]]:
        """Parameter → (axis, its size over the units), of those that the trial's key changes."""
        for units in range(trial.units - 1, 0, -1):
            try:
                skeleton = skeleton_like(
                    self._model.skeleton.model, torch.float32, self._sizes(trial, units)
                )
            except UnsupportedModel:
                continue
            split_like(skeleton.blocks, self._model.skeleton.blocks)
            bound = {n: s for n, s in self._parameters.items() if n in self._model.names.bindings}
            return _differences(bound, _shapes(skeleton), trial.units, units)
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
            two = len(self._parameters[name]) == 2
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
            prove_same(
                self._model, structures, self._with_experts(structures, reordered, {}, trial)
            )
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
        prove(self._model, structures, kept, self._sizes(trial, units), self._edits)

    def cut(
        self,
        kept: Mapping[str, Mapping[str, Tensor]],
        biases: Mapping[str, Tensor] | None = None,
    ) -> Changes:
        """The model with some units of each structure; see core/transform.py.

        Raises:
            ConfigError: If a structure would lose all units, or some lose more than others.
            UnsupportedLayer: If no engine can load so many.
        """
        config: dict[str, Any] = {}
        told: list[str] = []
        chosen: list[tuple[Structure, Tensor]] = []
        for dimension, units_of in kept.items():
            mine = [s for s in self.structures(dimension) if s.path in units_of]
            chosen += [(s, units_of[s.path]) for s in mine]
            for trial in self._trials(dimension):
                counts = {len(units_of[s.path]) for s in mine if s.family == trial.key}
                if counts:
                    units = self._checked(trial, counts)
                    if units != trial.units:
                        config.update(self._sizes(trial, units))
                        told.append(f"{trial.key} {trial.units} → {units}")
        operations: dict[str, list[Operation]] = {
            cut.tensor: [Take(cut.axis, cut.index(units_U, s.units))]
            for s, units_U in chosen
            if len(units_U) < s.units
            for cut in s.cuts
        }
        added, keys, notes = self._biases(biases or {}, operations, config)
        changes = self._edits(operations, {**config, **keys})
        edits = tuple(_with_added(changes.edits, added))
        summary = ", ".join(told) or "nothing removed"
        return Changes(changes.config, edits, changes.dropped, summary, "", tuple(notes))

    def _checked(self, trial: Trial, counts: set[int]) -> int:
        """The one number of units that is left, if it is one that can be loaded."""
        if len(counts) > 1 or 0 in counts:
            raise ConfigError(
                f"{trial.key} would be {sorted(counts)}: one number above 0 for all is needed.",
                where=trial.dimension,
            )
        units = counts.pop()
        reason = None if units == trial.units else self.loadable(trial.dimension, units, trial.key)
        if reason is not None:
            raise UnsupportedLayer(
                f"{trial.key} {units} cannot be loaded: {reason}",
                where=trial.dimension,
                remedy="Choose another number.",
            )
        return units

    def _biases(
        self,
        biases: Mapping[str, Tensor],
        operations: dict[str, list[Operation]],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, list[Edit]], dict[str, Any], list[str]]:
        """Where what is added to linears' outputs is held: their own bias, or a configured one."""
        infos = self._model.source.infos()
        new: dict[str, Tensor] = {}
        for reader, bias_O in biases.items():
            if f"{reader}.bias" in infos:
                operations.setdefault(f"{reader}.bias", []).append(Add(bias_O))
            else:
                new[reader] = bias_O
        added: dict[str, list[Edit]] = {}
        keys: dict[str, Any] = {}
        lacking = dict(new)
        for key in BIAS_KEYS if new else ():
            if self.config.get(key) is not False:
                continue
            made = skeleton_like(
                self._model.skeleton.model, torch.float32, {**config, **keys, key: True}
            )
            split_like(made.blocks, self._model.skeleton.blocks)
            shapes = _shapes(made)
            fresh = [n for n in shapes if n not in self._parameters and n.endswith(".bias")]
            owners = {n: self._tensor(f"{n.removesuffix('bias')}weight") for n in fresh}
            if not any(o.removesuffix(".weight") in lacking for o in owners.values() if o):
                continue
            keys[key] = True
            for name in fresh:
                owner = owners[name]
                if owner is None or any(e.name == _bias(owner) for e in added.get(owner, [])):
                    continue
                value_O = lacking.pop(owner.removesuffix(".weight"), torch.zeros(shapes[name]))
                value_O = value_O.to(infos[owner].dtype)
                added.setdefault(owner, []).append(
                    Edit(_bias(owner), parts_of(owner), (Constant(value_O),), "its new bias")
                )
        notes = []
        if lacking:
            notes.append(
                f"the configuration holds no bias for {len(lacking)} linears such as "
                f"{next(iter(lacking))}: what removed inputs gave on average is lost there."
            )
        if keys:
            notes.append(f"biases were added ({', '.join(f'{key}: true' for key in keys)}).")
        return added, keys, notes

    def _tensor(self, parameter: str) -> str | None:
        binding = self._model.names.bindings.get(parameter)
        return binding.tensors[0] if binding is not None and binding.plain else None

    def _edits(
        self, operations: Mapping[str, Sequence[Operation]], config: Mapping[str, Any]
    ) -> Changes:
        """All tensors, some with operations."""
        edits = []
        dropped = {name: "repeats a tied tensor" for name in self._model.repeated}
        for name in self._model.source.infos():
            if name not in dropped:
                made = tuple(operations.get(name, ()))
                edits.append(Edit(name, parts_of(name), made, "cut" if made else ""))
        return Changes(dict(config), tuple(edits), dropped)

    def parameters(self, structure: Structure) -> int:
        """Weights of one unit of a structure."""
        infos = self._model.source.infos()
        total = 0
        for cut in structure.cuts:
            shape = infos[cut.tensor].shape
            total += cut.width * cut.copies * torch.Size(shape).numel() // shape[cut.axis]
        return total

    def block_weights(self) -> int:
        """Weights of all decoder blocks."""
        prefixes = tuple(f"{path}." for path in self._model.block_paths)
        infos = self._model.source.infos().values()
        return sum(torch.Size(i.shape).numel() for i in infos if i.name.startswith(prefixes))

    # --- the stream between blocks ---

    @property
    def hidden(self) -> int:
        """Width of the stream between blocks."""
        return self._trials(HIDDEN)[0].units

    def rotate(self, matrices: Sequence[Tensor]) -> Changes:
        """The model with its stream turned and cut; see core/transform.py.

        Raises:
            UnsupportedLayer: If the model's norms do not allow it, or it cannot be proved.
        """
        trial, apart = self._trials(HIDDEN)[0], len(matrices) > 1
        rotation = self._turning()
        if apart not in self._proved:
            rotation.prove(apart=apart)
            self._proved.add(apart)
        kept = matrices[0].shape[1]
        config = {} if kept == trial.units else self._sizes(trial, kept)
        changes = rotation.changes(matrices, config)
        if config:
            rotation.prove_embedding(changes, matrices[0])
        return changes

    def writers(self, index: int) -> tuple[Sequence[str], Sequence[str]]:
        """Tensors by which a block writes into the stream; see core/transform.py."""
        return self._turning().writers(index)

    def _turning(self) -> Rotation:
        if self._rotation is None:
            axes: dict[str, int] = {}
            parameters: dict[str, str] = {}
            for name, (axis, ratio) in self._changed(self._trials(HIDDEN)[0]).items():
                binding = self._model.names.bindings[name]
                if not binding.plain or ratio != 1:
                    raise UnsupportedLayer(
                        "it holds the stream in a form that cannot be turned.",
                        where=binding.tensors[0],
                    )
                axes[binding.tensors[0]], parameters[binding.tensors[0]] = axis, name
            self._rotation = Rotation(self._model, axes, parameters)
        return self._rotation

    # --- experts ---

    def keep_experts(self, kept: Mapping[str, Sequence[Mapping[int, float]]]) -> Changes:
        """The model with fewer experts; see core/transform.py.

        Raises:
            ConfigError: If too few stay, or more in some mixtures than in others.
        """
        trial = self._trials(EXPERTS)[0]
        structures = [s for s in self.structures(EXPERTS) if s.path in kept]
        counts = {len(kept[s.path]) for s in structures}
        chosen = int(self.config.get("num_experts_per_tok") or 1)
        if len(counts) != 1 or min(counts) < chosen:
            raise ConfigError(
                f"{sorted(counts)} experts would be left; every mixture keeps one number, of at "
                f"least the {chosen} that a token takes.",
                where=EXPERTS,
                remedy="Remove fewer.",
            )
        units = counts.pop()
        config = {} if units == trial.units else self._sizes(trial, units)
        return self._with_experts(structures, kept, config, trial)

    def _with_experts(
        self,
        structures: Sequence[Structure],
        kept: Mapping[str, Sequence[Mapping[int, float]]],
        config: Mapping[str, Any],
        trial: Trial,
    ) -> Changes:
        operations: dict[str, list[Operation]] = {}
        made: dict[str, Edit] = {}
        dropped: dict[str, str] = {}
        for structure in structures:
            mine = kept[structure.path]
            first = torch.tensor([next(iter(sources)) for sources in mine])
            for cut in structure.cuts:
                index = cut.index(first, structure.units)
                operations.setdefault(cut.tensor, []).append(Take(cut.axis, index))
            each = len(structure.readers) // structure.units
            parts = [structure.readers[i * each : (i + 1) * each] for i in range(structure.units)]
            for expert, linears in enumerate(parts):
                for place, linear in enumerate(linears):
                    name = f"{linear}.weight"
                    if expert >= len(mine):
                        dropped[name] = f"{trial.units} experts become {len(mine)}"
                        continue
                    sources = {f"{parts[i][place]}.weight": w for i, w in mine[expert].items()}
                    account = "merged" if len(sources) > 1 else "cut"
                    made[name] = Edit(name, tuple(sources.items()), (), account)
        whole = self._edits(operations, config)
        edits = tuple(made.get(e.name, e) for e in whole.edits if e.name not in dropped)
        read = {edit.parts[0][0] for edit in edits}
        dropped = {n: "its expert is gone" for n in self._model.source.infos() if n not in read}
        dropped |= dict(whole.dropped)
        summary = f"{trial.key} {trial.units} → {len(next(iter(kept.values()), ()))}"
        return Changes(whole.config, edits, dropped, summary)


def parts_of(name: str) -> tuple[tuple[str, float], ...]:
    """A tensor alone."""
    return ((name, 1.0),)


def _copy(name: str) -> Edit:
    return Edit(name, parts_of(name))


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _with_added(edits: Sequence[Edit], added: Mapping[str, Sequence[Edit]]):
    for edit in edits:
        yield edit
        yield from added.get(edit.name, ())


def _shapes(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
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


def _listed(indices: Sequence[int]) -> str:
    """Indices as ranges: ``3, 7–9``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
