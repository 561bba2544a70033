"""Turns the stream between blocks into another basis and cuts it (SliceGPT, arXiv:2401.15024).

RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q once the norm's weight g is folded into what reads
it, so that with y = x Q
    reader  W → W diag(g) Q,    writer  W → Qᵀ W,    embedding  E → E Q,    norm  g → √(D / K)
is the same model. Columns of Q beyond the first K are then left out; the norm, which divides by the
root of a mean over K instead of D, is scaled back. Where the head was tied to the embedding it no
longer is: the final norm's weight is in the head alone. Blocks may have bases of their own; the
last linear of each then writes in the next one's, and the rest of the stream passes from one to the
other through Qᵀ Q' (models/shortcut.py).

Which tensors read and write is observed (models/outline.py), which norm feeds a reader is proved by
folding (models/folds.py), and that the turned model computes the same is proved on a block of each
kind and on both ends. Mixtures, whose routers read the norm beside the experts, are refused.

Legend: D hidden width, K columns kept, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.changes import Changes, Constant, Edit, Operation, Rotate, Scale
from pocketlm.core.errors import PocketLMError, UnsupportedLayer, UnsupportedModel
from pocketlm.models.adapter import Model
from pocketlm.models.linear import is_linear
from pocketlm.models.shortcut import SHORTCUT, shortcuts_note

TOKENS = 8
TOLERANCE = 1e-5  # relative; norms compute in float32 even in a float64 model
NORMS = ("weight", "one_plus_weight")


class Rotation:
    """What turning a model's stream does to each tensor.

    Args:
        model: The original.
        axes: Checkpoint tensor → the axis that is as long as the stream is wide.
        parameters: Checkpoint tensor → parameter.

    Raises:
        UnsupportedLayer: If a linear reads the stream otherwise than through a norm.
        UnsupportedModel: If a norm subtracts a mean.
    """

    def __init__(
        self, model: Model, axes: Mapping[str, int], parameters: Mapping[str, str]
    ) -> None:
        self._model, self._axes, self._parameters = model, axes, parameters
        self._block_of = {
            name: index
            for name in model.source.infos()
            for index, path in enumerate(model.block_paths)
            if name.startswith(f"{path}.")
        }
        self._last: dict[int, str] = {}  # block → its last linear, by module path
        self._norm_of, self._plus = self._feeding()
        skeleton = model.skeleton.model
        embedding = skeleton.get_input_embeddings()
        path_of = {id(module): path for path, module in skeleton.named_modules()}
        bindings = model.names.bindings
        self._embedding = bindings[f"{path_of[id(embedding)]}.weight"].tensors[0]
        self._head_parameter = f"{model.head_path}.weight"
        self._head = bindings[self._head_parameter].tensors[0]
        vectors = [name for name in axes if len(model.source.infos()[name].shape) == 1]
        self._norms = norms = [name for name in vectors if not self._is_bias(name)]
        fed = set(self._norm_of.values())
        outside = [name for name in norms if not name.startswith(tuple(model.block_paths))]
        unread = [n for n in norms if n not in fed and n not in outside]
        if len(outside) != 1 or unread or any(not name.endswith("weight") for name in norms):
            what = (unread or [n for n in norms if not n.endswith("weight")] or outside or ["?"])[0]
            raise UnsupportedModel(
                "has a norm that no turned stream can pass: one on a block's output, or one that "
                "subtracts a mean.",
                where=what,
                remedy="Prune channels, heads or blocks instead.",
            )
        self._final = outside[0]

    def _is_bias(self, tensor: str) -> bool:
        owner = self._parameters[tensor].rpartition(".")[0]
        return is_linear(self._model.skeleton.model.get_submodule(owner))

    def _feeding(self) -> tuple[dict[str, str], bool]:
        """Reader's tensor → the norm's, by the folds that are accepted; whether norms are 1 + w."""
        found: dict[str, str] = {}
        forms: set[str] = set()
        paths = self._model.block_paths
        for alike in self._model.alike_blocks():
            with self._model.block(alike[0]) as block:
                groups = block.probe_folds()
                tensors = {name: view.tensor_name for name, view in block.linears.items()}
            last = list(tensors)[-1]
            for index in alike:
                self._last[index] = last.replace(paths[alike[0]], paths[index], 1)
            for group in groups:
                fold = group.fold
                if fold is None or not fold.accepted or fold.form not in NORMS:
                    continue
                forms.add(fold.form)
                for name in group.linears:
                    for index in alike:
                        swap = (paths[alike[0]], paths[index])
                        reader = tensors[name].replace(*swap, 1)
                        found[reader] = f"{fold.producer.replace(*swap, 1)}.weight"
        for name, axis in self._axes.items():
            inside = name.startswith(tuple(paths))
            if inside and axis == 1 and name not in found:
                raise UnsupportedLayer(
                    "it reads the stream, but no norm was proved to feed it alone.",
                    where=name.removesuffix(".weight"),
                    remedy="Prune channels, heads or blocks instead.",
                )
        return found, forms == {"one_plus_weight"}

    def writers(self, index: int) -> tuple[list[str], list[str]]:
        """Tensors by which a block writes into the stream: its last linear's, and those before."""
        inside = [name for name in self._axes if self._block_of.get(name) == index]
        writing = [n for n in inside if not self._axes[n] and n not in self._norms]
        last = [name for name in writing if self._is_last(name)]
        return last, [name for name in writing if name not in last]

    def _is_last(self, name: str) -> bool:
        """Whether a tensor is of the last linear of its block."""
        return name.rpartition(".")[0] == self._last.get(self._block_of.get(name, -1))

    def changes(self, matrices: Sequence[Tensor], config: Mapping[str, Any]) -> Changes:
        """The turned and cut model.

        Args:
            matrices: One for all blocks, or one for each and one for the head; orthonormal columns
                [D, K], float64.
            config: Keys of the configuration for the new width.
        """
        infos, apart = self._model.source.infos(), len(matrices) > 1
        rows, columns = matrices[0].shape
        level = (rows / columns) ** 0.5
        shortcuts = self._shortcuts(matrices) if apart else {}
        edits: list[Edit] = []
        dropped = {name: "repeats a tied tensor" for name in self._model.repeated}
        for name in infos:
            if name in dropped:
                continue
            operations: tuple[Operation, ...] = ()
            if name in self._axes:
                operations = self._turned(name, matrices, level)
            edits.append(Edit(name, ((name, 1.0),), operations, "rotated" if operations else ""))
            edits += shortcuts.get(name, ())
            if name == self._embedding == self._head:
                turned = (Scale(1, self._weight(self._final)), Rotate(1, matrices[-1]))
                edits.append(Edit(self._head_parameter, ((name, 1.0),), turned, "rotated"))
        tied = self._embedding == self._head
        keys = {**config, **({"tie_word_embeddings": False} if tied else {})}
        notes: list[str] = []
        if tied:
            notes.append("the head is no longer tied to the embedding: the file holds both.")
        added: dict[str, str] = {}
        if apart:
            paths = enumerate(self._model.block_paths)
            added = {f"{path}.{SHORTCUT}": self._last[index] for index, path in paths}
            notes.append(shortcuts_note(len(added), columns))
        summary = f"hidden size {rows} → {columns}, one rotation for {'each' if apart else 'all'} "
        summary += "block" if apart else "blocks"
        return Changes(keys, tuple(edits), dropped, summary, "", tuple(notes), added)

    def _shortcuts(self, matrices: Sequence[Tensor]) -> dict[str, tuple[Edit, ...]]:
        """Last linear of a block → the new tensor Q'ᵀ Q [K, K] that what was before it passes.

        The new tensor is accounted for beside that linear's weight, whose dtype it has.
        """
        found: dict[str, tuple[Edit, ...]] = {}
        for index, path in enumerate(self._model.block_paths):
            weight = f"{self._last[index]}.weight"
            product = (Constant(matrices[index + 1].T), Rotate(1, matrices[index]))
            name = f"{path}.{SHORTCUT}.weight"
            found[weight] = (Edit(name, ((weight, 1.0),), product, "rotated"),)
        return found

    def _turned(self, name: str, matrices: Sequence[Tensor], level: float) -> tuple[Operation, ...]:
        axis = self._axes[name]
        at_end = name in (self._final, self._head) and name != self._embedding
        index = len(matrices) - 1 if at_end else self._block_of.get(name, 0) + self._is_last(name)
        matrix_DK = matrices[index if len(matrices) > 1 else 0]
        if name in self._norms:
            flat = torch.full((matrix_DK.shape[1],), level - 1 if self._plus else level)
            return (Constant(flat),)
        if name == self._embedding:
            return (Rotate(axis, matrix_DK),)
        norm = self._final if name == self._head else self._norm_of.get(name)
        if norm is None or axis == 0:
            return (Rotate(axis, matrix_DK),)
        return (Scale(axis, self._weight(norm)), Rotate(axis, matrix_DK))

    def _weight(self, norm: str) -> Tensor:
        """What a norm multiplies with, float64 [D]."""
        value_D = self._model.source.read(norm).double()
        return value_D + 1 if self._plus else value_D

    def prove(self, *, apart: bool) -> None:
        """Turns the whole stream by random matrices and compares, in float64.

        Args:
            apart: Whether neighbouring blocks are turned by different ones.

        Raises:
            UnsupportedLayer: Naming what gives something else.
        """
        from pocketlm.models.opening import reopen

        width = self._model.source.infos()[self._final].shape[0]
        generator = torch.Generator().manual_seed(0)
        pair = [
            torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
            for _ in range(1 + apart)
        ]
        count = len(self._model.block_paths) + 1 if apart else 1
        matrices = [pair[index % len(pair)] for index in range(count)]
        same = Changes({}, tuple(Edit(n, ((n, 1.0),)) for n in self._names()), {})
        try:
            plain = reopen(self._model, same, dtype=torch.float64)
            turned = reopen(self._model, self.changes(matrices, {}), dtype=torch.float64)
        except PocketLMError as error:
            raise UnsupportedLayer(f"the turned model cannot be opened: {error.what}") from error
        tokens_BT = torch.arange(TOKENS, device=plain.device).remainder(plain.vocabulary)[None]
        matrices = [matrix_DD.to(plain.device) for matrix_DD in matrices]
        hidden_BTD, call = plain.begin(tokens_BT)
        turned_BTD, turned_call = turned.begin(tokens_BT)
        _compare(turned_BTD, hidden_BTD @ matrices[0], self._embedding)
        noise_BTD = torch.randn(hidden_BTD.shape, generator=generator, dtype=torch.float64)
        noise_BTD = noise_BTD.to(plain.device)
        for index in (alike[0] for alike in turned.alike_blocks()):
            before, after = (matrices[i if apart else 0] for i in (index, index + 1))
            with plain.block(index) as block:
                expected_BTD = block.forward(noise_BTD, call) @ after
            with turned.block(index) as block:
                found_BTD = block.forward(noise_BTD @ before, turned_call)
            _compare(found_BTD, expected_BTD, plain.block_paths[index])
        expected = plain.logits(plain.finish(noise_BTD)[0])
        found = turned.logits(turned.finish(noise_BTD @ matrices[-1])[0])
        _compare(found, expected, self._model.head_path)

    def _names(self) -> list[str]:
        return [name for name in self._model.source.infos() if name not in self._model.repeated]

    def prove_embedding(self, changes: Changes, matrix_DK: Tensor) -> None:
        """That the embedding gives the cut stream at its new width: some scale by the width.

        Raises:
            UnsupportedLayer: If it does not.
        """
        from pocketlm.models.opening import reopen

        tokens_BT = torch.arange(TOKENS, device=self._model.device)[None]
        tokens_BT = tokens_BT.remainder(self._model.vocabulary)
        hidden_BTD, _ = self._model.begin(tokens_BT)
        cut_BTK, _ = reopen(self._model, changes).begin(tokens_BT)
        expected_BTK = hidden_BTD.double() @ matrix_DK.to(hidden_BTD.device)
        _compare(cut_BTK.double(), expected_BTK, self._embedding, 1e-2)


def _compare(found: Tensor, expected: Tensor, where: str, tolerance: float = TOLERANCE) -> None:
    difference = float((found - expected).norm() / expected.norm())
    if not difference < tolerance:
        raise UnsupportedLayer(
            f"a turned stream gives something else there (relative difference {difference:.1e}).",
            where=where.removesuffix(".weight"),
            remedy="Prune channels, heads or blocks instead.",
        )
