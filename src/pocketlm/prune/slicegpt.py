"""SliceGPT with one rotation for all blocks (arXiv:2401.15024, section 3.3): a narrower stream.

    C = Σ over blocks of Xᵀ X,    X the stream's rows, each scaled to a root mean square of 1,
    Q = the eigenvectors of C, largest eigenvalues first, in float64

and the stream is written in the first columns of Q. The rows are scaled as the norms that read them
scale them, so that the large values of late blocks do not drown those of early ones.
Deviation: the paper turns each block by a matrix of its own and keeps Qᵀ Q' on the residual; no
plain configuration can say that. One matrix loads everywhere and keeps less of a block's energy.

Cost: one pass and a D × D matrix for each block. Legend: D hidden width, K columns kept, T tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.changes import Changes
from pocketlm.core.errors import ConfigError
from pocketlm.core.transform import HIDDEN, Findings, Outline, Survey, Visit
from pocketlm.prune.smaller import Smaller

BEFORE, AFTER = "before", "after"


class Slicegpt(Smaller):
    """SliceGPT: turns the hidden size into its principal components and cuts the smallest.

    Attributes:
        ratio: Share of the hidden size to cut.
        hidden: How many columns to keep, instead of a ratio.
        multiple_of: The number of columns left is a multiple of this.
    """

    ratio: float = Field(default=0.2, ge=0.0, lt=1.0)
    hidden: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(default=8, ge=1)

    def measure(self, survey: Survey) -> Findings:
        """The stream's second moments before each block, and after the last."""
        last = survey.outline.blocks - 1
        return survey.visit(lambda visit: _moments(visit, last))

    def changes(self, outline: Outline, findings: Findings | None) -> Changes:
        """The model with a narrower stream.

        Raises:
            ConfigError: If nothing would be left.
        """
        width = outline.hidden
        kept = self._kept(outline, width)
        matrix_DD = torch.eye(width, dtype=torch.float64)
        if findings is not None:
            moments = [value.double() for one in findings for value in one.values()]
            matrix_DD = torch.linalg.eigh(torch.stack(moments).sum(0)).eigenvectors.flip(1)
        return outline.rotate(matrix_DD[:, :kept].contiguous())

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


def _add(total_DD: Tensor | None, rows_BTD: Tensor) -> Tensor:
    """Adds XᵀX of rows of root mean square 1; rows of zeros count for nothing."""
    rows_TD = rows_BTD.flatten(0, -2).double()
    size_T1 = rows_TD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    rows_TD = rows_TD / size_T1
    product_DD = rows_TD.T @ rows_TD
    return product_DD if total_DD is None else total_DD + product_DD
