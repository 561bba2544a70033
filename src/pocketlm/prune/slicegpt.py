"""SliceGPT (arXiv:2401.15024): the stream between blocks, in fewer columns.

    C = Σ Xᵀ X,    X the stream's rows, each scaled to a root mean square of 1,
    Q = the eigenvectors of C, largest eigenvalues first, in float64

and the stream is written in the first columns of Q. The rows are scaled as the norms that read them
scale them, so that the large values of late blocks do not drown those of early ones.

``block`` gives each block a Q of its own, block after block: X is what its norms read, given what
the sliced blocks before have left. A block's last linear writes in the next basis, Q'; what was in
the stream before passes on through Qᵀ Q', which no plain configuration can say. Deviation: the
paper turns attention and MLP apart, with two such matrices a block; here one basis holds both.
``shared`` sums C over all blocks of the original: one Q, which loads everywhere and keeps less of
each block's energy. Deviation: the paper has no such form.

Cost: one pass (two for ``block``) and a D × D matrix for each block. Legend: D hidden width, K
columns kept, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.transform import HIDDEN, Findings, Outline, Survey, Visit
from pocketlm.core.views import BlockView
from pocketlm.prune.smaller import Smaller

BEFORE, AFTER = "before", "after"
BASIS, HEAD_BASIS = "basis", "head_basis"


class Slicegpt(Smaller):
    """SliceGPT: turns the hidden size into its principal components and cuts the smallest.

    Attributes:
        rotation: One for all blocks (``shared``), or one for each (``block``).
        ratio: Share of the hidden size to cut.
        hidden: How many columns to keep, instead of a ratio.
        multiple_of: The number of columns left is a multiple of this.
    """

    rotation: Literal["shared", "block"] = "shared"
    ratio: float = Field(default=0.2, ge=0.0, lt=1.0)
    hidden: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(default=8, ge=1)

    def measure(self, survey: Survey) -> Findings:
        """The stream's second moments before each block, and after the last; or each block's Q."""
        outline = survey.outline
        if self.rotation == "shared":
            return survey.visit(lambda visit: _moments(visit, outline.blocks - 1))
        kept = self._kept(outline, outline.hidden)
        writers = [outline.writers(index) for index in range(outline.blocks)]

        def alter(block: BlockView, found: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
            return _project(block, writers[block.index][1], found[BASIS])

        def look(visit: Visit) -> dict[str, Tensor]:
            found = {BASIS: _basis(visit, writers[visit.index][0], kept)}
            outputs = _total(after for _, after in visit.run(enter=alter(visit.block, found)))
            if visit.index == outline.blocks - 1:
                found[HEAD_BASIS] = _principal(outputs, kept)
            return found

        return survey.visit(look, alter)

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The model with a narrower stream.

        Raises:
            ConfigError: If nothing would be left.
        """
        width = outline.hidden
        kept = self._kept(outline, width)
        if findings is None:
            same = torch.eye(width, dtype=torch.float64)[:, :kept]
            return outline.rotate([same] * (1 if self.rotation == "shared" else outline.blocks + 1))
        if self.rotation == "block":
            return outline.rotate([*(one[BASIS] for one in findings), findings[-1][HEAD_BASIS]])
        moments = [value.double() for one in findings for value in one.values()]
        return outline.rotate([_principal(torch.stack(moments).sum(0), kept)])

    def _kept(self, outline: Outline, width: int) -> int:
        if self.hidden is not None:
            if self.hidden > width:
                raise ConfigError(f"the hidden size is only {width}.", where="hidden")
            return self.hidden
        if not self.ratio:
            return width
        step = self.multiple_of
        wanted = (1 - self.ratio) * width
        near = sorted(range(step, width + 1, step), key=lambda count: abs(count - wanted))
        for count in near:
            if outline.loadable(HIDDEN, count) is None:
                return count
        raise ConfigError(
            f"no multiple of {step} columns of {width} can be loaded.",
            where="multiple_of",
            remedy="Lower it, or say hidden.",
        )


def _moments(visit: Visit, last: int) -> dict[str, Tensor]:
    before: Tensor | None = None
    after: Tensor | None = None
    for before_BTD, after_BTD in visit.run():
        before = _add(before, before_BTD)
        if visit.index == last:
            after = _add(after, after_BTD)
    found = {BEFORE: before, AFTER: after}
    return {name: value.float() for name, value in found.items() if value is not None}


def _principal(moments_DD: Tensor, kept: int) -> Tensor:
    """The directions [D, K] of most energy, float64."""
    return torch.linalg.eigh(moments_DD).eigenvectors.flip(1)[:, :kept].contiguous()


def _total(batches: Iterable[Tensor]) -> Tensor:
    """Second moments of all rows of all batches."""
    total: Tensor | None = None
    for rows_BTD in batches:
        total = _add(total, rows_BTD)
    assert total is not None  # there is a window of calibration text at least
    return total


def _basis(visit: Visit, last: Iterable[str], kept: int) -> Tensor:
    """The principal directions of what goes into a block, and of that with what attention adds.

    The latter comes out of the block while its last linear gives nothing.
    """
    weights = {name: visit.block.tensor(name).clone() for name in last}
    for name, value in weights.items():
        visit.block.set_tensor(name, torch.zeros_like(value))
    moments_DD = _total(rows_BTD for pair in visit.rehearse() for rows_BTD in pair)
    for name, value in weights.items():
        visit.block.set_tensor(name, value)
    return _principal(moments_DD, kept)


def _project(
    block: BlockView, writers: Iterable[str], basis_DK: Tensor
) -> Callable[[Tensor], Tensor]:
    """Makes writers write within a basis; gives what brings the block's input there.

    All that reads the stream then reads it in the basis, and norms are those of the sliced block,
    which divide by the same length: this is the sliced block, written in D columns.
    """
    for name in writers:
        value = block.tensor(name)
        basis = basis_DK.to(value.device)
        block.set_tensor(name, basis @ (basis.T @ value.double()))

    def enter(hidden_BTD: Tensor) -> Tensor:
        basis = basis_DK.to(hidden_BTD.device, torch.float32)
        return (hidden_BTD.float() @ basis @ basis.T).to(hidden_BTD)

    return enter


def _add(total_DD: Tensor | None, rows_BTD: Tensor) -> Tensor:
    """Adds XᵀX of rows of root mean square 1; rows of zeros count for nothing."""
    rows_TD = rows_BTD.flatten(0, -2).double()
    size_T1 = rows_TD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    rows_TD = rows_TD / size_T1
    product_DD = rows_TD.T @ rows_TD
    return product_DD if total_DD is None else total_DD + product_DD
