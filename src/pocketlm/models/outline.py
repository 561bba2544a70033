"""A model's dimensions, and how smaller models are described: see core/transform.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.changes import Add, Changes, Constant, Edit, Operation, Take
from pocketlm.core.errors import ConfigError, UnsupportedLayer, UnsupportedModel
from pocketlm.core.transform import EXPERTS, HIDDEN, Structure
from pocketlm.models.adapter import Model
from pocketlm.models.couplings import Couplings, Trial, shapes_of
from pocketlm.models.edits import edits_of, parts_of, plain_tensor, with_experts
from pocketlm.models.experts import split_like
from pocketlm.models.rotation import Rotation
from pocketlm.models.skeleton import skeleton_like

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
INDEX_LISTS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices")
BIAS_KEYS = ("mlp_bias", "attention_bias", "use_bias", "bias")


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
        self.couplings = Couplings(model)
        self.config = self.couplings.config
        self.blocks = len(model.block_paths)
        self.block_paths = model.block_paths
        self._rotation: Rotation | None = None
        self._proved: set[bool] = set()  # of turning blocks alike, and apart

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
        """The structures of a dimension, block by block; see models/couplings.py."""
        return self.couplings.structures(dimension)

    def loadable(self, dimension: str, units: int, family: str = "") -> str | None:
        """Why the model cannot be built with so many units; None where it can."""
        return self.couplings.loadable(dimension, units, family)

    def cut(
        self,
        kept: Mapping[str, Mapping[str, Tensor]],
        biases: Mapping[str, Tensor | None] | None = None,
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
            for trial in self.couplings.trials(dimension):
                counts = {len(units_of[s.path]) for s in mine if s.family == trial.key}
                if counts:
                    units = self._checked(trial, counts)
                    if units != trial.units:
                        config.update(self.couplings.sizes(trial, units))
                        told.append(f"{trial.key} {trial.units} → {units}")
        operations: dict[str, list[Operation]] = {
            cut.tensor: [Take(cut.axis, cut.index(units_U, s.units))]
            for s, units_U in chosen
            if units_U.tolist() != list(range(s.units))
            for cut in s.cuts
        }
        added, keys, notes = self._biases(biases or {}, operations, config)
        changes = edits_of(self._model, operations, {**config, **keys})
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
        biases: Mapping[str, Tensor | None],
        operations: dict[str, list[Operation]],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, list[Edit]], dict[str, Any], list[str]]:
        """Where what is added to linears' outputs is held: their own bias, or a configured one."""
        infos = self._model.source.infos()
        new: dict[str, Tensor | None] = {}
        for reader, bias_O in biases.items():
            if f"{reader}.bias" not in infos:
                new[reader] = bias_O
            elif bias_O is not None:
                operations.setdefault(f"{reader}.bias", []).append(Add(bias_O))
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
            shapes = shapes_of(made)
            fresh = [n for n in shapes if n not in self.couplings.shapes and n.endswith(".bias")]
            owners = {
                n: plain_tensor(self._model, f"{n.removesuffix('bias')}weight") for n in fresh
            }
            if not any(o.removesuffix(".weight") in lacking for o in owners.values() if o):
                continue
            keys[key] = True
            for name in fresh:
                owner = owners[name]
                if owner is None or any(e.name == _bias(owner) for e in added.get(owner, [])):
                    continue
                value_O = lacking.pop(owner.removesuffix(".weight"), None)
                value_O = torch.zeros(shapes[name]) if value_O is None else value_O
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
        return self.couplings.trials(HIDDEN)[0].units

    def rotate(self, matrices: Sequence[Tensor]) -> Changes:
        """The model with its stream turned and cut; see core/transform.py.

        Raises:
            UnsupportedLayer: If the model's norms do not allow it, or it cannot be proved.
        """
        trial, apart = self.couplings.trials(HIDDEN)[0], len(matrices) > 1
        rotation = self._turning()
        if apart not in self._proved:
            rotation.prove(apart=apart)
            self._proved.add(apart)
        kept = matrices[0].shape[1]
        config = {} if kept == trial.units else self.couplings.sizes(trial, kept)
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
            trial = self.couplings.trials(HIDDEN)[0]
            for name, (axis, ratio) in self.couplings.changed(trial).items():
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
        trial = self.couplings.trials(EXPERTS)[0]
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
        config = {} if units == trial.units else self.couplings.sizes(trial, units)
        return with_experts(self._model, structures, kept, config)


def _copy(name: str) -> Edit:
    return Edit(name, parts_of(name))


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _with_added(edits: Sequence[Edit], added: Mapping[str, Sequence[Edit]]) -> Iterator[Edit]:
    for edit in edits:
        yield edit
        yield from added.get(edit.name, ())


def _listed(indices: Sequence[int]) -> str:
    """Indices as ranges: ``3, 7–9``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
